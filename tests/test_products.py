"""Linear maps: by convolution where that is faster, and the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resseq import products


def _product(monkeypatch, convolves=True):
    """``linear`` as on a CPU for which convolutions are faster, and a list that grows with each convolution."""
    convolutions = []

    def conv2d(*args):
        convolutions.append(args)
        return torch.conv2d(*args)

    monkeypatch.setattr(products, "CONVOLVES_FASTER", convolves)
    monkeypatch.setattr(F, "conv2d", conv2d)
    return products.linear, convolutions


def _turned(*shape):
    """Random numbers of this shape that do not lie in its order."""
    return torch.randn(*shape[::-1]).permute(*range(len(shape))[::-1])


@pytest.mark.parametrize("x", [torch.randn(8, 64, 96), torch.randn(520, 96), _turned(8, 65, 96), _turned(4, 2, 64, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_product_by_convolution_equals_the_matrix_product(x, bias, monkeypatch):
    linear, convolutions = _product(monkeypatch)
    layer, x, direction = nn.Linear(96, 256, bias=bias), x.requires_grad_(), torch.randn(*x.shape[:-1], 256)
    results = []
    for product in (linear, F.linear):
        y = product(x, layer.weight, layer.bias)
        gradients = torch.autograd.grad(y.tanh(), [x, *layer.parameters()], direction, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in gradients), [x, layer.weight])
        results.append([y, *gradients, *second])
    assert len(convolutions) == 1
    assert results[0][0].is_contiguous()
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    "case",
    [
        "few rows",
        "a prime number of rows",
        "narrow",
        "double",
        "autocast",
        "vmap",
        "trace",
        "compile",
        "subclass",
        "sparse",
        "frozen",
        "no oneDNN",
    ],
)
def test_other_products_are_left_to_torch(case, monkeypatch):
    linear, convolutions = _product(monkeypatch)
    rows, width = {"few rows": (240, 512), "a prime number of rows": (521, 96), "narrow": (512, 48)}.get(
        case, (512, 96)
    )
    x, layer = torch.randn(rows, width), nn.Linear(width, 256).requires_grad_(case != "trace")
    if case == "double":
        x, layer = x.double(), layer.double()
    if case == "subclass":
        x = x.as_subclass(type("Named", (torch.Tensor,), {}))

    if case == "sparse":
        layer.weight = nn.Parameter(layer.weight.to_sparse_csr())
    if case == "frozen":
        x, layer = x.requires_grad_(), layer.requires_grad_(False)

    def run(x):
        return linear(x, layer.weight, layer.bias)

    functions = {
        "vmap": lambda: torch.func.vmap(run)(x[None])[0],
        "trace": lambda: torch.jit.trace(run, x, check_trace=False)(x),
        "compile": lambda: torch.compile(run, backend="eager")(x),
    }
    one_dnn = torch.backends.mkldnn.flags(enabled=case != "no oneDNN")
    with one_dnn, torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        y = functions.get(case, lambda: run(x))()
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))
    assert not convolutions


def test_a_wrong_width_is_told_of_in_torch_s_words(monkeypatch):
    linear, _ = _product(monkeypatch)
    with pytest.raises(RuntimeError, match=r"\(512x97 and 96x256\)"):
        linear(torch.randn(512, 97), nn.Linear(96, 256).weight, None)


def test_where_convolutions_are_no_faster_there_are_none(monkeypatch):
    linear, convolutions = _product(monkeypatch, convolves=False)
    linear(torch.randn(512, 96), nn.Linear(96, 256).weight, None)
    assert not convolutions
