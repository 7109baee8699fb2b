"""How one sublayer joins the stream: what it reads from it, and how its output is written back."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from resseq.factors import drop_path
from resseq.merges import add

Map = Callable[[Tensor], Tensor]  # a module or a plain function
Merge = Callable[[Tensor, Tensor], Tensor]


class Slots(TypedDict, total=False):
    """The slots of OneStream, and so the keywords of Residual."""

    pre: Map | None
    branch: Map | None
    scale: float | Map
    drop_path: float
    shortcut: Map | None
    shortcut_reads: Literal["stream", "pre"]
    skip_scale: float | Map
    merge: Merge | None
    post: Map | None


class Connection(nn.Module):
    """What every connection has: the four slots of its branch. A subclass says what the stream is.

    ``y = scale · drop_path(branch(F(pre(x))))``, F the sublayer.

    Args:
        pre, branch: maps of what the sublayer reads and of what it returns: norms, activations.
        scale: a factor on the branch, fixed (a float) or learned (a module such as LearnedScale).
        drop_path: probability that a sample's branch is dropped in training.
    """

    layer_drop = 0.0  # a stack's: see set_drops
    takes_mask = False  # whether ``read`` takes the sublayers' keyword mask beside the stream

    def __init__(
        self,
        *,
        pre: Map | None = None,
        branch: Map | None = None,
        scale: float | Map = 1.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        _require_probability("drop_path", drop_path)
        require_factor("scale", scale)
        _require_maps(pre=pre, branch=branch)
        _require_kept("pre", pre)
        self.pre, self.branch, self.scale, self.drop_path = pre, branch, scale, drop_path

    def set_drops(self, drop_path: float, layer_drop: float) -> None:
        """Set what the stack drops in training: with ``drop_path`` the branch of a sample, unless this connection has a
        probability of its own; with ``layer_drop`` that of a whole batch, which is not rescaled."""
        _require_probability("drop_path", drop_path)
        _require_probability("layer_drop", layer_drop)
        self.drop_path, self.layer_drop = self.drop_path or drop_path, layer_drop

    def prepare(self, x: Any) -> Tensor:
        """What the sublayer reads, made from what was read of the stream: ``pre(x)``."""
        pre = self.pre  # looked up once: nn.Module finds its submodules slowly
        return x if pre is None else pre(x)

    def keeps_input(self) -> bool:
        """Whether what the sublayer reads is needed again, so that the sublayer must not overwrite it."""
        return self.pre is None or isinstance(self.pre, nn.Identity)

    def read(self, stream: Any) -> tuple[Tensor, Any]:
        """What the sublayer reads, and what ``write`` has to be given back."""
        raise NotImplementedError

    def write(self, stream: Any, y: Tensor, carry: Any) -> Any:
        """The stream after the sublayer's output y has joined it; its dtype never changes."""
        raise NotImplementedError

    def finish(self, y: Tensor) -> Tensor:
        """The branch after its sublayer: ``scale · drop_path(branch(y))``."""
        branch, scale = self.branch, self.scale
        if branch is not None:
            y = branch(y)
        if self.drop_path and self.training:
            y = drop_path(y, self.drop_path)
        if self.layer_drop and self.training:
            y = y * (torch.rand(1, device=y.device) >= self.layer_drop)
        return y if scale == 1.0 else _times(scale, y)

    def extra_repr(self) -> str:
        defaults = {"scale": 1.0, "drop_path": 0.0, "skip_scale": 1.0, "shortcut_reads": "stream", "merge": add}
        slots = ((name, self.__dict__.get(name, None)) for name in Slots.__annotations__)
        return ", ".join(
            f"{name}={getattr(value, '__name__', value)}"
            for name, value in slots
            if value is not None and value != defaults.get(name)
        )


class OneStream(Connection):
    """The stream is one tensor.

    ``out = post(merge(skip_scale · shortcut(x), scale · drop_path(branch(F(pre(x))))))``, merge = + unless given.

    Args:
        shortcut: map of the stream to the branch's shape, where that differs; the identity unless given. One with an
            attribute ``takes_mask = True`` is called with the mask that the sublayer gets.
        shortcut_reads: "stream", or "pre" for a shortcut that reads pre(x), as pre-activation nets do where the
            shape changes.
        skip_scale: a factor on the shortcut, a float or a module.
        merge: a map of (shortcut's output, branch's output), such as Highway(dim).
        post: a map of the sum: post-norm's norm, a ResNet's ReLU.
    Raises: ValueError for drop_path (or a stack's) with a merge that is no sum: what a dropped branch means is then
        undefined.
    """

    def __init__(
        self,
        *,
        pre: Map | None = None,
        branch: Map | None = None,
        scale: float | Map = 1.0,
        drop_path: float = 0.0,
        shortcut: Map | None = None,
        shortcut_reads: Literal["stream", "pre"] = "stream",
        skip_scale: float | Map = 1.0,
        merge: Merge | None = None,
        post: Map | None = None,
    ):
        super().__init__(pre=pre, branch=branch, scale=scale, drop_path=drop_path)
        if shortcut_reads not in ("stream", "pre"):
            raise ValueError(
                f"Residual: shortcut_reads is 'stream' or 'pre'; got shortcut_reads={shortcut_reads!r}. Use 'stream'."
            )
        require_factor("skip_scale", skip_scale)
        _require_maps(shortcut=shortcut, merge=merge, post=post)
        _require_kept("shortcut", shortcut)
        _require_kept("skip_scale", skip_scale)
        self.shortcut, self.shortcut_reads, self.skip_scale = shortcut, shortcut_reads, skip_scale
        self.merge, self.post = add if merge is None else merge, post
        self.takes_mask = getattr(shortcut, "takes_mask", False)
        self._require_sum("drop_path", drop_path)

    def set_drops(self, drop_path: float, layer_drop: float) -> None:
        self._require_sum("drop_path", drop_path)
        self._require_sum("layer_drop", layer_drop)
        super().set_drops(drop_path, layer_drop)

    def _require_sum(self, name: str, drop: float) -> None:
        if drop and self.merge is not add:
            raise ValueError(
                f"Residual: {name} needs the merge +; got {name}={drop} with "
                f"merge={getattr(self.merge, '__name__', self.merge)}. "
                f"Leave out {name}, or use another merge or scheme."
            )

    def keeps_input(self) -> bool:
        return super().keeps_input() or self.shortcut_reads == "pre"

    def read(self, stream: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.prepare(stream)
        carry = x if self.shortcut_reads == "pre" else stream
        return x, (cast(nn.Module, self.shortcut)(carry, mask) if self.takes_mask else carry)

    def write(self, stream: Tensor, y: Tensor, carry: Tensor) -> Tensor:
        shortcut, skip_scale, post = self.shortcut, self.skip_scale, self.post
        skip = carry if shortcut is None or self.takes_mask else shortcut(carry)
        if skip_scale != 1.0:
            skip = _times(skip_scale, skip)
        out = self.merge(skip, self.finish(y))
        if post is not None:
            out = post(out)
        return out if out.dtype == stream.dtype or not stream.is_floating_point() else out.to(stream.dtype)


def _times(scale: float | Map, x: Tensor) -> Tensor:
    return scale(x) if callable(scale) else x * scale


# --- what the slots refuse --------------------------------------------------------------------------------------------


def require_factor(name: str, factor: float | Map) -> None:
    """Raise for a factor that is neither a number nor a map: a tensor is a parameter in want of a module."""
    if not isinstance(factor, (int, float)) and (not callable(factor) or isinstance(factor, type)):
        raise ValueError(
            f"Residual: {name} is a number or a module; got {name} of type {type(factor).__name__}. "
            f"Use LearnedScale(1.0), or LearnedScale(1.0, dim=d) for one factor per channel."
        )


def require_map(name: str, given: Any) -> None:
    """Raise for what cannot be called with a tensor: a name, a list, a class that wants its arguments first."""
    if not callable(given) or isinstance(given, type):
        such = "Highway(dim)" if name == "merge" else "nn.LayerNorm(dim)"
        raise ValueError(
            f"Residual: {name} is a module or a function; got {name}={getattr(given, '__name__', repr(given))}. "
            f"Build the module first, such as {such}."
        )


def _require_maps(**slots: Any) -> None:
    for name, slot in slots.items():
        if slot is not None:
            require_map(name, slot)


def _require_kept(name: str, slot: Any) -> None:
    if in_place(slot):
        raise ValueError(f"Residual: {name} must leave the stream as it is; got an in-place {name}. Use inplace=False.")


def _require_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"Residual: {name} is a probability; got {name}={value}. Use a value from 0 to 1.")


def in_place(module: Any) -> bool:
    """Whether a module's first step that does anything, in eval mode too, says that it overwrites its input."""
    for step in _steps(module):
        if getattr(step, "inplace", False) is True:
            return True
        if not isinstance(step, (nn.Identity, _DropoutNd)):
            break
    return False


def _steps(module: Any) -> Iterator[Any]:
    if isinstance(module, nn.Sequential):
        for part in module:
            yield from _steps(part)
    else:
        yield module
