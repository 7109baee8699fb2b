import copy

import pytest
import torch
from helpers import randomised
from torch import nn

from resseq import Concat, GRUGate, Highway, LearnedScale, Stack
from resseq.factors import drop_path
from resseq.merges import Delta, add, branch_only

D = 6


def pair(*shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    return x, y


def highway_by_hand(m, x, y):
    t = torch.sigmoid(x @ m.weight.T + m.bias)
    return t * y + (1 - t) * x


def shortcut_gate_by_hand(m, x, y):
    t = torch.sigmoid(x @ m.weight.T + m.bias)
    return y + (1 - t) * x


def gru_by_hand(m, x, y):
    w_r, w_z, w = m.from_branch.chunk(3)
    u_r, u_z = m.from_shortcut.chunk(2)
    u = m.from_reset
    r = torch.sigmoid(y @ w_r.T + x @ u_r.T)
    z = torch.sigmoid(y @ w_z.T + x @ u_z.T - m.bias)
    h = torch.tanh(y @ w.T + (r * x) @ u.T)
    return (1 - z) * x + z * h


CASES = [
    (Highway(D), highway_by_hand),
    (Highway(D, gate="shortcut"), shortcut_gate_by_hand),
    (GRUGate(D), gru_by_hand),
]


@pytest.mark.parametrize(("merge", "by_hand"), CASES)
def test_merge_equals_its_equation_in_value_and_gradient(merge, by_hand):
    merge = randomised(merge)
    x, y = pair(2, 5, D)
    inputs = [x, y, *merge.parameters()]
    out, expected = merge(x, y), by_hand(merge, x, y)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda *tensors: merge(*tensors), pair(2, D))


@pytest.mark.parametrize(
    "make",
    [
        lambda dim: Highway(D, channel_dim=dim),
        lambda dim: Highway(D, gate="shortcut", channel_dim=dim),
        lambda dim: GRUGate(D, channel_dim=dim),
    ],
)
@pytest.mark.parametrize("trailing", [(), (4,), (4, 3), (2, 3, 4)])
def test_channels_first_is_a_one_by_one_map(make, trailing):
    first, last = randomised(make(1)), make(-1).double()
    last.load_state_dict(first.state_dict())
    x, y = pair(2, D, *trailing)
    expected = last(x.movedim(1, -1), y.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(first(x, y), expected)


@pytest.mark.parametrize("make", [lambda: Highway(D, channel_dim=1), lambda: GRUGate(D, channel_dim=1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gates_keep_the_memory_format(make, memory_format):
    x, y = (torch.randn(2, D, 4, 5).to(memory_format=memory_format) for _ in range(2))
    assert make()(x, y).is_contiguous(memory_format=memory_format)


def test_starts():
    highway = Highway(D, bias=-3.0)
    assert torch.equal(highway.bias, torch.full((D,), -3.0))
    bound = (6 / (D + D)) ** 0.5
    gru = GRUGate(D)
    assert torch.equal(gru.bias, torch.full((D,), 2.0))
    for matrix in (highway.weight, gru.from_branch, gru.from_shortcut, gru.from_reset):
        # Xavier uniform of each D×D part, not of the taller matrix that holds them
        assert 0.8 * bound < matrix.abs().max() <= bound


def test_gates_near_the_identity_at_the_start():
    x, y = torch.randn(64, D), torch.randn(64, D)
    assert (Highway(D, bias=-20.0)(x, y) - x).abs().max() < 1e-5
    assert (GRUGate(D, bias=20.0)(x, y) - x).abs().max() < 1e-5


def test_gru_gate_differs_from_gru_cell_only_as_documented():
    """With r forced to 1 and z mirrored, nn.GRUCell computes the same candidate."""
    gate, cell = randomised(GRUGate(D)), nn.GRUCell(D, D).double()
    w_r, w_z, w = gate.from_branch.chunk(3)
    u_r, u_z = gate.from_shortcut.chunk(2)
    with torch.no_grad():
        for gru in (gate, cell):
            (gru.from_branch[:D] if gru is gate else gru.weight_ih[:D]).zero_()
            (gru.from_shortcut[:D] if gru is gate else gru.weight_hh[:D]).zero_()
        cell.weight_ih.copy_(torch.cat([torch.zeros_like(w_r), -w_z, w]))
        cell.weight_hh.copy_(torch.cat([torch.zeros_like(u_r), -u_z, gate.from_reset]))
        # r is σ(0) = ½ in the gate; GRUCell's ½ multiplies U x after the product: the same, as r is constant
        cell.bias_ih.zero_()
        cell.bias_hh.zero_()
        cell.bias_ih[D : 2 * D] = gate.bias
    x, y = pair(3, D)
    torch.testing.assert_close(gate(x, y), cell(y, x))


def test_concat():
    x, y = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    assert torch.equal(Concat(channel_dim=1)(x, y), torch.cat([x, y], 1))
    assert Concat()(x, torch.randn(2, 3, 7)).shape == (2, 3, 11)


def test_learned_scale():
    y = torch.randn(2, D, 4, dtype=torch.float64)
    scale = randomised(LearnedScale(0.1, dim=D, channel_dim=1))
    torch.testing.assert_close(scale(y), y * scale.weight[None, :, None])
    one = randomised(LearnedScale(0.1))
    assert one.weight.shape == (1,)
    torch.testing.assert_close(one(y), y * one.weight)
    assert LearnedScale(0.0)(y).abs().max() == 0


def test_learned_scale_keeps_the_dtype():
    y = torch.randn(2, D, dtype=torch.bfloat16)
    assert LearnedScale(0.1, dim=D)(y).dtype == torch.bfloat16


@pytest.mark.parametrize("merge", [add, Highway(4), Highway(4, gate="shortcut"), GRUGate(4)])
def test_shapes_must_agree(merge):
    with pytest.raises(ValueError, match=r"got branch=\(1, 4\), shortcut=\(2, 4\). Give shortcut="):
        merge(torch.zeros(2, 4), torch.zeros(1, 4))


def test_unknown_gate():
    with pytest.raises(ValueError, match="Highway: gate is 'coupled' or 'shortcut'; got gate='both'"):
        Highway(4, gate="both")


def test_branch_only_ignores_the_shortcut():
    y = torch.randn(3)
    assert branch_only(torch.randn(5), y) is y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_is_per_sample_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    p, y = 0.3, torch.ones(4000, 3, 2, dtype=dtype)
    out = drop_path(y, p)
    per_sample = out.flatten(1)
    assert torch.equal(per_sample, per_sample[:, :1].expand_as(per_sample)), "one decision for each sample"
    kept = per_sample[:, 0] > 0
    assert abs(kept.float().mean() - 0.7) < 0.03
    torch.testing.assert_close(
        per_sample[kept][:, 0].float(), torch.full((int(kept.sum()),), 1 / 0.7), rtol=4e-3, atol=0
    )


def test_drop_path_of_everything_has_a_gradient_of_zero():
    y = torch.randn(4, 3, requires_grad=True)
    drop_path(y, 1.0).sum().backward()
    assert torch.equal(y.grad, torch.zeros_like(y))
    assert torch.equal(drop_path(y, 1.0), torch.zeros_like(y))


@pytest.mark.parametrize("name", ["ngpt", "orthogonal", "delta", "attnres"])
def test_half_precision_neither_overflows_nor_divides_by_zero(name):
    stack = Stack([nn.Tanh()] * 2, dim=D, scheme=name, norm=None)
    half = copy.deepcopy(stack).half()
    x = torch.full((2, D), 300.0) + torch.randn(2, D)
    torch.testing.assert_close(half(x.half()).float(), stack(x), rtol=0, atol=0.5)  # 2^-11 of 300 is 0.15
    zero = torch.zeros(2, D, dtype=torch.half, requires_grad=True)
    out = half(zero)
    assert torch.isfinite(out).all()
    if name != "ngpt":  # whose slope at 0 is 10^6
        assert torch.isfinite(torch.autograd.grad(out.float().sum(), zero)[0]).all()


def test_a_branch_of_zeros_does_not_blow_up_the_delta_rule_s_gradient():
    """As at the padding of a convolutional net, where every bias starts at 0."""
    y = torch.zeros(4, 8, requires_grad=True)
    Delta(8)(torch.randn(4, 8), y).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().max() < 1e6
