"""What would stop or slow a GPU: a tensor that is made elsewhere, or a question that has to wait for the answer.

The meta device stands for one. It is not the CPU, and it holds no values, so that both are errors.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import resseq
from resseq import SCHEMES, Residual, TextConvNet, TextTransformer, transformer
from resseq.data.batching import LengthBatches, Tokens, collate
from resseq.models.bert import BertClassifier
from resseq.models.image_classifier import ImageClassifier
from resseq.packing import pack
from resseq.training.config import TrainingOptions
from resseq.training.loop import Trainer

VOCAB = 50
BERT = {"vocab_size": VOCAB, "dim": 16, "depth": 2, "heads": 2}
DROPS = {"dropout": 0.1, "attention_dropout": 0.1, "token_dropout": 0.1}
# reversible asks torch which autocast is on, and torch knows of none on meta
NAMES = [name for name in SCHEMES if name != "reversible"]


def texts(length=12):
    mask = torch.ones(3, length, dtype=torch.bool, device="meta")
    return {"ids": torch.zeros(3, length, dtype=torch.int64, device="meta"), "mask": mask}


def images():
    return {"images": torch.zeros(3, 3, 16, 16, dtype=torch.uint8, device="meta")}


def run(model, batch):
    model.to("meta").train()
    model(**batch).sum().backward()
    assert all(parameter.grad is None or parameter.grad.is_meta for parameter in model.parameters())
    with torch.inference_mode():
        assert model.eval()(**batch).is_meta


@pytest.mark.parametrize("scheme", NAMES)
def test_a_text_is_classified_where_the_model_is(scheme):
    run(TextTransformer(VOCAB, 3, 16, 2, 2, scheme=scheme, **DROPS), texts())
    run(TextConvNet(VOCAB, 3, depth=5, dim=16, stages=1, scheme=scheme), texts())


@pytest.mark.parametrize(
    "options",
    [
        *({"positions": positions} for positions in ("sinusoidal", "rotary")),
        *({"pooling": pooling} for pooling in ("mean", "cls")),
        {"drop_path": 0.1, "layer_drop": 0.1},
        {"activation": "swiglu"},
        {"activation_checkpointing": True},
    ],
)
def test_with_every_option(options):
    run(TextTransformer(VOCAB, 3, 16, 2, 2, **options), texts())


@pytest.mark.parametrize("shortcut", ["none", "pad", "projection"])
@pytest.mark.parametrize("pooling", ["kmax", "max", "conv"])
def test_the_very_deep_net(shortcut, pooling):
    run(TextConvNet.vdcnn(3, shortcut=shortcut, pooling=pooling), texts(64))


@pytest.mark.parametrize("shortcut", ["A", "B", "C", "D"])
def test_images(shortcut):
    net = resseq.cifar_resnet(8, shortcut=shortcut, num_classes=3)
    run(ImageClassifier(net, (0.5,) * 3, (0.2,) * 3), images())


def test_texts_share_rows_there_too_where_the_mask_stayed_on_the_cpu(monkeypatch):
    shapes = []
    monkeypatch.setattr(transformer, "pack", lambda x, packing: shapes.append(x.shape) or pack(x, packing))
    mask = torch.arange(12) < torch.tensor([[12], [5], [3]])
    for model in (TextConvNet(VOCAB, 3, depth=5, dim=16, stages=1), BertClassifier(3, BERT, separator=3)):
        run(model, texts() | {"mask": mask})
    run(TextTransformer(VOCAB, 3, 16, 2, 2), texts())
    assert not shapes, "never for a mask that is there"
    run(TextTransformer(VOCAB, 3, 16, 2, 2), texts() | {"mask": mask})
    assert shapes == [(3, 12, 16)] * 2, "in training and after it"


class Asking(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Elsewhere(nn.Module):
    def forward(self, x):
        return x + torch.ones(x.shape[-1])


@pytest.mark.parametrize("sublayer", [Asking(), Elsewhere()])
def test_these_tests_can_fail(sublayer):
    with pytest.raises((RuntimeError, NotImplementedError)):
        Residual(sublayer)(torch.zeros(2, 4, device="meta"))


@pytest.mark.parametrize("class_weights", [None, torch.tensor([1.0, 2.0, 3.0])])
def test_a_training_step_asks_nothing(tmp_path, monkeypatch, class_weights):
    monkeypatch.setattr(torch, "autocast", nullcontext_of)  # torch knows of none on meta
    data = Tokens(torch.ones(40, dtype=torch.int32), torch.full((8,), 5), [0, 1, 2, 0] * 2, 0.0)
    loader = DataLoader(data, batch_sampler=LengthBatches(data.lengths, 2, seed=0), collate_fn=collate)
    options = TrainingOptions(optim="sgd", gradient_accumulation_steps=2, logging_steps=100)  # fused AdamW is not there
    model = TextTransformer(VOCAB, 3, 16, 2, 2).to("meta")
    trainer = Trainer(model, loader, [], options, tmp_path, torch.device("meta"), class_weights)
    steps = trainer.remaining()
    for _ in range(3):
        window = next(steps)
        trainer.begin_step(window[0])
        trainer.take_step(window)
        trainer.step += 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.log_training()  # this asks


def nullcontext_of(*args, **options):
    return nullcontext()
