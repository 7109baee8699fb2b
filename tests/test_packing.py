import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resseq import SCHEMES, TextTransformer, TransformerEncoder
from resseq.layers.attention import SelfAttention
from resseq.packing import Packing, least_rows, pack, unpack

LENGTHS = torch.tensor([1, 3, 5, 16, 2, 9, 0, 7])
MASK = torch.arange(16) < LENGTHS[:, None]


def model(**options) -> TextTransformer:
    return TextTransformer(100, 3, 16, 2, 2, 16, dropout=0.0, **options)


def both(net: TextTransformer, mask=MASK):
    """Logits and gradients, padded and packed."""
    ids = torch.randint(100, mask.shape)
    for packs in (False, True):
        net.encoder.pack = packs
        assert (net.encoder.packing(mask) is not None) == packs
        net.zero_grad()
        logits = net(ids, mask)
        logits.square().sum().backward()
        yield logits.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_batch_gives_the_same_numbers_in_every_scheme(scheme):
    net = model(scheme=scheme).double()
    if scheme == "admin":
        net.encoder.calibrate(torch.randn(8, 16, 16, dtype=torch.float64))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (logits, gradients), (packed, packed_gradients) = both(net)
    torch.testing.assert_close(packed, logits)
    torch.testing.assert_close(packed_gradients, gradients)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"positions": "rotary"}, 1e-5),  # whose angles are float32, and a text stands elsewhere in its row
        ({"pooling": "cls"}, 1e-7),
        ({"pooling": "mean", "kernel_size": 0}, 1e-7),
        ({"attention_dropout": 1e-9}, 1e-5),  # rounds to no dropout, and is done by hand
    ],
)
def test_and_with_every_option(options, tolerance):
    (logits, gradients), (packed, packed_gradients) = both(model(**options).double())
    torch.testing.assert_close(packed, logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(packed_gradients, gradients, rtol=tolerance, atol=tolerance)


def test_the_first_layer_s_values_stand_in_the_same_rows_everywhere():
    encoder = TransformerEncoder(8, 3, 2, value_residual=True, pack=True).double()
    x = torch.randn(*MASK.shape, 8, dtype=torch.float64)
    assert encoder.packing(MASK)
    packed, encoder.pack = encoder(x, MASK), False
    torch.testing.assert_close(packed[MASK], encoder(x, MASK)[MASK])


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_padding_may_stand_anywhere(positions):
    mask = (torch.rand(6, 16) < 0.4) & (torch.arange(16) < torch.tensor([16, 12, 8, 6, 4, 3])[:, None])
    (logits, _), (packed, _) = both(model(positions=positions).double(), mask)
    torch.testing.assert_close(packed, logits, rtol=1e-5, atol=1e-5)


def test_texts_share_rows_and_come_back():
    packing = Packing.of(MASK)
    x = torch.randn(*MASK.shape, 3) * MASK[..., None]
    packed = pack(x, packing)
    assert packed.shape == (3, 16, 3)  # 16; 9 and 7; 5, 3, 2, 1 and the empty one's place
    assert torch.equal(unpack(packed, packing), x)
    assert packing.text.unique(return_counts=True)[1][:-2].tolist() == LENGTHS[LENGTHS > 0].tolist()
    for row, bias in zip(packing.text.tolist(), packing.bias(torch.float32), strict=True):
        for slot, text in enumerate(row):
            assert bias[slot].tolist() == [0.0 if text == other != len(MASK) else -torch.inf for other in row]


def test_rows_are_as_few_as_best_fit_gives_and_are_known_not_to_be_fewer():
    lengths = torch.randint(1, 65, (500,))
    packing = Packing.of(torch.arange(64) < lengths[:, None])
    assert least_rows(lengths) <= len(packing.text) <= 1.03 * least_rows(lengths)
    assert least_rows(torch.tensor([10, 6, 6, 6])) == 4, "no two of them share a row"


def test_attention_takes_a_mask_of_who_sees_whom():
    attention, x = SelfAttention(8, 2).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    apart = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool().expand(2, 5, 5)
    expected = torch.cat([attention(x[:, :2]), attention(x[:, 2:])], 1)
    torch.testing.assert_close(attention(x, apart), expected)
    bias = torch.zeros(2, 5, 5).masked_fill(~apart, float("-inf"))
    torch.testing.assert_close(attention(x, bias), expected)
    by_hand, causal = SelfAttention(8, 2, attention_dropout=1e-9).double(), SelfAttention(8, 2, causal=True).double()
    for other in (by_hand, causal):
        other.load_state_dict(attention.state_dict())
    torch.testing.assert_close(by_hand(x, bias), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(causal(x, bias), torch.cat([causal(x[:, :2]), causal(x[:, 2:])], 1))
    tilted = torch.randn(2, 5, 5, dtype=torch.float64)
    q, k, v = attention.split(attention.qkv(x))
    weights = (q @ k.mT / 2 + tilted[:, None]).softmax(-1)
    torch.testing.assert_close(attention(x, tilted), attention.out((weights @ v).transpose(1, 2).flatten(2)))


def test_a_model_that_drops_paths_does_so_by_text():
    encoder = TransformerEncoder(8, 1, 2, scheme="residual", drop_path=0.5, pack=True)
    x = torch.randn(8, 16, 8)
    assert encoder.packing(MASK) is None
    moved = ((encoder(x, MASK) - x).abs().sum(-1) > 1e-6)[LENGTHS > 1]
    for text, mask in zip(moved, MASK[LENGTHS > 1], strict=True):
        assert text[mask].all() or not text[mask].any()
    assert encoder.eval().packing(MASK)


class Watching(nn.LayerNorm):
    """A norm that is not of this package."""


def test_it_is_chosen_where_it_pays_and_never_where_something_may_expect_a_padded_batch():
    net = model()
    assert net.encoder.packing(MASK)
    assert net.encoder.packing(torch.ones(8, 16, dtype=torch.bool)) is None, "no padding"
    assert model(pack=False).encoder.packing(MASK) is None
    assert TransformerEncoder(16, 1, 2).packing(MASK) is None, (
        "whoever calls the encoder may want what stands at padding"
    )
    assert TransformerEncoder(16, 1, 2, pack=True).packing(MASK)
    assert TransformerEncoder(16, 1, 2, norm=Watching, pack=True).packing(MASK) is None

    hook = net.encoder.residuals[1].sublayer.out.register_forward_hook(lambda *_: None)
    assert net.encoder.packing(MASK) is None, "a hook"
    hook.remove()
    hook = net.encoder.residuals[1].sublayer.out.register_full_backward_hook(lambda *_: None)
    assert net.encoder.packing(MASK) is None, "a hook of the backward pass"
    hook.remove()
    assert net.encoder.packing(MASK)

    class Own(SelfAttention):
        pass

    net.encoder.residuals[0].sublayer = Own(16, 2)
    assert net.encoder.packing(MASK) is None, "a sublayer of one's own"


def test_export_and_compile_see_the_padded_batch():
    net, ids = model().eval(), torch.randint(100, MASK.shape)
    exported = torch.export.export(net, (ids, MASK)).module()
    torch.testing.assert_close(exported(ids, MASK), net(ids, MASK), atol=1e-5, rtol=1e-5)
    assert not [node for node in exported.graph.nodes if "index_copy" in str(node.target)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_dropout_on_a_cpu_drops_weights_and_keeps_the_mean(causal, masked):
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, attention_dropout=0.2, causal=causal)
    x, mask = torch.randn(1, 6, 8), torch.arange(6)[None] < 4 if masked else None
    exact = attention.eval()(x, mask)
    attention.train()
    drawn = torch.stack([attention(x, mask) for _ in range(1000)])
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(0), exact, atol=0.08, rtol=0)
    assert (drawn.mean(0) - exact).abs().max() > 0


def test_attention_with_dropout_is_torch_s_attention_where_nothing_is_dropped():
    attention = SelfAttention(8, 2, attention_dropout=1e-9)  # rounds to no dropout
    plain = SelfAttention(8, 2)
    plain.load_state_dict(attention.state_dict())
    x, mask = torch.randn(3, 6, 8), torch.arange(6) < torch.tensor([[6], [2], [4]])
    torch.testing.assert_close(attention(x, mask), plain(x, mask))
    torch.testing.assert_close(attention(x), plain(x))
    loss = F.mse_loss(attention(x, mask), torch.zeros_like(x))
    assert torch.autograd.grad(loss, attention.qkv.weight)[0].abs().sum() > 0


def test_a_mask_of_another_shape_is_left_to_the_padded_run():
    for packs in (False, True):
        encoder = TransformerEncoder(8, 2, 2, pack=packs).eval()
        x, mask = torch.randn(4, 10, 8), torch.arange(10)[None] < 4
        assert encoder(x, mask).shape == (4, 10, 8)  # one mask for all texts
        with pytest.raises(ValueError, match="Give a mask for every key"):
            encoder(x, torch.arange(8)[None] < torch.full((4, 1), 4))
        assert encoder(x[:0], mask[:0]).shape == (0, 10, 8)


def test_tracing_and_vmap_see_the_padded_batch():
    net, ids = model().eval(), torch.randint(100, MASK.shape)
    assert net.encoder.packing(MASK)
    traced, full = torch.jit.trace(net, (ids, MASK)), torch.ones_like(MASK)
    torch.testing.assert_close(traced(ids, full), net(ids, full), atol=1e-5, rtol=1e-5)
    each = torch.func.vmap(lambda ids, mask: net(ids[None], mask[None])[0])(ids, MASK)
    torch.testing.assert_close(each, net(ids, MASK), atol=1e-5, rtol=1e-5)
