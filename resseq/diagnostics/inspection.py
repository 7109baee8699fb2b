"""The basic set of statistics, in one forward and one backward pass."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resseq.diagnostics.blocks import Blocks, find_blocks, kind_of
from resseq.diagnostics.gradients import Gradients
from resseq.diagnostics.operations import Operations
from resseq.diagnostics.report import Report
from resseq.diagnostics.signal import Row, Signal
from resseq.diagnostics.stream import fresh, mask_of, stream_of


def inspect(
    model: nn.Module,
    *inputs: Any,
    blocks: Blocks = None,
    loss: Callable[[Any], Tensor] | None = None,
    **keywords: Any,
) -> Report:
    """What each block makes of the stream, and of the gradient on its way back: of any network, unchanged.

    One forward pass ``model(*inputs, **keywords)`` and one backward pass, in the mode (train or eval) that the model
    is in. The statistics are those of Signal, Operations and Gradients. Hooks do it, they are gone afterwards even
    where the model raises, and they reduce what they see to numbers: beyond a training step's memory it takes three
    tensors of the stream's size, and the attention weights of one layer at a time. Weights, ``.grad`` and hooks of the
    model stay as they are; batch statistics move, as in any forward pass in training mode.

    Args:
        blocks: a path pattern in which ``*`` stands for one component (``"encoder.layer.*"``) or a list of modules;
            unless given, the longest run of neighbours of one type in a ModuleList or Sequential, or else in any.
        loss: of the model's output, a scalar; unless given, what the output calls ``loss`` itself, as Hugging Face's
            do when they get labels, or its first tensor, if that is a scalar, or else the output's product with a
            fixed random direction: its gradients tell how depth changes them, but not how large they will be in
            training.
        inputs, keywords: for the model. Its ``mask`` or ``attention_mask`` (B, L), True = real, or the
            ``src_key_padding_mask`` (or tgt_, or without either) of a model like torch's, also says which positions
            count.
    Raises: ValueError for blocks that are not there, or did not run.

    >>> from resseq import Stack
    >>> model = Stack([nn.Linear(8, 8) for _ in range(3)], dim=8)
    >>> report = inspect(model, torch.randn(2, 5, 8))
    >>> int((report.frame["statistic"] == "branch_ratio").sum())
    3
    """
    found = find_blocks(model, blocks)
    mask = mask_of(model, inputs, keywords)
    signal, operations, gradients = Signal(found, mask), Operations(found, mask), Gradients(found)
    inputs, keywords, leaves = fresh(inputs, keywords)
    with torch.enable_grad():
        with signal.watching(), gradients.watching(), operations.watching():
            output = model(*inputs, **keywords)
        if not signal.ran:
            raise ValueError(
                f"diagnostics: blocks are modules that the model calls; got none that ran of {', '.join(found)}. "
                f"Use other blocks."
            )
        scalar = loss_of(output, loss)
        if scalar.requires_grad:  # nothing does in a model that is frozen
            gradients.backward(model, scalar, leaves)
    rows = signal.rows + operations.rows + gradients.rows
    return Report(_numbers(rows), {name: kind_of(block) for name, block in found.items()})


def loss_of(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    """The scalar that is differentiated: see ``inspect``."""
    if loss is not None:
        return loss(output)
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor):
        return named
    tensor = stream_of(output, "the model's output")
    if tensor.ndim == 0:  # a loss, whatever it is called
        return tensor
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(tensor.shape, generator=generator).to(tensor)
    return (tensor * direction).sum() / tensor.numel() ** 0.5


def _numbers(rows: Iterable[Row]) -> list[tuple[int, str, str, float]]:
    """The rows as plain numbers; one wait for the device, not one for each."""
    rows = list(rows)
    values = torch.stack([value for *_, value in rows]).tolist()
    return [
        (depth, module, statistic, value) for (depth, module, statistic, _), value in zip(rows, values, strict=True)
    ]
