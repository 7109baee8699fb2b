"""Train a classifier of texts or images, evaluate it, predict with it: the three verbs on a run folder."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from resseq.card import draw_run, model_card
from resseq.data.text import TextOptions
from resseq.options import TEXT_MODELS, TrainOptions, flag_of, from_python
from resseq.run import (
    FORMAT,
    WHOLE,
    Run,
    RunFolder,
    check_same_data,
    checkpoint_reader,
    evaluation_batches,
    finished_result,
    held_out,
    read_config,
)

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from resseq.data.batching import Images, Tokens
    from resseq.data.corpus import Corpus
    from resseq.data.readers import TextReader
    from resseq.models.bert import Bert
    from resseq.training.loop import Trainer

BLOCK = 1 << 20  # bytes read at once from a file to predict
CHUNK = 1000  # texts or images taken at once


def train(**options: Any) -> dict[str, Any]:
    """Train a classifier; the options are those of ``resseq train``, fields of TrainOptions.

    The validation split chooses the weights; the test split is read once, for them.

    Returns: what stands in the run folder's ``result.json``: output_dir, validation and test measurements, steps,
        seconds, parameters.
    Raises: ValueError for bad options or data, and for a run folder that is already in use; training.loop.Diverged.
    """
    from resseq.models import spell_out
    from resseq.training.checkpoint import claim

    given = from_python(TrainOptions, options)
    spelt = spell_out(replace(given, output_dir=str(given.folder)))
    with claim(spelt.folder):
        return train_with(spelt)


def train_with(options: TrainOptions, corpus: "Corpus | None" = None) -> dict[str, Any]:
    """``train`` with all options spelt out, in a folder that is claimed; on a corpus that is there, if one is given."""
    from resseq.data.corpus import data_options, prepare
    from resseq.models import check_model

    finished = finished_result(options)
    if finished is not None:
        if corpus is None:
            held_out(Run.load(options.folder, "cpu"), None, "test")  # raises where the data is not what it was
        return finished
    reader, encoder = open_checkpoint(options) if options.fine_tunes else (None, None)
    check_model(options, reader and reader.checkpoint)
    return _fit(options, corpus or prepare(data_options(options), reader), encoder)


def open_checkpoint(options: TrainOptions) -> tuple["TextReader", "Bert | None"]:
    """How the checkpoint that --model names reads texts, and its encoder; or what the run folder kept of it, and None.

    Raises: ValueError if --model names nothing, if the checkpoint is not a BERT, and for options that a checkpoint
        ignores.
    """
    from resseq.data.tokenizer import load_pretrained_tokenizer, load_tokenizer, separator_of
    from resseq.models.bert import Bert
    from resseq.training.checkpoint import newest_checkpoint

    if newest_checkpoint(options.folder) is not None:  # a run that is resumed needs no one else's files
        pretrained = read_config(options.folder)["pretrained"]
        return checkpoint_reader(options, load_tokenizer(options.folder / "tokenizer.json"), pretrained), None
    if not Path(options.model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.model):
        raise ValueError(
            f"train: --model is {', '.join(TEXT_MODELS)}, a checkpoint's folder or its id on the hub, OWNER/NAME; "
            f"got --model {options.model}. Use transformer, a folder that exists, or google-bert/bert-base-uncased."
        )
    for name in ("tokenizer", "vocab_size", "lowercase"):
        if (value := getattr(options, name)) != getattr(TextOptions, name):
            raise ValueError(f"train: a checkpoint has its own tokenizer; got {flag_of(name)} {value}. Leave it out.")
    encoder, tokenizer = Bert.from_pretrained(options.model), load_pretrained_tokenizer(options.model)
    if options.max_length != TextOptions.max_length and options.max_length > encoder.options["max_length"]:
        raise ValueError(
            f"train: texts may be as long as the checkpoint's; got --max-length {options.max_length}. "
            f"Use {encoder.options['max_length']} or less."
        )
    pretrained = {"encoder": encoder.options, "separator": separator_of(tokenizer)}
    return checkpoint_reader(options, tokenizer, pretrained), encoder


def _fit(options: TrainOptions, corpus: "Corpus", encoder: "Bert | None") -> dict[str, Any]:
    import torch

    from resseq.models import build_model
    from resseq.training.checkpoint import write_text
    from resseq.training.loop import Trainer, choose_device

    folder, splits = options.folder, corpus.splits
    if (folder / "config.json").exists():
        check_same_data(folder, corpus)
    torch.manual_seed(options.seed)
    device = choose_device(options.device)
    model: Any = build_model(options, len(corpus.classes), **corpus.reader.shape)
    if encoder:
        model.encoder.load_state_dict(encoder.state_dict())
    model.to(device)
    validation = evaluation_batches(splits["validation"], options.per_device_eval_batch_size)
    weights = corpus.class_weights(options)
    trainer = Trainer(model, _training_batches(splits["train"], options), validation, options, folder, device, weights)
    config = {
        "format": FORMAT,
        "options": asdict(options),
        "classes": corpus.classes,
        "fingerprint": corpus.fingerprint,
    }
    if options.fine_tunes:
        config["pretrained"] = corpus.reader.shape  # with it the folder needs the checkpoint no more
    write_text(folder / "config.json", json.dumps(config, indent=2))
    write_text(folder / f"{corpus.reader.name}.json", corpus.reader.content)
    if trainer.resume() == 0:
        trainer.log_file.unlink(missing_ok=True)  # of a run that was stopped before its first checkpoint
        sampler: Any = trainer.loader.batch_sampler
        trainer.log(**corpus.rows, truncated=splits["train"].truncated, padding=sampler.padding())
    return _finish(trainer, trainer.train(), options, corpus)


def _finish(trainer: "Trainer", kept: dict[str, Any], options: TrainOptions, corpus: "Corpus") -> dict[str, Any]:
    """Measure the test split and leave the run folder whole."""
    from resseq.training.checkpoint import save_weights, write_manifest, write_text
    from resseq.training.metrics import logits_of, measure

    folder, model = options.folder, trainer.model
    test = evaluation_batches(corpus.splits["test"], options.per_device_eval_batch_size)
    measured = measure(logits_of(model, test, trainer.device, options.bf16))
    result = {
        "output_dir": str(folder),
        "validation": kept,
        "test": measured.scalars(),
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": corpus.rows,
        "carved": list(corpus.carved),
        "baselines": corpus.baselines,
        "truncated": corpus.splits["train"].truncated,
        "repeated": corpus.repeated,
    }
    save_weights(folder / "model.safetensors", model.state_dict())
    write_text(folder / "README.md", model_card(options, corpus, result))
    draw_run(folder, kept["step"], measured.confusion, corpus)
    write_manifest(folder, (*WHOLE, f"{corpus.reader.name}.json"))
    write_text(folder / "result.json", json.dumps(result, indent=2))  # last: with it the run is finished
    return result


def _training_batches(examples: "Tokens | Images", options: TrainOptions) -> "DataLoader[Any]":
    import torch
    from torch.utils.data import DataLoader

    from resseq.data.batching import LengthBatches

    return DataLoader(
        examples,
        batch_sampler=LengthBatches(examples.lengths, options.per_device_train_batch_size, options.seed),
        collate_fn=examples.collate,
        num_workers=options.dataloader_num_workers,
        generator=torch.Generator(),  # its own: an iterator must not draw from the generator that dropout draws from
    )


def evaluate(
    run: RunFolder,
    data: Annotated[
        str | os.PathLike[str] | None, arg(constructor=str, metavar="STR", help_behavior_hint="(default: None)")
    ] = None,
    *,
    split: str = "test",
    text_column: str | tuple[str, ...] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    device: str = "auto",
    batch_size: int = 128,
) -> dict[str, Any]:
    """Measure a trained classifier on labelled texts or images.

    Args:
        run: The run folder, or hf://OWNER/NAME.
        data: As for train; the run's own data unless given. Of data without splits all rows are measured, but of the
            run's own data only the rows held out from training.
        split: Which split.
        text_column: The column of the texts, or several; what training had unless given.
        image_column: The column of the images; likewise.
        label_column: The column of the labels; likewise.
        device: auto, or a torch device.
        batch_size: Examples in a batch.
    Returns: data, split, rows, loss (nats), accuracy, macro_f1, and per class precision, recall, f1 and rows.
    Raises: ValueError for a folder without a finished run, for bad data, and for a label that the run does not know.
    """
    from resseq.training.metrics import measure

    loaded = Run.load(run, device)
    data = None if data is None else os.fspath(data)
    name, rows = held_out(
        loaded, data, split, text_column=text_column, image_column=image_column, label_column=label_column
    )
    batches = evaluation_batches(loaded.reader.encode(*rows), batch_size)
    metrics = measure(loaded.logits_of(batches))
    return {
        "data": loaded.options.data if data is None else data,
        "split": name,
        "rows": len(rows.inputs),
        **metrics.scalars(),
        "classes": metrics.by_class(loaded.classes),
    }


def predict(
    run: RunFolder,
    file: Annotated[str | os.PathLike[str] | Iterable[Any], Positional, arg(constructor=str, metavar="FILE")] = "-",
    *,
    device: str = "auto",
    batch_size: int = 128,
) -> Iterator[dict[str, Any]]:
    """Label texts, or images by their paths, one to a line: for each, in order, the most probable class and all others.

    Args:
        run: the run folder, or hf://OWNER/NAME.
        file: a text file, "-" for standard input, one image, or (from Python) the texts, or the images as paths or PIL
            images. Of a run on several text columns a tuple for each row, or the texts joined, by a tab for a pair.
        batch_size: examples in a batch.
    Returns: an iterator of ``{"label": name, "probabilities": {name: probability, …}}``. Memory does not grow with the
        file.
    Raises: ValueError for a folder without a finished run or a file that is not there; the iterator, for a missing
        text.
    """
    from resseq.data.image import ENDINGS
    from resseq.training.loop import chunks

    loaded = Run.load(run, device)
    if loaded.options.task == "image" and isinstance(file, (str, os.PathLike)) and str(file).lower().endswith(ENDINGS):
        file = [file]
    if isinstance(file, (str, os.PathLike)):
        _check_file(str(file))
        return _answers(loaded, _blocks(str(file)), batch_size)
    # to go through a table gives the names of its columns
    if isinstance(file, Mapping) or hasattr(file, "columns") or not isinstance(file, Iterable):
        raise ValueError(
            f"predict: what is to be predicted is a list, or one column of a table; got a {type(file).__name__}. "
            f"Give the {loaded.reader.inputs} in a list."
        )
    return _answers(loaded, chunks(file, CHUNK), batch_size)


def _answers(run: Run, blocks: Iterator[list[Any]], batch_size: int) -> Iterator[dict[str, Any]]:
    first = 1
    for given in blocks:
        inputs = run.reader.take(given, first)
        first += len(inputs)
        for row in run.logits(inputs, batch_size).softmax(1).tolist() if inputs else []:
            probabilities = dict(zip(run.classes, row, strict=True))
            yield {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}


def _check_file(file: str) -> None:
    """Raise for what cannot be read line by line."""
    from resseq.data.sources import PARSERS

    if file != "-" and (not Path(file).exists() or Path(file).is_dir()):
        raise ValueError(
            f"predict: the texts or paths are a file with one to a line; got {file}. Use a file that exists, or -; "
            f"from Python a list as well: predict(run, [{file!r}])."
        )
    if Path(file).suffix.lower() in PARSERS:
        raise ValueError(
            f"predict: a file has one text or path to a line, and nothing beside; got the table {file}. Write its "
            f"column of texts to a .txt file, or measure it by resseq evaluate --data."
        )


def _blocks(file: str) -> Iterator[list[str]]:
    """The lines that are there to read, as soon as they are: a pipe that is written slowly is answered line by line."""
    from resseq.training.loop import chunks

    if file == "-" and sys.stdin is None:  # closed by whoever started us
        return
    source = sys.stdin.fileno() if file == "-" else file
    with open(source, "rb", buffering=0, closefd=file != "-") as stream:  # unbuffered: a read gives what there is
        rest = b""
        while block := stream.read(BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            yield from chunks(map(_text, lines), CHUNK)
        if rest:
            yield [_text(rest)]


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", errors="replace").removeprefix("\ufeff")
