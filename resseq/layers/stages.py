"""The plan of a convolutional network: which block widens, and which one strides."""

from collections.abc import Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """What one block does to the stream's shape."""

    dim: int
    dim_out: int
    stride: int

    @property
    def reshapes(self) -> bool:
        """Whether the shortcut cannot be the identity."""
        return self.stride != 1 or self.dim != self.dim_out


def plan_steps(dim: int, widths: Sequence[int], blocks: Sequence[int]) -> list[Step]:
    """A step for each block: a stage's first block brings its width and, from the second stage on, halves the length.

    >>> plan_steps(16, widths=[16, 32], blocks=[1, 2])
    [Step(dim=16, dim_out=16, stride=1), Step(dim=16, dim_out=32, stride=2), Step(dim=32, dim_out=32, stride=1)]
    """
    steps = []
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for block in range(count):
            steps.append(Step(dim, width, 2 if block == 0 and stage > 0 else 1))
            dim = width
    return steps


def share_out(count: int, stages: int) -> list[int]:
    """So many blocks among so many stages, as evenly as can be; a stage without a block is left out.

    >>> share_out(14, 4)
    [4, 3, 4, 3]
    """
    stages = min(stages, count)
    stage_of = [block * stages // count for block in range(count)]
    return [stage_of.count(stage) for stage in range(stages)]
