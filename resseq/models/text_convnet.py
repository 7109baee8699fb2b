"""A residual network of one-dimensional convolutions for text."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resseq.layers.convolution import ConvBlock, HalvedShortcut, PadShortcut, hide_padding
from resseq.layers.dropout import Dropout
from resseq.layers.linear import Conv1d, Embedding, Init, Linear
from resseq.layers.pooling import (
    Halving,
    K,
    find_pooling,
    halve_by_kmax,
    halve_by_max,
    pool_kmax,
    pool_max,
    pool_mean,
    real_tokens,
    thin_out,
)
from resseq.layers.stages import Step, plan_steps, share_out
from resseq.merges import branch_only
from resseq.residual import Residual, reset_children
from resseq.schemes import Scheme, find_scheme
from resseq.schemes.norms import Plain
from resseq.stack import Stack

# how the length is halved (None: by a strided convolution), and how the text becomes one vector
HALVING_AND_POOLING = {
    "max": (halve_by_max, pool_max),
    "kmax": (halve_by_kmax, pool_kmax),
    "conv": (None, pool_max),
    "mean": (None, pool_mean),
}
# what the paper has: of each depth the blocks of two convolutions in its four stages
VDCNN: dict[str, Any] = {
    "depth": {9: (1, 1, 1, 1), 17: (2, 2, 2, 2), 29: (5, 5, 2, 2), 49: (8, 8, 5, 3)},
    "shortcut": ("none", "pad", "projection"),
    "pooling": ("kmax", "max", "conv"),
}


def _norm_and_relu(dim: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(dim), nn.ReLU())


def _plan(dim: int, depth: int, stages: int | Sequence[int]) -> list[Step]:
    """The blocks' steps; ValueError where depth leaves none, or where the stages hold another number of them."""
    if depth < 2:
        raise ValueError(f"TextConvNet: needs a block of two convolutions; got depth={depth}. Use depth=3 or more.")
    blocks = share_out(depth // 2, stages) if isinstance(stages, int) else list(stages)
    if sum(blocks) != depth // 2:
        raise ValueError(
            f"TextConvNet: the stages' blocks must sum to depth // 2 = {depth // 2}; got stages={stages}. "
            f"Use depth={2 * sum(blocks) + 1}."
        )
    return plan_steps(dim, [dim * 2**stage for stage in range(len(blocks))], blocks)


def _shortcut(kind: str, step: Step, halving: Halving | None, mask_stride: int, init: Init) -> nn.Module | None:
    """What stands on the shortcut beside a block: nothing, unless the shape changes there."""
    if kind not in ("none", "pad", "projection"):
        raise ValueError(
            f"TextConvNet: shortcut is 'none', 'pad' or 'projection'; got shortcut={kind!r}. Use 'projection'."
        )
    if kind == "none" or not step.reshapes:
        return None
    stride = 1 if halving else step.stride
    if kind == "pad":
        widen = PadShortcut(step.dim, step.dim_out, stride)
    else:
        widen = Conv1d(step.dim, step.dim_out, 1, stride=stride, bias=False, init=init)
    return HalvedShortcut(halving, widen, mask_stride) if halving else widen


def _head(dims: Sequence[int], init: Init) -> nn.Module:
    """Linear maps from width to width, with ReLUs between."""
    first, *others = (Linear(dim, dim_out, init=init) for dim, dim_out in pairwise(dims))
    return nn.Sequential(first, *(part for each in others for part in (nn.ReLU(), each))) if others else first


class TextConvNet(nn.Module):
    """A text classifier: embeddings, one convolution, stages of residual blocks, pooling, a head of linear maps.

    Each stage after the first starts with a block that halves the length and doubles the width; there the shortcut
    pads or projects. Padding stands at the end of a text. In evaluation it changes no logit. In training batch
    normalisation takes its mean and variance over every position of the batch, padding too, so a text's logits
    depend on the batch it came in; sorting batches by length keeps that share small.

    Source: Conneau et al. 2016, arXiv:1606.01781; ``vdcnn`` is the paper's own net.
    Shapes: ids (B, L) int64, mask (B, L) True = real token (all real unless given) -> logits (B, C).
    Args:
        depth: convolutions: one, then depth // 2 blocks of two, shared out evenly among the stages.
        dim: width of the first stage.
        stages: number of widths; fewer where there are fewer blocks. Or the number of blocks of each width.
        shortcut: "projection", a 1×1 convolution, or "pad", new channels zero, where the shape changes; "none" for the
            scheme "plain", which has none anywhere.
        dropout: probability for embeddings, for the blocks' inside and the pooled vector alike.
        pooling: how positions become fewer, between stages and at the end: "max" of three, then of all; "kmax", the
            greater half of each channel, then the greatest eight, in their order; "conv", a strided convolution, then
            the maximum; "mean", a strided convolution, then the mean.
        final_pooling: the pooling at the end, where it is not that of ``pooling``.
        embedding_dim: width of the embeddings; dim unless given.
        stem_norm: whether batch normalisation and ReLU follow the first convolution.
        hidden: widths of the head's hidden layers, each followed by ReLU.

    >>> model = TextConvNet(100, num_classes=3, depth=9, dim=8)
    >>> model(torch.randint(100, (4, 16))).shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        depth: int = 9,
        *,
        dim: int = 256,
        stages: int | Sequence[int] = 1,
        kernel_size: int = 3,
        scheme: str | Scheme = "residual",
        shortcut: Literal["none", "pad", "projection"] = "projection",
        dropout: float = 0.3,
        token_dropout: float = 0.0,
        drop_path: float = 0.0,
        pooling: Literal["max", "kmax", "conv", "mean"] = "max",
        final_pooling: Literal["max", "kmax", "mean"] | None = None,
        embedding_dim: int | None = None,
        stem_norm: bool = True,
        hidden: Sequence[int] = (),
        init: Init = "xavier",
    ):
        super().__init__()
        recipe = find_scheme(scheme)
        if shortcut == "none" and not isinstance(recipe, Plain):
            raise ValueError(
                f"TextConvNet: every scheme but 'plain' needs a shortcut; got scheme={scheme!r} and shortcut='none'. "
                f"Use shortcut='projection'."
            )
        halving, _ = find_pooling(pooling, HALVING_AND_POOLING)
        _, self.pool = find_pooling(final_pooling or pooling, HALVING_AND_POOLING, "final_pooling")
        steps = _plan(dim, depth, stages)
        *mask_strides, self.mask_stride = accumulate((step.stride for step in steps), mul, initial=1)
        blocks, shortcuts = [], []
        for step, mask_stride in zip(steps, mask_strides, strict=True):
            blocks.append(
                ConvBlock(
                    step.dim,
                    step.dim_out,
                    kernel_size=kernel_size,
                    stride=step.stride,
                    mask_stride=mask_stride,
                    halving=halving,
                    ends_in_norm=not recipe.normed,
                    dropout=dropout,
                    init=init,
                )
            )
            shortcuts.append(_shortcut(shortcut, step, halving, mask_stride, init))
        self.embedding = Embedding(vocab_size, embedding_dim or dim, init=init)
        self.token_dropout = nn.Dropout1d(token_dropout)
        self.stem = Conv1d(embedding_dim or dim, dim, kernel_size, bias=False, init=init)
        self.stem_norm = _norm_and_relu(dim) if stem_norm else nn.Identity()
        self.stack = Stack(
            blocks,
            dim=[dim, *(step.dim_out for step in steps)],
            scheme=recipe,
            norm=_norm_and_relu if recipe.normed else None,
            activation=nn.ReLU,
            drop_path=drop_path,
            shortcuts=shortcuts,
            channel_dim=1,
        )
        self.dropout = Dropout(dropout)
        pooled = steps[-1].dim_out * (K if self.pool is pool_kmax else 1)
        self.head = _head([pooled, *hidden, num_classes], init)

    @classmethod
    def vdcnn(
        cls,
        num_classes: int,
        depth: int = 9,
        vocab_size: int = 69,
        shortcut: Literal["none", "pad", "projection"] = "none",
        pooling: Literal["max", "kmax", "conv"] = "kmax",
        init: Init = "xavier",
        scheme: str | Scheme | None = None,
    ) -> "TextConvNet":
        """The very deep convolutional net of the paper: 16-wide characters, four stages from 64 to 512, three layers.

        ``scheme`` joins the blocks: unless given, "residual" where there is a shortcut and "plain" where there is none.
        ``pooling`` halves the length between stages; at the end stands k-max, k = 8, whatever it is. ``--tokenizer
        character --vocab-size 69`` gives ids below 69: padding, unknown and [CLS], then the 66 characters that are
        most frequent in the training texts; the paper's fixed alphabet is as large.

        Source: Conneau et al. 2016, arXiv:1606.01781, figure 1, tables 2 and 3.
        Raises: ValueError for another depth, shortcut or pooling, and for a scheme that needs the shortcut it lacks.

        >>> sum(p.numel() for p in TextConvNet.vdcnn(num_classes=4, depth=9).parameters())
        14176084
        """
        given = {"depth": depth, "shortcut": shortcut, "pooling": pooling}
        for name, choices in VDCNN.items():
            if given[name] not in choices:
                raise ValueError(
                    f"TextConvNet.vdcnn: {name} is one of {', '.join(map(str, choices))}; got {name}={given[name]}. "
                    f"Use {name}={next(iter(choices))}."
                )
        return cls(
            vocab_size,
            num_classes,
            depth,
            dim=64,
            stages=VDCNN["depth"][depth],
            scheme=scheme or ("plain" if shortcut == "none" else "residual"),
            shortcut=shortcut,
            dropout=0.0,
            pooling=pooling,
            final_pooling="kmax",
            embedding_dim=16,
            stem_norm=False,
            hidden=(2048, 2048),
            init=init,
        )

    reset_parameters = reset_children

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = real_tokens(ids, mask)
        if torch.compiler.is_exporting() and not self.training:  # no stage may be left with one position: that is fixed
            ids, mask = F.pad(ids, (0, self.mask_stride)), F.pad(mask, (0, self.mask_stride))
        x = self.dropout(self.token_dropout(self.embedding(ids))).transpose(1, 2)
        x = self.stem_norm(self.stem(hide_padding(x, mask)))
        x = self.stack(x, mask=mask)
        pooled = self.pool(x.transpose(1, 2), thin_out(mask, self.mask_stride))
        return self.head(self.dropout(pooled))


class BasicConvResBlock(nn.Module):
    """One block of a very deep convolutional net: ``ReLU(S(x) + BN(conv(ReLU(BN(conv(x))))))``.

    Where the width or the length changes, S is ``downsample``, or a 1×1 convolution if none is given.

    Source: Conneau et al. 2016, arXiv:1606.01781, figure 2.
    Shapes: (B, input_dim, L) -> (B, n_filters, ⌈L/stride⌉), where 2 · padding = kernel_size − 1.
    Args:
        shortcut: whether there is one; without, ``ReLU(BN(conv(ReLU(BN(conv(x))))))``.

    >>> BasicConvResBlock(64, 128, stride=2, shortcut=True)(torch.randn(2, 64, 10)).shape
    torch.Size([2, 128, 5])
    """

    def __init__(
        self,
        input_dim: int = 128,
        n_filters: int = 256,
        kernel_size: int = 3,
        padding: int = 1,
        stride: int = 1,
        shortcut: bool = False,
        downsample: nn.Module | None = None,
    ):
        super().__init__()
        branch = nn.Sequential(
            nn.Conv1d(input_dim, n_filters, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm1d(n_filters),
            nn.ReLU(),
            nn.Conv1d(n_filters, n_filters, kernel_size, padding=padding, bias=False),
            nn.BatchNorm1d(n_filters),
        )
        if downsample is None and Step(input_dim, n_filters, stride).reshapes:
            downsample = Conv1d(input_dim, n_filters, 1, stride=stride, bias=False)
        if shortcut:
            self.block = Residual(branch, shortcut=downsample, post=nn.ReLU())
        else:
            self.block = Residual(branch, merge=branch_only, post=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)
