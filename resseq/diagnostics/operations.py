"""What happens inside the blocks: where attention looks, and which units never fire."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resseq.diagnostics.signal import Row
from resseq.diagnostics.stream import Layout, layouts_of

# what sets units to exactly 0, by all the names that torch calls it; nn.ReLU6 is a hardtanh
RECTIFIERS = {F.relu, F.relu_, F.relu6, F.hardtanh, F.threshold, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}


class Operations(TorchFunctionMode):
    """Sees torch's functions as the blocks call them, so that any module's attention and activations count.

    Of each block, the mean over the functions in it:

    - ``attention_entropy``: −Σ p log p of the attention weights, in nats: 0 where a query sees one position alone,
      log S where it sees all S alike. Mean over heads and queries; what is masked counts neither as query nor as key.
      Of ``F.scaled_dot_product_attention`` and ``F.multi_head_attention_forward``, hence of nn.MultiheadAttention and
      of Hugging Face's models with sdpa, and of a softmax over the last of four axes (B, H, L, S), by which a model
      attends by hand.
    - ``dead_units``: share of the features behind a ReLU (or ReLU6, or threshold) that are 0 at every position of the
      batch.

    Attention is computed once more, in float32 and without its dropout; nothing is kept but numbers.

    Args:
        mask: (B, L) bool, True = a position that counts.
    """

    def __init__(self, blocks: dict[str, nn.Module], mask: Tensor | None = None):
        super().__init__()
        self.blocks = blocks
        self.mask = mask
        self.rows: list[Row] = []
        self.depth = 0
        self.layouts = layouts_of(blocks.values(), mask)
        self.layout: Layout | None = None  # of the block that is running
        self.seen: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator["Operations"]:
        """Hooks that tell which block runs; gone afterwards."""
        with ExitStack() as stack:
            for name, block in self.blocks.items():
                enter, leave = self._bounds(name, self.layouts[block])
                stack.enter_context(block.register_forward_pre_hook(enter))
                stack.enter_context(block.register_forward_hook(leave))
            yield stack.enter_context(self)

    def _bounds(self, name: str, layout: Layout) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            self.layout, self.seen = layout, {}

        def leave(*_: Any) -> None:
            rows = self.seen.items()
            self.rows += [(self.depth, name, statistic, torch.stack(values).mean()) for statistic, values in rows]
            self.layout, self.depth = None, self.depth + 1

        return enter, leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.layout is None:
            return out
        with torch.no_grad():
            if func in RECTIFIERS:
                self._see("dead_units", _dead(out, self.layout))
            elif func is F.scaled_dot_product_attention:
                with torch.autocast(out.device.type, enabled=False):
                    self._see("attention_entropy", self._entropy(attention_weights(*args, **kwargs)))
            elif func in SOFTMAXES and out.ndim == 4 and (args[1:] or (kwargs.get("dim"),))[0] in (-1, 3):
                self._see("attention_entropy", self._entropy(out))
            elif func is F.multi_head_attention_forward:
                again = kwargs | {"need_weights": True, "average_attn_weights": False, "training": False}
                self._see("attention_entropy", self._entropy(func(*args, **again)[1]))
        return out

    def _see(self, statistic: str, value: Tensor) -> None:
        self.seen.setdefault(statistic, []).append(value)

    def _entropy(self, weights: Tensor) -> Tensor:
        """Mean over heads and real queries; weights (…, H, L, S)."""
        entropy = torch.special.entr(weights.float().nan_to_num()).sum(-1).movedim(-2, -1)  # (…, L, H)
        if self.mask is None or entropy.shape[:-1] != self.mask.shape:
            return entropy.mean()
        return entropy[self.mask].mean()


def _dead(out: Tensor, layout: Layout) -> Tensor:
    """Share of the features that are 0 at every real position."""
    zero = layout(out) == 0
    mask = layout.real(zero.shape) if zero.ndim > 2 else None
    if mask is not None:
        zero = zero | ~mask.to(zero.device).view(*mask.shape, *[1] * (zero.ndim - mask.ndim))
    return zero.reshape(-1, zero.shape[-1]).all(0).float().mean()


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q kᵀ/√d), what ``F.scaled_dot_product_attention`` multiplies the values by, in float32."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)
