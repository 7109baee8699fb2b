"""The options of a run."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from resseq.data.image import ImageOptions
from resseq.data.rows import DataOptions
from resseq.data.text import TextOptions
from resseq.training.config import TrainingOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TEXT_MODELS = ("transformer", "convnet", "vdcnn")
IMAGE_MODELS = ("cifar-resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# what may differ in a resumed run
MAY_DIFFER = {"output_dir", "resume", "device", "dataloader_num_workers", "save_steps", "inspect_every", "report_to"}
FINE_TUNING = {"learning_rate": 5e-5, "num_train_epochs": 3}  # the options whose default is another for a checkpoint
MAY_BE_0 = {"frozen_layers", "seed", "data_seed", "warmup_steps", "dataloader_num_workers", "kernel_size"}
SHARES = {"dropout", "token_dropout", "attention_dropout", "drop_path", "layer_drop", "label_smoothing_factor"}
KINDS: dict[Any, tuple[str, Any]] = {  # of values: what an error calls them, and an example
    int: ("an integer", 6),
    float: ("a finite number", 0.1),
    bool: ("True or False", True),
    str: ("a str", "name"),
}
Options = TypeVar("Options", bound="DataclassInstance")


def from_python(kind: type[Options], given: dict[str, Any]) -> Options:
    """The options of a verb, of one kind, that its function was called with.

    Raises: ValueError for a name that no option has, with the nearest that one has.
    """
    verb, known = _verb(kind), [each.name for each in fields(kind)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1, 0.7) or [each for each in known if each.endswith(f"_{name}")]
            fix = f"Use {'= or '.join(near)}=." if near else f"Type resseq {verb} --help to see them all."
            raise ValueError(f"{verb}: the options are those of resseq {verb}; got {name}={given[name]!r}. {fix}")
    return kind(**given)


def settle(value: Any) -> Any:
    """An option's value as the command line gives it: a path is a str, a list a tuple, NumPy's number Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list):
        return tuple(value)
    scalar = type(value).__module__ == "numpy" and value.shape == ()  # out of an array or a DataFrame
    return value.item() if scalar else value


def data_name(data: str) -> str:
    """What data is called: the name of its file or folder, which "." does not say."""
    return Path(os.path.abspath(data)).stem


def flag_of(name: str) -> str:
    """An option's name as one types it."""
    return f"--{name.replace('_', '-')}"


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of an option's type; a whole number is a float too."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if get_args(hint):
        return any(_is(value, part) for part in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def check_values(options: Any, names: Iterable[str] | None = None) -> None:
    """Settle the values of these options, or of all, and raise for one that no option can have.

    Values from Python or from a file have passed no parser.
    """
    hints = get_type_hints(type(options))
    for name in hints if names is None else names:
        object.__setattr__(options, name, settle(getattr(options, name)))
        _check_type(_verb(type(options)), name, hints[name], getattr(options, name))
        _check_range(_verb(type(options)), name, hints[name], getattr(options, name))


def _verb(kind: type) -> str:
    return kind.__name__.removesuffix("Options").lower()


def _check_type(verb: str, name: str, hint: Any, value: Any) -> None:
    """Raise for what is none of an option's choices, or is of another type."""
    choices = [choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str)]
    if choices and value not in choices and (value is not None or type(None) not in get_args(hint)):
        raise ValueError(f"{verb}: {flag_of(name)} is one of {', '.join(choices)}; got {value!r}. Use {choices[0]}.")
    if not choices and not _is(value, hint):
        kind, example = KINDS[(*get_args(hint), hint)[0]]
        raise ValueError(
            f"{verb}: {flag_of(name)} must be {kind}; got {value!r} (type {type(value).__name__}). "
            f"Write {name}={example!r}, for example."
        )


def _check_range(verb: str, name: str, hint: Any, value: Any) -> None:
    """Raise for a number that is too small, and for a share that is too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least = 1 if hint in (int, int | None) and name not in MAY_BE_0 else 0
    if not value >= least:
        raise ValueError(f"{verb}: {flag_of(name)} must be {least} or more; got {value}. Use {least} or more.")
    if name in SHARES and not value < 1:
        raise ValueError(f"{verb}: {flag_of(name)} is a share, less than 1; got {value}. Use 0.1.")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model; what is not given is its own default."""

    model: str = "transformer"
    """transformer (TextTransformer), convnet (TextConvNet), vdcnn (TextConvNet.vdcnn), or a BERT to fine-tune: a
    checkpoint's folder, or its id on the hub, OWNER/NAME. For images cifar-resnet, resnet18, resnet34, resnet50,
    resnet101 or resnet152."""
    scheme: str | None = None
    """A name in resseq.SCHEMES: how each sublayer joins the stream."""
    depth: int | None = None
    """Layers of the transformer, convolutions of the convnet; 9, 17, 29 or 49 of vdcnn; of cifar-resnet 6n + 2 layers
    with weights."""
    dim: int | None = None
    """Width of the stream (the convnet's first stage)."""
    heads: int | None = None
    """Attention heads."""
    activation: Literal["gelu", "relu", "swiglu"] | None = None
    """Nonlinearity of the transformer's feed-forward nets."""
    positions: Literal["learned", "sinusoidal", "rotary"] | None = None
    """How the transformer knows a token's place."""
    stages: int | None = None
    """Widths of the convnet; each doubles the last and halves the length."""
    kernel_size: int | None = None
    """Tokens that a convolution spans; 0 leaves the transformer's out."""
    shortcut: Literal["none", "pad", "projection", "A", "B", "C", "D"] | None = None
    """Where the shape changes: pad or projection in convnet and vdcnn, or none with the scheme plain; in a ResNet A
    (pad), B, C or D (projections)."""
    pooling: Literal["mean", "max", "cls", "kmax", "conv"] | None = None
    """From tokens to one vector; kmax and conv for the convnet."""
    dropout: float | None = None
    """Dropout probability for embeddings, branches and the pooled vector."""
    token_dropout: float | None = None
    """Probability that a token is hidden in training."""
    attention_dropout: float | None = None
    """Dropout probability for attention weights."""
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
    """How many of a checkpoint's layers, and its embeddings with them, do not learn."""
    layerwise_lr_decay: float | None = None
    """Each layer of a checkpoint learns so many times as fast as the one above it."""

    @property
    def arguments(self) -> dict[str, Any]:
        """All but the model's name, by name; None where it was not given."""
        return {each.name: getattr(self, each.name) for each in fields(ModelOptions) if each.name != "model"}

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
        check_values(self)
        for name, value in FINE_TUNING.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value if self.fine_tunes else getattr(TrainingOptions, name))
        self._check_task()

    def _check_task(self) -> None:
        """Raise for what belongs to the other task."""
        if (self.model in IMAGE_MODELS) != (self.task == "image"):
            reads, usual = ("texts", "cifar-resnet") if self.task == "image" else ("images", "transformer")
            raise ValueError(
                f"train: --model {self.model} reads {reads}; got --task {self.task}. Use --model {usual}, or --task "
                f"{reads.removesuffix('s')}."
            )
        other = {"text": ImageOptions, "image": TextOptions}[self.task]
        for field in fields(other):
            value = getattr(self, field.name)
            if value != field.default and field.name not in DataOptions.__dataclass_fields__:
                raise ValueError(
                    f"train: --task {self.task} has no {flag_of(field.name)}; got {value!r}. Leave it out."
                )

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        return Path("runs") / "-".join(filter(None, [data_name(self.data), Path(self.model).name, self.scheme]))
