import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYERS, D, Sublayer, randomised, stack
from torch import nn

from resseq import SCHEMES, Residual, Stack, TransformerEncoder
from resseq.layers.dropout import Dropout
from resseq.schemes.streams import AttnRes, Hyper, Reversible
from resseq.streams import Coupling, HyperMixing, Lanes, Pair, sinkhorn


def norm(x, n):
    return F.layer_norm(x, x.shape[-1:], n.weight, n.bias)


def hyper(net, x, weights):
    """Lane by lane, with the lanes in a list; ``weights`` gives each residual's (read, write, mix)."""
    lanes = [x] * 4
    for residual in net.residuals:
        c = residual.connection
        read, write, mix = weights(c.mixing, torch.stack(lanes, -2))
        y = residual.sublayer(norm(sum(read[..., i, None] * lanes[i] for i in range(4)), c.pre))
        lanes = [sum(mix[..., i, j, None] * lanes[i] for i in range(4)) + write[..., j, None] * y for j in range(4)]
    return norm(sum(lanes) / 4, net.close.norm)


def dynamic_weights(m, lanes):
    n = norm(lanes, m.norm)
    w_read, w_write, w_mix = m.weight[0], m.weight[1], m.weight[2:]
    return (
        m.read + m.scale[0] * torch.tanh((n * w_read).sum(-1)),
        m.write + m.scale[1] * torch.tanh((n * w_write).sum(-1)),
        m.mix.view(4, 4) + m.scale[0] * torch.tanh(torch.einsum("...id,jd->...ij", n, w_mix)),
    )


def manifold_weights(m, lanes):
    v = torch.cat(lanes.unbind(-2), -1)
    v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    moved = v @ m.weight.T
    mix = m.mix.view(4, 4) + m.scale[2] * moved[..., 8:].reshape(*moved.shape[:-1], 4, 4)
    mix = mix.exp()
    for _ in range(20):
        mix = mix / mix.sum(-2, keepdim=True)
        mix = mix / mix.sum(-1, keepdim=True)
    return (
        1 / (1 + torch.exp(-(m.read + m.scale[0] * moved[..., :4]))),
        2 / (1 + torch.exp(-(m.write + m.scale[1] * moved[..., 4:8]))),
        mix.transpose(-1, -2),  # the paper's row is the lane that is written
    )


def denseformer(net, x):
    outputs = [x]
    for layer in range(LAYERS):
        for residual in net.residuals[2 * layer : 2 * layer + 2]:
            x = x + residual.sublayer(norm(x, residual.connection.pre))
        outputs.append(x)
        weight = net.residuals[2 * layer + 1].connection.average.weight
        assert len(weight) == layer + 2
        x = torch.einsum("j,j...->...", weight, torch.stack(outputs))
    return norm(x, net.close.norm)


def attend(m, values):
    values = torch.stack(values)
    scores = (values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ m.weight
    return torch.einsum("k...,k...d->...d", scores.softmax(0), values)


def attnres(net, x, size=1):
    outputs = []  # of the sublayers, summed by blocks only when they are read
    for residual in [*net.residuals, net.close]:
        blocks = [sum(outputs[i : i + size]) for i in range(0, len(outputs), size)]
        at = residual.collapse if residual is net.close else residual.connection.gather
        read = attend(at, [x, *blocks])
        if residual is net.close:
            return norm(read, net.close.norm)
        outputs.append(residual.sublayer(norm(read, residual.connection.pre)))


def dense(net, x):
    outputs = [x]
    for residual in net.residuals:
        read = residual.connection.gather
        outputs.append(residual.sublayer(norm(torch.cat(outputs, -1), read.norm) @ read.down.weight.T))
    return norm(torch.cat(outputs, -1), net.close.norm) @ net.close.down.weight.T


def resi_dual(net, x):
    total = x
    for residual in net.residuals:
        y = residual.sublayer(x)
        x, total = norm(x + y, residual.connection.post), total + y
    return x + norm(total, net.close.norm)


def reversible(net, x):
    x1, x2 = x, x
    for f, g in zip(net.residuals[::2], net.residuals[1::2], strict=True):
        x1 = x1 + f.sublayer(norm(x2, f.connection.pre))
        x2 = x2 + g.sublayer(norm(x1, g.connection.pre))
    return norm((x1 + x2) / 2, net.close.norm)


EQUATIONS = {
    "hyper": lambda net, x: hyper(net, x, dynamic_weights),
    "mhc": lambda net, x: hyper(net, x, manifold_weights),
    "denseformer": denseformer,
    "attnres": attnres,
    "attnres_block": attnres,  # six residuals are fewer than eight blocks
    "dense": dense,
    "resi_dual": resi_dual,
    "reversible": reversible,
}
OPTIONS = {
    "hyper, static": (
        Hyper(dynamic=False),
        lambda net, x: hyper(net, x, lambda m, _: (m.read, m.write, m.mix.view(4, 4))),
    ),
    "attnres, 3 blocks": (AttnRes(3), lambda net, x: attnres(net, x, 2)),
    "attnres, 2 blocks": (AttnRes(2), lambda net, x: attnres(net, x, 3)),
    "attnres, 4 blocks asked": (AttnRes(4), lambda net, x: attnres(net, x, 2)),
    "reversible, stored": (Reversible(recompute=False), reversible),
}
by_name = pytest.mark.parametrize("name", EQUATIONS)


@pytest.mark.parametrize("name", [*EQUATIONS, *OPTIONS])
def test_scheme_equals_its_equation_in_value_and_gradient(name):
    scheme, equation = OPTIONS.get(name) or (name, EQUATIONS[name])
    torch.manual_seed(0)
    net = randomised(stack(scheme))
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    out, expected = net(x), equation(net, x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    inputs, weight = [x, *net.parameters()], torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["hyper", "mhc", "denseformer", "attnres", "attnres_block"])
def test_starts_as_the_pre_norm_net(name):
    """Up to the ε of the norms, which a stream n times smaller feels n² times more."""
    net = stack(name).double()
    pre = stack("pre").double()
    for ours, theirs in zip(net.residuals, pre.residuals, strict=True):
        theirs.sublayer.load_state_dict(ours.sublayer.state_dict())
    for module in [*net.modules(), *pre.modules()]:
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    x = torch.randn(2, 4, D, dtype=torch.float64)
    torch.testing.assert_close(net(x), pre(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["hyper", "mhc", "denseformer", "reversible"])
def test_zero_branches_are_the_identity(name):
    net = Stack([(torch.zeros_like, torch.zeros_like)] * 2, dim=D, scheme=name, norm=None)
    x = torch.randn(3, D)
    torch.testing.assert_close(net(x), x)


@by_name
def test_channels_first_gives_the_same(name):
    """Sublayers that see (B, D, L), as convolutions do."""

    class First(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.movedim(1, -1)).movedim(-1, 1)

    last = stack(name)
    first = Stack(
        [
            (First(a.sublayer), First(b.sublayer))
            for a, b in zip(last.residuals[::2], last.residuals[1::2], strict=True)
        ],
        dim=D,
        scheme=name,
        norm=lambda dim: First(nn.LayerNorm(dim)),
        channel_dim=1,
    )
    randomised(last, 0.3)
    renamed = {key.replace(".inner", ""): tensor for key, tensor in first.double().state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for key, tensor in last.state_dict().items():
            renamed[key].copy_(tensor)
    x = torch.randn(2, D, 4, dtype=torch.float64)
    torch.testing.assert_close(first(x), last(x.movedim(1, -1)).movedim(-1, 1))


@by_name
def test_a_dropped_branch_still_writes(name):
    """With every branch dropped the net is what it is with branches of zeros."""
    net = stack(name, drop_path=1.0)
    for residual in net.residuals:
        residual.connection.drop_path = 1.0
    zeros = Stack([(torch.zeros_like, torch.zeros_like)] * LAYERS, dim=D, scheme=name)
    state = net.state_dict()
    zeros.load_state_dict({key: state[key] for key in zeros.state_dict()})
    x = torch.randn(2, 4, D)
    torch.testing.assert_close(net.train()(x), zeros(x))


@by_name
def test_refuses_a_width_that_changes(name):
    message = r"keeps one shape; got dim=\[4, 8\], shortcuts=0. Use another scheme"
    with pytest.raises(ValueError, match=message):
        Stack([nn.Linear(4, 8)], dim=[4, 8], scheme=name)
    with pytest.raises(ValueError, match="the branch must give the shape of the shortcut"):
        Stack([nn.Linear(D, 1)], dim=D, scheme=name)(torch.randn(2, D))


@by_name
def test_hands_back_what_a_sublayer_returns_and_passes_masks(name):
    encoder = TransformerEncoder(8, 2, 2, scheme=name).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    torch.testing.assert_close(encoder(x, mask=mask)[1, :3], encoder(x[1:, :3])[0], rtol=1e-4, atol=1e-5)
    if name != "reversible":
        with_rest = Stack([lambda x: (x, "rest")], dim=D, scheme=name)
        out, rests = with_rest(torch.randn(2, D))
        assert (out.shape, rests) == ((2, D), [("rest",)])


def test_lanes_start_where_the_paper_says():
    net = stack("hyper")
    for index, residual in enumerate(net.residuals):
        mixing = residual.connection.mixing
        assert mixing.read.tolist() == [float(lane == index % 4) for lane in range(4)]
        assert torch.equal(mixing.mix, torch.eye(4).flatten())
        assert torch.equal(mixing.write, torch.ones(4))
        assert mixing.weight.abs().max() == 0
        torch.testing.assert_close(mixing.scale, torch.full((2,), 0.01))


def test_sinkhorn_is_doubly_stochastic():
    matrix = sinkhorn(torch.randn(3, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(-2), torch.ones(3, 4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_manifold_mixing_keeps_the_lanes_apart():
    """At the start the mixing is nearly the identity: lanes that differ still differ after twelve residuals."""
    net = Stack([torch.zeros_like] * 12, dim=D, scheme="mhc", norm=None)
    lanes = first = torch.randn(1, 4, D)
    for residual in net.residuals:
        lanes = residual(lanes)
    torch.testing.assert_close(lanes.mean(-2), first.mean(-2))
    assert (lanes - lanes.mean(-2, keepdim=True)).norm() > 0.9 * (first - first.mean(-2, keepdim=True)).norm()


def test_hyper_connections_are_those_of_the_package():
    """Of hyper-connections on PyPI, where it is installed; its norm is another, and is given to ours."""
    package = pytest.importorskip("hyper_connections")
    branch = Sublayer()
    theirs = package.HyperConnections(4, dim=D, branch=branch, layer_index=1)
    ours = Residual(branch, connection=Lanes(HyperMixing(D, 4, 1)))
    randomised(theirs), randomised(ours)
    mixing, alpha = ours.connection.mixing, theirs.static_alpha
    mixing.norm = theirs.norm
    with torch.no_grad():
        mixing.read.copy_(alpha[:, 0])
        mixing.mix.copy_(alpha[:, 1:].flatten())
        mixing.write.copy_(theirs.static_beta)
        moving = theirs.dynamic_alpha_fn
        mixing.weight.copy_(torch.stack([moving[:, 0], theirs.dynamic_beta_fn, *moving[:, 1:].unbind(1)]))
        mixing.scale.copy_(torch.stack([theirs.dynamic_alpha_scale, theirs.dynamic_beta_scale]))
    lanes = torch.randn(2, 5, 4, D, dtype=torch.float64)
    folded = theirs(lanes.movedim(2, 1).flatten(0, 1))  # theirs has the lanes in the batch
    torch.testing.assert_close(ours(lanes), folded.unflatten(0, (2, 4)).movedim(1, 2))


# --- reversible -------------------------------------------------------------------------------------------------------


def twins(depth, dtype=torch.float64, dropout=0.0):
    """Two nets of equal weights: one that makes its streams again, one that stores them."""

    def build(recompute):
        layers = [(nn.Sequential(Sublayer(), Dropout(dropout)), Sublayer()) for _ in range(depth)]
        return Stack(layers, dim=D, scheme=Reversible(recompute)).to(dtype)

    again, stored = build(True), build(False)
    stored.load_state_dict(again.state_dict())
    return again, stored


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_the_stored_run(dtype, bound, dropout):
    again, stored = twins(12, dtype, dropout)
    x, weight = torch.randn(4, 5, D, dtype=dtype), torch.randn(4, 5, D, dtype=dtype)
    found = []
    for net in (again, stored):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        out = net(leaf)
        after = torch.get_rng_state()
        found.append([out, *torch.autograd.grad(out, [leaf, *net.parameters()], weight)])
        assert torch.equal(torch.get_rng_state(), after)  # the backward pass draws nothing that others would miss
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()


def test_gradients_reach_tensor_arguments():
    """A memory, a mask and a nested tensor, as cross-attention has them."""

    class Reads(nn.Module):
        def forward(self, x, mask=None, memory=None):
            return torch.tanh(x * mask + memory["inside"])

    def gradients(recompute):
        net = Stack([Reads(), Reads()], dim=D, scheme=Reversible(recompute))
        mask, memory = torch.ones(D, requires_grad=True), torch.ones(D, requires_grad=True)
        net(torch.arange(float(D)), mask=mask, memory={"inside": memory}).square().sum().backward()
        return mask.grad, memory.grad

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


def test_a_parameter_s_hook_is_called_once():
    found = []
    for net in twins(2):
        for parameter in net.parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)
        net(torch.linspace(-1, 1, 4 * D, dtype=torch.float64).view(4, D)).pow(3).sum().backward()
        net(torch.linspace(-1, 1, 4 * D, dtype=torch.float64).view(4, D)).pow(3).sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_is_in_the_backward_as_it_was():
    again, stored = twins(4, torch.float32)
    x = torch.randn(4, 5, D)
    found = []
    for net in (again, stored):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        out.float().square().sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def bytes_saved(net, x):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes if not isinstance(tensor, nn.Parameter) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return total


def test_memory_does_not_grow_with_depth():
    x = torch.randn(8, 16, D)
    shallow, deep = (bytes_saved(twins(depth, torch.float32)[0], x) for depth in (6, 24))
    assert shallow == deep
    stored = bytes_saved(twins(24, torch.float32)[1], x)
    assert stored > 20 * deep


def test_the_stream_that_went_in_comes_back():
    residual = Residual(Sublayer(), connection=Coupling(pre=nn.LayerNorm(D))).double()
    before = Pair(*torch.randn(2, 3, D, dtype=torch.float64))
    after = residual(before)
    again = residual(residual.connection.known_before(after))
    for ours, theirs in zip(residual.connection.inverse(after, again), before, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reversible_refuses_tuples_and_a_second_derivative():
    class Two(nn.Module):
        def forward(self, x):
            return x, "rest"

    net = Stack([Two()], dim=D, scheme="reversible")
    with pytest.raises(ValueError, match=r"got a tuple from Two. Use Reversible\(recompute=False\)."):
        net(torch.randn(2, D, requires_grad=True))
    assert net.eval()(torch.randn(2, D))[1] == [("rest",)]
    x = torch.randn(2, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(stack("reversible")(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_reversible_stores_in_forward_mode_differentiation():
    net = Stack([nn.Linear(D, D)] * 2, dim=D, scheme="reversible")
    x, direction = torch.randn(2, D), torch.randn(2, D)
    with torch.autograd.forward_ad.dual_level():
        out = net(torch.autograd.forward_ad.make_dual(x, direction))
        found = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(found, torch.func.jvp(net, (x,), (direction,))[1])


def test_reversible_reaches_what_a_function_uses():
    linear, memory = nn.Linear(D, D), torch.randn(2, D, requires_grad=True)
    found = []
    for recompute in (True, False):
        net = Stack([lambda x: torch.tanh(linear(x) + memory)] * 2, dim=D, scheme=Reversible(recompute))
        found.append(torch.autograd.grad(net(torch.ones(2, D)).square().sum(), [linear.weight, memory]))
    for ours, stored in zip(*found, strict=True):
        torch.testing.assert_close(ours, stored)


@pytest.mark.parametrize(
    "change", [lambda net: nn.init.zeros_(net.residuals[0].sublayer.weight), lambda net: net.eval()]
)
def test_reversible_wants_the_state_of_the_forward_pass(change):
    net = Stack([nn.Linear(D, D), nn.Linear(D, D)], dim=D, scheme="reversible")
    out = net(torch.randn(2, D)).sum()
    change(net)
    with pytest.raises(RuntimeError, match=r"written into since, or another of train\(\) and eval\(\). Call backward"):
        out.backward()


def test_a_stack_used_twice_and_copied_remembers_nothing():
    net = stack("attnres")
    x, y = torch.randn(2, 2, D)
    first = net(x)
    net(y)
    torch.testing.assert_close(net(x), first)
    torch.testing.assert_close(copy.deepcopy(net)(x), first)
    assert HyperMixing(D, 4, 1, dynamic=False).state_dict().keys() == {"read", "write", "mix"}
    assert set(EQUATIONS) < set(SCHEMES)


def test_reversible_wants_the_parameters_of_the_forward_pass():
    net, x = Stack([nn.Linear(D, D)] * 2, dim=D, scheme="reversible"), torch.randn(2, D)
    others = {name: (p + 1).detach().requires_grad_() for name, p in net.named_parameters()}
    out = torch.func.functional_call(net, others, (x,))
    with pytest.raises(RuntimeError, match="needs the parameters of the forward pass; got others"):
        out.sum().backward()

    out = net(x)
    del net.residuals[1].sublayer.bias  # as many others are what FSDP leaves behind
    with pytest.raises(RuntimeError, match="needs the parameters of the forward pass; got others"):
        out.sum().backward()
    net = Stack([nn.Linear(D, D)] * 2, dim=D, scheme="reversible")

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    with torch.no_grad():
        values = {name: p + 1 for name, p in net.named_parameters()}
    ours = torch.func.grad(loss)(values, x)  # stores the activations
    stored = Stack([nn.Linear(D, D)] * 2, dim=D, scheme=Reversible(recompute=False))
    expected = torch.func.grad(lambda parameters: torch.func.functional_call(stored, parameters, (x,)).square().sum())(
        values
    )
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name])
