"""Which modules of a network are its blocks, and where the stream stands in what they take and give."""

import copy
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from resseq.residual import Residual

Blocks = str | Iterable[nn.Module] | None
LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # never called, so never a block


def find_blocks(model: nn.Module, blocks: Blocks = None) -> dict[str, nn.Module]:
    """The blocks of a network by their path, in order of depth.

    Args:
        blocks: a path pattern in which ``*`` stands for one component, such as ``bert.encoder.layer.*``; or a list of
            modules; unless given, the longest run of neighbours of one type in a ModuleList, or of two or more in a
            Sequential, or of Sequentials (stages); where there is none, among the children of any module. Of equally
            long ones, the outermost.
    Raises: ValueError where nothing is found, and for a list of modules, which is never called itself.

    >>> list(find_blocks(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()))))
    ['1.0', '1.1', '1.2']
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"diagnostics: the model is an nn.Module; got {type(model).__name__}. Build it first, or let "
            f"resseq.inspect(scheme='post') build one."
        )
    if blocks is None:
        return _longest_run(model)
    found = _named(model, blocks)
    for path, module in found.items():
        if isinstance(module, LISTS):
            raise ValueError(
                f"diagnostics: a block is a module that is called; got {path}, a {type(module).__name__}. "
                f"Use blocks='{path}.*'."
            )
    return found


def _named(model: nn.Module, blocks: str | Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The modules that a pattern or a list names."""
    paths = {module: path for path, module in model.named_modules()}
    if isinstance(blocks, str):
        found = {path: module for module, path in paths.items() if path and _matches(path, blocks)}
        if not found:
            near = difflib.get_close_matches(blocks, paths.values(), 1, cutoff=0)
            raise ValueError(
                f"diagnostics: blocks must match the path of a module; got blocks={blocks!r}. "
                f"The nearest path is {near[0]!r}; * stands for one component."
            )
        return found
    wanted = list(blocks)
    for module in wanted:
        if module not in paths:
            raise ValueError(
                f"diagnostics: blocks are modules of the model; got a {type(module).__name__} that is not in it. "
                f"Use model.get_submodule(path)."
            )
    if not wanted:
        raise ValueError("diagnostics: needs at least one block; got blocks=[]. Leave blocks out to have them found.")
    return {paths[module]: module for module in wanted}


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _longest_run(model: nn.Module) -> dict[str, nn.Module]:
    runs = [
        (parent, {f"{path}.{name}".lstrip("."): child for name, child in run})
        for path, parent in model.named_modules()
        for kind, run in groupby(parent.named_children(), key=lambda child: type(child[1]))
        if not issubclass(kind, LISTS)
    ]
    # Four projections side by side are not the blocks where three layers stand in a list. A list may hold one alone,
    # which runs several times where layers share their weights. A Sequential is a list too: a net's stages.
    listed = [
        run
        for parent, run in runs
        if isinstance(parent, nn.ModuleList)
        or (len(run) > 1 and isinstance(parent, nn.Sequential))
        or (len(run) > 1 and isinstance(next(iter(run.values())), nn.Sequential))
    ]
    longest: dict[str, nn.Module] = max(listed or [run for _, run in runs], key=len, default={})
    if not listed and len(longest) < 2:  # a lone residual is a block
        longest = {path: part for path, part in model.named_modules() if isinstance(part, Residual)}
    if not longest:
        raise ValueError(
            f"diagnostics: found no run of like modules; got model={type(model).__name__}. "
            f"Give blocks='path.of.the.layers.*' or a list of modules."
        )
    return longest


def kind_of(block: nn.Module) -> str:
    """What a block is called in tables: its type; of a Residual, its sublayer's."""
    if isinstance(block, Residual):
        return getattr(block.sublayer, "__name__", type(block.sublayer).__name__)
    return type(block).__name__


def channels_first(block: nn.Module) -> bool:
    """Whether features stand along axis 1, as in blocks of convolutions without a linear map; else they stand last."""
    kinds = [type(module) for module in block.modules()]
    convolves = any(issubclass(kind, (_ConvNd, _BatchNorm)) for kind in kinds)
    return convolves and not any(issubclass(kind, nn.Linear) for kind in kinds)


def first_tensor(value: Any) -> Tensor | None:
    """The first floating tensor in nested tuples, lists and mappings; None where there is none."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((tensor for tensor in map(first_tensor, value) if tensor is not None), None)
    return None


def stream_of(value: Any, owner: str) -> Tensor:
    """The first floating tensor of what a module takes or gives."""
    tensor = first_tensor(value)
    if tensor is None:
        raise ValueError(
            f"diagnostics: the stream is the first floating tensor that a module takes or gives; got none at {owner}. "
            f"Use other blocks."
        )
    return tensor


def stream_through(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[Tensor, Tensor] | None:
    """The stream that a block read, and the one that it gave; None for a Residual whose stream is several tensors: a
    history or a pair, of which no single one is the stream."""
    if isinstance(block, Residual) and not isinstance(args[0] if args else kwargs["stream"], Tensor):
        return None
    name = type(block).__name__
    return stream_of((args, kwargs), name), stream_of(output, name)


@contextmanager
def replaced(module: nn.Module, **methods: Callable[..., Any]) -> Iterator[None]:
    """Until the context ends, a module has these in the place of its own methods and functions."""
    own = vars(module)  # before the class's own methods, and beside nn.Module's bookkeeping
    before = {name: own[name] for name in methods if name in own}
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)


def uncompiled() -> AbstractContextManager[Any]:
    """Until the context ends, compiled models run as they were written: what is compiled heeds no hook that is new."""
    loaded = "torch._dynamo" in sys.modules  # else nothing is compiled, and loading it takes a second
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def replace_first(value: Any, new: Tensor) -> Any:
    """What a module gave, with another tensor in the place of the one that ``first_tensor`` finds."""
    if isinstance(value, Mapping):
        key = next(key for key, item in value.items() if first_tensor(item) is not None)
        changed: Any = copy.copy(value)  # of the same class, such as Hugging Face's ModelOutput
        changed[key] = replace_first(value[key], new)
        return changed
    if isinstance(value, (tuple, list)):
        items = list(value)
        place = next(i for i, item in enumerate(items) if first_tensor(item) is not None)
        items[place] = replace_first(items[place], new)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return new
