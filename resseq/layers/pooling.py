"""From a vector for each token to one for the text; padding never counts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Halving = Callable[[Tensor, Tensor | None], Tensor]
K = 8
"""Values that k-max keeps of each channel at the end of a text."""


def pool_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens. Shapes: (B, L, D), (B, L) -> (B, D)."""
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def pool_cls(x: Tensor, mask: Tensor) -> Tensor:
    """The first token's vector. Shapes: (B, L, D), (B, L) -> (B, D)."""
    return x[:, 0]


def pool_max(x: Tensor, mask: Tensor) -> Tensor:
    """Maximum over the real tokens, channel by channel; 0 where there are none. Shapes: (B, L, D), (B, L) -> (B, D)."""
    pooled = x.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1)
    return pooled.masked_fill(~mask.any(1, keepdim=True), 0.0)


def thin_out(mask: Tensor, stride: int) -> Tensor:
    """Every stride-th place. Shapes: (B, L) -> (B, ⌈L/stride⌉)."""
    if torch.compiler.is_exporting():  # the slice's strides would fix the length
        return mask.index_select(1, torch.arange(0, mask.shape[1], stride, device=mask.device))
    return mask[:, ::stride]


def keep_greatest(x: Tensor, mask: Tensor, k: int, counts: Tensor) -> Tensor:
    """The greatest real values of each channel, in the order of the text; of equal ones the earlier.

    Source: Kalchbrenner et al. 2014, arXiv:1404.2188, section 3.2.
    Shapes: x (B, C, L), mask (B, L) -> (B, C, k), k ≤ L; a text keeps counts (B,) ≤ k of them, and zeros follow.
    """
    values, places = x.masked_fill(~mask[:, None], float("-inf")).sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(k, device=x.device) < counts[:, None, None]
    places = places[..., :k].masked_fill(~kept, x.shape[-1])  # what is not kept goes last
    return values[..., :k].masked_fill(~kept, 0.0).gather(-1, places.argsort(dim=-1, stable=True))


def pool_kmax(x: Tensor, mask: Tensor) -> Tensor:
    """The K greatest values of each channel in the order of the text; with fewer real tokens, zeros follow.

    Shapes: (B, L, D), (B, L) -> (B, D · K).
    """
    x, mask = F.pad(x.transpose(1, 2), (0, K)), F.pad(mask, (0, K))  # for texts of fewer tokens than K
    return keep_greatest(x, mask, K, mask.sum(1).clamp(max=K)).flatten(1)


def halve_by_kmax(x: Tensor, mask: Tensor | None) -> Tensor:
    """Half of a text's positions, channel by channel the greatest, in their order; padding stands at the end.

    Shapes: x (B, C, L), mask (B, L) -> (B, C, ⌈L/2⌉), whose real positions are those of mask[:, ::2].
    """
    mask = _all_real(x) if mask is None else mask
    halved = thin_out(mask, 2)
    return keep_greatest(x, mask, halved.shape[1], halved.sum(1))


def halve_by_max(x: Tensor, mask: Tensor | None) -> Tensor:
    """The maximum of three positions around every second one; padding never counts.

    Shapes: x (B, C, L), mask (B, L) -> (B, C, ⌈L/2⌉).
    """
    mask = _all_real(x) if mask is None else mask
    x = x.masked_fill(~mask[:, None], float("-inf"))
    if torch.compiler.is_exporting():  # max_pool1d would fix the length
        pooled = F.max_pool2d(x[:, :, None], (1, 3), stride=(1, 2), padding=(0, 1)).squeeze(2)
    else:
        pooled = F.max_pool1d(x, 3, stride=2, padding=1)
    return pooled.masked_fill(~thin_out(mask, 2)[:, None], 0.0)


def _all_real(x: Tensor) -> Tensor:
    return torch.ones(x.shape[0], x.shape[-1], dtype=torch.bool, device=x.device)


POOLINGS = {"mean": pool_mean, "cls": pool_cls, "max": pool_max}


def real_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) bool, True = real token, where the ids are: the mask, or all of them where there is none."""
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device, torch.bool)


def find_pooling(name: str, poolings: Mapping[str, Any] = POOLINGS, argument: str = "pooling") -> Any:
    """The pooling of a name, which came by this argument; ValueError for another."""
    if name not in poolings:
        raise ValueError(f"{argument}: is one of {', '.join(poolings)}; got {argument}={name!r}. Use {argument}='max'.")
    return poolings[name]
