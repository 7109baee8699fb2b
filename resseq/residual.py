"""A residual: the whole of the idea."""

import inspect
from collections.abc import Callable
from typing import Any, Unpack

from torch import Tensor, nn
from torch.compiler import is_compiling

from resseq.connections import Connection, OneStream, Slots, in_place, require_map


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
            self.takes_keywords = _keywords(value)
            self.attends = isinstance(_unwrapped(value), nn.MultiheadAttention)

    def takes(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Those of the keywords that the sublayer takes."""
        names = self.takes_keywords
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
    try:
        parameters = inspect.signature(sublayer.forward if isinstance(sublayer, nn.Module) else sublayer).parameters
    except ValueError:  # a function written in C, such as torch.exp
        return set()
    names = {p.name for p in list(parameters.values())[1:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        inner = getattr(sublayer, "takes_keywords", None)  # a residual and a stack know what their own sublayers take
        return None if inner is None else names | inner
    return names | {"mask"} if isinstance(sublayer, nn.MultiheadAttention) else names


def reset_children(module: nn.Module) -> None:
    """Start a module again, as if newly built: call reset_parameters on every outermost part that has it."""
    for child in module.children():
        # torch's attention has the method under a private name only
        reset = getattr(child, "reset_parameters", getattr(child, "_reset_parameters", None))
        if reset is None or isinstance(child, nn.MultiheadAttention):  # whose method leaves its out_proj alone
            reset_children(child)
        if reset is not None:
            reset()
