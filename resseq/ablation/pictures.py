"""The pictures of a grid, each as PNG and SVG with the numbers that it draws as CSV."""

import csv
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resseq.ablation.report import Findings, accuracies, layers
from resseq.card import BASELINES
from resseq.drawing import INK, clean, literal, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#8a8a8a"
# Okabe and Ito's palette, which the colour-blind can tell apart; markers do the same in grey print
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>hpd"
MARKS = {"stuck": "x", "unstable": "$!$", "diverged": "1", "failed": "2"}


def _looks(findings: Findings) -> dict[str, dict[str, Any]]:
    """Each line's colour and marker."""
    return {
        line: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, line in enumerate(findings.lines)
    }


def _mark(axes: "Axes", status: str, *place: float, **more: Any) -> None:
    """The mark of what went wrong; without a place, its entry in the legend."""
    look = {"color": INK, "linestyle": "", "markersize": 9, "markeredgewidth": 1.8, "clip_on": False}
    axes.plot(*([value] for value in place or (math.nan, math.nan)), marker=MARKS[status], **{**look, **more})


def _legend(figure: "Figure", axes: "Axes", seen: set[str]) -> None:
    """Above the panels: the lines, and the faults that were seen."""
    for status in MARKS:
        if status in seen:
            _mark(axes, status, label=status)
    handles, labels = axes.get_legend_handles_labels()
    width = max(map(len, labels), default=0) + 7
    columns = max(1, min(len(labels), int(13 * figure.get_figwidth()) // width))
    figure.legend(
        handles, [literal(label) for label in labels], loc="outside upper center", ncols=columns, frameon=False
    )


def _save(figure: "Figure", folder: Path, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    for suffix in ("svg", "png"):
        save(figure, folder / f"{name}.{suffix}")
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def _depth_axis(axes: "Axes", depths: list[int]) -> None:
    """Ticks at the depths of the grid, by powers of two if they span several."""
    from matplotlib.ticker import FixedLocator, NullLocator

    least, most = depths[0], depths[-1]
    if most > 4 * least:
        axes.set_xscale("log", base=2)
        axes.set_xlim(least * (most / least) ** -0.08, most * (most / least) ** 0.08)
    else:
        margin = 0.08 * (most - least) or 1
        axes.set_xlim(least - margin, most + margin)
    axes.xaxis.set_major_locator(FixedLocator(depths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.set_xlabel("depth (layers)")


def draw_accuracy(findings: Findings, folder: Path) -> None:
    """Test accuracy against depth: a line through the means over the seeds, a dot a seed, a mark where one went wrong.

    What has no accuracy is marked at the foot.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import offset_copy

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    rows, looks = [], _looks(findings)
    for i, (line, look) in enumerate(looks.items()):
        # side by side, so that none hides another
        aside = (i - (len(looks) - 1) / 2) * min(5.0, 40 / len(looks))
        place: dict[str, Any] = {
            "transform": offset_copy(axes.transData, figure, x=aside, units="points"),
            "clip_on": False,  # whole at 0 and at 100 %
        }
        means = []
        for depth in findings.depths:
            chosen = findings.chosen(line, depth)
            values = accuracies(chosen)
            means.append(statistics.mean(values) if values else math.nan)  # a gap, not a line across it
            axes.vlines(depth, min(values, default=0), max(values, default=0), look["color"], alpha=0.5, **place)
            axes.plot([depth] * len(values), values, linestyle="", alpha=0.4, markersize=4, **look, **place)
            for row in chosen:
                accuracy = None if row["test_accuracy"] is None else 100 * row["test_accuracy"]
                rows.append([line, depth, row["seed"], row["status"], accuracy])
                if row["status"] != "finished":
                    _mark(axes, row["status"], depth, accuracy or 0.0, color=look["color"], zorder=3, **place)
        axes.plot(findings.depths, means, linewidth=2, markersize=7, label=line, **look, **place)
    _depth_axis(axes, findings.depths)
    _references(axes, findings)
    clean(axes)
    axes.set(ylabel="test accuracy (%)", ylim=(0, 100))
    _legend(figure, axes, {status for *_, status, _ in rows})
    _save(figure, folder, "accuracy", ["scheme", "depth", "seed", "status", "test_accuracy"], rows)


def _references(axes: "Axes", findings: Findings) -> None:
    """A dotted line for each baseline, with its name beside the panel: the lower one's below it, the other's above."""
    for name, value in findings.baselines.items():
        axes.axhline(100 * value, color=GREY, linewidth=1, linestyle=":", zorder=0)
        text = f"{BASELINES[name]} {100 * value:.0f} %".replace(" of ", "\nof ").replace(" class ", "\nclass ")
        align = "top" if value == min(findings.baselines.values()) else "bottom"
        place = {"xy": (1.01, 100 * value), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
        axes.annotate(text, **place, va=align, fontsize=8, color=INK)


def draw_curves(findings: Findings, folder: Path) -> None:
    """Training loss against the step, a panel a depth, a line a seed; what rises far above the start is cut off."""
    from matplotlib.figure import Figure

    depths = findings.depths
    columns = len(depths) if len(depths) <= 3 else math.ceil(math.sqrt(len(depths)))
    lines = math.ceil(len(depths) / columns)
    figure = Figure(figsize=(1.6 + 3.1 * columns, 0.6 + 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    rows: list[list[Any]] = []
    looks, ends = _looks(findings), []
    thin = len({row["seed"] for row in findings.rows}) > 1
    for index, (axes, depth) in enumerate(zip(panels, depths, strict=False)):
        for i, (line, look) in enumerate(looks.items()):
            style = {**look, "linewidth": 0.9 if thin else 1.5, "markersize": 4}
            axes.plot([], [], **style, label=line)
            for row in findings.chosen(line, depth):
                curve = findings.curves.get(row["cell"], [])
                rows += [[line, depth, row["seed"], step, loss] for step, loss in curve]
                markers = list(range(i * len(curve) // (4 * len(looks)), len(curve), max(1, len(curve) // 4)))
                axes.plot([step for step, _ in curve], [loss for _, loss in curve], **style, markevery=markers)
                if curve and row["status"] == "diverged":
                    ends.append((axes, *curve[-1], look["color"]))
        axes.set_title(layers(depth), fontsize=10)
        if not any(at == depth and math.isfinite(loss) for _, at, _, _, loss in rows):
            axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", color=INK)
        axes.tick_params(labelbottom=index + columns >= len(depths))  # also where the row below ends before
        clean(axes)
    for axes in panels[len(depths) :]:
        axes.set_visible(False)
    if losses := [loss for *_, loss in rows if math.isfinite(loss)]:
        starts = [curve[0][1] for curve in findings.curves.values() if curve and math.isfinite(curve[0][1])]
        panels[0].set_ylim(0, 1.05 * min(max(losses), 1.5 * max(starts, default=math.inf)))
    else:
        panels[0].set(xticks=[], yticks=[])  # of all panels, which share their axes
    for axes, step, loss, colour in ends:
        _mark(axes, "diverged", step, min(loss, axes.get_ylim()[1]), color=colour, zorder=3)  # on the edge, if cut off
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("training loss (nats)", fontsize=10)
    _legend(figure, panels[0], {"diverged"} if ends else set())
    _save(figure, folder, "curves", ["scheme", "depth", "seed", "step", "loss"], rows)


def draw_gradients(findings: Findings, folder: Path) -> None:
    """Gradient norm before the first step against depth: of the first residual and of the last."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panels = dict(zip(("first", "last"), figure.subplots(1, 2, sharey=True), strict=True))
    rows = []
    for name, axes in panels.items():
        zeros = []
        for line, look in _looks(findings).items():
            means = []
            for depth in findings.depths:
                norms = [row[f"gradient_norm_{name}"] for row in findings.chosen(line, depth)]
                norms = [norm for norm in norms if norm is not None]
                mean = statistics.geometric_mean(norms) if norms and min(norms) > 0 else 0.0
                means.append(mean or math.nan)
                rows += [[line, depth, name, mean]] if norms else []
                zeros += [line] if norms and not mean else []
            axes.plot(findings.depths, means, linewidth=2, markersize=6, label=line, **look)
        if zeros:
            text = literal(f"zero: {', '.join(dict.fromkeys(zeros))}")
            axes.text(0.03, 0.03, text, transform=axes.transAxes, fontsize=8, color=INK)
        axes.set_title(f"{name} residual", fontsize=10)
        _depth_axis(axes, findings.depths)
        clean(axes)
    _log_axis(panels["first"], [mean for *_, mean in rows if mean])
    panels["first"].set_ylabel("gradient norm at the start")
    _legend(figure, panels["first"], set())
    _save(figure, folder, "gradients", ["scheme", "depth", "residual", "gradient_norm"], rows)


def _log_axis(axes: "Axes", values: list[float]) -> None:
    """Whole powers of ten, so that there are always two with a name."""
    if not values:  # every cell failed before it could be measured
        return
    axes.set_yscale("log")
    axes.set_ylim(10.0 ** math.floor(math.log10(0.9 * min(values))), 10.0 ** math.ceil(math.log10(1.1 * max(values))))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
