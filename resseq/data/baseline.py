"""What a classifier reaches that knows nothing of order or depth: a figure to stand beside every other."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resseq.data.batching import Images, Tokens

STEPS = 100  # of L-BFGS; it stops by itself before
DECAY = 3e-5  # of the squared weights, beside the mean loss
CHUNK = 1000  # images shrunk at a time


def majority_baseline(train: Tokens | Images, test: Tokens | Images) -> float:
    """Test accuracy of always answering the training examples' most frequent class."""
    assert train.labels is not None
    assert test.labels is not None
    return (test.labels == train.labels.mode().values).double().mean().item()


def linear_baseline(train: Tokens, test: Tokens, vocab_size: int, classes: int) -> float:
    """Test accuracy of multinomial logistic regression on the set of tokens of each text.

    ``softmax(W x + b)``, x the inverse document frequencies ``1 + ln((1 + N)/(1 + n_token))`` of the tokens that the
    text holds, scaled to ``‖x‖₂ = 1``; W and b minimise the mean cross-entropy and 3·10⁻⁵ ‖W‖², from zero. Nothing is
    drawn at random and nothing is tuned.
    """
    assert train.labels is not None
    assert test.labels is not None
    token, text = _presence(train, vocab_size)
    weights = (1 + ((1 + len(train)) / (1 + torch.bincount(token, minlength=vocab_size).double())).log()).float()
    seen, unseen = _bags(token, text, weights), _bags(*_presence(test, vocab_size), weights)
    weight, bias = _regress(seen, train.labels, vocab_size, classes)
    return ((unseen(weight) + bias).argmax(1) == test.labels).double().mean().item()


def pixel_baseline(train: Images, test: Images, classes: int) -> float:
    """Test accuracy of multinomial logistic regression on the colours of each image shrunk to 8 × 8.

    ``softmax(W x + b)``, x the means of the fields of an 8 × 8 grid, standardised; W and b as in ``linear_baseline``.
    """
    assert train.labels is not None
    assert test.labels is not None
    x, unseen = _shrink(train), _shrink(test)
    mean, std = x.mean(0), x.std(0, correction=min(1, len(x) - 1)) + 1e-3
    x, unseen = (x - mean) / std, (unseen - mean) / std
    weight, bias = _regress(lambda weight: x @ weight, train.labels, x.shape[1], classes)
    return ((unseen @ weight + bias).argmax(1) == test.labels).double().mean().item()


def _shrink(images: Images) -> Tensor:
    """(N, 3·8·8), each from 0 to 1."""
    return torch.cat([F.adaptive_avg_pool2d(part / 255, 8).flatten(1) for part in images.pixels.split(CHUNK)])


def _regress(scores: Callable[[Tensor], Tensor], labels: Tensor, features: int, classes: int) -> tuple[Tensor, Tensor]:
    """W and b of a logistic regression, given the map from W to ``W x`` of each training example."""
    weight = torch.zeros(features, classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(scores(weight) + bias, labels) + DECAY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]: its signature wants a float, its documentation this
    return weight.detach(), bias.detach()


def _presence(tokens: Tokens, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Each token that a text holds, once, and the text that holds it; by text."""
    text = torch.arange(len(tokens)).repeat_interleave(tokens.lengths)
    pairs = torch.unique(text * vocab_size + tokens.ids)  # as one number: unique over pairs takes twenty times as long
    return pairs % vocab_size, pairs // vocab_size


def _bags(token: Tensor, text: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """The map from W to ``W x`` of each text."""
    counts = torch.bincount(text)
    norms = torch.zeros(len(counts)).index_add_(0, text, weights[token].square()).sqrt()
    starts, values = counts.cumsum(0) - counts, weights[token] / norms[text]
    return lambda weight: F.embedding_bag(token, weight, starts, mode="sum", per_sample_weights=values)
