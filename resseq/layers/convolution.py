"""The convolution block of text networks as a sublayer, and the shortcuts for a change of shape."""

import torch.nn.functional as F
from torch import Tensor, nn

from resseq.layers.dropout import Dropout
from resseq.layers.linear import Conv1d, Init
from resseq.layers.pooling import Halving, thin_out


class ConvBlock(nn.Module):
    """Two convolutions over time, the first of which may widen and stride.

    ``N(W₂ ∗ ReLU(N(W₁ ∗ x)))``, N batch normalisation; without the outer N where ``ends_in_norm`` is False, for
    schemes that bring their own norm.

    Padding is set to zero before each convolution, so it never reaches a real token. In training the batch statistics
    count every position, padding too; sorting batches by length keeps that share small.

    Source: Conneau et al. 2016, arXiv:1606.01781, figure 2.
    Shapes: x (B, C, L), mask (B, L · mask_stride) True = real token -> (B, C', ⌈L/stride⌉).
    Args:
        mask_stride: tokens of the text for each position of x, so that one mask serves the whole network.
        halving: what halves the length where stride is 2, in place of the first convolution's stride.
        dropout: probability that a channel's value at one position is zeroed between the convolutions.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        mask_stride: int = 1,
        halving: Halving | None = None,
        ends_in_norm: bool = True,
        dropout: float = 0.0,
        init: Init = "xavier",
    ):
        super().__init__()
        self.stride, self.mask_stride = stride, mask_stride
        self.halving = halving if stride == 2 else None
        self.into = Conv1d(dim, dim_out, kernel_size, stride=1 if self.halving else stride, bias=False, init=init)
        self.norm = nn.BatchNorm1d(dim_out)
        self.dropout = Dropout(dropout)
        self.out = Conv1d(dim_out, dim_out, kernel_size, bias=not ends_in_norm, init=init)
        self.last_norm = nn.BatchNorm1d(dim_out) if ends_in_norm else None

    def weights(self) -> list[tuple[str, Tensor]]:
        """The filters by role, in order of application."""
        return [("in", self.into.weight), ("out", self.out.weight)]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = hide_padding(x, mask, self.mask_stride)
        if self.halving:
            x = self.halving(x, None if mask is None else thin_out(mask, self.mask_stride))
        h = self.dropout(F.relu(self.norm(self.into(x))))
        y = self.out(hide_padding(h, mask, self.mask_stride * self.stride))
        return y if self.last_norm is None else self.last_norm(y)


def hide_padding(x: Tensor, mask: Tensor | None, mask_stride: int = 1) -> Tensor:
    """Set x (B, C, L) to zero where the mask, taken at every mask_stride-th token, is False."""
    return x if mask is None else x * thin_out(mask, mask_stride)[:, None].to(x.dtype)


class PadShortcut(nn.Module):
    """The shortcut without weights: every stride-th position, new channels zero.

    Source: He et al. 2015, arXiv:1512.03385, section 3.3, option A.
    Shapes: (B, C, L) -> (B, C', ⌈L/stride⌉), C' ≥ C; for images H and W alike.
    """

    def __init__(self, dim: int, dim_out: int, stride: int = 1):
        super().__init__()
        self.extra, self.stride = dim_out - dim, stride

    def forward(self, x: Tensor) -> Tensor:
        space = x.ndim - 2
        if self.stride > 1:
            x = x[(..., *[slice(None, None, self.stride)] * space)].clone()  # else pad would lose channels_last
        return F.pad(x, (*[0, 0] * space, 0, self.extra))


class HalvedShortcut(nn.Module):
    """A shortcut that pools as its branch does before it widens: ``S(halve(x))``.

    Shapes: x (B, C, L), mask (B, L · mask_stride) -> (B, C', ⌈L/2⌉).
    """

    takes_mask = True

    def __init__(self, halving: Halving, widen: nn.Module, mask_stride: int):
        super().__init__()
        self.halving, self.widen, self.mask_stride = halving, widen, mask_stride

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.widen(self.halving(x, None if mask is None else thin_out(mask, self.mask_stride)))
