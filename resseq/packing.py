"""A batch of unequal texts in fewer and fuller rows: several texts share one, and a mask keeps them apart."""

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
    """(R, S), the text that the token in a slot belongs to; B where there is none, or padding."""
    shape: tuple[int, int]
    """(B, L)."""

    @staticmethod
    def of(mask: Tensor) -> "Packing":
        """The packing of a mask (B, L), True = real token: the longest texts first, each in the first row with room."""
        texts, length = mask.shape
        ends = (mask.bool() * torch.arange(1, length + 1, device=mask.device)).amax(1).clamp(min=1)
        sizes, order = ends.sort(descending=True)
        free, starts = [], []
        for size in sizes.tolist():
            row = next((row for row, room in enumerate(free) if room >= size), len(free))
            if row == len(free):
                free.append(int(sizes[0]))
            starts.append((row + 1) * int(sizes[0]) - free[row])
            free[row] -= size
        start = torch.empty_like(order).scatter_(0, order, torch.tensor(starts, device=mask.device))
        kept = torch.arange(length, device=mask.device) < ends[:, None]
        slots = (start[:, None] + torch.arange(length, device=mask.device))[kept]
        real = torch.where(mask.bool(), torch.arange(texts, device=mask.device)[:, None], texts)
        text = start.new_full((len(free) * int(sizes[0]),), texts).index_copy_(0, slots, real[kept])
        return Packing(kept.flatten().nonzero().squeeze(1), slots, text.view(len(free), -1), (texts, length))

    @property
    def mask(self) -> Tensor:
        """(R, S, S), whether a token sees another: those of its own text do; padding sees nothing and is not seen."""
        return (self.text[:, :, None] == self.text[:, None]) & (self.text != self.shape[0])[:, None]


def pack(x: Tensor, packing: Packing) -> Tensor:
    """(B, L, D) -> (R, S, D), zero where no token stands."""
    return _move(x, packing.places, packing.slots, packing.text.shape)


def unpack(x: Tensor, packing: Packing) -> Tensor:
    """(R, S, D) -> (B, L, D), zero where no token stood."""
    return _move(x, packing.slots, packing.places, packing.shape)


def _move(x: Tensor, source: Tensor, target: Tensor, shape: tuple[int, ...]) -> Tensor:
    tokens = x.flatten(0, 1).index_select(0, source)
    return x.new_zeros(shape[0] * shape[1], *x.shape[2:]).index_copy_(0, target, tokens).unflatten(0, shape)
