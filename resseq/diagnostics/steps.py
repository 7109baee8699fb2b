"""The first steps of training: whether the stream keeps its size, and how far a step moves the weights."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resseq.diagnostics.blocks import Blocks, find_blocks
from resseq.diagnostics.inspection import loss_of
from resseq.diagnostics.signal import Signal
from resseq.diagnostics.stream import fresh, mask_of
from resseq.stack import Stack, parameter_groups

if TYPE_CHECKING:
    from pandas import DataFrame


def coordinate_check(
    model: nn.Module,
    *inputs: Any,
    blocks: Blocks = None,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    steps: int = 10,
    **keywords: Any,
) -> "DataFrame":
    """Train a copy of the model for a few steps on one batch, and measure before and after each step.

    - ``stream_size``: E|x_l|, what block l reads, and what the last one gives, at steps 0 to ``steps``. A
      parametrisation whose learning rate can be carried to another depth or width keeps it where it is there. Not
      measured where the stream is several tensors: see Signal.
    - ``update_weight_ratio``: ‖W_{t+1} − W_t‖/‖W_t‖ of all parameters of a block together, at steps 0 to ``steps`` − 1.

    The model itself, its gradients and torch's generators stay as they are. Schemes that warm up (branchnorm, prores)
    begin at their first step.

    Source: Yang et al. 2022, arXiv:2203.03466, appendix D.1 (the coordinate check).
    Args:
        blocks, loss, keywords: as for ``inspect``.
        optimizer: called with the copy, returns its optimizer; unless given, AdamW with learning rate 0.001, scaled
            where the model's ``optimizer_groups`` say so, as those of depth_mup and completep do.
    Returns: a frame with columns depth, module, step, statistic, value, as ``inspect``'s report has it.

    >>> from resseq import Stack
    >>> frame = coordinate_check(Stack([nn.Linear(8, 8) for _ in range(3)], dim=8), torch.randn(4, 8), steps=2)
    >>> frame.groupby("statistic").size().to_dict()
    {'stream_size': 12, 'update_weight_ratio': 6}
    """
    from pandas import DataFrame

    paths = list(find_blocks(model, blocks))
    trained = copy.deepcopy(model)
    found = {path: trained.get_submodule(path) for path in paths}
    chosen = (_adamw if optimizer is None else optimizer)(trained)
    stacks = [part for part in trained.modules() if isinstance(part, Stack)]
    devices = {parameter.get_device() for parameter in trained.parameters() if parameter.is_cuda}
    mask = mask_of(model, inputs, keywords)
    rows: list[tuple[int, str, int, str, float]] = []
    with torch.random.fork_rng(devices), torch.enable_grad():
        for step in range(steps + 1):
            for stack in stacks:
                stack.set_step(step + 1)
            arguments, named, _ = fresh(inputs, keywords)
            with Signal(found, mask).watching() as signal:
                output = trained(*arguments, **named)
            sizes = [row for row in signal.rows if row[2] == "stream_size"]
            rows += [(depth, path, step, name, value.item()) for depth, path, name, value in sizes]
            if step < steps:
                before = {path: _weights(found[path]) for path in dict.fromkeys(signal.ran)}
                chosen.zero_grad()
                loss_of(output, loss).backward()
                chosen.step()
                for stack in stacks:
                    stack.constrain()
                for path, old in before.items():
                    ratio = (_weights(found[path]) - old).norm() / old.norm()
                    rows.append((signal.ran.index(path), path, step, "update_weight_ratio", ratio.item()))
    return DataFrame(rows, columns=["depth", "module", "step", "statistic", "value"])


def _adamw(model: nn.Module, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    """AdamW, with the learning rates and Adam's ε that parts of the model give their parameters."""
    groups = [
        {"params": group["params"], "lr": learning_rate * group["lr_scale"], "eps": 1e-8 * group["eps_scale"]}
        for group in parameter_groups(model)
    ]
    return torch.optim.AdamW(groups)


def _weights(block: nn.Module) -> Tensor:
    """All parameters of a block, one after the other."""
    return torch.cat(
        [torch.zeros(0), *(parameter.detach().flatten().float().cpu() for parameter in block.parameters())]
    )
