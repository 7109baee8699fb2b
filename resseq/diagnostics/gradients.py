"""The backward signal: the gradient that reaches each depth of the stream, and each weight."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resseq.diagnostics.signal import OUTPUT, Row
from resseq.diagnostics.stream import is_one_stream, stream_of
from resseq.merges import at_least_float32


class Gradients:
    """Reduces the gradients to numbers as they come; its hooks see every block run.

    δ_l = ∂loss/∂x_l is the gradient of what block l reads, δ_N of what the last block gives; where the stream is
    several tensors, as in Signal, there is none and the weights' alone are measured.

    - ``gradient_norm``: ‖δ_l‖; ``gradient_gain``: ‖δ_l‖/‖δ_{l+1}‖, below 1 where a block shrinks the gradient.
    - ``gradient_through_branches``: ‖δ_l − δ_N‖/‖δ_N‖. Where every shortcut is the identity, δ_l is δ_N, which came
      along the shortcuts, plus a part that passed weights; this is the size of that part.
    - ``weight_gradient_norm``: ‖∂loss/∂W‖ of each parameter of each block, with the parameter's path as its module;
      ``weight_norm``: ‖W‖; ``block_gradient_norm``: the gradient of all parameters of a block together.

    The stream's gradients are reduced inside the hooks, and δ_N alone is kept; the parameters' are held until the
    backward pass ends. No parameter's ``.grad`` changes. There is no ``gradient_norm`` where a block reads a parameter
    itself, or what frozen layers made of token ids.

    Source: He et al. 2016, arXiv:1603.05027, eq. 5 (the two parts).
    """

    def __init__(self, blocks: dict[str, nn.Module]):
        self.blocks = blocks
        self.names: list[str] = []  # of the blocks as they ran
        self.running: list[list[int]] = []  # for each block that has begun a place for its depth, when it has run
        self.end: Tensor | None = None  # δ_N
        self.norms: dict[int, Tensor] = {}
        self.rows: list[Row] = []

    @contextmanager
    def watching(self) -> Iterator["Gradients"]:
        """Hooks on the blocks; gone afterwards."""
        with ExitStack() as stack:
            for name, block in self.blocks.items():
                stack.enter_context(block.register_forward_pre_hook(self._enter, with_kwargs=True))
                stack.enter_context(block.register_forward_hook(partial(self._leave, name), with_kwargs=True))
            yield self

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.running.append([])
        if is_one_stream(block, args, kwargs):
            stream = stream_of((args, kwargs), type(block).__name__)
            if not stream.is_leaf:  # a leaf has no gradient, or would keep the hook
                stream.register_hook(partial(self._reduce, self.running[-1]))  # of the value that it has now

    def _leave(self, name: str, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.running.pop().append(len(self.names))
        self.names.append(name)
        if is_one_stream(block, args, kwargs):
            stream = stream_of(output, type(block).__name__)
            if not stream.is_leaf:
                stream.register_hook(partial(self._reduce_end, len(self.names)))

    def _reduce_end(self, depth: int, gradient: Tensor) -> None:
        if depth == len(self.names):  # of the last block, as it turned out
            self.end = at_least_float32(gradient)
            self.norms[depth] = self.end.norm()

    def _reduce(self, place: list[int], gradient: Tensor) -> None:
        (depth,), gradient = place, at_least_float32(gradient)
        self.norms[depth] = gradient.norm()
        if self.end is not None and self.end.shape == gradient.shape:
            through = (gradient - self.end).norm() / self.end.norm()
            self.rows.append((depth, self.names[depth], "gradient_through_branches", through))

    def backward(self, model: nn.Module, loss: Tensor, leaves: list[Tensor]) -> None:
        """One backward pass, from the loss to every parameter and to the leaves of the model's inputs."""
        # one that several blocks share, as ReZero's two of a layer do, counts in each
        named = model.named_parameters(remove_duplicate=False)
        parameters = [(path, parameter) for path, parameter in named if parameter.requires_grad]
        sources = [*dict.fromkeys(parameter for _, parameter in parameters), *leaves]
        gradients = dict(zip(sources, torch.autograd.grad(loss, sources, allow_unused=True), strict=True))
        for depth, norm in sorted(self.norms.items()):
            name = self.names[depth] if depth < len(self.names) else OUTPUT
            self.rows.append((depth, name, "gradient_norm", norm))
            if depth + 1 in self.norms:
                self.rows.append((depth, name, "gradient_gain", norm / self.norms[depth + 1]))
        self._add_weights(parameters, gradients)

    def _add_weights(self, parameters: Sequence[tuple[str, Tensor]], gradients: Mapping[Tensor, Tensor | None]) -> None:
        squares: dict[int, dict[Tensor, Tensor]] = {}  # a parameter that stands in two places of a block counts once
        for path, parameter in parameters:
            gradient, depth = gradients[parameter], self._depth_of(path)
            if gradient is None or depth is None:
                continue
            wide = torch.promote_types(gradient.dtype, torch.float32)
            norm = gradient.norm(dtype=wide)
            self.rows.append((depth, path, "weight_gradient_norm", norm))
            self.rows.append((depth, path, "weight_norm", parameter.detach().norm(dtype=wide)))
            squares.setdefault(depth, {})[parameter] = norm.square()
        for depth, terms in squares.items():
            total = torch.stack([*terms.values()]).sum().sqrt()
            self.rows.append((depth, self.names[depth], "block_gradient_norm", total))

    def _depth_of(self, path: str) -> int | None:
        """The depth of the block that a parameter belongs to."""
        prefixes = (name and f"{name}." for name in self.names)  # the model itself may be the block
        return next((i for i, prefix in enumerate(prefixes) if path.startswith(prefix)), None)
