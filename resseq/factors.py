"""Small maps for the slots `pre`, `scale`, `skip_scale`: fixed and learned factors, a norm over channels."""

import torch
from torch import Tensor, nn

from resseq.merges import along, fill, project


class LearnedScale(nn.Module):
    """A learned factor on the branch.

    ``λ⊙y``, λ one number, or with ``dim`` one per channel; the result keeps y's dtype.
    ``LearnedScale(0.0)`` is ReZero's and SkipInit's, ``LearnedScale(1e-4, dim=d)`` is LayerScale's.

    Source: Bachlechner et al. 2020, arXiv:2003.04887, eq. 2 (ReZero); De & Smith 2020, arXiv:2002.10444 (SkipInit);
    Touvron et al. 2021, arXiv:2103.17239, eq. 4 (LayerScale).
    Shapes: any; ``channel_dim=1`` for channels-first tensors.
    Raises: ValueError for another number of channels than ``dim``.

    >>> LearnedScale(0.1, dim=8)(torch.ones(4, 8)).sum().item()  # doctest: +ELLIPSIS
    3.20...
    """

    def __init__(self, start: float, *, dim: int | None = None, channel_dim: int = -1):
        super().__init__()
        self.start, self.channel_dim = start, channel_dim
        self.weight = nn.Parameter(torch.empty(1 if dim is None else dim))  # never 0-d: FSDP cannot shard those
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)

    def forward(self, y: Tensor) -> Tensor:
        weight = self.weight.to(y.dtype)
        if len(weight) == 1:
            return y * weight
        if y.shape[self.channel_dim] != len(weight):
            raise ValueError(
                f"LearnedScale: there is one factor per channel; got dim={len(weight)} for a branch of shape "
                f"{tuple(y.shape)}. Use dim={y.shape[self.channel_dim]}."
            )
        return y * along(weight, y, self.channel_dim)

    def extra_repr(self) -> str:
        return f"start={self.start}, dim={len(self.weight)}, channel_dim={self.channel_dim}"


class FixedScale(nn.Module):
    """A fixed factor, where a slot wants a module: ``factor · x``."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


class ScalarBias(nn.Module):
    """One learned number added to every entry: ``x + b``; b starts at 0.

    Source: Zhang et al. 2019, arXiv:1901.09321, section 3 (Fixup's scalar biases).
    """

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.to(x.dtype)


class OverChannels(nn.Module):
    """A norm of the last axis where the channels stand elsewhere, as ConvNeXt has it: of each place of an image.

    Source: Liu et al. 2022, arXiv:2201.03545, section 2.6.
    Shapes: any rank; the same.
    """

    def __init__(self, norm: nn.Module, channel_dim: int):
        super().__init__()
        self.norm, self.channel_dim = norm, channel_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)


class Warmup(nn.Module):
    """A factor that rises from 0 to 1 over the first ``period`` optimizer steps.

    ``min(1, t/T) · y``, t the last step that ``set_step`` was told, T the period.

    The step is part of the state dict, so a saved model keeps its factor. ``resseq train`` calls ``set_step`` before
    each step, the first of them being 1; a loop of your own has to do so too: until then the factor is 0.
    Raises: ValueError for a period of less than one step.
    """

    step: Tensor

    def __init__(self, period: int):
        super().__init__()
        if period < 1:
            raise ValueError(f"Warmup: period is a number of steps; got period={period}. Use 1 or more.")
        self.period = period
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    def reset_parameters(self) -> None:
        self.step.zero_()

    def set_step(self, step: int) -> None:
        """Say which optimizer step comes, counted from 1."""
        self.step.fill_(step)

    def forward(self, y: Tensor) -> Tensor:
        step = self.step.to(torch.promote_types(y.dtype, torch.float32))
        return y * (step / self.period).clamp(max=1.0).to(y.dtype)

    def extra_repr(self) -> str:
        return f"period={self.period}"


class LowRank(nn.Module):
    """The identity and a learned map of low rank: ``x + BAx``.

    A (rank × dim) starts with orthonormal rows, B at 0: the identity.

    Source: Menghani et al. 2024, arXiv:2411.07501 (LAuReL-LR).
    Shapes: any rank, ``dim`` entries along ``channel_dim``.
    """

    def __init__(self, dim: int, rank: int, *, channel_dim: int = -1):
        super().__init__()
        self.channel_dim = channel_dim
        self.down = nn.Parameter(torch.empty(rank, dim))
        self.up = nn.Parameter(torch.empty(dim, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill(self.down, nn.init.orthogonal_(torch.empty(self.down.shape, dtype=torch.float32)))
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        low = project(x, self.down.to(x.dtype), None, self.channel_dim)
        return x + project(low, self.up.to(x.dtype), None, self.channel_dim)

    def extra_repr(self) -> str:
        return f"dim={len(self.up)}, rank={len(self.down)}, channel_dim={self.channel_dim}"


def drop_path(y: Tensor, p: float) -> Tensor:
    """Stochastic depth: drop the branch of each sample with probability p, and rescale those that stay.

    ``y·b/(1−p)``, ``b ~ Bernoulli(1−p)`` one for each index of the first axis; the mean stays y.

    Source: Huang et al. 2016, arXiv:1603.09382, eq. 2 (there the rescaling stands at test time).
    """
    if p == 1.0:
        return y * 0.0
    keep = torch.rand(len(y), *[1] * (y.ndim - 1), device=y.device) >= p
    return y * keep * (1 / (1 - p))
