"""The models that the command line knows, by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from resseq.models.bert import BertClassifier
from resseq.models.image_resnet import ResNet, cifar_resnet, resnet18, resnet34, resnet50, resnet101, resnet152
from resseq.models.text_convnet import TextConvNet
from resseq.models.text_transformer import TextTransformer

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
