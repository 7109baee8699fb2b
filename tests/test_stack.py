import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from resseq import SCHEMES, Residual, Stack, TransformerEncoder
from resseq.layers.attention import SelfAttention
from resseq.layers.feedforward import FeedForward

D = 6


class Masked(nn.Module):
    def forward(self, x, mask=None):
        self.seen = mask
        return torch.zeros_like(x)


class Cached(nn.Module):
    def forward(self, x, cache=None):
        return x, ("cache", cache)


def test_keywords_go_to_the_sublayers_that_take_them():
    masked, mask = Masked(), torch.ones(2, dtype=torch.bool)
    net = Stack([(masked, nn.Linear(D, D))], dim=D)
    net(torch.randn(2, D), mask=mask)
    assert masked.seen is mask


def test_a_sublayer_that_is_put_in_later_gets_its_keywords():
    net, mask = Stack([(nn.Linear(D, D), nn.Tanh())], dim=D), torch.tensor([[True, True, False]])
    masked = net.residuals[1].sublayer = Masked()
    net(torch.randn(1, 3, D), mask=mask)
    assert masked.seen is mask
    net.residuals[1].sublayer = nn.MultiheadAttention(D, 2, batch_first=True)
    out, rests = net(torch.randn(1, 3, D), mask=mask)
    assert (out.shape, rests[1][0][..., 2].abs().max()) == ((1, 3, D), 0), "no weight on what is hidden"


def test_two_masks_for_torch_attention_are_one_too_many():
    net, mask = Residual(nn.MultiheadAttention(D, 2, batch_first=True)), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask= and nn.MultiheadAttention's key_padding_mask= say the same; got both"):
        net(torch.randn(1, 3, D), mask=mask, key_padding_mask=~mask)


def test_a_keyword_that_nobody_takes():
    net = Stack([(Masked(), nn.Tanh())], dim=D)
    with pytest.raises(ValueError, match=r"Stack: no sublayer takes masks=; got masks. Use one of .*mask"):
        net(torch.randn(2, D), masks=None)


def test_torch_attention_takes_the_mask_of_a_stack():
    attention = nn.MultiheadAttention(D, 2, batch_first=True)
    net = Stack([(attention, nn.Linear(D, D))], dim=D).eval()
    x, mask = torch.randn(2, 4, D), torch.tensor([[True] * 4, [True, True, False, False]])
    out, rests = net(x, mask=mask)
    assert [len(rest) for rest in rests] == [1, 0]
    changed = x.clone()
    changed[1, 2:] += torch.randn(2, D)
    torch.testing.assert_close(net(changed, mask=mask)[0][1, :2], out[1, :2])


def test_a_stack_within_a_stack_takes_what_its_sublayers_take():
    masked, mask = Masked(), torch.ones(2, dtype=torch.bool)
    net = Stack([Stack([nn.Linear(D, D)], dim=D), Stack([masked], dim=D), Residual(nn.Linear(D, D))], dim=D)
    net(torch.randn(2, D), mask=mask)
    assert masked.seen is mask


def test_reset_reaches_all_of_torch_attention():
    net = Stack([nn.MultiheadAttention(D, 2, batch_first=True)], dim=D)
    for parameter in net.parameters():
        nn.init.constant_(parameter, 7.0)
    net.reset_parameters()
    assert all((parameter != 7.0).all() for parameter in net.parameters())


def test_what_sublayers_hand_back():
    net = Stack([(Cached(), nn.Tanh()), (Cached(), nn.Tanh())], dim=D)
    out, rests = net(torch.randn(2, D), cache=7)
    assert out.shape == (2, D)
    assert rests == [(("cache", 7),), (), (("cache", 7),), ()]
    assert isinstance(Stack([nn.Tanh()], dim=D)(torch.randn(2, D)), torch.Tensor)


def test_positional_arguments_go_to_all():
    net = Stack([lambda x, y: y, lambda x, y: 2 * y], dim=D, norm=None)
    x, y = torch.randn(2, D), torch.randn(2, D)
    torch.testing.assert_close(net(x, y), x + 3 * y)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([], {"dim": D}, "at least one layer"),
        ([nn.Tanh()], {"dim": [D]}, "1 residuals need 2 widths"),
        ([nn.Tanh()], {"dim": D, "norm": nn.LayerNorm(D)}, "norm builds one module for each residual; got norm=Layer"),
        ([nn.Tanh()], {"dim": D, "activation": nn.ReLU()}, "Use activation=nn.ReLU, or a function"),
        ([nn.Tanh()], {"dim": D, "scheme": SCHEMES["pre"]}, r"got scheme=<class .*Write Pre\(\)"),
        ([nn.Tanh()], {"dim": D, "scheme": "POST"}, "Did you mean 'post'"),
        ([nn.Tanh()], {"dim": D, "shortcuts": []}, "1 residuals need 2 widths and 1 shortcuts"),
    ],
)
def test_what_a_stack_refuses(layers, options, message):
    with pytest.raises(ValueError, match=message):
        Stack(layers, **options)


def test_a_change_of_width_without_a_shortcut_names_it():
    with pytest.raises(ValueError, match="Give shortcut="):
        Stack([nn.Linear(D, 2 * D)], dim=[D, 2 * D], scheme="residual")(torch.randn(2, D))


def test_a_stack_with_a_mask_compiles_whole():
    torch._dynamo.reset()
    net = Stack([(Masked(), nn.Linear(D, D)), (nn.Linear(D, D),)], dim=D)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, D)
    torch.testing.assert_close(compiled(x, mask=None), net(x, mask=None))


def test_two_threads_share_a_stack():
    from concurrent.futures import ThreadPoolExecutor

    net = Stack([(nn.Linear(D, D), Cached())] * 3, dim=D).eval()
    inputs = [torch.randn(4, D) for _ in range(16)]
    expected = [net(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(net, inputs), expected, strict=True):
            torch.testing.assert_close(ours[0], theirs)


def test_compiled_sublayers_get_the_keywords_that_they_take():
    torch._dynamo.reset()
    plain, masked = nn.Linear(D, D), Masked()
    net = Stack([torch.compile(masked, backend="eager"), torch.compile(plain, backend="eager")], dim=D)
    x, mask = torch.randn(2, D), torch.tensor([True, False])
    torch.testing.assert_close(net(x, mask=mask), Stack([masked, plain], dim=D)(x, mask=mask))


def test_sublayers_that_are_wrapped_later_get_the_keywords_that_they_take():
    """The wrapper of activation checkpointing takes any keyword, and hands on all of them; FSDP's is alike."""
    net = TransformerEncoder(8, 2, 2)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    plain = net(x, mask=mask)
    apply_activation_checkpointing(net, check_fn=lambda part: isinstance(part, (SelfAttention, FeedForward)))
    torch.testing.assert_close(net(x, mask=mask), plain)


def test_a_module_list_is_a_layer():
    layers = [nn.ModuleList([nn.Linear(D, D), nn.Tanh()]), nn.Tanh()]
    assert len(Stack(layers, dim=D).residuals) == 3
