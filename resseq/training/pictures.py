"""The pictures of a training run."""

from pathlib import Path
from typing import Any

from resseq.drawing import INK, clean, literal, save

TRAIN, VALIDATION = "#9db4c0", "#c8553d"
LONGEST = 25  # characters of a name


def draw_learning_curve(rows: list[dict[str, Any]], kept: int, path: Path) -> None:
    """Loss and accuracy against the step, for training batches and validation; a line at the step that was kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name, title in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("Loss (nats)", "Accuracy"), strict=True):
        train = [(row["step"], row[name]) for row in rows if name in row]
        validation = [(row["step"], row[f"validation_{name}"]) for row in rows if f"validation_{name}" in row]
        axes.plot(*zip(*train, strict=True) if train else ([], []), color=TRAIN, linewidth=1, label="training batches")
        axes.plot(*zip(*validation, strict=True), color=VALIDATION, marker="o", markersize=3, label="validation")
        axes.axvline(kept, color=INK, linewidth=0.8, linestyle=":", label=f"weights kept (step {kept:,})")
        axes.set(title=title, xlabel="step")
        clean(axes)
    figure.axes[0].legend(frameon=False)
    save(figure, path)


def draw_confusion(confusion: list[list[int]], classes: list[str], inputs: str, path: Path) -> None:
    """Who was taken for whom: each row a class, its inputs shared out over the classes given, in per cent.

    Args:
        inputs: what the rows count: "texts" or "images".
    """
    from matplotlib.figure import Figure

    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    # beyond 40 classes, names and numbers would be too small to read
    names = [_shown(name) for name in classes] if len(classes) <= 40 else []
    size = min(2.2 + 0.5 * len(classes), 14) + 0.1 * max(map(len, names), default=0)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle(f"Test {inputs} (% of each class)", fontsize=11)  # over the names too: the axes may be narrower
    if names:
        axes.set_xticks(range(len(classes)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(classes)), names)
    if len(classes) <= 20:
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                if confusion[i][j]:
                    axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color="w" if share > 0.5 else INK)
    save(figure, path)


def _shown(name: str) -> str:
    """A class's name beside the picture: cut where it is long."""
    name = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    return literal(name)
