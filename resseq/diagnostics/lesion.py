"""Lesions: blocks taken out or put into another order while a trained network is tested."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from operator import index
from typing import Any

import torch
from torch import nn

from resseq.connections import OneStream
from resseq.diagnostics.blocks import Blocks, find_blocks, kind_of, replaced, uncompiled
from resseq.diagnostics.report import Report
from resseq.diagnostics.stream import replace_first, stream_of
from resseq.residual import Residual


@contextmanager
def lesion(
    model: nn.Module,
    *,
    blocks: Blocks = None,
    delete: int | Sequence[int] = (),
    swap: tuple[int, int] | None = None,
    permute: Sequence[int] | None = None,
) -> Iterator[nn.Module]:
    """Take blocks out of a network, or put them into another order, until the context ends.

    A deleted block hands on the stream that it reads, as in a network built without it. Where a Residual does more to
    the stream than add to it, that stays and its branch is 0: where the shortcut is a map (because the shape changes),
    and where the stream is lanes, a history or a pair.

    Source: Veit et al. 2016, arXiv:1605.06431, sections 4.1 to 4.3.
    Args:
        blocks: as for ``inspect``.
        delete: positions of blocks, from 0, or one of them.
        swap: two positions, whose blocks change places.
        permute: the block that stands at each position, as positions before.
    Raises: ValueError unless exactly one of the three is given, for a position that is not there, for a deleted block
        that changes the stream's shape and has no shortcut, and for one put where its connection does not fit: those of
        denseformer and dense weigh all that came before, those of attnres_block end a block or do not.

    >>> from resseq import Stack
    >>> model = Stack([nn.Linear(8, 8) for _ in range(2)], dim=8, scheme="residual")
    >>> x = torch.randn(4, 8)
    >>> with lesion(model, delete=[0, 1]):
    ...     torch.equal(model(x), x)
    True
    """
    found = find_blocks(model, blocks)
    deleted = _positions(delete)
    order = _order(len(found), {"delete": deleted, "swap": _positions(swap), "permute": _positions(permute)})
    _require_fit(list(found.values()), order)
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for position in deleted:
            stack.enter_context(_deleted(list(found.values())[position]))
        stack.enter_context(_ordered(model, found, order))
        yield model


def _positions(given: Any) -> list[int]:
    """The positions that somebody named: none, one, or several, of any kind of integer, in any kind of sequence."""
    several = () if given is None else given if isinstance(given, Iterable) else (given,)
    return [index(position) for position in several]


def _order(count: int, given: dict[str, list[int]]) -> list[int]:
    chosen = [name for name, value in given.items() if value]
    if len(chosen) != 1:
        raise ValueError(
            f"lesion: takes exactly one of delete, swap and permute; got {', '.join(chosen) or 'none'}. "
            f"Use delete=[3], swap=(2, 5) or permute=[…]."
        )
    order, positions = list(range(count)), given[chosen[0]]
    if any(position not in order for position in positions) or len(set(positions)) != len(positions):
        raise ValueError(
            f"lesion: {chosen[0]} takes different positions from 0 to {count - 1}; got {chosen[0]}={positions}. "
            f"Name each position once."
        )
    wanted = {"swap": 2, "permute": count}.get(chosen[0], len(positions))
    if len(positions) != wanted:
        raise ValueError(f"lesion: {chosen[0]} names {wanted} positions; got {chosen[0]}={positions}. Give each once.")
    if given["swap"]:
        i, j = positions
        order[i], order[j] = j, i
    return given["permute"] or order


def _require_fit(blocks: list[nn.Module], order: list[int]) -> None:
    for position, origin in enumerate(order):
        here, moved = _form(blocks[position]), _form(blocks[origin])
        if here != moved and None not in (here, moved):
            kind = type(blocks[origin].connection).__name__
            raise ValueError(
                f"lesion: a block changes places with one whose connection is alike; got a {kind} of position "
                f"{origin} for position {position}. Use other positions, or delete=[{origin}]."
            )


def _form(block: nn.Module) -> Any:
    """What of a Residual's connection may depend on its depth; None where it fits everywhere."""
    if not isinstance(block, Residual) or isinstance(block.connection, OneStream):
        return None
    shapes = {name: parameter.shape for name, parameter in block.connection.named_parameters()}
    return shapes, getattr(block.connection, "ends_block", None)


def _deleted(block: nn.Module) -> AbstractContextManager[Any]:
    connection = block.connection if isinstance(block, Residual) else None
    if connection is None or (isinstance(connection, OneStream) and connection.shortcut is None):
        return _handed_on(block)
    return replaced(connection, finish=torch.zeros_like)  # the branch is 0


class Reshaped(ValueError):
    """A block cannot be deleted: it changes the shape of the stream."""


@contextmanager
def _handed_on(block: nn.Module) -> Iterator[None]:
    """A block gives the stream that it read; what else it returned stays."""
    name, read = type(block).__name__, []

    def note(block: nn.Module, args: Any, kwargs: Any) -> None:
        read.append(stream_of((args, kwargs), name).clone())  # the block may write into it

    def hand_on(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = read.pop(), stream_of(output, name)
        # torch's encoder packs padded texts into a nested tensor, which has no shape and keeps its parts'
        if not before.is_nested and before.shape != after.shape:
            raise Reshaped(
                f"lesion: a deleted block must keep the stream's shape; got a {name} from "
                f"{tuple(before.shape)} to {tuple(after.shape)}. Leave it in."
            )
        return replace_first(output, before)

    with (
        block.register_forward_pre_hook(note, with_kwargs=True),
        block.register_forward_hook(hand_on, with_kwargs=True),
    ):
        yield


@contextmanager
def _ordered(model: nn.Module, found: dict[str, nn.Module], order: list[int]) -> Iterator[None]:
    blocks = list(found.values())
    moves = [(path, block, blocks[i]) for (path, block), i in zip(found.items(), order, strict=True)]
    moves = [(path, block, other) for path, block, other in moves if block is not other]
    try:
        for path, _, other in moves:
            _place(model, path, other)
        yield
    finally:
        for path, block, _ in moves:
            _place(model, path, block)


def _place(model: nn.Module, path: str, block: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = block


def lesion_curve(model: nn.Module, measure: Callable[[nn.Module], float], *, blocks: Blocks = None) -> Report:
    """What each block is worth: a measure of the network with that block alone deleted.

    ``lesioned`` is the measure without the block, ``lesion_drop`` by how much that is less than the whole network's. A
    block without a shortcut that changes the stream's shape cannot be deleted, and has no row; nor has one that does
    not run. The depth of a row is that of the block's first run, as in ``inspect``.

    Source: Veit et al. 2016, arXiv:1605.06431, section 4.1.
    Args:
        measure: of the model: its accuracy on a test set, say.
    """
    found, rows = find_blocks(model, blocks), []
    ran: list[nn.Module] = []
    with uncompiled(), ExitStack() as stack:
        for block in found.values():
            stack.enter_context(block.register_forward_hook(lambda block, *_: ran.append(block)))
        whole = measure(model)
    for position, (name, block) in enumerate(found.items()):
        if block not in ran:
            continue
        try:
            with lesion(model, blocks=found.values(), delete=[position]):
                value = measure(model)
        except Reshaped:
            continue
        depth = ran.index(block)
        rows += [(depth, name, "lesioned", value), (depth, name, "lesion_drop", whole - value)]
    return Report(rows, {name: kind_of(block) for name, block in found.items()})
