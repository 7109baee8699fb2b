"""From a vector for each token to one for the text; padding never counts."""

from torch import Tensor


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens. Shapes: (B, L, D), (B, L) -> (B, D)."""
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def cls(x: Tensor, mask: Tensor) -> Tensor:
    """The first token's vector. Shapes: (B, L, D), (B, L) -> (B, D)."""
    return x[:, 0]


def max(x: Tensor, mask: Tensor) -> Tensor:
    """Maximum over the real tokens, channel by channel; 0 where there are none. Shapes: (B, L, D), (B, L) -> (B, D)."""
    pooled = x.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1)
    return pooled.masked_fill(~mask.any(1, keepdim=True), 0.0)


POOLINGS = {"mean": mean, "cls": cls, "max": max}


def find_pooling(name: str):
    """The pooling of a name; ValueError for another."""
    if name not in POOLINGS:
        raise ValueError(f"pooling: is one of {', '.join(POOLINGS)}; got pooling={name!r}. Use pooling='mean'.")
    return POOLINGS[name]
