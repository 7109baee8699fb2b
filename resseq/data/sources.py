"""Files, folders and Hugging Face datasets, read into plain columns.

CSV, JSON and text files are read by Python itself: each value comes as it was written (`NA`, `007` and the empty text
stay text), an error knows its line, and there is no cache that could serve a rewritten file's old rows. `datasets`
reads the hub, and the class names in Parquet.
"""

import csv
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from resseq.pretrained import quiet_hub

if TYPE_CHECKING:
    import datasets
    import pyarrow

T = TypeVar("T")
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` of datasets leaves
UNLABELLED = "unsup"  # the folder that the IMDb archive has beside those of its classes
Table = dict[str, list[Any]]
"""Column name -> values, one a row."""


def read_source(data: str) -> dict[str, dict[str, Table]]:
    """Read a file, folder or hub dataset: split -> where it was read (a path, or a split of the hub) -> table.

    One file, or a source of one part, has no split: it is all "train".

    Raises: ValueError if there is no such source, if it holds nothing, or if a file cannot be read.
    """
    path = Path(data)
    if path.is_file():
        return {"train": {data: _read_file(path)}}
    if path.is_dir():
        return _read_folder(path)
    # What has a data file's ending, or is no "name" or "owner/name", can only be a path: do not ask the hub for it.
    if path.suffix.lower() in PARSERS or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", data):
        raise NoSuchData(data, "a Hugging Face dataset id")
    return _read_hub(data)


class NoSuchData(ValueError):
    """No file, folder or data set has this name. Arguments: the name, and what else it is not."""

    def __str__(self) -> str:
        data, last = self.args
        return f"data: data='{data}' is neither pystdlib, nor a file or folder here, nor {last}. Check the spelling."


def _split_of(name: str) -> str | None:
    prefixes = {"train": "train", "val": "validation", "dev": "validation", "test": "test"}
    return next((split for prefix, split in prefixes.items() if name.lower().startswith(prefix)), None)


def _read_folder(folder: Path) -> dict[str, dict[str, Table]]:
    if any((folder / name).exists() for name in SAVED):
        return _read_saved(folder)
    files = _visible(folder, "*", tuple(PARSERS))
    if not files:
        if splits := read_class_folder(folder, "text", (".txt",), _read_text):
            return splits
        raise ValueError(
            f"data: a data folder must hold {_ENDINGS} files, or a folder of .txt files (with --task image, of images)"
            f" for each label; got data='{folder}'. Name another."
        )
    if len(files) == 1:
        return {"train": {str(files[0]): _read_file(files[0])}}
    splits = {}
    for path in files:
        split = _split_of(path.stem)
        if split is None:
            raise ValueError(
                "data: of several files in a data folder, each name must start with train, validation or test;"
                f" got {path}. Rename it, or move it away."
            )
        splits.setdefault(split, {})[str(path)] = _read_file(path)
    return splits


def read_class_folder(
    folder: Path, column: str, endings: tuple[str, ...], read: Callable[[Path], Any]
) -> dict[str, dict[str, Table]]:
    """An example in each file, in a folder named by its label: SPLIT/LABEL/*.txt, or LABEL/*.txt; {} without any.

    Raises: ValueError for an example that is in none of these, which nobody would miss.
    """
    files = [(_split_of(path.parts[-3]), path) for path in _visible(folder, "*/*/*", endings)]
    if any(split for split, _ in files):  # then what lies beside the labels, in SPLIT/*.txt, is no example
        astray = [path for split, path in files if split is None] + _visible(folder, "*/*/*/**/*", endings)
    else:
        astray = _visible(folder, "*/*/**/*", endings)
        files = [("train", path) for path in _visible(folder, "*/*", endings)]
    if files and astray:
        raise ValueError(
            f"data: an example stands in LABEL, or in SPLIT/LABEL with a SPLIT that starts with train, validation or "
            f"test; got {len(astray)} elsewhere in '{folder}', such as {astray[0]}. Move them."
        )
    splits: dict[str, dict[str, Table]] = {}
    for split, path in files:
        if split and not (column == "text" and path.parent.name == UNLABELLED):
            table = splits.setdefault(split, {}).setdefault(str(path.parent.parent), {column: [], "label": []})
            table[column].append(read(path))
            table["label"].append(path.parent.name)
    return splits


def _visible(folder: Path, pattern: str, endings: tuple[str, ...]) -> list[Path]:
    """The files with these endings, sorted; what a system or an editor put there has a name with a dot in front."""
    files = (path for path in folder.glob(pattern) if path.suffix.lower() in endings)
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _read_hub(name: str) -> dict[str, dict[str, Table]]:
    import datasets

    try:
        with quiet_hub():
            parts = datasets.load_dataset(name)
    except Exception as error:  # offline, unknown, gated, …: each raises its own type, and all need one line
        reason = f"a Hugging Face dataset that can be loaded ({_one_line(error)})"
        raise NoSuchData(name, reason) from error
    assert isinstance(parts, datasets.DatasetDict)
    return _splits_of(parts, name)


def _read_saved(folder: Path) -> dict[str, dict[str, Table]]:
    import datasets

    saved = _readable(datasets.load_from_disk, folder)
    parts = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict({"train": saved})
    return _splits_of(parts, str(folder))


def _splits_of(parts: "datasets.DatasetDict", name: str) -> dict[str, dict[str, Table]]:
    """The parts of a Hugging Face dataset as splits; one alone is all "train"."""
    if len(parts) == 1:
        return {"train": {f"{name} {part}": _hub_table(dataset) for part, dataset in parts.items()}}
    splits: dict[str, dict[str, Table]] = {}
    for part, dataset in parts.items():
        split = _split_of(str(part))
        if split:  # others, such as "unsupervised", are left alone: nobody can rename the parts of a hub dataset
            splits.setdefault(split, {})[f"{name} {part}"] = _hub_table(dataset)
    return splits


def _hub_table(dataset: "datasets.Dataset") -> Table:
    return _with_class_names(dataset.with_format("arrow")[:], dataset.features)


def _read_file(path: Path) -> Table:
    read = PARSERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"data: a data file must end in {_ENDINGS}; got data='{path}'. Convert it.")
    table = _readable(read, path)
    if not any(table.values()):
        raise ValueError(f"data: a data file must hold rows; got {path} with none. Fill it, or remove it.")
    return table


def _read_text(path: Path) -> str:
    return _readable(lambda path: path.read_text(encoding="utf-8-sig"), path)


def _readable(read: Callable[[Path], T], path: Path) -> T:
    fix = "Mend it, or export it anew"
    try:
        return read(path)
    except UnicodeDecodeError:
        reason = f"line {_first_bad_line(path)} is not in UTF-8"
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        reason = _one_line(error)
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and _is_jsonl(path):
            reason, fix = "it is JSON Lines", "Rename it to .jsonl"
    raise ValueError(f"data: a data file must be readable; got {path}: {reason}. {fix}.")


def _first_bad_line(path: Path) -> int:
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):  # noqa: B007
            if line.decode(errors="ignore").encode() != line:
                break
    return number


def _read_csv(path: Path, delimiter: str = ",") -> Table:
    csv.field_size_limit(2**31 - 1)  # a text may be a whole book; Python stops at 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        rows: list[list[str]] = []
        begun = 1
        try:
            header = next(reader, [])
            begun = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):  # an empty line is no row
                    hint = _other_delimiter(header, delimiter)
                    raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header {len(header)}{hint}")
                rows.extend([row] if row else [])
                begun = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"the row that begins in line {begun}: {error}") from error
    if hint := _other_delimiter(header, delimiter):
        raise ValueError(f"the header has one column{hint}")
    for name in filter(None, header):  # columns without a name, as spreadsheets leave at the end, are nobody's
        if header.count(name) > 1:
            raise ValueError(f"the header has the column {name!r} {header.count(name)} times")
    return {name: [row[column] for row in rows] for column, name in enumerate(header)}


def _other_delimiter(header: list[str], delimiter: str) -> str:
    """What a header of one column may have been meant to be cut by."""
    for sign, name in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
        if len(header) == 1 and sign in header[0] and sign != delimiter:
            wanted = {",": "commas", "\t": "tabs"}[delimiter]
            return f": it seems to be cut by {name}, where this kind of file has {wanted}"
    return ""


def _read_jsonl(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"line {number} is no JSON object") from error
    return _columns(rows)


def _is_jsonl(path: Path) -> bool:
    try:
        return bool(_read_jsonl(path))
    except ValueError:
        return False


def _read_json(path: Path) -> Table:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("it is no list of objects")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"item {number} of the list is no object")
    return _columns(rows)


def _columns(rows: list[dict[str, Any]]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Table:
    import datasets
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return _with_class_names(table, datasets.Features.from_arrow_schema(table.schema))


def _with_class_names(table: "pyarrow.Table", features: "datasets.Features") -> Table:
    """The columns as lists; class numbers become names, and -1, the hub's "no label", None."""
    columns = table.to_pydict()
    for name, feature in features.items():
        names = getattr(feature, "names", None)
        if names is not None:
            columns[name] = [None if number is None or number < 0 else names[number] for number in columns[name]]
    return columns


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


PARSERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
_ENDINGS = ".csv, .tsv, .jsonl, .json or .parquet"
