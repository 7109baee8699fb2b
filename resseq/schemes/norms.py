"""Schemes that differ in where the norm stands."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from resseq.connections import Connection, OneStream
from resseq.factors import FixedScale, LearnedScale
from resseq.merges import branch_only
from resseq.schemes.base import NOT_SCALED, EndsInNorm, Norm, Place, Scheme, weights_of_each


class Plain(Scheme):
    """No shortcut: the control of every experiment.

    ``N(F(x))``; ``φ(F(x))`` where the stack has no norm.

    Source: the plain nets of He et al. 2015, arXiv:1512.03385, section 3.3.
    """

    normed = False

    def connection(self, place: Place) -> Connection:
        return OneStream(merge=branch_only, post=place.norm_after() if place.norm else place.activate())


class SumOnly(Scheme):
    """The residual connection and nothing else.

    ``φ(S(x) + F(x))``: ``ReLU(S(x) + F(x))`` in a ResNet, ``x + F(x)`` where the stack has no activation.

    The options spoil the shortcut, to show what it is for: ``φ(skip_scale·S(x) + scale·F(x))``, or dropout on S(x).

    Source: He et al. 2015, arXiv:1512.03385, eq. 1 and 2; the options: He et al. 2016, arXiv:1603.05027, table 1.
    Raises: ValueError for skip_scale beside skip_dropout.
    """

    normed = False

    def __init__(self, skip_scale: float = 1.0, scale: float = 1.0, skip_dropout: float = 0.0):
        if skip_dropout and skip_scale != 1.0:
            raise ValueError(
                f"SumOnly: skip_scale and skip_dropout exclude each other; got skip_scale={skip_scale}, "
                f"skip_dropout={skip_dropout}. Leave out one."
            )
        self.skip_scale, self.scale, self.skip_dropout = skip_scale, scale, skip_dropout

    def connection(self, place: Place) -> Connection:
        return OneStream(
            shortcut=place.shortcut,
            skip_scale=nn.Dropout(self.skip_dropout) if self.skip_dropout else self.skip_scale,
            scale=self.scale,
            post=place.activate(),
        )


class Post(Scheme):
    """Post-norm, the original Transformer.

    ``N(S(x) + F(x))``

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(shortcut=place.shortcut, post=place.norm_after())


class Pre(EndsInNorm):
    """Pre-norm.

    ``S(x) + F(N(x))``; close: N.

    Source: He et al. 2016, arXiv:1603.05027; for Transformers Xiong et al. 2020, arXiv:2002.04745, table 1.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(pre=place.norm_before(), shortcut=place.shortcut)


class PreAct(Pre):
    """Pre-activation: pre-norm whose shortcut reads N(x), not x, where the shape changes; N holds a ReLU.

    ``x + F(N(x))``, or ``S(N(x)) + F(N(x))``; close: N.

    Source: He et al. 2016, arXiv:1603.05027, section 4 and appendix.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(
            pre=place.norm_before(),
            shortcut=place.shortcut,
            shortcut_reads="stream" if place.shortcut is None else "pre",
        )


class Sandwich(EndsInNorm):
    """A norm on both sides of the sublayer.

    ``S(x) + N(F(N(x)))``; close: N.

    Source: Ding et al. 2021, arXiv:2105.13290, section 2.4 (CogView); Kim et al. 2025, arXiv:2502.02732 (Peri-LN).
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(pre=place.norm_before(), branch=place.norm_after(), shortcut=place.shortcut)


class Branch(EndsInNorm):
    """A norm on the branch's output only ("res-post-norm").

    ``S(x) + N(F(x))``; close: N.

    Source: Liu et al. 2021, arXiv:2111.09883, section 3.2 (Swin v2); OLMo 2 2025, arXiv:2501.00656, section 2.1.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(branch=place.norm_after(), shortcut=place.shortcut)


class MixLN(Pre):
    """Post-norm in the first quarter of the layers, pre-norm in the rest.

    ``N(S(x) + F(x))`` in the first ⌊L/4⌋ layers, then ``S(x) + F(N(x))``; close: N.

    Source: Li et al. 2024, arXiv:2412.13795, section 3 (its α is the share).
    """

    def __init__(self, share: float = 0.25):
        self.share = share

    def connection(self, place: Place) -> Connection:
        if place.layer >= int(self.share * place.layers):
            return super().connection(place)
        return OneStream(shortcut=place.shortcut, post=place.norm_after())


class LNS(EndsInNorm):
    """LayerNorm scaling: pre-norm whose norm shrinks with depth, against the growth of the stream.

    ``S(x) + F(N(x)/√l)``, l the layer from 1; close: N.

    Source: Sun et al. 2025, arXiv:2502.05795, section 4.
    """

    def connection(self, place: Place) -> Connection:
        norm, shrink = place.norm_before(), FixedScale((place.layer + 1) ** -0.5)
        pre = shrink if norm is None else nn.Sequential(norm, shrink)
        return OneStream(pre=pre, shortcut=place.shortcut)


class Keel(Scheme):
    """Post-norm with a large shortcut and a second norm on the branch.

    ``N(αS(x) + F(N(x)))``, α = M unless given: the paper's L counts the maps of this form.

    Source: Chen & Wei 2026, arXiv:2601.19895.
    """

    def __init__(self, alpha: float | None = None):
        self.alpha = alpha

    def connection(self, place: Place) -> Connection:
        return OneStream(
            pre=place.norm_before(),
            skip_scale=float(place.count if self.alpha is None else self.alpha),
            shortcut=place.shortcut,
            post=place.norm_after(),
        )


class SubLN(Pre):
    """Sub-LayerNorm (Magneto): pre-norm with a second norm inside each sublayer, before its last matrix.

    ``S(x) + F(N(x))``, ``F(x) = W_out N(φ(W_in x))``, in attention φ the attention; every weight but query and key
    starts √(ln M) times larger; close: N. With two residuals to a layer this is the paper's √(ln 2L).

    The models build the inner norm because of ``inside``; sublayers of your own have to hold one.

    Source: Wang et al. 2022, arXiv:2210.06423, section 2 and table 2 (encoder-only).
    Raises: ValueError for a sublayer without ``weights() -> [(role, tensor), …]``.
    """

    def inside(self, kind: str, norm: Norm | None) -> dict[str, Any]:
        return {"inner_norm": norm}

    @torch.no_grad()
    def start(self, residuals: Sequence[Any]) -> None:
        gain = math.log(max(2, len(residuals))) ** 0.5  # one residual alone would start at 0
        for weights in weights_of_each(residuals, "subln"):
            for role, weight in weights:
                if role not in NOT_SCALED:
                    weight.mul_(gain)


class NormFormer(EndsInNorm):
    """Pre-norm with a norm after the attention and one inside the feed-forward net, scaled heads, a scaled shortcut.

    Attention: ``S(x) + N(F(N(x)))``, each head times γ_h; feed-forward, the last residual of a layer:
    ``λ⊙S(x) + W_out N(φ(W_in N(x)))``; γ and λ start at 1; close: N.

    The models build what is inside because of ``inside``; sublayers of your own have to hold it.

    Source: Shleifer et al. 2021, arXiv:2110.09456, section 2. The paper has λ (ResScale) in its smaller models alone:
    ``scale_skip=False`` leaves it out.
    """

    def __init__(self, scale_skip: bool = True):
        self.scale_skip = scale_skip

    def inside(self, kind: str, norm: Norm | None) -> dict[str, Any]:
        return {"inner_norm": norm} if kind == "feedforward" else {"head_scale": _scale_of_heads}

    def connection(self, place: Place) -> Connection:
        feedforward = place.part == place.parts - 1
        scaled = feedforward and self.scale_skip
        return OneStream(
            pre=place.norm_before(),
            branch=None if feedforward else place.norm_after(),
            shortcut=place.shortcut,
            skip_scale=LearnedScale(1.0, dim=place.dim_out, channel_dim=place.channel_dim) if scaled else 1.0,
        )


def _scale_of_heads(heads: int) -> nn.Module:
    """``γ_h · y_h``, y (B, H, L, d)."""
    return LearnedScale(1.0, dim=heads, channel_dim=1)
