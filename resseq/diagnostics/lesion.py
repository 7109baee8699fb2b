"""Lesions: blocks taken out or put into another order while a trained network is tested."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from resseq.connections import OneStream
from resseq.diagnostics.blocks import Blocks, find_blocks, kind_of, replace_first, replaced, stream_of, uncompiled
from resseq.diagnostics.report import Report
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
    found, delete = find_blocks(model, blocks), [delete] if isinstance(delete, int) else delete
    order = _order(len(found), delete, swap, permute)
    _require_fit(list(found.values()), order)
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for position in delete:
            stack.enter_context(_deleted(list(found.values())[position]))
        stack.enter_context(_ordered(model, found, order))
        yield model


def _order(count: int, delete: Sequence[int], swap: tuple[int, int] | None, permute: Sequence[int] | None) -> list[int]:
    given = {"delete": delete, "swap": swap, "permute": permute}
    chosen = [name for name, value in given.items() if value]
    if len(chosen) != 1:
        raise ValueError(
            f"lesion: takes exactly one of delete, swap and permute; got {', '.join(chosen) or 'none'}. "
            f"Use delete=[3], swap=(2, 5) or permute=[…]."
        )
    order = list(range(count))
    positions: list[int] = list(given[chosen[0]] or ())
    if any(position not in order for position in positions) or len(set(positions)) != len(positions):
        raise ValueError(
            f"lesion: {chosen[0]} takes different positions from 0 to {count - 1}; got {chosen[0]}={positions}. "
            f"Name each position once."
        )
    if permute and len(positions) != count:
        raise ValueError(f"lesion: permute names all {count} positions; got permute={positions}. Give each once.")
    if swap:
        i, j = swap
        order[i], order[j] = j, i
    return list(positions) if permute else order


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
        return block.register_forward_hook(_hand_on, with_kwargs=True)
    return replaced(connection, finish=torch.zeros_like)  # the branch is 0


class Reshaped(ValueError):
    """A block cannot be deleted: it changes the shape of the stream."""


def _hand_on(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A block's output with the stream that it read; what else it returned stays."""
    name = type(block).__name__
    before, after = stream_of((args, kwargs), name), stream_of(output, name)
    # torch's encoder packs padded texts into a nested tensor, which has no shape and keeps its parts'
    if not before.is_nested and before.shape != after.shape:
        raise Reshaped(
            f"lesion: a deleted block must keep the stream's shape; got a {name} from "
            f"{tuple(before.shape)} to {tuple(after.shape)}. Leave it in."
        )
    return replace_first(output, before)


@contextmanager
def _ordered(model: nn.Module, found: dict[str, nn.Module], order: list[int]) -> Iterator[None]:
    blocks = list(found.values())
    try:
        _place(model, found, [blocks[i] for i in order])
        yield
    finally:
        _place(model, found, blocks)


def _place(model: nn.Module, paths: Iterable[str], blocks: Iterable[nn.Module]) -> None:
    for path, block in zip(paths, blocks, strict=True):
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = block


def lesion_curve(model: nn.Module, measure: Callable[[nn.Module], float], *, blocks: Blocks = None) -> Report:
    """What each block is worth: a measure of the network with that block alone deleted.

    ``lesioned`` is the measure without the block, ``lesion_drop`` by how much that is less than the whole network's. A
    block without a shortcut that changes the stream's shape cannot be deleted, and has no row.

    Source: Veit et al. 2016, arXiv:1605.06431, section 4.1.
    Args:
        measure: of the model: its accuracy on a test set, say.
    """
    found, whole, rows = find_blocks(model, blocks), measure(model), []
    for position, name in enumerate(found):
        try:
            with lesion(model, blocks=found.values(), delete=[position]):
                value = measure(model)
        except Reshaped:
            continue
        rows += [(position, name, "lesioned", value), (position, name, "lesion_drop", whole - value)]
    return Report(rows, {name: kind_of(block) for name, block in found.items()})
