"""The forward signal: what each block makes of the stream."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from resseq.diagnostics.blocks import replaced, uncompiled
from resseq.diagnostics.stream import Layout, is_one_stream, layouts_of, stream_of
from resseq.merges import add, at_least_float32
from resseq.residual import Residual

Row = tuple[int, str, str, Tensor]  # depth, module, statistic, value: a tensor on its device, so that nothing waits
OUTPUT = "output"  # the module of the rows at the last depth, behind the last block


class Signal:
    """Reduces the stream to numbers as the model runs, by hooks on every block.

    A stream that is several tensors (a history or a pair, in schemes such as attnres and reversible) is not measured:
    of its Residuals there are ``branch_rms`` and ``branch_variance`` alone.

    At each depth l, x_l being what block l reads and x_N what the last block gave, over all positions:

    - ``stream_rms``: √E x²; ``stream_size``: E|x|; ``stream_variance``: the variance over the features of a position,
      mean over positions.
    - ``token_spread``: ‖X − 1x̄ᵀ‖/‖X‖, x̄ the mean over a sample's positions: 0 where all have become alike (rank
      collapse). For streams (B, L, D) only.

    Of each block that keeps the stream's shape:

    - ``stream_growth``: ‖x_{l+1}‖/‖x_l‖; ``update_ratio``: ‖x_{l+1} − x_l‖/‖x_l‖.
    - ``block_influence``: 1 − E cos(x_l, x_{l+1}); ``angular_distance``: E arccos(cos(x_l, x_{l+1}))/π.

    Of each Residual, y its finished branch, scale · branch(F(pre(x))):

    - ``branch_rms``; ``branch_variance``; ``branch_ratio``: ‖y‖/‖x_l‖.
    - ``telescoping_error``: ‖x_{l+1} − (x_0 + Σ_{i≤l} y_i)‖/‖x_{l+1}‖: rounding where every shortcut is the identity,
      larger where a norm, a gate or a factor stands on the stream.
    - ``skip_gain``: λ_l, ‖what the shortcut adds‖/‖x_l‖: 1 for the identity, the factor of a scaled shortcut; and
      ``skip_product``: ∏_{i≥l} λ_i, by how much the shortcuts from block l to the end scale the stream together. Where
      blocks are sums; a norm behind the sum is not counted.

    All is reduced inside the hooks: kept are x_0 + Σy, and what a block read until it has run, since it may write into
    it: two tensors of the stream's size. Half precision is read as float32.

    Source: token_spread: Dong et al. 2021, arXiv:2103.03404, section 2.2; block_influence: Men et al. 2024,
    arXiv:2403.03853, eq. 1; angular_distance: Gromov et al. 2024, arXiv:2403.17887, eq. 5; the telescoping sum
    and ∏λ: He et al. 2016, arXiv:1603.05027, eq. 4 and 7.
    Args:
        mask: (B, L) bool, True = a position that counts. A convolutional net that keeps every s-th position keeps every
            s-th of the mask.
    """

    def __init__(self, blocks: dict[str, nn.Module], mask: Tensor | None = None):
        self.names = {block: name for name, block in blocks.items()}
        self.layouts = layouts_of(blocks.values(), mask)
        self.layout: Layout  # that of the block whose numbers are taken
        self.rows: list[Row] = []
        self.ran: list[str] = []  # the blocks as they ran
        self.read: dict[nn.Module, Tensor] = {}
        self.branches: dict[nn.Module, Tensor] = {}
        self.skips: dict[nn.Module, Tensor] = {}
        self.gains: list[Tensor] = []  # λ of each block
        self.sum: Tensor | None = None  # x_0 + Σ y, as long as the shapes allow it
        self.output: list[Row] = []  # of what the last block gave

    @contextmanager
    def watching(self) -> Iterator["Signal"]:
        """Hooks on the blocks, and a tap on what the branch of each Residual adds; gone afterwards."""
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            for block in self.names:
                stack.enter_context(block.register_forward_pre_hook(self._enter, with_kwargs=True))
                stack.enter_context(block.register_forward_hook(self._leave, with_kwargs=True))
                if isinstance(block, Residual):
                    stack.enter_context(tapped(block, self.branches, self.skips))
            yield self
            self.rows += self.output
            if len(self.gains) == len(self.ran) > 0:
                products = torch.stack(self.gains).flip(0).cumprod(0).flip(0)
                self.rows += [(i, self.ran[i], "skip_product", product) for i, product in enumerate(products)]

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_one_stream(block, args, kwargs):
            x = stream_of((args, kwargs), type(block).__name__)
            self.read[block] = self._stream(block, x.detach().clone())

    def _leave(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.layout = self.layouts[block]
        name, x, y = self.names[block], self.read.pop(block, None), self.branches.pop(block, None)
        self.ran.append(name)
        if y is not None:
            y = self.layout(at_least_float32(y.detach()))
            self._add(branch_rms=self._norm(y), branch_variance=self._mean(y.var(-1, correction=0)))
        if x is None:
            return
        out = self._stream(block, stream_of(output, type(block).__name__).detach())
        self._add(**self._of_stream(x))
        self.output = [(len(self.ran), OUTPUT, statistic, value) for statistic, value in self._of_stream(out).items()]
        if x.shape == out.shape:
            self._add_step(x, out)
        if y is not None:
            self._add_sum(block, x, y, out)

    def _stream(self, block: nn.Module, x: Tensor) -> Tensor:
        layout, x = self.layouts[block], at_least_float32(x)
        return x if layout.lanes else layout(x)  # the lanes' width is last

    def _add(self, **statistics: Tensor) -> None:
        depth = len(self.ran) - 1
        self.rows += [(depth, self.ran[depth], statistic, value) for statistic, value in statistics.items()]

    def _mean(self, q: Tensor) -> Tensor:
        """Mean over positions of a quantity q, one per position."""
        mask = self.layout.real(q.shape)
        if mask is None:
            return q.mean()
        weights = mask.to(q).view(*mask.shape, *[1] * (q.ndim - mask.ndim)).expand_as(q)
        return (q * weights).sum() / weights.sum()

    def _norm(self, x: Tensor) -> Tensor:
        return self._mean(x.square().mean(-1)).sqrt()

    def _of_stream(self, x: Tensor) -> dict[str, Tensor]:
        found = {
            "stream_rms": self._norm(x),
            "stream_size": self._mean(x.abs().mean(-1)),
            "stream_variance": self._mean(x.var(-1, correction=0)),
        }
        if x.ndim == 3:
            mask = self.layout.real(x.shape)
            weights = torch.ones_like(x[..., :1]) if mask is None else mask.to(x).unsqueeze(-1)
            center = (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
            found["token_spread"] = self._norm(x - center) / found["stream_rms"]
        return found

    def _add_step(self, x: Tensor, out: Tensor) -> None:
        # vectors below the usual eps of 1e-8 have a direction too: a deep plain net's
        cosine = cosine_similarity(x, out, dim=-1, eps=torch.finfo(x.dtype).tiny).clamp(-1, 1)
        self._add(
            stream_growth=self._norm(out) / self._norm(x),
            update_ratio=self._norm(out - x) / self._norm(x),
            block_influence=1 - self._mean(cosine),
            angular_distance=self._mean(cosine.arccos()) / torch.pi,
        )

    def _add_sum(self, block: nn.Module, x: Tensor, y: Tensor, out: Tensor) -> None:
        if block in self.skips:
            skip = self.layout(at_least_float32(self.skips.pop(block).detach()))
            self.gains.append(self._norm(skip) / self._norm(x) * (skip.numel() / x.numel()) ** 0.5)
            self._add(skip_gain=self.gains[-1])
        if y.shape != x.shape:
            return
        self._add(branch_ratio=self._norm(y) / self._norm(x))
        if len(self.ran) == 1:
            self.sum = x
        self.sum = self.sum + y if self.sum is not None and self.sum.shape == y.shape else None
        if self.sum is not None:
            self._add(telescoping_error=self._norm(out - self.sum) / self._norm(out))


def tapped(
    residual: Residual, branches: dict[nn.Module, Tensor], skips: dict[nn.Module, Tensor]
) -> AbstractContextManager[None]:
    """Note what the branch and, in a sum, the shortcut of a Residual add to the stream, whenever it runs."""
    connection = residual.connection
    finish: Callable[..., Tensor] = connection.finish

    def tap(y: Tensor) -> Tensor:
        branches[residual] = y = finish(y)
        return y

    def tap_sum(skip: Tensor, y: Tensor) -> Tensor:
        skips[residual] = skip
        return add(skip, y)

    sums = getattr(connection, "merge", None) is add
    return replaced(connection, finish=tap, **({"merge": tap_sum} if sums else {}))
