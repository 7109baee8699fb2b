"""Norms that torch lacks."""

import torch
from torch import Tensor, nn


class DyT(nn.Module):
    """Dynamic tanh, an element-wise map in the place of a norm: ``norm=DyT``.

    ``w⊙tanh(αx) + b``; w = 1, b = 0 and one learned α = 0.5 at the start.

    Source: Zhu et al. 2025, arXiv:2503.10622, section 4.
    Shapes: (…, D) -> (…, D); a stack with channels first puts it over them.

    >>> DyT(8)(torch.full((4, 8), 2.0)).mean().item()
    0.7615...
    """

    over_last_axis = True  # as Place.norm_of asks

    def __init__(self, dim: int, *, alpha: float = 0.5):
        super().__init__()
        self.start = alpha
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.start)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        alpha, weight, bias = (p.to(x.dtype) for p in (self.alpha, self.weight, self.bias))
        return weight * torch.tanh(alpha * x) + bias

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, alpha={self.start}"
