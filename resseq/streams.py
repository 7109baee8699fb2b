"""Connections whose stream is more than one tensor: lanes, a history of outputs, a pair.

A stream of several tensors is a NamedTuple with a function ``of`` that makes it from a stack's input. Lanes are one
tensor (..., n, D), channels last wherever the sublayers have theirs. The stream carries everything that a residual has
to know of earlier ones; attributes hold parameters alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resseq.connections import Connection, Map
from resseq.merges import add, along, at_least_float32, fill, project, require_one_shape


class Closing(nn.Module):
    """What makes one tensor of a stream, then a norm: ``N(collapse(stream))``."""

    def __init__(self, collapse: Callable[[Any], Tensor], norm: Map | None):
        super().__init__()
        self.collapse, self.norm = collapse, norm

    def forward(self, stream: Any) -> Tensor:
        x = self.collapse(stream)
        return x if self.norm is None else self.norm(x)


# --- lanes ------------------------------------------------------------------------------------------------------------


def to_lanes(x: Tensor, lanes: int, channel_dim: int = -1) -> Tensor:
    """n copies of the input, side by side, channels last."""
    x = x.movedim(channel_dim, -1).unsqueeze(-2)
    return x.expand(*x.shape[:-2], lanes, x.shape[-1])


def mean_of_lanes(lanes: Tensor, channel_dim: int = -1) -> Tensor:
    """The papers take the sum, which to a norm is the same; without a norm, the mean keeps equal lanes as they are."""
    return lanes.mean(-2).movedim(-1, channel_dim)


class HyperMixing(nn.Module):
    """The weights of a hyper-connection: how n lanes H are read, written and mixed.

    ``read = a + s·tanh(N(H) W_a)``, ``write = b + s'·tanh(N(H) W_b)``, ``mix = R + s·tanh(N(H) W_r)``; a, b and R are
    learned and start at e_k, 1 and I, the matrices W at 0, s and s' at 0.01. N is the layer norm. R is kept row by row.

    Source: Zhu et al. 2024, arXiv:2409.19606, section 2.
    Shapes: lanes (..., n, D) -> read (..., n), write (..., n), mix (..., n, n): from the row's lane to the column's.
    Args:
        first: the lane k that is read at the start.
        dynamic: whether the lanes have a say; without, the weights are a, b and R.
    """

    def __init__(self, dim: int, lanes: int, first: int, *, dynamic: bool = True):
        super().__init__()
        self.first, self.dynamic = first, dynamic
        self.read = nn.Parameter(torch.empty(lanes))
        self.write = nn.Parameter(torch.empty(lanes))
        self.mix = nn.Parameter(torch.empty(lanes * lanes))  # flat: optimizers decay what has two axes
        if dynamic:
            self.norm = nn.LayerNorm(dim)
            self.weight = nn.Parameter(torch.empty(lanes + 2, dim))
            self.scale = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        eye = torch.eye(len(self.read))
        fill(self.read, eye[self.first])
        nn.init.ones_(self.write)
        fill(self.mix, eye.flatten())
        if self.dynamic:
            self.norm.reset_parameters()
            nn.init.zeros_(self.weight)
            nn.init.constant_(self.scale, 0.01)

    def forward(self, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fixed = self.mix.unflatten(0, (len(self.read), -1))
        if not self.dynamic:
            return self.read, self.write, fixed
        moved = torch.tanh(F.linear(self.norm(lanes), self.weight)).to(self.scale.dtype)
        read, write, mix = moved.split((1, 1, len(self.read)), -1)
        return (
            self.read + self.scale[0] * read.squeeze(-1),
            self.write + self.scale[1] * write.squeeze(-1),
            fixed + self.scale[0] * mix,
        )


def sinkhorn(logits: Tensor, steps: int = 20) -> Tensor:
    """A doubly stochastic matrix: exp(logits), its columns and rows in turn made to sum to 1.

    Source: Sinkhorn and Knopp 1967; Xie et al. 2025, arXiv:2512.24880, section 4.
    Shapes: (..., n, n) -> (..., n, n). Rows sum to 1 to rounding, columns as far as the steps bring them.
    """
    matrix = (logits - logits.amax((-2, -1), keepdim=True)).exp()
    for _ in range(steps):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


class ManifoldMixing(nn.Module):
    """The weights of a manifold-constrained hyper-connection: mixing keeps the mean of the lanes.

    ``read = σ(a + s₁·v W_a)``, ``write = 2σ(b + s₂·v W_b)``, ``mix = Sinkhorn(R + s₃·v W_r)ᵀ``, v the n·D entries of
    the lanes over their root mean square. The matrices W start at 0 and s at 0.01; a at 8 for lane k and −8 for the
    others, b at 0 (write 1), R at 0 on the diagonal and −8 off it.

    Source: Xie et al. 2025, arXiv:2512.24880, section 4. The paper does not give the starts of a, b and R; these make
    the net start as pre-norm does, and R near the identity, so that the lanes stay distinct: mixed evenly they would be
    equal within a few layers.
    Shapes: as HyperMixing. Sinkhorn runs in the dtype of the weights.
    """

    def __init__(self, dim: int, lanes: int, first: int):
        super().__init__()
        self.first = first
        self.read = nn.Parameter(torch.empty(lanes))
        self.write = nn.Parameter(torch.empty(lanes))
        self.mix = nn.Parameter(torch.empty(lanes * lanes))  # flat: optimizers decay what has two axes
        self.weight = nn.Parameter(torch.empty(lanes * (lanes + 2), lanes * dim))
        self.scale = nn.Parameter(torch.empty(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        eye = torch.eye(len(self.read))
        fill(self.read, 16.0 * eye[self.first] - 8.0)
        nn.init.zeros_(self.write)
        fill(self.mix, 8.0 * eye.flatten() - 8.0)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.scale, 0.01)

    def forward(self, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, flat = len(self.read), lanes.flatten(-2)
        moved = F.linear(F.rms_norm(flat, flat.shape[-1:], eps=1e-6), self.weight).to(self.scale.dtype)
        read, write, mix = moved.split((n, n, n * n), -1)
        return (
            torch.sigmoid(self.read + self.scale[0] * read),
            2 * torch.sigmoid(self.write + self.scale[1] * write),
            sinkhorn((self.mix + self.scale[2] * mix).unflatten(-1, (n, n))).transpose(-2, -1),
        )


class Lanes(Connection):
    """The stream is n lanes h: read as a weighted sum, mixed among themselves, written to with weights.

    ``y = F(pre(Σ_i read_i h_i))``, ``h_j ← Σ_i mix_ij h_i + write_j y``.

    Args:
        mixing: a map of the lanes to (read, write, mix): HyperMixing, ManifoldMixing.
        channel_dim: where the sublayer has its channels.
    """

    def __init__(self, mixing: nn.Module, *, channel_dim: int = -1, **branch: Any):
        super().__init__(**branch)
        self.mixing, self.channel_dim = mixing, channel_dim

    def keeps_input(self) -> bool:
        return False  # the sum is made for the sublayer alone

    def read(self, stream: Tensor) -> tuple[Tensor, Any]:
        read, write, mix = (weight.to(stream.dtype) for weight in self.mixing(stream))
        # multiplied and summed, here and below: a matmul under autocast would round the lanes
        x = (read.unsqueeze(-1) * stream).sum(-2).movedim(-1, self.channel_dim)
        return self.prepare(x), (write, mix)

    def write(self, stream: Tensor, y: Tensor, carry: Any) -> Tensor:
        write, mix = carry
        y = self.finish(y).movedim(self.channel_dim, -1).to(stream.dtype)
        require_one_shape(stream[..., 0, :], y)
        lanes = range(stream.shape[-2])
        return torch.stack(
            [(mix[..., j].unsqueeze(-1) * stream).sum(-2) + write[..., j].unsqueeze(-1) * y for j in lanes], -2
        )


# --- history ----------------------------------------------------------------------------------------------------------


def weighted_sum(weights: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """``Σ_i w_i v_i``, term by term: stacked, the values would be kept a second time for the backward pass."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


class Layered(NamedTuple):
    """The current tensor, and what it is averaged with: the input and every layer's output."""

    x: Tensor
    outputs: tuple[Tensor, ...]

    @staticmethod
    def of(x: Tensor) -> "Layered":
        return Layered(x, (x,))

    def current(self) -> Tensor:
        return self.x


class DepthWeights(nn.Module):
    """``Σ_j α_j X_j``; α starts at 0, …, 0, 1."""

    def __init__(self, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill(self.weight, torch.eye(len(self.weight))[-1])

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        return weighted_sum(self.weight.to(outputs[0].dtype).unbind(), outputs)


class DepthAverage(Connection):
    """Pre-norm inside a layer, and at its end a weighted average over the depth.

    ``x ← x + F(pre(x))``; at the end of layer l, ``X_l = x``, ``x ← Σ_{j≤l} α_j X_j``.

    Args:
        average: DepthWeights for the last residual of a layer, None for the others.
    """

    def __init__(self, average: nn.Module | None, **branch: Any):
        super().__init__(**branch)
        self.average = average

    def read(self, stream: Layered) -> tuple[Tensor, None]:
        return self.prepare(stream.x), None

    def write(self, stream: Layered, y: Tensor, carry: None) -> Layered:
        x = add(stream.x, self.finish(y)).to(stream.x.dtype)
        if self.average is None:
            return Layered(x, stream.outputs)
        outputs = (*stream.outputs, x)
        return Layered(self.average(outputs), outputs)


class Sources(NamedTuple):
    """The input, and the outputs summed block by block."""

    complete: tuple[Tensor, ...]
    current: Tensor | None = None
    """The sum so far of a block that is not complete."""

    @staticmethod
    def of(x: Tensor) -> "Sources":
        return Sources((x,))


class AttendOverDepth(nn.Module):
    """``Σ_i a_i v_i``, ``a = softmax_i(w·v_i / rms(v_i))``, at each position; w starts at 0: the mean.

    ``rms(v) = √(mean v² + 1e-6)``

    Source: Kimi Team 2026, arXiv:2603.15031.
    Shapes: Sources of any shape with D entries along channel_dim -> one such tensor.
    """

    def __init__(self, dim: int, channel_dim: int = -1):
        super().__init__()
        self.channel_dim = channel_dim
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, stream: Sources) -> Tensor:
        values = stream.complete if stream.current is None else (*stream.complete, stream.current)
        first, dim = values[0], self.channel_dim
        query = at_least_float32(along(self.weight, first, dim))
        scores = [
            (v * query).sum(dim, keepdim=True) * (v.square().mean(dim, keepdim=True) + 1e-6).rsqrt()
            for v in map(at_least_float32, values)
        ]
        return weighted_sum(torch.stack(scores).softmax(0).to(first.dtype).unbind(), values)


class FromHistory(Connection):
    """Each sublayer reads what is gathered of the earlier outputs; no sum runs along.

    ``v_l = F(pre(gather(v_0, …, v_{l−1})))``, the outputs of a block summed to one v.

    Args:
        gather: AttendOverDepth or SideBySide.
        ends_block: whether the residual is the last of its block.
    """

    def __init__(self, gather: nn.Module, ends_block: bool, **branch: Any):
        super().__init__(**branch)
        self.gather, self.ends_block = gather, ends_block

    def keeps_input(self) -> bool:
        return False  # what is gathered is made for the sublayer alone

    def read(self, stream: Sources) -> tuple[Tensor, None]:
        return self.prepare(self.gather(stream)), None

    def write(self, stream: Sources, y: Tensor, carry: None) -> Sources:
        complete, current = stream
        y, first = self.finish(y), complete[0]
        require_one_shape(first, y)
        y = y.to(first.dtype)
        current = y if current is None else current + y
        return Sources((*complete, current)) if self.ends_block else Sources(complete, current)


class SideBySide(nn.Module):
    """All outputs side by side, normed, and mapped down to D: ``W N([v_0; …; v_{l−1}])``; W starts Xavier uniform.

    Source: Huang et al. 2017, arXiv:1608.06993, section 3: the bottleneck's 1×1 convolution.
    Shapes: Sources, ``count`` complete ones with ``dim`` entries along channel_dim -> one such tensor.
    """

    def __init__(self, dim: int, count: int, norm: Map | None, channel_dim: int = -1):
        super().__init__()
        self.norm, self.channel_dim = norm, channel_dim
        self.down = _Down(dim * count, dim, channel_dim)

    def forward(self, stream: Sources) -> Tensor:
        x = torch.cat(stream.complete, self.channel_dim)
        return self.down(x if self.norm is None else self.norm(x)).to(x.dtype)


class _Down(nn.Module):
    """A linear map along channel_dim, without bias."""

    def __init__(self, dim_in: int, dim: int, channel_dim: int):
        super().__init__()
        self.channel_dim = channel_dim
        self.weight = nn.Parameter(torch.empty(dim, dim_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, None, self.channel_dim)


# --- pairs ------------------------------------------------------------------------------------------------------------


class Dual(NamedTuple):
    """A post-norm stream and, beside it, the sum of all branches, which no norm touches."""

    normed: Tensor
    total: Tensor

    @staticmethod
    def of(x: Tensor) -> "Dual":
        return Dual(x, x)


class DualPath(Connection):
    """``x ← post(x + y)``, ``d ← d + y``, ``y = F(pre(x))``."""

    def __init__(self, post: Map | None, **branch: Any):
        super().__init__(**branch)
        self.post = post

    def read(self, stream: Dual) -> tuple[Tensor, None]:
        return self.prepare(stream.normed), None

    def write(self, stream: Dual, y: Tensor, carry: None) -> Dual:
        y, dtype = self.finish(y), stream.normed.dtype
        normed = add(stream.normed, y)
        return Dual((normed if self.post is None else self.post(normed)).to(dtype), stream.total + y.to(dtype))


class SumOfDual(nn.Module):
    """``x + N(d)``."""

    def __init__(self, norm: Map | None):
        super().__init__()
        self.norm = norm

    def forward(self, stream: Dual) -> Tensor:
        normed, total = stream
        return normed + (total if self.norm is None else self.norm(total))


class Pair(NamedTuple):
    """Two tensors alike: the branch reads the second and joins the first, then they change places."""

    first: Tensor
    second: Tensor

    @staticmethod
    def of(x: Tensor) -> "Pair":
        return Pair(x, x)

    def mean(self) -> Tensor:
        return (self.first + self.second) / 2


class Coupling(Connection):
    """``(a, b) ← (b, a + F(pre(b)))``. The pair that went in can be had back from the one that came out."""

    def read(self, stream: Pair) -> tuple[Tensor, None]:
        return self.prepare(stream.second), None

    def write(self, stream: Pair, y: Tensor, carry: None) -> Pair:
        return Pair(stream.second, add(stream.first, self.finish(y)).to(stream.first.dtype))

    def known_before(self, after: Pair) -> Pair:
        """The pair that went in, as far as the one that came out shows it: (0, b)."""
        return Pair(torch.zeros_like(after.second), after.first)

    def inverse(self, after: Pair, again: Pair) -> Pair:
        """The pair that went in; ``again`` is what the residual makes of ``known_before``: (b, F(pre(b)))."""
        return Pair(after.second - again.second, after.first)
