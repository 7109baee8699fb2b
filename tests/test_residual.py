import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import randomised
from torch import nn

from resseq import Concat, GRUGate, Highway, LearnedScale, Residual, Stack
from resseq.connections import Connection

D = 6


def ln():
    return nn.LayerNorm(D)


def branch():
    return nn.Sequential(nn.Linear(D, 2 * D), nn.Tanh(), nn.Linear(2 * D, D))


# every slot: how it is built, and the same line written by hand
SLOTS = {
    "nothing": (lambda: {}, lambda c, f, x: x + f(x)),
    "pre": (lambda: {"pre": ln()}, lambda c, f, x: x + f(c.pre(x))),
    "post": (lambda: {"post": ln()}, lambda c, f, x: c.post(x + f(x))),
    "branch": (lambda: {"branch": ln()}, lambda c, f, x: x + c.branch(f(x))),
    "sandwich": (lambda: {"pre": ln(), "branch": ln()}, lambda c, f, x: x + c.branch(f(c.pre(x)))),
    "scale": (lambda: {"scale": 0.1}, lambda c, f, x: x + 0.1 * f(x)),
    "rezero": (lambda: {"scale": LearnedScale(0.0)}, lambda c, f, x: x + c.scale.weight * f(x)),
    "layerscale": (lambda: {"scale": LearnedScale(1e-4, dim=D)}, lambda c, f, x: x + c.scale.weight * f(x)),
    "skip_scale": (lambda: {"skip_scale": 1.86, "post": ln()}, lambda c, f, x: c.post(1.86 * x + f(x))),
    "skip_module": (lambda: {"skip_scale": LearnedScale(1.0)}, lambda c, f, x: c.skip_scale.weight * x + f(x)),
    "shortcut": (
        lambda: {"shortcut": nn.Linear(D, D), "post": nn.ReLU()},
        lambda c, f, x: F.relu(c.shortcut(x) + f(x)),
    ),
    "shortcut_reads_pre": (
        lambda: {"shortcut": nn.Linear(D, D), "pre": ln(), "shortcut_reads": "pre"},
        lambda c, f, x: c.shortcut(c.pre(x)) + f(c.pre(x)),
    ),
    "shortcut_reads_stream": (
        lambda: {"shortcut": nn.Linear(D, D), "pre": ln()},
        lambda c, f, x: c.shortcut(x) + f(c.pre(x)),
    ),
    "highway": (lambda: {"merge": Highway(D)}, lambda c, f, x: c.merge(x, f(x))),
    "gru": (
        lambda: {"pre": ln(), "branch": nn.ReLU(), "merge": GRUGate(D)},
        lambda c, f, x: c.merge(x, F.relu(f(c.pre(x)))),
    ),
    "concat": (lambda: {"merge": Concat()}, lambda c, f, x: torch.cat([x, f(x)], -1)),
    "all": (
        lambda: {
            "pre": ln(),
            "branch": ln(),
            "scale": LearnedScale(0.3),
            "shortcut": nn.Linear(D, D),
            "skip_scale": 0.7,
            "merge": Highway(D),
            "post": ln(),
        },
        lambda c, f, x: c.post(c.merge(0.7 * c.shortcut(x), c.scale.weight * c.branch(f(c.pre(x))))),
    ),
}
every_slot = pytest.mark.parametrize("slot", SLOTS)


@every_slot
def test_slot_equals_its_equation_in_value_and_gradient(slot):
    build, by_hand = SLOTS[slot]
    layer = randomised(Residual(branch(), **build()))
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), by_hand(layer.connection, layer.sublayer, x)
    torch.testing.assert_close(out, expected)
    inputs, weight = [x, *layer.parameters()], torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(z, inputs, weight) for z in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(layer, torch.randn(2, D, dtype=torch.float64, requires_grad=True))


@every_slot
def test_compiles_whole_and_exports(slot):
    torch._dynamo.reset()
    layer, x = Residual(branch(), **SLOTS[slot][0]()), torch.randn(2, 3, D)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({1: length},)).module()
    longer = torch.randn(2, 5, D)
    torch.testing.assert_close(exported(longer), layer(longer))


def test_drop_path_compiles_whole_and_is_not_frozen():
    torch._dynamo.reset()
    layer = torch.compile(Residual(nn.Identity(), drop_path=0.5), fullgraph=True, backend="aot_eager")
    x = torch.ones(64, 2)
    assert not torch.equal(layer(x), layer(x))


@every_slot
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stream_keeps_its_dtype_under_autocast(slot, dtype):
    layer, x = Residual(branch(), **SLOTS[slot][0]()), torch.randn(2, 3, D, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dtype


def test_a_float32_branch_does_not_promote_a_bfloat16_stream_nor_the_other_way():
    assert Residual(lambda x: x.float())(torch.randn(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert Residual(lambda x: x.bfloat16())(torch.randn(3)).dtype == torch.float32
    scaled = Residual(nn.Identity(), scale=LearnedScale(0.5, dim=3))
    assert scaled(torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@every_slot
def test_deepcopy_and_state_dict(slot):
    build = SLOTS[slot][0]
    layer, x = Residual(branch(), **build()), torch.randn(2, 3, D)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    other = Residual(branch(), **build())
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))


@every_slot
def test_meta_device_then_reset_starts_as_if_built_here(slot):
    """In the order of modules(), which is how sharded training resets; constants must come back exactly."""
    build = SLOTS[slot][0]
    here = Residual(branch(), **build())
    with torch.device("meta"):
        layer = Residual(branch(), **build())
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, ours), theirs in zip(layer.named_parameters(), here.parameters(), strict=True):
        assert torch.isfinite(ours).all(), name
        if theirs.unique().numel() == 1:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("shape", [(D,), (4, D), (2, 3, D), (2, 3, 4, D), (1, 2, 3, 4, D)])
def test_any_rank(shape):
    layer, x = Residual(branch(), pre=ln()), torch.randn(shape)
    torch.testing.assert_close(layer(x), x + layer.sublayer(layer.connection.pre(x)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_survives(memory_format):
    junction = Residual(
        nn.Conv2d(3, D, 3, 2, 1),
        shortcut=nn.Conv2d(3, D, 1, 2),
        post=nn.ReLU(),
        scale=LearnedScale(0.1, dim=D, channel_dim=1),
        drop_path=0.5,
    )
    junction = junction.to(memory_format=memory_format)
    out = junction(torch.randn(2, 3, 8, 8).to(memory_format=memory_format))
    assert out.shape == (2, D, 4, 4)
    assert out.is_contiguous(memory_format=memory_format)


def test_gradient_of_a_convolution_with_a_shortcut():
    """For y = conv(x) + x, ∂L/∂W is the plain convolution's and ∂L/∂x gains exactly the identity."""
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
    layer = Residual(conv)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)  # ∂L/∂y
    dx, dw = torch.autograd.grad(layer(x), [x, conv.weight], weight)
    plain_dx, plain_dw = torch.autograd.grad(conv(x), [x, conv.weight], weight)
    assert torch.equal(dw, plain_dw)
    assert torch.equal(dx, plain_dx + weight)


def test_extra_arguments_go_to_the_sublayer_untouched():
    seen = {}

    def sublayer(x, *args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        return x

    memory, mask = torch.randn(3), torch.ones(3, dtype=torch.bool)
    Residual(sublayer, pre=ln())(torch.randn(2, D), memory, mask=mask)
    assert seen["args"][0] is memory
    assert seen["kwargs"]["mask"] is mask


def test_a_tuple_comes_back_with_the_stream_first():
    x = torch.randn(2, D)
    out, cache, number = Residual(lambda x: (2 * x, "cache", 7))(x)
    torch.testing.assert_close(out, 3 * x)
    assert (cache, number) == ("cache", 7)
    out, (h, c) = Residual(nn.LSTM(D, D, batch_first=True))(torch.randn(2, 4, D))
    assert out.shape == (2, 4, D)
    assert h.shape == c.shape == (1, 2, D)


def test_torch_attention_as_the_branch():
    attention, x = nn.MultiheadAttention(D, 2, batch_first=True).eval(), torch.randn(2, 4, D)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    layer = Residual(attention, pre=ln())
    h = layer.connection.pre(x)
    expected, weights = attention(h, h, h, key_padding_mask=~mask)
    out, ours = layer(x, mask=mask)
    torch.testing.assert_close(out, x + expected)
    torch.testing.assert_close(ours, weights)
    memory = torch.randn(2, 7, D)
    torch.testing.assert_close(layer(x, memory, memory)[0], x + attention(h, memory, memory)[0])
    torch.testing.assert_close(layer(x, key=memory, value=memory)[0], x + attention(h, memory, memory)[0])
    torch.testing.assert_close(layer(x, memory)[0], x + attention(h, memory, memory)[0])
    torch.testing.assert_close(layer(x, mask=mask.long())[0], x + expected)
    assert layer(x, key_padding_mask=~mask, need_weights=False)[1] is None
    assert "sublayer.in_proj_weight" in layer.state_dict()


def test_drop_path_rescales_in_training_and_is_absent_in_evaluation():
    torch.manual_seed(0)
    layer, x = Residual(torch.ones_like, drop_path=0.25), torch.zeros(4000, 2)
    out = layer(x)
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert abs(out.mean() - 1) < 0.05
    assert torch.equal(layer.eval()(x), torch.ones_like(x))


def test_a_wrong_shape_names_the_shortcut():
    with pytest.raises(ValueError, match=r"got branch=\(2, 1\), shortcut=\(2, 6\). Give shortcut="):
        Residual(nn.Linear(D, 1))(torch.randn(2, D))
    with pytest.raises(ValueError, match="Give shortcut="):
        Residual(nn.Conv2d(3, 3, 3))(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("slot", ["scale", "skip_scale"])
def test_a_tensor_as_a_factor_is_sent_to_learned_scale(slot):
    with pytest.raises(
        ValueError, match=f"{slot} is a number or a module; got {slot} of type Parameter. Use LearnedSc"
    ):
        Residual(nn.Identity(), **{slot: nn.Parameter(torch.ones(1))})


def test_an_integer_stream_does_not_truncate_the_sum():
    ids = torch.tensor([1, 2, 3])
    torch.testing.assert_close(Residual(lambda x: x * 0.5)(ids), ids * 1.5)


def test_drop_path_under_vmap():
    layer = Residual(nn.Tanh(), drop_path=0.5)
    out = torch.func.vmap(layer, randomness="different")(torch.randn(3, 4, D))
    assert out.shape == (3, 4, D)


def test_slots_beside_a_connection():
    with pytest.raises(ValueError, match="got connection=Connection beside pre, scale"):
        Residual(nn.Identity(), connection=Connection(), pre=ln(), scale=0.1)


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_drop_path_is_a_probability(p):
    with pytest.raises(ValueError, match=f"drop_path is a probability; got drop_path={p}"):
        Residual(nn.Identity(), drop_path=p)


def test_drop_path_needs_a_sum():
    with pytest.raises(ValueError, match="drop_path needs the merge \\+; got drop_path=0.1 with merge=Highway"):
        Residual(nn.Identity(), drop_path=0.1, merge=Highway(D))


def test_shortcut_reads_is_checked():
    with pytest.raises(ValueError, match="got shortcut_reads='post'"):
        Residual(nn.Identity(), shortcut_reads="post")


def test_an_in_place_sublayer_is_refused_where_it_would_overwrite_the_stream():
    with pytest.raises(ValueError, match="Use inplace=False"):
        Residual(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(D, D)))
    Residual(nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True)))  # works on its own tensor
    for idle in (nn.Dropout(0.1), nn.Identity()):  # in eval mode both hand on the stream itself
        with pytest.raises(ValueError, match="Use inplace=False"):
            Residual(nn.Sequential(nn.Sequential(idle), nn.ReLU(inplace=True)))
    with pytest.raises(ValueError, match="pre must leave the stream as it is"):
        Residual(nn.Linear(D, D), pre=nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="Use inplace=False"):
        Residual(nn.ReLU(inplace=True), pre=ln(), shortcut=nn.Linear(D, D), shortcut_reads="pre")
    layer, x = Residual(nn.ReLU(inplace=True), pre=ln()), torch.randn(2, D)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("given", [None, [torch.ones(D)], {"y": torch.ones(D)}, (None, 1)])
def test_a_sublayer_that_gives_no_tensor_is_named(given):
    def oracle(x):
        return given

    with pytest.raises(ValueError, match=r"a tuple that begins with one; got \w+ from oracle\. Return"):
        Residual(oracle)(torch.ones(D))


def test_a_tuple_of_one_stays_one():
    (out,) = Residual(lambda x: (x,))(torch.ones(D))
    assert torch.equal(out, 2 * torch.ones(D))


def test_a_residual_starts_again():
    residual = Residual(nn.Linear(D, D), pre=ln(), merge=Highway(D)).to("meta").to_empty(device="cpu")
    for parameter in residual.parameters():
        nn.init.constant_(parameter, math.nan)
    residual.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in residual.parameters())


def test_a_connection_of_your_own():
    class Half(Connection):
        def read(self, stream):
            return stream / 2, stream

        def write(self, stream, y, carry):
            return carry - self.finish(y)

    x = torch.randn(2, D)
    torch.testing.assert_close(Residual(torch.exp, connection=Half(scale=0.5))(x), x - 0.5 * torch.exp(x / 2))


def test_a_model_called_twice_does_not_remember():
    layer, x = Residual(branch(), pre=ln(), merge=GRUGate(D)), torch.randn(2, D)
    assert torch.equal(layer(x), layer(x))


def test_inductor_compiles_it_too():
    torch._dynamo.reset()
    layer, x = Residual(branch(), **SLOTS["all"][0]()), torch.randn(4, D, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    out, expected = compiled(x), layer(x)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(z.square().sum(), x)[0] for z in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_sublayer_that_writes_into_the_stream_is_refused_when_it_does():
    class Hidden(nn.Module):
        def forward(self, x):
            return F.relu(x, inplace=True)

    for layer in (Residual(lambda x: x.mul_(2)), Residual(Hidden()), Residual(Hidden(), pre=nn.Identity())):
        with pytest.raises(ValueError, match="which writes into its input. Use operations that are not in place"):
            layer(torch.randn(2, D))
    x = torch.randn(2, D)
    kept = x.clone()
    torch.testing.assert_close(Residual(Hidden(), pre=ln())(x), x + F.relu(F.layer_norm(x, [D])))
    assert torch.equal(x, kept)
    for scheme in ("resi_dual", "denseformer"):  # streams of more than one tensor
        with pytest.raises(ValueError, match="which writes into its input"):
            Stack([Hidden(), Hidden()], dim=D, scheme=scheme, norm=None)(torch.randn(2, D))
    with torch.inference_mode():  # nothing is counted there
        assert torch.equal(Residual(torch.exp)(torch.zeros(2)), torch.ones(2))
    with pytest.raises(ValueError, match="which writes into its input"):  # the branch is the stream itself
        Residual(nn.Dropout(0.1), branch=nn.ReLU(inplace=True)).eval()(torch.randn(2, D))
    with pytest.raises(ValueError, match="skip_scale must leave the stream as it is"):
        Residual(nn.Linear(D, D), skip_scale=nn.Dropout(0.5, inplace=True))
    with pytest.raises(ValueError, match="shortcut must leave the stream as it is"):
        Residual(nn.Linear(D, D), shortcut=nn.ReLU(inplace=True))


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"pre": nn.LayerNorm}, "pre is a module or a function; got pre=LayerNorm. Build the module first"),
        ({"post": "layernorm"}, "post is a module or a function; got post='layernorm'"),
        ({"merge": "highway"}, r"merge is a module .* got merge='highway'. Build .*, such as Highway\(dim\)"),
        ({"scale": LearnedScale}, "scale is a number or a module; got scale of type type"),
        ({"connection": "pre"}, "connection is a Connection; got connection='pre'"),
    ],
)
def test_a_slot_of_the_wrong_kind_is_refused_at_once(slots, message):
    with pytest.raises(ValueError, match=message):
        Residual(nn.Linear(D, D), **slots)
    with pytest.raises(ValueError, match="sublayer is a module or a function; got sublayer=Linear"):
        Residual(nn.Linear, **slots)


def test_a_shortcut_that_takes_the_mask_wants_it_by_name():
    class Shortcut(nn.Module):
        takes_mask = True

        def forward(self, x, mask):
            return x * mask

    layer, x, mask = Residual(lambda x, mask: x, shortcut=Shortcut()), torch.randn(3, 2), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(layer(x, mask=mask), x + x * mask)
    with pytest.raises(ValueError, match="Write mask=mask"):
        layer(x, mask)


def test_a_learned_scale_is_not_broadcast():
    with pytest.raises(ValueError, match=r"got dim=6 for a branch of shape \(2, 1\). Use dim=1"):
        Residual(nn.Linear(D, 1), scale=LearnedScale(1.0, dim=D))(torch.randn(2, D))


def test_compiled_attention_is_attention():
    torch._dynamo.reset()
    attention = nn.MultiheadAttention(D, 2, batch_first=True)
    compiled = Residual(torch.compile(attention, backend="eager"))
    x, mask = torch.randn(2, 4, D), torch.arange(4) < torch.tensor([[4], [2]])
    torch.testing.assert_close(compiled(x, mask=mask)[0], Residual(attention)(x, mask=mask)[0])


def test_an_unknown_slot_is_answered_with_those_there_are():
    with pytest.raises(TypeError, match="the slots are pre, branch, scale, .*; got norm. Write pre=norm for pre-norm"):
        Residual(nn.Linear(D, D), norm=ln())
