"""Runs the cells of a grid that are not done yet, and gathers what all of them found."""

import json
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from tqdm import tqdm

from resseq.ablation import report
from resseq.ablation.cell import Cell, curve, log, read_record, row_of, write_record
from resseq.ablation.engines import ENGINES
from resseq.ablation.grid import AblateOptions, as_options, cells_of
from resseq.data.corpus import data_options, prepare
from resseq.options import MAY_DIFFER, TrainOptions
from resseq.run import changed_parts, read_config

if TYPE_CHECKING:
    import pandas

    from resseq.data.corpus import Corpus
    from resseq.data.rows import DataOptions

Tell = Callable[[str], None]
Record = dict[str, Any]
POLL = 0.5  # seconds between two looks at the cells
NOTE = 10  # seconds between two notes of how long the command has taken
DEATHS = 3  # of its process, after which a cell has failed
BAR = "{desc} |{bar}| {percentage:3.0f} % [{elapsed}<{remaining}]"


@dataclass(frozen=True)
class Ablation:
    """What a grid found."""

    findings: report.Findings
    folder: Path
    """Where the report, the pictures and the cells are."""

    def __repr__(self) -> str:
        return f"{self.table}\n\n{self.summary}"

    @property
    def frame(self) -> "pandas.DataFrame":
        """One row a cell."""
        import pandas

        return pandas.DataFrame(self.findings.rows)

    @property
    def table(self) -> str:
        return report.table(self.findings)

    @property
    def summary(self) -> str:
        return report.summary(self.findings)


@overload
def ablate(*, dry_run: Literal[False] = False, **options: Any) -> Ablation: ...
@overload
def ablate(*, dry_run: Literal[True], **options: Any) -> str: ...
def ablate(*, dry_run: bool = False, **options: Any) -> Ablation | str:
    """Train every combination of the values given and compare them; the options are those of ``resseq ablate``.

    ``ablate(schemes=("post", "pre"), depths=(2, 6), seeds=range(3), data="reviews.csv")``. The same call again goes on
    where it was stopped; with more values, it trains the new cells alone. A single value stands for a tuple of one.

    Returns: an Ablation: frame (a pandas DataFrame, one row a cell), table, summary, folder. Of a dry run, which trains
        nothing, a text: the grid, the parameters of each shape and an estimate of the time.
    Raises: ValueError for options that cannot be trained, and for bad data. What goes wrong in a cell is in its row.
    """
    from resseq.ablation.plan import plan

    settled = as_options(dry_run=dry_run, **options)
    return plan(settled) if settled.dry_run else ablate_with(settled)


def ablate_with(options: AblateOptions, tell: Tell = lambda line: None) -> Ablation:
    """``ablate`` with its options in one value; ``tell`` gets a line for each cell as it ends."""
    from resseq.training.loop import choose_device

    choose_device(options.device)
    cells = cells_of(options)
    _make_folder(options.folder)
    records = {cell.name: record for cell in cells if (record := read_record(cell))}
    left = [cell for cell in cells if cell.name not in records]
    with _stoppable(tell):
        corpora = prepare_corpora(cells)
        _check_same_data(cells, corpora)
        if left:
            records |= _Sweep(left, corpora, options, tell).run()
    findings = _findings(cells, options, records)
    report.write_report(findings, options.folder)
    return Ablation(findings, options.folder)


def _make_folder(folder: Path) -> None:
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"ablate: the output folder must be writable; got --output-dir {folder} ({error.strerror}). "
            f"Use another --output-dir."
        ) from error


def prepare_corpora(cells: list[Cell]) -> dict["DataOptions", "Corpus"]:
    """The corpus of each cell's data options, each prepared once."""
    return {data: prepare(data) for data in dict.fromkeys(data_options(cell.options) for cell in cells)}


def _check_same_data(cells: list[Cell], corpora: dict["DataOptions", "Corpus"]) -> None:
    """Raise where a cell, finished or not, was begun with other data than is there now."""
    for cell in cells:
        if not (cell.folder / "config.json").exists():
            continue
        corpus = corpora[data_options(cell.options)]
        if changed := changed_parts(read_config(cell.folder)["fingerprint"], corpus.fingerprint):
            raise ValueError(
                f"ablate: all cells of a folder share their data; got another {', '.join(changed)} in "
                f"{cell.options.data} than the cells there began with. Restore it, or use another --output-dir."
            )


def batches_of(options: TrainOptions, rows: int) -> int:
    """Batches that so many rows make."""
    return math.ceil(rows / options.per_device_train_batch_size)


def workers_of(options: AblateOptions, cells: int) -> int:
    """Cells at a time; Ray decides for itself."""
    from resseq.training.loop import choose_device

    if options.engine == "ray":
        default = cells
    elif choose_device(options.device).type != "cpu":
        default = 1
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        default = max(1, cores // options.threads)
    return min(options.workers or default, cells)


class _Sweep:
    """Cells on their way through an engine."""

    def __init__(self, cells: list[Cell], corpora: dict["DataOptions", "Corpus"], options: AblateOptions, tell: Tell):
        self.options, self.tell = options, tell
        self.begun, self.begun_at = time.monotonic(), round(time.time(), 3)
        self.noted = self.begun
        self.pickled = {data: pickle.dumps(corpus) for data, corpus in corpora.items()}
        rows = {data: corpus.rows["train"] for data, corpus in corpora.items()}
        self.steps = {
            cell: cell.options.steps(batches_of(cell.options, rows[data_options(cell.options)])) for cell in cells
        }
        for cell in cells:
            cell.folder.mkdir(exist_ok=True)
        # the longest first, so that no process is left alone with one at the end
        self.queue = deque(sorted(cells, key=self.cost, reverse=True))
        self.running: dict[Future[Any], Cell] = {}
        self.deaths: Counter[Cell] = Counter()
        self.records: dict[str, Record] = {}

    def cost(self, cell: Cell) -> int:
        return self.steps[cell] * (cell.options.depth or 1)

    def position(self, cell: Cell) -> int:
        """How much of its cost a cell has behind it."""
        if cell.name in self.records:
            return self.cost(cell)
        logged = curve(cell.folder)
        return logged[-1][0] * self.cost(cell) // self.steps[cell] if logged else 0

    def run(self) -> dict[str, Record]:
        """To the end of all cells. What each one measured, by its name."""
        workers = workers_of(self.options, len(self.steps))
        engine = ENGINES[self.options.engine](self.options)
        total, initial = (sum(each(cell) for cell in self.steps) for each in (self.cost, self.position))
        with tqdm(total=total, initial=initial, bar_format=BAR, disable=not sys.stderr.isatty()) as bar:
            try:
                while self.queue or self.running:
                    while self.queue and len(self.running) < workers:
                        cell = self.queue.popleft()
                        self.running[engine.submit(cell, self.pickled[data_options(cell.options)])] = cell
                    done, _ = wait(self.running, POLL, FIRST_COMPLETED)
                    for future in done:
                        engine.release(future)
                        self.take(self.running.pop(future), future)
                    if time.monotonic() - self.noted > NOTE:
                        self.note_seconds()
                    bar.n = sum(map(self.position, self.steps))
                    bar.set_description_str(f"{len(self.records)}/{len(self.steps)} cells")
            finally:
                engine.close(stop=bool(self.running))
                self.note_seconds()
        return self.records

    def take(self, cell: Cell, future: Future[Any]) -> None:
        """What has become of a cell: it is done, or another process is at it, or its process died."""
        error = future.exception()
        record = None if error else future.result()
        if error:
            self.deaths[cell] += 1
            log(cell, "died")
            if self.deaths[cell] == DEATHS:
                why = f"its process died {DEATHS} times ({str(error) or type(error).__name__})"
                record = write_record(cell, {"status": "failed", "error": why}, {})
        if record is None:
            self.queue.append(cell)
            time.sleep(POLL)
            return
        self.records[cell.name] = record
        self.tell(_line(row_of(cell, self.options.axes, record), self.options.axes))
        self.note_seconds()

    def note_seconds(self) -> None:
        """Add what this command has taken so far: a kill takes away no more than what came after."""
        self.noted = time.monotonic()
        row = {"command": self.options.command, "begun": self.begun_at, "seconds": self.noted - self.begun}
        with open(self.options.folder / "commands.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def _line(row: dict[str, Any], axes: list[str]) -> str:
    """A cell that has ended, in short."""
    words = [
        f"{row['scheme']:12} depth {row['depth']:<4} seed {row['seed']}",
        *(f"{axis} {row[axis]}" for axis in axes),
    ]
    words.append(f"{row['status']:8}")
    if row["test_accuracy"] is not None:
        words.append(f"test accuracy {100 * row['test_accuracy']:.1f} %")
    if row["seconds"] is not None:
        words.append(f"{row['seconds']:.0f} s")
    return "  ".join([*words, *([row["error"]] if row["error"] else [])])


def _seconds(folder: Path) -> float:
    """The seconds of all commands that ran in the folder, each as far as it got."""
    file = folder / "commands.jsonl"
    seconds = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(ValueError):  # a line that a full disk has cut
            row = json.loads(line)
            seconds[row["begun"]] = row["seconds"]
    return sum(seconds.values())


@contextmanager
def _stoppable(tell: Tell) -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, with status 143; a second signal ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        tell("stopping: cells are saved; the same command goes on from here")
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _findings(cells: list[Cell], options: AblateOptions, records: dict[str, Record]) -> report.Findings:
    rows = [row_of(cell, options.axes, records[cell.name]) for cell in cells]
    baselines = [found for cell in cells if (found := records[cell.name]["baselines"])]
    return report.Findings(
        rows=rows,
        curves={cell.name: [(step, loss) for step, loss, _ in curve(cell.folder)] for cell in cells},
        baselines=baselines[0] if baselines and all(found == baselines[0] for found in baselines) else {},
        # not one of which all values came to the same, as None and the model's own default do
        axes=[axis for axis in options.axes if len({row[axis] for row in rows}) > 1],
        setting=_setting(cells, rows),
        command=options.command,
        seconds=_seconds(options.folder),
    )


def _setting(cells: list[Cell], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What all cells have in common: their options, and the steps of those that came to the end."""
    options = [asdict(cell.options) for cell in cells]
    shared = {name: value for name, value in options[0].items() if name not in MAY_DIFFER and value is not None}
    shared = {name: value for name, value in shared.items() if all(each[name] == value for each in options)}
    steps = {row["steps"] for row in rows if row["status"] not in ("diverged", "failed")}
    return shared | {"threads": cells[0].threads} | ({"steps": steps.pop()} if len(steps) == 1 else {})
