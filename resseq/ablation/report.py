"""What a grid found, told: a table, a sentence, pictures, and one page that holds all of it."""

import csv
import fcntl
import json
import statistics
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resseq.ablation.cell import LEARNT, WELL_LEARNT
from resseq.card import BASELINES
from resseq.options import data_name
from resseq.page import Block, page, shown

# Values of these are different questions: what validates best on an easier data set is no better scheme. Each has a
# line of its own; between the values of all other options, validation chooses.
APART = ("model", "data", "data_seed", "validation_fraction", "test_fraction", "max_train_samples", "class_weights")

FEW = 100  # steps, in which most schemes learn nothing yet
FAULTS = {
    "stuck": f"Stuck: the training loss never fell {100 * (1 - WELL_LEARNT):.0f} % below that of always predicting the "
    f"class frequencies, and ended less than {100 * (1 - LEARNT):.0f} % below it.",
    "unstable": "Unstable: it learnt, and then the training loss rose to twice that of the class frequencies or ended "
    "near it; the accuracy is that of the weights that validation chose.",
    "diverged": "Diverged: the gradient or the validation loss was no longer finite.",
    "failed": "Failed: the error stands in results.csv.",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """The rows of a grid and what is needed to read them."""

    rows: list[Row]
    """One a cell."""
    curves: dict[str, list[tuple[int, float]]]
    """Of each cell, by its name: (step, training loss)."""
    baselines: dict[str, float]
    """Test accuracy of the majority class and of a linear model; empty where the grid has several corpora."""
    axes: list[str]
    """The options with several values, but scheme, depth and seed."""
    setting: Row
    """What all cells share."""
    command: str
    """To have the same again."""
    seconds: float
    """Of all commands that worked on the grid."""

    @property
    def lines(self) -> list[str]:
        """What is compared: the schemes, on each model and data if the grid has several."""
        return list(dict.fromkeys(map(self.line_of, self.rows)))

    @property
    def depths(self) -> list[int]:
        return sorted({row["depth"] for row in self.rows})

    @property
    def tuned(self) -> list[str]:
        """The options whose value validation chooses."""
        return [axis for axis in self.axes if axis not in APART]

    def line_of(self, row: Row) -> str:
        """ "post", or "post (data reviews)"."""
        values = {axis: self._data_name(row) if axis == "data" else row[axis] for axis in self.axes if axis in APART}
        named = ", ".join(f"{_words(axis)} {value}" for axis, value in values.items())
        return f"{row['scheme']} ({named})" if named else row["scheme"]

    def _data_name(self, row: Row) -> str:
        """Short, unless two data sets would have one name."""
        names = {each["data"]: data_name(each["data"]) for each in self.rows}
        return names[row["data"]] if len(set(names.values())) == len(names) else row["data"]

    def deepest(self, line: str) -> int:
        """A line's greatest depth: resnet18 has no other than its own."""
        return max(row["depth"] for row in self.rows if self.line_of(row) == line)

    def chosen(self, line: str, depth: int) -> list[Row]:
        """A line's rows at a depth, one a seed: of the settings that the axes give, the one that validates best."""
        settings: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            if (self.line_of(row), row["depth"]) == (line, depth):
                settings.setdefault(tuple(row[axis] for axis in self.tuned), []).append(row)
        return max(
            settings.values(),
            key=lambda rows: statistics.mean(map(_validated, rows)),
            default=[],
        )


def _validated(row: Row) -> float:
    """The accuracy that chooses: the weighted one, where classes have weights; results of old have no such column."""
    found = [row.get("validation_weighted_accuracy"), row["validation_accuracy"]]
    return next((accuracy for accuracy in found if accuracy is not None), 0.0)


def accuracies(rows: list[Row]) -> list[float]:
    """Test accuracies, in per cent, of the rows that have one."""
    return [100 * row["test_accuracy"] for row in rows if row["test_accuracy"] is not None]


def layers(depth: int) -> str:
    return f"{depth} layer{'s' if depth > 1 else ''}"


def _faults(rows: list[Row]) -> str:
    """ "stuck", or "2 of 3 stuck"; empty where all is well."""
    counts = Counter(row["status"] for row in rows if row["status"] != "finished")
    if len(rows) == 1:
        return "".join(counts)
    return ", ".join(f"{count} of {len(rows)} {status}" for status, count in counts.items())


def _result(rows: list[Row], unit: str = "") -> str:
    """Mean accuracy over the seeds, standard deviation, and what went wrong."""
    if not rows:
        return "–"
    values, faults = accuracies(rows), _faults(rows)
    if not values:
        return faults
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}{unit}{f' ({faults})' if faults else ''}"


def _grid(findings: Findings) -> list[list[str]]:
    """Schemes down, depths across."""

    def cell(line: str, depth: int) -> str:
        rows = findings.chosen(line, depth)
        return f"{_result(rows)}{_brackets(findings, rows)}"

    head = ["scheme", *map(layers, findings.depths)]
    return [head, *([line, *(cell(line, depth) for depth in findings.depths)] for line in findings.lines)]


def _brackets(findings: Findings, rows: list[Row]) -> str:
    """The values that validation chose; nothing where there was no choice."""
    if not findings.tuned or not any(row["validation_accuracy"] is not None for row in rows):
        return ""
    return f" [{', '.join(_value(rows[0][axis]) for axis in findings.tuned)}]"


def _legend(findings: Findings) -> str:
    """How to read the grid's numbers."""
    cells = [findings.chosen(line, depth) for line in findings.lines for depth in findings.depths]
    words = ["Test accuracy in %"]
    if len({row["seed"] for row in findings.rows}) > 1:
        words.append("mean ± standard deviation over the seeds that have one")
    if any(_brackets(findings, cell) for cell in cells):
        words.append(f"with the {_choice(findings)} for each scheme and depth, in brackets")
    seen = {row["status"] for cell in cells for row in cell}
    return " ".join([", ".join(words) + ".", *(text for status, text in FAULTS.items() if status in seen)])


def _choice(findings: Findings) -> str:
    return f"{' and '.join(map(_words, findings.tuned))} that validation chose"


def _words(option: str) -> str:
    return option.replace("_", " ")


def _value(value: Any) -> str:
    """An option's value; None is what it has where nobody gives it."""
    return "usual" if value is None else shown(value)


def table(findings: Findings) -> str:
    """Schemes down, depths across, as text."""
    rows = _grid(findings)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([textwrap.fill(_legend(findings), 120), "", *lines])


def summary(findings: Findings) -> str:
    """What happened at the deepest depth, or at a model's own where it ends before, and under which conditions."""
    deepest = findings.depths[-1]
    cells = {line: findings.chosen(line, findings.deepest(line)) for line in findings.lines}
    found = []
    for line, rows in cells.items():
        depth = rows[0]["depth"]
        where = "" if depth == deepest else f" at {layers(depth)}"
        found.append(f"{line}{where} {_result(rows, ' %')}")
    how = f", each with the {_choice(findings)}" if any(_brackets(findings, rows) for rows in cells.values()) else ""
    beside = [
        f"{'the' if name == 'majority' else 'a'} {BASELINES[name]} {100 * value:.1f} %"
        for name, value in findings.baselines.items()
    ]
    sentences = [f"At {layers(deepest)}{how}: {', '.join(found)}"]
    if beside:
        sentences.append(f"Beside them: {', '.join(beside)}")
    return ". ".join([*sentences, _conditions(findings)]) + "."


def _conditions(findings: Findings) -> str:
    """Start, learning rate, warm-up, budget and seeds: a claim without them says nothing."""

    def values(name: str) -> str:
        return " or ".join(map(_value, _values(findings, name)))

    rises = values("warmup_steps")
    warmup = {"0": "no warm-up", "usual": "the usual warm-up"}.get(rises, f"warm-up {rises} steps")
    whole = [row["steps"] for row in findings.rows if row["status"] not in ("diverged", "failed")]
    most = max(whole, default=findings.setting.get("max_steps"))  # what diverged stopped before
    budget = f"{most:,} step{'s' if most > 1 else ''}" if most else "no cell came to its end"
    if most and set(_values(findings, "steps")) != {most}:
        budget = f"at most {budget}"
    seeds = len(_values(findings, "seed"))
    start = "Learning" if _values(findings, "init") == [None] else f"Start {values('init')}, learning"
    cut = findings.setting.get("early_stopping_patience")
    few = f" (too few to tell: give --max-steps {FEW * 3})" if whole and max(whole) < FEW and not cut else ""
    return f"{start} rate {values('learning_rate')}, {warmup}, {budget}{few}, {seeds} seed{'s' if seeds > 1 else ''}"


def _values(findings: Findings, name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in findings.rows))


def write_report(findings: Findings, folder: Path) -> None:
    """Write results.csv and results.json, each picture as PNG, SVG and CSV, report.md and report.html.

    One process at a time: two commands that share a folder end together, and the page reads what was drawn for it.
    """
    from resseq.ablation.pictures import draw_accuracy, draw_curves, draw_gradients
    from resseq.training.checkpoint import write_text

    with open(folder / ".report.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # waits; the system frees it when the file is closed
        for draw in (draw_accuracy, draw_curves, draw_gradients):
            draw(findings, folder)
        with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(findings.rows[0]))
            writer.writeheader()
            writer.writerows(findings.rows)
        told = {**asdict(findings), "summary": summary(findings)}
        del told["curves"]  # they stand in curves.csv
        write_text(folder / "results.json", json.dumps(told, indent=1, allow_nan=False))
        blocks = _blocks(findings)
        write_text(folder / "report.md", _markdown(blocks))
        write_text(folder / "report.html", page(blocks, folder))


def _blocks(findings: Findings) -> list[Block]:
    """The report, from the question to the command."""
    data = data_name(findings.setting["data"]) if "data" in findings.setting else "several data sets"
    cells = sum(row["seconds"] or 0.0 for row in findings.rows)
    run = [list(findings.rows[0]), *([shown(value) for value in row.values()] for row in findings.rows)]
    setting = [["option", "value"], *([name, shown(value)] for name, value in findings.setting.items())]
    return [
        ("title", f"Which residual scheme trains at which depth on {data}?"),
        ("text", summary(findings)),
        ("picture", ("accuracy", "Test accuracy against depth.")),
        ("table", _grid(findings)),
        ("text", _legend(findings)),
        ("heading", "Before the first step"),
        (
            "text",
            "The norm of the loss's gradient over the weights of the first and of the last residual, before the "
            "first step, with geometric means over the seeds. What falls or rises with depth by orders of magnitude "
            "is a gradient that vanishes or explodes on its way: a usual reason for a deep model to be stuck or to "
            "diverge, though no proof that it was the reason here; nor is one that stays level a promise. Xiong et "
            "al. 2020 (arXiv:2002.04745) find that the last layer's gradient is the same at every depth for "
            "post-norm and falls with depth for pre-norm; that is why deep post-norm needs a warm-up.",
        ),
        ("picture", ("gradients", "Gradient norm at the start against depth.")),
        ("heading", "Training"),
        ("picture", ("curves", "Training loss against the step.")),
        ("heading", "Everything that was run"),
        ("table", run),
        ("heading", "What all cells share"),
        ("table", setting),
        ("heading", "To run it again"),
        (
            "text",
            f"{findings.seconds:.0f} seconds over all calls; the cells, one after the other, {cells:.0f} seconds.",
        ),
        ("code", findings.command),
    ]


def _markdown(blocks: list[Block]) -> str:
    parts = []
    for kind, content in blocks:
        if kind == "table":
            head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in content]
            lines = [head, ["---"] * len(head), *body]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        elif kind == "picture":
            parts.append(f"![{content[1]}]({content[0]}.png)")
        else:
            before, after = {"title": ("# ", ""), "heading": ("## ", ""), "code": ("```sh\n", "\n```")}.get(
                kind, ("", "")
            )
            parts.append(before + content + after)
    return "\n\n".join(parts) + "\n"
