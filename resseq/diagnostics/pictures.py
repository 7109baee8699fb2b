"""The pictures of an inspection: each statistic against depth."""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resseq.drawing import INK, clean, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from resseq.diagnostics.report import Report

COLOURS = ("#2f6690", "#c8553d", "#5b8e7d", "#8d6a9f", "#b08900", "#6b7280")
STREAM = {"stream_rms", "token_spread", "gradient_norm"}  # no single block's statistics
Panel = tuple[str, str, tuple[str, ...]]  # title, what the axis shows, statistics
PICTURES: dict[str, list[Panel]] = {
    "signal": [
        ("Stream and branch", "root mean square", ("stream_rms", "branch_rms")),
        ("What a branch adds", "‖branch‖ / ‖stream‖", ("branch_ratio",)),
        ("What a block changes", "‖output − input‖ / ‖input‖", ("update_ratio",)),
    ],
    "gradients": [
        ("Gradient of the stream", "norm", ("gradient_norm",)),
        ("Gradient of a block's weights", "norm", ("block_gradient_norm",)),
        ("Gain on the way back", "‖gradient before‖ / ‖after‖ the block", ("gradient_gain",)),
    ],
    "influence": [
        ("Block influence", "1 − cosine(input, output)", ("block_influence",)),
        ("Spread of the positions", "distance from their mean / norm", ("token_spread",)),
    ],
    "inside": [
        ("Attention", "entropy (nats)", ("attention_entropy",)),
        ("Dead units", "share behind a ReLU", ("dead_units",)),
    ],
    "lesions": [("Each block deleted", "lost without it", ("lesion_drop",))],
}


def draw_pictures(report: "Report", folder: Path) -> list[Path]:
    """Draw what was measured, as PNG, SVG, and CSV of the numbers shown. Returns: the PNG files."""
    from matplotlib.figure import Figure

    drawn = []
    for name, panels in PICTURES.items():
        panels = [panel for panel in panels if any(report.series(statistic) for statistic in panel[2])]
        if not panels:
            continue
        figure = Figure(figsize=(4.2 * max(len(panels), 1.6), 3.4), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_panel(axes, report, *panel)
        for suffix in ("svg", "png"):
            save(figure, folder / f"{name}.{suffix}")
        shown = [statistic for panel in panels for statistic in panel[2]]
        report.frame[report.frame["statistic"].isin(shown)].to_csv(folder / f"{name}.csv", index=False)
        drawn.append(folder / f"{name}.png")
    return drawn


def _draw_panel(axes: "Axes", report: "Report", title: str, unit: str, statistics: tuple[str, ...]) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = dict(zip(dict.fromkeys(report.kinds.values()), COLOURS * len(report.kinds), strict=False))
    values, places = [], set()
    for label, points in _lines(report, statistics).items():
        depths, heights = zip(*points, strict=True)
        values += filter(isfinite, heights)
        places.update(depths)
        if statistics == ("lesion_drop",):
            axes.bar(depths, heights, color=colours[label], label=label)
            axes.axhline(0, color=INK, linewidth=0.8)
        else:
            axes.plot(depths, heights, "o-", color=colours.get(label, INK), markersize=3.5, linewidth=1, label=label)
    if statistics == ("dead_units",):
        axes.set_ylim(-0.02, 1)
    elif values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    elif values and min(values) >= 0:
        axes.set_ylim(0, 1.08 * max(values) or 1)  # small differences look small
    axes.set(title=title, xlabel="depth (blocks)", ylabel=unit)
    if len(places) == 1:
        axes.set_xlim(min(places) - 0.5, min(places) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    clean(axes)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)


def _lines(report: "Report", statistics: tuple[str, ...]) -> dict[str, list[Any]]:
    """Points (depth, value) by the line that they stand on: the stream, or the blocks of one kind."""
    lines: dict[str, list[Any]] = {}
    for depth, module, statistic, value in report.rows:
        if statistic in statistics:
            label = "stream" if statistic in STREAM else report.kinds[module]
            lines.setdefault(label, []).append((depth, value))
    return {label: sorted(points) for label, points in lines.items()}
