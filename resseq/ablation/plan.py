"""What a grid would cost, before it is paid: its cells, their parameters, and about how long they take."""

import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from resseq.ablation.cell import Cell, read_record
from resseq.ablation.grid import PLURAL, AblateOptions, cells_of
from resseq.ablation.runner import batches_of, prepare_corpora, workers_of
from resseq.data.corpus import data_options
from resseq.options import ModelOptions, TrainOptions

if TYPE_CHECKING:
    from resseq.data.corpus import Corpus

STEPS = 3  # timed, of each shape


def plan(options: AblateOptions) -> str:
    """The grid, the parameters of each shape, and an estimate of the time from a few steps of each.

    Raises: ValueError for options that cannot be trained, and for bad data.
    """
    cells = cells_of(options)
    left = [cell for cell in cells if read_record(cell) is None]
    corpora = prepare_corpora(cells)
    shapes: dict[tuple[Any, ...], tuple[int, float]] = {}
    axes = ("scheme", "depth", "seed", *options.axes)
    lines = [f"{PLURAL.get(name, name)}: {' '.join(map(str, options.values(name)))}" for name in axes]
    waiting = [0.0]  # seconds of each cell that is not done
    for cell in cells:
        corpus = corpora[data_options(cell.options)]
        shape = _shape(cell.options)
        if shape not in shapes:
            shapes[shape] = parameters, seconds = _measure(cell, corpus)
            named = {name: getattr(cell.options, name) for name in ("scheme", "depth", "dim")}
            about = " ".join([cell.options.model, *(f"{name} {value}" for name, value in named.items() if value)])
            lines.append(f"{about:40} {parameters:>12,} parameters  {1000 * seconds:8.1f} ms a step")
        if cell in left:
            waiting.append(shapes[shape][1] * _steps(cell.options, corpus))
    workers = workers_of(options, len(left) or 1)
    seconds = max(sum(waiting) / workers, *waiting)
    lines.append(
        f"{len(cells)} cells, {len(left)} of them not done yet; with {workers} at a time "
        f"about {max(seconds / 60, 0.1) if left else 0:.1f} minutes"
    )
    return "\n".join(lines)


def _shape(options: TrainOptions) -> tuple[Any, ...]:
    """All that the time of a step follows from, but chance."""
    model = (getattr(options, each.name) for each in fields(ModelOptions) if each.name != "init")
    batch = (options.per_device_train_batch_size, options.gradient_accumulation_steps, options.bf16, options.optim)
    return *model, *batch, data_options(options)


def _steps(options: TrainOptions, corpus: "Corpus") -> float:
    """Steps of a run and of its validations, of which each text costs about a third of one in training."""
    rows, size = corpus.rows, options.per_device_train_batch_size * options.gradient_accumulation_steps
    batches = batches_of(options, rows["train"])
    steps = options.steps(batches)
    validations = max(1, steps // (options.eval_steps or options.steps_per_epoch(batches)))
    return steps + (validations * rows["validation"] + rows["test"]) / size / 3


def _measure(cell: Cell, corpus: "Corpus") -> tuple[int, float]:
    """Parameters of a model, and the seconds of an optimizer step on the first batches, after one that is not timed."""
    import torch
    import torch.nn.functional as F

    from resseq.ablation.start import first_batches
    from resseq.models import build_model
    from resseq.training.loop import choose_device, make_optimizer
    from resseq.training.metrics import on_device

    options, threads = cell.options, torch.get_num_threads()
    device = choose_device(options.device)
    torch.set_num_threads(cell.threads)
    model = build_model(options, len(corpus.classes), **corpus.reader.shape).to(device)
    optimizer = make_optimizer(model, options)
    begun = 0.0
    batches = first_batches(options, corpus, STEPS)
    for i, batch in enumerate([batches[0], *batches]):
        if i == 1:
            begun = time.monotonic()
        inputs, labels = on_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = F.cross_entropy(model(**inputs).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a GPU has done it by then
    seconds = (time.monotonic() - begun) / len(batches) * options.gradient_accumulation_steps
    torch.set_num_threads(threads)
    return sum(parameter.numel() for parameter in model.parameters()), seconds
