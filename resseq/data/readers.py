"""The seam between the tasks: what a text, and what an image, needs before a model can take it.

A reader is fitted to the training data, stands beside the weights in the run folder, and encodes whatever comes later.
All else, from the splits to the model card, is the same for both.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image

from resseq.data.baseline import linear_baseline, pixel_baseline
from resseq.data.batching import Images, Tokens, encode
from resseq.data.image import ImageOptions, common_size, decode, load_images, read_picture
from resseq.data.rows import Data, name_rows
from resseq.data.text import SEPARATOR, TextOptions, as_texts, join, load_text
from resseq.data.tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor


@dataclass(frozen=True)
class TextReader:
    """From texts to token ids, by a tokenizer."""

    tokenizer: "Tokenizer"
    max_length: int
    checkpoint: dict[str, Any] | None = None
    """What the model must know of the checkpoint that the tokenizer comes from, if it comes from one."""

    name: ClassVar = "tokenizer"
    inputs: ClassVar = "texts"
    separator: ClassVar = SEPARATOR
    pairs: ClassVar = False
    options: ClassVar = TextOptions
    load_data: ClassVar = staticmethod(load_text)

    @staticmethod
    def fit(data: Data, options: TextOptions) -> tuple["TextReader", dict[str, Tokens]]:
        """Train the tokenizer on the training texts; with it, the encoded splits."""
        reader = TextReader(train_tokenizer(data.splits["train"].inputs, options), options.max_length)
        return reader, {name: reader.encode(*split) for name, split in data.splits.items()}

    @staticmethod
    def load(folder: Path, options: TextOptions) -> "TextReader":
        """The reader that stands in a run folder."""
        return TextReader(load_tokenizer(folder / "tokenizer.json"), options.max_length)

    @property
    def content(self) -> str:
        """What its file in the run folder holds."""
        return self.tokenizer.to_str(pretty=True)

    @property
    def shape(self) -> dict[str, Any]:
        """What the model must know of the data."""
        return self.checkpoint or {"vocab_size": self.tokenizer.get_vocab_size(), "max_length": self.max_length}

    def take(self, values: Sequence[Any], first: int) -> list[str]:
        """What somebody gives to predict, made what `encode` takes: of several columns' texts one, as in training.

        Raises: ValueError that names the missing ones' rows, counted from `first`.
        """
        texts = [join(value, self.separator) if isinstance(value, tuple | list) else value for value in values]
        return as_texts(texts, "what is to be predicted", first)

    def made_up(self) -> list[str]:
        """Texts of several lengths, for want of the data's."""
        return [
            self.separator.join([text] * 2) for text in ("", "a text", "one that is a little longer than the others")
        ]

    def encode(self, inputs: Sequence[str], labels: Sequence[int] | None = None) -> Tokens:
        return encode(self.tokenizer, inputs, labels, self.max_length, self.pairs)

    def linear(self, train: Tokens, test: Tokens, classes: int) -> dict[str, float]:
        """Test accuracy of a linear model, by its name."""
        return {"linear": linear_baseline(train, test, self.tokenizer.get_vocab_size(), classes)}


@dataclass(frozen=True)
class PairReader(TextReader):
    """From pairs of texts, written with a tab between, to token ids."""

    separator: ClassVar = "\t"
    pairs: ClassVar = True
    load_data: ClassVar = staticmethod(partial(load_text, pairs=True))


@dataclass(frozen=True)
class ImageReader:
    """From images to bytes of one size; the model normalises them by the training images' mean and deviation."""

    size: int
    mean: tuple[float, ...]
    """Of each channel, from 0 to 1."""
    std: tuple[float, ...]
    augment: bool

    name: ClassVar = "image"
    inputs: ClassVar = "images"
    options: ClassVar = ImageOptions
    load_data: ClassVar = staticmethod(load_images)

    @staticmethod
    def fit(data: Data, options: ImageOptions) -> tuple["ImageReader", dict[str, Images]]:
        """Find the size and the colours' statistics in the training images; with them, the decoded splits."""
        size = options.image_size or common_size(data.splits["train"].inputs)
        splits = {name: Images(decode(inputs, size), labels) for name, (inputs, labels) in data.splits.items()}
        return ImageReader(size, *_statistics(splits["train"].pixels), options.augment), splits

    @staticmethod
    def load(folder: Path, options: ImageOptions) -> "ImageReader":
        """The reader that stands in a run folder."""
        return ImageReader(**json.loads((folder / "image.json").read_text()))

    @property
    def content(self) -> str:
        """What its file in the run folder holds."""
        return json.dumps(asdict(self), indent=2)

    @property
    def shape(self) -> dict[str, Any]:
        """What the model must know of the data."""
        return {"mean": self.mean, "std": self.std, "augment": self.augment}

    def take(self, values: Sequence[Any], first: int) -> list[Any]:
        """What somebody gives to predict, as it is: `encode` says what is no image.

        Raises: ValueError that names the missing ones' rows, counted from `first`.
        """
        if missing := [
            row for row, value in enumerate(values, first) if value is None or (isinstance(value, str) and not value)
        ]:
            raise ValueError(f"predict: every row must name an image; got none in {name_rows(missing)}. Fill the row.")
        return list(values)

    def made_up(self) -> list[Any]:
        """Grey images, from black to white, for want of the data's."""
        return [Image.new("L", (self.size, self.size), grey) for grey in (0, 64, 128, 255)]

    def encode(self, inputs: Sequence[Any], labels: Sequence[int] | None = None) -> Images:
        """Decode images: Pictures, paths, or PIL images."""
        pictures = [read_picture(each) if isinstance(each, str | os.PathLike) else each for each in inputs]
        return Images(decode(pictures, self.size), labels)

    def linear(self, train: Images, test: Images, classes: int) -> dict[str, float]:
        """Test accuracy of a linear model, by its name."""
        return {"pixels": pixel_baseline(train, test, classes)}


def _statistics(pixels: "Tensor") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, exact, from counts of the 256 values."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    share, value = counts / counts.sum(1, keepdim=True), torch.arange(256) / 255
    mean = (share * value).sum(1)
    std = (share * (value - mean[:, None]).square()).sum(1).sqrt().clamp(min=1e-3)  # of images of one colour
    return tuple(mean.tolist()), tuple(std.tolist())


READERS: dict[str, Any] = {"text": TextReader, "image": ImageReader}
