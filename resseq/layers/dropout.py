"""Dropout that spends as few random numbers as it needs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resseq.products import traced


class Dropout(nn.Dropout):
    """Zero each entry with probability p in training, and scale the rest so that the mean stays.

    ``y = x ⊙ k / (1 − p)``, ``k ~ Bernoulli(1 − p)``

    On a CPU the random numbers are most of dropout's cost: torch draws 64 bits for an entry. Here four entries share
    them, 16 bits each, so p is rounded to a multiple of 2⁻¹⁶. Elsewhere, and while torch traces, this is torch's own.

    Source: Srivastava et al. 2014, JMLR 15, section 4.
    Shapes: any; the same.

    >>> Dropout(0.5).eval()(torch.ones(3)).tolist()
    [1.0, 1.0, 1.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p) if self.training else input


def dropout(x: Tensor, p: float) -> Tensor:
    """``x ⊙ k / (1 − p)``, whoever calls it: see Dropout."""
    if p == 0.0:
        return x
    dropped = round(p * 2**16)  # of the 2¹⁶ values that an entry can draw
    if x.device.type != "cpu" or traced() or dropped in (0, 2**16):
        return F.dropout(x, p)
    drawn = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device).view(torch.int16)[: x.numel()]
    kept = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    torch.ge(drawn, dropped - 2**15, out=kept)  # as numbers: truth values are slow to turn
    return x * kept.mul_(2**16 / (2**16 - dropped)).view(x.shape)
