"""Schemes in which something else stands where the sum was: a gate, a step on the sphere, a weighted sum."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from resseq.connections import Connection, Merge, OneStream
from resseq.factors import LowRank
from resseq.merges import Balance, Delta, GRUGate, Highway, SphereStep, orthogonal
from resseq.schemes.base import EndsInNorm, Place, Scheme, require_stored


class HighwayGates(Scheme):
    """Highway networks: a learned gate instead of the sum, and no norm.

    ``φ(T⊙F(x) + (1−T)⊙S(x))``, ``T = σ(W S(x) + b)``; b starts at −2, W Xavier uniform.

    Source: Srivastava et al. 2015, arXiv:1505.00387, eq. 3; ``gate="shortcut"``: He et al. 2016, arXiv:1603.05027,
    section 3.1.
    """

    normed = False

    def __init__(self, bias: float = -2.0, gate: str = "coupled"):
        self.bias, self.gate = bias, gate

    def connection(self, place: Place) -> Connection:
        merge = Highway(place.dim_out, bias=self.bias, gate=self.gate, channel_dim=place.channel_dim)
        return OneStream(shortcut=place.shortcut, merge=merge, post=place.activate())


class GRU(Scheme):
    """GTrXL: a GRU-type gate joins the rectified branch.

    ``GRUGate(S(x), ReLU(F(N(x))))``; the gate's bias starts at 2.

    Source: Parisotto et al. 2019, arXiv:1910.06764, section 3.
    """

    def __init__(self, bias: float = 2.0):
        self.bias = bias

    def connection(self, place: Place) -> Connection:
        return OneStream(
            pre=place.norm_before(),
            branch=nn.ReLU(),
            shortcut=place.shortcut,
            merge=GRUGate(place.dim_out, bias=self.bias, channel_dim=place.channel_dim),
        )


class NGPT(Scheme):
    """The normalized Transformer: the stream stays on a sphere and moves by learned steps; weights have unit norm.

    ``N(N(S(x)) + a⊙(N(F(x)) − N(S(x))))``, N without weights; a one number per channel, 0.05 at the start. The sphere
    has radius √D where the paper's has 1, so that sublayers read entries of the usual size, which the paper gets by
    factors √D inside them.

    At the start and whenever `constrain` is called, which `resseq train` does after each step, the vectors of the
    stream's width in a sublayer's matrices get length 1: the columns of role "out", which write to the stream, and the
    rows of all others, which read it. Sublayers that do not name their weights() keep theirs, and so does all
    that stands outside the stack; the paper normalises its embeddings too, and query and key once more. Sharded
    matrices (FSDP) are refused.

    Source: Loshchilov et al. 2024, arXiv:2410.01131, eq. 10 and 11.
    """

    normed = False

    def __init__(self, step: float = 0.05):
        self.step = step

    def connection(self, place: Place) -> Connection:
        merge = SphereStep(place.dim_out, step=self.step, channel_dim=place.channel_dim)
        return OneStream(shortcut=place.shortcut, merge=merge)

    def start(self, residuals: Sequence[Any]) -> None:
        self.constrain(residuals)

    @torch.no_grad()
    def constrain(self, residuals: Sequence[Any]) -> None:
        for sublayer in {id(each.sublayer): each.sublayer for each in residuals}.values():
            for role, weight in sublayer.weights() if callable(getattr(sublayer, "weights", None)) else ():
                if hasattr(weight, "device_mesh"):
                    raise ValueError(
                        f"Scheme 'ngpt': keeps the vectors of whole matrices at length 1; got a sharded "
                        f"{type(sublayer).__name__}. Use DistributedDataParallel, or another scheme."
                    )
                require_stored(weight, sublayer, "ngpt")
                vectors = weight.transpose(0, 1) if role == "out" else weight
                length = torch.linalg.vector_norm(vectors, dim=tuple(range(1, vectors.ndim)), keepdim=True)
                vectors.div_(length.clamp(min=torch.finfo(weight.dtype).tiny))


class _PreMerge(EndsInNorm):
    """Pre-norm with another merge than the sum."""

    def merge(self, place: Place) -> Merge:
        raise NotImplementedError

    def connection(self, place: Place) -> Connection:
        return OneStream(pre=place.norm_before(), shortcut=place.shortcut, merge=self.merge(place))


class Orthogonal(_PreMerge):
    """Pre-norm whose branch adds only what is orthogonal to the stream.

    ``S(x) + y − proj_S(x) y``, y = F(N(x)), each position by itself; close: N.

    Source: Oh et al. 2025, arXiv:2505.11881.
    """

    def merge(self, place: Place) -> Merge:
        return partial(orthogonal, channel_dim=place.channel_dim)


class DeltaRule(_PreMerge):
    """Deep delta learning: the branch names a direction, and the stream's part along it is rewritten.

    ``x + β(v − ⟨k, x⟩)k``, k = F(N(x)) at unit length, β = 2σ(…) and v read the stream; β starts at 1; close: N.

    Source: Zhang et al. 2026, arXiv:2601.00417.
    """

    def merge(self, place: Place) -> Merge:
        return Delta(place.dim_out, channel_dim=place.channel_dim)


class LaurelRW(_PreMerge):
    """LAuReL-RW: pre-norm with learned weights of stream and branch.

    ``βS(x) + αF(N(x))``, (β, α) a softmax, ½ and ½ at the start; close: N.

    Source: Menghani et al. 2024, arXiv:2411.07501.
    """

    def merge(self, place: Place) -> Merge:
        return Balance()


class LaurelLR(EndsInNorm):
    """LAuReL-LR: pre-norm with a learned map of low rank on the shortcut.

    ``S(x) + BA S(x) + F(N(x))``; B starts at 0, so this starts as pre-norm; close: N.

    Source: Menghani et al. 2024, arXiv:2411.07501.
    """

    def __init__(self, rank: int = 4):
        self.rank = rank

    def connection(self, place: Place) -> Connection:
        return OneStream(
            pre=place.norm_before(),
            shortcut=place.shortcut,
            skip_scale=LowRank(place.dim_out, self.rank, channel_dim=place.channel_dim),
        )
