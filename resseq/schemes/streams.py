"""Schemes whose stream is more than one tensor: n lanes, a history of outputs, a pair."""

from functools import partial
from typing import Any

from torch import nn

from resseq.connections import Connection
from resseq.schemes.base import Place, Scheme
from resseq.streams import (
    AttendOverDepth,
    Closing,
    Coupling,
    DepthAverage,
    DepthWeights,
    Dual,
    DualPath,
    FromHistory,
    HyperMixing,
    Lanes,
    Layered,
    ManifoldMixing,
    Pair,
    SideBySide,
    Sources,
    SumOfDual,
    mean_of_lanes,
    to_lanes,
)


class _OneWidth(Scheme):
    """The schemes of this file: their streams hold tensors of one shape from end to end."""

    one_width = True


class Hyper(_OneWidth):
    """Hyper-connections: n lanes; each residual learns what it reads of them, how it mixes them and where it writes.

    ``y = F(N(Σ_i a_i h_i))``, ``h_j ← Σ_i R_ij h_i + b_j y``; out N(mean of the lanes). a, b and R depend on the lanes
    unless ``dynamic=False``: see HyperMixing. Starts as the pre-norm net: every lane is its stream.

    Source: Zhu et al. 2024, arXiv:2409.19606. Each sublayer has its own weights, n = 4.
    """

    def __init__(self, lanes: int = 4, dynamic: bool = True):
        self.lanes, self.dynamic = lanes, dynamic

    def mixing(self, place: Place) -> nn.Module:
        return HyperMixing(place.dim, self.lanes, place.index % self.lanes, dynamic=self.dynamic)

    def connection(self, place: Place) -> Connection:
        return Lanes(self.mixing(place), pre=place.norm_before(), channel_dim=place.channel_dim)

    def open(self, first: Place) -> Any:
        return partial(to_lanes, lanes=self.lanes, channel_dim=first.channel_dim)

    def close(self, last: Place) -> nn.Module:
        return Closing(partial(mean_of_lanes, channel_dim=last.channel_dim), last.norm_after())


class ManifoldHyper(Hyper):
    """mHC: hyper-connections whose mixing is doubly stochastic, and whose reading and writing is never negative.

    ``y = F(N(Σ_i a_i h_i))``, ``h_j ← Σ_i R_ij h_i + b_j y``; out N(mean of the lanes), as in Hyper; a, b and R as in
    ManifoldMixing. Starts as the pre-norm net.

    Source: Xie et al. 2025, arXiv:2512.24880, n = 4, 20 Sinkhorn steps.
    """

    def __init__(self, lanes: int = 4):
        super().__init__(lanes)

    def mixing(self, place: Place) -> nn.Module:
        return ManifoldMixing(place.dim, self.lanes, place.index % self.lanes)


class DenseFormer(_OneWidth):
    """Pre-norm whose every layer ends in a learned average of all layers' outputs so far, the input included.

    ``X_l = layer(x_{l−1})``, ``x_l = Σ_{j≤l} α_lj X_j``; α starts at 0, …, 0, 1: the pre-norm net. Out N(x_L).

    Source: Pagliardini et al. 2024, arXiv:2402.02622, without dilation and period.
    """

    def connection(self, place: Place) -> Connection:
        average = DepthWeights(place.layer + 2) if place.part == place.parts - 1 else None
        return DepthAverage(average, pre=place.norm_before())

    def open(self, first: Place) -> Any:
        return Layered.of

    def close(self, last: Place) -> nn.Module:
        return Closing(Layered.current, last.norm_after())


class AttnRes(_OneWidth):
    """Attention residuals: each sublayer reads a softmax-weighted mean of all earlier outputs, the input included.

    ``v_l = F(N(Σ_i a_i v_i))``, ``a = softmax_i(w_l·v_i / rms(v_i))`` over i < l; out ``N(Σ_i a_i v_i)`` with a w of
    its own. w starts at 0, attention at the plain mean: to a norm that knows no scale, pre-norm's sum.

    Source: Kimi Team 2026, arXiv:2603.15031.
    Args:
        blocks: into how many blocks to cut the residuals; the outputs of a block are summed, and count as one v. None:
            each is one.
    """

    def __init__(self, blocks: int | None = None):
        if blocks is not None and blocks < 1:
            raise ValueError(f"AttnRes: blocks is 1 or more, or None; got blocks={blocks}. Use blocks=8.")
        self.blocks = blocks

    def connection(self, place: Place) -> Connection:
        size = 1 if self.blocks is None else -(-place.count // self.blocks)
        return FromHistory(
            AttendOverDepth(place.dim, place.channel_dim),
            ends_block=(place.index + 1) % size == 0,
            pre=place.norm_before(),
        )

    def open(self, first: Place) -> Any:
        return Sources.of

    def close(self, last: Place) -> nn.Module:
        return Closing(AttendOverDepth(last.dim_out, last.channel_dim), last.norm_after())


class BlockAttnRes(AttnRes):
    """Attention residuals over blocks: as AttnRes, over at most eight sums of outputs, so that memory stays bounded.

    ``v_l = F(N(Σ_i a_i b_i))``, ``a = softmax_i(w_l·b_i / rms(b_i))``, b_0 the input, b_i the sum of block i's outputs
    so far; out ``N(Σ_i a_i b_i)`` with a w of its own.

    Source: Kimi Team 2026, arXiv:2603.15031: about eight blocks do nearly as well as all outputs.
    """

    def __init__(self, blocks: int = 8):
        super().__init__(blocks)


class DenseConnections(_OneWidth):
    """DenseNet: each sublayer reads all earlier outputs side by side, the input included.

    ``v_l = F(W_l N([v_0; …; v_{l−1}]))``, out ``W N([v_0; …; v_M])``; W, the bottleneck's 1×1 convolution, starts
    Xavier uniform. A layer grows the stream by as much as its sublayer gives, D, so the W_l have D²·M²/2 weights.

    Source: Huang et al. 2017, arXiv:1608.06993, eq. 2. For layers that are narrower than the stream, and a width that
    grows, write ``Residual(layer, pre=norm, merge=Concat())``.
    """

    def connection(self, place: Place) -> Connection:
        return FromHistory(_side_by_side(place, place.index + 1), ends_block=True)

    def open(self, first: Place) -> Any:
        return Sources.of

    def close(self, last: Place) -> nn.Module:
        return _side_by_side(last, last.count + 1)


def _side_by_side(place: Place, count: int) -> nn.Module:
    return SideBySide(place.dim, count, place.norm_of(place.dim * count), place.channel_dim)


class ResiDual(_OneWidth):
    """A post-norm stream, and beside it the plain sum of its branches, which brings pre-norm's gradient.

    ``x ← N(x + F(x))``, ``d ← d + F(x)``; out ``x + N(d)``. x and d start as the input.

    Source: Xie et al. 2023, arXiv:2304.14802, section 2.3.
    """

    def connection(self, place: Place) -> Connection:
        return DualPath(place.norm_after())

    def open(self, first: Place) -> Any:
        return Dual.of

    def close(self, last: Place) -> nn.Module:
        return SumOfDual(last.norm_after())


class Reversible(_OneWidth):
    """A pair of streams from whose end every earlier one can be had again: training keeps no activations.

    ``y₁ = x₁ + F(N(x₂))``, ``y₂ = x₂ + G(N(y₁))``, F and G sublayers in turn; out ``N((y₁ + y₂)/2)``. Both x start as
    the input.

    In training, memory for activations does not grow with depth, for a third more time; BatchNorm inside would take
    each batch twice, ``spectral_norm`` two steps, and hooks of a sublayer run twice; a sublayer that returns a tuple is
    refused. torch.compile, export and torch.func store as usual, and so do residuals that ``fully_shard`` takes one by
    one, and sublayers that are plain functions. A tensor that a sublayer uses without having it as a parameter or an
    argument gets no gradient; second derivatives want ``recompute=False``.

    Source: Gomez et al. 2017, arXiv:1707.04585; for Transformers: Kitaev et al. 2020, arXiv:2001.04451, section 3.
    Args:
        recompute: False stores the activations, as every other scheme does.
    """

    def __init__(self, recompute: bool = True):
        self.recompute = recompute

    def connection(self, place: Place) -> Connection:
        return Coupling(pre=place.norm_before())

    def open(self, first: Place) -> Any:
        return Pair.of

    def close(self, last: Place) -> nn.Module:
        return Closing(Pair.mean, last.norm_after())
