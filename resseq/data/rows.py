"""Labelled rows of any kind: which column is which, which rows are for what, which class has which number."""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from resseq.data.sources import Table

# Usual names, in the order in which they are looked for.
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "target", "topic", "intent", "coarse_label")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which labelled rows to learn from."""

    task: Literal["text", "image"] = "text"
    """What is classified: texts or images."""
    data: str = "pystdlib"
    """pystdlib (built in), listops (generated), a CSV, TSV, JSONL, JSON or Parquet file, a folder of them or of
    LABEL/*.txt, or a Hugging Face dataset: its id, or what its save_to_disk left. Images: a Parquet file, a folder of
    them or of LABEL/*.png, or a dataset."""
    label_column: str | None = None
    """The column of the labels; by default a usual name such as label, sentiment or category."""
    validation_fraction: float = 0.1
    """Share of the rows for validation, where the data has no such split."""
    test_fraction: float = 0.1
    """Share of the rows for testing, where the data has no such split."""
    max_train_samples: int | None = None
    """Examples to train on, at most, drawn at random."""
    data_seed: int = 0
    """Seed of the splits that the data lacks, and of the draw."""


@dataclass(frozen=True)
class Picture:
    """An image as it was stored: where it came from, and its bytes, not yet decoded. Of the same bytes, two are one."""

    name: str = field(compare=False)
    content: bytes


class Split(NamedTuple):
    """One split, its classes numbered."""

    inputs: list[Any]
    """Texts (str) or images (Picture)."""
    labels: list[int]
    """Index of each input's class in `Data.classes`."""


class Rows(NamedTuple):
    """Rows with the labels that the source gives them."""

    inputs: list[Any]
    labels: list[str]


@dataclass(frozen=True)
class Data:
    """Labelled texts or images, not yet encoded."""

    splits: dict[str, Split]
    """"train", "validation" and "test"; without carving, those that the source has."""
    classes: list[str]
    carved: tuple[str, ...]
    """The splits that the source lacks, taken from its train split."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """A checksum of each split's inputs and labels: a file that was rewritten has another."""
        return {split: _checksum(rows, self.classes) for split, rows in self.splits.items()}


def _checksum(rows: Split, classes: list[str]) -> str:
    digest = hashlib.sha256()
    for given, label in zip(*rows, strict=True):
        for part in (given.content if isinstance(given, Picture) else given.encode(), classes[label].encode()):
            digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()


def read_rows(
    sources: dict[str, dict[str, Table]], options: DataOptions, take: Callable[[Table, str], list[Any]]
) -> dict[str, Rows]:
    """The labelled rows of each split; a split without a label column, or with none but empty labels, is lacking.

    Args:
        take: a table's inputs, given the table and where it was read.
    """

    def labels_of(table: Table, where: str) -> list[Any]:
        return table[find_column(table, where, "label", options.label_column, LABEL_COLUMNS)]

    def labelled(table: Table, where: str) -> bool:
        try:
            return any(label not in (None, "") for label in labels_of(table, where))
        except ValueError:
            return False

    rows: dict[str, Rows] = {}
    for split, tables in sources.items():
        if split == "train" or any(labelled(table, where) for where, table in tables.items()):
            rows[split] = Rows([], [])
            for where, table in tables.items():
                rows[split].inputs.extend(take(table, where))
                rows[split].labels.extend(_checked_labels(labels_of(table, where), where))
    if not rows:
        raise ValueError(
            f"data: some split must have labels; got none in {', '.join(sources)} of {options.data}. "
            f"Name their column by --label-column."
        )
    return rows


def number_rows(rows: dict[str, Rows], options: DataOptions, classes: list[str] | None, carve: bool) -> Data:
    """Number the classes, and carve the splits that are not there: load_text says how."""
    if "train" not in rows and (carve or classes is None):
        raise ValueError(
            f"data: data must have a train split; got data='{options.data}' with splits={sorted(rows)}. "
            f"Add a file whose name begins with train, or give one file alone: it is then divided."
        )
    # Before carving: else a class whose only row goes to the validation split would be unknown there.
    names = _sorted_names(rows["train"].labels) if classes is None else classes
    number = {name: index for index, name in enumerate(names)}
    for split, (_, labels) in rows.items():
        if unknown := _sorted_names(set(labels) - number.keys()):
            known = "the train split" if classes is None else "the classes"
            raise ValueError(
                f"data: every label must be in {known}; got labels={unknown} in the {split} split of"
                f" {options.data}, classes={names}. Correct these labels, or name another column by --label-column."
            )
    carved = tuple(split for split in ("validation", "test") if carve and split not in rows)
    if carved:
        rows |= _carve(rows["train"], carved, options)
    if carve and options.max_train_samples is not None:
        rows["train"] = _draw(rows["train"], options.max_train_samples, options.data_seed)
    splits = {split: Split(inputs, [number[label] for label in labels]) for split, (inputs, labels) in rows.items()}
    return Data(splits, names, carved)


def find_column(table: Table, where: str, kind: str, wanted: str | None, usual: tuple[str, ...]) -> str:
    """The column that is asked for, or else the first of the usual names. Raises: ValueError where there is none."""
    if wanted is not None:
        if wanted in table:
            return wanted
        raise ValueError(
            f"data: --{kind}-column must be a column of {where}; got {kind}_column='{wanted}',"
            f" columns={list(table)}. Choose one of these."
        )
    lower = {name.lower(): name for name in table} | {name: name for name in table}  # as it is written goes first
    for name in usual:
        if name in lower:
            return lower[name]
    raise ValueError(
        f"data: the {kind} column of {where} must have a usual name, such as {usual[0]}, or be named;"
        f" got columns={list(table)}. Name it by --{kind}-column."
    )


def _checked_labels(labels: list[Any], where: str) -> list[str]:
    if missing := [row for row, label in enumerate(labels, 1) if label is None or label == ""]:
        raise ValueError(
            f"data: every row must have a label; got none in {name_rows(missing)} of {where}. Fill or delete the row."
        )
    if bad := [row for row, label in enumerate(labels, 1) if not isinstance(label, str | int)]:
        raise ValueError(
            f"data: a label must be text, a whole number or true/false; got label={labels[bad[0] - 1]!r} in"
            f" {name_rows(bad)} of {where}. Correct it, or name another column by --label-column."
        )
    if mixed := [row for row, label in enumerate(labels, 1) if type(label) is not type(labels[0])]:
        raise ValueError(
            f"data: all labels must be of one type; got label={labels[0]!r} in row 1 and"
            f" label={labels[mixed[0] - 1]!r} in {name_rows(mixed)} of {where}. Write all in the same way."
        )
    return [str(label).encode(errors="backslashreplace").decode() for label in labels]


def name_rows(numbers: list[int]) -> str:
    """Name the first five rows and count the others."""
    shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    return f"row{'s' if len(numbers) > 1 else ''} {shown}"


def _sorted_names(labels: Iterable[str]) -> list[str]:
    names = sorted(set(labels))
    try:
        return sorted(names, key=int)
    except ValueError:
        return names


def _draw(rows: Rows, count: int, seed: int) -> Rows:
    chosen = random.Random(seed).sample(range(len(rows.inputs)), min(count, len(rows.inputs)))
    return Rows([rows.inputs[i] for i in chosen], [rows.labels[i] for i in chosen])


def _carve(train: Rows, carved: tuple[str, ...], options: DataOptions) -> dict[str, Rows]:
    count = len(train.inputs)
    order = list(range(count))
    random.Random(options.data_seed).shuffle(order)
    fractions = {"test": options.test_fraction, "validation": options.validation_fraction}
    sizes = {split: round(count * fraction) for split, fraction in fractions.items() if split in carved}
    sizes["train"] = count - sum(sizes.values())
    if min(sizes.values()) < 1:
        raise ValueError(
            f"data: carving must leave a row in each split; got rows={count},"
            f" validation_fraction={options.validation_fraction}, test_fraction={options.test_fraction}."
            " Give more rows or other fractions."
        )
    rows = {}
    for split, size in sizes.items():
        chosen, order = order[:size], order[size:]
        rows[split] = Rows([train.inputs[i] for i in chosen], [train.labels[i] for i in chosen])
    return rows
