"""What is told of a finished run: its model card and its pictures."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resseq.options import TrainOptions, data_name

if TYPE_CHECKING:
    from resseq.data.corpus import Corpus

BASELINES = {
    "linear": "linear bag of tokens",
    "pixels": "linear map of 8 x 8 pixels",
    "majority": "majority class",
}


def model_card(options: TrainOptions, corpus: "Corpus", result: dict[str, Any]) -> str:
    """What the model is, what it learnt from and how well, in a page."""
    rows = ", ".join(
        f"{count:,} {split}{' (carved)' if split in corpus.carved else ''}" for split, count in result["rows"].items()
    )
    test, validation = result["test"], result["validation"]
    name, inputs = data_name(options.data), corpus.reader.inputs
    beside = "\n".join(f"| {BASELINES[each]}, test | {value:.4f} | | |" for each, value in corpus.baselines.items())
    return f"""---
library_name: resseq
pipeline_tag: {options.task}-classification
metrics: [accuracy, f1]
---

# {Path(options.model).name} for {name}

A classifier of {inputs}, of {result["parameters"]:,} parameters, {_origin(options)} with
resseq, seed {options.seed}, {result["steps"]:,} steps in {result["seconds"]:.0f} s.

| | accuracy | macro-F1 | loss (nats) |
|---|---|---|---|
| test | {test["accuracy"]:.4f} | {test["macro_f1"]:.4f} | {test["loss"]:.4f} |
{beside}
| validation, which chose the weights of step {validation["step"]:,} | {validation["accuracy"]:.4f} | \
{validation["macro_f1"]:.4f} | {validation["loss"]:.4f} |

- Data: `{name}`, {rows} {inputs}; classes: {", ".join(corpus.classes)}.
{_input_card(options, corpus.reader)}

![learning curve](learning_curve.png)
![confusion matrix](confusion_matrix.png)
"""


def _origin(options: TrainOptions) -> str:
    if options.fine_tunes:
        return f"fine-tuned from `{Path(options.model).name}`"
    scheme = f" --scheme {options.scheme}" if options.scheme else ""
    return f"trained from scratch as `--model {options.model}{scheme}`"


def _input_card(options: TrainOptions, reader: Any) -> str:
    """What the model reads, and how it is used."""
    if options.task == "image":
        moved = "mirrored and shifted at random in training" if options.augment else "as they are"
        return (
            f"- Images are {reader.size} x {reader.size}, RGB, {moved}.\n"
            f'- Use: `resseq predict FOLDER paths.txt`, one path to a line, or `resseq.predict(FOLDER, ["a.png"])`.'
        )
    case = ", lower case" if options.lowercase else ""
    tokenizer = "the checkpoint's tokenizer" if options.fine_tunes else f"{options.tokenizer}{case}"
    line, inputs = "one text", '"a text", "another"'
    if reader.separator == "\t":
        line, inputs = "two texts with a tab between", '("a text", "its second")'
    return (
        f"- Texts are cut at {reader.max_length} tokens ({tokenizer}).\n"
        f"- Use: `resseq predict FOLDER texts.txt`, {line} to a line, or `resseq.predict(FOLDER, [{inputs}])`."
    )


def draw_run(folder: Path, kept: int, confusion: list[list[int]], corpus: "Corpus") -> None:
    """learning_curve.png and confusion_matrix.png."""
    from resseq.training.pictures import draw_confusion, draw_learning_curve

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    draw_learning_curve(rows, kept, folder / "learning_curve.png")
    draw_confusion(confusion, corpus.classes, corpus.reader.inputs, folder / "confusion_matrix.png")
