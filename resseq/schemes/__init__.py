"""The named recipes over depth: one mapping from a name to its scheme."""

import difflib
from types import MappingProxyType

from resseq.schemes.base import Norm, Place, Scheme
from resseq.schemes.gates import GRU, NGPT, DeltaRule, HighwayGates, LaurelLR, LaurelRW, Orthogonal
from resseq.schemes.norms import (
    LNS,
    Branch,
    Keel,
    MixLN,
    NormFormer,
    Plain,
    Post,
    Pre,
    PreAct,
    Sandwich,
    SubLN,
    SumOnly,
)
from resseq.schemes.scales import (
    NF,
    Admin,
    BranchNorm,
    CompleteP,
    DeepNorm,
    DepthMup,
    LayerScale,
    ProRes,
    ReZero,
    SkipInit,
)
from resseq.schemes.starts import Fixup, TFixup
from resseq.schemes.streams import (
    AttnRes,
    BlockAttnRes,
    DenseConnections,
    DenseFormer,
    Hyper,
    ManifoldHyper,
    ResiDual,
    Reversible,
)

__all__ = ["SCHEMES", "Norm", "Place", "Scheme", "find_scheme"]

SCHEMES = MappingProxyType(
    {
        "plain": Plain,
        "residual": SumOnly,
        "post": Post,
        "pre": Pre,
        "preact": PreAct,
        "sandwich": Sandwich,
        "branch": Branch,
        "highway": HighwayGates,
        "gru": GRU,
        "rezero": ReZero,
        "layerscale": LayerScale,
        "deepnorm": DeepNorm,
        "mixln": MixLN,
        "lns": LNS,
        "keel": Keel,
        "subln": SubLN,
        "normformer": NormFormer,
        "ngpt": NGPT,
        "orthogonal": Orthogonal,
        "delta": DeltaRule,
        "laurel_rw": LaurelRW,
        "laurel_lr": LaurelLR,
        "skipinit": SkipInit,
        "admin": Admin,
        "branchnorm": BranchNorm,
        "prores": ProRes,
        "depth_mup": DepthMup,
        "completep": CompleteP,
        "nf": NF,
        "fixup": Fixup,
        "tfixup": TFixup,
        "hyper": Hyper,
        "mhc": ManifoldHyper,
        "denseformer": DenseFormer,
        "attnres": AttnRes,
        "attnres_block": BlockAttnRes,
        "dense": DenseConnections,
        "resi_dual": ResiDual,
        "reversible": Reversible,
    }
)


def find_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of a name in SCHEMES, with its defaults; a Scheme is taken as it is."""
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        word = str(scheme).lower()
        stem = word.removesuffix("norm").removesuffix("ln").rstrip("-_")  # pre-norm, Post-LN
        close = difflib.get_close_matches(word, SCHEMES, 1, 0.8) or difflib.get_close_matches(stem, SCHEMES, 1, 0.7)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        if isinstance(scheme, type) and issubclass(scheme, Scheme):
            hint = f"Write {scheme.__name__}(). "
        raise ValueError(
            f"Stack: scheme is a name or an instance of a Scheme; got scheme={scheme!r}. {hint}"
            f"Use one of {', '.join(SCHEMES)}."
        )
    return SCHEMES[scheme]()
