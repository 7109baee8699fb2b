"""Schemes that scale the branch or the shortcut."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resseq.connections import Connection, OneStream
from resseq.factors import FixedScale, LearnedScale, Warmup
from resseq.merges import add
from resseq.schemes.base import EndsInNorm, Place, Scheme, start_xavier


class ReZero(Scheme):
    """A learned factor on the branch that starts at 0, and no norm.

    ``S(x) + λF(x)``; λ = 0, one for each layer, shared by its residuals. A parameter that is shared cannot be sharded
    residual by residual: with FSDP, ``fully_shard`` the whole stack, or use skipinit. And torch.func.functional_call
    leaves what stands in two places changed (pytorch issue 164759): give it ``tie_weights=False``, or use skipinit.

    Source: Bachlechner et al. 2020, arXiv:2003.04887, eq. 2 and section 5.
    """

    normed = False

    def connections(self, places: Sequence[Place]) -> list[Connection]:
        scales = [LearnedScale(0.0) for _ in range(places[-1].layer + 1)]
        return [OneStream(scale=scales[place.layer], shortcut=place.shortcut) for place in places]


class LayerScale(EndsInNorm):
    """Pre-norm with a learned factor for each channel of the branch.

    ``S(x) + λ⊙F(N(x))``; λ starts at 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond; close: N.

    Source: Touvron et al. 2021, arXiv:2103.17239, eq. 4 and section 2.
    """

    def __init__(self, start_at: float | None = None):
        self.start_at = start_at

    def connection(self, place: Place) -> Connection:
        start_at = self.start_at
        if start_at is None:
            start_at = 0.1 if place.layers <= 18 else 1e-5 if place.layers <= 24 else 1e-6
        return OneStream(
            pre=place.norm_before(),
            scale=LearnedScale(start_at, dim=place.dim_out, channel_dim=place.channel_dim),
            shortcut=place.shortcut,
        )


class DeepNorm(Scheme):
    """Post-norm that trains at a thousand layers: a larger shortcut, a smaller start.

    ``N(αS(x) + F(x))``, ``α = M^¼``, and every weight of a sublayer starts Xavier uniform with gain ``β = (4M)^-¼``,
    query and key with gain 1. With two residuals to a layer these are the paper's (2L)^¼ and (8L)^-¼, and with a
    decoder's three (3L)^¼ and (12L)^-¼. An encoder that is read by a decoder has other factors: with L layers to the
    decoder's L', ``α = 0.81 (L⁴L')^(1/16)``, ``β = 0.87 (L⁴L')^(-1/16)``.

    Source: Wang et al. 2022, arXiv:2203.00555, figure 2 and section 4.
    Args:
        decoder_layers: of the decoder that reads this stack, where it is an encoder.
    Raises: ValueError for a sublayer without ``weights() -> [(role, tensor), …]``.
    """

    def __init__(self, decoder_layers: int | None = None):
        self.decoder_layers = decoder_layers

    def constants(self, count: int) -> tuple[float, float]:
        """α and β of a stack of ``count`` residuals."""
        if self.decoder_layers is None:
            return count**0.25, (4 * count) ** -0.25
        both = (count / 2) ** 4 * self.decoder_layers
        return 0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16)

    def connection(self, place: Place) -> Connection:
        return OneStream(skip_scale=self.constants(place.count)[0], shortcut=place.shortcut, post=place.norm_after())

    def start(self, residuals: Sequence[Any]) -> None:
        start_xavier(residuals, "deepnorm", self.constants(len(residuals))[1])


class SkipInit(Scheme):
    """A learned factor on each branch that starts at 0, and no norm.

    ``S(x) + λF(x)``; λ = 0, one for each residual.

    Source: De & Smith 2020, arXiv:2002.10444, section 4.
    """

    normed = False

    def connection(self, place: Place) -> Connection:
        return OneStream(scale=LearnedScale(0.0), shortcut=place.shortcut)


class Admin(Scheme):
    """Post-norm whose shortcuts start as heavy as all branches before them: adaptive model initialization.

    ``N(ω⊙S(x) + F(x))``, ω one number per channel. One pass over a first batch sets them in order: ω_1 = 1,
    ``ω_{i+1}² = Var(ω_i⊙S(x)) + Var(F_i)``, so that ω_i² = 1 + Σ_{j<i} Var(F_j) for a normalised stream.

    Source: Liu et al. 2020, arXiv:2004.08249, section 4.2, and its profiling pass in the authors' Transformer-Clinic.
    """

    def connection(self, place: Place) -> Connection:
        return OneStream(
            skip_scale=LearnedScale(1.0, dim=place.dim_out, channel_dim=place.channel_dim),
            shortcut=place.shortcut,
            post=place.norm_after(),
        )

    @torch.no_grad()
    def calibrate(self, stack: Any, *args: Any, **kwargs: Any) -> None:
        variance = 1.0

        def profiled(omega: Tensor) -> Any:
            omega.fill_(1.0)

            def merge(x: Tensor, y: Tensor) -> Tensor:
                nonlocal variance
                omega.fill_(variance**0.5)
                x = x * variance**0.5
                variance = (x.var() + y.var()).item()
                return x + y

            return merge

        for residual in stack.residuals:
            residual.connection.merge = profiled(residual.connection.skip_scale.weight)
        try:
            stack.forward(*args, **kwargs)
        finally:
            for residual in stack.residuals:
                residual.connection.merge = add


class BranchNorm(Scheme):
    """Post-norm whose branches fade in over the first steps of training.

    ``N(S(x) + α_t F(x))``, ``α_t = min(1, t/T)``, t the optimizer step, T ``period`` steps.

    Source: Liu et al. 2023, arXiv:2305.02790.
    """

    def __init__(self, period: int = 1000):
        self.period = period

    def connection(self, place: Place) -> Connection:
        return OneStream(scale=Warmup(self.period), shortcut=place.shortcut, post=place.norm_after())


class ProRes(EndsInNorm):
    """Pre-norm whose branches fade in one layer after the other.

    ``S(x) + α_{l,t} F(N(x))``, ``α_{l,t} = min(1, t/(T·l))``, t the optimizer step, l the layer from 1, T ``period``
    steps; close: N.

    Source: Chen et al. 2026, arXiv:2603.05369.
    """

    def __init__(self, period: int = 1000):
        self.period = period

    def connection(self, place: Place) -> Connection:
        return OneStream(
            pre=place.norm_before(), scale=Warmup(self.period * (place.layer + 1)), shortcut=place.shortcut
        )


class CompleteP(EndsInNorm):
    """Pre-norm whose learning rate and Adam's ε carry over from a shallow model to a deep one.

    ``S(x) + F(N(x))/m``, m = L/base; Adam's ε of everything in a residual is divided by m too; close: N. This is the
    depth half of the parametrisation: it scales nothing with the width.

    Source: Dey et al. 2025, arXiv:2505.01618, table 1 with α = 1.
    Args:
        base: layers of the model that the learning rate was chosen for.
    """

    exponent = 1.0

    def __init__(self, base: int = 1):
        self.base = base

    def connection(self, place: Place) -> Connection:
        return OneStream(
            pre=place.norm_before(), scale=(place.layers / self.base) ** -self.exponent, shortcut=place.shortcut
        )

    def groups(self, stack: Any) -> list[dict[str, Any]]:
        scale = stack.residuals[0].connection.scale  # m^-α
        rate = scale ** (1 / self.exponent - 1)  # m^(α−1)
        return [{"params": list(stack.residuals.parameters()), "lr_scale": rate, "eps_scale": scale}]


class DepthMup(CompleteP):
    """Depth-μP: pre-norm with branches, learning rate and Adam's ε divided by √m, m = L/base.

    ``S(x) + F(N(x))/√m``; close: N.

    Source: Yang et al. 2023, arXiv:2310.02244; in the terms of Dey et al. 2025, arXiv:2505.01618, table 1, α = ½.
    """

    exponent = 0.5


class NF(Scheme):
    """The normalizer-free ResNet's junction: the branch reads the stream at the variance that it should have, 1.

    ``S(x) + αF(x/β)``, α = 0.2, β² the stream's expected variance: 1 at first, α² more after each residual, and 1 + α²
    after one with a shortcut of its own, which reads x/β as well. F is to give variance 1 for variance 1.

    Source: Brock et al. 2021, arXiv:2101.08692, section 3.
    """

    normed = False

    def __init__(self, alpha: float = 0.2):
        self.alpha = alpha

    def connections(self, places: Sequence[Place]) -> list[Connection]:
        connections, variance = [], 1.0
        for place in places:
            connections.append(
                OneStream(
                    pre=FixedScale(variance**-0.5),
                    scale=self.alpha,
                    shortcut=place.shortcut,
                    shortcut_reads="stream" if place.shortcut is None else "pre",
                )
            )
            variance = (variance if place.shortcut is None else 1.0) + self.alpha**2
        return connections
