"""A task ready for training: every split encoded by one reader."""

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from resseq.data.baseline import majority_baseline
from resseq.data.batching import Images, Tokens
from resseq.data.readers import READERS, ImageReader, TextReader
from resseq.data.rows import DataOptions

FEW = 20  # with no more training rows than this, each may be of a class of its own


@dataclass(frozen=True)
class Corpus:
    """Data as a model takes it, and what is known of it."""

    splits: dict[str, Tokens] | dict[str, Images]
    """"train", "validation" and "test", with labels."""
    classes: list[str]
    """The name of each label."""
    carved: tuple[str, ...]
    """The splits that the source lacks, taken from its train split."""
    reader: TextReader | ImageReader
    """Fitted to the training split, or a checkpoint's."""
    baselines: dict[str, float]
    """Test accuracy of the majority class and of a linear model: a bag of tokens, or the pixels."""
    fingerprint: dict[str, str]
    """A checksum of each split's inputs and labels, and of the reader."""
    repeated: int
    """Test examples whose text or image stands among those for training too."""

    @property
    def rows(self) -> dict[str, int]:
        """Examples in each split."""
        return {split: len(examples) for split, examples in self.splits.items()}

    def class_weights(self, options: Any) -> Tensor | None:
        """n/(C·n_c) for each class of the C that training has, 0 for others: an example counts 1 in the mean.

        None where a run's options do not ask for them.
        """
        if options.class_weights is None:
            return None
        train = self.splits["train"]
        assert train.labels is not None
        counts = torch.bincount(train.labels, minlength=len(self.classes))
        return (counts > 0) * len(train) / ((counts > 0).sum() * counts.clamp(min=1))


def data_options(options: Any) -> Any:
    """The TextOptions or ImageOptions among a run's options."""
    kind = READERS[options.task].options
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})


def prepare(options: DataOptions, reader: Any = None) -> Corpus:
    """Load texts or images, fit a reader to those for training unless one is given, and encode all.

    Raises: ValueError, as load_text does, and for a single class, or for more classes than half the training rows.
    """
    kind = READERS[options.task]
    data = (reader or kind).load_data(options)
    if len(data.classes) < 2:
        raise ValueError(
            f"prepare: there must be two classes to tell apart; got classes={data.classes} in {options.data}. "
            f"Name another column by --label-column."
        )
    rows = len(data.splits["train"].inputs)
    drawn = rows == options.max_train_samples  # then each class may have but few of its rows left
    if len(data.classes) > rows / 2 and rows > FEW and not drawn:
        raise ValueError(
            f"prepare: classes must be at most half as many as the rows for training; got {len(data.classes)} classes "
            f"in {rows} rows of {options.data}. Name another column by --label-column."
        )
    if reader is None:
        reader, splits = kind.fit(data, options)
    else:
        splits = {name: reader.encode(*split) for name, split in data.splits.items()}
    train, test = splits["train"], splits["test"]
    baselines = {"majority": majority_baseline(train, test), **reader.linear(train, test, len(data.classes))}
    fingerprint = data.fingerprint | {reader.name: hashlib.sha256(reader.content.encode()).hexdigest()}
    seen = set(data.splits["train"].inputs)
    repeated = sum(each in seen for each in data.splits["test"].inputs)
    return Corpus(splits, data.classes, data.carved, reader, baselines, fingerprint, repeated)
