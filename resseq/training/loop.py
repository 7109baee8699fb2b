"""One plain training loop for any module that gives logits and any batches that hold labels."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from tqdm import tqdm

from resseq.stack import Stack, parameter_groups
from resseq.training.checkpoint import (
    load_state,
    load_weights,
    newest_checkpoint,
    restore,
    save_checkpoint,
    write_text,
)
from resseq.training.config import TrainingOptions
from resseq.training.metrics import logits_of, measure, on_device
from resseq.training.tracker import Tracker

Batch = dict[str, Tensor]
T = TypeVar("T")


class Diverged(ValueError):
    """A step's gradient is not finite, and the weights are those before it; or the validation loss after it is not.

    Attributes:
        step: which one.
        seconds: of training until then, those before a resumption included.
    """

    def __init__(self, message: str, step: int, seconds: float):
        super().__init__(message)
        self.step, self.seconds = step, seconds


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; the run is saved."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The first SIGTERM or SIGINT is put on the list for the loop to see; a second one acts as if nobody listened.

    Only the main thread may listen, and what the process ignores stays ignored.
    """
    caught: list[int] = []
    before: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        put_back()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        put_back()


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else MPS, else the CPU.

    Raises: ValueError for a device that is not here.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"train: device is auto or a device of this machine; got --device {name} "
                f"({str(error).splitlines()[0]}). Use --device auto."
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def schedule(options: TrainingOptions, step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a share of the highest.

    ``(step + 1)/warmup`` up to 1, then with t the share of the remaining steps: ``1 − t`` (linear),
    ``(1 + cos πt)/2`` (cosine), 1 (constant).
    """
    warmup = options.warmup(steps)
    if step < warmup:
        return (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[options.lr_scheduler_type]


def make_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay for matrices only. Of the groups, see parameter_groups."""
    groups = [
        {
            "params": [p for p in group["params"] if p.requires_grad and (p.ndim > 1) == matrices],
            "weight_decay": options.weight_decay if matrices else 0.0,
            "lr_scale": group["lr_scale"],
            "eps": 1e-8 * group["eps_scale"],
        }
        for group in parameter_groups(model)
        for matrices in (True, False)
    ]
    if options.optim == "sgd":
        return torch.optim.SGD(groups, options.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, options.learning_rate, fused=True)


@torch.no_grad()
def calibrate(model: nn.Module, batch: Batch, device: torch.device) -> None:
    """Show a first batch to the parts whose start depends on data: ``calibrate(...)`` gets what their forward gets.

    Without dropout, but with the batch's own statistics in batch norms, which know no others yet; they forget them.
    """

    def look(part: Any, args: Any, kwargs: Any) -> None:
        part.calibrate(*args, **kwargs)

    parts = [part for part in model.modules() if hasattr(part, "calibrate")]
    hooks = [part.register_forward_pre_hook(look, with_kwargs=True) for part in parts]
    if parts:
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        model.eval()
        for part in model.modules():
            if isinstance(part, _BatchNorm):
                part.train()
        model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
        for buffer, before in buffers:
            buffer.copy_(before)
    for hook in hooks:
        hook.remove()


def make_ready(model: nn.Module, batch: Batch, device: torch.device) -> None:
    """Bring a new model to where its first step, on this batch, finds it: calibrated, in training, clocks at 1."""
    calibrate(model, batch, device)
    model.train()
    for clock in clocks_of(model):
        clock.set_step(1)


def clocks_of(model: nn.Module) -> list[Any]:
    """The parts that want to know which step comes; not the stacks, which would only pass it on to them."""
    return [part for part in model.modules() if hasattr(part, "set_step") and not isinstance(part, Stack)]


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many at a time; the last ones may be fewer."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def summed_loss(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    """The loss of a batch: the sum of its examples', each times the weight of its class.

    Not by cross_entropy's own ``weight``: that weighs each part of a smoothed label by its class, so that a rare class
    would be most of every example's.
    """
    if weights is None:
        return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return losses @ weights.to(labels.device, non_blocking=True)[labels]


class Trainer:
    """Trains a model in a run folder; a run that was stopped goes on from its checkpoint exactly.

    The model takes a batch's entries but "labels" as keywords and returns logits (B, C). The loader's batch sampler has
    ``set_epoch(epoch)`` and ``start_at(batches)``: its order is a function of the epoch alone. Of the weights
    that are validated the latest are kept whose accuracy is within a standard error of the highest: between such the
    noise of few examples would choose, and later ones have learnt at a lower rate. With class_weights it is the
    weighted accuracy.

    Source: Breiman et al. 1984, Classification and Regression Trees, section 3.4.3 (the rule of one standard error).

    Args:
        class_weights: what an example of each class counts in the training loss, (C,), 1 in the mean over all
            examples; 1 for each unless given.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: DataLoader[Any],
        validation: Iterable[Batch],
        options: TrainingOptions,
        folder: Path,
        device: torch.device,
        class_weights: Tensor | None = None,
    ):
        self.model, self.loader, self.validation = model, loader, validation
        self.options, self.folder, self.device = options, folder, device
        self.optimizer = make_optimizer(model, options)
        self.clocks = clocks_of(model)
        self.constrained: list[Any] = [part for part in model.modules() if hasattr(part, "constrain")]
        self.compiled: Any = torch.compile(model) if options.torch_compile else model
        self.per_epoch = options.steps_per_epoch(len(loader))
        self.steps = options.steps(len(loader))
        self.step, self.patience, self.seconds = 0, 0, 0.0  # patience: validations since the highest
        self.gradient_norm = torch.zeros(())  # of the last gradient
        self.checks_each_step = device.type == "cpu"  # elsewhere asking waits for the device
        self.class_weights = class_weights  # on the CPU: reading them from another device would wait for it
        self.running = torch.zeros(4, device=device)  # since the last row: summed loss, weight, right answers, examples
        self.highest = (-1.0, -math.inf, 0.0)  # accuracy and -loss in validation, and the accuracy's standard error
        self.kept: dict[str, Any] = {}  # the validation of the weights that are kept
        self.kept_weights: dict[str, Tensor] = {}
        self.log_file = folder / "metrics.jsonl"
        self.tracker: Tracker | None = None

    def resume(self) -> int:
        """Go on from the newest whole checkpoint, if there is one; the step that training stands at."""
        found = newest_checkpoint(self.folder)
        if found is None:
            return 0
        state = load_state(found)
        restore(self.model, found / "model.safetensors")
        self.kept_weights = load_weights(found / "kept.safetensors")
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.patience, self.seconds = state["step"], state["patience"], state["seconds"]
        self.running, self.highest, self.kept = state["running"].to(self.device), state["highest"], state["kept"]
        torch.set_rng_state(state["rng"])
        device_rng = state.get(f"{self.device.type}_rng")  # None where the run began on another kind of device
        if self.device.type == "cuda" and device_rng is not None:
            torch.cuda.set_rng_state(device_rng, self.device)
        elif self.device.type == "mps" and device_rng is not None:
            torch.mps.set_rng_state(device_rng)
        write_text(self.log_file, state["log"])  # rows that came after the checkpoint will come again
        return self.step

    def save(self) -> None:
        """Write a checkpoint: all that going on from here to the same end needs."""
        state = {
            "step": self.step,
            "patience": self.patience,
            "seconds": self.seconds,
            "highest": self.highest,
            "kept": self.kept,
            "running": self.running,
            "log": self.log_file.read_text() if self.log_file.exists() else "",
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            state["mps_rng"] = torch.mps.get_rng_state()
        save_checkpoint(self.folder, self.step, {"model": self.model.state_dict(), "kept": self.kept_weights}, state)

    def log(self, **row: Any) -> None:
        """Add a row to metrics.jsonl, and to the tracker's."""
        with open(self.log_file, "a") as file:
            file.write(json.dumps({"step": self.step, "epoch": round(self.step / self.per_epoch, 4), **row}) + "\n")
        if self.tracker:
            self.tracker.write(self.step, row)

    def train(self) -> dict[str, Any]:
        """Train to the end, load the weights that were kept into the model and return the validation that chose them.

        Raises: Diverged; Stopped, with the run saved, when a signal asks for the end.
        """
        options = self.options
        if options.report_to == "tensorboard":
            self.tracker = Tracker(self.folder, self.step)
        every = options.eval_steps or self.per_epoch
        bar = tqdm(total=self.steps, initial=self.step, unit="step", disable=not sys.stderr.isatty())
        begun, examples = time.monotonic(), 0
        before, remaining, stopping = self.seconds, self.remaining(), False
        with bar, caught_signals() as caught:
            while not (self.over or stopping):
                window = next(remaining)
                self.begin_step(window[0])
                self.take_step(window)
                self.step += 1
                examples += sum(len(batch["labels"]) for batch in window)
                self.seconds = before + time.monotonic() - begun
                logs = self.step % options.logging_steps == 0
                due = self.step % every == 0 or self.step == self.steps
                if logs or due:
                    self.require_finite(self.step)
                if logs:
                    rate = examples / (self.seconds - before)
                    bar.set_postfix_str(f"{self.log_training()}, {rate:.0f} examples/s", refresh=False)
                bar.update()
                if due:
                    self.validate()
                    self.seconds = before + time.monotonic() - begun
                stopping = bool(caught)  # asked once: a signal that comes while saving stops after the next step
                if due or stopping or self.step % (options.save_steps or every) == 0:
                    self.require_finite(self.step)
                    self.save()
        if caught:
            raise Stopped(
                f"train: {signal.Signals(caught[0]).name} at step {self.step} of {self.steps}; saved in {self.folder}. "
                f"Use the same command with --resume auto to go on.",
                caught[0],
            )
        if self.running[3] > 0:  # steps since the last row
            self.log_training()
        self.model.load_state_dict(self.kept_weights)
        return self.kept

    @property
    def over(self) -> bool:
        """Whether all steps are done, or validation has not become better for as long as it may."""
        return self.step >= self.steps or self.patience >= (self.options.early_stopping_patience or math.inf)

    def remaining(self) -> Iterator[list[Batch]]:
        """The batches of each step from where training stands, epoch after epoch."""
        sampler: Any = self.loader.batch_sampler
        while True:
            epoch, done = divmod(self.step, self.per_epoch)
            sampler.set_epoch(epoch)
            sampler.start_at(done * self.options.gradient_accumulation_steps)
            yield from chunks(self.loader, self.options.gradient_accumulation_steps)

    def log_training(self) -> str:
        """Log the means since the last row, and say them in short."""
        loss, weight, right, count = self.running.tolist()
        self.running.zero_()
        loss, accuracy = loss / weight, right / count
        self.log(loss=loss, accuracy=accuracy, learning_rate=self.optimizer.param_groups[0]["lr"])
        return f"loss {loss:.3f}, accuracy {accuracy:.3f}"

    def begin_step(self, batch: Batch) -> None:
        """What comes before a step: a start that wants to see a batch, clocks, statistics."""
        if self.step == 0:
            calibrate(self.model, batch, self.device)
        self.model.train()
        for clock in self.clocks:
            clock.set_step(self.step + 1)
        if self.options.inspect_every and self.step % self.options.inspect_every == 0:
            self.inspect(batch)

    def inspect(self, batch: Batch) -> None:
        """Log what each block makes of a batch and of its gradient, and leave no trace in the run."""
        from resseq import diagnostics

        inputs, labels = on_device(batch, self.device)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with (
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16),
        ):
            count = len(labels)
            report = diagnostics.inspect(self.model, loss=lambda logits: self.loss(logits, labels) / count, **inputs)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.log(inspect=report.by_depth)

    def weight_of(self, batch: Batch) -> float:
        """What the examples of a batch count in the loss together."""
        labels, weights = batch["labels"], self.class_weights
        return float(len(labels) if weights is None else weights[labels].sum())

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The summed loss of a batch."""
        return summed_loss(logits, labels, self.options.label_smoothing_factor, self.class_weights)

    def take_step(self, window: list[Batch]) -> None:
        """One optimizer step on the mean of a window's examples' losses, each times the weight of its class.

        Over their number: over the sum of their weights, an example of a rare class could count no more than all the
        others of one window. For the same reason a window may have a larger gradient, the more its examples weigh.
        """
        each, count = [self.weight_of(batch) for batch in window], sum(len(batch["labels"]) for batch in window)
        for batch, weight in zip(window, each, strict=True):
            inputs, labels = on_device(batch, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
                logits = self.compiled(**inputs)
            loss = self.loss(logits, labels)
            (loss / count).backward()
            self.running[0] += loss.detach()
            self.running[1] += weight
            self.running[2] += (logits.argmax(1) == labels).sum()
            self.running[3] += len(labels)
        most = (self.options.max_grad_norm or math.inf) * (sum(each) / count)
        self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), most)
        if self.checks_each_step:
            self.require_finite(self.step + 1)
        rate = self.options.learning_rate * schedule(self.options, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        for part in self.constrained:
            part.constrain()

    def require_finite(self, step: int) -> None:
        """Raise Diverged if the last gradient was not finite. One such spoils the weights, and so those after it."""
        if not torch.isfinite(self.gradient_norm):
            raise self.diverged(f"gradient must be finite; got norm={self.gradient_norm.item()}", step)

    def diverged(self, what: str, step: int) -> Diverged:
        fix = "Use a lower --learning-rate or more --warmup-steps."
        return Diverged(f"train: the {what} at step {step}. {fix}", step, self.seconds)

    def validate(self) -> None:
        """Measure on the validation data; keep the weights if none before were better by more than a standard error.

        With a class's weight in the loss, its examples count as much here: else always to answer the most frequent
        class, which the first steps may do, would be hard to beat.

        Raises: Diverged if the loss is not finite: after the last step no gradient would show it.
        """
        metrics = measure(logits_of(self.compiled, self.validation, self.device, self.options.bf16))
        if not math.isfinite(metrics.loss):
            raise self.diverged(f"validation loss must be finite; got loss={metrics.loss}", self.step)
        found, (accuracy, error) = metrics.scalars(), metrics.weighted_accuracy(self.class_weights)
        if self.class_weights is not None:
            found["weighted_accuracy"] = accuracy
        self.log(**{f"validation_{name}": value for name, value in found.items()})
        if (accuracy, -metrics.loss) > self.highest[:2]:
            self.highest, self.patience = (accuracy, -metrics.loss, error), 0
        else:
            self.patience += 1
        highest, _, error = self.highest
        if accuracy >= highest - error:  # of two that chance may have put in this order, the later has learnt more
            self.kept = {"step": self.step, **found}
            self.kept_weights = {
                name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()
            }
