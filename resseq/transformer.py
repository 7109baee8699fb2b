"""The Transformer's two stacks: encoder and decoder."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resseq.layers.attention import Cache, CrossAttention, SelfAttention
from resseq.layers.feedforward import Activation, FeedForward
from resseq.layers.linear import Init
from resseq.packing import Packing, least_rows, lengths_of, pack, unpack
from resseq.products import traced
from resseq.schemes import Scheme, find_scheme
from resseq.stack import Stack

BY_TOKEN = {nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.Identity, nn.ReLU, nn.ModuleList, nn.Sequential}


class TransformerEncoder(Stack):
    """A stack of self-attention and feed-forward residuals.

    ``x_{2l−1} = Residual(x_{2l−2}, attention_l)``, ``x_{2l} = Residual(x_{2l−1}, feedforward_l)``; the scheme says
    what Residual is.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    Shapes: x (B, L, D), mask (B, L) True = real token -> (B, L, D).
    Args:
        dropout: probability that an entry of a branch is zeroed; attention_dropout: that an attention weight is.
        drop_path: probability that a sample's branch is dropped in the last layer, rising linearly to there.
        layer_drop: probability that a residual's branch is left out for a whole batch.
        rotary: turn queries and keys by their position.
        value_residual: mix the first layer's values into those of all others: see SelfAttention.
        pack: let texts share rows between the first residual and the last where that is faster: uncompiled, where it
            saves enough (see worth_packing), and where the mask is on the CPU, as it may be of a batch on a GPU: to
            ask the GPU for the lengths would be to wait for it. Padding then comes out as 0. The batch stays as it is
            where something inside may expect (B, L, D): a hook, or a module or a scheme that is not of this package;
            and in training with drop_path.
        activation_checkpointing: see Stack.

    >>> import torch
    >>> TransformerEncoder(dim=8, depth=2, heads=2, scheme="deepnorm")(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        scheme: str | Scheme = "pre",
        hidden: int | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_drop: float = 0.0,
        rotary: bool = False,
        value_residual: bool = False,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        init: Init = "xavier",
        pack: bool = False,
        activation_checkpointing: bool = False,
    ):
        recipe = find_scheme(scheme)
        if value_residual and recipe.recompute:
            raise ValueError(
                f"TransformerEncoder: the first layer's values are not kept by a scheme that recomputes; got "
                f"value_residual=True with {type(recipe).__name__}. Leave out value_residual, or use another scheme."
            )
        alike: Any = {"dropout": dropout, "init": init}
        attending: Any = alike | {"attention_dropout": attention_dropout} | recipe.inside("attention", norm)
        feeding: Any = alike | {"activation": activation} | recipe.inside("feedforward", norm)
        sharing: Any = ("give", "take") if value_residual else (None, None)
        layers = [
            (
                SelfAttention(dim, heads, rotary=rotary, value_residual=sharing[layer > 0], **attending),
                FeedForward(dim, hidden, **feeding),
            )
            for layer in range(depth)
        ]
        super().__init__(
            layers,
            dim=dim,
            scheme=recipe,
            norm=norm,
            drop_path=drop_path,
            layer_drop=layer_drop,
            activation_checkpointing=activation_checkpointing,
        )
        self.value_residual, self.pack = value_residual, pack

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shared: dict[str, Any] = {"values": []} if self.value_residual else {}
        packing = self.packing(mask) if mask is not None and mask.shape == x.shape[:2] else None
        if packing is None:
            return super().forward(x, mask=None if mask is None else mask.to(x.device), **shared)
        packing = packing.to(x.device)
        return unpack(super().forward(pack(x, packing), mask=packing.bias(x.dtype), **shared), packing)

    def packing(self, mask: Tensor) -> Packing | None:
        """How a batch with this mask shares rows; None where it runs as it is."""
        if not self.pack or mask.device.type != "cpu" or not mask.numel() or traced():
            return None
        lengths = lengths_of(mask)
        longest = int(lengths.max())
        most = (1 - worth_packing(longest)) * mask.numel()
        if least_rows(lengths) * longest > most or not self._lets_texts_share_rows():
            return None
        packing = Packing.of(mask)
        return packing if packing.text.numel() <= most else None

    def _lets_texts_share_rows(self) -> bool:
        """Whether all that runs inside treats each token by itself, or sees to the mask."""
        if self.training and any(getattr(part, "drop_path", 0.0) for part in self.modules()):
            return False  # whole texts are dropped, and a row does not show them
        return (
            _is_ours(self.scheme)
            and all(type(residual.sublayer) in (SelfAttention, FeedForward) for residual in self.residuals)
            and all(_is_ours(part) or type(part) in BY_TOKEN for part in self.modules())
            and not any(
                part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
                for part in self.modules()
            )
        )


def worth_packing(length: int) -> float:
    """Share of a batch's places from which leaving them out is faster, as measured on a CPU.

    It grows with the rows' length, since the mask of who sees whom grows with its square; and a forward pass alone
    saves less than one with its backward.
    """
    return (0.05 + length / 10_000) * (1 if torch.is_grad_enabled() else 3)


def _is_ours(part: object) -> bool:
    return type(part).__module__.startswith("resseq.")


class TransformerDecoder(Stack):
    """A stack of causal self-attention, attention to a memory, and feed-forward residuals.

    ``x_{3l−2} = Residual(x_{3l−3}, attention_l)``, ``x_{3l−1} = Residual(x_{3l−2}, cross_l)``,
    ``x_{3l} = Residual(x_{3l−1}, feedforward_l)``; the scheme says what Residual is.

    To decode token by token, call with ``caches=[]`` first and then with the caches that the call before handed back;
    x then holds the new tokens alone, while mask counts the earlier ones too.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    Shapes: x (B, L, D), memory (B, S, D), mask (B, L) and memory_mask (B, S) True = real token -> (B, L, D); with
        caches (Tensor, caches).
    Args: those of TransformerEncoder but value_residual, pack and activation_checkpointing.

    >>> import torch
    >>> decoder, x, memory = TransformerDecoder(dim=8, depth=2, heads=2), torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    >>> first, caches = decoder(x[:, :4], memory, caches=[])
    >>> last, caches = decoder(x[:, 4:], memory, caches=caches)
    >>> torch.allclose(torch.cat([first, last], 1), decoder(x, memory), atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        scheme: str | Scheme = "pre",
        hidden: int | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_drop: float = 0.0,
        rotary: bool = False,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        init: Init = "xavier",
    ):
        recipe = find_scheme(scheme)
        alike: Any = {"dropout": dropout, "init": init}
        attending: Any = alike | {"attention_dropout": attention_dropout} | recipe.inside("attention", norm)
        feeding: Any = alike | {"activation": activation} | recipe.inside("feedforward", norm)
        layers = [
            (
                SelfAttention(dim, heads, causal=True, rotary=rotary, **attending),
                CrossAttention(dim, heads, **attending),
                FeedForward(dim, hidden, **feeding),
            )
            for _ in range(depth)
        ]
        super().__init__(layers, dim=dim, scheme=recipe, norm=norm, drop_path=drop_path, layer_drop=layer_drop)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Any:
        return super().forward(x, memory=memory, mask=mask, memory_mask=memory_mask, caches=caches)
