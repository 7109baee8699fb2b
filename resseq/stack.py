"""A stack: residuals wired over depth by a scheme."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from resseq.connections import Map
from resseq.residual import Residual, reset_children
from resseq.reversible import may_recompute, run_reversible
from resseq.schemes import Norm, Place, Scheme, find_scheme


class Stack(nn.Module):
    """Sublayers wired over depth by a scheme: open the stream, run the residuals, close the stream.

    ``x_0 = open(x)``, ``x_l = Residual_l(x_{l−1})``, ``close(x_M)``.

    Each keyword goes to the sublayers whose signature takes it; of ``caches``, a list with what each residual handed
    back in an earlier call ([] before the first), each sublayer that takes a ``cache`` gets its own. Starting weights:
    each sublayer's own, then the scheme's rule.

    Shapes: forward(x, *args, caches=None, **kwargs) -> Tensor, or (Tensor, [what each residual handed back]) if a
        sublayer returned a tuple.
    Args:
        layers: a tuple is one layer of several residuals, a bare module a layer of one:
            ``[(attention, feedforward), …]``.
        dim: the stream's width, or one width per boundary (residuals + 1 of them) for a net whose width changes.
        scheme: a name in SCHEMES, or a Scheme of your own.
        norm: called with a width, returns a norm; None for a net whose sublayers normalise themselves.
        activation: called without arguments, returns what the schemes without a norm put after the sum (φ): nn.ReLU
            in a ResNet; None leaves the sum as it is.
        drop_path: the last layer's probability; it rises linearly with depth (Huang et al. 2016, arXiv:1603.09382).
        layer_drop: probability that a residual's branch is left out for a whole batch in training, without rescaling
            (LayerDrop, Fan et al. 2019, arXiv:1909.11556).
        shortcuts: one per residual, a map to the branch's shape, or None for the identity.
        channel_dim: where the width stands: −1, or 1 for channels first.
        activation_checkpointing: keep of each residual its input alone, and run it again for the backward pass (Chen
            et al. 2016, arXiv:1604.06174). The gradients are the same, dropout included, where the backward pass
            finds the weights of the forward pass: not those of a ``functional_call`` that is over, nor of
            ``spectral_norm``, which moves them whenever they are run. torch.func keeps everything.
    Raises: ValueError for an unknown scheme, a dim or shortcuts of another length, a keyword that no sublayer takes,
        and for activation checkpointing of batch norms.

    >>> import torch
    >>> feedforward = lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> stack = Stack([feedforward() for _ in range(3)], dim=8, scheme="sandwich")
    >>> stack(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        layers: Iterable[Callable[..., Any] | tuple[Callable[..., Any], ...]],
        *,
        dim: int | Sequence[int],
        scheme: str | Scheme = "pre",
        norm: Norm | None = nn.LayerNorm,
        activation: Callable[[], nn.Module] | None = None,
        drop_path: float = 0.0,
        layer_drop: float = 0.0,
        shortcuts: Sequence[Map | None] | None = None,
        channel_dim: int = -1,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        layered = [tuple(layer) if isinstance(layer, (tuple, list, nn.ModuleList)) else (layer,) for layer in layers]
        places = _places(layered, dim, shortcuts, norm, activation, drop_path, channel_dim)
        recipe = find_scheme(scheme)
        if recipe.one_width:
            _require_one_width(places, scheme if isinstance(scheme, str) else type(scheme).__name__)
        self.scheme = recipe
        self.open = recipe.open(places[0])
        self.residuals = nn.ModuleList(
            Residual(place.sublayer, connection=connection)
            for place, connection in zip(places, recipe.connections(places), strict=True)
        )
        for place, residual in zip(places, cast(list[Residual], self.residuals), strict=True):
            residual.connection.set_drops(place.drop_path, layer_drop)
        self.close = recipe.close(places[-1])
        if activation_checkpointing and any(isinstance(part, _BatchNorm) for part in self.modules()):
            raise ValueError(
                "Stack: activation checkpointing runs each residual twice, and a batch norm would count each batch "
                "twice; got activation_checkpointing=True. Leave it out, or use another norm."
            )
        self.activation_checkpointing = activation_checkpointing
        self.start = _Start(recipe, list(self.residuals))
        self.start.reset_parameters()

    reset_parameters = reset_children

    @property
    def takes_keywords(self) -> set[str] | None:
        """The keywords that some sublayer takes; None if one takes any."""
        each = [residual.takes_keywords for residual in cast(list[Residual], self.residuals)]
        return None if None in each else set().union(*(names or () for names in each))

    def calibrate(self, *args: Any, **kwargs: Any) -> None:
        """Let a scheme whose start depends on data (Admin) see a first batch: the arguments are those of forward.

        In eval mode, or dropout counts; but with batch norms in training mode, since they know no statistics yet.
        """
        self.scheme.calibrate(self, *args, **kwargs)

    def set_step(self, step: int) -> None:
        """Tell a scheme that warms up (BranchNorm, ProRes) which optimizer step comes, counted from 1."""
        for part in self.residuals.modules():
            if hasattr(part, "set_step"):
                cast(Any, part).set_step(step)

    def constrain(self) -> None:
        """Bring the weights back to what the scheme has them keep to (nGPT): after each step of an optimizer."""
        self.scheme.constrain(list(self.residuals))

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Parameters that the scheme gives a learning rate or an Adam ε of their own, relative to the others'."""
        return self.scheme.groups(self)

    def forward(self, x: Tensor, *args: Any, caches: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        residuals, known = cast(list[Residual], self.residuals), self.takes_keywords
        for name in kwargs if caches is None else [*kwargs, "cache"]:
            if known is not None and name not in known:
                use = f"Use one of {', '.join(sorted(known))}." if known else "Leave it out: they take no keyword."
                raise ValueError(f"Stack: no sublayer takes {name}=; got {name}. {use}")
        stream, rests = self.open(x), []
        learning = self.training and torch.is_grad_enabled() and caches is None
        if self.scheme.recompute and learning and may_recompute(residuals):
            keywords = [residual.takes(kwargs) for residual in residuals]
            return self.close(run_reversible(residuals, stream, args, keywords))
        # torch.func knows no hooks on what is saved, by which a checkpoint drops it
        keeps_inputs = self.activation_checkpointing and learning and not torch._C._are_functorch_transforms_active()
        for i, residual in enumerate(residuals):
            given = kwargs if caches is None else kwargs | {"cache": caches[i] if caches else ()}
            taken = residual.takes(given)
            if keeps_inputs:
                stream = checkpoint(partial(residual, **taken), stream, *args, use_reentrant=False)
            else:
                stream = residual(stream, *args, **taken)
            if type(stream) is tuple:
                stream, *rest = stream
                rests.append(tuple(rest))
            else:
                rests.append(None)
        out = self.close(stream)
        return out if all(rest is None for rest in rests) else (out, [rest or () for rest in rests])


class _Start(nn.Module):
    """A scheme's rule for starting weights, as the last part of its stack.

    Being a part, and the last, it also has the last word where somebody resets each of ``model.modules()`` in turn, as
    is usual after ``to_empty``.
    """

    def __init__(self, scheme: Scheme, residuals: list[nn.Module]):
        super().__init__()
        self.scheme, self.residuals = scheme, residuals  # in a plain list, so that they stay the stack's own

    def reset_parameters(self) -> None:
        self.scheme.start(self.residuals)

    def extra_repr(self) -> str:
        return type(self.scheme).__name__


def _places(
    layered: list[tuple[Callable[..., Any], ...]],
    dim: int | Sequence[int],
    shortcuts: Sequence[Map | None] | None,
    norm: Norm | None,
    activation: Callable[[], nn.Module] | None,
    drop_path: float,
    channel_dim: int,
) -> list[Place]:
    """One for each sublayer; the arguments are the stack's."""
    for name, given in (("norm", norm), ("activation", activation)):
        if isinstance(given, nn.Module):
            kind = type(given).__name__
            raise ValueError(
                f"Stack: {name} builds one module for each residual; got {name}={given}. Use {name}=nn.{kind}, or a "
                f"function that returns one."
            )
    count = sum(map(len, layered))
    dims = list(dim) if isinstance(dim, Iterable) else [int(dim)] * (count + 1)
    shortcuts = [None] * count if shortcuts is None else list(shortcuts)
    if not count:
        raise ValueError(
            "Stack: needs at least one layer; got layers=[]. Give [(attention, feedforward), …], or a depth of 1."
        )
    if len(dims) != count + 1 or len(shortcuts) != count:
        raise ValueError(
            f"Stack: {count} residuals need {count + 1} widths and {count} shortcuts; got dim={dim}, "
            f"{len(shortcuts)} shortcuts. Give one width per boundary and one shortcut (or None) per residual."
        )
    positions = [(layer, part) for layer, group in enumerate(layered) for part in range(len(group))]
    return [
        Place(
            index=index,
            count=count,
            layer=layer,
            layers=len(layered),
            part=part,
            parts=len(layered[layer]),
            dim=dims[index],
            dim_out=dims[index + 1],
            norm=norm,
            activation=activation,
            sublayer=layered[layer][part],
            shortcut=shortcuts[index],
            drop_path=drop_path * (layer + 1) / len(layered),
            channel_dim=channel_dim,
        )
        for index, (layer, part) in enumerate(positions)
    ]


def _require_one_width(places: list[Place], scheme: str) -> None:
    """Raise for a net whose shape changes on the way."""
    dims = {dim for place in places for dim in (place.dim, place.dim_out)}
    shortcuts = [place.shortcut is not None for place in places].count(True)
    if len(dims) > 1 or shortcuts:
        raise ValueError(
            f"Stack: the stream of {scheme} keeps one shape; got dim={sorted(dims)}, shortcuts={shortcuts}. "
            f"Use another scheme, such as 'pre'."
        )


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """All parameters for an optimizer, those apart to which a part of the model gives a pace of their own.

    A part that has ``optimizer_groups() -> [{"params", "lr_scale", "eps_scale"}]`` scales the learning rate and Adam's
    ε of those parameters; of two that name the same, the outer one.
    """
    scaled, apart = [], set()
    for group in (group for part in model.modules() for group in getattr(part, "optimizer_groups", list)()):
        scaled.append({**group, "params": [parameter for parameter in group["params"] if parameter not in apart]})
        apart.update(group["params"])
    rest = [parameter for parameter in model.parameters() if parameter not in apart]
    return [{"params": rest, "lr_scale": 1.0, "eps_scale": 1.0}, *scaled]
