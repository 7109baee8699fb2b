"""A batch of unequal texts in fewer and fuller rows: several texts share one, and a mask keeps them apart."""

from bisect import bisect_left, insort
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the tokens of a padded batch (B, L) stand in a packed one (R, S), S the length of its longest text.

    A text keeps its places from the first to the last real token, so positions that count from another token stay what
    they are; one without a token keeps its first place.
    """

    places: Tensor
    """(T,), among the B·L."""
    slots: Tensor
    """(T,), among the R·S."""
    text: Tensor
    """(R, S), the text that the token in a slot belongs to; B of padding between them, B + 1 of what is left over."""
    shape: tuple[int, int]
    """(B, L)."""

    @staticmethod
    def of(mask: Tensor) -> "Packing":
        """The packing of a mask (B, L), True = real token: longest texts first, each in the fullest row with room."""
        texts, length = mask.shape
        position = torch.arange(length, device=mask.device)
        ends = lengths_of(mask)
        sizes, order = ends.sort(descending=True)
        longest, rows, starts = int(sizes[0]), 0, []
        rooms: list[tuple[int, int]] = []  # what is left in each row, ascending
        for size in sizes.tolist():
            fullest = bisect_left(rooms, (size, 0))
            if fullest < len(rooms):
                room, row = rooms.pop(fullest)
            else:
                room, row, rows = longest, rows, rows + 1
            starts.append((row + 1) * longest - room)
            insort(rooms, (room - size, row))
        start = torch.empty_like(order)
        start[order] = torch.tensor(starts, device=mask.device)
        kept = position < ends[:, None]
        slots = (start[:, None] + position)[kept]
        real = torch.where(mask.bool(), torch.arange(texts, device=mask.device)[:, None], texts)
        text = start.new_full((rows * longest,), texts + 1).index_copy_(0, slots, real[kept])
        return Packing(kept.flatten().nonzero().squeeze(1), slots, text.view(rows, longest), (texts, length))

    def to(self, device: torch.device) -> "Packing":
        """The same for a batch on this device."""
        places, slots, text = (each.to(device, non_blocking=True) for each in self[:3])
        return Packing(places, slots, text, self.shape)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """(R, S, S), what is added to attention's scores: 0 between tokens of one text, and −∞ elsewhere.

        Padding between a text's tokens sees nothing and is not seen. What is left over of a row sees itself: not every
        kernel stands a token that sees nothing.
        """
        apart = (self.text[:, :, None] != self.text[:, None]) | (self.text == self.shape[0])[:, None]
        return torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill_(apart, float("-inf"))


def lengths_of(mask: Tensor) -> Tensor:
    """(B,), the places from a text's first to its last real token; 1 of a text without any."""
    return (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).clamp(min=1)


def least_rows(lengths: Tensor) -> int:
    """Rows of the longest text's length that no packing can do without."""
    longest = int(lengths.max())
    return max(int((2 * lengths > longest).sum()), -(-int(lengths.sum()) // longest))


def pack(x: Tensor, packing: Packing) -> Tensor:
    """(B, L, D) -> (R, S, D), zero where no token stands."""
    return _move(x, packing.places, packing.slots, packing.text.shape)


def unpack(x: Tensor, packing: Packing) -> Tensor:
    """(R, S, D) -> (B, L, D), zero where no token stood."""
    return _move(x, packing.slots, packing.places, packing.shape)


def _move(x: Tensor, source: Tensor, target: Tensor, shape: tuple[int, ...]) -> Tensor:
    tokens = x.flatten(0, 1).index_select(0, source)
    return x.new_zeros(shape[0] * shape[1], *x.shape[2:]).index_copy_(0, target, tokens).unflatten(0, shape)
