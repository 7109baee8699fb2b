"""Labelled texts from anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from resseq.data.listops import read_listops
from resseq.data.pystdlib import read_pystdlib
from resseq.data.rows import Data, DataOptions, Rows, find_column, name_rows, number_rows, read_rows
from resseq.data.sources import Table, read_source

# Usual names, in the order in which they are looked for.
TEXT_COLUMNS = ("text", "sentence", "review", "content", "question", "document", "comment", "body", "tweet", "title")
SEPARATOR = " | "  # between the texts of several columns


@dataclass(frozen=True, kw_only=True)
class TextOptions(DataOptions):
    """Which texts to learn from, and how to cut them into tokens."""

    text_column: str | tuple[str, ...] | None = None
    """The column of the texts; by default a usual name such as text or review. Several are joined by " | "; for a
    checkpoint two are a pair, the longer of which is cut first."""
    tokenizer: Literal["bpe", "wordpiece", "byte", "character"] = "bpe"
    """How texts become tokens: learnt pieces of words (bpe, wordpiece), bytes, or characters. A checkpoint has its own
    tokenizer: then this, vocab_size and lowercase stay as they are."""
    vocab_size: int = 4000
    """Tokens that bpe, wordpiece and character may have (the first two have every character seen, even beyond it)."""
    max_length: int = 256
    """Tokens a text may have; a longer one is cut. A checkpoint that knows fewer places has its own limit."""
    lowercase: bool = True
    """Read capital letters as small ones."""


def load_text(options: TextOptions, classes: list[str] | None = None, carve: bool = True, pairs: bool = False) -> Data:
    """Load labelled texts and number their classes.

    A validation or test split that the source lacks is carved from its train split, by a permutation that follows from
    `options.data_seed`; validation never stands in for test. Such a split without a label column, or in which every
    label is empty or null (on the hub: -1), counts as lacking.

    Args:
        classes: class names of an earlier run, in its order; by default those of the train split, sorted (integers by
            value).
        carve: False gives just the splits that the source has; a source without splits is all "train".
        pairs: the texts of two columns stay two, with a tab between.

    Raises: ValueError if the data cannot be read, a column cannot be told, pairs have another number of columns, a text
        or label is missing, a label is of no class, or there are too few rows to carve.

    >>> data = load_text(TextOptions(data="pystdlib"))
    >>> len(data.classes), data.carved
    (6, ())
    """
    columns = options.text_column
    if pairs and (isinstance(columns, str) or len(columns or ()) != 2):
        raise ValueError(f"data: a run on pairs of texts reads two columns; got --text-column {columns}. Name two.")
    return number_rows(_read_rows(options, "\t" if pairs else SEPARATOR), options, classes, carve)


def _read_rows(options: TextOptions, separator: str) -> dict[str, Rows]:
    if options.data == "pystdlib":
        return {split: Rows(*rows) for split, rows in read_pystdlib().items()}
    if options.data.partition(":")[0] == "listops":
        return {split: Rows(*rows) for split, rows in read_listops(options.data, options.data_seed).items()}

    def take(table: Table, where: str) -> list[str]:
        return as_texts(_texts(table, where, options.text_column, separator), where)

    return read_rows(read_source(options.data), options, take)


def _texts(table: Table, where: str, wanted: str | tuple[str, ...] | None, separator: str) -> list[Any]:
    names = wanted if isinstance(wanted, tuple | list) else [wanted]
    columns = [table[find_column(table, where, "text", name, TEXT_COLUMNS)] for name in names]
    return columns[0] if len(columns) == 1 else [join(parts, separator) for parts in zip(*columns, strict=True)]


def join(parts: Sequence[Any], separator: str) -> str | None:
    """The texts of several columns as one; None where one of them is missing."""
    if any(map(_is_missing, parts)):
        return None
    # a tab inside a text is not the one between two
    return separator.join(str(part).replace("\t", " ") if separator == "\t" else str(part) for part in parts)


def as_texts(values: Sequence[Any], where: str, first: int = 1) -> list[str]:
    """Texts, numbers and dates as texts. Raises: ValueError that names the others' rows, counted from `first`."""
    if missing := [row for row, value in enumerate(values, first) if _is_missing(value)]:
        raise ValueError(
            f"data: every row must have a text; got none in {name_rows(missing)} of {where}. Fill or delete the row."
        )
    if nested := [row for row, value in enumerate(values, first) if isinstance(value, list | dict | bytes)]:
        raise ValueError(
            f"data: a text must be one value; got a {type(values[nested[0] - first]).__name__} in {name_rows(nested)} "
            f"of {where}. Make it a text, or name another column by --text-column."
        )
    # a lone half of a pair, which JSON can hold, is no character
    return [str(value).encode(errors="replace").decode() for value in values]


def _is_missing(value: Any) -> bool:
    """None, and what pandas has for it: its own NA and NaT, or a number that is none."""
    return not isinstance(value, str) and str(value) in ("None", "nan", "<NA>", "NaT")
