import pytest
import torch
from helpers import lengths_to_mask
from torch import nn

from resseq import SCHEMES, Stack, TransformerDecoder, TransformerEncoder
from resseq.layers.attention import CrossAttention, SelfAttention
from resseq.layers.feedforward import FeedForward
from resseq.schemes.scales import DeepNorm

D, H, DEPTH = 16, 4, 2


def torch_decoder(scheme):
    layer = nn.TransformerDecoderLayer(
        D, H, 4 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=scheme == "pre"
    )
    return nn.TransformerDecoder(layer, DEPTH, norm=nn.LayerNorm(D) if scheme == "pre" else None)


def pairs(ours, theirs, scheme):
    """The tensors of our decoder beside torch's."""
    for i, layer in enumerate(theirs.layers):
        own, cross, feedforward = ours.residuals[3 * i : 3 * i + 3]
        modules = [(feedforward.sublayer.into, layer.linear1), (feedforward.sublayer.out, layer.linear2)]
        for residual, attention in ((own, layer.self_attn), (cross, layer.multihead_attn)):
            fused = [residual.sublayer.get_submodule(name) for name in residual.sublayer.projections]
            sizes = [len(each.bias) for each in fused]
            yield from zip((each.weight for each in fused), attention.in_proj_weight.data.split(sizes), strict=True)
            yield from zip((each.bias for each in fused), attention.in_proj_bias.data.split(sizes), strict=True)
            modules.append((residual.sublayer.out, attention.out_proj))
        norms = [getattr(residual.connection, scheme) for residual in (own, cross, feedforward)]
        modules += zip(norms, (layer.norm1, layer.norm2, layer.norm3), strict=True)
        for a, b in modules:
            yield from zip(a.parameters(), b.parameters(), strict=True)
    if scheme == "pre":
        yield from zip(ours.close.parameters(), theirs.norm.parameters(), strict=True)


@pytest.mark.parametrize("scheme", ["pre", "post"])
def test_decoder_equals_torch_with_every_tensor_random(scheme):
    torch.manual_seed(0)
    ours, theirs = TransformerDecoder(D, DEPTH, H, scheme=scheme), torch_decoder(scheme)
    tensors = list(pairs(ours, theirs, scheme))
    numbers = [a.numel() for a, _ in tensors]
    assert sum(numbers) == sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert len(numbers) == len(list(ours.parameters()))
    with torch.no_grad():
        for a, b in tensors:
            a.copy_(b.normal_(std=0.3))
    x, memory = torch.randn(3, 7, D), torch.randn(3, 5, D)
    mask, memory_mask = lengths_to_mask(7, 4, 1), lengths_to_mask(2, 5, 3)
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = theirs(x, memory, later, tgt_key_padding_mask=~mask, memory_key_padding_mask=~memory_mask)
    out = ours(x, memory, mask, memory_mask)
    assert (out - expected)[mask].abs().max() < 1e-5
    torch.testing.assert_close(ours(x, memory), theirs(x, memory, later), rtol=0, atol=1e-5)
    for name, parameter in ours.named_parameters():  # no tensor is idle
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter += torch.randn_like(parameter)
            moved = (ours(x, memory, mask, memory_mask) - out)[mask].abs().max()
            parameter.copy_(before)
        assert moved > 1e-4 or name.endswith("qkv.bias"), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rotary", [False, True])
def test_decoding_token_by_token_equals_the_full_pass(scheme, rotary):
    torch.manual_seed(0)
    decoder = TransformerDecoder(D, DEPTH, H, scheme=scheme, rotary=rotary)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, memory, memory_mask = torch.randn(2, 6, D), torch.randn(2, 5, D), lengths_to_mask(5, 3)
    expected = decoder(x, memory, memory_mask=memory_mask)
    out, caches = decoder(x[:, :3], memory, memory_mask=memory_mask, caches=[])
    parts = [out]
    for t in range(3, 6):
        out, caches = decoder(x[:, t : t + 1], memory, memory_mask=memory_mask, caches=caches)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)
    assert [len(cache) for cache in caches] == [2, 2, 0] * DEPTH
    assert [cache[0].shape[2] for cache in caches if cache] == [6, 5] * DEPTH


def test_a_chunk_after_a_cache_sees_no_later_token_and_no_padding():
    torch.manual_seed(0)
    decoder, x, memory = TransformerDecoder(D, DEPTH, H, rotary=True), torch.randn(2, 6, D), torch.randn(2, 5, D)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)
    first, caches = decoder(x[:, :2], memory, mask[:, :2], caches=[])
    second, _ = decoder(x[:, 2:], memory, mask, caches=caches)
    out = torch.cat([first, second], 1)
    assert out.isfinite().all()
    torch.testing.assert_close(out[mask], decoder(x, memory, mask)[mask], rtol=0, atol=1e-5)


def test_no_token_sees_those_after_it():
    attention, x = SelfAttention(D, H, causal=True), torch.randn(1, 6, D)
    changed = x.clone()
    changed[:, 4:] = torch.randn(1, 2, D)
    torch.testing.assert_close(attention(changed)[:, :4], attention(x)[:, :4])
    assert not torch.allclose(attention(changed)[:, 4:], attention(x)[:, 4:])


def test_a_filled_cache_stands_for_the_memory():
    attention, x, memory = CrossAttention(D, H), torch.randn(1, 3, D), torch.randn(1, 5, D)
    y, *cache = attention(x, memory, cache=())
    torch.testing.assert_close(y, attention(x, memory))
    torch.testing.assert_close(attention(x, torch.zeros(1, 5, D), cache=tuple(cache))[0], y)


def test_a_stack_of_causal_attention_keeps_caches_of_its_own():
    stack = Stack([(SelfAttention(D, H, causal=True), FeedForward(D)) for _ in range(DEPTH)], dim=D)
    x = torch.randn(2, 4, D)
    _, caches = stack(x[:, :3], caches=[])
    torch.testing.assert_close(stack(x[:, 3:], caches=caches)[0], stack(x)[:, 3:], rtol=0, atol=1e-5)


def test_caches_need_a_sublayer_that_takes_one():
    with pytest.raises(ValueError, match="no sublayer takes cache=; got cache. Use one of mask."):
        Stack([(lambda x, mask=None: x)], dim=D)(torch.randn(2, D), caches=[])


def test_the_decoder_compiles_whole():
    torch._dynamo.reset()
    decoder, x, memory = TransformerDecoder(D, DEPTH, H, rotary=True), torch.randn(2, 6, D), torch.randn(2, 5, D)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    for masks in ((), (lengths_to_mask(6, 4), lengths_to_mask(5, 3))):
        torch.testing.assert_close(compiled(x, memory, *masks), decoder(x, memory, *masks))


def test_deepnorm_of_an_encoder_that_a_decoder_reads():
    n, m, width = 3, 5, 64
    encoder = TransformerEncoder(width, n, H, hidden=width, scheme=DeepNorm(decoder_layers=m))
    decoder = TransformerDecoder(width, m, H, hidden=width, scheme="deepnorm")
    both = n**4 * m
    constants = {0.81 * both ** (1 / 16): 0.87 * both ** (-1 / 16), (3 * m) ** 0.25: (12 * m) ** -0.25}
    bound = (6 / (2 * width)) ** 0.5
    for stack, (alpha, beta) in zip((encoder, decoder), constants.items(), strict=True):
        for residual in stack.residuals:
            assert residual.connection.skip_scale == pytest.approx(alpha)
            for role, weight in residual.sublayer.weights():
                gain = 1.0 if role in ("query", "key") else beta
                assert weight.abs().max().item() == pytest.approx(gain * bound, rel=0.01), role


def test_attention_to_a_memory_refuses_in_its_own_name():
    with pytest.raises(ValueError, match="CrossAttention: dim must be divisible by heads; got dim=30, heads=4"):
        CrossAttention(30, 4)
