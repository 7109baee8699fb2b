"""The stream in what a block takes and gives: which tensor, which axis is what, and which positions count."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from resseq.connections import OneStream
from resseq.residual import Residual

# the arguments by which a model is told which positions are real, True = real, and torch's own, True = padding
MASKS = ("mask", "attention_mask")
PADDING_MASKS = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")


def first_tensor(value: Any) -> Tensor | None:
    """The first floating tensor in nested tuples, lists and mappings; None where there is none."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((tensor for tensor in map(first_tensor, value) if tensor is not None), None)
    return None


def replace_first(value: Any, new: Tensor) -> Any:
    """What a module takes or gives, with another tensor in the place of the one that ``first_tensor`` finds."""
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


def stream_of(value: Any, owner: str) -> Tensor:
    """The first floating tensor of what a module takes or gives."""
    tensor = first_tensor(value)
    if tensor is None:
        raise ValueError(
            f"diagnostics: the stream is the first floating tensor that a module takes or gives; got none at {owner}. "
            f"Use other blocks."
        )
    return tensor


def is_one_stream(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """False of a Residual whose stream is several tensors: of a history or a pair no single one is the stream."""
    return not isinstance(block, Residual) or isinstance(args[0] if args else kwargs["stream"], Tensor)


def detached(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's arguments without the graph and the gradients of their tensors, which stay as they are."""
    cut = [value.detach() if isinstance(value, Tensor) else value for value in (*inputs, *keywords.values())]
    return tuple(cut[: len(inputs)]), dict(zip(keywords, cut[len(inputs) :], strict=True))


def mask_of(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
    """(B, L) bool, True = real, from the mask among a model's arguments; None where there is none."""
    parameters = inspect.signature(model.forward).parameters
    given = dict(zip(parameters, inputs, strict=False)) | keywords
    torchs = any(name in parameters for name in PADDING_MASKS)  # there ``mask`` says who sees whom
    masks = [given.get(name) for name in (PADDING_MASKS if torchs else MASKS)]
    mask = next((mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2), None)
    return mask if mask is None else mask.bool() != torchs


class Layout:
    """Brings what a block takes and gives into one order of axes: samples, positions, features.

    Features stand along axis 1 where that is as wide as one of the block's convolutions or batch norms, and last
    elsewhere; a block without weights goes by all blocks' convolutions. Positions stand before samples where attention
    is torch's with ``batch_first=False``.

    Args:
        blocks: all of them.
        mask: (B, L) bool, True = a position that counts.
    """

    def __init__(self, block: nn.Module, blocks: Iterable[nn.Module], mask: Tensor | None):
        everything = [part for each in blocks for part in each.modules()]
        weighted = next(block.parameters(), None) is not None
        parts = list(block.modules()) if weighted else everything
        self.widths = {width for part in parts for width in _widths(part)}
        self.has_linear = any(isinstance(part, nn.Linear) for part in parts)
        self.batch_second = any(isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in everything)
        self.lanes = isinstance(block, Residual) and not isinstance(block.connection, OneStream)
        self.mask = mask

    def __call__(self, x: Tensor) -> Tensor:
        """x with its features last, (B, …, D)."""
        if x.ndim == 3 and self.batch_second:
            return x.transpose(0, 1)
        both = (
            x.ndim == 3 and self.has_linear and x.shape[-1] in self.widths
        )  # a Conformer's text, as long as it is wide
        return x.movedim(1, -1) if x.ndim > 2 and x.shape[1] in self.widths and not both else x

    def real(self, shape: tuple[int, ...]) -> Tensor | None:
        """The mask of positions (B, L'): where a convolutional net kept ⌈L/s⌉ of them, every s-th; None of others."""
        if self.mask is None or len(shape) < 2:
            return None
        mask = self.mask
        if self.widths and shape[1]:
            mask = mask[:, :: -(-mask.shape[1] // shape[1])]
        return mask if mask.shape == shape[:2] else None


def _widths(part: nn.Module) -> tuple[int, ...]:
    """How many channels a convolution or a batch norm reads and gives."""
    if isinstance(part, _ConvNd):
        return part.in_channels, part.out_channels
    return (part.num_features,) if isinstance(part, _BatchNorm) else ()


def layouts_of(blocks: Iterable[nn.Module], mask: Tensor | None) -> dict[nn.Module, Layout]:
    """The layout of each block."""
    blocks = list(blocks)
    return {block: Layout(block, blocks, mask) for block in blocks}
