import pytest
import torch
from torch import nn

from resseq import SCHEMES, Stack
from resseq.factors import FixedScale, LowRank, ScalarBias, Warmup
from resseq.layers.attention import SelfAttention
from resseq.layers.feedforward import FeedForward
from resseq.layers.norms import DyT


def test_a_low_rank_map_starts_in_half_precision_too():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        down = LowRank(8, 2).down
    finally:
        torch.set_default_dtype(default)
    torch.testing.assert_close(down.float() @ down.float().T, torch.eye(2), rtol=0, atol=0.02)


def test_warmup_rises_to_one_and_its_step_is_saved():
    warmup, y = Warmup(4), torch.randn(3, 5)
    assert warmup(y).abs().max() == 0
    for step, factor in [(1, 0.25), (4, 1.0), (5, 1.0)]:
        warmup.set_step(step)
        torch.testing.assert_close(warmup(y), factor * y)
    other = Warmup(4)
    other.load_state_dict(warmup.state_dict())
    assert other.step.item() == 5
    assert other.step.dtype == torch.int64
    other.reset_parameters()
    assert other.step.item() == 0
    assert warmup(y.bfloat16()).dtype == torch.bfloat16


def test_warmup_does_not_freeze_when_compiled():
    torch._dynamo.reset()
    warmup, y = Warmup(10), torch.ones(2)
    compiled = torch.compile(warmup, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1, 4):
            warmup.set_step(step)
            torch.testing.assert_close(compiled(y), y * step / 10)


def test_low_rank_is_x_plus_bax():
    x = torch.randn(2, 5, 8)
    low = LowRank(8, 3)
    assert torch.equal(low(x), x)
    torch.testing.assert_close(low.down @ low.down.T, torch.eye(3), atol=1e-5, rtol=0)
    nn.init.normal_(low.up)
    torch.testing.assert_close(low(x), x + x @ low.down.T @ low.up.T)
    images = LowRank(8, 3, channel_dim=1)
    images.load_state_dict(low.state_dict())
    torch.testing.assert_close(images(x.transpose(1, 2)), low(x).transpose(1, 2))


def test_times_and_shift():
    x, shift = torch.randn(4), ScalarBias()
    assert torch.equal(FixedScale(0.5)(x), x / 2)
    assert torch.equal(shift(x), x)
    nn.init.constant_(shift.bias, 2.0)
    assert torch.equal(shift(x), x + 2)


def test_dyt_is_its_equation_and_stands_for_a_norm():
    x = torch.randn(4, 6)
    norm = DyT(6)
    torch.testing.assert_close(norm(x), torch.tanh(x / 2))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(norm(x), norm.weight * (norm.alpha * x).tanh() + norm.bias)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert isinstance(Stack([nn.Linear(6, 6)], dim=6, norm=DyT).close, DyT)


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_inner_norm_stands_before_the_last_matrix(activation):
    x, seen = torch.randn(2, 5, 8), []
    sublayers = [FeedForward(8, 12, activation=activation, inner_norm=nn.LayerNorm)]
    sublayers.append(SelfAttention(8, 2, inner_norm=nn.LayerNorm))
    for sublayer, width in zip(sublayers, (12, 8), strict=True):
        assert sublayer.inner_norm.normalized_shape == (width,)
        sublayer.out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        sublayer(x)
        assert seen[-1].mean(-1).abs().max() < 1e-5
        torch.testing.assert_close(seen[-1].var(-1, unbiased=False), torch.ones(2, 5), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["branchnorm", "prores"])
def test_a_warmup_of_no_step_is_refused(name):
    with pytest.raises(ValueError, match="period is a number of steps; got period=0. Use 1 or more"):
        Stack([nn.Tanh()], dim=4, scheme=SCHEMES[name](0))
