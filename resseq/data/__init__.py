"""Text or images in, batches out: the only part of resseq that imports `datasets` and `tokenizers`.

`prepare` gives all of it at once. `load_text` and `load_images` give inputs and labels; a reader (one for each task)
encodes them, for texts by `train_tokenizer` and `encode`; `LengthBatches` and `collate` or `stack` make batches.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resseq.data.batching import Images, LengthBatches, Tokens, collate, encode, stack
    from resseq.data.corpus import Corpus, data_options, prepare
    from resseq.data.image import ImageOptions, load_images
    from resseq.data.readers import ImageReader, PairReader, TextReader
    from resseq.data.rows import Data, DataOptions, Split
    from resseq.data.text import TextOptions, load_text
    from resseq.data.tokenizer import load_pretrained_tokenizer, load_tokenizer, separator_of, train_tokenizer

__all__ = [
    "Corpus",
    "Data",
    "DataOptions",
    "ImageOptions",
    "ImageReader",
    "Images",
    "LengthBatches",
    "PairReader",
    "Split",
    "TextOptions",
    "TextReader",
    "Tokens",
    "collate",
    "data_options",
    "encode",
    "load_images",
    "load_text",
    "load_pretrained_tokenizer",
    "load_tokenizer",
    "prepare",
    "stack",
    "separator_of",
    "train_tokenizer",
]

_MODULES = {
    "TextOptions": "text",
    "load_text": "text",
    "ImageOptions": "image",
    "load_images": "image",
    "Data": "rows",
    "DataOptions": "rows",
    "Split": "rows",
    "ImageReader": "readers",
    "PairReader": "readers",
    "TextReader": "readers",
    "train_tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "load_pretrained_tokenizer": "tokenizer",
    "separator_of": "tokenizer",
    "Tokens": "batching",
    "encode": "batching",
    "LengthBatches": "batching",
    "collate": "batching",
    "Images": "batching",
    "stack": "batching",
    "Corpus": "corpus",
    "data_options": "corpus",
    "prepare": "corpus",
}


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562): the command line needs TextOptions for --help, and must not wait for torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"resseq.data.{_MODULES[name]}"), name)
