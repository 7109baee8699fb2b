"""Schemes without a norm, whose starting weights do its work."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from resseq.connections import Connection, OneStream
from resseq.factors import LearnedScale, ScalarBias
from resseq.schemes.base import NOT_SCALED, Place, Scheme, start_xavier, weights_of_each


class Fixup(Scheme):
    """Branches that start at 0 and weights that start small, so that one update moves the net as one layer would.

    ``φ(S(x) + sF(x + b) + c)``, s = 1, b = c = 0, one number each. Of a branch's m weights in order, query and key left
    aside, the last starts at 0 and the others ``M^{-1/(2m−2)}`` times as large as else. The paper's biases between the
    weights are the sublayer's own; its head that starts at 0 is the model's. A block of convolutions keeps the norms
    between its weights, and ends in none: behind weights of 0 it would multiply the gradient by 1/√ε.

    Source: Zhang et al. 2019, arXiv:1901.09321, section 3.
    Raises: ValueError for a sublayer without ``weights() -> [(role, tensor), …]``.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(
            pre=ScalarBias(),
            scale=nn.Sequential(LearnedScale(1.0), ScalarBias()),
            shortcut=place.shortcut,
            post=place.activate(),
        )

    @torch.no_grad()
    def start(self, residuals: Sequence[Any]) -> None:
        for named in weights_of_each(residuals, "fixup"):
            scaled = [weight for role, weight in named if role not in NOT_SCALED]
            for weight in scaled[:-1]:
                weight.mul_(len(residuals) ** (-1 / (2 * len(scaled) - 2)))
            for last in scaled[-1:]:  # none in a sublayer that has no weights
                last.zero_()


class TFixup(Scheme):
    """A Transformer without norm and without warm-up.

    ``φ(S(x) + F(x))``; every weight starts Xavier uniform, all but query and key with gain ``0.67·(M/2)^-¼``: the
    paper's 0.67·L^-¼ with two residuals to a layer. The paper's smaller start of the embeddings is the model's.

    Source: Huang et al. 2020, "Improving Transformer Optimization Through Better Initialization", ICML, section 3.2.
    Raises: ValueError for a sublayer without ``weights() -> [(role, tensor), …]``.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(shortcut=place.shortcut, post=place.activate())

    def start(self, residuals: Sequence[Any]) -> None:
        start_xavier(residuals, "tfixup", 0.67 * (len(residuals) / 2) ** -0.25)
