"""A residual network as the sum of its paths, and how far a change of its weights carries."""

import copy
import random
from collections.abc import Callable
from contextlib import ExitStack
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resseq.diagnostics.blocks import Blocks, find_blocks, uncompiled
from resseq.diagnostics.stream import fresh, stream_of

if TYPE_CHECKING:
    from pandas import DataFrame

Step = tuple[Tensor, Tensor]


def path_gradients(
    model: nn.Module,
    *inputs: Any,
    blocks: Blocks = None,
    loss: Callable[[Any], Tensor],
    samples: int = 20,
    seed: int = 0,
    **keywords: Any,
) -> "DataFrame":
    """The gradient that paths of each length carry through a residual network.

    In ``x_{l+1} = x_l + F_l(x_l)`` the gradient of the loss is a sum over 2^N paths, of which C(N, k) pass k branches.
    One forward pass runs the whole network; then, for each length k, gradients are sent back through the branches of k
    blocks and the shortcuts of the others. Meaningful where the blocks are such sums: a norm on the stream breaks them.

    Takes N + samples · N²/2 backward passes of a block, and the memory of a training step.

    Source: Veit et al. 2016, arXiv:1605.06431, section 4.4.
    Args:
        samples: sets of blocks drawn for each length; where there are no more sets than that, each is taken once.
    Raises: ValueError for blocks that change the stream's shape, and where the stream is several tensors.
    Returns: a frame with columns length (k), paths (C(N, k)), gradient (mean norm of one path's gradient at x_0),
        total (gradient · paths) and share (of the sum of all totals).
    """
    from pandas import DataFrame

    steps, output = _steps(model, find_blocks(model, blocks), inputs, keywords)
    with torch.enable_grad():
        (delta,) = torch.autograd.grad(loss(output), steps[-1][1], retain_graph=True)
    draw, rows, count = random.Random(seed), [], len(steps)
    for length in range(count + 1):
        paths = comb(count, length)
        if paths <= samples:
            chosen = list(combinations(range(count), length))
        else:
            chosen = [draw.sample(range(count), length) for _ in range(samples)]
        norms = [_send_back(steps, set(branches), delta).norm().item() for branches in chosen]
        rows.append((length, paths, sum(norms) / len(norms)))
    frame = DataFrame(rows, columns=["length", "paths", "gradient"])
    frame["total"] = frame["gradient"] * frame["paths"].astype(float)
    frame["share"] = frame["total"] / frame["total"].sum()
    return frame


def _steps(model: nn.Module, blocks: dict[str, nn.Module], inputs: Any, keywords: Any) -> tuple[list[Step], Any]:
    """What each block read, cut off from the blocks before it, and what it gave; and the model's output."""
    steps: list[Step] = []
    read: list[Tensor] = []

    def cut(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        stream = args[0] if args else None
        if not isinstance(stream, Tensor) or not stream.is_floating_point():
            raise ValueError(
                f"path_gradients: the stream is one floating tensor, a block's first positional argument; got "
                f"{type(stream).__name__} at {type(block).__name__}. Use other blocks, or a scheme such as 'pre'."
            )
        read.append(stream.detach().requires_grad_())
        return (read[-1], *args[1:])

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        out = stream_of(output, type(block).__name__)
        if out.shape != read[-1].shape:
            raise ValueError(
                f"path_gradients: a block keeps the stream's shape; got a {type(block).__name__} that changes "
                f"{tuple(read[-1].shape)}. Use blocks of one shape."
            )
        steps.append((read[-1], out))

    with uncompiled(), torch.enable_grad(), ExitStack() as stack:
        for block in blocks.values():
            stack.enter_context(block.register_forward_pre_hook(cut))
            stack.enter_context(block.register_forward_hook(keep))
        return steps, model(*inputs, **keywords)


def _send_back(steps: list[Step], branches: set[int], delta: Tensor) -> Tensor:
    """The gradient at x_0 of δ_N that passes the branches of these blocks and the shortcuts of the others."""
    for position in sorted(branches, reverse=True):
        x, out = steps[position]
        (whole,) = torch.autograd.grad(out, x, delta, retain_graph=True)
        delta = whole - delta  # x + F(x): the gradient through both, less that along the shortcut
    return delta


def amplification(model: nn.Module, *inputs: Any, noise: float = 0.01, seed: int = 0, **keywords: Any) -> float:
    """How far a small random change of every weight matrix moves the output: E (f(x; W + δ) − f(x; W))² / noise².

    The entries of δ are normal, with ``noise`` times the root mean square of their matrix. The model itself is not
    changed; it should be in eval mode, since dropout would move the output as well.

    Source: Liu et al. 2020, arXiv:2004.08249, section 4.2, where it grows as N for post-norm and as log N for pre-norm.
    """
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)  # functional_call would leave a module that stands in two places changed

    def run() -> Tensor:
        arguments, named, _ = fresh(inputs, keywords)
        return stream_of(model(*arguments, **named), "the model's output")

    with torch.no_grad():
        before = run()
        for weight in (parameter for parameter in model.parameters() if parameter.ndim >= 2):
            step = torch.randn(weight.shape, generator=generator).to(weight)
            weight += noise * weight.square().mean().sqrt() * step
        after = run()
    return (after - before).double().square().mean().item() / noise**2
