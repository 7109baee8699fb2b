"""The models that the command line knows, by name."""

from resseq.models.text_convnet import TextConvNet
from resseq.models.text_transformer import TextTransformer

MODELS = {"transformer": TextTransformer, "convnet": TextConvNet}
