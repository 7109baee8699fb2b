import copy
import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resseq import SCHEMES, Residual, Stack, TextConvNet, TextTransformer, TransformerEncoder, diagnostics
from resseq.connections import OneStream
from resseq.diagnostics import amplification, autocorrelation, gradients_between, inspect, lesion, lesion_curve
from resseq.diagnostics.blocks import find_blocks
from resseq.diagnostics.report import Report
from resseq.diagnostics.stream import replace_first

MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 5 + [False]])
IDS = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(0))


def text_transformer(scheme="pre", depth=3, **options):
    torch.manual_seed(0)
    return TextTransformer(20, 4, 16, depth, 2, 8, scheme=scheme, dropout=0.0, **options).eval()


def torch_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()


def hugging_face_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


MODELS = {
    "torch.nn": (torch_encoder, lambda: (torch.randn(3, 6, 16),), {}, "layers.*", 4),
    "Hugging Face": (hugging_face_bert, lambda: (IDS,), {"attention_mask": MASK.long()}, "encoder.layer.*", 4),
    **{
        f"resseq {scheme}": (
            lambda scheme=scheme: text_transformer(scheme),
            lambda: (IDS,),
            {"mask": MASK},
            "encoder.residuals.*",
            6,
        )
        for scheme in ("pre", "post", "sandwich", "highway", "rezero", "plain")
    },
}


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return [len(getattr(module, name)) for module in model.modules() for name in names] + [
        "finish" in vars(module) or "forward" in vars(module) for module in model.modules()
    ]


def values(report, statistic):
    return [value for _, value in sorted(report.series(statistic).items())]


# blocks


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_by_themselves_by_pattern_and_by_list(name):
    build, _, _, pattern, count = MODELS[name]
    model = build()
    found = find_blocks(model)
    assert len(found) == count
    assert found == find_blocks(model, pattern) == find_blocks(model, list(found.values()))


SHALLOW = {  # a Hugging Face model of few layers: the name of its config, what that is given, where its layers stand
    "Bert": ("hidden_size=16 num_hidden_layers=2 num_attention_heads=2 intermediate_size=32", "encoder.layer.*", 2),
    "Llama": (
        "hidden_size=16 num_hidden_layers=3 num_attention_heads=2 num_key_value_heads=2 intermediate_size=32",
        "layers.*",
        3,
    ),
    "T5": ("d_model=16 d_kv=8 num_layers=3 num_heads=2 d_ff=32", "encoder.block.*", 3),
    "DistilBert": ("dim=16 n_layers=3 n_heads=2 hidden_dim=32", "transformer.layer.*", 3),
    "Albert": (
        "embedding_size=8 hidden_size=16 num_hidden_layers=3 num_attention_heads=2 intermediate_size=32",
        "encoder.albert_layer_groups.*",
        1,  # whose weights all three layers share
    ),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_the_layers_of_a_shallow_model_are_its_blocks(name):
    """Though its attention has as many projections beside each other, or more."""
    transformers = pytest.importorskip("transformers")
    options, pattern, count = SHALLOW[name]
    given = {key: int(value) for key, value in (option.split("=") for option in options.split())}
    config = getattr(transformers, f"{name}Config")(vocab_size=20, bos_token_id=0, eos_token_id=1, **given)
    model = getattr(transformers, f"{name}Model")(config).eval()
    assert list(find_blocks(model)) == list(find_blocks(model, pattern))
    assert len(find_blocks(model)) == count
    keywords = {"decoder_input_ids": IDS} if name == "T5" else {}
    assert len(values(inspect(model, IDS, **keywords), "block_influence")) == (count if name == "Bert" else 3)


class Named(nn.Module):
    """Blocks side by side, in no list."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)
        self.one, self.two, self.three = (nn.TransformerEncoderLayer(2, 1, 2) for _ in range(3))


def test_blocks_that_stand_in_no_list_are_found_among_all_children():
    assert list(find_blocks(Named())) == ["one", "two", "three"]


def test_a_star_stands_for_one_component():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert list(find_blocks(model, "*")) == ["0", "1"]
    assert list(find_blocks(model, "0.*")) == list(find_blocks(model)) == ["0.0", "0.1"]


def test_bad_blocks():
    with pytest.raises(ValueError, match=r"got blocks='layer\.\*'\. The nearest path is 'layers"):
        find_blocks(torch_encoder(), "layer.*")
    alone = Stack([nn.Linear(8, 8)], dim=8)
    assert list(find_blocks(alone)) == ["residuals.0"]
    with pytest.raises(ValueError, match="found no run of like modules; got model=Linear. Give blocks="):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got a Linear that is not in it"):
        find_blocks(torch_encoder(), [nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"got blocks=\[\]"):
        find_blocks(torch_encoder(), [])
    encoder = torch_encoder()
    for blocks in ("layers", [encoder.layers]):
        with pytest.raises(ValueError, match=r"got layers, a ModuleList\. Use blocks='layers\.\*'"):
            find_blocks(encoder, blocks)


# inspect, on anyone's model


@pytest.mark.parametrize("name", MODELS)
def test_inspect_leaves_the_model_as_it_was(name):
    build, inputs, keywords, _, count = MODELS[name]
    model, given = build(), inputs()
    before, hooks = {key: value.clone() for key, value in model.state_dict().items()}, hooks_of(model)
    report = inspect(model, *given, **keywords)
    assert hooks_of(model) == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(value.requires_grad for value in given)
    assert list(report.frame.columns) == ["depth", "module", "step", "statistic", "value"]
    for statistic, rows in {"stream_rms": count + 1, "gradient_norm": count + 1, "block_influence": count}.items():
        assert len(values(report, statistic)) == rows, statistic
    assert len(values(report, "branch_ratio")) == (count if name.startswith("resseq") else 0)
    assert not report.frame["value"].isna().any()


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("from the model")


def test_hooks_are_gone_even_when_the_model_raises():
    stack = Stack([nn.Linear(4, 4), nn.Linear(4, 4), Raises()], dim=4)
    hooks = hooks_of(stack)
    with pytest.raises(RuntimeError, match="from the model"):
        inspect(stack, torch.randn(2, 4))
    assert hooks_of(stack) == hooks
    with pytest.raises(RuntimeError, match="from the test"), lesion(stack, swap=(0, 1)):
        raise RuntimeError("from the test")
    assert [type(residual.sublayer) for residual in stack.residuals] == [nn.Linear, nn.Linear, Raises]
    with pytest.raises(RuntimeError, match="from the test"), lesion(stack, delete=[0]):
        raise RuntimeError("from the test")
    assert hooks_of(stack) == hooks


def test_the_signal_is_what_the_definitions_say():
    """Against every stream written out, over the positions that are real."""
    model = text_transformer("post").double()
    report = inspect(model, IDS, mask=MASK)
    streams = []
    handles = [
        r.register_forward_hook(lambda _, args, out: streams.append((args[0], out))) for r in model.encoder.residuals
    ]
    with torch.no_grad():
        model(IDS, mask=MASK)
    for handle in handles:
        handle.remove()
    x, out = ([pair[i].detach() for pair in streams] for i in (0, 1))
    real = [stream[MASK] for stream in [*x, out[-1]]]
    near = lambda values: pytest.approx([float(value) for value in values], rel=1e-9)  # noqa: E731
    assert values(report, "stream_rms") == near(r.square().mean().sqrt() for r in real)
    assert values(report, "stream_variance") == near(r.var(1, unbiased=False).mean() for r in real)
    steps = list(zip(real, real[1:], strict=False))
    assert values(report, "stream_growth") == near(b.norm() / a.norm() for a, b in steps)
    assert values(report, "update_ratio") == near((b - a).norm() / a.norm() for a, b in steps)
    cosines = [(F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1) for a, b in steps]
    assert values(report, "block_influence") == near(1 - c.mean() for c in cosines)
    assert values(report, "angular_distance") == near(c.arccos().mean() / math.pi for c in cosines)
    spreads = []
    for stream in [*x, out[-1]]:
        rows = [row[keep] for row, keep in zip(stream, MASK, strict=True)]
        apart = torch.cat([row - row.mean(0) for row in rows])
        spreads.append(apart.norm() / torch.cat(rows).norm())
    assert values(report, "token_spread") == near(spreads)


def test_padding_does_not_count():
    """The same texts with more padding: the same signal."""
    model = text_transformer("pre").double()
    ids, mask = F.pad(IDS, (0, 2)), F.pad(MASK, (0, 2))
    short, long = inspect(model, IDS, mask=MASK), inspect(model, ids, mask=mask)
    for statistic in ("stream_rms", "branch_rms", "block_influence", "token_spread", "gradient_norm"):
        assert values(short, statistic) == pytest.approx(values(long, statistic), rel=1e-9), statistic


def test_padding_does_not_count_where_the_length_is_halved():
    """Its blocks keep every second place, and so does the mask."""
    torch.manual_seed(0)
    model = TextConvNet.vdcnn(3, depth=9, vocab_size=20, shortcut="pad").double().eval()
    ids = torch.randint(1, 20, (2, 40))
    mask = torch.arange(40) < torch.tensor([[40], [23]])
    reports = [inspect(model, F.pad(ids, (0, more)), F.pad(mask, (0, more))) for more in (0, 24)]
    for statistic in ("stream_rms", "branch_rms", "token_spread", "dead_units", "gradient_norm"):
        short, long = (values(report, statistic) for report in reports)
        assert short == pytest.approx(long, rel=1e-9), statistic


class Pooled(nn.Module):
    """A net whose second block reads every other position, and of an odd number the last is lost."""

    def __init__(self):
        super().__init__()
        self.blocks, self.pool = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(2)), nn.MaxPool1d(2)

    def forward(self, x, mask):
        return self.blocks[1](self.pool(self.blocks[0](x)))


def test_padding_does_not_count_where_an_odd_length_is_halved():
    torch.manual_seed(0)
    model, x = Pooled(), torch.randn(2, 4, 11)
    mask = torch.arange(11) < torch.tensor([[11], [4]])
    read = model.pool(model.blocks[0](x)).movedim(1, -1)[mask[:, :10:2]]
    assert inspect(model, x, mask).series("stream_rms")[1] == pytest.approx(read.square().mean().sqrt().item())


def torchs_encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()


def test_the_masks_of_torchs_own_model():
    """As many texts as places: who sees whom is no padding, whose mask says True = padding."""
    model, x = torchs_encoder(batch_first=True), torch.randn(6, 6, 8, dtype=torch.double)
    padding = torch.arange(6) >= torch.tensor([[6], [5], [4], [3], [2], [1]])
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.double)
    assert values(inspect(model, x, mask=causal), "stream_rms")[0] == pytest.approx(x.square().mean().sqrt())
    added = torch.zeros(6, 6, dtype=torch.double).masked_fill(padding, -math.inf)
    for each in (model, torch.compile(model, backend="eager")):
        for mask in (padding, added):
            found = inspect(each, x, src_key_padding_mask=mask)
            assert values(found, "stream_rms")[0] == pytest.approx(x[~padding].square().mean().sqrt())


def test_samples_that_stand_second():
    """batch_first=False, torch's default."""
    model, x = torchs_encoder(), torch.randn(5, 3, 8, dtype=torch.double)
    swapped = torchs_encoder(batch_first=True)
    swapped.load_state_dict(model.state_dict())
    padding = torch.arange(5) >= torch.tensor([[5], [4], [2]])
    found = inspect(model, x, src_key_padding_mask=padding)
    right = inspect(swapped, x.transpose(0, 1), src_key_padding_mask=padding)
    for statistic in ("stream_rms", "token_spread", "block_influence", "dead_units"):
        assert values(found, statistic) == pytest.approx(values(right, statistic)), statistic


class SqueezeExcite(nn.Module):
    """A block of convolutions with a linear map inside."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x):
        y = self.conv(x)
        return x + y * self.gate(y.mean((2, 3))).sigmoid()[..., None, None]


class Joins(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 4, 1)

    def forward(self, x):
        return self.conv(torch.cat([x, x.sin()], 1))


def test_where_features_stand():
    torch.manual_seed(0)
    model, x = nn.Sequential(SqueezeExcite(), SqueezeExcite()), torch.randn(2, 8, 5, 4)
    cosine = F.cosine_similarity(x, model[0](x), dim=1).mean().item()
    assert values(inspect(model, x), "block_influence")[0] == pytest.approx(1 - cosine, rel=1e-5)
    mixer = nn.Sequential(nn.Conv1d(6, 6, 1), nn.Linear(8, 8))  # over positions, then over features
    model, x = nn.Sequential(mixer, mixer), torch.randn(2, 6, 8)
    cosine = F.cosine_similarity(x, mixer(x), dim=-1).mean().item()
    assert inspect(model, x).series("block_influence")[0] == pytest.approx(1 - cosine, rel=1e-5)
    joins = [Joins(), Joins()]  # a DenseNet's layer convolves more than it reads of the stream
    model, x = nn.Sequential(joins[0], joins[1]), torch.randn(2, 4, 6)
    cosine = F.cosine_similarity(x, joins[0](x), dim=1).mean().item()
    assert inspect(model, x).series("block_influence")[0] == pytest.approx(1 - cosine, rel=1e-5)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), torch.randn(2, 3, 8, 7)
    cosine = F.cosine_similarity(model[0](x), model(x), dim=1).mean().item()  # a block without weights
    assert inspect(model, x, blocks="*").series("block_influence")[1] == pytest.approx(1 - cosine, rel=1e-5)


class InPlace(nn.Module):
    """A block that writes into what it reads."""

    def __init__(self, inplace):
        super().__init__()
        self.bias, self.inplace = nn.Parameter(torch.randn(8)), inplace

    def forward(self, x):
        return x.add_(self.bias) if self.inplace else x + self.bias


@pytest.mark.parametrize("build", [InPlace, lambda inplace: nn.Sequential(nn.ReLU(inplace), nn.Linear(8, 8))])
def test_blocks_that_write_into_the_stream(build):
    """They are seen as they are without."""
    nets = []
    for inplace in (True, False):
        torch.manual_seed(0)
        blocks = nn.Sequential(*(build(inplace) for _ in range(3)))
        nets.append(nn.Sequential(nn.Linear(8, 8), blocks, nn.ReLU(inplace), nn.Linear(8, 2)))
    x = torch.randn(5, 8)
    found, right = (inspect(net, x, blocks="1.*") for net in nets)
    assert [row[:3] for row in found.rows] == [row[:3] for row in right.rows]
    assert [row[3] for row in found.rows] == pytest.approx([row[3] for row in right.rows])

    def without(net):
        with torch.no_grad(), lesion(net, blocks="1.*", delete=1):
            return net(x)

    torch.testing.assert_close(*map(without, nets))
    assert not torch.allclose(without(nets[0]), nets[0](x))
    first = inspect(nets[0][1], x)  # the data itself is written into
    assert values(first, "gradient_norm") == pytest.approx(values(inspect(nets[1][1], x), "gradient_norm"))


def test_a_stream_near_zero_has_a_direction_too():
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))), torch.randn(5, 4)
    large, small = (values(inspect(model, scale * x), "block_influence") for scale in (1.0, 1e-12))
    assert small == pytest.approx(large, rel=1e-4)


def test_a_text_of_padding_alone_spoils_no_number():
    mask = MASK.clone()
    mask[1] = False
    assert all(math.isfinite(value) for value in values(inspect(text_transformer(), IDS, mask=mask), "token_spread"))


def test_inputs_by_name_count_like_those_by_place():
    model, x = torch_encoder(), torch.randn(3, 6, 16, requires_grad=True)
    by_place, by_name = inspect(model, x), inspect(model, src=x)
    assert by_place.rows == by_name.rows
    assert len(values(by_name, "gradient_norm")) == 5
    assert (x.grad, x._backward_hooks) == (None, None), "the caller's tensor stays as it was"
    placed, named = inspect(text_transformer(), IDS, MASK), inspect(text_transformer(), IDS, mask=MASK)
    assert placed.rows == named.rows


class LongSkip(nn.Module):
    """What its first block reads is read once more."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self.blocks(x) + 3 * x


def test_the_gradient_of_data_counts_all_its_uses():
    torch.manual_seed(0)
    model, x = LongSkip(), torch.randn(3, 4, requires_grad=True)
    model(x).square().sum().backward()
    found = inspect(model, x.detach(), loss=lambda out: out.square().sum())
    assert found.series("gradient_norm")[0] == pytest.approx(x.grad.norm().item())


def test_blocks_within_blocks_have_their_own_gradients():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)), torch.randn(3, 4)
    inner = model[0][1]
    found = inspect(model, x, blocks=[inner, model[0]]).frame.query("statistic == 'gradient_norm'")
    alone = [inspect(model, x, blocks=[block]).series("gradient_norm")[0] for block in (inner, model[0])]
    assert dict(zip(found["module"], found["value"], strict=True)) == pytest.approx(
        {"0.1": alone[0], "0": alone[1], "output": inspect(model, x, blocks=[model[0]]).series("gradient_norm")[1]}
    )


class Latents(nn.Module):
    """A stream that begins as a parameter."""

    def __init__(self):
        super().__init__()
        self.latents, self.blocks = nn.Parameter(torch.randn(3, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self):
        return self.blocks(self.latents)


def test_a_parameter_that_a_block_reads_keeps_no_hook():
    model = Latents()
    assert set(inspect(model, blocks="blocks.*").series("gradient_norm")) == {1, 2}
    assert model.latents._backward_hooks is None


def test_features_of_convolutions_stand_first():
    blocks = [nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)]
    model, x = Stack(blocks, dim=4, scheme="residual", channel_dim=1), torch.randn(2, 4, 9)
    out = model.residuals[0](x)
    cosine = F.cosine_similarity(x, out, dim=1).mean().item()
    assert inspect(model, x).series("block_influence")[0] == pytest.approx(1 - cosine, rel=1e-5)
    lanes = Stack(blocks, dim=4, scheme="hyper", norm=None, channel_dim=1)  # but those of lanes last
    before = lanes.open(x)
    cosine = F.cosine_similarity(before, lanes.residuals[0](before), dim=-1).mean().item()
    assert inspect(lanes, x).series("block_influence")[0] == pytest.approx(1 - cosine, rel=1e-5)


@pytest.mark.parametrize(
    ("scheme", "telescopes"), [("residual", True), ("pre", True), ("sandwich", True), ("post", False)]
)
def test_the_stream_telescopes_where_every_shortcut_is_the_identity(scheme, telescopes):
    """x_L = x_0 + ΣF (He et al. 2016, eq. 4) to rounding; a norm on the stream breaks it."""
    errors = values(inspect(text_transformer(scheme).double(), IDS), "telescoping_error")
    assert len(errors) == 6
    assert (max(errors) < 1e-14) if telescopes else (min(errors) > 1e-2)


def test_the_gradient_splits_into_a_part_along_the_shortcuts_and_a_part_through_weights():
    """δ_l = δ_L + (∂ΣF/∂x_l)ᵀ δ_L (He et al. 2016, eq. 5), the second part from a graph of the branches alone."""
    model = text_transformer("pre").double().encoder
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    direction = torch.randn(16, dtype=torch.float64)
    loss = lambda out: (out @ direction).tanh().sum()  # noqa: E731
    report = inspect(model, x, loss=loss)
    streams = [x.requires_grad_()]
    for residual in model.residuals:
        streams.append(residual(streams[-1]))
    deltas = torch.autograd.grad(loss(model.close(streams[-1])), streams, retain_graph=True)
    for depth, delta in enumerate(deltas[:-1]):
        branches = streams[-1] - streams[depth]  # ΣF; its graph holds −1 for the shortcut
        (through,) = torch.autograd.grad(branches, streams[depth], deltas[-1], retain_graph=True)
        torch.testing.assert_close(delta, deltas[-1] + through, rtol=1e-12, atol=1e-14)
        expected = (through.norm() / deltas[-1].norm()).item()
        assert report.series("gradient_through_branches")[depth] == pytest.approx(expected, rel=1e-10)
    norms = [delta.norm().item() for delta in deltas]
    assert values(report, "gradient_norm") == pytest.approx(norms, rel=1e-12)
    gains = [a / b for a, b in zip(norms, norms[1:], strict=False)]
    assert values(report, "gradient_gain") == pytest.approx(gains, rel=1e-12)


def test_weight_gradients_are_those_of_a_backward_pass():
    model = text_transformer("post").double()
    loss = lambda logits: F.cross_entropy(logits, torch.tensor([0, 1, 2]))  # noqa: E731
    frame = inspect(model, IDS, mask=MASK, loss=loss).frame
    loss(model(IDS, MASK)).backward()
    rows = frame[frame["statistic"] == "weight_gradient_norm"]
    inside = {name: p for name, p in model.named_parameters() if name.startswith("encoder.residuals.")}
    assert set(rows["module"]) == set(inside)
    for depth, module, value in rows[["depth", "module", "value"]].itertuples(index=False):
        assert value == pytest.approx(inside[module].grad.norm().item(), rel=1e-12)
        assert module.startswith(f"encoder.residuals.{depth}.")
    whole = [math.hypot(*(p.grad.norm() for p in residual.parameters())) for residual in model.encoder.residuals]
    of_blocks = frame[frame["statistic"] == "block_gradient_norm"].sort_values("depth")["value"]
    assert list(of_blocks) == pytest.approx(whole, rel=1e-12)


def test_bfloat16_and_a_frozen_model():
    with torch.autocast("cpu", torch.bfloat16):
        report = inspect(text_transformer("pre"), IDS, mask=MASK)
    assert len(values(report, "gradient_norm")) == 7
    frozen = text_transformer("pre").requires_grad_(False)
    report = inspect(frozen, IDS, mask=MASK)
    assert (len(values(report, "stream_rms")), values(report, "gradient_norm")) == (7, [])


def test_a_model_may_name_its_own_loss():
    bert = hugging_face_bert()

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert

        def forward(self, ids, labels):
            from types import SimpleNamespace

            loss = F.cross_entropy(self.bert(ids).last_hidden_state[:, 0], labels)
            return SimpleNamespace(loss=loss)

    model, labels = Classifier(), torch.tensor([0, 1, 2])
    report = inspect(model, IDS, labels, blocks="bert.encoder.layer.*")
    model(IDS, labels).loss.backward()
    expected = model.bert.encoder.layer[3].output.dense.weight.grad.norm().item()
    frame = report.frame[report.frame["statistic"] == "weight_gradient_norm"].set_index("module")["value"]
    assert frame["bert.encoder.layer.3.output.dense.weight"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="got none at the model's output. Use other blocks"):
        inspect(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Nothing()), torch.randn(2, 2))


@pytest.mark.parametrize(
    "shape",
    [
        lambda logits, loss: {"loss": loss, "logits": logits},
        lambda logits, loss: {"logits": logits, "loss": loss},
        lambda logits, loss: (loss, logits),
        lambda logits, loss: loss,
    ],
)
def test_whatever_the_loss_comes_in_it_is_what_is_differentiated(shape):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

        def forward(self, x):
            logits = self.body(x)
            return shape(logits, logits.square().sum())

    model, x = Classifier(), torch.randn(2, 4)
    report = inspect(model, x)
    model.body(x).square().sum().backward()
    frame = report.frame[report.frame["statistic"] == "weight_gradient_norm"].set_index("module")["value"]
    assert frame["body.0.weight"] == pytest.approx(model.body[0].weight.grad.norm().item(), rel=1e-5)


class Nothing(nn.Module):
    def forward(self, x):
        return None


# what happens inside the blocks


def test_the_entropy_of_attention_is_that_of_the_weights_written_out():
    """Over real queries and keys; the embedding's stream goes through the first block alone."""
    model = text_transformer("post")
    found = inspect(model, IDS, mask=MASK).series("attention_entropy")
    assert list(found) == [0, 2, 4], "one attention a layer"
    attention, streams = model.encoder.residuals[0].sublayer, []
    with attention.register_forward_pre_hook(lambda _, args: streams.append(args[0])):
        model(IDS, mask=MASK)
    q, k, _ = attention.split(attention.qkv(streams[0]))
    total = []
    for text, length in enumerate(MASK.sum(1).tolist()):
        for head in range(2):
            scores = q[text, head, :length] @ k[text, head, :length].T / math.sqrt(8)
            p = scores.softmax(1)
            total += (-(p * p.log()).sum(1)).tolist()
    assert found[0] == pytest.approx(sum(total) / len(total), rel=1e-4)


class ByHand(nn.Module):
    """Attention written out."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.maps(x).chunk(3, -1))
        return x + (F.softmax(q @ k.mT, dim=-1) @ v).transpose(1, 2).flatten(2)


def test_the_entropy_of_attention_by_hand():
    torch.manual_seed(0)
    model, x = nn.Sequential(ByHand(), ByHand()), torch.randn(2, 5, 8)
    q, k, _ = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in model[0].maps(x).chunk(3, -1))
    entropy = torch.special.entr((q @ k.mT).softmax(-1)).sum(-1).mean().item()
    assert values(inspect(model, x), "attention_entropy")[0] == pytest.approx(entropy, rel=1e-5)
    torch.manual_seed(0)
    training = text_transformer("pre", attention_dropout=0.1).train()  # its own attention, on a CPU
    found, right = (inspect(each, IDS, mask=MASK) for each in (training, text_transformer("pre")))
    assert values(found, "attention_entropy")[0] == pytest.approx(values(right, "attention_entropy")[0], rel=1e-5)


def test_attention_that_sees_all_alike_has_the_entropy_of_their_number():
    model = text_transformer("post")
    for residual in model.encoder.residuals[::2]:
        nn.init.zeros_(residual.sublayer.qkv.weight)
    found = inspect(model, IDS, mask=MASK).series("attention_entropy")
    assert found[4] == pytest.approx((6 * math.log(6) + 4 * math.log(4) + 5 * math.log(5)) / 15)


@pytest.mark.parametrize("name", ["torch.nn", "Hugging Face"])
def test_the_entropy_of_anyones_attention(name):
    """By torch's functions, whatever the module; and the model's output is bitwise what it is without."""
    build, inputs, keywords, _, count = MODELS[name]
    model, given, outputs = build(), inputs(), []
    expected = first(model(*given, **keywords))
    found = inspect(model, *given, **keywords, loss=lambda out: outputs.append(first(out)) or first(out).sum())
    entropy = values(found, "attention_entropy")
    assert len(entropy) == count
    assert all(0 < value < math.log(6) for value in entropy)
    assert torch.equal(outputs[0], expected)


def test_the_entropy_of_torchs_own_module_is_that_of_its_weights():
    attention, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(3, 6, 16)
    model = Stack([attention, nn.Linear(16, 16)], dim=16, scheme="residual")
    _, weights = attention(x, x, x, key_padding_mask=~MASK, average_attn_weights=False)
    expected = torch.special.entr(weights).sum(-1).mean(1)[MASK].mean().item()
    assert inspect(model, x, mask=MASK).series("attention_entropy") == pytest.approx({0: expected}, rel=1e-5)


@pytest.mark.parametrize("rectify", [nn.ReLU(), F.relu, torch.relu, lambda x: x.relu(), nn.ReLU6()])
def test_dead_units_are_those_that_never_fire(rectify):
    linear, x = nn.Linear(8, 8), torch.randn(3, 6, 8)
    with torch.no_grad():
        linear.bias[:3] = -100  # three of eight never fire, wherever
    model = Stack([lambda x: rectify(linear(x)), nn.Linear(8, 8)], dim=8, scheme="residual", norm=None)
    assert inspect(model, x).series("dead_units") == {0: 3 / 8}


def test_padding_does_not_bring_a_unit_to_life():
    x, mask = torch.full((1, 3, 2), -1.0), torch.tensor([[True, True, False]])
    x[0, 2] = 1.0
    model = Stack([nn.ReLU(), nn.Linear(2, 2)], dim=2, scheme="residual", norm=None)
    assert inspect(model, x).series("dead_units")[0] == 0
    model.forward = lambda x, mask: Stack.forward(model, x)  # a model that is told the mask
    assert inspect(model, x, mask=mask).series("dead_units")[0] == 1


def test_the_shortcuts_factors_multiply():
    """∏λ (He et al. 2016, eq. 7), and nothing where there is no sum."""
    scaled = Stack([nn.Linear(4, 4) for _ in range(5)], dim=4, scheme=SCHEMES["residual"](skip_scale=0.5))
    report = inspect(scaled, torch.randn(2, 4))
    assert values(report, "skip_gain") == pytest.approx([0.5] * 5)
    assert values(report, "skip_product") == pytest.approx([0.5**n for n in (5, 4, 3, 2, 1)])
    assert (
        "Shortcuts: their factors multiply to 0.0312 from the first block to the last; norms not counted."
        in report.verdict
    )
    report = inspect(text_transformer("pre"), IDS)
    assert values(report, "skip_product") == [1] * 6
    assert not any("Shortcuts" in sentence for sentence in report.verdict)
    assert values(inspect(text_transformer("highway"), IDS), "skip_product") == []
    wider = Residual(nn.Linear(4, 8), shortcut=lambda x: F.pad(x, (0, 4)))  # keeps ‖x‖, but not its mean square
    assert values(inspect(nn.Sequential(wider), torch.randn(2, 4)), "skip_gain") == pytest.approx([1])


# every scheme

SEVERAL = ("denseformer", "attnres", "attnres_block", "dense", "resi_dual", "reversible")  # tensors in the stream


def randomised(scheme, depth):
    """A Transformer none of whose parameters stands where it would hide a mistake."""
    torch.manual_seed(0)
    model = TransformerEncoder(8, depth, 2, scheme=scheme).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for part in model.modules():
        if hasattr(part, "set_step"):
            part.set_step(500)
    return model, torch.randn(2, 4, 8, dtype=torch.float64)


class Zero(nn.Module):
    def forward(self, x, **_):
        return torch.zeros_like(x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_deleted_block_adds_nothing_in_any_scheme(scheme):
    """Of one stream: the network built without it. Of any other: the network whose sublayer gives 0 there."""
    model, x = randomised(scheme, 5)  # 10 residuals, so that a block of attnres_block is two
    with torch.no_grad():
        whole = model(x)
        for i in (0, 3, 6, 9):
            without = copy.deepcopy(model)
            if isinstance(model.residuals[i].connection, OneStream):
                del without.residuals[i]
            else:
                without.residuals[i].sublayer = Zero()
            with lesion(model, delete=[i]):
                deleted = model(x)
            torch.testing.assert_close(deleted, without(x))
            assert not torch.allclose(deleted, whole)
        assert torch.equal(model(x), whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_stream_of_any_scheme_is_measured_or_not_spoken_of(scheme):
    model, x = randomised(scheme, 2)
    sublayers = []
    handles = [r.sublayer.register_forward_hook(lambda _, args, y: sublayers.append(y)) for r in model.residuals]
    report = inspect(model.train(), x)
    for handle in handles:
        handle.remove()
    one = scheme not in SEVERAL
    of_stream = {"stream_rms": 5, "stream_size": 5, "gradient_norm": 5, "gradient_gain": 4, "update_ratio": 4}
    of_stream |= {"stream_growth": 4, "block_influence": 4, "angular_distance": 4, "gradient_through_branches": 4}
    assert {name: len(values(report, name)) for name in of_stream} == (
        of_stream if one else dict.fromkeys(of_stream, 0)
    )
    assert len(values(report, "block_gradient_norm")) == 4
    assert len(report.text.splitlines()) == (6 if one else 5)
    said = {sentence.partition(":")[0] for sentence in report.verdict} - {"Shortcuts", "Dead units"}
    assert said == ({"Gradient", "Stream", "Influence", "Attention"} if one else {"Stream", "Attention"})
    if not one:
        sizes = [y.square().mean().sqrt().item() for y in sublayers[:4]]  # reversible runs them again
        assert values(report, "branch_rms") == pytest.approx(sizes)
        told = f"is {min(sizes):.3g} (block {sizes.index(min(sizes))}) to {max(sizes):.3g} (block"
        assert told in report.verdict[0]


def test_of_blocks_that_do_nothing_none_does_most():
    verdict = inspect(text_transformer("rezero"), IDS).verdict
    assert "Influence: no block turns the stream." in verdict
    assert verdict[1].endswith(" Every branch is 0.")


def test_the_report_of_a_stream_of_several_tensors(tmp_path):
    model, x = randomised("attnres", 2)
    report = inspect(model, x) + lesion_curve(model, lambda model: model(x).square().mean().item())
    drops = values(report, "lesion_drop")
    assert all(drop != 0 for drop in drops)
    assert f"the most costly is block {drops.index(max(drops))} ({max(drops):.3g})." in report.verdict[-1]
    page = report.save(tmp_path).read_text()
    assert "Stream: several tensors, of which nothing is measured." in page
    assert {path.stem for path in tmp_path.glob("*.png")} == {"signal", "gradients", "inside", "lesions"}
    frame = diagnostics.coordinate_check(model, x, steps=1)
    assert set(frame["statistic"]) == {"update_weight_ratio"}
    bare = Stack([nn.Tanh() for _ in range(3)], dim=8, scheme="attnres", norm=None)  # no weights, no attention
    assert len(inspect(bare, x.float()).text.splitlines()) == 4


@pytest.mark.parametrize("scheme", SEVERAL)
def test_paths_want_a_stream_of_one_tensor(scheme):
    model, x = randomised(scheme, 2)
    with pytest.raises(ValueError, match=r"^path_gradients: the stream is one floating tensor.*; got \w+ at Residual"):
        diagnostics.path_gradients(model, x, loss=torch.sum)


@pytest.mark.parametrize("scheme", ["hyper", "mhc", *SEVERAL])
def test_blocks_of_lanes_histories_and_pairs_change_places(scheme):
    """Where the connections are alike, the network is that of the other order; elsewhere it says so at once."""
    model, x = randomised(scheme, 5)

    def swap(i, j):
        with torch.no_grad(), lesion(model, swap=(i, j)):
            return model(x)

    if scheme == "dense":
        with pytest.raises(ValueError, match="got a FromHistory of position 2 for position 0. Use other positions"):
            swap(0, 2)
        return
    order = [2, 1, 0, *range(3, 10)]
    with torch.no_grad():
        stream = model.open(x)
        for i in order:
            stream = model.residuals[i](stream)
        torch.testing.assert_close(swap(0, 2), model.close(stream))
    if scheme in ("denseformer", "attnres_block"):
        with pytest.raises(
            ValueError, match=r"lesion: a block changes places with one .* of position 1 for position 0"
        ):
            swap(0, 1)
    else:
        assert swap(0, 1).isfinite().all()


def test_a_parameter_that_blocks_share_counts_in_each():
    """At ReZero's start only λ has a gradient, and the two residuals of a layer have one."""
    norms = values(inspect(TransformerEncoder(8, 2, 2, scheme="rezero"), torch.randn(2, 4, 8)), "block_gradient_norm")
    assert norms[0] == norms[1] > 0
    assert norms[2] == norms[3] > 0


def test_a_parameter_that_stands_twice_in_a_block_counts_once():
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))), IDS
    for block in model:
        block[2].weight = block[0].weight
    x = torch.randn(5, 4)
    found = values(inspect(model, x, blocks="*", loss=lambda out: out.square().sum()), "block_gradient_norm")
    model(x).square().sum().backward()
    assert found == pytest.approx([math.hypot(*(p.grad.norm() for p in block.parameters())) for block in model])


def test_a_model_is_a_module():
    with pytest.raises(ValueError, match=r"the model is an nn.Module; got str. Build it first, or let resseq.inspect"):
        inspect("post", torch.randn(2, 4))


# the first steps


@pytest.mark.parametrize("scheme", ["pre", "ngpt"])  # ngpt's weights are constrained after each step
def test_coordinate_check_is_what_training_by_hand_gives(scheme):
    model, target = text_transformer(scheme).train(), torch.tensor([0, 1, 2])
    loss = lambda logits: F.cross_entropy(logits, target)  # noqa: E731
    before, state = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    frame = diagnostics.coordinate_check(
        model, IDS, mask=MASK, loss=loss, steps=2, optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.1)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    for step in range(2):
        sizes = values(inspect(trained, IDS, mask=MASK), "stream_size")
        found = frame[(frame["statistic"] == "stream_size") & (frame["step"] == step)].sort_values("depth")["value"]
        assert list(found) == pytest.approx(sizes, rel=1e-5)
        block = trained.encoder.residuals[3]
        old = torch.cat([p.detach().flatten() for p in block.parameters()])
        optimizer.zero_grad()
        loss(trained(IDS, MASK)).backward()
        optimizer.step()
        trained.encoder.constrain()
        moved = torch.cat([p.detach().flatten() for p in block.parameters()]) - old
        rows = frame[(frame["statistic"] == "update_weight_ratio") & (frame["step"] == step) & (frame["depth"] == 3)]
        assert rows["value"].item() == pytest.approx((moved.norm() / old.norm()).item(), rel=1e-4)
    assert set(frame[frame["statistic"] == "stream_size"]["step"]) == {0, 1, 2}


def test_coordinate_check_takes_the_steps_of_the_scheme():
    """ProRes: the first step's factor is 1/1000, not 0, by which no branch would learn."""
    model = text_transformer("prores")
    loss = lambda out: out.square().sum()  # noqa: E731
    frame = diagnostics.coordinate_check(model, IDS, steps=2, loss=loss)
    model.encoder.set_step(1)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.encoder.residuals[1].sublayer.out.weight.detach().clone()
    loss(model.eval()(IDS)).backward()
    optimizer.step()
    moved = (model.encoder.residuals[1].sublayer.out.weight - before).norm() / before.norm()
    ratio = frame.query("step == 0 and depth == 1 and statistic == 'update_weight_ratio'")["value"].item()
    assert moved > 1e-3
    assert ratio == pytest.approx(moved.item(), rel=0.5)


def test_coordinate_check_takes_the_learning_rates_of_the_scheme():
    """Depth-μP's is 1/√4 of the others' in four layers, and a first step of Adam is as long as its learning rate."""
    model, x = TransformerEncoder(16, 4, 2, scheme="depth_mup"), torch.randn(4, 6, 16)

    def moved(optimizer=None):
        frame = diagnostics.coordinate_check(model, x, optimizer=optimizer, steps=1)
        return frame[frame["statistic"] == "update_weight_ratio"]["value"]

    own, usual = moved(), moved(lambda model: torch.optim.AdamW(model.parameters(), 1e-3))
    assert list(own / usual) == pytest.approx([0.5] * 8, rel=0.05)


def test_a_step_moves_the_stream_alike_at_all_depths_under_completep():
    """Dey et al. 2025: with one learning rate, pre-norm moves more the deeper it is; CompleteP hardly."""

    def moved(scheme, depth):
        torch.manual_seed(0)
        model = TransformerEncoder(16, depth, 2, scheme=scheme)
        adam = lambda model: torch.optim.Adam(model.parameters(), 1e-3)  # noqa: E731
        x = torch.randn(4, 6, 16)
        frame = diagnostics.coordinate_check(model, x, optimizer=adam, steps=3)
        last = frame[(frame["statistic"] == "stream_size") & (frame["depth"] == frame["depth"].max())]
        size = last.set_index("step")["value"]
        return abs(size[3] - size[0]) / size[0]

    assert moved("pre", 16) > 2 * moved("pre", 2)
    assert moved("completep", 16) < 2 * moved("completep", 2)


# lesions


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resseq plain"])
def test_a_deleted_block_hands_on_what_it_reads(name):
    """The network with block 1 deleted is the network built without it."""
    build, inputs, keywords, pattern, count = MODELS[name]
    model, given = build(), inputs()
    with torch.no_grad():
        whole = first(model(*given, **keywords))
        with lesion(model, blocks=pattern, delete=[1]):
            deleted = first(model(*given, **keywords))
        torch.testing.assert_close(first(model(*given, **keywords)), whole)
        parent = model.get_submodule(pattern.removesuffix(".*"))
        del parent[1]
        if hasattr(model, "config"):
            model.config.num_hidden_layers -= 1
        assert len(parent) == count - 1
        torch.testing.assert_close(deleted, first(model(*given, **keywords)))
    assert not torch.allclose(deleted, whole) or "rezero" in name  # whose branches start at 0


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


class Beside(NamedTuple):
    ids: torch.Tensor
    x: torch.Tensor


def model_output(ids, x):
    return pytest.importorskip("transformers").modeling_outputs.BaseModelOutput(x, (ids, x))


class Gives(nn.Module):
    """A layer whose stream stands somewhere in what it returns."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(4, 4), form

    def forward(self, ids, x):
        return self.form(ids, self.linear(x))


class Threads(nn.Module):
    def __init__(self, form, read):
        super().__init__()
        self.layers, self.read = nn.ModuleList(Gives(form) for _ in range(3)), read

    def forward(self, ids, x):
        for layer in self.layers:
            x = self.read(layer(ids, x))
        return x


@pytest.mark.parametrize(
    ("form", "read"),
    [
        (lambda ids, x: (ids, x), lambda out: out[1]),
        (lambda ids, x: (None, x), lambda out: out[1]),
        (lambda ids, x: [ids, (None, x)], lambda out: out[1][1]),
        (Beside, lambda out: out.x),
        (lambda ids, x: {"ids": ids, "x": x, "again": x}, lambda out: out["x"]),
        (lambda ids, x: ({"ids": ids}, {"x": [x]}), lambda out: out[1]["x"][0]),
        (model_output, lambda out: out.last_hidden_state),
    ],
)
def test_a_deleted_block_hands_on_the_stream_wherever_it_stands(form, read):
    torch.manual_seed(0)
    model, ids, x = Threads(form, read), torch.arange(2), torch.randn(2, 4)
    with torch.no_grad(), lesion(model, delete=[0, 1, 2]):
        assert torch.equal(model(ids, x), x)
    report = lesion_curve(model, lambda model: model(ids, x).norm().item())
    assert all(values(report, "lesion_drop"))


def test_what_else_a_block_gives_stays_as_it_is():
    ids, x, new = torch.arange(2), torch.randn(2, 4), torch.randn(2, 4)
    given = model_output(ids, x)
    changed = replace_first(given, new)
    assert type(changed) is type(given)
    assert changed[0] is changed.last_hidden_state is new
    assert changed.hidden_states[1] is given.last_hidden_state is x


def test_blocks_change_places():
    model, x = torch_encoder(), torch.randn(2, 5, 16)
    layers = list(model.layers)

    def run(order):
        out = x
        for i in order:
            out = layers[i](out)
        return out

    with torch.no_grad():
        with lesion(model, swap=(0, 2)):
            torch.testing.assert_close(model(x), run([2, 1, 0, 3]))
        with lesion(model, permute=[3, 0, 1, 2]):
            torch.testing.assert_close(model(x), run([3, 0, 1, 2]))
        with lesion(model, delete=[0, 3]):
            torch.testing.assert_close(model(x), run([1, 2]))
        torch.testing.assert_close(model(x), run([0, 1, 2, 3]))
    assert list(model.layers) == layers


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_lesion_of_torchs_encoder_in_its_packed_form():
    """Without gradients and with padding, nn.TransformerEncoder runs on nested tensors."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 3).eval(), torch.randn(3, 6, 16)
    with torch.no_grad():
        with lesion(model, delete=[0, 2]):
            deleted = model(x, src_key_padding_mask=~MASK)
        del model.layers[2], model.layers[0]
        torch.testing.assert_close(deleted, model(x, src_key_padding_mask=~MASK))


def test_sublayers_that_take_different_keywords_change_places():
    """Attention takes the mask and a feed-forward net does not: the keyword goes where the sublayer went."""
    model = text_transformer("pre")
    with torch.no_grad(), lesion(model, swap=(0, 3)):
        out = model(IDS, MASK)
    assert out.isfinite().all()


def test_a_map_on_the_shortcut_stays():
    """Where the shape changes, a deleted block is its shortcut alone."""
    blocks = [Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 6), shortcut=nn.Linear(4, 6), post=nn.ReLU())]
    model, x = nn.Sequential(*blocks), torch.randn(3, 4)
    with torch.no_grad(), lesion(model, delete=[1]):
        torch.testing.assert_close(model(x), blocks[1].connection.shortcut(blocks[0](x)).relu())
    with torch.no_grad():
        torch.testing.assert_close(model(x), blocks[1](blocks[0](x)))


def test_lesion_curve():
    torch.manual_seed(0)
    model, x = Stack([nn.Linear(4, 4) for _ in range(3)], dim=4, scheme="residual").eval(), torch.randn(5, 4)

    def measure(model):
        with torch.no_grad():
            return model(x).sum().item()

    report = lesion_curve(model, measure)
    for i in range(3):
        with lesion(model, delete=[i]):
            assert report.series("lesioned")[i] == measure(model)
        assert report.series("lesion_drop")[i] == measure(model) - report.series("lesioned")[i]


def test_a_lone_residual_is_taken_out_and_put_back():
    torch.manual_seed(0)
    model, x = Residual(nn.Linear(4, 4), pre=nn.LayerNorm(4)), torch.randn(2, 4)
    with lesion(model, delete=0):
        assert torch.equal(model(x), x)
    assert set(dict(model.named_children())) == {"sublayer", "connection"}
    model.eval()
    found = inspect(model, x)
    assert set(found.frame[found.frame["statistic"] == "weight_norm"]["module"]) == {
        path for path, _ in model.named_parameters()
    }


class Backwards(nn.Module):
    """Its layers run from the last to the second."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Residual(nn.Linear(4, 4)) for _ in range(4))

    def forward(self, x):
        for layer in list(self.layers)[:0:-1]:
            x = layer(x)
        return x


def test_depth_is_the_order_in_which_blocks_run():
    torch.manual_seed(0)
    model, x = Backwards(), torch.randn(2, 4)
    report = inspect(model, x) + lesion_curve(model, lambda model: model(x).sum().item())
    ran = {depth: f"layers.{3 - depth}" for depth in range(3)} | {3: "output"}
    blocks = report.frame[report.frame["module"].isin([*report.kinds, "output"])]
    assert set(blocks[["depth", "module"]].itertuples(index=False, name=None)) == set(ran.items())
    assert {"skip_product", "lesion_drop"} <= set(blocks["statistic"])
    steps = diagnostics.coordinate_check(model, x, steps=1)
    assert set(steps[["depth", "module"]].itertuples(index=False, name=None)) == set(ran.items())


def test_a_block_that_runs_several_times_is_found():
    block = nn.Linear(4, 4)
    assert find_blocks(nn.Sequential(*[block] * 3)) == {"0": block}
    other = nn.Linear(4, 4)
    assert list(find_blocks(nn.Sequential(block, other, block)).items()) == [("0", block), ("1", other)]
    assert len(values(inspect(nn.Sequential(*[block] * 3), torch.randn(2, 4)), "stream_rms")) == 4


def test_positions_of_any_kind():
    model, x = torch_encoder(), torch.randn(2, 5, 16)
    with lesion(model, permute=torch.tensor([1, 0, 2, 3])), torch.no_grad():
        permuted = model(x)
    with lesion(model, swap=torch.arange(2).numpy()), torch.no_grad():
        assert torch.equal(model(x), permuted)


def test_blocks_may_be_one_or_a_dictionary():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    assert list(find_blocks(nn.Sequential(model), model)) == ["0.a", "0.b"]
    assert list(find_blocks(nn.Sequential(model), model["b"])) == ["0.b"]


def test_blocks_that_do_not_run():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
    with pytest.raises(ValueError, match=r"got none that ran of layers.0.self_attn.out_proj, layers.1"):
        inspect(encoder, torch.randn(2, 3, 8), blocks="layers.*.self_attn.out_proj")


def test_two_residuals_with_one_connection():
    connection, x = OneStream(), torch.randn(2, 4)
    model = nn.Sequential(Residual(nn.Linear(4, 4), connection=connection), Residual(nn.Tanh(), connection=connection))
    assert len(values(inspect(model, x), "branch_rms")) == 2
    with lesion(model, delete=[0]):
        torch.testing.assert_close(model(x), x + x.tanh())
    assert "finish" not in vars(connection)


def test_a_compiled_model_is_measured_as_it_was_written():
    """What dynamo has compiled runs on without a look at hooks that came later."""
    torch.manual_seed(0)
    model, x = Stack([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)], dim=4).eval(), torch.randn(5, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)

    def measure(net):
        with torch.no_grad():
            return (net(x) * torch.arange(4)).sum().item()

    drops = lesion_curve(compiled, measure).series("lesion_drop")
    assert drops == pytest.approx(lesion_curve(model, measure).series("lesion_drop"))
    assert all(abs(drop) > 0.01 for drop in drops.values())
    assert inspect(compiled, x).series("branch_rms") == pytest.approx(inspect(model, x).series("branch_rms"))
    with lesion(model, delete=1):
        one = model(x)
    with lesion(model, delete=[1]):
        assert torch.equal(model(x), one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of delete, swap and permute; got none"),
        ({"delete": [1], "swap": (0, 1)}, "got delete, swap"),
        ({"delete": [4]}, r"different positions from 0 to 3; got delete=\[4\]"),
        ({"delete": [-1]}, r"got delete=\[-1\]"),
        ({"swap": (1, 1)}, r"got swap=\[1, 1\]"),
        ({"swap": (0, 1, 2)}, r"swap names 2 positions; got swap=\[0, 1, 2\]"),
        ({"permute": [1, 0]}, r"permute names 4 positions; got permute=\[1, 0\]"),
    ],
)
def test_a_bad_lesion(options, message):
    with pytest.raises(ValueError, match=message), lesion(torch_encoder(), **options):
        pass


def test_a_block_that_changes_the_shape_cannot_be_deleted():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    with lesion(model, delete=[0]), pytest.raises(ValueError, match=r"got a Linear from \(2, 4\) to \(2, 6\)"):
        model(torch.randn(2, 4))


# paths and amplification


def test_path_gradients_are_products_of_jacobians():
    """Every path of a small net, written out: the mean norm for each length, and their sum the whole gradient."""
    from itertools import combinations

    torch.manual_seed(0)
    model = Stack(
        [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3)], dim=3, scheme="residual"
    )
    model, x, direction = model.double(), torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    frame = diagnostics.path_gradients(model, x, loss=lambda out: out @ direction)
    jacobians, stream = [], x
    for residual in model.residuals:
        jacobians.append(torch.autograd.functional.jacobian(residual.sublayer, stream))
        stream = residual(stream)
    total = torch.zeros(3, dtype=torch.float64)
    for length in range(4):
        norms = []
        for chosen in combinations(range(3), length):
            gradient = direction
            for i in reversed(chosen):
                gradient = jacobians[i].T @ gradient
            total += gradient
            norms.append(gradient.norm().item())
        assert frame["gradient"][length] == pytest.approx(sum(norms) / len(norms), rel=1e-9)
    assert list(frame["paths"]) == [1, 3, 3, 1]
    assert frame["share"].sum() == pytest.approx(1)
    x = x.clone().requires_grad_()
    torch.testing.assert_close(total, torch.autograd.grad(model(x) @ direction, x)[0])


def test_path_gradients_where_gradients_are_off():
    torch.manual_seed(0)
    model, x = Stack([nn.Linear(4, 4) for _ in range(3)], dim=4, scheme="residual"), torch.randn(2, 4)
    on = diagnostics.path_gradients(model, x, loss=lambda out: out.square().sum())
    with torch.no_grad():
        off = diagnostics.path_gradients(model, x, loss=lambda out: out.square().sum())
    assert off.equals(on)


def test_short_paths_carry_the_gradient():
    """Veit et al. 2016, section 4.4, at the start of a pre-norm Transformer."""
    torch.manual_seed(0)
    model = TransformerEncoder(16, 5, 2, scheme="pre").eval()
    x, loss = torch.randn(4, 6, 16), lambda out: out.square()[..., 0].sum()
    frame = diagnostics.path_gradients(model, x, loss=loss, samples=8)
    mean = (frame["length"] * frame["share"]).sum()
    assert 0.5 < mean < 3.5, "5 of 10 blocks would be the mean if every path carried the same"


def test_path_gradients_refuse_blocks_of_changing_shape():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"got a Linear that changes \(2, 4\)"):
        diagnostics.path_gradients(model, torch.randn(2, 4), loss=torch.sum)


def test_amplification_grows_faster_with_depth_in_post_norm_than_in_pre_norm():
    """Liu et al. 2020, section 4.2."""

    def mean(scheme, depth):
        total = 0.0
        for seed in range(3):
            torch.manual_seed(seed)
            model = TransformerEncoder(16, depth, 2, scheme=scheme).eval()
            weights = [p.clone() for p in model.parameters()]
            total += amplification(model, torch.randn(4, 6, 16), seed=seed)
            assert all(map(torch.equal, weights, model.parameters()))
        return total / 3

    growth = {scheme: mean(scheme, 16) / mean(scheme, 4) for scheme in ("post", "pre")}
    assert growth["post"] > 2.5
    assert growth["pre"] < growth["post"] / 1.5


def test_amplification_leaves_batch_statistics_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    amplification(model, torch.randn(8, 4))
    assert model[1].num_batches_tracked == 0


def test_amplification_of_a_model_that_writes_into_its_input():
    found, x = [], torch.ones(2, 8)
    for inplace in (True, False):
        torch.manual_seed(0)
        found.append(amplification(nn.Sequential(InPlace(inplace), nn.Linear(8, 4), nn.Tanh()), x))
    assert found[0] == found[1]
    assert torch.equal(x, torch.ones(2, 8))


def test_amplification_of_one_matrix():
    """A single matrix moved by noise: E ‖δx‖² is its mean square times ‖x‖²."""
    model, x = nn.Linear(400, 400, bias=False), torch.ones(1, 400)
    expected = model.weight.square().mean().item() * 400
    assert amplification(model, x, noise=0.1) == pytest.approx(expected, rel=0.25)


def test_amplification_leaves_a_sublayer_that_stands_in_two_places_as_it_is():
    sublayer = nn.Linear(8, 8)
    model, weight = Stack([sublayer, sublayer], dim=8), sublayer.weight
    before = weight.clone()
    amplification(model, torch.randn(2, 8))
    assert sublayer.weight is weight
    assert torch.equal(weight, before)


# what is published, at a small size


def last_ffn_gradient(scheme, depth, seed):
    torch.manual_seed(seed)
    model = TransformerEncoder(32, depth, 2, scheme=scheme, activation="relu", init="xavier")
    head, ids = nn.Linear(32, 50), torch.randint(50, (8, 12))
    embedding = nn.Embedding(50, 32)
    report = inspect(model, embedding(ids), loss=lambda out: F.cross_entropy(head(out).flatten(0, 1), ids.flatten()))
    frame = report.frame
    rows = frame[(frame["statistic"] == "weight_gradient_norm") & frame["module"].str.endswith("sublayer.out.weight")]
    return list(rows[rows["depth"] % 2 == 1].sort_values("depth")["value"])  # of each layer's feed-forward net


def test_the_last_layers_gradient_at_the_start_is_flat_in_post_norm_and_falls_as_the_root_of_depth_in_pre_norm():
    """Xiong et al. 2020, theorem 1: slope of log ‖∂L/∂W‖ of the last feed-forward net on log L."""
    depths = (2, 4, 8, 16)
    for scheme, slope in (("post", 0.0), ("pre", -0.5)):
        norms = [sum(last_ffn_gradient(scheme, depth, seed)[-1] for seed in range(2)) for depth in depths]
        x, y = torch.tensor(depths).log(), torch.tensor(norms).log()
        measured = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
        assert measured == pytest.approx(slope, abs=0.15), (scheme, norms)


def relu_net(depth, width, residual):
    layers = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layer = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), linear)
        layers.append(Residual(layer, scale=0.1) if residual else layer)
    first = nn.Linear(1, width)
    nn.init.normal_(first.weight)
    nn.init.normal_(first.bias)
    return nn.Sequential(first, *layers, nn.ReLU(), nn.Linear(width, 1))


def correlation(depth, residual, lag=5):
    """Mean autocorrelation of the input gradient over [−2, 2], mean over starts."""
    total = 0.0
    for seed in range(6):
        torch.manual_seed(seed)
        net = relu_net(depth, 64, residual)
        gradients = gradients_between(net, torch.tensor([-2.0]), torch.tensor([2.0]), points=128)
        assert gradients.shape == (128, 1)
        total += autocorrelation(gradients)[1:lag].mean().item() / 6
    return total


def test_gradients_shatter_with_depth_in_plain_nets_and_hardly_in_residual_ones():
    """Balduzzi et al. 2017, figure 1 and theorems 1 to 3."""
    plain, residual = [correlation(depth, False) for depth in (2, 4, 24)], correlation(24, True)
    assert plain[0] > plain[1] + 0.1
    assert abs(plain[2]) < 0.15, "white noise"
    assert residual > 0.6


def test_autocorrelation_of_noise_and_of_a_random_walk():
    noise = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    assert autocorrelation(noise, 50)[0] == pytest.approx(1)
    assert autocorrelation(noise, 50)[1:].abs().max() < 0.05
    assert autocorrelation(noise.cumsum(0), 50)[20] > 0.8


# the report


def test_numbers_that_are_not_finite(tmp_path):
    """They are named, and nothing is said of them beside."""
    model = Stack([nn.Linear(4, 4) for _ in range(3)], dim=4, scheme="residual")
    report = inspect(model, torch.zeros(2, 4))
    assert report.series("branch_ratio")[0] == math.inf
    assert "branch / stream (first at depth 0)" in report.verdict[0]
    assert "inf" not in " ".join(report.verdict[1:])
    assert report.save(tmp_path).exists()
    spoilt = inspect(model, torch.full((2, 4), torch.nan))
    assert "stream rms (first at depth 0)" in spoilt.verdict[0]
    assert "nan" not in " ".join(spoilt.verdict)
    assert spoilt.save(tmp_path).exists()


def test_the_report_is_a_folder(tmp_path):
    model = text_transformer("pre")
    report = inspect(model, IDS, mask=MASK) + lesion_curve(model, lambda model: float(model(IDS).isfinite().all()))
    page = report.save(tmp_path / "out", "Mine <here>")
    assert page == tmp_path / "out" / "inspect.html"
    for name in ("signal", "gradients", "influence", "inside", "lesions"):
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (page.parent / f"{name}.svg").read_text()
        assert len((page.parent / f"{name}.csv").read_text().splitlines()) > (3 if name == "inside" else 6)
    text = page.read_text()
    assert text.count("<svg") == 5
    assert "Mine &lt;here&gt;" in text
    assert 'src="http' not in text, "the page stands by itself"
    assert len((page.parent / "inspect.csv").read_text().splitlines()) == len(report.frame) + 1
    assert report.verdict[-1] == "Lesions: deleting a single block costs at most 0.01 for 6 of 6 blocks."
    assert f"{report.series('gradient_norm')[0]:.3g} at depth 0" in report.verdict[0]
    assert len(report.text.splitlines()) == 8


@pytest.mark.filterwarnings("error")
def test_the_same_picture_is_the_same_file(tmp_path, monkeypatch):
    report = inspect(text_transformer("pre"), IDS, mask=MASK)
    kinds = {name: "注意力" if kind == "Attention" else kind for name, kind in report.kinds.items()}
    report = diagnostics.Report(report.rows, kinds)  # in a script that the font lacks
    for i, folder in enumerate((tmp_path / "a", tmp_path / "b")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(i))
        report.save(folder)
    for name in ("signal.svg", "signal.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_examples_header_is_what_was_measured():
    folder = Path(__file__).parent.parent / "examples" / "before_training"
    results = json.loads((folder / "results.json").read_text())
    header = " ".join((folder / "measure.py").read_text().split('"""')[1].split())
    slope, linear, logarithmic = (
        results[name] for name in ("gradient_slope", "change_r2_linear", "change_r2_logarithmic")
    )
    layers = results["gradient_by_layer"]
    near = {name: f"{values[1]:.2f}" for name, values in results["autocorrelation"].items()}
    for figure in (
        f"L^{slope['post, xavier']:.2f} in post-norm and L^{slope['pre, xavier']:.2f} in",
        f"L^{slope['post, normal']:.2f} and L^{slope['pre, normal']:.2f}",
        f"(R² {linear['post']:.3f}; {logarithmic['post']:.3f} for log L)",
        f"(R² {logarithmic['pre']:.3f}; {linear['pre']:.3f} for L)",
        f"in 4 layers (their spread is {results['spread']['plain'][4]:.0e} of the norm",
        f"with shortcuts {results['spread']['residual'][12]:.2f} is left after 12",
        f"by {near['plain, 2 layers']} in a plain net of 2 layers, by {near['plain, 24 layers']} in one of 24",
        f"by {near['residual, 50 layers']} in a residual one of 50",
        f"goes from {layers['post'][0]:.2f} to {layers['post'][-1]:.2f} in post-norm and from "
        f"{layers['pre'][0]:.2f} to {layers['pre'][-1]:.2f} in",
        f"ones with batch norm: {results['correlation_per_layer']:.2f}^L and L^{results['correlation_exponent']:.2f}",
        f"({near['highway -2, 50 layers']}) with a gate bias of -2, and does not ({near['highway -4, 50 layers']})",
    ):
        assert figure in header, figure


def test_stages_are_blocks_where_they_are_more_than_the_blocks_of_one():
    class Net(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.stem = nn.Linear(2, 2)
            for stage in range(4):
                setattr(self, f"layer{stage + 1}", nn.Sequential(*(nn.Tanh() for _ in range(depth))))

    assert list(find_blocks(Net(2))) == ["layer1", "layer2", "layer3", "layer4"]
    assert list(find_blocks(Net(5))) == [f"layer1.{i}" for i in range(5)]


def test_a_hundredth_costs_a_hundredth():
    report = Report([(0, "first", "lesion_drop", 0.85 - 0.84), (1, "second", "lesion_drop", 0.02)])
    report.kinds = {"first": "Linear", "second": "Linear"}
    assert "at most 0.01 for 1 of 2 blocks; the most costly is block 1" in report.verdict[-1]


def test_a_block_that_changes_the_shape_and_has_no_shortcut_is_passed_over():
    model = TextConvNet(20, 2, 5, dim=4, stages=2, scheme="plain").eval()
    ids = torch.randint(20, (2, 8))
    with pytest.raises(ValueError, match="a deleted block must keep the stream's shape"), lesion(model, delete=[1]):
        model(ids)
    report = lesion_curve(model, lambda model: model(ids).sum().item())
    assert report.frame.query("statistic == 'lesion_drop'").depth.tolist() == [0]
