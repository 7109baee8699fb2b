"""Which modules of a network are its blocks, and how a context changes what they do."""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from itertools import groupby
from types import NoneType
from typing import Any

import torch
from torch import nn

from resseq.residual import Residual

Blocks = str | nn.Module | Iterable[nn.Module] | None
LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # never called, so never a block


def find_blocks(model: nn.Module, blocks: Blocks = None) -> dict[str, nn.Module]:
    """The blocks of a network by their path, in order of depth.

    Args:
        blocks: a path pattern in which ``*`` stands for one component, such as ``bert.encoder.layer.*``; or a list of
            modules, or one alone; unless given, the longest run of neighbours of one type in a ModuleList, or of two or
            more in a Sequential, or of Sequentials (stages); where there is none, among the children of any module. Of
            equally long ones, the outermost.
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


def _named(model: nn.Module, blocks: str | nn.Module | Iterable[nn.Module]) -> dict[str, nn.Module]:
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
    if isinstance(blocks, nn.ModuleDict):
        wanted = list(blocks.values())
    elif isinstance(blocks, nn.Module) and not isinstance(blocks, Iterable):
        wanted = [blocks]  # one alone
    else:
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
    runs: list[tuple[nn.Module, dict[str, Any]]] = [
        (parent, {f"{path}.{name}".lstrip("."): child for name, child in run})
        for path, parent in model.named_modules()
        for kind, run in groupby(parent._modules.items(), key=lambda child: type(child[1]))  # one may stand there twice
        if not issubclass(kind, (*LISTS, NoneType))
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
    longest = max(listed or [run for _, run in runs], key=len, default={})
    if not listed and len(longest) < 2:  # a lone residual is a block
        longest = {path: part for path, part in model.named_modules() if isinstance(part, Residual)}
    if not longest:
        raise ValueError(
            f"diagnostics: found no run of like modules; got model={type(model).__name__}. "
            f"Give blocks='path.of.the.layers.*' or a list of modules."
        )
    paths: dict[nn.Module, str] = {}
    for path, block in longest.items():
        paths.setdefault(block, path)  # the first of one that stands there twice
    return {path: block for block, path in paths.items()}


def kind_of(block: nn.Module) -> str:
    """What a block is called in tables: its type; of a Residual, its sublayer's."""
    if isinstance(block, Residual):
        return getattr(block.sublayer, "__name__", type(block.sublayer).__name__)
    return type(block).__name__


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
