"""The named recipes over depth: a connection for each place, how the stream opens and closes, how weights start."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from resseq.connections import Connection, Map, OneStream
from resseq.merges import GRUGate, Highway, LearnedScale, branch_only

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a residual stands in its stack; every count starts at 0."""

    index: int  # among the residuals
    count: int
    layer: int
    layers: int
    part: int  # among the residuals of its layer
    parts: int
    dim: int
    dim_out: int
    norm: Norm | None
    sublayer: Any
    shortcut: Map | None = None
    drop_path: float = 0.0
    activation: Callable[[], nn.Module] | None = None
    channel_dim: int = -1

    def norm_before(self) -> nn.Module | None:
        """A norm N of the sublayer's input."""
        return self.norm(self.dim) if self.norm else None

    def norm_after(self) -> nn.Module | None:
        """A norm N of the sublayer's output, or of the sum."""
        return self.norm(self.dim_out) if self.norm else None

    def activate(self) -> nn.Module | None:
        """The stack's φ: a ResNet's ReLU after the sum; None, the identity, in a Transformer."""
        return self.activation() if self.activation else None


class Scheme:
    """A recipe over depth. It holds options and no module: one scheme serves any number of stacks.

    Write your own by giving ``connection``; the rest is there for those schemes that need it. In equations x is the
    stream, F the sublayer, N a norm, S the shortcut, φ the stack's activation, l the layer from 1, L their number and
    M the number of residuals.

    >>> from resseq import Stack
    >>> class Half(Scheme):
    ...     def connection(self, place):
    ...         return OneStream(pre=place.norm_before(), scale=0.5)
    >>> Stack([nn.Linear(8, 8)], dim=8, scheme=Half()).residuals[0].connection.scale
    0.5
    """

    normed = True  # the equation holds a norm; where it does not, a convolution block ends in a norm of its own

    def connection(self, place: Place) -> Connection:
        """The connection of one residual."""
        raise NotImplementedError

    def connections(self, places: Sequence[Place]) -> list[Connection]:
        """All connections of a stack; for the schemes that share a parameter between residuals."""
        return [self.connection(place) for place in places]

    def open(self, first: Place) -> nn.Module:
        """What makes the stream from the stack's input."""
        return nn.Identity()

    def close(self, last: Place) -> nn.Module:
        """What makes the stack's output from the stream."""
        return nn.Identity()

    def start(self, residuals: Sequence[Any]) -> None:
        """Starting weights of the sublayers, where the scheme has a rule for them."""


class Plain(Scheme):
    """No shortcut: the control of every experiment.

    ``N(F(x))``; ``φ(F(x))`` where the stack has no norm.

    Source: the plain nets of He et al. 2015, arXiv:1512.03385, section 3.3.
    """

    normed = False

    def connection(self, place: Place) -> Connection:
        return OneStream(
            merge=branch_only,
            post=place.norm_after() if place.norm else place.activate(),
            drop_path=place.drop_path,
        )


class SumOnly(Scheme):
    """The residual connection and nothing else.

    ``φ(S(x) + F(x))``: ``ReLU(S(x) + F(x))`` in a ResNet, ``x + F(x)`` where the stack has no activation.

    Source: He et al. 2015, arXiv:1512.03385, eq. 1 and 2.
    """

    normed = False

    def connection(self, place: Place) -> Connection:
        return OneStream(shortcut=place.shortcut, post=place.activate(), drop_path=place.drop_path)


class Post(Scheme):
    """Post-norm, the original Transformer.

    ``N(S(x) + F(x))``

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(shortcut=place.shortcut, post=place.norm_after(), drop_path=place.drop_path)


class _EndsInNorm(Scheme):
    """The schemes whose stream is never normalised itself: the stack closes with a norm."""

    def close(self, last: Place) -> nn.Module:
        return last.norm(last.dim_out) if last.norm else nn.Identity()


class Pre(_EndsInNorm):
    """Pre-norm.

    ``S(x) + F(N(x))``; close: N.

    Source: He et al. 2016, arXiv:1603.05027; for Transformers Xiong et al. 2020, arXiv:2002.04745, table 1.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(pre=place.norm_before(), shortcut=place.shortcut, drop_path=place.drop_path)


class PreAct(Pre):
    """Pre-activation: pre-norm whose shortcut reads N(x), not x, where the shape changes; N holds a ReLU.

    ``x + F(N(x))``, or ``S(N(x)) + F(N(x))``; close: N.

    Source: He et al. 2016, arXiv:1603.05027, section 4 and appendix.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(
            pre=place.norm_before(),
            shortcut=place.shortcut,
            shortcut_reads="stream" if place.shortcut is None else "pre",
            drop_path=place.drop_path,
        )


class Sandwich(_EndsInNorm):
    """A norm on both sides of the sublayer.

    ``S(x) + N(F(N(x)))``; close: N.

    Source: Ding et al. 2021, arXiv:2105.13290, section 2.4 (CogView); Kim et al. 2025, arXiv:2502.02732 (Peri-LN).
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(
            pre=place.norm_before(),
            branch=place.norm_after(),
            shortcut=place.shortcut,
            drop_path=place.drop_path,
        )


class Branch(_EndsInNorm):
    """A norm on the branch's output only ("res-post-norm").

    ``S(x) + N(F(x))``; close: N.

    Source: Liu et al. 2021, arXiv:2111.09883, section 3.2 (Swin v2); OLMo 2 2025, arXiv:2501.00656, section 2.1.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(branch=place.norm_after(), shortcut=place.shortcut, drop_path=place.drop_path)


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
        return OneStream(shortcut=place.shortcut, merge=merge, post=place.activate(), drop_path=place.drop_path)


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
            drop_path=place.drop_path,
        )


class ReZero(Scheme):
    """A learned factor on the branch that starts at 0, and no norm.

    ``S(x) + λF(x)``; λ = 0, one for each layer, shared by its residuals.

    Source: Bachlechner et al. 2020, arXiv:2003.04887, eq. 2 and section 5.
    """

    normed = False

    def connections(self, places: Sequence[Place]) -> list[Connection]:
        scales = [LearnedScale(0.0) for _ in range(places[-1].layer + 1)]
        return [
            OneStream(scale=scales[place.layer], shortcut=place.shortcut, drop_path=place.drop_path) for place in places
        ]


class LayerScale(_EndsInNorm):
    """Pre-norm with a learned factor for each channel of the branch.

    ``S(x) + λ⊙F(N(x))``; λ starts at 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond; close: N.

    Source: Touvron et al. 2021, arXiv:2103.17239, eq. 4 and section 2.
    """

    def __init__(self, start_at: float | None = None):
        self.start_at = start_at

    def connection(self, place: Place) -> Connection:
        start_at = self.start_at
        if start_at is None:
            start_at = 0.1 if place.layers <= 18 else 1e-5 if place.layers <= 24 else 1e-6
        return OneStream(
            pre=place.norm_before(),
            scale=LearnedScale(start_at, dim=place.dim_out, channel_dim=place.channel_dim),
            shortcut=place.shortcut,
            drop_path=place.drop_path,
        )


class DeepNorm(Scheme):
    """Post-norm that trains at a thousand layers: a larger shortcut, a smaller start.

    ``N(αS(x) + F(x))``, ``α = M^¼``, and every weight of a sublayer starts Xavier uniform with gain ``β = (4M)^-¼``,
    query and key with gain 1. With two residuals to a layer these are the paper's (2L)^¼ and (8L)^-¼.

    Source: Wang et al. 2022, arXiv:2203.00555, figure 2 and section 4.
    Raises: ValueError for a sublayer without ``weights() -> [(role, tensor), …]``.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(
            skip_scale=place.count**0.25,
            shortcut=place.shortcut,
            post=place.norm_after(),
            drop_path=place.drop_path,
        )

    def start(self, residuals: Sequence[Any]) -> None:
        gain = (4 * len(residuals)) ** -0.25
        for residual in residuals:
            for role, weight in weights_of(residual.sublayer, "deepnorm"):
                nn.init.xavier_uniform_(weight, gain=1.0 if role in ("query", "key") else gain)


def weights_of(sublayer: Any, scheme: str) -> list[tuple[str, Tensor]]:
    """The (role, tensor) pairs of a sublayer, in order of application; fused matrices as views."""
    if not hasattr(sublayer, "weights"):
        raise ValueError(
            f"Scheme {scheme!r}: sets the starting weights by role; got a {type(sublayer).__name__} without weights(). "
            f"Give it a method weights() -> [(role, tensor), …] with roles such as query, key, value, in, out."
        )
    return sublayer.weights()


SCHEMES = MappingProxyType(
    {
        "plain": Plain,
        "residual": SumOnly,
        "post": Post,
        "pre": Pre,
        "preact": PreAct,
        "sandwich": Sandwich,
        "branch": Branch,
        "highway": HighwayGates,
        "gru": GRU,
        "rezero": ReZero,
        "layerscale": LayerScale,
        "deepnorm": DeepNorm,
    }
)


def find_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of a name in SCHEMES, with its defaults; a Scheme is taken as it is."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        close = difflib.get_close_matches(str(scheme), SCHEMES, 1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"Stack: scheme is a name or an instance of a Scheme; got scheme={scheme!r}. {hint}"
            f"Use one of {', '.join(SCHEMES)}."
        )
    return SCHEMES[scheme]()
