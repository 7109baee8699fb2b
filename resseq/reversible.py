"""Residuals run without keeping their activations: the backward pass makes each stream again from the next one."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states


def may_recompute(residuals: Sequence[nn.Module]) -> bool:
    """Whether this can be done here.

    Not while compiling, under torch.func or in forward-mode differentiation, nor with residuals sharded one by one, nor
    with functions as sublayers: they may use any weights.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if not all(isinstance(residual.sublayer, nn.Module) for residual in residuals):
        return False
    return not any(hasattr(p, "device_mesh") for residual in residuals for p in residual.parameters())


def run_reversible(residuals: Sequence[nn.Module], stream: Any, args: Any, keywords: Sequence[dict[str, Any]]) -> Any:
    """The stream after all residuals; for the backward, of all streams only this last one is kept.

    Each residual's connection has ``known_before(after)``, the stream before it with 0 in place of what is not known
    yet (the sublayer reads what is), and ``inverse(after, again)``. Gradients reach the stream, every tensor among the
    arguments, and the parameters; random numbers and autocast are in the backward as they were. Beside the stream, the
    state of the random number generator is kept for each residual (5 kB).

    Source: Gomez et al. 2017, arXiv:1707.04585; for Transformers: Kitaev et al. 2020, arXiv:2001.04451, section 3.
    Raises: ValueError for a sublayer that returns a tuple: what it hands back would have no gradient; RuntimeError in
        the backward where the residuals have other parameters by then, or are in another state.
    """
    tensors, rest = pytree.tree_flatten((args, list(keywords)))
    kept = [i for i, leaf in enumerate(tensors) if isinstance(leaf, Tensor)]
    parameters = [p for residual in residuals for p in residual.parameters()]

    def arguments(leaves: Sequence[Tensor]) -> Any:
        filled = list(tensors)
        for i, leaf in zip(kept, leaves, strict=True):
            filled[i] = leaf
        return pytree.tree_unflatten(filled, rest)

    inputs = [*stream, *(tensors[i] for i in kept), *parameters]
    return type(stream)(*_Run.apply(residuals, type(stream), len(stream), arguments, len(kept), *inputs))


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residuals: Any, kind: Any, width: int, arguments: Callable[..., Any], count: int, *inputs: Any
    ):
        stream, leaves = kind(*inputs[:width]), inputs[width : width + count]
        args, keywords = arguments(leaves)
        ctx.residuals, ctx.kind, ctx.width, ctx.arguments = residuals, kind, width, arguments
        ctx.parameters = inputs[width + count :]
        ctx.state = _state(residuals, ctx.parameters)
        ctx.surroundings = []
        for residual, given in zip(residuals, keywords, strict=True):
            ctx.surroundings.append(_surroundings(stream[0]))
            stream = residual(stream, *args, **given)
            if type(stream) is tuple:
                raise ValueError(
                    f"Scheme 'reversible': a sublayer gives one tensor; got a tuple from "
                    f"{type(residual.sublayer).__name__}. Use Reversible(recompute=False)."
                )
        ctx.save_for_backward(*stream, *leaves)
        return tuple(stream)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any):
        saved, width = ctx.saved_tensors, ctx.width
        now = [p for residual in ctx.residuals for p in residual.parameters()]
        if [*map(id, now)] != [*map(id, ctx.parameters)]:
            raise RuntimeError(
                "Scheme 'reversible': the backward pass runs the residuals again and needs the parameters of the "
                "forward pass; got others. Call backward inside functional_call, or use Reversible(recompute=False)."
            )
        if _state(ctx.residuals, ctx.parameters) != ctx.state:
            raise RuntimeError(
                "Scheme 'reversible': the backward pass runs the residuals again, as they were; got parameters that "
                "were written into since, or another of train() and eval(). Call backward first."
            )
        stream, leaves = ctx.kind(*saved[:width]), saved[width:]
        wanted = ctx.needs_input_grad[5 + width : 5 + width + len(leaves)]
        leaves = [leaf.detach().requires_grad_(needs) for leaf, needs in zip(leaves, wanted, strict=True)]
        args, keywords = ctx.arguments(leaves)
        of_leaves: list[Any] = [None] * len(leaves)
        of_parameters: list[Any] = []
        for residual, given, surroundings in reversed(
            list(zip(ctx.residuals, keywords, ctx.surroundings, strict=True))
        ):
            with torch.enable_grad(), _restored(*surroundings):
                before = ctx.kind(*(t.detach().requires_grad_() for t in residual.connection.known_before(stream)))
                again = residual(before, *args, **given)
            with _without_hooks(residual.parameters()):
                found = _gradients(again, [*before, *leaves, *residual.parameters()], gradients)
            stream = residual.connection.inverse(stream, ctx.kind(*(t.detach() for t in again)))
            gradients = tuple(found[:width])
            of_leaves = [_sum(a, b) for a, b in zip(of_leaves, found[width : width + len(leaves)], strict=True)]
            of_parameters = [*found[width + len(leaves) :], *of_parameters]
        return None, None, None, None, None, *gradients, *of_leaves, *of_parameters


def _state(residuals: Any, parameters: Any) -> list[Any]:
    """How often each parameter was written into, and whether each residual is in training."""
    return [*(parameter._version for parameter in parameters), *(residual.training for residual in residuals)]


def _gradients(outputs: Any, inputs: list[Tensor], gradients: Any) -> list[Tensor | None]:
    """The gradient by each input; None where there is none."""
    needed = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, needed, gradients, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


@contextmanager
def _without_hooks(parameters: Iterable[Tensor]):
    """Without the hooks on these: autograd calls them itself, once, with the gradient that arrives at the end."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _surroundings(x: Tensor) -> tuple[Any, ...]:
    """Where the random numbers stand, and which autocast is on."""
    kinds = {"cpu", x.device.type}
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
    return casts, torch.get_rng_state(), *get_device_states(x)


@contextmanager
def _restored(casts: Any, numbers: Tensor, devices: list[int], of_devices: list[Tensor]):
    with torch.random.fork_rng(devices), ExitStack() as stack:
        torch.set_rng_state(numbers)
        set_device_states(devices, of_devices)
        for cast in casts:
            stack.enter_context(torch.autocast(*cast))
        yield
