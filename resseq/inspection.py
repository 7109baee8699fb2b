"""Inspect a run folder, or a model before anything is trained: the statistics, and what each residual is worth."""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from resseq.options import ModelOptions, check_values, flag_of, from_python
from resseq.pretrained import HUB

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from resseq.diagnostics import Report

OF_DATA = {"data", "split", "text_column", "image_column", "label_column", "texts"}  # what a run alone reads
BATCH = 64  # texts in the batch whose signal and gradients are measured
FRESH_IMAGES: dict[str, Any] = {"num_classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3, "augment": False}
FRESH: dict[str, Any] = {"vocab_size": 1000, "num_classes": 10, "max_length": 64}  # of a model that has seen no data


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions):
    """Measure, block by block, the signal, the gradient and the cost of deleting the block.

    With RUN: the trained model on held-out data. Without: a fresh model with these options on random input, and
    nothing deleted.
    """

    run: Annotated[str | None, Positional, arg(metavar="[RUN]")] = None
    """The run folder, or hf://OWNER/NAME."""
    data: str | None = None
    """As for evaluate; the run's own data unless given."""
    split: str = "validation"
    """Which split of the data; the test split is best left to the final measurement."""
    text_column: str | tuple[str, ...] | None = None
    """The column of the texts."""
    image_column: str | None = None
    """The column of the images."""
    label_column: str | None = None
    """The column of the labels."""
    texts: int = 512
    """Held-out texts at most, drawn by the seed; every lesion is tried on all of them."""
    seed: int = 0
    """Which texts; of a fresh model, its weights and tokens."""
    output_dir: str | None = None
    """Where pictures, tables and inspect.html go; inspect in the run folder unless given."""
    device: str = "auto"
    """auto, or a torch device."""

    def __post_init__(self) -> None:
        check_values(self)
        for name in (field.name for field in fields(self) if getattr(self, field.name) != field.default):
            value, flag = getattr(self, name), flag_of(name)
            if self.run is None and name in OF_DATA:
                raise ValueError(
                    f"inspect: only a trained run reads data; got {flag} {value} without a run. Give the run folder."
                )
            if self.run is not None and name in ModelOptions.__dataclass_fields__:
                raise ValueError(
                    f"inspect: a trained run already fixes its model; got {self.run} with {flag} {value}. "
                    f"Leave out {flag}, or leave out the run."
                )

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        if self.run is not None:
            return Path(str(self.run).removeprefix(HUB)) / "inspect"
        depth = f"depth{self.depth}" if self.depth else None
        return Path("runs") / "-".join(filter(None, ["inspect", self.model, self.scheme, depth]))


def inspect(run: str | os.PathLike[str] | None = None, **options: Any) -> "Report":
    """Inspect a trained run, or a fresh model; the options are those of ``resseq inspect``, fields of InspectOptions.

    The signal and the gradients of the cross-entropy are those of one batch of 64 texts, in eval mode for a run and in
    training mode for a fresh model. Writes ``options.folder``: inspect.html, inspect.csv, pictures.
    For a model in memory: ``resseq.diagnostics.inspect``.

    Raises: ValueError for bad options, a folder without a finished run, and bad data.
    """
    return inspect_with(from_python(InspectOptions, {"run": None if run is None else os.fspath(run), **options}))


def inspect_with(options: InspectOptions) -> "Report":
    """``inspect`` with its options in one value."""
    report = _fresh(options) if options.run is None else _trained(options.run, options)
    report.save(options.folder, options.run or f"{options.model} {options.scheme or ''} before training")
    return report


def _trained(run: str, options: InspectOptions) -> "Report":
    """The signal and the gradients of a trained model on held-out texts, and its lesions."""
    import torch

    from resseq import diagnostics
    from resseq.run import Run, evaluation_batches, held_out
    from resseq.training.metrics import measure

    loaded = Run.load(run, options.device)
    columns = {name: getattr(options, name) for name in ("text_column", "image_column", "label_column")}
    _, (inputs, labels) = held_out(loaded, options.data, options.split, **columns)
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(options.seed))[
        : options.texts
    ].tolist()
    examples = loaded.reader.encode([inputs[i] for i in chosen], [labels[i] for i in chosen])
    batches = evaluation_batches(examples, BATCH)

    def accuracy(_: "nn.Module") -> float:  # the blocks are taken out of the run's own model
        return measure(loaded.logits_of(batches)).accuracy

    batch = examples.collate([examples[i] for i in range(min(BATCH, len(chosen)))])
    report = _inspect_batch(loaded.model, batch, loaded.device)
    report += diagnostics.lesion_curve(loaded.model, accuracy)
    report.step = json.loads((loaded.folder / "result.json").read_text())["validation"]["step"]
    return report


def _fresh(options: InspectOptions) -> "Report":
    """The signal and the gradients of a model before its first step: random tokens, or pixels, show them as well."""
    import torch

    from resseq.models import build_model
    from resseq.options import IMAGE_MODELS
    from resseq.training.loop import choose_device, make_ready

    torch.manual_seed(options.seed)
    device = choose_device(options.device)
    if options.model in IMAGE_MODELS:
        model = build_model(options, **FRESH_IMAGES).to(device)
        images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8, device=device)
        labels = torch.randint(FRESH_IMAGES["num_classes"], (BATCH,), device=device)
        batch = {"images": images, "labels": labels}
    else:
        model = build_model(options, **FRESH).to(device)
        ids = torch.randint(FRESH["vocab_size"], (BATCH, FRESH["max_length"]), device=device)
        labels = torch.randint(FRESH["num_classes"], (BATCH,), device=device)
        batch = {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "labels": labels}
    make_ready(model, batch, device)
    return _inspect_batch(model, batch, device)


def _inspect_batch(model: "nn.Module", batch: dict[str, "Tensor"], device: "torch.device") -> "Report":
    from torch.nn.functional import cross_entropy

    from resseq import diagnostics
    from resseq.training.metrics import on_device

    inputs, labels = on_device(batch, device)
    return diagnostics.inspect(model, loss=lambda logits: cross_entropy(logits, labels), **inputs)
