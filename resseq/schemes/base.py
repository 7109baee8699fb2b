"""What a scheme is: a connection for each place, how the stream opens and closes, how weights start."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from resseq.connections import Connection, Map
from resseq.factors import OverChannels

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a residual stands in its stack; every index starts at 0."""

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
        return self.norm_of(self.dim)

    def norm_after(self) -> nn.Module | None:
        """A norm N of the sublayer's output, or of the sum."""
        return self.norm_of(self.dim_out)

    def norm_of(self, dim: int) -> nn.Module | None:
        """A norm N of so many channels, wherever they stand."""
        norm = self.norm(dim) if self.norm else None
        first = norm[0] if isinstance(norm, nn.Sequential) else norm
        over_last = getattr(first, "over_last_axis", type(first) in (nn.LayerNorm, nn.RMSNorm))
        if norm is not None and self.channel_dim != -1 and over_last:
            return OverChannels(norm, self.channel_dim)
        return norm

    def activate(self) -> nn.Module | None:
        """The stack's φ: a ResNet's ReLU after the sum; None, the identity, in a Transformer."""
        return self.activation() if self.activation else None


class Scheme:
    """A recipe over depth. It holds options and no module: one scheme serves any number of stacks.

    Write your own by giving ``connection``; the rest is there for those schemes that need it. In equations x is the
    stream, F the sublayer, N a norm, S the shortcut, φ the stack's activation, l the layer from 1, L their number and
    M the number of residuals.

    >>> from resseq import Stack
    >>> from resseq.connections import OneStream
    >>> class Half(Scheme):
    ...     def connection(self, place):
    ...         return OneStream(pre=place.norm_before(), scale=0.5)
    >>> Stack([nn.Linear(8, 8)], dim=8, scheme=Half()).residuals[0].connection.scale
    0.5
    """

    normed = True  # the connections bring the norms, or none is wanted; else a convolution block ends in one of its own
    one_width = False  # the stream cannot change its shape on the way: no shortcuts
    recompute = False  # the backward pass makes the streams again, by the connections' inverse

    def connection(self, place: Place) -> Connection:
        """The connection of one residual."""
        raise NotImplementedError

    def connections(self, places: Sequence[Place]) -> list[Connection]:
        """All connections of a stack; for the schemes that share a parameter between residuals."""
        return [self.connection(place) for place in places]

    def inside(self, kind: Literal["attention", "feedforward"], norm: Norm | None) -> dict[str, Any]:
        """What the equation has inside the sublayers, as options of the models' own."""
        return {}

    def open(self, first: Place) -> Callable[[Tensor], Any]:
        """What makes the stream from the stack's input."""
        return nn.Identity()

    def close(self, last: Place) -> nn.Module:
        """What makes the stack's output from the stream."""
        return nn.Identity()

    def start(self, residuals: Sequence[Any]) -> None:
        """Starting weights of the sublayers, where the scheme has a rule for them."""

    def constrain(self, residuals: Sequence[Any]) -> None:
        """What the sublayers' weights keep to: for a training loop to call after each step of its optimizer."""

    def calibrate(self, stack: Any, *args: Any, **kwargs: Any) -> None:
        """Starting values that depend on data: a look at the stack's first inputs."""

    def groups(self, stack: Any) -> list[dict[str, Any]]:
        """Parameters with a learning rate or an Adam ε of their own: ``{"params", "lr_scale", "eps_scale"}``."""
        return []


class EndsInNorm(Scheme):
    """The schemes whose stream is never normalised itself: the stack closes with a norm."""

    def close(self, last: Place) -> nn.Module:
        return last.norm_after() or nn.Identity()


NOT_SCALED = ("query", "key")  # they set how sharply attention looks, not how large the branch is


def start_xavier(residuals: Sequence[Any], scheme: str, gain: float) -> None:
    """Every weight Xavier uniform, all but query and key with this gain."""
    for weights in weights_of_each(residuals, scheme):
        for role, weight in weights:
            nn.init.xavier_uniform_(weight, gain=1.0 if role in NOT_SCALED else gain)


def weights_of_each(residuals: Sequence[Any], scheme: str) -> Iterator[list[tuple[str, Tensor]]]:
    """The weights of each sublayer, once for one that stands in several places."""
    for sublayer in {id(residual.sublayer): residual.sublayer for residual in residuals}.values():
        yield weights_of(sublayer, scheme)


def weights_of(sublayer: Any, scheme: str) -> list[tuple[str, Tensor]]:
    """The (role, tensor) pairs of a sublayer, in order of application; fused matrices as views.

    Raises: ValueError for a sublayer without weights(), for sharded ones: their parts are copies, not views, and for
        computed ones: see require_stored.
    """
    if not hasattr(sublayer, "weights"):
        raise ValueError(
            f"Scheme {scheme!r}: sets the starting weights by role; got a {type(sublayer).__name__} without weights(). "
            f"Give it a method weights() -> [(role, tensor), …] with roles such as query, key, value, in, out."
        )
    weights = sublayer.weights()
    if any(hasattr(weight, "device_mesh") for _, weight in weights):
        raise ValueError(
            f"Scheme {scheme!r}: sets the starting weights of whole matrices; got a sharded {type(sublayer).__name__}. "
            f"Call reset_parameters before fully_shard."
        )
    for _, weight in weights:
        require_stored(weight, sublayer, scheme)
    return weights


def require_stored(weight: Tensor, sublayer: Any, scheme: str) -> None:
    """Raise for a weight that is computed anew from others, so that what is written into it is lost."""
    tensors = [*sublayer.parameters(), *sublayer.buffers()] if isinstance(sublayer, nn.Module) else [weight]
    if weight.untyped_storage()._cdata not in {tensor.untyped_storage()._cdata for tensor in tensors}:
        raise ValueError(
            f"Scheme {scheme!r}: writes into the weights; got a {type(sublayer).__name__} that computes one of its "
            f"weights() from others, as weight_norm, spectral_norm and pruning do. Put these on after the stack is "
            f"built, or use another scheme."
        )
