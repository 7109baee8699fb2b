"""A residual, and a stack of them: the whole of the idea."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from resseq.connections import Connection, Map, OneStream, Slots, in_place, require_map
from resseq.reversible import may_recompute, run_reversible
from resseq.schemes import Norm, Place, Scheme, find_scheme


class Residual(nn.Module):
    """One sublayer F on the stream x.

    ``post(merge(skip_scale · shortcut(x), scale · drop_path(branch(F(pre(x))))))``; with no slot given, ``x + F(x)``.

    F is any module or function. Extra arguments go to it untouched; if it returns a plain tuple, the first item joins
    the stream and the rest is handed back. An nn.MultiheadAttention attends to its own input unless it is given more,
    and takes ``mask`` (True = keep) as well as torch's own names.

    Source: He et al. 2015, arXiv:1512.03385, eq. 1 and 2; pre-norm: He et al. 2016, arXiv:1603.05027;
    post-norm: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    Shapes: the stream any rank; the branch the shape of the shortcut.
    Args:
        slots: those of OneStream: pre, branch, scale, drop_path, shortcut, shortcut_reads, skip_scale, merge, post.
        connection: a Connection of your own, in place of all slots.
    Raises: ValueError where branch and shortcut differ in shape (nothing is broadcast), for slots beside a connection,
        for a slot that cannot be called, and for a sublayer that writes into the stream in place (where that shows
        only when it runs, not under torch.compile and inference_mode).

    >>> import torch
    >>> layer = Residual(nn.Linear(8, 8), pre=nn.LayerNorm(8))
    >>> layer(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, sublayer: Callable[..., Any], *, connection: Connection | None = None, **slots: Unpack[Slots]):
        super().__init__()
        require_map("sublayer", sublayer)
        if unknown := slots.keys() - Slots.__annotations__:
            raise TypeError(
                f"Residual: the slots are {', '.join(Slots.__annotations__)}; got {', '.join(unknown)}. "
                f"Write pre=norm for pre-norm, post=norm for post-norm."
            )
        if connection is not None and slots:
            raise ValueError(
                f"Residual: a connection has its own slots; got connection={type(connection).__name__} beside "
                f"{', '.join(slots)}. Give the slots to the connection."
            )
        if not isinstance(connection, Connection | None):
            raise ValueError(
                f"Residual: connection is a Connection; got connection={connection!r}. "
                f"Give the slots themselves, such as pre=nn.LayerNorm(dim), or scheme= to a Stack."
            )
        self.sublayer = sublayer
        self.connection = OneStream(**slots) if connection is None else connection
        self.keeps_input = self.connection.keeps_input()
        if self.keeps_input and in_place(sublayer):
            raise ValueError(
                "Residual: the sublayer must leave the stream as it is; got inplace=True in its first module. "
                "Use inplace=False."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "sublayer":  # one that is put in later has keywords of its own
            self.keywords = _keywords(value)
            self.attends = isinstance(_unwrapped(value), nn.MultiheadAttention)

    def takes(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Those of the keywords that the sublayer takes."""
        names = self.keywords
        return keywords if names is None else {name: keywords[name] for name in keywords if name in names}

    def forward(self, stream: Any, *args: Any, **kwargs: Any) -> Any:
        connection: Any = self._modules["connection"]  # as an attribute it is found ten times as slowly
        sublayer = self.sublayer
        if connection.takes_mask:
            x, carry = connection.read(stream, mask=_mask_of(args, kwargs))
        else:
            x, carry = connection.read(stream)
        if self.attends:
            args, kwargs = _attention_arguments(x, *args, **kwargs)
        counted = (x is stream or x is carry or self.keeps_input) and not is_compiling() and not x.is_inference()
        version = x._version if counted else None  # how often it was written into
        y = sublayer(x, *args, **kwargs)
        rest = None
        if type(y) is tuple:
            y, rest = y[0], y[1:]
        if not isinstance(y, Tensor):
            raise _no_tensor(sublayer, y)
        out = connection.write(stream, y, carry)
        if counted and x._version != version:
            raise _overwritten(sublayer)
        return out if rest is None else (out, *rest)

    def reset_parameters(self) -> None:
        """Start again, as if newly built: the sublayer and the slots."""
        reset_children(self)


def _no_tensor(sublayer: Any, y: Any) -> ValueError:
    return ValueError(
        f"Residual: the sublayer gives a tensor, or a tuple that begins with one; got {type(y).__name__} from "
        f"{getattr(sublayer, '__name__', type(sublayer).__name__)}. Return the tensor that joins the stream."
    )


def _overwritten(sublayer: Any) -> ValueError:
    return ValueError(
        f"Residual: the sublayer must leave the stream as it is; got "
        f"{getattr(sublayer, '__name__', type(sublayer).__name__)}, which writes into its input. "
        f"Use operations that are not in place, or pre=."
    )


def _unwrapped(sublayer: Any) -> Any:
    """What torch.compile, activation checkpointing or FSDP has wrapped: its type and signature count."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        if hasattr(sublayer, name):
            return _unwrapped(getattr(sublayer, name))
    return sublayer


def _mask_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mask that the shortcut reads as well."""
    if args and "mask" not in kwargs:
        raise ValueError("Residual: the shortcut reads the mask too; got arguments without a name. Write mask=mask.")
    return kwargs.get("mask")


def _attention_arguments(
    x: Tensor, *args: Any, mask: Tensor | None = None, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What nn.MultiheadAttention wants beside its query x to be called like every other sublayer."""
    if mask is not None:
        if kwargs.get("key_padding_mask") is not None:
            raise ValueError(
                "Residual: mask= and nn.MultiheadAttention's key_padding_mask= say the same; got both. Give one."
            )
        kwargs["key_padding_mask"] = ~mask.bool()
    names = ("key", "value")[len(args) :]
    for name in names:  # the key is x and the value is the key, unless given
        kwargs.setdefault(name, args[0] if args else kwargs.get("key", x))
    return args, kwargs


def _keywords(sublayer: Any) -> set[str] | None:
    """The keywords that a sublayer takes beside its input; None if it takes any."""
    sublayer = _unwrapped(sublayer)
    if isinstance(sublayer, Residual):
        return sublayer.keywords
    if isinstance(sublayer, Stack) and type(sublayer).forward is Stack.forward:
        inner = [cast(Residual, residual).keywords for residual in sublayer.residuals]
        return None if None in inner else set().union(*(names or () for names in inner))
    try:
        parameters = inspect.signature(sublayer.forward if isinstance(sublayer, nn.Module) else sublayer).parameters
    except ValueError:  # a function written in C, such as torch.exp
        return set()
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    names = {p.name for p in list(parameters.values())[1:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return names | {"mask"} if isinstance(sublayer, nn.MultiheadAttention) else names


def reset_children(module: nn.Module) -> None:
    """Call reset_parameters on every outermost part of a module that has it."""
    for child in module.children():
        # torch's attention has the method under a private name only
        reset = getattr(child, "reset_parameters", getattr(child, "_reset_parameters", None))
        if reset is None or isinstance(child, nn.MultiheadAttention):  # whose method leaves its out_proj alone
            reset_children(child)
        if reset is not None:
            reset()


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
        raise ValueError("Stack: needs at least one layer; got layers=[]. Give [(attention, feedforward), …].")
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
            finds the weights of the forward pass (not those of a ``functional_call`` that is over). torch.func keeps
            everything.
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
            _require_one_width(places, type(recipe).__name__)
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

    def reset_parameters(self) -> None:
        """Start again, as if newly built: every part by itself, then the scheme's rule."""
        reset_children(self)

    def calibrate(self, *args: Any, **kwargs: Any) -> None:
        """Let a scheme whose start depends on data (Admin) see a first batch: the arguments are those of forward."""
        self.scheme.calibrate(self, *args, **kwargs)

    def constrain(self) -> None:
        """Bring the weights back to what the scheme has them keep to (nGPT): after each step of an optimizer."""
        self.scheme.constrain(list(self.residuals))

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Parameters that the scheme gives a learning rate or an Adam ε of their own, relative to the others'."""
        return self.scheme.groups(self)

    def forward(self, x: Tensor, *args: Any, caches: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        residuals = cast(list[Residual], self.residuals)
        for name in kwargs if caches is None else [*kwargs, "cache"]:
            if not any(residual.keywords is None or name in residual.keywords for residual in residuals):
                known = sorted({name for residual in residuals for name in residual.keywords or ()})
                use = f"Use one of {', '.join(known)}." if known else "Leave it out: they take no keyword."
                raise ValueError(f"Stack: no sublayer takes {name}=; got {name}. {use}")
        stream, rests = self.open(x), []
        learning = self.training and torch.is_grad_enabled() and caches is None
        if self.scheme.recompute and learning and may_recompute(residuals):
            keywords = [residual.takes(kwargs) for residual in residuals]
            return self.close(run_reversible(residuals, stream, args, keywords))
        # torch.func knows no hooks on what is saved, by which a checkpoint drops it
        keeps_inputs = self.activation_checkpointing and learning and not torch._C._are_functorch_transforms_active()
        for i, residual in enumerate(residuals):
            taken = residual.takes(kwargs)
            if caches is not None and (residual.keywords is None or "cache" in residual.keywords):
                taken = taken | {"cache": caches[i] if caches else ()}
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
