"""What a classifier's logits are worth."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy (nats), share of right answers, unweighted mean of the classes' F1, and the confusion matrix.

    ``confusion[i][j]``: examples of class i that were given class j.
    """

    loss: float
    accuracy: float
    macro_f1: float
    confusion: list[list[int]]

    def scalars(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "confusion"}

    def weighted_accuracy(self, weights: Tensor | None) -> tuple[float, float]:
        """Share a of right answers, each counting what its class weighs, and a's standard error.

        ``a = Σ w r / Σ w``, ``√(Σ w² (r − a)²) / Σ w``, r 1 where the answer is right and else 0; without weights
        ``√(a (1 − a) / n)``.

        Shapes: weights (C,), 1 unless given.
        """
        confusion = torch.tensor(self.confusion).double()
        weights = torch.ones(len(confusion)).double() if weights is None else weights.double()
        right, wrong = confusion.diag(), confusion.sum(1) - confusion.diag()
        total = weights @ (right + wrong)
        accuracy = weights @ right / total
        error = (weights.square() @ (right * (1 - accuracy) ** 2 + wrong * accuracy**2)).sqrt() / total
        return accuracy.item(), error.item()

    def by_class(self, classes: list[str]) -> dict[str, dict[str, float]]:
        """Each class's precision, recall, F1 and rows."""
        given = [sum(column) for column in zip(*self.confusion, strict=True)]
        return {
            name: {
                "precision": row[i] / max(1, given[i]),
                "recall": row[i] / max(1, sum(row)),
                "f1": 2 * row[i] / max(1, sum(row) + given[i]),
                "rows": sum(row),
            }
            for i, (name, row) in enumerate(zip(classes, self.confusion, strict=True))
        }


def measure(batches: Iterable[tuple[Tensor, Tensor]]) -> Metrics:
    """Metrics of logits (B, C) against labels (B,), batch by batch: memory does not grow with their number.

    F1 of a class is 2·TP/(2·TP + FP + FN); a class that neither occurs nor is predicted is left out of the mean.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> measure([(logits, torch.tensor([0])), (logits, torch.tensor([1]))]).accuracy
    0.5
    """
    loss, confusion = 0.0, torch.zeros(0, dtype=torch.int64)
    for logits, labels in batches:
        classes = logits.shape[1]
        pairs = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)
        confusion = pairs + (confusion if len(confusion) else 0)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
    right, true, given = confusion.diag(), confusion.sum(1), confusion.sum(0)
    seen = true + given > 0
    return Metrics(
        loss=loss / int(true.sum()),
        accuracy=int(right.sum()) / int(true.sum()),
        macro_f1=(2 * right[seen].double() / (true + given)[seen]).mean().item(),
        confusion=confusion.tolist(),
    )


def on_device(batch: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """A batch's inputs, keywords of the model, and its labels."""
    inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return inputs, inputs.pop("labels")


def logits_of(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device, bf16: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The model's logits (B, C) of each batch, on the CPU in float32, with the batch's labels (none: empty)."""
    model.eval()
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(**inputs).float().cpu()
        yield logits, batch.get("labels", torch.empty(0))
