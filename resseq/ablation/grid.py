"""The grid of an ablation: which configurations its options ask for."""

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro
from docstring_parser import parse_from_object

from resseq.ablation.cell import Cell, layers_named
from resseq.options import (
    IMAGE_MODELS,
    MAY_DIFFER,
    TEXT_MODELS,
    ModelOptions,
    TrainOptions,
    check_values,
    data_name,
    flag_of,
    from_python,
    settle,
)

PLURAL = {"scheme": "schemes", "depth": "depths", "seed": "seeds", "learning_rate": "learning_rates", "init": "inits"}
# The first command's own setting: a shallow, a middle and a deep model, minutes on two cores.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "scheme": ("post", "pre", "highway"),
    "depth": (2, 6, 12),
    "dim": (64,),
    "heads": (4,),
    "kernel_size": (0,),
    "dropout": (0.1,),
    "max_length": (64,),
    "warmup_steps": (0,),
    "label_smoothing_factor": (0.0,),
    "max_steps": (300,),
}
# In their place for images: the depths at which He et al. 2015 saw the plain net get worse.
IMAGE_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "model": ("cifar-resnet",),
    "scheme": ("plain", "residual"),
    "depth": (20, 56),
    "warmup_steps": (0,),
    "label_smoothing_factor": (0.0,),
}
# The published depths, but the one that takes longest.
VDCNN_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "scheme": ("plain", "residual"),
    "depth": (9, 17, 29),
    "shortcut": ("projection",),
}
# These are no axes: what data it is, and what no number follows from.
SINGLE = {"task", "text_column", "image_column", "label_column"} | MAY_DIFFER


class Usual(tuple[Any, ...]):
    """Default values, which a task or a model may replace."""


def _descriptions(cls: type) -> dict[str, str | None]:
    """What stands under each field of a dataclass and of its bases: the help of its flag."""
    bases = reversed(cls.__mro__[:-1])
    return {each.arg_name: each.description for base in bases for each in parse_from_object(base).params}


def _shown(hint: Any) -> str:
    """What a value is, as the help shows it: INT, or the choices."""
    parts: list[Any] = [part for part in get_args(hint) if part is not type(None)] or [hint]
    choices = [choice for part in parts for choice in ([part] if isinstance(part, str) else get_args(part))]
    return "{" + ",".join(choices) + "}" if choices else parts[0].__name__.upper()


HINTS = get_type_hints(TrainOptions)
AXES = [each.name for each in fields(TrainOptions) if each.name not in SINGLE and HINTS[each.name] is not bool]
AXES.sort(key=lambda name: list(PLURAL).index(name) if name in PLURAL else len(PLURAL))  # the plural ones first


def _grid_fields() -> Iterable[tuple[str, Any, Any]]:
    """The fields of TrainOptions, each axis with a tuple of values in place of the one."""
    descriptions = _descriptions(TrainOptions)
    own = {each.name: each for each in fields(TrainOptions)}
    for name in [*AXES, *(name for name in own if name not in AXES)]:
        hint, default = HINTS[name], own[name].default
        if name in AXES:
            about = tyro.conf.arg(help=descriptions[name], metavar=f"{_shown(hint)} ...")
            values = Usual(DEFAULTS.get(name, (default,)))
            yield PLURAL.get(name, name), Annotated[tuple[hint, ...], about], field(default=values)
        elif name not in ("output_dir", "resume", "dataloader_num_workers"):
            yield name, Annotated[hint, tyro.conf.arg(help=descriptions[name])], field(default=default)


Grid: Any = make_dataclass("Grid", _grid_fields(), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class AblateOptions(Grid):
    """Train every combination of the values given, and compare: which scheme trains at which depth?

    Flags are those of resseq train; those of model, training and data may have several values. A cell trains for 300
    steps unless --max-steps or --num-train-epochs says otherwise. The same command again goes on where it was stopped.
    """

    output_dir: str | None = None
    """Where the cells and the report go; runs/ablate-DATA unless given. Finished cells in it are kept."""
    workers: int | None = None
    """Cells at a time; what the cores carry unless given, 1 on a GPU."""
    threads: int = 1
    """CPU threads for each cell. Another number trains the cells again: sums round differently."""
    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or tasks of a Ray cluster that shares the output folder."""
    gpus_per_cell: float = 0.0
    """Share of a GPU that Ray reserves for a cell."""
    ray_address: str | None = None
    """Address of a running Ray cluster; one is started on this machine unless given."""
    dry_run: bool = False
    """Train nothing; print the grid, the parameters of each shape and an estimate of the time."""

    def __post_init__(self) -> None:
        """Raise for a flag without a value, a model or scheme that no grid can have, and a count that is too small.

        Put in what is usual for images.
        """
        for name in AXES:
            plural = PLURAL.get(name, name)
            if isinstance(self.values(name), Usual):
                object.__setattr__(self, plural, Usual(self._usual(name)))
            elif not self.values(name):
                raise ValueError(
                    f"ablate: every flag needs a value; got {flag_of(plural)} with none. Give one, or leave it out."
                )
        if strangers := [name for name in self.model if name not in (*TEXT_MODELS, *IMAGE_MODELS)]:
            raise ValueError(
                f"ablate: a model is {', '.join((*TEXT_MODELS, *IMAGE_MODELS))}, from scratch; got --model "
                f"{strangers[0]}. Use one of them."
            )
        if strangers := [scheme for scheme in self.schemes if not isinstance(scheme, str | None)]:
            raise ValueError(
                f"ablate: a scheme is a name in resseq.SCHEMES; got schemes={strangers[0]!r}. Use a name; a scheme of "
                f"your own goes to Stack(scheme=...) or TextTransformer(scheme=...)."
            )
        check_values(self, ("workers", "threads", "engine", "gpus_per_cell", "ray_address", "dry_run"))

    def _usual(self, name: str) -> tuple[Any, ...]:
        """An axis's default values in this task, and for these models."""
        if name == "max_steps" and not isinstance(self.num_train_epochs, Usual):
            return (None,)  # epochs were asked for
        if set(self.model) == {"vdcnn"} and name in VDCNN_DEFAULTS:
            return VDCNN_DEFAULTS[name]
        if name == "depth" and self.task != "text" and all(layers_named(model) for model in self.model):
            return (None,)  # resnet18 says it in its name
        defaults = DEFAULTS if self.task == "text" else IMAGE_DEFAULTS
        return defaults.get(name, (getattr(TrainOptions, name),))

    def values(self, name: str) -> tuple[Any, ...]:
        """The values of an axis, by the name that the option has in TrainOptions."""
        return getattr(self, PLURAL.get(name, name))

    @property
    def folder(self) -> Path:
        data = "-".join(map(data_name, self.data))
        return Path(self.output_dir or f"runs/ablate-{data}")

    @property
    def axes(self) -> list[str]:
        """The options with several values, but scheme, depth and seed."""
        return [name for name in AXES if len(self.values(name)) > 1 and name not in ("scheme", "depth", "seed")]

    @property
    def command(self) -> str:
        """What to type to have the same again."""
        words = ["resseq", "ablate"]
        for each in fields(self):
            value, flag = getattr(self, each.name), flag_of(each.name)
            if isinstance(value, Usual) or (not isinstance(value, tuple) and value == each.default):
                continue
            if isinstance(value, bool):
                words.append(flag if value else flag_of(f"no_{each.name}"))
            else:
                words += [flag, *(str(one) for one in (value if isinstance(value, tuple) else [value]))]
        return shlex.join(words)


def as_options(**given: Any) -> AblateOptions:
    """Options from Python: a single value stands for a list of one, and any iterable for a tuple."""
    several = {PLURAL.get(name, name) for name in AXES}
    for name, value in given.items():
        if name not in several:
            given[name] = settle(value)
        else:
            given[name] = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    return from_python(AblateOptions, given)


def cells_of(options: AblateOptions) -> list[Cell]:
    """The grid's cells, each once, in the order of the flags.

    Raises: ValueError for a combination that cannot be trained; no data has been read by then.
    """
    from resseq.models import check_model, spell_out

    cells: dict[str, Cell] = {}
    shapes = set()
    shared = {each.name: getattr(options, each.name) for each in fields(TrainOptions) if hasattr(options, each.name)}
    for values in product(*map(options.values, AXES)):
        given = shared | dict(zip(AXES, values, strict=True))
        one = TrainOptions(**given | {"output_dir": None, "resume": "auto"})
        one = spell_out(replace(one, **dict.fromkeys(_unfit(options, one.model))))
        shape = (one.model, *one.arguments.values(), one.vocab_size, one.max_length)
        if shape not in shapes:
            shapes.add(shape)
            check_model(one)
        name = _name(one, options.threads)
        folder = options.folder.absolute() / "cells" / name
        cells[name] = Cell(name, replace(one, output_dir=str(folder)), options.threads)
    return list(cells.values())


def _unfit(options: AblateOptions, model: str) -> list[str]:
    """The usual values that are the transformer's own: they are nothing to this model, or mean something else there."""
    from resseq.models import arguments_of

    strange = ModelOptions().arguments.keys() - arguments_of(model).keys()
    strange |= {"kernel_size"} if model != "transformer" else set()
    return [name for name in DEFAULTS if name in strange and isinstance(options.values(name), Usual)]


def _name(options: TrainOptions, threads: int) -> str:
    """A hash of what a cell's numbers follow from: not of where it is, nor of the machine."""
    bound = {name: value for name, value in asdict(options).items() if name not in MAY_DIFFER}
    return hashlib.sha256(json.dumps(bound | {"threads": threads}, sort_keys=True).encode()).hexdigest()[:12]
