"""From texts or images to batches: one flat tensor, batches of like length, an order that can be resumed."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNK = 1000  # texts encoded at a time: what the tokenizer returns is far larger than the ids
POOL = 50  # batches sorted by length together: enough for little padding, few enough to keep the order random

Item = tuple[Tensor, int | None]


class Tokens(Dataset[Item]):
    """Encoded texts: one flat tensor of ids, cut by offsets. An item is (ids, label), or (ids, None) without labels.

    Args:
        ids: the ids of all texts, one after the other, (N,).
        lengths: tokens of each text, (texts,).
        labels: class of each text, or None.
        truncated: share of the texts that were cut.
    """

    def __init__(self, ids: Tensor, lengths: Tensor, labels: Sequence[int] | None, truncated: float):
        self.ids = ids
        self.lengths = lengths
        self.offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        self.truncated = truncated

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Item:
        label = None if self.labels is None else int(self.labels[index])
        start = int(self.offsets[index])
        return self.ids[start : start + int(self.lengths[index])], label

    @staticmethod
    def collate(items: Sequence[Item]) -> dict[str, Tensor]:
        return collate(items)


def encode(
    tokenizer: "Tokenizer", texts: Sequence[str], labels: Sequence[int] | None, max_length: int, pairs: bool = False
) -> Tokens:
    """Encode texts, each cut to `max_length` tokens; the tokenizer's last special token stays.

    Args:
        pairs: each text is two, with a tab between; the longer one is cut first.
    Raises: ValueError if max_length has no room for the tokenizer's special tokens, and for a text without a tab among
        pairs.
    """
    least = max(1, tokenizer.num_special_tokens_to_add(pairs))  # with less, the tokenizer cuts nothing
    if max_length < least:
        raise ValueError(
            f"encode: max_length must be at least {least}; got max_length={max_length}. The default is 256."
        )
    chunks, lengths, full = [torch.zeros(0, dtype=torch.int32)], [], []
    for start in range(0, len(texts), CHUNK):
        chunk: list[Any] = [_pair(text) if pairs else text for text in texts[start : start + CHUNK]]
        encodings = tokenizer.encode_batch_fast(chunk)
        full.extend(len(encoding.ids) for encoding in encodings)
        if max(full[start:]) > max_length:
            tokenizer.enable_truncation(max_length)  # longest first
            encodings = tokenizer.encode_batch_fast(chunk)
            tokenizer.no_truncation()
        rows = [encoding.ids for encoding in encodings]
        chunks.append(torch.tensor([token for row in rows for token in row], dtype=torch.int32))
        lengths.extend(len(row) for row in rows)
    truncated = sum(length > max_length for length in full) / len(full) if full else 0.0
    return Tokens(torch.cat(chunks), torch.tensor(lengths, dtype=torch.int64), labels, truncated)


def _pair(text: str) -> tuple[str, str]:
    first, tab, second = text.partition("\t")
    if not tab:
        raise ValueError(f"encode: a pair is two texts with a tab between; got text={text[:40]!r}. Write one.")
    return first, second


class Images(Dataset[Item]):
    """Decoded images: one tensor of bytes (N, 3, H, W). An item is (pixels, label), or (pixels, None) without labels.

    To LengthBatches they are of one length, each: all batches are alike, and their order is random.
    """

    truncated = 0.0

    def __init__(self, pixels: Tensor, labels: Sequence[int] | None):
        self.pixels = pixels
        self.lengths = torch.ones(len(pixels), dtype=torch.int64)
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Item:
        return self.pixels[index], None if self.labels is None else int(self.labels[index])

    @staticmethod
    def collate(items: Sequence[Item]) -> dict[str, Tensor]:
        return stack(items)


class LengthBatches(Sampler[list[int]]):
    """Batches of texts of like length, each text once an epoch; the order follows from (seed, epoch) alone.

    A permutation is cut into pools of 50 batches, each pool is sorted by length and cut into batches, and all batches
    are shuffled. Without shuffling everything is sorted by length: least padding, for evaluation.

    Args:
        lengths: tokens of each text, (texts,).

    Raises: ValueError if batch_size is less than 1.

    >>> list(LengthBatches(torch.tensor([5, 1, 4, 2]), batch_size=2, seed=0, shuffle=False))
    [[1, 3], [2, 0]]
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int, shuffle: bool = True):
        if batch_size < 1:
            raise ValueError(f"LengthBatches: batch_size must be at least 1; got batch_size={batch_size}. Use 32.")
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def start_at(self, batches_consumed: int) -> None:
        """Leave out the batches that an interrupted epoch has consumed, in the next iteration only."""
        self.start = batches_consumed

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: a loader with workers makes two iterators and draws from the second alone.
        start, self.start = self.start, 0
        for batch in self._batches()[start:]:
            yield batch.tolist()

    def padding(self) -> float:
        """Share of this epoch's places that are padding, a fraction."""
        places = sum(len(batch) * int(self.lengths[batch].max()) for batch in self._batches())
        return 1 - int(self.lengths.sum()) / places

    def _batches(self) -> list[Tensor]:
        if not self.shuffle:
            return list(self.lengths.argsort(stable=True).split(self.batch_size))
        # SeedSequence mixes the two: seed + epoch would repeat the orders of one seed in another.
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(mixed))
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[Tensor] = []
        for pool in _split(order, POOL * self.batch_size):
            batches.extend(_split(pool[self.lengths[pool].argsort(stable=True)], self.batch_size))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _split(rows: Tensor, size: int) -> list[Tensor]:
    """Batches of this size and a smaller last one; but none of one row beside others: batch norms fail on it."""
    batches = list(rows.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1 < size:
        batches[-2:] = torch.cat(batches[-2:]).tensor_split(2)
    return batches


def collate(items: Sequence[Item]) -> dict[str, Tensor]:
    """Pad items to one batch: ids (B, L) padded with 0, mask (B, L) True = real token, labels (B,) if there are any.

    >>> collate([(torch.tensor([2, 7]), 1), (torch.tensor([2]), 0)])["ids"].tolist()
    [[2, 7], [2, 0]]
    """
    ids = pad_sequence([ids.long() for ids, _ in items], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _ in items])
    batch = {"ids": ids, "mask": torch.arange(ids.shape[1]) < lengths[:, None]}
    return batch | _labels(items)


def stack(items: Sequence[Item]) -> dict[str, Tensor]:
    """Images to one batch: images (B, 3, H, W) of bytes, labels (B,) if there are any."""
    return {"images": torch.stack([pixels for pixels, _ in items])} | _labels(items)


def _labels(items: Sequence[Item]) -> dict[str, Tensor]:
    labels = [label for _, label in items if label is not None]
    return {"labels": torch.tensor(labels)} if labels else {}
