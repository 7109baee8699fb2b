"""The models that the command line knows, by name, each built as the options ask."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resseq.models.bert import BertClassifier
from resseq.models.image_classifier import ImageClassifier
from resseq.models.image_resnet import ResNet, cifar_resnet, resnet18, resnet34, resnet50, resnet101, resnet152
from resseq.models.text_convnet import TextConvNet
from resseq.models.text_transformer import TextTransformer

if TYPE_CHECKING:
    from resseq.options import ModelOptions, TrainOptions

MODELS: dict[str, Callable[..., nn.Module]] = {
    "transformer": TextTransformer,
    "convnet": TextConvNet,
    "vdcnn": TextConvNet.vdcnn,
    "cifar-resnet": cifar_resnet,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
}


def arguments_of(name: str) -> Mapping[str, Any]:
    """The parameters of a model's constructor, with their defaults; a ResNet's are those of its own and of ResNet.

    Whatever is no name of ours is a BERT's folder or id.
    """
    own = inspect.signature(MODELS.get(name, BertClassifier)).parameters
    return {**inspect.signature(ResNet).parameters, **own} if "resnet" in name and name in MODELS else own


def build_model(options: "ModelOptions", num_classes: int, **shape: Any) -> nn.Module:
    """The model that the options ask for. Raises: ValueError for an option that it does not take.

    Args:
        shape: what a reader tells of its data: vocab_size and max_length of texts; mean, std and augment of images.
    """
    known = arguments_of(options.model)
    arguments = {name: value for name, value in options.arguments.items() if value is not None}
    for name, value in arguments.items():
        if name not in known:
            flag = name.replace("_", "-")
            raise ValueError(f"model: --model {options.model} has no {flag}; got --{flag} {value}. Leave it out.")
    if options.fine_tunes:
        if "encoder" not in shape:
            raise ValueError(
                f"model: --model is {', '.join(MODELS)}; got --model {options.model}. "
                f"Fine-tune a checkpoint by resseq train."
            )
        return BertClassifier(num_classes=num_classes, **arguments, **shape)
    arguments |= {name: value for name, value in shape.items() if name in known}
    model = MODELS[options.model](num_classes=num_classes, **arguments)
    return ImageClassifier(model, **shape) if isinstance(model, ResNet) else model


def spell_out(options: "TrainOptions") -> "TrainOptions":
    """The same with the model's defaults in place of None: what a run was is not to change with the defaults."""
    known = {name: each.default for name, each in arguments_of(options.model).items() if each.default is not each.empty}
    unsaid = [name for name, value in options.arguments.items() if value is None]
    return replace(options, **{name: known[name] for name in unsaid if name in known})


def check_model(options: "TrainOptions", checkpoint: dict[str, Any] | None = None) -> None:
    """Raise a ValueError for what is wrong with the model, before any data is read."""
    texts = checkpoint or {"vocab_size": options.vocab_size, "max_length": options.max_length}
    images = {"mean": [0.0] * 3, "std": [1.0] * 3}
    with torch.device("meta"):
        build_model(options, num_classes=2, **texts if options.task == "text" else images)
