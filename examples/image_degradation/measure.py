"""Does depth help a plain net, and a residual one? Plain-20, plain-56, ResNet-20 and ResNet-56 on a part of CIFAR-10.

    RESSEQ_DATA=FOLDER python examples/image_degradation/measure.py

RESSEQ_DATA holds cifar10/train.parquet and cifar10/test.parquet, with the columns image and label. The budget was fixed
before the run: the rows, steps and seeds below. The same command again goes on where it was stopped. What it gave is in
README.md and results.json beside this file; the cells stay in runs/image_degradation.
"""

import json
import os
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import resseq

HERE = Path(__file__).parent
RUNS = Path("runs/image_degradation")
ROWS = {"train": 4096, "test": 1024}
DEPTHS, SEEDS, STEPS = (20, 56), (0, 1, 2), 240


def take_part(source: Path, target: Path) -> None:
    """Rows at even distances, of each split, which keeps the classes even, with the class names."""
    target.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        table = pq.read_table(source / f"{split}.parquet")
        chosen = [i * len(table) // count for i in range(count)]
        pq.write_table(table.take(pa.array(chosen)), target / f"{split}.parquet")


def table(rows: list[dict[str, Any]]) -> str:
    """What README.md shows of the cells: of each net the mean over the seeds, its lowest and its highest."""
    lines = [
        "| net | training error, % | training loss | test accuracy, % | gradient norm, first block | last block |",
        "|---|---|---|---|---|---|",
    ]
    for net in dict.fromkeys((row["scheme"], row["depth"]) for row in rows):
        cell = [row for row in rows if (row["scheme"], row["depth"]) == net]
        told = [
            spread([100 * (1 - row["train_accuracy"]) for row in cell], ".1f"),
            spread([row["train_loss"] for row in cell], ".2f"),
            spread([100 * row["test_accuracy"] for row in cell], ".1f"),
            spread([row["gradient_norm_first"] for row in cell], ",.1f"),
            spread([row["gradient_norm_last"] for row in cell], ",.1f"),
        ]
        lines.append(f"| {'-'.join(map(str, net))} | {' | '.join(told)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def main() -> None:
    data = RUNS / "data"
    if not (data / "test.parquet").exists():
        take_part(Path(os.environ["RESSEQ_DATA"]) / "cifar10", data)
    found = resseq.ablate(
        task="image",
        data=str(data),
        schemes=("plain", "residual"),
        depths=DEPTHS,
        seeds=SEEDS,
        max_steps=STEPS,
        augment=False,
        device="cpu",
        output_dir=str(RUNS),
    )
    for name in ("results.json", "accuracy.png", "curves.png", "gradients.png"):
        shutil.copy(RUNS / name, HERE / name)
    print(found.table, table(json.loads((HERE / "results.json").read_text())["rows"]), sep="\n\n")


if __name__ == "__main__":
    main()
