"""Every scheme, one argument apart: what trains on TREC questions, how it stands at the start, what it keeps and takes.

    RESSEQ_DATA=FOLDER python examples/scheme_comparison/measure.py

RESSEQ_DATA holds the folder trec. Encoders 64 wide with 4 heads, 300 steps of 32 questions, AdamW at 0.001 without
warm-up, Xavier start, two seeds; post-norm, pre-norm and DeepNorm from BERT's start too: fixed before the first run.
The same command again goes on where it was stopped. What it gave is in README.md, results.json and accuracy.png beside
this file; the cells stay in runs/scheme_comparison. The time of a step is that of tests/benchmarks/schemes.py.
"""

import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

import resseq
from resseq.drawing import INK, clean, save

HERE = Path(__file__).parent
RUNS = Path("runs/scheme_comparison")
STEP_TIMES = HERE.parent.parent / "tests" / "benchmarks" / "schemes.json"
DEPTHS, SEEDS, STEPS = (6, 24), (0, 1), 300
GRIDS: dict[str, dict[str, Any]] = {
    "xavier": {"schemes": tuple(resseq.SCHEMES)},
    "normal": {"schemes": ("post", "pre", "deepnorm"), "inits": "normal"},
}
Rows = list[dict[str, Any]]


def by_cell(rows: Rows) -> dict[tuple[str, str, int], Rows]:
    """The seeds of each start, scheme and depth."""
    cells: dict[tuple[str, str, int], Rows] = {}
    for row in rows:
        cells.setdefault((row["init"], row["scheme"], row["depth"]), []).append(row)
    return cells


def table(rows: Rows) -> str:
    """What README.md shows of the cells, a line for each scheme and depth."""
    lines = [
        "| scheme | layers | test accuracy, % | gradient norm, first | last | stream growth | bytes saved / pre's "
        "| step / pre's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cells, steps = by_cell(rows), json.loads(STEP_TIMES.read_text())["eager"]
    for (init, scheme, depth), cell in cells.items():
        reached = ", ".join(
            f"{100 * row['test_accuracy']:.1f}" if row["status"] == "finished" else row["status"] for row in cell
        )
        start = [[row[name] for row in cell] for name in ("gradient_norm_first", "gradient_norm_last", "stream_growth")]
        starts = " | ".join("not finite" if None in values else f"{mean(values):.2g}" for values in start)
        saved = [mean(row["saved_bytes"] for row in cells["xavier", name, depth]) for name in (scheme, "pre")]
        name = f"`{scheme}`" if init == "xavier" else f"`{scheme}`, {init} start"
        lines.append(
            f"| {name} | {depth} | {reached} | {starts} | {saved[0] / saved[1]:.2f} | {steps[scheme]['ratio']:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: Rows, baselines: dict[str, float]) -> None:
    """The schemes one below the other, the best of 24 layers on top; a mark for each net."""
    from matplotlib.figure import Figure

    cells = by_cell([row for row in rows if row["init"] == "xavier"])
    schemes = list(dict.fromkeys(scheme for _, scheme, _ in cells))
    schemes.sort(key=lambda scheme: mean(row["test_accuracy"] or 0.0 for row in cells["xavier", scheme, DEPTHS[-1]]))
    looks = {
        DEPTHS[0]: {"marker": "o", "color": "#E69F00", "markerfacecolor": "none"},
        DEPTHS[1]: {"marker": "o", "color": "#0072B2"},
        "stuck": {"marker": "x", "color": INK},
        "unstable": {"marker": "$!$", "color": INK},
        "diverged": {"marker": "1", "color": INK},
    }
    figure = Figure(figsize=(7.2, 8.6), layout="constrained")
    axes = figure.subplots()
    for name, value in baselines.items():
        axes.axvline(100 * value, color=INK, linewidth=0.8, linestyle=":")
        label = {"majority": "majority class", "linear": "linear bag of tokens"}[name]
        beside = {"ha": "center", "va": "bottom", "backgroundcolor": "white", "fontsize": 8, "color": INK}
        axes.text(100 * value, len(schemes) - 0.2, label, **beside)
    for (_, scheme, depth), cell in cells.items():
        for row in cell:
            at = 100 * (row["test_accuracy"] or 0.0), schemes.index(scheme) + (0.18 if depth == DEPTHS[0] else -0.18)
            if row["status"] != "diverged":
                axes.plot(*at, linestyle="", markersize=6, **looks[depth])
            if row["status"] != "finished":
                axes.plot(*at, linestyle="", markersize=9, **looks[row["status"]])
    for look in [*DEPTHS, *dict.fromkeys(row["status"] for row in rows if row["status"] != "finished")]:
        axes.plot([], [], linestyle="", label=f"{look} layers" if look in DEPTHS else look, **looks[look])
    axes.set(yticks=range(len(schemes)), yticklabels=schemes, xlim=(-3, 100), xlabel="test accuracy, %")
    axes.set_ylim(-0.7, len(schemes) + 0.6)
    clean(axes)
    figure.legend(loc="outside upper center", ncols=len(looks), frameon=False)
    save(figure, HERE / "accuracy.png")


def main() -> None:
    rows, baselines = [], {}
    for name, grid in GRIDS.items():
        resseq.ablate(
            data=os.path.join(os.environ["RESSEQ_DATA"], "trec"),
            depths=DEPTHS,
            seeds=SEEDS,
            max_steps=STEPS,
            device="cpu",
            output_dir=RUNS / name,
            **grid,
        )
        found = json.loads((RUNS / name / "results.json").read_text())
        rows += found["rows"]
        baselines = found["baselines"]
    (HERE / "results.json").write_text(json.dumps({"rows": rows, "baselines": baselines}, indent=1) + "\n")
    draw(rows, baselines)
    print(table(rows))


if __name__ == "__main__":
    main()
