"""Generated list expressions: their answers, bounds and splits."""

import statistics
import subprocess
import sys

import pytest

from resseq.data.listops import read_listops
from resseq.data.text import TextOptions, load_text
from resseq.data.tokenizer import train_tokenizer


def value(tokens):
    """An evaluator of its own: a stack of open brackets."""
    stack = [[]]
    for token in tokens:
        if token.startswith("["):
            stack.append([token[1:]])
        elif token == "]":
            operator, *digits = stack.pop()
            digits.sort()
            middle = len(digits) // 2
            median = digits[middle] if len(digits) % 2 else (digits[middle - 1] + digits[middle]) // 2
            found = {"MIN": digits[0], "MAX": digits[-1], "MED": median, "SM": sum(digits) % 10}
            stack[-1].append(found[operator])
        else:
            stack[-1].append(int(token))
    assert len(stack) == 1
    (answer,) = stack[0]
    return answer


def depth(tokens):
    deepest = now = 0
    for token in tokens:
        now += token.startswith("[") - (token == "]")
        deepest = max(deepest, now)
    return deepest


@pytest.mark.parametrize(
    ("name", "shortest", "length", "deepest"),
    [
        ("listops", 4, 50, 3),
        ("listops:length=20,depth=2,rows=900", 4, 20, 2),
        ("listops:shortest=60,length=80,depth=6,arguments=8,rows=400", 60, 80, 6),
    ],
)
def test_answers_are_right_and_bounds_are_kept(name, shortest, length, deepest):
    splits = read_listops(name, seed=1)
    rows = [row for texts, labels in splits.values() for row in zip(texts, labels, strict=True)]
    assert all(str(value(text.split())) == label for text, label in rows)
    lengths = [len(text.split()) for text, _ in rows]
    assert (min(lengths), max(lengths)) == (shortest, length)
    assert max(depth(text.split()) for text, _ in rows) == deepest
    assert len({text for text, _ in rows}) == len(rows)
    assert {label for _, label in rows} == set("0123456789")


def test_shares_of_the_splits():
    data = load_text(TextOptions(data="listops:rows=1000"))
    assert {split: len(rows.inputs) for split, rows in data.splits.items()} == {
        "train": 800,
        "validation": 100,
        "test": 100,
    }
    assert data.carved == ()


def test_the_splits_are_alike():
    splits = read_listops("listops", seed=0)
    train, validation, test = (statistics.mean(len(text.split()) for text in texts) for texts, _ in splits.values())
    assert abs(train - (validation + test) / 2) < 0.3


def test_a_great_depth_ends():
    splits = read_listops("listops:length=100,depth=40,arguments=30,rows=50", seed=0)
    assert len(splits["train"][0]) == 40


def test_the_seed_decides_in_another_process_too():
    script = "from resseq.data.listops import read_listops; print(read_listops('listops:rows=50', 3))"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(read_listops("listops:rows=50", 3))
    assert read_listops("listops:rows=50", 4) != read_listops("listops:rows=50", 3)


def test_a_token_of_an_expression_is_few_tokens_of_the_tokenizer():
    options = TextOptions(data="listops:rows=1000")
    texts = load_text(options).splits["train"].inputs
    encoded = train_tokenizer(texts, options).encode_batch(texts)
    assert max(len(each.ids) / (1 + len(text.split())) for each, text in zip(encoded, texts, strict=True)) < 1.5


@pytest.mark.parametrize(
    "name", ["listops:size=3", "listops:depth=x", "listops:arguments=1", "listops:depth", "listops:rows=²"]
)
def test_unknown_settings_are_named(name):
    with pytest.raises(
        ValueError, match=r"^listops: settings are length, shortest, depth, arguments, rows, each with a number; got"
    ):
        read_listops(name, 0)


def test_too_many_rows_for_so_little_room():
    with pytest.raises(ValueError, match="found only .* different expressions"):
        read_listops("listops:length=4,depth=1,rows=2000", 0)
    with pytest.raises(ValueError, match="length must be at least 4, and at least shortest; got length=3, shortest=4"):
        read_listops("listops:length=3", 0)
    with pytest.raises(ValueError, match="got length=50, shortest=60"):
        read_listops("listops:shortest=60", 0)
