import csv
import email.message
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resseq.data.batching import LengthBatches, collate, encode
from resseq.data.corpus import prepare
from resseq.data.text import TextOptions, load_text
from resseq.data.tokenizer import load_tokenizer, train_tokenizer

ROWS = [("good film", "pos"), ("bad film", "neg")]
KINDS = ["bpe", "wordpiece", "byte", "character"]


def write(path: Path, rows=ROWS, columns=("text", "label")) -> Path:
    """Write rows in the form that the path's ending names."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps([dict(zip(columns, row, strict=True)) for row in rows]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows]).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return path


def numbered(count: int, prefix: str = "row") -> list[tuple[str, str]]:
    return [(f"{prefix} {i}", "ab"[i % 2]) for i in range(count)]


def load(path: Path | str, **options):
    return load_text(TextOptions(data=str(path), **options))


def load_as_is(path: Path | str, classes: list[str] | None = None, **options):
    return load_text(TextOptions(data=str(path), **options), classes=classes, carve=False)


def load_labels(path: Path) -> tuple[list[str], list[int]]:
    data = load_as_is(path)
    return data.classes, data.splits["train"].labels


# Files and folders


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet", "CSV"])
def test_one_file_of_each_kind(tmp_path, ending):
    data = load_as_is(write(tmp_path / f"film.{ending}"))
    assert data.classes == ["neg", "pos"]
    assert data.splits == {"train": (["good film", "bad film"], [1, 0])}
    assert data.carved == ()


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rewritten_file_is_read_anew(tmp_path, ending):
    path = write(tmp_path / f"film.{ending}")
    before = path.stat()
    assert load_as_is(path).splits["train"].inputs == ["good film", "bad film"]
    write(path, [("fine film", "pos"), ("dud film", "neg")])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert load_as_is(path).splits["train"].inputs == ["fine film", "dud film"]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "Validation-0001"])
def test_folder_is_split_by_file_name(tmp_path, name):
    write(tmp_path / "train-0.csv", [("a", "x")])
    write(tmp_path / "train-1.jsonl", [("b", "y")])
    write(tmp_path / f"{name}.csv", [("c", "x")])
    write(tmp_path / "test.csv", [("d", "y")])
    (tmp_path / "README.md").write_text("not data")
    data = load(tmp_path)
    assert data.splits == {"train": (["a", "b"], [0, 1]), "validation": (["c"], [0]), "test": (["d"], [1])}
    assert data.carved == ()


def test_folder_with_one_file_has_no_split(tmp_path):
    write(tmp_path / "test.csv")
    assert list(load_as_is(tmp_path).splits) == ["train"]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text,label\nNA,x\nnull,x\nNone,x\n"",x\n007,x\n', ["NA", "null", "None", "", "007"]),
        ('\ufefftext,label\n\n"two\nlines, ""quoted""",x\n\n', ['two\nlines, "quoted"']),
        (f"text,label\n{'long ' * 50_000},x\n", ["long " * 50_000]),
    ],
)
def test_csv_texts_come_as_written(tmp_path, content, texts):
    path = tmp_path / "film.csv"
    path.write_text(content, encoding="utf-8")
    assert load_as_is(path).splits["train"].inputs == texts


def test_jsonl_numbers_become_texts(tmp_path):
    assert load_as_is(write(tmp_path / "n.jsonl", [(3, "x"), (2.5, "x")])).splits["train"].inputs == ["3", "2.5"]


# Columns and labels


@pytest.mark.parametrize("columns", [("Review", "SENTIMENT"), ("question", "label"), ("title", "Class")])
def test_usual_columns_are_found(tmp_path, columns):
    assert load_as_is(write(tmp_path / "film.csv", columns=columns)).splits["train"].inputs == ["good film", "bad film"]


def test_first_usual_column_wins_and_options_win_over_it(tmp_path):
    path = write(tmp_path / "film.csv", [("T", "C", "x", "y")], columns=("title", "content", "target", "label"))
    data = load_as_is(path)
    assert (data.splits["train"].inputs, data.classes) == (["C"], ["y"])
    data = load_as_is(path, text_column="title", label_column="target")
    assert (data.splits["train"].inputs, data.classes) == (["T"], ["x"])


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"], [2, 1, 0]),
        ([10, 9, -1], ["-1", "9", "10"], [2, 1, 0]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        (["b", "a", "10"], ["10", "a", "b"], [2, 1, 0]),
    ],
)
def test_classes_are_sorted(tmp_path, labels, classes, numbers):
    assert load_labels(write(tmp_path / "l.jsonl", [("t", label) for label in labels])) == (classes, numbers)


def class_labels(numbers: list[int], names: list[str]):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": [f"t{n}" for n in numbers], "label": numbers}, features=features)


def test_class_names_in_parquet(tmp_path):
    class_labels([0, 1, 0], ["pos", "neg"]).to_parquet(str(tmp_path / "film.parquet"))
    assert load_labels(tmp_path / "film.parquet") == (["neg", "pos"], [1, 0, 1])


def test_given_classes_keep_their_order_and_need_no_train_split(tmp_path):
    write(tmp_path / "test.csv")
    write(tmp_path / "validation.csv", ROWS[:1])
    data = load_as_is(tmp_path, classes=["pos", "other", "neg"])
    assert data.classes == ["pos", "other", "neg"]
    assert {split: rows.labels for split, rows in data.splits.items()} == {"test": [0, 2], "validation": [0]}


# Carving


def test_unsplit_source_is_carved(tmp_path):
    path = write(tmp_path / "film.csv", numbered(50))
    data = load(path, test_fraction=0.2)
    assert data.carved == ("validation", "test")
    assert {split: len(rows.inputs) for split, rows in data.splits.items()} == {
        "train": 35,
        "validation": 5,
        "test": 10,
    }
    pairs = [(t, data.classes[n]) for rows in data.splits.values() for t, n in zip(*rows, strict=True)]
    assert sorted(pairs) == sorted(numbered(50))
    assert load(path, test_fraction=0.2) == data
    assert load(path, test_fraction=0.2, data_seed=1).splits["test"] != data.splits["test"]
    # Test is taken first: another validation_fraction must not move rows between it and training.
    assert load(path, test_fraction=0.2, validation_fraction=0.4).splits["test"] == data.splits["test"]


@pytest.mark.parametrize(("given", "carved"), [("validation", "test"), ("test", "validation")])
def test_missing_split_is_carved_from_train(tmp_path, given, carved):
    write(tmp_path / "train.csv", numbered(20, "train"))
    write(tmp_path / f"{given}.csv", numbered(4, given))
    data = load(tmp_path)
    assert data.carved == (carved,)
    assert data.splits[given].inputs == [f"{given} {i}" for i in range(4)]
    assert sorted(data.splits["train"].inputs + data.splits[carved].inputs) == sorted(f"train {i}" for i in range(20))
    assert len(data.splits[carved].inputs) == 2


def test_class_with_one_row_is_known_wherever_it_is_carved_to(tmp_path):
    path = write(tmp_path / "film.csv", [(f"t{i}", f"class {i}") for i in range(10)])
    assert len(load(path).classes) == 10


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds one data set, given as part -> rows."""
    import datasets

    def put(**parts):
        monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(parts))

    return put


def test_hub_parts_and_class_names(hub):
    part = class_labels([1, 0], ["a", "b"])
    hub(train=part, validation=part, test=part, unsupervised=class_labels([-1, -1], ["a", "b"]))
    data = load("owner/name")
    assert (list(data.splits), data.carved) == (["train", "validation", "test"], ())
    assert (data.classes, data.splits["test"]) == (["a", "b"], (["t1", "t0"], [1, 0]))


def test_hub_test_part_without_labels_counts_as_lacking(hub):
    part = class_labels([0, 1] * 5, ["a", "b"])
    hub(train=part, validation=part, test=class_labels([-1] * 4, ["a", "b"]))
    data = load("name")
    assert data.carved == ("test",)
    assert (len(data.splits["train"].inputs), len(data.splits["test"].inputs)) == (9, 1)


@pytest.mark.parametrize("content", ["id,text\n1,a\n", "text,label\na,\nb,\n"])
def test_a_test_file_without_labels_counts_as_lacking(tmp_path, content):
    write(tmp_path / "train.csv", numbered(20))
    put(tmp_path / "test.csv", content)
    data = load(tmp_path)
    assert data.carved == ("validation", "test")
    assert {split: len(rows.inputs) for split, rows in data.splits.items()} == {"test": 2, "validation": 2, "train": 16}
    put(tmp_path / "test-more.csv", "text,label\nc,b\n")  # a test split with some labels needs all
    assert f"{tmp_path / 'test.csv'}" in refused(load, tmp_path)
    (tmp_path / "test-more.csv").unlink()
    put(tmp_path / "train.csv", content)
    assert f"{tmp_path / 'train.csv'}" in refused(load, tmp_path)
    (tmp_path / "train.csv").rename(tmp_path / "validation.csv")
    assert refused(load_as_is, tmp_path, classes=["a", "b"]) == (
        f"data: some split must have labels; got none in test, validation of {tmp_path}."
        " Name their column by --label-column."
    )


@pytest.mark.parametrize("part", ["train", "full"])
def test_hub_with_one_part_is_carved(hub, part):
    hub(**{part: class_labels([0, 1] * 5, ["a", "b"])})
    assert load("name").carved == ("validation", "test")


def test_what_datasets_saved_is_read(tmp_path):
    import datasets

    part = class_labels([1, 0, 1], ["a", "b"])
    datasets.DatasetDict({"train": part, "test": part.select([2])}).save_to_disk(tmp_path / "splits")
    assert load_as_is(tmp_path / "splits").splits == {"train": (["t1", "t0", "t1"], [1, 0, 1]), "test": (["t1"], [1])}
    part.save_to_disk(tmp_path / "whole")
    assert load_as_is(tmp_path / "whole").splits == {"train": (["t1", "t0", "t1"], [1, 0, 1])}
    (tmp_path / "whole" / "data-00000-of-00001.arrow").unlink()
    assert f"got {tmp_path / 'whole'}: " in refused(load_as_is, tmp_path / "whole")


def test_hub_respects_selected_rows(hub):
    hub(train=class_labels([0, 1, 0, 1], ["a", "b"]).select([3, 0]))
    assert load_as_is("name").splits["train"].inputs == ["t1", "t0"]


# What is refused


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("data", ["missing.csv", "./nowhere", "a/b/c", "missing.parquet", "~/x"])
def test_missing_path_is_refused_without_asking_the_hub(monkeypatch, data):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail("asked the hub"))
    assert refused(load, data) == (
        f"data: data='{data}' is neither pystdlib, nor a file or folder here, nor a Hugging Face dataset id."
        " Check the spelling."
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore"), "Couldn't reach 'owner/name' on the Hub"),
        (RuntimeError("Dataset scripts are no longer supported."), "Dataset scripts are no longer supported"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_hub_failure_is_one_line(monkeypatch, error, reason):
    import datasets

    notices = []
    client = logging.getLogger("huggingface_hub.a_part_of_it")
    monkeypatch.setattr(client, "handle", notices.append)

    def fail(name):
        client.warning("Retrying in 1s [Retry 1/5].")
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert refused(load, "owner/name") == (
        "data: data='owner/name' is neither pystdlib, nor a file or folder here, nor a Hugging Face dataset that"
        f" can be loaded ({reason}). Check the spelling."
    )
    assert not notices
    client.warning("Somebody else's.")
    assert len(notices) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            b"x",
            "a data file must end in .csv, .tsv, .jsonl, .json or .parquet; got data='{path}'. Convert it.",
        ),
        ("a.csv", b"", "a data file must hold rows; got {path} with none."),
        ("a.csv", b"text,label\n", "a data file must hold rows; got {path} with none."),
        ("a.jsonl", b"\n", "a data file must hold rows; got {path} with none."),
        (
            "a.csv",
            b"text,label\na,x\n\nb\n",
            "a data file must be readable; got {path}: line 4 has 1 fields, the header 2.",
        ),
        (
            "a.csv",
            b"text,label\na,b,x\n",
            "a data file must be readable; got {path}: line 2 has 3 fields, the header 2.",
        ),
        (
            "a.csv",
            b'text,label\n"a,x\n',
            "a data file must be readable; got {path}: the row that begins in line 2: unexpected end of data.",
        ),
        ("a.csv", b"text,label\n\xe9,x\n", "a data file must be readable; got {path}: line 2 is not in UTF-8."),
        ("a.jsonl", b'{"text": "a"}\n{"te', "a data file must be readable; got {path}: line 2 is no JSON object."),
        ("a.jsonl", b"7\n", "a data file must be readable; got {path}: line 1 is no JSON object."),
        ("a.parquet", b"garbage!", "a data file must be readable; got {path}: "),
        (
            "a.csv",
            b"words,label\na,x\n",
            "the text column of {path} must have a usual name, such as text, or be named; got"
            " columns=['words', 'label']. Name it by --text-column.",
        ),
        (
            "a.csv",
            b"text,kind\na,x\n",
            "the label column of {path} must have a usual name, such as label, or be named; got"
            " columns=['text', 'kind']. Name it by --label-column.",
        ),
        (
            "a.csv",
            b"text,label\na,x\nb,\n",
            "every row must have a label; got none in row 2 of {path}. Fill or delete the row.",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "label": null}\n',
            "every row must have a label; got none in row 1 of {path}. Fill or delete the row.",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1}\n{"text": {"en": "a"}, "label": 1}\n{"text": ["a"], "label": 1}\n',
            "a text must be one value; got a dict in rows 2, 3 of {path}. Make it a text, or name another column by",
        ),
        ("a.jsonl", b'{"label": 1}\n{"text": "a"}\n', "every row must have a text; got none in row 1 of {path}."),
        (
            "a.jsonl",
            b'{"text": "a", "label": 0.5}\n',
            "a label must be text, a whole number or true/false; got label=0.5 in row 1 of {path}. Correct it, or name"
            " another column by --label-column.",
        ),
    ],
)
def test_bad_file_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert refused(load_as_is, path).startswith("data: " + message.format(path=path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "a"}', "it is no list of objects"),
        (b'[{"text": "a", "label": 1}, 7]', "item 2 of the list is no object"),
        (b'[{"text": "a"', "Expecting"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b"[]", "must hold rows"),
    ],
)
def test_bad_json_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    message = refused(load_as_is, path)
    assert str(path) in message
    assert reason in message


def test_json_lines_under_another_name_are_recognised(tmp_path):
    path = write(tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert refused(load_as_is, path) == (
        f"data: a data file must be readable; got {path}: it is JSON Lines. Rename it to .jsonl."
    )
    for content in ('{"text": "a"}\n7\n', '[{"text": "a"}] {"text": "b"}'):
        path.write_text(content)
        assert refused(load_as_is, path).endswith(". Mend it, or export it anew.")


def test_a_class_for_each_row_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", [(f"text {i}", f"{i}", "ab"[i % 2]) for i in range(299)], ("text", "id", "label"))
    options = TextOptions(data=str(path), label_column="id", vocab_size=50)
    assert refused(prepare, options) == (
        "prepare: classes must be at most half as many as the rows for training; got 299 classes in 239 rows of "
        f"{path}. Name another column by --label-column."
    )
    assert len(prepare(replace(options, max_train_samples=30)).classes) == 299
    assert "in 239 rows" in refused(prepare, replace(options, max_train_samples=1000))
    path = write(tmp_path / "few.csv", numbered(24))  # so few may all differ
    assert len(prepare(TextOptions(data=str(path), label_column="text", vocab_size=50)).classes) == 24


def test_faults_in_many_rows_are_summed_up(tmp_path):
    rows = [("a", "x" if i % 2 else "") for i in range(20)]
    message = refused(load_as_is, write(tmp_path / "a.csv", rows))
    assert "got none in rows 1, 3, 5, 7, 9 and 5 more of" in message
    rows = [(None if i < 2 else "a", "x") for i in range(20)]
    assert "got none in rows 1, 2 of" in refused(load_as_is, write(tmp_path / "a.jsonl", rows))


def test_labels_of_mixed_types_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [("a", 1), ("b", "1"), ("c", 0), ("d", True)])
    assert refused(load_as_is, path) == (
        f"data: all labels must be of one type; got label=1 in row 1 and label='1' in rows 2, 4 of {path}."
        " Write all in the same way."
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "text;label\na;x\n", "the header has one column: it seems to be cut by semicolons"),
        ("a.csv", "text;label\na, b;x\n", "line 2 has 2 fields, the header 1: it seems to be cut by semicolons"),
        ("a.csv", "text\tlabel\na\tx\n", "the header has one column: it seems to be cut by tabs"),
        ("a.tsv", "text,label\na,x\n", "it seems to be cut by commas, where this kind of file has tabs"),
    ],
)
def test_another_delimiter_is_recognised(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_text(content)
    assert f"got {path}: " in refused(load_as_is, path)
    assert reason in refused(load_as_is, path)


def test_folders_of_texts(tmp_path):
    for label, text in (("neg", "bad"), ("pos", "good\nfilm")):
        for split in ("train", "dev", "test"):
            path = tmp_path / "splits" / split / label / "0.txt"
            path.parent.mkdir(parents=True)
            path.write_text(f"{text} {split}")
        (tmp_path / "plain" / label).mkdir(parents=True)
        (tmp_path / "plain" / label / "0.txt").write_text(text)
    data = load(tmp_path / "splits")
    assert data.classes == ["neg", "pos"]
    assert data.splits["validation"] == (["bad dev", "good\nfilm dev"], [0, 1])
    assert data.carved == ()
    assert load_as_is(tmp_path / "plain").splits == {"train": (["bad", "good\nfilm"], [0, 1])}
    (tmp_path / "plain" / "pos" / "1.txt").write_bytes(b"fine\n\xe9")
    assert "1.txt: line 2 is not in UTF-8" in refused(load_as_is, tmp_path / "plain")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_lies_beside_the_folders_of_labels_is_no_example(tmp_path):
    for split in ("train", "test"):  # as the IMDb archive has it
        put(tmp_path / "imdb" / split / f"urls_{split}.txt", "http://")
        for label in ("neg", "pos", "unsup"):
            put(tmp_path / "imdb" / split / label / "0.txt", f"{label} {split}")
    data = load_as_is(tmp_path / "imdb")
    assert data.splits == {"test": (["neg test", "pos test"], [0, 1]), "train": (["neg train", "pos train"], [0, 1])}
    assert data.classes == ["neg", "pos"]
    for name in ("neg/0.txt", "pos/0.txt", ".ipynb_checkpoints/0.txt", "pos/._0.txt", "pos/.ipynb_checkpoints/0.txt"):
        put(tmp_path / "plain" / name, name)
    assert load_as_is(tmp_path / "plain").splits == {"train": (["neg/0.txt", "pos/0.txt"], [0, 1])}
    put(tmp_path / "plain" / "test" / "0.txt", "a label like a split")
    assert load_as_is(tmp_path / "plain").classes == ["neg", "pos", "test"]


def test_hidden_files_of_rows_are_no_data(tmp_path):
    write(tmp_path / "a.csv")
    put(tmp_path / "._a.csv", "\0")
    assert load_as_is(tmp_path).classes == ["neg", "pos"]


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ","), ("a.tsv", "\t")])
def test_two_columns_of_one_name_are_refused(tmp_path, name, sign):
    put(tmp_path / name, "text,label,label,,\na,x,y,,\n".replace(",", sign))
    assert f"got {tmp_path / name}: the header has the column 'label' 2 times. Mend it" in refused(
        load_as_is, tmp_path / name
    )
    put(tmp_path / name, "text,label,,\na,x,,\n".replace(",", sign))  # as spreadsheets leave them at the end
    assert load_as_is(tmp_path / name).classes == ["x"]


def test_several_text_columns_are_joined(tmp_path):
    path = write(tmp_path / "a.jsonl", [("it rains", 7, "x")], columns=("premise", "hypothesis", "label"))
    assert load_as_is(path, text_column=("premise", "hypothesis")).splits["train"].inputs == ["it rains | 7"]
    assert load_as_is(path, text_column="premise").splits["train"].inputs == ["it rains"]
    assert "--text-column must be a column" in refused(load_as_is, path, text_column=("premise", "nothing"))
    path = write(tmp_path / "a.jsonl", [("it rains", None, "x")], columns=("premise", "hypothesis", "label"))
    assert "got none in row 1 of" in refused(load_as_is, path, text_column=("premise", "hypothesis"))


def test_a_row_limit_draws_at_random(tmp_path):
    path = write(tmp_path / "sorted.csv", [(f"t{i}", "ab"[i >= 100]) for i in range(200)])
    whole, few = load(path), load(path, max_train_samples=40)
    assert len(few.splits["train"].inputs) == 40
    assert min(Counter(few.splits["train"].labels).values()) > 10
    assert few.splits["test"] == whole.splits["test"]
    assert load(path, max_train_samples=10**6).splits["test"] == whole.splits["test"]
    # A source with its own splits may be sorted too.
    for split in ("train", "validation", "test"):
        write(tmp_path / "splits" / f"{split}.csv", [(f"t{i}", "ab"[i >= 100]) for i in range(200)])
    assert min(Counter(load(tmp_path / "splits", max_train_samples=40).splits["train"].labels).values()) > 10


def test_the_fingerprint_is_of_texts_and_labels(tmp_path):
    def fingerprint(*rows):
        return load_as_is(write(tmp_path / "a.csv", rows)).fingerprint["train"]

    first = fingerprint(("ab", "x"), ("c", "y"))
    assert first == fingerprint(("ab", "x"), ("c", "y"))
    others = [
        (("a", "x"), ("bc", "y")),
        (("ab", "y"), ("c", "x")),
        (("c", "y"), ("ab", "x")),
        (("ab", "x"), ("c", "z")),
    ]
    assert len({first, *(fingerprint(*rows) for rows in others)}) == 5


def test_half_a_surrogate_pair_is_read_as_a_question_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b", "label": "x"}\n')
    assert load_as_is(path).splits["train"].inputs == ["a?b"]


def test_of_columns_that_differ_in_case_the_usual_name_is_taken(tmp_path):
    (tmp_path / "a.csv").write_text("text,Text,Label,label\n" + "one,two,x,y\n" * 10)
    rows = load_text(TextOptions(data=str(tmp_path / "a.csv")), carve=False)
    assert (rows.splits["train"].inputs[0], rows.classes) == ("one", ["y"])


@pytest.mark.parametrize(
    "stray", ["train/a/more/1.txt", "train/a/b/c/1.txt", "eval/a/1.txt", "a/more/1.txt", "a/b/c/d/1.txt"]
)
def test_an_example_out_of_the_layout_of_folders_is_refused(tmp_path, stray):
    split = "" if stray.startswith("a/") else "train/"
    for name in (f"{split}a/1.txt", f"{split}b/1.txt", "train/about.txt", stray):
        put(tmp_path / name, "a text")
    message = rf"data: an example stands in LABEL, or in SPLIT/LABEL .*; got 1 elsewhere in .*/{stray}\. Move them"
    with pytest.raises(ValueError, match=message):
        load_text(TextOptions(data=str(tmp_path)))


def test_named_column_must_exist(tmp_path):
    path = write(tmp_path / "a.csv")
    assert refused(load, path, text_column="body") == (
        f"data: --text-column must be a column of {path}; got text_column='body', columns=['text', 'label']."
        " Choose one of these."
    )
    assert "--label-column must be a column" in refused(load, path, label_column="body")


def test_folder_without_data_is_refused(tmp_path):
    assert refused(load, tmp_path) == (
        f"data: a data folder must hold .csv, .tsv, .jsonl, .json or .parquet files, or a folder of .txt files"
        f" (with --task image, of images) for each label; got data='{tmp_path}'. Name another."
    )


def test_stray_file_among_the_splits_is_refused(tmp_path):
    write(tmp_path / "train.csv")
    stray = write(tmp_path / "eval.csv")
    assert f"must start with train, validation or test; got {stray}." in refused(load, tmp_path)


def test_train_split_is_needed(tmp_path):
    write(tmp_path / "validation.csv")
    write(tmp_path / "test.csv")
    message = (
        f"data: data must have a train split; got data='{tmp_path}' with splits=['test', 'validation']. "
        f"Add a file whose name begins with train, or give one file alone: it is then divided."
    )
    assert refused(load, tmp_path) == message
    assert refused(load_as_is, tmp_path) == message
    assert refused(load_text, TextOptions(data=str(tmp_path)), classes=["neg", "pos"]) == message


def test_unknown_label_is_refused(tmp_path):
    write(tmp_path / "train.csv", [("a", "x"), ("b", "y")])
    write(tmp_path / "test.csv", [("a", "x"), ("b", "z"), ("c", "w")])
    assert refused(load, tmp_path) == (
        f"data: every label must be in the train split; got labels=['w', 'z'] in the test split of {tmp_path},"
        " classes=['x', 'y']. Correct these labels, or name another column by --label-column."
    )
    assert "every label must be in the classes; got labels=['y'] in the train split" in refused(
        load_as_is, tmp_path, classes=["x", "w", "z"]
    )


@pytest.mark.parametrize(
    ("count", "fractions"),
    [
        (1, {}),
        (4, {}),
        (20, {"test_fraction": 0.0}),
        (20, {"test_fraction": 0.6, "validation_fraction": 0.4}),
        (20, {"test_fraction": -0.1}),
    ],
)
def test_carving_needs_a_row_in_each_split(tmp_path, count, fractions):
    path = write(tmp_path / "film.csv", numbered(count))
    message = refused(load, path, **fractions)
    assert message.startswith(f"data: carving must leave a row in each split; got rows={count}, validation_fraction=")
    assert message.endswith(". Give more rows or other fractions.")
    assert len(load_as_is(path).splits["train"].inputs) == count


# The embedded set


@pytest.fixture(scope="module")
def pystdlib():
    return load_text(TextOptions())


def test_pystdlib_is_large_and_every_class_is_in_every_split(pystdlib):
    counts = {split: Counter(rows.labels) for split, rows in pystdlib.splits.items()}
    total = sum(map(Counter.total, counts.values()))
    assert total > 5000
    assert len(pystdlib.classes) == 6
    assert pystdlib.carved == ()
    for split, share in {"train": 0.8, "validation": 0.1, "test": 0.1}.items():
        assert len(counts[split]) == 6
        assert counts[split].total() / total == pytest.approx(share, abs=0.03)
    whole = sum(counts.values(), Counter())
    assert max(whole.values()) <= total / 4
    assert min(min(count.values()) for count in counts.values()) >= 50


def test_pystdlib_snippets_are_six_lines_of_the_named_package_and_no_two_are_the_same(pystdlib):
    texts = [text for rows in pystdlib.splits.values() for text in rows.inputs]
    assert len(set(texts)) == len(texts)
    assert all(len(text.split("\n")) == 6 and all(map(str.strip, text.split("\n"))) for text in texts)

    def without_blank_lines(path: str) -> str:
        return "\n".join(line.rstrip() for line in Path(path).read_text().splitlines() if line.strip())

    source = without_blank_lines(email.message.__file__)
    found = {
        (split, pystdlib.classes[label])
        for split, rows in pystdlib.splits.items()
        for text, label in zip(*rows, strict=True)
        if text in source
    }
    assert len(found) == 1  # one file is in one split and has one class
    assert found.pop()[1] == "email"


def test_pystdlib_does_not_depend_on_the_hash_seed(pystdlib):
    script = (
        "import hashlib; from resseq.data.text import TextOptions, load_text\n"
        "print(hashlib.md5(repr(load_text(TextOptions())).encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.md5(repr(pystdlib).encode()).hexdigest()


def test_pystdlib_without_source_files_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert refused(load_text, TextOptions()) == (
        f"pystdlib: Python's standard library must be here as source; got no files in {tmp_path / 'asyncio'}."
        " Give other data."
    )


# Tokenizers


WORDS = ["the cat sat on the mat", "the rat sat on the cat", "cats, rats & mats!"] * 3


def train(kind: str, texts=WORDS, **options):
    return train_tokenizer(iter(texts), TextOptions(tokenizer=kind, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(kind):
    tokenizer = train(kind)
    assert [tokenizer.token_to_id(token) for token in ["[PAD]", "[UNK]", "[CLS]"]] == [0, 1, 2]
    assert set(tokenizer.get_added_tokens_decoder()) == {0, 1, 2}
    assert tokenizer.encode("").ids == [2]
    ids = tokenizer.encode("cat [CLS] [PAD]").ids
    assert ids[0] == 2
    assert not {0, 2} & set(ids[1:])  # what somebody wrote is text


@pytest.mark.parametrize("kind", KINDS)
def test_breaks_case_and_composition_are_normalised(kind):
    tokenizer = train(kind, [*WORDS, "é é"])
    assert tokenizer.encode("CAT<br /><BR>é").ids == tokenizer.encode("cat  e\u0301").ids
    cased = train(kind, [*WORDS, "CAT CAT"], lowercase=False)
    assert cased.encode("CAT").ids != cased.encode("cat").ids


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_is_the_same(kind, tmp_path):
    tokenizer = train(kind)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.to_str() == tokenizer.to_str()
    text = "[CLS] The cat<br />& the 日本 rat"
    assert loaded.encode(text).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_words_are_learnt_and_split_on_punctuation(kind):
    tokenizer = train(kind)
    assert tokenizer.encode("the cat&mat").tokens == ["[CLS]", "the", "cat", "&", "mat"]
    assert 1 in tokenizer.encode("日").ids


@pytest.mark.parametrize(
    ("kind", "size"), [("bpe", 20), ("bpe", 24), ("wordpiece", 33), ("wordpiece", 36), ("character", 9)]
)
def test_vocabulary_has_the_size_asked_for(kind, size):
    assert train(kind, vocab_size=size).get_vocab_size() == size


def test_wordpiece_marks_the_inside_of_words():
    tokens = train("wordpiece", vocab_size=40).encode("tat").tokens
    assert tokens == ["[CLS]", "t", "##at"]


def test_bytes_know_every_text():
    tokenizer = train("byte", lowercase=False)
    assert tokenizer.get_vocab_size() == 259
    for text in ["Ab\n", "日本", "\0", "🙂"]:
        assert len(tokenizer.encode(text).ids) == 1 + len(text.encode())
    assert 1 not in tokenizer.encode("日本\0🙂").ids


def test_characters_are_those_seen_twice():
    tokenizer = train("character", ["aab\n\n", "bc"])
    assert set(tokenizer.get_vocab()) == {"[PAD]", "[UNK]", "[CLS]", "a", "b", "\n"}
    assert tokenizer.encode("ab\nc").tokens == ["[CLS]", "a", "b", "\n", "[UNK]"]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "character"])
def test_training_is_repeatable_in_another_process(kind, pystdlib):
    texts = pystdlib.splits["test"].inputs
    script = (
        "import hashlib; from resseq.data.text import TextOptions, load_text\n"
        "from resseq.data.tokenizer import train_tokenizer\n"
        "texts = load_text(TextOptions()).splits['test'].inputs\n"
        f"tokenizer = train_tokenizer(texts, TextOptions(tokenizer='{kind}', vocab_size=2000))\n"
        "print(hashlib.md5(tokenizer.to_str().encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert hashlib.md5(train(kind, texts, vocab_size=2000).to_str().encode()).hexdigest() == other


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_unreadable_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    message = refused(load_tokenizer, path)
    assert message.startswith(f"load_tokenizer: path must be a saved tokenizer; got path={path} (")
    assert message.endswith("). Train and save it anew.")


# Batches


def test_tokens(monkeypatch):
    monkeypatch.setattr("resseq.data.batching.CHUNK", 2)  # three texts: more than one chunk
    tokenizer = train("byte")
    tokens = encode(tokenizer, ["ab", "", "abcdef"], [1, 0, 2], max_length=4)
    assert len(tokens) == 3
    assert tokens.lengths.tolist() == [3, 1, 4]
    assert tokens.truncated == pytest.approx(1 / 3)
    assert [label for _, label in (tokens[i] for i in range(3))] == [1, 0, 2]
    assert [tokens[i][0].tolist() for i in range(3)] == [tokenizer.encode(t).ids for t in ["ab", "", "abc"]]
    assert encode(tokenizer, ["ab"], None, max_length=3)[0][1] is None
    assert encode(tokenizer, ["ab"], None, max_length=3).truncated == 0
    assert len(encode(tokenizer, [], None, max_length=3)) == 0


def test_max_length_is_checked():
    assert refused(encode, train("byte"), ["a"], None, max_length=0) == (
        "encode: max_length must be at least 1; got max_length=0. The default is 256."
    )


def test_collate():
    batch = collate([(torch.tensor([2, 7, 8], dtype=torch.int32), 1), (torch.tensor([2], dtype=torch.int32), 0)])
    assert {name: values.dtype for name, values in batch.items()} == {
        "ids": torch.int64,
        "mask": torch.bool,
        "labels": torch.int64,
    }
    assert batch["ids"].tolist() == [[2, 7, 8], [2, 0, 0]]
    assert batch["mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["labels"].tolist() == [1, 0]
    assert set(collate([(torch.tensor([2]), None)])) == {"ids", "mask"}


LENGTHS = torch.randint(1, 100, (1003,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 2000])
def test_every_index_once_an_epoch(shuffle, batch_size):
    batches = LengthBatches(LENGTHS, batch_size, seed=3, shuffle=shuffle)
    epoch = list(batches)
    assert sorted(i for batch in epoch for i in batch) == list(range(1003))
    assert len(epoch) == len(batches) == -(-1003 // batch_size)
    assert sorted(map(len, epoch))[1:] == [batch_size] * (len(epoch) - 1)


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        batches = LengthBatches(LENGTHS, 8, seed)
        batches.set_epoch(epoch)
        torch.rand(1)  # the global generator plays no part
        return list(batches)

    assert order(0, 1) == order(0, 1)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    state = torch.get_rng_state()
    list(LengthBatches(LENGTHS, 8, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_of_like_length_and_in_no_order_of_length():
    batches = LengthBatches(LENGTHS, 4, seed=0)
    tops = [int(LENGTHS[batch].max()) for batch in batches]
    assert batches.padding() < 0.05  # against 0.37 for random batches
    pool = tops[:50]
    assert abs(torch.corrcoef(torch.tensor([pool, range(50)]).float())[0, 1]) < 0.5  # 1 if a pool's batches came sorted
    members = [set(batch) for batch in batches]
    batches.set_epoch(1)
    assert sum(set(batch) in members for batch in batches) < len(members) / 10  # other companions each epoch


def test_without_shuffling_everything_is_sorted():
    batches = LengthBatches(LENGTHS, 4, seed=0, shuffle=False)
    order = torch.tensor([i for batch in batches for i in batch])
    assert torch.equal(order, LENGTHS.argsort(stable=True))
    batches.set_epoch(1)
    assert torch.equal(order, torch.tensor([i for batch in batches for i in batch]))


def test_padding_is_the_share_of_padded_places():
    batches = LengthBatches(torch.tensor([1, 2, 5, 3]), 2, seed=0, shuffle=False)
    assert batches.padding() == pytest.approx(1 - 11 / (2 * 2 + 2 * 5))
    tokens = [collate([(torch.ones(int(batches.lengths[i])), None) for i in batch])["mask"] for batch in batches]
    assert batches.padding() == pytest.approx(1 - sum(m.sum() for m in tokens) / sum(m.numel() for m in tokens))


def test_resumed_epoch_goes_on_at_the_same_batch():
    batches = LengthBatches(LENGTHS, 8, seed=0)
    batches.set_epoch(2)
    whole = list(batches)
    batches.start_at(5)
    assert list(batches) == whole[5:]
    assert list(batches) == whole
    batches.start_at(len(whole))
    assert list(batches) == []


def test_batch_size_is_checked():
    assert refused(LengthBatches, LENGTHS, 0, seed=0) == (
        "LengthBatches: batch_size must be at least 1; got batch_size=0. Use 32."
    )


def test_loader_workers_give_the_same_batches():
    tokens = encode(train("byte"), [f"text {'x' * (i % 7)}" for i in range(40)], list(range(40)), max_length=20)

    def labels(workers, start=0):
        batches = LengthBatches(tokens.lengths, 8, seed=1)
        batches.start_at(start)
        loader = torch.utils.data.DataLoader(tokens, batch_sampler=batches, collate_fn=collate, num_workers=workers)
        return [batch["labels"].tolist() for batch in loader]

    assert labels(0) == labels(2)
    assert labels(0, start=2) == labels(2, start=2) == labels(0)[2:]


# Imports


def test_options_come_without_heavy_imports():
    script = (
        "import sys; from resseq.data.text import TextOptions\n"
        "heavy = {'torch', 'datasets', 'tokenizers', 'numpy', 'pandas', 'pyarrow'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "import resseq.data.batching, resseq.data.tokenizer\n"
        "heavy = {'datasets', 'tokenizers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# Real data


@pytest.fixture(scope="session")
def folder() -> Path:
    if "RESSEQ_DATA" not in os.environ:
        pytest.skip("RESSEQ_DATA is unset: no real data")
    folder = Path(os.environ["RESSEQ_DATA"])
    assert folder.is_dir(), f"RESSEQ_DATA={folder} is no folder"
    return folder


@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [
        (
            "trec",
            ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"],
            {"train": 5452 - 545, "validation": 545, "test": 500},
        ),
        ("sst2", ["0", "1"], {"train": 6920, "validation": 872, "test": 1821}),
        ("mr", ["negative", "positive"], {"train": 10685 - 2 * 1068, "validation": 1068, "test": 1068}),
        ("imdb", ["neg", "pos"], {"train": 22500, "validation": 2500, "test": 25000}),
    ],
)
def test_real_data(folder, name, classes, sizes):
    data = load(folder / name)
    assert data.classes == classes
    assert {split: len(rows.inputs) for split, rows in data.splits.items()} == sizes
    # Sources sorted by class must not be carved by position.
    assert all(set(rows.labels) == set(range(len(classes))) for rows in data.splits.values())


def test_real_data_through_to_a_batch(folder):
    train = load(folder / "trec").splits["train"]
    tokenizer = train_tokenizer(train.inputs, TextOptions(vocab_size=2000))
    tokens = encode(tokenizer, train.inputs, train.labels, max_length=256)
    assert tokens.truncated == 0
    batches = LengthBatches(tokens.lengths, 32, seed=0)
    batch = collate([tokens[i] for i in next(iter(batches))])
    assert batch["ids"].shape == batch["mask"].shape == (32, batch["mask"].sum(1).max())
    assert batches.padding() < 0.1
    assert (tokens.ids == 1).double().mean() == 0  # every character was seen in training


def test_no_batch_is_of_one_row_beside_others():
    for rows, size, sizes in (
        (33, 32, [16, 17]),
        (9, 4, [2, 3, 4]),
        (10, 4, [2, 4, 4]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
        (201, 4, [2, 3] + [4] * 49),  # the last of the pools of 50 batches would have one row
    ):
        batches = list(LengthBatches(torch.arange(rows), size, seed=0))
        assert sorted(map(len, batches)) == sizes
        assert sorted(sum(batches, [])) == list(range(rows))
        assert len(LengthBatches(torch.arange(rows), size, seed=0)) == len(batches)
