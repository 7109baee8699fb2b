"""Dropout: the distribution of what it keeps, and when it does nothing."""

import pytest
import torch

from resseq.layers.dropout import Dropout

N = 1_000_003  # no multiple of four


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_each_entry_is_dropped_with_probability_p_and_the_mean_stays(p):
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(N))
    kept = y > 0
    assert (~kept).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / N) ** 0.5)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    assert y.double().var().item() == pytest.approx(p / (1 - p), rel=0.02)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5])
def test_neighbours_are_independent(distance):
    # entries that share a random number too: the correlation of n independent pairs is below 5/√n
    torch.manual_seed(1)
    x = Dropout(0.3)(torch.ones(N)).double()
    x = x - x.mean()
    assert abs((x[:-distance] * x[distance:]).mean() / x.var()) < 5 / N**0.5


def test_each_of_the_four_places_of_a_random_number_has_the_same_rate():
    torch.manual_seed(2)
    kept = (Dropout(0.2)(torch.ones(4 * 250_000)) > 0).view(-1, 4).double().mean(0)
    assert (kept - 0.8).abs().max() < 5 * (0.16 / 250_000) ** 0.5


def test_two_calls_differ_and_the_seed_decides():
    layer, x = Dropout(0.5), torch.ones(1000)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_the_gradient_is_the_mask():
    x = torch.ones(3, 5, 7, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.4)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_nothing_happens_in_evaluation_or_at_p_0_and_nothing_stays_at_p_1():
    x = torch.randn(10)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros(10))


def test_it_keeps_dtype_and_memory_format_and_compiles():
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    y = Dropout(0.5)(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(Dropout(0.5), fullgraph=True, backend="aot_eager")
    assert 300 < (compiled(torch.ones(1000)) == 0).sum() < 700


def test_it_draws_where_its_input_is():
    x = torch.ones(10)
    with torch.device("meta"):
        assert Dropout(0.5)(x).device == x.device


def test_each_of_a_mapped_batch_drops_by_itself():
    y = torch.func.vmap(Dropout(0.5), randomness="different")(torch.ones(2, 1000))
    assert set(y.flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(y[0], y[1])
