"""Attention as a sublayer: of a sequence to itself, and to a memory."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from resseq.layers.dropout import Dropout, dropout
from resseq.layers.linear import Init, Linear
from resseq.layers.positions import rotate

Cache = tuple[Tensor, ...]  # keys and values (B, H, S, d), or () before the first call


class ValueMix(nn.Module):
    """``λ₁v₁ + λ₂v``, v₁ the values of the first layer; both λ start at ½.

    Source: Zhou et al. 2024, arXiv:2410.17897 (ResFormer with learned λ).
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)

    def forward(self, first: Tensor, v: Tensor) -> Tensor:
        weight = self.weight.to(v.dtype)
        return weight[0] * first + weight[1] * v


class Attention(nn.Module):
    """What every attention has: its matrices and how heads attend. A subclass says what keys and values are made of.

    ``W_o · concat_h softmax(q_h k_hᵀ/√d_h) v_h + b_o``, d_h = dim/heads.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    Args:
        dropout: probability that an entry of the output is zeroed; attention_dropout: that an attention weight is.
            Attention dropout costs torch's fused kernel on a CPU.
        inner_norm: called with a width, returns a norm of what W_o reads.
        head_scale: called with the number of heads, returns what scales their outputs (B, H, L, d).
    Raises: ValueError where heads does not divide dim.
    """

    projections: dict[str, int]  # the linear maps to query, key and value, and how many of the three each holds

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        inner_norm: Callable[[int], nn.Module] | None = None,
        head_scale: Callable[[int], nn.Module] | None = None,
        init: Init = "xavier",
    ):
        super().__init__()
        if heads < 1 or not 0.0 <= attention_dropout <= 1.0:
            raise ValueError(
                f"{type(self).__name__}: heads is 1 or more and attention_dropout a probability; got heads={heads}, "
                f"attention_dropout={attention_dropout}. Use heads=4, attention_dropout=0.1."
            )
        if dim % heads:
            near = f"dim={dim // heads * heads} or {(dim // heads + 1) * heads}" if dim > heads else f"dim={heads}"
            raise ValueError(
                f"{type(self).__name__}: dim must be divisible by heads; got dim={dim}, heads={heads}. Use {near}."
            )
        self.dim, self.heads, self.attention_dropout = dim, heads, attention_dropout
        for name, parts in self.projections.items():
            self.add_module(name, Linear(dim, dim, parts=parts, init=init))
        self.head_scale = head_scale(heads) if head_scale else None
        self.inner_norm = inner_norm(dim) if inner_norm else None
        self.out = Linear(dim, dim, init=init)
        self.dropout = Dropout(dropout)

    def weights(self) -> list[tuple[str, Tensor]]:
        """The matrices by role, in order of application."""
        fused = [(cast(Linear, self.get_submodule(name)).weight, parts) for name, parts in self.projections.items()]
        matrices = [matrix for weight, parts in fused for matrix in weight.chunk(parts)]
        return [*zip(("query", "key", "value", "out"), [*matrices, self.out.weight], strict=True)]

    def split(self, projected: Tensor) -> list[Tensor]:
        """Cut (B, L, parts · D) into its parts, each by heads (B, H, L, d)."""
        parts = projected.split(self.dim, -1)
        return [rearrange(part, "B L (H d) -> B H L d", H=self.heads) for part in parts]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """``dropout(W_o N(y) + b_o)``, y what the heads find, side by side, N the inner norm.

        Mask (B, S) or (B, L, S), True = may be seen, or (B, L, S) numbers that are added to the scores; causal: the
        queries are the last of the S, and see no later one.

        Raises: ValueError for a mask of another length than the keys.
        """
        if mask is not None and (mask.ndim not in (2, 3) or mask.shape[-1] != k.shape[2]):
            raise ValueError(
                f"{type(self).__name__}: a mask is (B, S) or (B, L, S), S = {k.shape[2]} keys here, a cache's among "
                f"them; got mask of shape {tuple(mask.shape)}. Give a mask for every key."
            )
        if mask is not None and mask.ndim == 3:
            mask = (mask.to(q.dtype) if mask.is_floating_point() else mask.bool()).unsqueeze(1)
        elif mask is not None:
            mask = rearrange(mask.bool(), "B S -> B 1 1 S")
        past = k.shape[2] - q.shape[2]
        p = self.attention_dropout if self.training else 0.0
        by_hand = p > 0.0 and q.device.type == "cpu" and not torch.compiler.is_compiling()
        if causal and (past or mask is not None or by_hand):
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
            if mask is not None and mask.is_floating_point():
                mask = mask.masked_fill(~seen, float("-inf"))
            else:
                mask = seen if mask is None else mask & seen
        if by_hand:
            y = _attend_with_dropout(q, k, v, mask, p)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal and mask is None)
        if self.head_scale is not None:
            y = self.head_scale(y)
        y = rearrange(y, "B H L d -> B L (H d)")
        return self.dropout(self.out(y if self.inner_norm is None else self.inner_norm(y)))


def _attend_with_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """What torch's attention computes on a CPU where it drops weights, in fewer passes over them.

    The scale and the mask come with the matrix product, and dropout is our own. A query that sees nothing, padding
    alone, takes the mean of all.
    """
    heads, scale = q.shape[1], q.shape[-1] ** -0.5
    q, k, v = (rearrange(part, "B H L d -> (B H) L d") for part in (q, k, v))
    shape = (len(q) // heads, heads, q.shape[1], k.shape[1])
    if mask is None:
        hidden = q.new_zeros(1).expand(len(q), *shape[2:])
    else:
        least = torch.finfo(q.dtype).min
        if mask.is_floating_point():
            hidden = mask.clamp(min=least)
        else:
            hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, least)
        hidden = hidden.expand(shape).flatten(0, 1)
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=scale)
    weights = scores.view(shape).softmax(-1).flatten(0, 1)
    return rearrange(torch.bmm(dropout(weights, p), v), "(B H) L d -> B H L d", H=heads)


class SelfAttention(Attention):
    """Multi-head attention of a sequence to itself.

    q, k and v are linear maps of x; with ``causal``, token t sees the tokens up to t.

    With a cache, x continues the sequence that the cache remembers: its keys and values go before those of x, and the
    longer ones are handed back, ``(y, k, v)``. The cache of the first call is ``()``.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; rotary positions: Su et al. 2021, arXiv:2104.09864.
    Shapes: x (B, L, D), mask (B, S) True = real token, S counting the tokens of the cache too, or (B, L, S) True = may
        be seen from there, or a number that is added to the score -> (B, L, D).
    Args: those of Attention, and
        causal: a token does not see those after it.
        rotary: turn queries and keys by their position.
        value_residual: "give" puts the values into the list ``values``, as the first layer does; "take" mixes them with
            its own, ``v ← λ₁v₁ + λ₂v``, as the others do (Zhou et al. 2024, arXiv:2410.17897).
    Raises: ValueError where heads does not divide dim, and for rotary positions where dim/heads is odd.

    >>> import torch
    >>> SelfAttention(8, heads=2)(torch.randn(2, 5, 8), mask=torch.ones(2, 5, dtype=torch.bool)).shape
    torch.Size([2, 5, 8])
    """

    projections = {"qkv": 3}
    qkv: Linear

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        rotary: bool = False,
        value_residual: Literal["give", "take"] | None = None,
        **shared: Any,
    ):
        super().__init__(dim, heads, **shared)
        if rotary and dim // heads % 2:
            raise ValueError(
                f"SelfAttention: rotary positions need an even head width; got dim/heads={dim // heads}. "
                f"Use dim={2 * heads * -(-dim // (2 * heads))}."
            )
        self.causal, self.rotary, self.gives_values = causal, rotary, value_residual == "give"
        self.value_mix = ValueMix() if value_residual == "take" else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        values: list[Tensor] | None = None,
    ) -> Tensor | Cache:
        q, k, v = self.split(self.qkv(x))
        if self.gives_values and values is not None:
            values[:] = [v]
        if self.value_mix is not None:
            if not values:
                raise ValueError(
                    f"SelfAttention: value_residual='take' needs the first layer's values; got values={values}. "
                    f"Call every layer with one list values=[], the first with value_residual='give'."
                )
            v = self.value_mix(values[0], v)
        past = cache[0].shape[2] if cache else 0
        if self.rotary:
            q, k = rotate(q, past), rotate(k, past)
        if cache:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = self.attend(q, k, v, mask, self.causal)
        return y if cache is None else (y, k, v)


class CrossAttention(Attention):
    """Multi-head attention of a sequence to a memory, such as an encoder's output.

    q is a linear map of x, k and v are linear maps of the memory.

    With a cache, ``(y, k, v)`` comes back. A cache of ``()`` is filled from the memory; a filled one stands for the
    memory, which is then not read again.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.
    Shapes: x (B, L, D), memory (B, S, D), memory_mask (B, S) True = real token -> (B, L, D).

    >>> import torch
    >>> CrossAttention(8, heads=2)(torch.randn(2, 5, 8), torch.randn(2, 3, 8)).shape
    torch.Size([2, 5, 8])
    """

    projections = {"query": 1, "key_value": 2}
    query: Linear
    key_value: Linear

    def forward(
        self, x: Tensor, memory: Tensor, memory_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor | Cache:
        (q,) = self.split(self.query(x))
        k, v = cache or self.split(self.key_value(memory))
        y = self.attend(q, k, v, memory_mask)
        return y if cache is None else (y, k, v)
