"""What an inspection found: a frame of numbers, a table, sentences, pictures and a page."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from resseq.diagnostics.pictures import draw_pictures
from resseq.diagnostics.signal import OUTPUT
from resseq.page import Block, page, shown

if TYPE_CHECKING:
    from pandas import DataFrame

# the statistics that stand in the table, and their headings
COLUMNS = {
    "stream_rms": "stream rms",
    "branch_ratio": "branch / stream",
    "update_ratio": "update / stream",
    "block_influence": "influence",
    "gradient_norm": "gradient",
    "gradient_gain": "gain",
    "attention_entropy": "entropy",
    "dead_units": "dead",
    "lesion_drop": "lesion drop",
}
# what stands there first where the stream is several tensors, of which nothing is measured
BRANCH_COLUMNS = {"branch_rms": "branch rms", "block_gradient_norm": "weights' gradient"}


@dataclass
class Report:
    """Statistics by depth. Two reports add up to one."""

    rows: list[tuple[int, str, str, float]]
    """depth, module, statistic, value"""
    kinds: dict[str, str] = field(default_factory=dict)
    """What each block is: the name of its type, of a Residual its sublayer's."""
    step: int = 0
    """The training step that the weights are of."""

    def __repr__(self) -> str:
        return "\n".join([self.text, *self.verdict])

    def __add__(self, other: "Report") -> "Report":
        return Report(self.rows + other.rows, self.kinds | other.kinds, self.step)

    @cached_property
    def frame(self) -> "DataFrame":
        """A row for each number: columns depth, module, step, statistic, value."""
        from pandas import DataFrame

        frame = DataFrame(self.rows, columns=["depth", "module", "statistic", "value"])
        frame.insert(2, "step", self.step)
        return frame

    def series(self, statistic: str) -> dict[int, float]:
        """The values of a statistic by depth; empty where it was not measured."""
        return {depth: value for depth, _, name, value in self.rows if name == statistic}

    @property
    def by_depth(self) -> dict[str, list[float | None]]:
        """Each statistic of the stream and of whole blocks, a value for each depth from 0 to the last that has one.

        None where a depth has none; statistics of single weights are left out.
        """
        whole = {statistic for _, module, statistic, _ in self.rows if module in self.kinds or module == OUTPUT}
        found = {statistic: self.series(statistic) for statistic in sorted(whole)}
        return {name: [series.get(depth) for depth in range(max(series) + 1)] for name, series in found.items()}

    @cached_property
    def table(self) -> "DataFrame":
        """A row for each depth, a column for each of the principal statistics."""
        columns = COLUMNS if self.series("stream_rms") else BRANCH_COLUMNS | COLUMNS
        wanted = self.frame[self.frame["statistic"].isin(list(columns))]
        table = wanted.pivot(index=["depth", "module"], columns="statistic", values="value")
        table = table[[name for name in columns if name in table]].reset_index()
        table.columns = [columns.get(name, name) for name in table.columns]
        table.insert(2, "block", [self.kinds.get(module, "") for module in table["module"]])
        return table

    @property
    def text(self) -> str:
        """The table for a terminal."""
        return self.table.to_string(index=False, float_format="{:.3g}".format, na_rep="")

    @property
    def verdict(self) -> list[str]:
        """What the numbers say, in sentences that claim no more than was measured."""
        finite = Report([row for row in self.rows if math.isfinite(row[-1])], self.kinds, self.step)
        return _on_faults(self) + [
            sentence
            for say in (_on_gradient, _on_stream, _on_branches, _on_shortcuts, _on_influence, _on_inside, _on_lesions)
            for sentence in say(finite)
        ]

    def save(self, folder: str | Path, title: str = "Inspection") -> Path:
        """Write ``inspect.csv`` (the frame), the pictures (PNG, SVG, and the CSV of what each shows) and inspect.html.

        Returns: the path of inspect.html, which holds everything in one file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.frame.to_csv(folder / "inspect.csv", index=False)
        blocks: list[Block] = [("title", title), *(("text", sentence) for sentence in self.verdict)]
        blocks += [("picture", (picture.stem, picture.stem)) for picture in draw_pictures(self, folder)]
        cells = [[shown(value) for value in row] for row in self.table.itertuples(index=False)]
        blocks.append(("table", [list(self.table), *cells]))
        file = folder / "inspect.html"
        file.write_text(page(blocks, folder), encoding="utf-8")
        return file


def _extremes(series: dict[int, float]) -> tuple[int, int]:
    """The depths of the least and of the greatest value."""
    return min(series, key=series.__getitem__), max(series, key=series.__getitem__)


def _range(series: dict[int, float], place: str) -> str:
    """The least and the greatest value, and where they are."""
    least, most = _extremes(series)
    low, high = (f"{series[depth]:.3g} ({place} {depth})" for depth in (least, most))
    return low if len(series) == 1 else f"{low} to {high}"


def _on_faults(report: Report) -> list[str]:
    faults = {}
    for depth, _, statistic, value in sorted(report.rows):
        if not math.isfinite(value) and statistic in COLUMNS:
            faults.setdefault(statistic, depth)
    said = [f"{COLUMNS[statistic]} (first at depth {depth})" for statistic, depth in faults.items()]
    return [f"Not finite: {', '.join(said)}."] if said else []


def _on_gradient(report: Report) -> list[str]:
    norms, gains = report.series("gradient_norm"), report.series("gradient_gain")
    if not gains:
        return []
    first, last = min(norms), max(norms)
    span = " to ".join(dict.fromkeys(f"{gain:.3g}" for gain in (min(gains.values()), max(gains.values()))))
    return [
        f"Gradient: its norm is {norms[first]:.3g} at depth {first} and {norms[last]:.3g} at depth {last}, a factor of "
        f"{norms[first] / norms[last]:.3g}; a block multiplies it by {span} on its way back."
        if norms[last]
        else "Gradient: none reaches the last block."
    ]


def _on_stream(report: Report) -> list[str]:
    rms, branch = report.series("stream_rms"), report.series("branch_ratio")
    if not rms:
        return []
    first, last = min(rms), max(rms)
    sentence = f"Stream: its root mean square goes from {rms[first]:.3g} at depth {first} to {rms[last]:.3g} at {last}."
    if branch:
        of = f" A branch is {_range(branch, 'depth')} of the stream that its block reads."
        sentence += of if any(branch.values()) else " Every branch is 0."
    return [sentence]


def _on_branches(report: Report) -> list[str]:
    rms = report.series("branch_rms")
    if not rms or report.series("stream_rms"):
        return []
    of = f"A branch's root mean square is {_range(rms, 'block')}."
    return [f"Stream: several tensors, of which nothing is measured. {of}"]


def _on_shortcuts(report: Report) -> list[str]:
    product = report.series("skip_product")
    if 0 not in product or all(abs(value - 1) < 1e-6 for value in product.values()):
        return []
    return [
        f"Shortcuts: their factors multiply to {product[0]:.3g} from the first block to the last; norms not counted."
    ]


def _on_influence(report: Report) -> list[str]:
    influence = report.series("block_influence")
    if len(influence) < 2:
        return []
    least, most = _extremes(influence)
    if influence[most] < 1e-6:  # rounding
        return ["Influence: no block turns the stream."]
    return [
        f"Influence: block {most} turns the stream most (1 − cosine {influence[most]:.3g}), block {least} least "
        f"({influence[least]:.3g})."
    ]


def _on_inside(report: Report) -> list[str]:
    entropy, dead = report.series("attention_entropy"), report.series("dead_units")
    said = []
    if entropy:
        low, high = _extremes(entropy)
        said.append(
            f"Attention: its entropy is {entropy[low]:.3g} nats (block {low}) to {entropy[high]:.3g} (block {high}), "
            f"as if attention were spread evenly over {math.exp(entropy[low]):.3g} to {math.exp(entropy[high]):.3g} "
            f"positions."
        )
    if dead:
        _, most = _extremes(dead)
        said.append(f"Dead units: {dead[most]:.1%} of those behind a ReLU at most (block {most}), in this batch.")
    return said


def _on_lesions(report: Report) -> list[str]:
    drops = report.series("lesion_drop")
    if not drops:
        return []
    _, most = _extremes(drops)
    harmless = sum(drop <= 0.01 + 1e-9 for drop in drops.values())  # 0.85 - 0.84 is a little more than 0.01
    dearest = f"; the most costly is block {most} ({drops[most]:.3g})" if drops[most] > 0 else ""
    left = len(report.kinds) - len(drops)
    of = f"{len(drops)} blocks" + (f" ({left} more cannot be deleted)" if left else "")
    return [f"Lesions: deleting a single block costs at most 0.01 for {harmless} of {of}{dearest}."]
