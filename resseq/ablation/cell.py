"""One cell of a grid, trained in its folder by whichever process comes first, and the row that it gives.

The folder is that of a run, with cell.json (what was measured; with it the cell is done) and attempts.jsonl beside it.
"""

import json
import math
import os
import pickle
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resseq.data.batching import Images, Tokens
    from resseq.data.corpus import Corpus
    from resseq.options import TrainOptions

Row = dict[str, Any]
CHOSEN = ("model", "scheme", "depth", "seed", "learning_rate", "warmup_steps", "init")
MEASURED = (
    *("status", "diverged_step", "validation_accuracy", "validation_weighted_accuracy", "validation_loss"),
    *("train_accuracy", "train_loss", "test_accuracy", "test_loss"),
    *("steps_to_loss", "steps", "seconds", "parameters", "saved_bytes"),
    *("gradient_norm_first", "gradient_norm_last", "stream_growth"),
)
# shares of the class frequencies' loss: at the first a run's end shows that it learnt something, at the second a few
# noisy batches do
LEARNT, WELL_LEARNT = 0.98, 0.8


@dataclass(frozen=True)
class Cell:
    """One configuration of a grid."""

    name: str
    """A hash of all that its numbers follow from."""
    options: "TrainOptions"
    threads: int

    @property
    def folder(self) -> Path:
        return self.options.folder


def run_cell(cell: Cell, pickled: bytes) -> dict[str, Any] | None:
    """Train a cell, or go on with it; what then stands in its cell.json.

    None if another process is at it, or if it was told to stop. No exception comes out: it becomes the cell's status.
    """
    import torch

    from resseq.training.checkpoint import InUse, claim

    torch.set_num_threads(cell.threads)
    try:
        with claim(cell.folder):
            return read_record(cell) or _train(cell, pickle.loads(pickled))
    except InUse:
        return None
    except KeyboardInterrupt:
        log(cell, "stopped")
        return None


def _train(cell: Cell, corpus: "Corpus") -> dict[str, Any]:
    from resseq.ablation.start import measure_start
    from resseq.classification import train_with
    from resseq.training.checkpoint import checkpoints
    from resseq.training.loop import Diverged

    if _read(cell.folder / "result.json") is None:  # a damaged one is as good as none
        (cell.folder / "result.json").unlink(missing_ok=True)
    found = checkpoints(cell.folder)
    log(cell, "start", step=int(found[-1].name.split("-")[1]) if found else 0)
    measured: Row = {"status": "failed"}
    try:
        measured |= measure_start(cell.options, corpus)
        measured |= _measure_result(cell, corpus, train_with(cell.options, corpus))
    except Diverged as error:
        measured |= {"status": "diverged", "diverged_step": error.step, "steps": error.step - 1, "error": str(error)}
        measured["seconds"] = round(error.seconds, 1)
    except Exception as error:  # whatever it is, the other cells go on
        measured["error"] = f"{type(error).__name__}: {error}"
    if measured["status"] != "failed":
        for checkpoint in checkpoints(cell.folder):
            shutil.rmtree(checkpoint)
    return write_record(cell, measured, corpus.baselines)


def write_record(cell: Cell, measured: Row, baselines: dict[str, float]) -> dict[str, Any]:
    """Leave what was measured in the cell's folder, and return it."""
    from resseq.training.checkpoint import write_text

    record = {"measured": {name: _finite(value) for name, value in measured.items()}, "baselines": baselines}
    write_text(cell.folder / "cell.json", json.dumps(record, indent=2))
    status = measured["status"]
    log(cell, status if status in ("diverged", "failed") else "finished", step=measured.get("steps"))
    return record


def read_record(cell: Cell) -> dict[str, Any] | None:
    """What a cell that is done left; None for one that is not, that failed, or whose files are damaged."""
    record = _read(cell.folder / "cell.json")
    try:
        status, _ = record["measured"]["status"], record["baselines"]
    except (KeyError, TypeError):
        return None
    whole = status == "diverged" or _read(cell.folder / "result.json") is not None
    return record if whole and status != "failed" else None


def row_of(cell: Cell, axes: list[str], record: dict[str, Any]) -> Row:
    """A cell's row: what was chosen, what was measured."""
    chosen = {name: getattr(cell.options, name) for name in dict.fromkeys((*CHOSEN, *axes))}
    chosen["depth"] = chosen["depth"] or layers_named(cell.options.model)
    measured = {name: record["measured"].get(name) for name in MEASURED}
    return chosen | measured | {"cell": cell.name, "error": record["measured"].get("error")}


def layers_named(model: str) -> int | None:
    """The depth that is part of a model's name, as in resnet18."""
    return int(model.removeprefix("resnet")) if model.startswith("resnet") else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def log(cell: Cell, event: str, **more: Any) -> None:
    """Add a line to the cell's attempts."""
    line = json.dumps({"event": event, **more, "pid": os.getpid(), "time": round(time.time(), 3)})
    with open(cell.folder / "attempts.jsonl", "a") as file:
        file.write(line + "\n")


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """The rows of a run's log on training batches: step, loss, accuracy."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half-written
    return [(row["step"], row["loss"], row["accuracy"]) for row in rows if "loss" in row]


def _measure_result(cell: Cell, corpus: "Corpus", result: dict[str, Any]) -> Row:
    """The part of a row that a finished run gives."""
    chance = chance_loss(corpus.splits["train"], len(corpus.classes), cell.options)
    logged = curve(cell.folder)
    loss, accuracy = last_tenth(logged, result["steps"])
    return {
        "status": judge([row[1] for row in logged], loss, chance),
        "validation_accuracy": result["validation"]["accuracy"],
        "validation_weighted_accuracy": result["validation"].get("weighted_accuracy"),
        "validation_loss": result["validation"]["loss"],
        "train_accuracy": accuracy,
        "train_loss": loss,
        "test_accuracy": result["test"]["accuracy"],
        "test_loss": result["test"]["loss"],
        "steps_to_loss": next((step for step, loss, _ in logged if loss <= chance / 2), None),
        "steps": result["steps"],
        "seconds": result["seconds"],
    }


def last_tenth(logged: list[tuple[int, float, float]], steps: int) -> tuple[float, float]:
    """Mean loss and accuracy of the rows that end in the last tenth of the steps, or of the last row."""
    ends = [step for step, _, _ in logged]
    counts = [end - before for end, before in zip(ends, [0, *ends], strict=False)]  # of steps; the last may have fewer
    first = min(sum(end <= 0.9 * steps for end in ends), len(ends) - 1)
    loss, accuracy = (
        sum(row[i] * count for row, count in zip(logged[first:], counts[first:], strict=True)) / sum(counts[first:])
        for i in (1, 2)
    )
    return loss, accuracy


def judge(losses: list[float], end: float, chance: float) -> str:
    """What became of a run whose losses stayed finite; ``end`` is what they end at, ``chance`` that of knowing nothing.

    Stuck: it ends near chance and never learnt. Unstable: it learnt, and then the loss rose to twice that of chance,
    or ended near it.
    """
    learnt = next((i for i, loss in enumerate(losses) if loss <= WELL_LEARNT * chance), None)
    near_chance = end > LEARNT * chance
    if learnt is None:
        return "stuck" if near_chance else "finished"
    return "unstable" if near_chance or max(losses[learnt:]) > 2 * chance else "finished"


def chance_loss(train: "Tokens | Images", classes: int, options: "TrainOptions") -> float:
    """The loss, in nats, of always answering the class frequencies: the entropy of the (smoothed, weighted) labels."""
    import torch

    assert train.labels is not None
    counts = torch.bincount(train.labels, minlength=classes).double()
    if options.class_weights == "balanced":
        counts = counts.clamp(max=1)  # each class that is there weighs the same
    frequencies, smoothing = counts / counts.sum(), options.label_smoothing_factor
    return torch.special.entr((1 - smoothing) * frequencies + smoothing / classes).sum().item()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
