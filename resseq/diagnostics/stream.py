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


def fresh(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """A model's arguments, whose floating tensors it may write into, and the leaves at which their gradients arrive.

    The caller's own tensors stay as they are. A mask gets no gradient.
    """
    leaves: list[Tensor] = []

    def copy_of(value: Any, name: str = "") -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or "mask" in name:
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1].clone()

    return tuple(map(copy_of, inputs)), {name: copy_of(value, name) for name, value in keywords.items()}, leaves


def mask_of(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
    """(B, L) bool, True = real, from the mask among a model's arguments; None where there is none."""
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    given = dict(zip(parameters, inputs, strict=False)) | keywords
    torchs = any(name in (*parameters, *keywords) for name in PADDING_MASKS)  # there ``mask`` says who sees whom
    masks = [given.get(name) for name in (PADDING_MASKS if torchs else MASKS)]
    mask = next((mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2), None)
    if mask is None:
        return None
    if mask.is_floating_point() and not (mask > 0).any():  # numbers that are added to scores
        return mask == 0
    return mask.bool() != torchs


class Layout:
    """Brings what a block takes and gives into one order of axes: samples, positions, features.

    Features stand along axis 1 in a block of convolutions or batch norms. Where it holds a linear map too, one of them
    has to be as wide as that axis, and no linear map may read the last. Elsewhere they stand last. A block without
    weights goes by all blocks. Positions stand before samples where blocks are torch's own layers, or its attention,
    with ``batch_first=False``.

    Args:
        blocks: all of them.
        mask: (B, L) bool, True = a position that counts.
    """

    def __init__(self, block: nn.Module, blocks: Iterable[nn.Module], mask: Tensor | None):
        blocks = list(blocks)
        weighted = next(block.parameters(), None) is not None
        parts = [part for each in ([block] if weighted else blocks) for part in each.modules()]
        self.widths = {width for part in parts for width in _widths(part)}
        self.linears = {part.in_features for part in parts if isinstance(part, nn.Linear)}
        attentions = map(_attention, blocks)
        self.batch_second = any(isinstance(a, nn.MultiheadAttention) and not a.batch_first for a in attentions)
        self.lanes = isinstance(block, Residual) and not isinstance(block.connection, OneStream)
        self.mask = mask

    def __call__(self, x: Tensor) -> Tensor:
        """x with its features last, (B, …, D)."""
        if x.ndim == 3 and self.batch_second:
            return x.transpose(0, 1)
        if x.ndim < 3 or not self.widths:
            return x
        image = x.ndim > 3 and x.shape[1] == x.shape[-1]  # as many channels as columns
        wide = x.shape[1] in self.widths and (image or x.shape[-1] not in self.linears)
        return x.movedim(1, -1) if wide or not self.linears else x

    def real(self, shape: tuple[int, ...]) -> Tensor | None:
        """The mask of positions (B, L'): where a convolutional net halved their number, every s-th; None of others."""
        if self.mask is None or len(shape) < 2:
            return None
        length = self.mask.shape[1]
        strides = [2**n for n in range(length.bit_length())] if self.widths else [1]
        stride = next((s for s in strides if shape[1] in (length // s, -(-length // s))), 1)
        mask = self.mask[:, ::stride][:, : shape[1]]
        return mask if mask.shape == shape[:2] else None


def _attention(block: nn.Module) -> Any:
    """The attention that a block is, or that a layer of torch's own begins with."""
    inner: Any = block.sublayer if isinstance(block, Residual) else block
    return getattr(inner, "self_attn", inner)


def _widths(part: nn.Module) -> tuple[int, ...]:
    """How many channels a convolution or a batch norm reads and gives."""
    if isinstance(part, _ConvNd):
        return part.in_channels, part.out_channels
    return (part.num_features,) if isinstance(part, _BatchNorm) else ()


def layouts_of(blocks: Iterable[nn.Module], mask: Tensor | None) -> dict[nn.Module, Layout]:
    """The layout of each block."""
    blocks = list(blocks)
    return {block: Layout(block, blocks, mask) for block in blocks}
