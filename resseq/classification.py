"""Train a classifier of texts or images, evaluate it, predict with it: the three verbs on a run folder."""

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import arg

from resseq.data import DataOptions, ImageOptions, TextOptions
from resseq.training.config import TrainingOptions

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from resseq.data import Corpus, ImageReader, Images, Split, TextReader, Tokens
    from resseq.models.bert import Bert
    from resseq.training.loop import Trainer

RunFolder = Annotated[str | os.PathLike[str], arg(constructor=str, metavar="RUN")]
FORMAT = 2  # of the run folder
# what may differ in a resumed run
UNBOUND = {"output_dir", "resume", "device", "dataloader_num_workers", "save_steps", "inspect_every", "report_to"}
SIZES = {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
FINE_TUNING = {"learning_rate": 5e-5, "num_train_epochs": 3}  # the options whose default is another for a checkpoint
MAY_BE_0 = {"frozen_layers", "seed", "data_seed", "warmup_steps", "dataloader_num_workers", "kernel_size"}
SHARES = {"dropout", "token_dropout", "attention_dropout", "drop_path", "label_smoothing_factor"}
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
BASELINES = {
    "linear": "linear bag of tokens",
    "pixels": "linear map of 8 x 8 pixels",
    "majority": "majority class",
}
TEXT_MODELS = ("transformer", "convnet")
IMAGE_MODELS = ("cifar-resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")  # no file of one text to a line
BLOCK = 1 << 20  # bytes read at once from a file to predict
CHUNK = 1000  # texts or images taken at once from an iterable


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of an option's type; a whole number is a float too."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple | list) and all(isinstance(item, str) for item in value)
    if get_args(hint):
        return any(_is(value, part) for part in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model; what is not given is its own default."""

    model: str = "transformer"
    """transformer (TextTransformer), convnet (TextConvNet), or a BERT to fine-tune: a checkpoint's folder, or its id
    on the hub, OWNER/NAME. For images cifar-resnet, resnet18, resnet34, resnet50, resnet101 or resnet152."""
    scheme: str | None = None
    """A name in resseq.SCHEMES: how each sublayer joins the stream."""
    depth: int | None = None
    """Layers of the transformer, convolutions of the convnet; of cifar-resnet 6n + 2 layers with weights."""
    dim: int | None = None
    """Width of the stream (the convnet's first stage)."""
    heads: int | None = None
    """Attention heads."""
    activation: Literal["gelu", "relu", "swiglu"] | None = None
    """Of the transformer's feed-forward nets."""
    positions: Literal["learned", "sinusoidal", "rotary"] | None = None
    """How the transformer knows a token's place."""
    stages: int | None = None
    """Widths of the convnet; each doubles the last and halves the length."""
    kernel_size: int | None = None
    """Tokens that a convolution spans; 0 leaves the transformer's out."""
    shortcut: Literal["pad", "projection", "A", "B", "C", "D"] | None = None
    """Where the shape changes: pad or projection in the convnet; in a ResNet A (pad), B, C or D (projections)."""
    pooling: Literal["mean", "max", "cls", "kmax", "conv"] | None = None
    """From tokens to one vector; kmax and conv for the convnet."""
    dropout: float | None = None
    """Probability, of embeddings, branches and the pooled vector."""
    token_dropout: float | None = None
    """Probability that a token is hidden in training."""
    attention_dropout: float | None = None
    """Probability, of attention weights."""
    drop_path: float | None = None
    """Stochastic depth: probability that a branch is dropped in the last layer, rising to there."""
    layer_drop: float | None = None
    """LayerDrop: probability that a residual's branch is left out for a whole batch of training."""
    init: Literal["xavier", "torch", "normal"] | None = None
    """Starting weights."""
    pack: bool | None = None
    """Leave padding out of the transformer where that is faster; False: never."""
    activation_checkpointing: bool | None = None
    """Keep less of the transformer for the backward pass, and compute it again."""
    frozen_layers: int | None = None
    """Of a checkpoint: the embeddings and so many layers do not learn."""
    layerwise_lr_decay: float | None = None
    """Of a checkpoint: each layer learns so many times as fast as the one above it."""

    @property
    def fine_tunes(self) -> bool:
        """Whether the model is a checkpoint: whatever is not one of our own models."""
        return self.model not in (*TEXT_MODELS, *IMAGE_MODELS)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TextOptions, ImageOptions, ModelOptions, TrainingOptions):
    """Train a classifier of texts or images and leave it, with its measurements and pictures, in a run folder."""

    learning_rate: float | None = None
    """The schedule's highest learning rate; 1e-3 unless given, 5e-5 for a checkpoint."""
    num_train_epochs: int | None = None
    """Passes over the training data, at most; early stopping may end sooner. 8 unless given, 3 for a checkpoint."""

    def __post_init__(self) -> None:
        """Raise for a value that no option can have: from Python, and from a file, no parser stands before."""
        for each in fields(self):
            if isinstance(value := getattr(self, each.name), os.PathLike):
                object.__setattr__(self, each.name, os.fspath(value))
        for name, value in FINE_TUNING.items():
            if getattr(self, name) is None:
                own = {each.name: each.default for each in fields(TrainingOptions)}
                object.__setattr__(self, name, value if self.fine_tunes else own[name])
        for name, hint in get_type_hints(type(self)).items():
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            choices = [choice for part in (hint, *get_args(hint)) for choice in get_args(part)]
            choices = [choice for choice in choices if isinstance(choice, str)]
            if choices and value not in choices and (value is not None or type(None) not in get_args(hint)):
                raise ValueError(f"train: {flag} is one of {', '.join(choices)}; got {value!r}. Use {choices[0]}.")
            if not choices and not _is(value, hint):
                kind = str(getattr(hint, "__name__", hint)).split(" | ")[0]
                raise ValueError(f"train: {flag} is a value of type {kind}; got {value!r}. Give one.")
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 1 if hint in (int, int | None) and name not in MAY_BE_0 else 0
            if not value >= least:
                raise ValueError(f"train: {flag} must be {least} or more; got {value}. Use {least} or more.")
            if name in SHARES and not value < 1:
                raise ValueError(f"train: {flag} is a share, less than 1; got {value}. Use 0.1.")
        self._check_task()

    def _check_task(self) -> None:
        """Raise for what belongs to the other task."""
        if (self.model in IMAGE_MODELS) != (self.task == "image"):
            usual = {"text": "transformer", "image": "cifar-resnet"}[self.task]
            raise ValueError(
                f"train: --task {self.task} needs a model of its own; got --model {self.model}. Use --model {usual}."
            )
        other = {"text": ImageOptions, "image": TextOptions}[self.task]
        for field in fields(other):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value != field.default and field.name not in DataOptions.__dataclass_fields__:
                raise ValueError(f"train: --task {self.task} has no {flag}; got {value!r}. Leave it out.")

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        return Path("runs") / "-".join(filter(None, [Path(self.data).stem, Path(self.model).name, self.scheme]))


def build_model(options: ModelOptions, num_classes: int, **shape: Any) -> "nn.Module":
    """The model that the options ask for. Raises: ValueError for an option that it does not take.

    Args:
        shape: what a reader tells of its data: vocab_size and max_length of texts; mean, std and augment of images.
    """
    from resseq.models import MODELS, arguments_of
    from resseq.models.bert import BertClassifier
    from resseq.models.image_classifier import ImageClassifier

    given = {field.name: getattr(options, field.name) for field in fields(ModelOptions) if field.name != "model"}
    arguments = {name: value for name, value in given.items() if value is not None}
    known = arguments_of(options.model)
    for name, value in arguments.items():
        if name not in known:
            flag = name.replace("_", "-")
            raise ValueError(f"train: --model {options.model} has no {flag}; got --{flag} {value}. Leave it out.")
    if options.fine_tunes:
        if "encoder" not in shape:
            raise ValueError(
                f"train: --model is {', '.join(MODELS)}; got --model {options.model}. "
                f"Fine-tune a checkpoint by resseq train."
            )
        return BertClassifier(num_classes=num_classes, **arguments, **shape)
    if options.model in IMAGE_MODELS:
        return ImageClassifier(MODELS[options.model](num_classes=num_classes, **arguments), **shape)
    arguments |= {name: value for name, value in shape.items() if name in known}
    return MODELS[options.model](num_classes=num_classes, **arguments)


def spell_out(options: TrainOptions) -> TrainOptions:
    """The same with the model's defaults in place of None: what a run was is not to change with the defaults."""
    from resseq.models import arguments_of

    known = {name: each.default for name, each in arguments_of(options.model).items() if each.default is not each.empty}
    unsaid = (each.name for each in fields(ModelOptions) if getattr(options, each.name) is None)
    return replace(options, **{name: known[name] for name in unsaid if name in known})


def check_model(options: TrainOptions, checkpoint: dict[str, Any] | None = None) -> None:
    """Raise a ValueError for what is wrong with the model, before any data is read."""
    import torch

    texts = checkpoint or {"vocab_size": options.vocab_size, "max_length": options.max_length}
    images = {"mean": [0.0] * 3, "std": [1.0] * 3}
    with torch.device("meta"):
        build_model(options, num_classes=2, **texts if options.task == "text" else images)


def train(**options: Any) -> dict[str, Any]:
    """Train a classifier; the options are those of ``resseq train``, fields of TrainOptions.

    The validation split chooses the weights; the test split is read once, for them.

    Returns: what stands in the run folder's ``result.json``: output_dir, validation and test measurements, steps,
        seconds, parameters.
    Raises: ValueError for bad options or data, and for a run folder that is already in use; training.loop.Diverged.
    """
    return train_with(TrainOptions(**options))


def train_with(options: TrainOptions, corpus: "Corpus | None" = None) -> dict[str, Any]:
    """``train`` with its options in one value, and on a corpus that is there already if one is given."""
    from resseq.data import data_options, prepare
    from resseq.training.checkpoint import claim

    options = spell_out(replace(options, output_dir=str(options.folder)))
    with claim(options.folder):
        finished = _earlier(options)
        if finished is not None:
            return finished
        reader, encoder = open_checkpoint(options) if options.fine_tunes else (None, None)
        check_model(options, reader and reader.checkpoint)
        return _fit(options, corpus or prepare(data_options(options), reader), encoder)


def open_checkpoint(options: TrainOptions) -> tuple["TextReader", "Bert | None"]:
    """How the checkpoint that --model names reads texts, and its encoder; or what the run folder kept of it, and None.

    Raises: ValueError for a name that is none, for what is no BERT, and for options that would not be heeded.
    """
    from resseq.data import load_pretrained_tokenizer, load_tokenizer, separator_of
    from resseq.models.bert import Bert
    from resseq.training.checkpoint import newest_checkpoint

    if newest_checkpoint(options.folder) is not None:  # a run that is resumed needs no one else's files
        pretrained = read_config(options.folder)["pretrained"]
        return _checkpoint_reader(options, load_tokenizer(options.folder / "tokenizer.json"), pretrained), None
    if not Path(options.model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.model):
        raise ValueError(
            f"train: --model is transformer, convnet, a checkpoint's folder or its id on the hub, OWNER/NAME; "
            f"got --model {options.model}. Use transformer, a folder that exists, or google-bert/bert-base-uncased."
        )
    for each in fields(TextOptions):
        if each.name in ("tokenizer", "vocab_size", "lowercase") and getattr(options, each.name) != each.default:
            flag, value = f"--{each.name.replace('_', '-')}", getattr(options, each.name)
            raise ValueError(f"train: a checkpoint has its own tokenizer; got {flag} {value}. Leave it out.")
    encoder, tokenizer = Bert.from_pretrained(options.model), load_pretrained_tokenizer(options.model)
    if options.max_length > encoder.options["max_length"]:
        raise ValueError(
            f"train: texts may be as long as the checkpoint's; got --max-length {options.max_length}. "
            f"Use {encoder.options['max_length']} or less."
        )
    pretrained = {"encoder": encoder.options, "separator": separator_of(tokenizer)}
    return _checkpoint_reader(options, tokenizer, pretrained), encoder


def _checkpoint_reader(options: TrainOptions, tokenizer: "Tokenizer", pretrained: dict[str, Any]) -> "TextReader":
    """Two text columns are a pair, which a checkpoint takes apart."""
    from resseq.data import PairReader, TextReader

    pairs = isinstance(options.text_column, tuple | list) and len(options.text_column) == 2
    return (PairReader if pairs else TextReader)(tokenizer, options.max_length, pretrained)


def _fit(options: TrainOptions, corpus: "Corpus", encoder: "Bert | None" = None) -> dict[str, Any]:
    import torch

    from resseq.training.checkpoint import write_text
    from resseq.training.loop import Trainer, choose_device

    folder, splits = options.folder, corpus.splits
    if (folder / "config.json").exists():
        _check_same_data(folder, corpus)
    torch.manual_seed(options.seed)
    device = choose_device(options.device)
    model: Any = build_model(options, len(corpus.classes), **corpus.reader.shape)
    if encoder:
        model.encoder.load_state_dict(encoder.state_dict())
    model.to(device)
    validation, _ = evaluation_batches(splits["validation"], options.per_device_eval_batch_size)
    weights = _class_weights(corpus) if options.class_weights == "balanced" else None
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


def _finish(trainer: "Trainer", best: dict[str, Any], options: TrainOptions, corpus: "Corpus") -> dict[str, Any]:
    """Measure the test split and leave the run folder whole."""
    from resseq.training.checkpoint import save_weights, write_manifest, write_text
    from resseq.training.metrics import logits_of, measure

    folder, model = options.folder, trainer.model
    test, _ = evaluation_batches(corpus.splits["test"], options.per_device_eval_batch_size)
    measured = measure(logits_of(model, test, trainer.device, options.bf16))
    result = {
        "output_dir": str(folder),
        "validation": best,
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
    draw_run(folder, best["step"], measured.confusion, corpus.classes)
    write_manifest(folder, (*WHOLE, f"{corpus.reader.name}.json"))
    write_text(folder / "result.json", json.dumps(result, indent=2))  # last: with it the run is finished
    return result


def _training_batches(examples: "Tokens | Images", options: TrainOptions) -> "DataLoader[Any]":
    import torch
    from torch.utils.data import DataLoader

    from resseq.data import LengthBatches

    return DataLoader(
        examples,
        batch_sampler=LengthBatches(examples.lengths, options.per_device_train_batch_size, options.seed),
        collate_fn=examples.collate,
        num_workers=options.dataloader_num_workers,
        generator=torch.Generator(),  # its own: an iterator must not draw from the generator that dropout draws from
    )


def _class_weights(corpus: "Corpus") -> "Tensor":
    """n/(C·n_c) for each class: all classes count the same."""
    import torch

    train, classes = corpus.splits["train"], len(corpus.classes)
    assert train.labels is not None
    return len(train) / (classes * torch.bincount(train.labels, minlength=classes).clamp(min=1))


def _earlier(options: TrainOptions) -> dict[str, Any] | None:
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
    changed = [name for name in now if name not in UNBOUND and now[name] != earlier.get(name)]
    if changed and not (options.resume == "resized" and SIZES.issuperset(changed)):
        resized = ", or --resume resized" if SIZES.issuperset(changed) else ""
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


def _check_same_data(folder: Path, corpus: "Corpus") -> None:
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


def changed_parts(earlier: dict[str, str], now: dict[str, str]) -> list[str]:
    """The splits (and "tokenizer" or "image") that are not those that a run was trained with."""
    return [part for part, checksum in now.items() if checksum != earlier.get(part)]


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


def evaluation_batches(examples: "Tokens | Images", batch_size: int) -> tuple["DataLoader[Any]", list[int]]:
    """Batches sorted by length, and for each of their rows its index in examples."""
    import torch
    from torch.utils.data import DataLoader

    from resseq.data import LengthBatches

    sampler = LengthBatches(examples.lengths, batch_size, seed=0, shuffle=False)
    loader = DataLoader(examples, batch_sampler=sampler, collate_fn=examples.collate, generator=torch.Generator())
    return loader, [i for batch in sampler for i in batch]


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
        """Of a run folder, or of hf://OWNER/NAME, which somebody pushed to the hub.

        Raises: ValueError for a folder without a finished run.
        """
        from resseq.data.readers import READERS
        from resseq.pretrained import HUB, fetch_run
        from resseq.training.checkpoint import restore, verify
        from resseq.training.loop import choose_device

        folder = fetch_run(str(folder)) if str(folder).startswith(HUB) else Path(folder)
        if not (folder / "manifest.json").exists():
            why = "it is not finished" if (folder / "config.json").exists() else "there is none"
            raise ValueError(
                f"Run: the folder must hold a finished run; got {folder}: {why}. "
                f"Use resseq train --output-dir {folder} --resume auto."
            )
        config = read_config(folder)
        verify(folder)
        options = TrainOptions(**config["options"])
        reader = READERS[options.task].load(folder, options)
        if options.fine_tunes:
            reader = _checkpoint_reader(options, reader.tokenizer, config["pretrained"])
        model = build_model(options, len(config["classes"]), **reader.shape)
        restore(model, folder / "model.safetensors")
        target = choose_device(device)
        return Run(folder, model.to(target).eval(), reader, options, config["classes"], config["fingerprint"], target)

    def logits(self, inputs: list[Any], batch_size: int) -> "Tensor":
        """The model's logits (N, C), in the order of the texts or images."""
        import torch

        from resseq.training.metrics import logits_of

        batches, rows = evaluation_batches(self.reader.encode(inputs), batch_size)
        logits = [logits for logits, _ in logits_of(self.model, batches, self.device)]
        return torch.cat(logits)[torch.tensor(rows).argsort()]


def evaluate(
    run: RunFolder,
    data: Annotated[str | os.PathLike[str] | None, arg(constructor=str, metavar="STR")] = None,
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
    from resseq.training.metrics import logits_of, measure

    loaded = Run.load(run, device)
    data = None if data is None else os.fspath(data)
    name, rows = held_out(
        loaded, data, split, text_column=text_column, image_column=image_column, label_column=label_column
    )
    batches, _ = evaluation_batches(loaded.reader.encode(*rows), batch_size)
    metrics = measure(logits_of(loaded.model, batches, loaded.device))
    return {
        "data": loaded.options.data if data is None else data,
        "split": name,
        "rows": len(rows.inputs),
        **metrics.scalars(),
        "classes": metrics.by_class(loaded.classes),
    }


def held_out(run: Run, data: str | None, split: str, **columns: Any) -> tuple[str, "Split"]:
    """The inputs and labels to measure a run on, and the name of their split ("all" of data without splits).

    Args:
        columns: text_column, image_column, label_column; None is what training had.

    Raises: ValueError, as evaluate does.
    """
    from resseq.data import data_options

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
    found = run.reader.load_data(options, classes=run.classes, carve=own)
    if own and (changed := changed_parts(run.fingerprint, found.fingerprint)):
        raise ValueError(
            f"evaluate: the run's own data must be as it was in training; got another {', '.join(changed)} in "
            f"{options.data}. Restore it, or give the data under another name."
        )
    if split in found.splits:
        return split, found.splits[split]
    if own or len(found.splits) > 1:
        names = ", ".join(found.splits)
        raise ValueError(f"evaluate: the data has splits {names}; got --split {split}. Use one of them.")
    return "all", next(iter(found.splits.values()))


def _same_source(data: str, other: str) -> bool:
    return data == other or (Path(data).exists() and Path(data).resolve() == Path(other).resolve())


def predict(
    run: RunFolder,
    file: str | os.PathLike[str] | Iterable[Any] = "-",
    *,
    device: str = "auto",
    batch_size: int = 128,
) -> Iterator[dict[str, Any]]:
    """Label texts, or images by their paths, one to a line: for each, in order, the most probable class and all others.

    Args:
        run: the run folder, or hf://OWNER/NAME.
        file: a text file, "-" for standard input, or (from Python) the texts, or the images as paths or PIL images.
        batch_size: examples in a batch.
    Yields: ``{"label": name, "probabilities": {name: probability, …}}``. Memory does not grow with the file.
    Raises: ValueError for a folder without a finished run, or a file that is not there.
    """
    loaded = Run.load(run, device)
    for inputs in _blocks(str(file)) if isinstance(file, (str, os.PathLike)) else _chunks(iter(file)):
        for row in loaded.logits(inputs, batch_size).softmax(1).tolist() if inputs else []:
            probabilities = dict(zip(loaded.classes, row, strict=True))
            yield {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}


def _blocks(file: str) -> Iterator[list[str]]:
    """The lines that are there to read, as soon as they are: a pipe that is written slowly is answered line by line."""
    if file != "-" and (not Path(file).exists() or Path(file).is_dir()):
        raise ValueError(
            f"predict: the texts or paths are a file with one to a line; got {file}. Use a file that exists, or -."
        )
    if Path(file).suffix.lower() in TABLES:
        raise ValueError(
            f"predict: a file has one text or path to a line, and nothing beside; got the table {file}. Write its "
            f"column of texts to a .txt file, or measure it by resseq evaluate --data."
        )
    if file == "-" and sys.stdin is None:  # closed by whoever started us
        return
    handle = sys.stdin.fileno() if file == "-" else os.open(file, os.O_RDONLY)
    rest = b""
    while block := os.read(handle, BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        yield [_text(line) for line in lines]
    if rest:
        yield [_text(rest)]
    if file != "-":
        os.close(handle)


def _chunks(inputs: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(inputs, CHUNK)):
        yield chunk


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", errors="replace").removeprefix("\ufeff")


def draw_run(folder: Path, kept: int, confusion: list[list[int]], classes: list[str]) -> None:
    """learning_curve.png and confusion_matrix.png."""
    from resseq.training.pictures import draw_confusion, draw_learning_curve

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    draw_learning_curve(rows, kept, folder / "learning_curve.png")
    draw_confusion(confusion, classes, folder / "confusion_matrix.png")


def _cut_by(options: TrainOptions) -> str:
    if options.fine_tunes:
        return "the checkpoint's tokenizer"
    return f"{options.tokenizer}{', lower case' if options.lowercase else ''}"


def model_card(options: TrainOptions, corpus: "Corpus", result: dict[str, Any]) -> str:
    """What the model is, what it learnt from and how well, in a page."""
    rows = ", ".join(
        f"{count:,} {split}{' (carved)' if split in corpus.carved else ''}" for split, count in result["rows"].items()
    )
    test, validation = result["test"], result["validation"]
    name, inputs = Path(options.data).stem, corpus.reader.inputs
    beside = "\n".join(f"| {BASELINES[each]}, test | {value:.4f} | | |" for each, value in corpus.baselines.items())
    return f"""---
library_name: resseq
pipeline_tag: {options.task}-classification
metrics: [accuracy, f1]
---

# {Path(options.model).name} for {name}

A classifier of {inputs}, of {result["parameters"]:,} parameters, {_origin(options)} with
[resseq](https://pypi.org/project/resseq/),
seed {options.seed}, {result["steps"]:,} steps in {result["seconds"]:.0f} s.

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
    return f"trained from scratch as `--model {options.model} --scheme {options.scheme}`"


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
    return (
        f"- Texts are cut at {options.max_length} tokens ({tokenizer}).\n"
        f"- Use: `resseq predict FOLDER texts.txt`, one text to a line, or "
        f'`resseq.predict(FOLDER, ["a text", "another"])`.'
    )
