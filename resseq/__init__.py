"""The residual toolkit for Transformers and sequence models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from resseq.ablation.runner import ablate
    from resseq.classification import evaluate, predict, train
    from resseq.factors import LearnedScale
    from resseq.inspection import inspect
    from resseq.merges import Concat, GRUGate, Highway
    from resseq.models.bert import Bert
    from resseq.models.image_resnet import ResNet, cifar_resnet, resnet18, resnet34, resnet50, resnet101, resnet152
    from resseq.models.text_convnet import BasicConvResBlock, TextConvNet
    from resseq.models.text_transformer import TextTransformer
    from resseq.publication import export, push_to_hub
    from resseq.residual import Residual
    from resseq.schemes import SCHEMES
    from resseq.stack import Stack
    from resseq.transformer import TransformerDecoder, TransformerEncoder

# Each public name is imported when it is first used, so that `import resseq` and `resseq --help` cost no torch.
_MODULES = {
    "residual": ("Residual",),
    "stack": ("Stack",),
    "schemes": ("SCHEMES",),
    "factors": ("LearnedScale",),
    "merges": ("Highway", "GRUGate", "Concat"),
    "transformer": ("TransformerEncoder", "TransformerDecoder"),
    "models.text_transformer": ("TextTransformer",),
    "models.text_convnet": ("TextConvNet", "BasicConvResBlock"),
    "models.bert": ("Bert",),
    "models.image_resnet": ("ResNet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "cifar_resnet"),
    "classification": ("train", "evaluate", "predict"),
    "ablation.runner": ("ablate",),
    "inspection": ("inspect",),
    "publication": ("export", "push_to_hub"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Residual",
    "Stack",
    "SCHEMES",
    "LearnedScale",
    "Highway",
    "GRUGate",
    "Concat",
    "TransformerEncoder",
    "TransformerDecoder",
    "TextTransformer",
    "TextConvNet",
    "Bert",
    "BasicConvResBlock",
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "cifar_resnet",
    "train",
    "evaluate",
    "predict",
    "ablate",
    "inspect",
    "export",
    "push_to_hub",
]


def __getattr__(name: str) -> Any:
    if name == "diagnostics":  # a part of its own, found as resseq.diagnostics without another import
        return import_module("resseq.diagnostics")
    if name not in _HOME:
        raise AttributeError(f"module 'resseq' has no attribute {name!r}")
    return getattr(import_module(f"resseq.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "diagnostics"])
