import copy
import math
import re

import pytest
import test_streams as streams
import torch
import torch.nn.functional as F
from helpers import LAYERS, D, Sublayer, randomised, stack
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils import _pytree as pytree

from resseq import SCHEMES, Residual, Stack, TextConvNet, TransformerEncoder, cifar_resnet
from resseq.connections import OneStream
from resseq.layers.feedforward import FeedForward
from resseq.layers.norms import DyT
from resseq.residual import reset_children
from resseq.schemes import HighwayGates, LayerScale, Scheme
from resseq.schemes.norms import Keel, NormFormer
from resseq.schemes.scales import CompleteP, DepthMup
from resseq.stack import parameter_groups

# one residual of each scheme, written by hand; c is its connection
EQUATIONS = {
    "plain": lambda c, f, x: c.post(f(x)),
    "residual": lambda c, f, x: x + f(x),
    "post": lambda c, f, x: c.post(x + f(x)),
    "pre": lambda c, f, x: x + f(c.pre(x)),
    "preact": lambda c, f, x: x + f(c.pre(x)),
    "sandwich": lambda c, f, x: x + c.branch(f(c.pre(x))),
    "branch": lambda c, f, x: x + c.branch(f(x)),
    "highway": lambda c, f, x: c.merge(x, f(x)),
    "gru": lambda c, f, x: c.merge(x, F.relu(f(c.pre(x)))),
    "rezero": lambda c, f, x: x + c.scale.weight * f(x),
    "layerscale": lambda c, f, x: x + c.scale.weight * f(c.pre(x)),
    "deepnorm": lambda c, f, x: c.post((2 * LAYERS) ** 0.25 * x + f(x)),
    "mixln": lambda c, f, x: x + f(c.pre(x)),  # three layers are too few for a quarter
    "lns": lambda c, f, x, i: x + f(c.pre[0](x) / (i // 2 + 1) ** 0.5),
    "keel": lambda c, f, x: c.post(2 * LAYERS * x + f(c.pre(x))),
    "subln": lambda c, f, x: x + f(c.pre(x)),
    "normformer": lambda c, f, x, i: c.skip_scale.weight * x + f(c.pre(x)) if i % 2 else x + c.branch(f(c.pre(x))),
    "ngpt": lambda c, f, x: on_sphere(x, f(x), 0.05 * D**0.5 * c.merge.weight.abs()),
    "orthogonal": lambda c, f, x: x + rejection(f(c.pre(x)), x),
    "delta": lambda c, f, x: rewritten(x, f(c.pre(x)), c.merge),
    "laurel_rw": lambda c, f, x: (
        torch.sigmoid(c.merge.weight[0] - c.merge.weight[1]) * x
        + torch.sigmoid(c.merge.weight[1] - c.merge.weight[0]) * f(c.pre(x))
    ),
    "laurel_lr": lambda c, f, x: x + x @ (c.skip_scale.up @ c.skip_scale.down).T + f(c.pre(x)),
    "skipinit": lambda c, f, x: x + c.scale.weight * f(x),
    "admin": lambda c, f, x: c.post(c.skip_scale.weight * x + f(x)),
    "branchnorm": lambda c, f, x: c.post(x + 300 / 1000 * f(x)),
    "prores": lambda c, f, x, i: x + 300 / (1000 * (i // 2 + 1)) * f(c.pre(x)),
    "depth_mup": lambda c, f, x: x + f(c.pre(x)) / LAYERS**0.5,
    "completep": lambda c, f, x: x + f(c.pre(x)) / LAYERS,
    "nf": lambda c, f, x, i: x + 0.2 * f(x / (1 + 0.2**2 * i) ** 0.5),
    "fixup": lambda c, f, x: x + c.scale[0].weight * f(x + c.pre.bias) + c.scale[1].bias,
    "tfixup": lambda c, f, x: x + f(x),
}
BY_PLACE = {"lns", "prores", "nf", "normformer"}  # their equations take the residual's index as well
CLOSED_BY_NORM = {
    *("pre", "preact", "sandwich", "branch", "layerscale", "mixln", "lns", "subln", "orthogonal", "delta"),
    "normformer",
    *("laurel_rw", "laurel_lr", "prores", "depth_mup", "completep"),
}


def on_sphere(x, y, step):
    x, y = (D**0.5 * z / z.norm(dim=-1, keepdim=True) for z in (x, y))
    moved = (1 - step) * x + step * y
    return D**0.5 * moved / moved.norm(dim=-1, keepdim=True)


def rejection(y, x):
    """What is left of y across x; the 1e-6 keeps a zero stream from dividing by zero."""
    projector = x.unsqueeze(-1) * x.unsqueeze(-2) / (x.square().sum(-1)[..., None, None] + 1e-6)
    return ((torch.eye(D, dtype=x.dtype) - projector) @ y.unsqueeze(-1)).squeeze(-1)


def rewritten(x, y, merge):
    """(I − βkkᵀ)x + βvk."""
    k = y / y.norm(dim=-1, keepdim=True)
    n = D**0.5 * x / x.norm(dim=-1, keepdim=True)
    beta = 2 / (1 + torch.exp(-(n @ merge.strength[0] + merge.strength_bias)))
    v = x @ merge.value[0] + merge.value_bias
    erase = torch.eye(D, dtype=x.dtype) - beta[..., None, None] * k.unsqueeze(-1) * k.unsqueeze(-2)
    return (erase @ x.unsqueeze(-1)).squeeze(-1) + (beta * v).unsqueeze(-1) * k


def tell_the_step(net, step=300):
    for module in net.modules():
        if hasattr(module, "set_step"):
            module.set_step(step)


every_scheme = pytest.mark.parametrize("name", SCHEMES)
of_one_tensor = pytest.mark.parametrize("name", EQUATIONS)


def test_every_scheme_has_an_equation():
    assert EQUATIONS.keys() | streams.EQUATIONS.keys() == SCHEMES.keys()


@of_one_tensor
def test_scheme_equals_its_equation_in_value_and_gradient(name):
    net = randomised(stack(name))
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    expected = x
    tell_the_step(net)
    for index, residual in enumerate(net.residuals):
        place = (index,) if name in BY_PLACE else ()
        expected = EQUATIONS[name](residual.connection, residual.sublayer, expected, *place)
    assert isinstance(net.close, nn.LayerNorm) == (name in CLOSED_BY_NORM)
    if name in CLOSED_BY_NORM:
        expected = F.layer_norm(expected, (D,), net.close.weight, net.close.bias)
    out = net(x)
    torch.testing.assert_close(out, expected)
    inputs, weight = [x, *net.parameters()], torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@every_scheme
def test_compiles_whole_and_exports(name):
    torch._dynamo.reset()
    net, x = stack(name), torch.randn(2, 4, D)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stream_keeps_its_dtype_under_autocast(name, dtype):
    net = stack(name)
    net.close = nn.Identity()  # torch's autocast runs the closing norm in float32, and there the stream has ended
    with torch.autocast("cpu", torch.bfloat16):
        stream = net(torch.randn(2, D, dtype=dtype))
    assert {tensor.dtype for tensor in pytree.tree_leaves(stream) if tensor is not None} == {dtype}


@every_scheme
def test_deepcopy_and_state_dict(name):
    net, x = stack(name), torch.randn(2, D)
    torch.testing.assert_close(copy.deepcopy(net)(x), net(x))
    other = stack(name)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(x), net(x))


@every_scheme
def test_meta_device_then_reset_starts_like_new(name):
    torch.manual_seed(0)
    expected = stack(name)
    expected.reset_parameters()
    with torch.device("meta"):
        net = stack(name)
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(1)
    expected.reset_parameters()
    torch.manual_seed(1)
    net.reset_parameters()
    for (key, ours), theirs in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@every_scheme
def test_a_gradient_reaches_every_parameter(name):
    net = stack(name)
    tell_the_step(net)  # at step 0 a warm-up hides the branches
    net(torch.randn(2, 4, D)).mul(torch.randn(2, 4, D)).sum().backward()
    silent = {key for key, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    names = {key for key, _ in net.named_parameters()}
    # a factor, a matrix that starts at 0 hides what comes before it from the first gradient, by design
    hidden = {
        "rezero": [".sublayer."],
        "skipinit": [".sublayer."],
        "laurel_lr": [".down"],
        "fixup": [".first.", ".pre."],
        "hyper": [".mixing.norm.", ".mixing.scale"],
        "mhc": [".mixing.scale"],
        "attnres": ["residuals.0.connection.gather."],  # one source: nothing to choose
        "attnres_block": ["residuals.0.connection.gather."],
    }.get(name, [])
    assert silent == {key for key in names if any(part in key for part in hidden)}


IDENTITY = {
    *("residual", "pre", "preact", "sandwich", "branch", "rezero", "layerscale", "mixln", "lns", "subln", "orthogonal"),
    *("normformer", "delta", "laurel_lr", "skipinit", "prores", "depth_mup", "completep", "nf", "fixup", "tfixup"),
}


@of_one_tensor
def test_zero_branches(name):
    """The identity where the scheme keeps the stream as it is; for the others, what they do instead."""
    layers = [(torch.zeros_like, torch.zeros_like)] * 2
    net = Stack(layers, dim=D, scheme=without_roles(name))
    net.close = nn.Identity()
    x = torch.randn(3, D)
    out = net(x)
    if name in IDENTITY:
        assert torch.equal(out, x)
    elif name == "plain":
        assert out.abs().max() == 0
    elif name in ("post", "deepnorm", "admin", "branchnorm", "keel"):
        torch.testing.assert_close(out, F.layer_norm(x, (D,)), rtol=0, atol=1e-3)
    elif name == "highway":
        expected = x
        for residual in net.residuals:
            merge = residual.connection.merge
            expected = expected * (1 - torch.sigmoid(expected @ merge.weight.T + merge.bias))
        torch.testing.assert_close(out, expected)
    elif name == "ngpt":
        torch.testing.assert_close(out, x / x.square().mean(-1, keepdim=True).sqrt())
    elif name == "laurel_rw":
        torch.testing.assert_close(out, x / 16)
    else:
        assert name == "gru"
        assert not torch.equal(out, x)


def without_roles(name):
    """The scheme of a name, for sublayers that have no weights."""
    return type(name, (SCHEMES[name],), {"start": lambda self, residuals: None})()


def test_zero_branches_appended_to_a_trained_pre_norm_stack_change_no_bit():
    torch.manual_seed(0)
    net, head = stack("pre"), nn.Linear(D, 3)
    x, y = torch.randn(64, D), torch.randint(3, (64,))
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], 1e-2)
    for _ in range(30):
        F.cross_entropy(head(net(x)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = head(net(x))
    for _ in range(4):
        extra = Sublayer()
        nn.init.zeros_(extra.second.weight)
        nn.init.zeros_(extra.second.bias)
        net.residuals.append(Residual(extra, pre=nn.LayerNorm(D)))
    assert len(net.residuals) == 10
    assert torch.equal(head(net(x)), logits)


def test_rezero_shares_one_factor_in_a_layer():
    net = stack("rezero", parts=2, layers=3)
    scales = [residual.connection.scale for residual in net.residuals]
    assert scales[0] is scales[1]
    assert scales[1] is not scales[2]
    assert sum(p.numel() for p in net.parameters() if p.shape == (1,)) == 3


@pytest.mark.parametrize(("layers", "start"), [(1, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)])
def test_layerscale_starts_by_depth(layers, start):
    net = stack("layerscale", layers=layers)
    assert torch.equal(net.residuals[0].connection.scale.weight, torch.full((D,), start))
    assert torch.equal(stack(LayerScale(0.5)).residuals[0].connection.scale.weight, torch.full((D,), 0.5))


def test_highway_options():
    net = stack(HighwayGates(bias=-1.0, gate="shortcut"))
    merge = net.residuals[0].connection.merge
    assert (merge.gate, merge.bias[0].item()) == ("shortcut", -1.0)


@pytest.mark.parametrize("layers", [3, 12])
def test_deepnorm_constants_and_start(layers):
    """α = (2L)^¼ on the skip; gain β = (8L)^-¼ for all matrices but query and key, whose gain is 1."""
    torch.manual_seed(0)
    width = 64

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.value, self.out = (nn.Parameter(torch.zeros(width, width)) for _ in range(3))

        def weights(self):
            return [("query", self.query), ("value", self.value), ("out", self.out)]

        def forward(self, x):
            return x

    net = Stack([(Wide(), Wide()) for _ in range(layers)], dim=width, scheme="deepnorm")
    bound, gain = (6 / (2 * width)) ** 0.5, (8 * layers) ** -0.25
    for residual in net.residuals:
        assert residual.connection.skip_scale == pytest.approx((2 * layers) ** 0.25)
        assert residual.sublayer.query.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert residual.sublayer.value.abs().max().item() == pytest.approx(gain * bound, rel=0.01)
        assert residual.sublayer.out.abs().max().item() == pytest.approx(gain * bound, rel=0.01)


def test_deepnorm_starts_right_where_each_module_is_reset_in_turn():
    with torch.device("meta"):
        model = TransformerEncoder(64, 3, 4, scheme="deepnorm")
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    bound, gain = (6 / 128) ** 0.5, 24**-0.25
    largest = {role: weight.abs().max().item() for role, weight in model.residuals[-2].sublayer.weights()}
    expected = {"query": bound, "key": bound, "value": gain * bound, "out": gain * bound}
    assert largest == pytest.approx(expected, rel=0.01)


def test_deepnorm_needs_roles():
    with pytest.raises(ValueError, match=r"'deepnorm': sets the starting weights by role; got a Linear without weigh"):
        Stack([nn.Linear(D, D)], dim=D, scheme="deepnorm")


@pytest.mark.parametrize("scheme", ["deepnorm", "tfixup", "fixup", "subln", "ngpt"])
@pytest.mark.parametrize(
    "compute", [weight_norm, spectral_norm, lambda linear: prune.l1_unstructured(linear, "weight", 0.5)]
)
def test_weights_that_are_computed_cannot_be_written_into(scheme, compute):
    sublayer = FeedForward(D)
    compute(sublayer.out)
    with pytest.raises(ValueError, match=f"^Scheme '{scheme}': writes into the weights; got a FeedForward that comput"):
        Stack([sublayer], dim=D, scheme=scheme)


@pytest.mark.parametrize(
    ("scheme", "hint"),
    [
        *(("deepnrom", "Did you mean 'deepnorm'"), ("DeepNorm", "Did you mean 'deepnorm'")),
        *(("BranchNorm", "Did you mean 'branchnorm'"), ("PreNorm", "Did you mean 'pre'")),
        *(("post-ln", "Did you mean 'post'"), ("Sub-LN", "Did you mean 'subln'"), ("zzz", "Use one of")),
        *((LayerScale, "Write LayerScale()"), (nn.LayerNorm, "Use one of"), (["pre"], "Use one of")),
    ],
)
def test_an_unknown_scheme_is_answered_with_the_nearest_name(scheme, hint):
    with pytest.raises(ValueError, match=re.escape(f"got scheme={scheme!r}. {hint}")):
        stack(scheme)


def test_a_scheme_of_your_own():
    class Half(Scheme):
        def connection(self, place):
            return OneStream(scale=0.5**place.index)

    net, x = Stack([nn.Tanh(), nn.Tanh()], dim=D, scheme=Half()), torch.randn(2, D)
    first = x + x.tanh()
    torch.testing.assert_close(net(x), first + 0.5 * first.tanh())


def test_activation_and_norm_free_stacks():
    x = torch.randn(2, D)
    block = nn.Tanh()
    torch.testing.assert_close(Stack([block], dim=D, scheme="residual", activation=nn.ReLU)(x), F.relu(x + x.tanh()))
    torch.testing.assert_close(
        Stack([block], dim=D, scheme="plain", norm=None, activation=nn.ReLU)(x), F.relu(x.tanh())
    )
    torch.testing.assert_close(Stack([block], dim=D, scheme="pre", norm=None)(x), x + x.tanh())


@pytest.mark.parametrize("name", [name for name in EQUATIONS if name != "plain"])
def test_width_changes_through_a_shortcut(name):
    class Widen(Sublayer):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(D, 2 * D)

    net = Stack([Widen()], dim=[D, 2 * D], scheme=name, shortcuts=[nn.Linear(D, 2 * D)])
    x = torch.randn(3, D)
    out = net(x)
    assert out.shape == (3, 2 * D)
    if name == "preact":  # the shortcut reads N(x) where the shape changes
        c = net.residuals[0].connection
        torch.testing.assert_close(out, net.close(c.shortcut(c.pre(x)) + net.residuals[0].sublayer(c.pre(x))))


def test_drop_path_rises_linearly_with_the_layer():
    net = Stack([(nn.Tanh(), nn.Tanh())] * 4, dim=D, scheme="pre", drop_path=0.4)
    rates = [residual.connection.drop_path for residual in net.residuals]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_the_stack_s_drop_path_reaches_a_scheme_that_does_not_know_of_it():
    class Own(Scheme):
        def __init__(self, **slots):
            self.slots = slots

        def connection(self, place):
            return OneStream(**self.slots)

    def rates(**slots):
        net = Stack([nn.Tanh()] * 2, dim=D, scheme=Own(**slots), drop_path=0.4)
        return [residual.connection.drop_path for residual in net.residuals]

    assert rates() == pytest.approx([0.2, 0.4])
    assert rates(drop_path=0.9) == [0.9, 0.9]


@pytest.mark.parametrize("name", ["plain", "highway", "gru", "ngpt", "orthogonal", "delta", "laurel_rw"])
def test_drop_path_and_layer_drop_are_refused_where_there_is_no_sum(name):
    with pytest.raises(ValueError, match="drop_path needs the merge"):
        stack(name, drop_path=0.1)
    with pytest.raises(ValueError, match="layer_drop needs the merge"):
        stack(name, layer_drop=0.1)


def test_layer_drop_leaves_out_a_whole_batch_and_rescales_nothing():
    with pytest.raises(ValueError, match="layer_drop is a probability; got layer_drop=1.5"):
        stack("pre", layer_drop=1.5)
    torch.manual_seed(0)
    net, x = Stack([torch.ones_like], dim=D, scheme="residual", layer_drop=0.3), torch.zeros(4, D)
    seen = [net(x) for _ in range(400)]
    assert all(out.unique().numel() == 1 for out in seen)  # all samples of a batch or none
    assert sum(out[0, 0].item() for out in seen) / 400 == pytest.approx(0.7, abs=0.08)
    assert torch.equal(net.eval()(x), x + 1)


def test_layer_drop_is_drawn_anew_in_a_compiled_stack():
    torch._dynamo.reset()
    net, x = Stack([torch.ones_like], dim=D, scheme="residual", layer_drop=0.5), torch.zeros(2, D)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert {compiled(x)[0, 0].item() for _ in range(20)} == {0.0, 1.0}


def test_mixln_is_post_in_the_first_quarter_of_the_layers():
    net = stack("mixln", layers=9)
    kinds = [residual.connection.post is not None for residual in net.residuals]
    assert kinds == [True] * 4 + [False] * 14  # two layers of two residuals
    x, first = torch.randn(2, D), net.residuals[0]
    torch.testing.assert_close(first(x), F.layer_norm(x + first.sublayer(x), (D,)))


def test_keel_takes_another_alpha():
    assert stack(Keel(alpha=3.0)).residuals[0].connection.skip_scale == 3.0


@pytest.mark.parametrize("layers", [3, 12])
def test_the_starts_of_norm_free_and_sub_norm_schemes(layers):
    def sizes(scheme):
        torch.manual_seed(0)
        net = TransformerEncoder(64, layers, 4, scheme=scheme)
        return [{role: w.norm().item() for role, w in r.sublayer.weights()} for r in list(net.residuals)[-2:]]

    plain = sizes("residual")
    fixup, tfixup, subln = sizes("fixup"), sizes("tfixup"), sizes("subln")
    for attention, _ in [fixup, tfixup, subln]:
        assert attention["query"] == pytest.approx(plain[0]["query"], rel=0.02)
        assert attention["key"] == pytest.approx(plain[0]["key"], rel=0.02)
    for part, role in [(0, "value"), (0, "out"), (1, "in"), (1, "out")]:
        size = plain[part][role]
        assert tfixup[part][role] == pytest.approx(size * 0.67 * layers**-0.25, rel=0.02)
        assert subln[part][role] == pytest.approx(size * math.log(2 * layers) ** 0.5, rel=0.02)
        # m = 2 weights in a branch, of which the last is 0: L^{-1/2}
        assert fixup[part][role] == pytest.approx(0 if role == "out" else size * (2 * layers) ** -0.5, rel=0.02)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (cifar_resnet(8, dim=4, scheme="fixup"), (torch.randn(4, 3, 8, 8),)),
        (
            TextConvNet(9, 2, 7, dim=4, scheme="fixup"),
            (torch.randint(1, 9, (4, 8)), torch.ones(4, 8, dtype=torch.bool)),
        ),
    ],
)
def test_a_branch_of_convolutions_that_starts_at_0_moves_by_a_small_step_a_little(model, inputs):
    outputs = []
    for residual in model.stack.residuals:
        residual.sublayer.register_forward_hook(lambda *call: outputs.append(call[2].detach().abs().max().item()))
    model(*inputs).logsumexp(-1).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-4 * parameter.grad
    model(*inputs)
    before, after = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
    assert max(before) == 0
    assert 0 < max(after) < 0.01


@pytest.mark.parametrize("scheme", ["fixup", "tfixup"])
def test_a_block_of_convolutions_ends_in_no_norm_where_its_start_does_a_norm_s_work(scheme):
    assert isinstance(cifar_resnet(8, scheme=scheme).stack.residuals[0].sublayer.bn2, nn.Identity)
    assert TextConvNet(9, 2, 7, scheme=scheme).stack.residuals[0].sublayer.last_norm is None


def test_fixup_leaves_a_sublayer_without_weights_as_it_is():
    class Tanh(nn.Tanh):
        def weights(self):
            return []

    x = torch.randn(2, 4)
    assert torch.equal(Stack([Tanh()], dim=4, scheme="fixup")(x), x + x.tanh())


@pytest.mark.parametrize("scheme", SCHEMES.values())
def test_every_scheme_has_its_equation_and_its_source(scheme):
    assert "``" in scheme.__doc__
    assert "Source:" in scheme.__doc__


def test_a_reset_does_not_scale_twice():
    for name in ("subln", "fixup"):
        net = stack(name)
        size = net.residuals[0].sublayer.first.weight.norm().item()
        for _ in range(5):
            net.reset_parameters()
        assert net.residuals[0].sublayer.first.weight.norm().item() == pytest.approx(size, rel=0.6)


def test_subln_has_a_norm_in_each_sublayer():
    net = TransformerEncoder(8, 2, 2, scheme="subln", norm=nn.RMSNorm)
    assert all(isinstance(residual.sublayer.inner_norm, nn.RMSNorm) for residual in net.residuals)
    assert TransformerEncoder(8, 2, 2, scheme="pre").residuals[0].sublayer.inner_norm is None


def test_normformer_has_its_norm_and_its_factors_inside():
    net = TransformerEncoder(8, 2, 2, scheme="normformer", norm=nn.RMSNorm)
    for attention, feedforward in zip(net.residuals[::2], net.residuals[1::2], strict=True):
        assert isinstance(feedforward.sublayer.inner_norm, nn.RMSNorm)
        assert attention.sublayer.inner_norm is None
        assert attention.sublayer.head_scale.weight.tolist() == [1.0, 1.0]
        assert feedforward.connection.skip_scale.weight.tolist() == [1.0] * 8
    unscaled = TransformerEncoder(8, 2, 2, scheme=NormFormer(scale_skip=False))
    assert unscaled.residuals[1].connection.skip_scale == 1.0


def test_admin_is_calibrated_in_order():
    """ω_i² = 1 + Σ_{j<i} Var(F_j), by hand, and never falls."""
    torch.manual_seed(0)
    net, x = stack("admin", layers=4).double(), torch.randn(64, 5, D, dtype=torch.float64)
    net.calibrate(x)
    omega_squared, stream = 1.0, x
    for residual in net.residuals:
        weight = residual.connection.skip_scale.weight
        torch.testing.assert_close(weight.square(), torch.full((D,), omega_squared, dtype=torch.float64))
        y, skip = residual.sublayer(stream), omega_squared**0.5 * stream
        omega_squared = skip.var().item() + y.var().item()
        stream = F.layer_norm(skip + y, (D,))
    torch.testing.assert_close(net(x), stream)  # the profiled merge is gone
    again = [residual.connection.skip_scale.weight.clone() for residual in net.residuals]
    net.calibrate(x)
    assert all(torch.equal(a, r.connection.skip_scale.weight) for a, r in zip(again, net.residuals, strict=True))
    net.reset_parameters()
    assert torch.equal(net.residuals[-1].connection.skip_scale.weight, torch.ones(D, dtype=torch.float64))


@pytest.mark.parametrize(("scheme", "lr", "eps"), [(CompleteP(), 1.0, 1 / 8), (DepthMup(), 8**-0.5, 8**-0.5)])
def test_depth_scaled_groups(scheme, lr, eps):
    net = stack(scheme, layers=8)
    (group,) = net.optimizer_groups()
    assert (group["lr_scale"], group["eps_scale"]) == pytest.approx((lr, eps))
    assert {id(p) for p in group["params"]} == {id(p) for p in net.residuals.parameters()}
    assert net.residuals[0].connection.scale == pytest.approx(eps)
    same = stack(type(scheme)(base=8), layers=8)  # at the base depth it is pre-norm with nothing scaled
    assert same.residuals[0].connection.scale == same.optimizer_groups()[0]["eps_scale"] == 1.0
    assert stack("pre").optimizer_groups() == []


def test_a_stack_in_another_learns_at_the_outer_one_s_pace():
    net = Stack([stack("depth_mup"), Sublayer()], dim=D, scheme="completep")
    rest, outer, inner = parameter_groups(net)
    assert outer["eps_scale"] == net.optimizer_groups()[0]["eps_scale"]
    assert inner["params"] == []
    assert {*rest["params"], *outer["params"]} == {*net.parameters()}
    torch.optim.AdamW([rest, outer])  # none stands in both


def test_nf_expects_a_variance_of_one_again_after_a_change_of_shape():
    linear = lambda a, b: nn.Linear(a, b)  # noqa: E731
    widths = [D, D, D, 2 * D, 2 * D]
    layers = [linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    net = Stack(layers, dim=widths, scheme="nf", shortcuts=[None, None, linear(D, 2 * D), None])
    factors = [residual.connection.pre.factor for residual in net.residuals]
    assert factors == pytest.approx([1, 1.04**-0.5, 1.08**-0.5, 1.04**-0.5])
    x, third = torch.randn(2, D), net.residuals[2]
    scaled = x / 1.08**0.5
    torch.testing.assert_close(third(x), third.connection.shortcut(scaled) + 0.2 * third.sublayer(scaled))


def test_orthogonal_adds_nothing_along_the_stream():
    net = stack("orthogonal", layers=1, parts=1).double()
    x = torch.randn(4, D, dtype=torch.float64)
    added = net.residuals[0](x) - x
    assert (added * x).sum(-1).abs().max() < 1e-5
    assert added.abs().max() > 1e-2


def test_delta_starts_at_full_replacement():
    """β = 1: the stream's part along the branch's direction becomes v."""
    torch.manual_seed(0)
    net = stack("delta", layers=1, parts=1).double()
    residual, x = net.residuals[0], torch.randn(4, D, dtype=torch.float64)
    direction = F.normalize(residual.sublayer(residual.connection.pre(x)), dim=-1)
    along = (residual(x) * direction).sum(-1)
    torch.testing.assert_close(along, x @ residual.connection.merge.value[0])
    assert residual.connection.merge.value.std() < 0.1


def test_ngpt_starts_with_steps_of_a_twentieth():
    merge = stack("ngpt").residuals[0].connection.merge
    torch.testing.assert_close(merge.weight, torch.full((D,), D**-0.5))
    x, y = on_sphere(*torch.randn(2, 3, D), 0), on_sphere(*torch.randn(2, 3, D), 1)
    torch.testing.assert_close(merge(x, y), on_sphere(x, y, 0.05))


def test_ngpt_keeps_every_vector_of_the_stream_s_width_at_length_one():
    def lengths(encoder):
        attention, feedforward = (residual.sublayer for residual in encoder.residuals[:2])
        rows = [attention.qkv.weight, feedforward.into.weight, attention.out.weight.T, feedforward.out.weight.T]
        assert all(matrix.shape[1] == 16 for matrix in rows)
        return torch.cat([matrix.norm(dim=1) for matrix in rows]).detach()

    encoder = TransformerEncoder(16, 2, 2, scheme="ngpt", activation="swiglu")
    one = torch.ones(len(lengths(encoder)))
    torch.testing.assert_close(lengths(encoder), one)
    directions = F.normalize(encoder.residuals[1].sublayer.out.weight.detach() * 3, dim=0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(3)
    assert lengths(encoder).min() > 2
    encoder.constrain()
    torch.testing.assert_close(lengths(encoder), one)
    torch.testing.assert_close(encoder.residuals[1].sublayer.out.weight.detach(), directions)
    Stack([nn.Linear(D, D)], dim=D, scheme="ngpt").constrain()  # names no weights: the junction alone


@pytest.mark.parametrize("merge", ["ngpt", "orthogonal", "delta", "laurel_rw"])
def test_other_merges_refuse_shapes_that_differ(merge):
    connection = stack(merge).residuals[0].connection
    with pytest.raises(ValueError, match=r"the branch must give the shape of the shortcut; got branch=\(2, 1\)"):
        connection.merge(torch.ones(2, D), torch.ones(2, 1))


@pytest.mark.parametrize("kind", [nn.LayerNorm, DyT])
@pytest.mark.parametrize("name", SCHEMES)
def test_channels_first_is_channels_last_transposed(name, kind):
    def norm(dim):
        return nn.Sequential(kind(dim), nn.Tanh()) if name == "preact" else kind(dim)

    class First(Sublayer):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    last = Stack([Sublayer() for _ in range(2)], dim=D, scheme=name, norm=norm).eval()
    first = Stack([First() for _ in range(2)], dim=D, scheme=name, norm=norm, channel_dim=1).eval()
    with torch.no_grad():
        for a, b in zip(last.parameters(), first.parameters(), strict=True):
            b.copy_(a.normal_())
    x = torch.randn(2, D, D)  # as long as it is wide: a norm of the wrong axis would run
    torch.testing.assert_close(first(x.transpose(1, 2)), last(x).transpose(1, 2))


@pytest.mark.parametrize("name", ["subln", "fixup", "deepnorm", "tfixup"])
def test_a_sublayer_in_several_places_starts_once(name):
    def size(*sublayers):
        torch.manual_seed(0)
        for sublayer in sublayers:
            reset_children(sublayer)
        return Stack(sublayers, dim=D, scheme=name).residuals[0].sublayer.into.weight.std()

    shared = FeedForward(D)
    torch.testing.assert_close(
        size(shared, shared, shared, shared), size(*(FeedForward(D) for _ in range(4))), rtol=0.3, atol=0
    )


def test_a_calibration_that_fails_leaves_the_stack_usable():
    net = stack("admin")
    with pytest.raises(RuntimeError):
        net.calibrate(torch.randn(2, D + 1))
    assert net(torch.randn(2, D)).shape == (2, D)
