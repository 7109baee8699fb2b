"""Where a token stands: learned and sinusoidal vectors, rotary queries and keys."""

import torch
from torch import Tensor, nn

from resseq.layers.linear import Embedding, Init


def _angles(start: int, length: int, dim: int, device: torch.device) -> Tensor:
    """``position · 10000^(−2i/dim)``, (length, dim/2), float32 whatever the model's dtype."""
    rates = 10_000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    return torch.outer(torch.arange(start, start + length, device=device, dtype=torch.float32), rates)


class LearnedPositions(nn.Module):
    """A learned vector for each position, added to x.

    ``x_t + P_t``

    Source: Devlin et al. 2018, arXiv:1810.04805.
    Shapes: (B, L, D), start the position of the first token -> (B, L, D), start + L up to max_length.
    Raises: ValueError for a longer x.
    """

    def __init__(self, max_length: int, dim: int, *, init: Init = "xavier"):
        super().__init__()
        self.table = Embedding(max_length, dim, init=init)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        length, longest = start + x.shape[1], self.table.num_embeddings
        if length > longest:
            raise ValueError(
                f"LearnedPositions: no position beyond max_length; got {length} tokens, max_length={longest}. "
                f"Use max_length={length}, or cut the text."
            )
        return x + self.table.weight[start:length]


class SinusoidalPositions(nn.Module):
    """Fixed waves, added to x.

    ``scale · x_t + [sin(t·w_i), cos(t·w_i)]``, ``w_i = 10000^(−2i/D)``, sines and cosines interleaved. Small embeddings
    would drown in the waves: the source multiplies them by √D.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 and 3.5.
    Shapes: (B, L, D), start the position of the first token -> (B, L, D), D even.
    Raises: ValueError for an odd D.

    >>> SinusoidalPositions()(torch.zeros(1, 2, 4))[0, 0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        if x.shape[2] % 2:
            raise ValueError(
                f"SinusoidalPositions: the width must be even; got dim={x.shape[2]}. Use dim={x.shape[2] + 1}."
            )
        angles = _angles(start, x.shape[1], x.shape[2], x.device)
        return self.scale * x + torch.stack([angles.sin(), angles.cos()], -1).flatten(-2).to(x.dtype)


def rotate(x: Tensor, start: int = 0) -> Tensor:
    """Turn each pair of channels by an angle that grows with the position.

    ``(a, b) -> (a cos θ − b sin θ, a sin θ + b cos θ)``, ``θ = t · 10000^(−2i/d)``, a and b the halves of x.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34 (there a and b are neighbours, which is the same up to the order
    of the channels).
    Shapes: (…, L, d), start the position of the first token -> (…, L, d), d even.
    """
    angles = _angles(start, x.shape[-2], x.shape[-1], x.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
