"""The linear baseline: what it can see, and what it cannot."""

import random

import torch
import torch.nn.functional as F

from resseq.data.baseline import linear_baseline, majority_baseline
from resseq.data.batching import Tokens
from resseq.data.corpus import prepare
from resseq.data.text import TextOptions


def tokens(rows, labels):
    return Tokens(torch.tensor(sum(rows, []), dtype=torch.int32), torch.tensor([len(row) for row in rows]), labels, 0.0)


def draw(count, seed, label_of):
    rng = random.Random(seed)
    rows = [[rng.randrange(3, 20) for _ in range(rng.randrange(2, 9))] for _ in range(count)]
    return tokens(rows, [label_of(row) for row in rows])


def test_a_class_told_by_a_token_is_learnt():
    train, test = (draw(400, seed, lambda row: 2 if 7 in row else 1 if 5 in row else 0) for seed in (0, 1))
    assert linear_baseline(train, test, 20, 3) > 0.95


def test_order_is_not_seen():
    def label(row):
        return int(row[0] < row[-1])

    train, test = (draw(400, seed, label) for seed in (0, 1))
    assert linear_baseline(train, test, 20, 2) < 0.65


def test_it_is_the_optimum_of_its_loss():
    train, test = (draw(300, seed, lambda row: sum(row) % 3) for seed in (0, 1))

    def matrix(split):
        x = torch.zeros(len(split), 20, dtype=torch.float64)
        for i in range(len(split)):
            for token in split[i][0].tolist():
                x[i, token] = 1
        return x

    idf = 1 + torch.log(301 / (1 + matrix(train).sum(0)))
    x, held_out = ((matrix(split) * idf) for split in (train, test))
    x, held_out = x / x.norm(dim=1, keepdim=True), held_out / held_out.norm(dim=1, keepdim=True)
    weight = torch.zeros(20, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], 0.05)
    for _ in range(3000):
        optimizer.zero_grad()
        (F.cross_entropy(x @ weight + bias, train.labels) + 3e-5 * weight.square().sum()).backward()
        optimizer.step()
    theirs = ((held_out @ weight + bias).argmax(1) == test.labels).double().mean().item()
    assert abs(linear_baseline(train, test, 20, 3) - theirs) <= 0.02


def test_the_majority_is_that_of_the_training_texts():
    train, test = tokens([[3]] * 5, [1, 1, 1, 0, 0]), tokens([[3]] * 4, [0, 0, 0, 1])
    assert majority_baseline(train, test) == 0.25


def test_the_embedded_set_is_mostly_told_by_its_words():
    corpus = prepare(TextOptions())
    assert 0.8 < corpus.baselines["linear"] < 0.95
    assert 0.1 < corpus.baselines["majority"] < 0.25
