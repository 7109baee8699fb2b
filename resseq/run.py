"""A run folder: what a finished run is read from, and when one may be gone on with."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from resseq.options import MAY_DIFFER, TrainOptions

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from resseq.data.batching import Images, Tokens
    from resseq.data.corpus import Corpus
    from resseq.data.readers import ImageReader, TextReader
    from resseq.data.rows import Data, Split

RunFolder = Annotated[str | os.PathLike[str], arg(constructor=str, metavar="RUN")]
FORMAT = 2  # of the run folder
SIZES = {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
WHOLE = ("config.json", "model.safetensors")  # what a finished run's manifest holds, beside the reader
OURS = (
    "metrics.jsonl",
    "checkpoint-*",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "image.json",
    "result.json",
    "README.md",
)


@dataclass(frozen=True)
class Run:
    """A trained classifier, read from its run folder."""

    folder: Path
    model: "nn.Module"
    reader: "TextReader | ImageReader"
    options: TrainOptions
    classes: list[str]
    fingerprint: dict[str, str]
    """Of the data that it was trained with."""
    device: "torch.device"

    @staticmethod
    def load(folder: str | os.PathLike[str], device: str = "auto") -> "Run":
        """Read a run folder, or hf://OWNER/NAME, which somebody pushed to the hub.

        Raises: ValueError for a folder without a finished run.
        """
        from resseq.data.readers import READERS
        from resseq.models import build_model
        from resseq.pretrained import HUB, fetch_run
        from resseq.training.checkpoint import restore, verify
        from resseq.training.loop import choose_device

        folder = fetch_run(str(folder)) if str(folder).startswith(HUB) else Path(folder)
        if not (folder / "manifest.json").exists():
            begun = (folder / "config.json").exists()
            why = "it is not finished" if begun else "there is none"
            fix = "Type the command that began it once more, with --resume auto" if begun else "Check the spelling"
            raise ValueError(f"Run: the folder must hold a finished run; got {folder}: {why}. {fix}.")
        config = read_config(folder)
        verify(folder)
        options = TrainOptions(**config["options"])
        reader = READERS[options.task].load(folder, options)
        if options.fine_tunes:
            reader = checkpoint_reader(options, reader.tokenizer, config["pretrained"])
        model = build_model(options, len(config["classes"]), **reader.shape)
        restore(model, folder / "model.safetensors")
        target = choose_device(device)
        return Run(folder, model.to(target).eval(), reader, options, config["classes"], config["fingerprint"], target)

    def logits(self, inputs: list[Any], batch_size: int) -> "Tensor":
        """The model's logits (N, C), in the order of the texts or images."""
        import torch

        batches = evaluation_batches(self.reader.encode(inputs), batch_size)
        logits = torch.cat([logits for logits, _ in self.logits_of(batches)])
        order: Any = batches.batch_sampler
        return logits[torch.tensor([i for batch in order for i in batch]).argsort()]

    def logits_of(self, batches: Iterable[dict[str, "Tensor"]]) -> Iterator[tuple["Tensor", "Tensor"]]:
        """The model's logits (B, C) of each batch, with its labels; in bfloat16 where the run was trained so."""
        from resseq.training.metrics import logits_of

        return logits_of(self.model, batches, self.device, self.options.bf16)


def read_config(folder: Path) -> dict[str, Any]:
    """A run folder's config.json. Raises: ValueError for one that no run wrote, or one of another format."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        version = config["format"]
        if version == FORMAT:
            TrainOptions(**config["options"])
            assert all(isinstance(name, str) for name in [*config["classes"], *config["fingerprint"].values()])
            return config
        got = f"format {version!r}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        got = f"another ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    raise ValueError(
        f"Run: config.json must be one that resseq train wrote (format {FORMAT}); got {got} in {folder}. "
        f"Use another folder."
    )


def held_out(run: Run, data: str | None, split: str, **columns: Any) -> tuple[str, "Split"]:
    """The inputs and labels to measure a run on, and the name of their split ("all" of data without splits).

    Args:
        columns: text_column, image_column, label_column; None is what training had.

    Raises: ValueError, as evaluate does.
    """
    from resseq.data.corpus import data_options
    from resseq.data.sources import NoSuchData

    own = data is None or _same_source(data, run.options.data)
    known = data_options(run.options)
    given = {name: value for name, value in columns.items() if value is not None}
    for name, value in given.items():
        if not hasattr(known, name):
            raise ValueError(
                f"evaluate: a run on {run.reader.inputs} has no {name.replace('_', ' ')}; got {name}={value!r}. "
                f"Leave it out."
            )
    options = replace(known, **given | ({} if data is None else {"data": data}))
    try:
        found = run.reader.load_data(options, classes=run.classes, carve=own)
    except NoSuchData as error:
        if data is not None:
            raise
        raise ValueError(
            f"Run: its own data, '{options.data}', is not here; got neither a file or folder in "
            f"{Path.cwd()}, nor {error.args[1]}. Give it by --data."
        ) from error
    undivided = split not in found.splits or len(found.splits) == 1
    if not own and undivided and (kept := _as_in_training(run, options)):
        own, found = True, kept
    as_trained = found
    if own and given:  # other columns of the same rows
        as_trained = run.reader.load_data(replace(known, data=options.data), classes=run.classes)
    if own and (changed := changed_parts(run.fingerprint, as_trained.fingerprint)):
        raise ValueError(
            f"Run: its own data must be as it was in training; got another {', '.join(changed)} in "
            f"{options.data}. Restore it."
        )
    if split in found.splits:
        return split, found.splits[split]
    if own or len(found.splits) > 1:
        names = ", ".join(found.splits)
        raise ValueError(f"evaluate: the data has splits {names}; got --split {split}. Use one of them.")
    return "all", next(iter(found.splits.values()))


def _as_in_training(run: Run, options: Any) -> "Data | None":
    """The run's own data under another name: split anew, so that no row of training is measured."""
    with suppress(ValueError):  # other data need not be such that it can be split
        found = run.reader.load_data(options, classes=run.classes)
        if not changed_parts(run.fingerprint, found.fingerprint):
            return found
    return None


def _same_source(data: str, other: str) -> bool:
    return data == other or (Path(data).exists() and Path(data).resolve() == Path(other).resolve())


def changed_parts(earlier: dict[str, str], now: dict[str, str]) -> list[str]:
    """The splits (and "tokenizer" or "image") that are not those that a run was trained with."""
    return [part for part, checksum in now.items() if checksum != earlier.get(part)]


def evaluation_batches(examples: "Tokens | Images", batch_size: int) -> "DataLoader[Any]":
    """Batches sorted by length."""
    import torch
    from torch.utils.data import DataLoader

    from resseq.data.batching import LengthBatches

    sampler = LengthBatches(examples.lengths, batch_size, seed=0, shuffle=False)
    return DataLoader(examples, batch_sampler=sampler, collate_fn=examples.collate, generator=torch.Generator())


def checkpoint_reader(options: TrainOptions, tokenizer: "Tokenizer", pretrained: dict[str, Any]) -> "TextReader":
    """Two text columns are a pair, which a checkpoint takes apart; no text is longer than its encoder knows places."""
    from resseq.data.readers import PairReader, TextReader

    pairs = isinstance(options.text_column, tuple) and len(options.text_column) == 2
    longest = min(options.max_length, pretrained["encoder"]["max_length"])
    return (PairReader if pairs else TextReader)(tokenizer, longest, pretrained)


def _rows_per_step(options: dict[str, Any]) -> int:
    return options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]


def finished_result(options: TrainOptions) -> dict[str, Any] | None:
    """The result of the run that the folder holds, if it is finished and whole.

    Raises: ValueError for a run that may not be resumed. A run begins with its config.json: a folder without one may
        hold nothing that a run would overwrite.
    """
    from resseq.training.checkpoint import Damaged, verify

    folder = options.folder
    if not (folder / "config.json").exists():
        if others := sorted(path.name for name in OURS for path in folder.glob(name)):
            raise ValueError(
                f"train: a new run would overwrite files; got --output-dir {folder} with {', '.join(others)} and no "
                f"config.json. Use another --output-dir."
            )
        return None
    if options.resume == "never":
        raise ValueError(
            f"train: a run folder holds one run; got --output-dir {folder}, which has one. "
            f"Use --resume auto to go on with it, or another --output-dir."
        )
    earlier, now = read_config(folder)["options"], json.loads(json.dumps(asdict(options)))
    changed = [name for name in now if name not in MAY_DIFFER and now[name] != earlier.get(name)]
    same_step = SIZES.issuperset(changed) and _rows_per_step(now) == _rows_per_step(earlier)
    if changed and not (options.resume == "resized" and same_step):
        resized = ", or --resume resized" if same_step else ""
        raise ValueError(
            "train: a resumed run keeps its options; got "
            + ", ".join(f"{name}={now[name]!r} (was {earlier.get(name)!r})" for name in changed)
            + f". Give the earlier values{resized}, or another --output-dir."
        )
    try:
        result = json.loads((folder / "result.json").read_bytes())
        verify(folder)
        return result
    except (Damaged, OSError, ValueError):  # not finished, or not as it was left
        return None


def check_same_data(folder: Path, corpus: "Corpus") -> None:
    """Raise for a corpus that is not the one that the run in the folder began with."""
    config = read_config(folder)
    if corpus.classes != config["classes"]:
        changed = f"classes={corpus.classes} (were {config['classes']})"
    elif parts := changed_parts(config["fingerprint"], corpus.fingerprint):
        changed = f"another {', '.join(parts)} than before"
    else:
        return
    raise ValueError(
        f"train: a resumed run keeps its data; got {changed}. Give the earlier data, or another --output-dir."
    )
