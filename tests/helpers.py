"""What several test files need: modules whose every parameter counts, and masks."""

import torch
from torch import nn

from resseq import Stack

D, LAYERS = 6, 3


def randomised(module, std=0.5):
    """The module in float64 with every parameter random, so that no start hides a mistake."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=std)
    return module


def lengths_to_mask(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


class Sublayer(nn.Module):
    """Two matrices with roles; takes no keyword."""

    def __init__(self, roles=("in", "out")):
        super().__init__()
        self.roles = roles
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def weights(self):
        return list(zip(self.roles, (self.first.weight, self.second.weight), strict=True))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def stack(scheme, parts=2, layers=LAYERS, **options):
    return Stack([tuple(Sublayer() for _ in range(parts)) for _ in range(layers)], dim=D, scheme=scheme, **options)
