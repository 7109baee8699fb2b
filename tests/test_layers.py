import math

import pytest
import torch
import torch.nn.functional as F
from helpers import lengths_to_mask
from torch import nn

from resseq import LearnedScale, TransformerEncoder
from resseq.layers.attention import CrossAttention, SelfAttention
from resseq.layers.convolution import ConvBlock, PadShortcut, hide_padding
from resseq.layers.feedforward import FeedForward
from resseq.layers.linear import Conv1d, Embedding, Linear
from resseq.layers.pooling import POOLINGS, find_pooling
from resseq.layers.positions import LearnedPositions, SinusoidalPositions, rotate

D, H = 8, 2


@pytest.mark.parametrize("mask", [None, lengths_to_mask(5, 3)])
def test_attention_equals_torch_with_every_tensor_random(mask):
    ours, theirs = SelfAttention(D, H).double(), nn.MultiheadAttention(D, H, batch_first=True).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x = torch.randn(2, 5, D, dtype=torch.float64)
    expected = theirs(x, x, x, key_padding_mask=None if mask is None else ~mask)[0]
    torch.testing.assert_close(ours(x, mask), expected)


@pytest.mark.parametrize("rotary", [False, True])
def test_padding_never_reaches_attention(rotary):
    attention, x, mask = SelfAttention(D, H, rotary=rotary), torch.randn(2, 5, D), lengths_to_mask(5, 3)
    changed = x.clone()
    changed[1, 3:] = torch.randn(2, D)
    torch.testing.assert_close(attention(changed, mask)[1, :3], attention(x, mask)[1, :3])
    torch.testing.assert_close(attention(x[1:, :3])[0], attention(x, mask)[1, :3])


def test_attention_dropout_is_off_in_evaluation():
    attention, x = SelfAttention(D, H, dropout=0.5, attention_dropout=0.5), torch.randn(1, 5, D)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


@pytest.mark.parametrize(
    ("dim", "heads", "options", "message"),
    [
        (30, 4, {}, "dim must be divisible by heads; got dim=30, heads=4. Use dim=28 or 32."),
        (2, 4, {}, "got dim=2, heads=4. Use dim=4."),
        (12, 4, {"rotary": True}, "even head width; got dim/heads=3. Use dim=16."),
    ],
)
def test_attention_refuses(dim, heads, options, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        SelfAttention(dim, heads, **options)


def test_feedforward_equals_its_equation():
    x = torch.randn(2, 3, D, dtype=torch.float64)
    for activation, phi in (("gelu", F.gelu), ("relu", F.relu)):
        net = FeedForward(D, activation=activation).double()
        assert net.into.out_features == 4 * D
        expected = phi(x @ net.into.weight.T + net.into.bias) @ net.out.weight.T + net.out.bias
        torch.testing.assert_close(net(x), expected)
    net = FeedForward(D, 12, activation="swiglu").double()
    (_, gate), (_, into), (_, out) = net.weights()
    b_gate, b_in = net.into.bias.chunk(2)
    expected = (F.silu(x @ gate.T + b_gate) * (x @ into.T + b_in)) @ out.T + net.out.bias
    torch.testing.assert_close(net(x), expected)


def test_feedforward_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'gelu', 'relu' or 'swiglu'; got activation='selu'"):
        FeedForward(D, activation="selu")


def test_weights_hand_out_views_by_role():
    attention, gated = SelfAttention(D, H), FeedForward(D, activation="swiglu")
    assert [role for role, _ in attention.weights()] == ["query", "key", "value", "out"]
    assert [role for role, _ in gated.weights()] == ["gate", "in", "out"]
    assert [role for role, _ in ConvBlock(3, 4).weights()] == ["in", "out"]
    with torch.no_grad():
        attention.weights()[2][1].fill_(7.0)
    assert attention.qkv.weight[2 * D :].unique().tolist() == [7.0]
    assert (attention.qkv.weight[: 2 * D] != 7.0).all()


@pytest.mark.parametrize("shape", [(2, 1), (2, 6), (5,), (2, 1, 1, 5), (2, 5, 1)])
def test_a_mask_that_is_not_one_for_every_key_is_refused(shape):
    with pytest.raises(ValueError, match=r"SelfAttention: a mask is \(B, S\) or \(B, L, S\), S = 5 keys here"):
        SelfAttention(D, H)(torch.randn(2, 5, D), torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_every_projection_is_called_so_that_an_adapter_in_its_place_takes_part(kind):
    class LowRank(nn.Module):  # without the attributes of the linear map that it holds
        def __init__(self, base):
            super().__init__()
            self.base, self.up = base, nn.Parameter(torch.ones(base.out_features))

        def forward(self, x):
            return self.base(x) + self.up * x.sum(-1, keepdim=True)

    torch.manual_seed(0)
    attention, inputs = kind(D, H), [torch.randn(2, 5, D) for _ in range(1 + (kind is CrossAttention))]
    for name in (*attention.projections, "out"):
        before, base = attention(*inputs), attention.get_submodule(name)
        attention.add_module(name, LowRank(base))
        assert (attention(*inputs) - before).abs().max() > 1e-3, name
        attention.add_module(name, base)


@pytest.mark.parametrize("module", [lambda i: Linear(256, 256, parts=3, init=i), lambda i: Conv1d(64, 128, 3, init=i)])
def test_starting_weights_by_name(module):
    torch.manual_seed(0)
    fan_in, fan_out = (256, 256) if isinstance(module("xavier"), nn.Linear) else (64 * 3, 128 * 3)
    xavier, normal, default = module("xavier"), module("normal"), module("torch")
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert bound * 0.99 < xavier.weight.abs().max().item() <= bound
    assert xavier.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert normal.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert default.weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)
    assert xavier.bias.abs().max() == normal.bias.abs().max() == 0
    assert 0 < default.bias.abs().max().item() <= 1 / math.sqrt(fan_in)
    with pytest.raises(ValueError, match="init: is 'xavier', 'torch' or 'normal'; got init='kaiming'"):
        module("kaiming")


@pytest.mark.parametrize(("init", "std"), [("xavier", 0.02), ("normal", 0.02), ("torch", 1.0)])
def test_embeddings_start(init, std):
    assert Embedding(1000, 64, init=init).weight.std().item() == pytest.approx(std, rel=0.02)


def test_sinusoidal_positions_by_hand():
    x = SinusoidalPositions()(torch.zeros(1, 7, D))[0]
    for t in range(7):
        for i in range(D // 2):
            angle = t / 10_000 ** (2 * i / D)
            assert x[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert x[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_learned_positions():
    positions = LearnedPositions(5, D)
    x = torch.randn(2, 3, D)
    torch.testing.assert_close(positions(x), x + positions.table.weight[:3])
    with pytest.raises(ValueError, match="got 6 tokens, max_length=5. Use max_length=6"):
        positions(torch.randn(2, 6, D))


def test_positions_go_on_where_the_earlier_tokens_ended():
    x = torch.randn(2, 5, D)
    for positions in (LearnedPositions(5, D), SinusoidalPositions(), rotate):
        torch.testing.assert_close(positions(x[:, 3:], 3), positions(x, 0)[:, 3:])
    with pytest.raises(ValueError, match="got 6 tokens, max_length=5"):
        LearnedPositions(5, D)(x[:, :1], 5)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    rotated_q, rotated_k = rotate(q.expand(9, D)), rotate(k.expand(9, D))
    scores = rotated_q @ rotated_k.T
    for distance in range(-4, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated_q[0], q)
    assert not torch.allclose(scores[0, 1], scores[0, 2])


def test_a_text_of_padding_alone_pools_to_numbers():
    mask = lengths_to_mask(5, 0)
    for name in POOLINGS:
        assert torch.isfinite(find_pooling(name)(torch.randn(2, 5, D), mask)).all(), name


def test_pooling_sees_real_tokens_only():
    x, mask = torch.randn(2, 5, D), lengths_to_mask(5, 3)
    expected = {"mean": x[1, :3].mean(0), "cls": x[1, 0], "max": x[1, :3].amax(0)}
    assert expected.keys() == POOLINGS.keys()
    for name, value in expected.items():
        torch.testing.assert_close(find_pooling(name)(x, mask)[1], value)
    with pytest.raises(ValueError, match="is one of mean, cls, max; got pooling='sum'"):
        find_pooling("sum")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ends_in_norm", [True, False])
def test_conv_block_equals_its_equation(stride, ends_in_norm):
    block = ConvBlock(3, 4, stride=stride, ends_in_norm=ends_in_norm).double().eval()
    for tensor in (*block.parameters(), block.norm.running_mean):
        nn.init.normal_(tensor)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    h = F.relu(block.norm(F.conv1d(x, block.into.weight, stride=stride, padding=1)))
    y = F.conv1d(h, block.out.weight, block.out.bias, padding=1)
    torch.testing.assert_close(block(x), block.last_norm(y) if ends_in_norm else y)


def test_padding_never_reaches_a_convolution():
    block = ConvBlock(3, 4, stride=2).eval()
    x, mask = torch.randn(2, 3, 7), lengths_to_mask(7, 4)
    torch.testing.assert_close(block(x, mask)[1, :, :2], block(x[1:, :, :4])[0])


def test_an_even_kernel_is_refused():
    with pytest.raises(
        ValueError, match="kernel_size must be odd to keep the length; got kernel_size=4. Use kernel_siz"
    ):
        Conv1d(3, 4, 4)


def test_pad_shortcut():
    x = torch.randn(2, 3, 7)
    out = PadShortcut(3, 5, stride=2)(x)
    assert torch.equal(out[:, :3], x[..., ::2])
    assert out[:, 3:].abs().max() == 0


def test_hide_padding():
    x = torch.ones(1, 2, 3)
    assert torch.equal(hide_padding(x, None), x)
    mask = torch.tensor([[True, True, True, True, False, False]])
    assert hide_padding(x, mask, mask_stride=2)[0, 0].tolist() == [1.0, 1.0, 0.0]


def test_head_scale_multiplies_each_head():
    x, sublayer = (
        torch.randn(2, 5, 8),
        SelfAttention(8, 2, head_scale=lambda heads: LearnedScale(1.0, dim=heads, channel_dim=1)),
    )
    with torch.no_grad():
        sublayer.out.weight.copy_(torch.eye(8))
        sublayer.out.bias.zero_()
    before = sublayer(x)
    with torch.no_grad():
        sublayer.head_scale.weight.copy_(torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(sublayer(x), torch.cat([2 * before[..., :4], -3 * before[..., 4:]], -1))


def test_value_residual_mixes_the_first_layer_s_values_into_the_others():
    """By hand: the second layer's value matrix sees to it that its own values are λ₁v₁ + λ₂v."""
    encoder = TransformerEncoder(8, 2, 2, value_residual=True).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    first, _, second, _ = encoder.residuals

    def values(residual, stream):
        return residual.sublayer.split(residual.sublayer.qkv(residual.connection.pre(stream)))

    v1 = values(first, x)[2]
    stream = encoder.residuals[1](first(x, mask=mask))
    q, k, v = values(second, stream)
    share = second.sublayer.value_mix.weight
    expected = stream + second.sublayer.attend(q, k, share[0] * v1 + share[1] * v, mask)
    expected = encoder.close(encoder.residuals[3](expected))
    out = encoder(x, mask=mask)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    inputs = [x, *encoder.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask=mask), out)
    fresh = TransformerEncoder(8, 2, 2, value_residual=True)
    assert fresh.residuals[2].sublayer.value_mix.weight.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"got value_residual=True with Reversible\. Leave out value_residual"):
        TransformerEncoder(8, 2, 2, value_residual=True, scheme="reversible")
    with pytest.raises(ValueError, match=r"value_residual='take' needs the first layer's values; got values=None"):
        fresh.residuals[2](torch.randn(1, 2, 8))
