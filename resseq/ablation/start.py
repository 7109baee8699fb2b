"""How a cell stands before its first step: what backward must keep, and whether a gradient reaches the first layer."""

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from resseq.data.batching import LengthBatches
from resseq.diagnostics.memory import saved_storages
from resseq.models import build_model
from resseq.options import TrainOptions
from resseq.residual import Residual
from resseq.stack import Stack
from resseq.training.loop import choose_device, make_ready, summed_loss
from resseq.training.metrics import on_device

if TYPE_CHECKING:
    from resseq.data.corpus import Corpus


def first_batches(options: TrainOptions, corpus: "Corpus", count: int = 1) -> list[dict[str, Tensor]]:
    """The batches that training begins with."""
    train = corpus.splits["train"]
    sampler = LengthBatches(train.lengths, options.per_device_train_batch_size, options.seed)
    return [train.collate([train[i] for i in batch]) for batch in list(sampler)[:count]]


def measure_start(options: TrainOptions, corpus: "Corpus") -> dict[str, float]:
    """Measure the first batch on a model like the one that is to be trained, and leave no trace in the generator.

    Returns:
        parameters: of the model;
        saved_bytes: what autograd keeps for the backward pass, each storage once, without the parameters;
        gradient_norm_first, gradient_norm_last: ``‖∂loss/∂θ‖`` over the parameters of the first and of the last
            residual's sublayer;
        stream_growth: root mean square of the stream after the last residual over that before the first.
    """
    device = choose_device(options.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        model = build_model(options, len(corpus.classes), **corpus.reader.shape)
        model.to(device)
        batch, labels = on_device(first_batches(options, corpus)[0], device)
        make_ready(model, batch, device)
        stack = next(module for module in model.modules() if isinstance(module, Stack))
        first, last = (cast(Residual, stack.residuals[index]) for index in (0, -1))
        sizes: dict[str, float] = {}
        first.register_forward_pre_hook(lambda _, args: sizes.update(before=_rms(args[0])))
        last.register_forward_hook(lambda _, args, out: sizes.update(after=_rms(out[0] if type(out) is tuple else out)))
        with saved_storages(model) as saved:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                logits = model(**batch)
            weights = corpus.class_weights(options)
            loss = summed_loss(logits, labels, options.label_smoothing_factor, weights) / len(labels)
        loss.backward()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "saved_bytes": sum(saved.values()),
        "gradient_norm_first": _gradient_norm(first.sublayer),
        "gradient_norm_last": _gradient_norm(last.sublayer),
        "stream_growth": sizes["after"] / sizes["before"] if sizes["before"] else math.inf,
    }


def _gradient_norm(sublayer: Any) -> float:
    gradients = [parameter.grad for parameter in sublayer.parameters() if parameter.grad is not None]
    return torch.stack([gradient.float().norm() for gradient in gradients]).norm().item() if gradients else 0.0


def _rms(stream: Any) -> float:
    """The root mean square over all entries of a stream, of one tensor or of several."""
    parts = [leaf for leaf in pytree.tree_leaves(stream) if isinstance(leaf, Tensor)]
    square = sum(part.detach().float().square().sum().item() for part in parts)
    return math.sqrt(square / sum(part.numel() for part in parts))
