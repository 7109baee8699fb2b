import pytest
import torch
from torch import nn

from resseq import SCHEMES, BasicConvResBlock, TextConvNet
from resseq.layers.convolution import PadShortcut
from resseq.layers.pooling import halve_by_kmax, halve_by_max, pool_kmax
from resseq.schemes.norms import Plain


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("pooling", ["max", "mean", "kmax", "conv"])
def test_padding_changes_no_logit_in_evaluation(scheme, shortcut, pooling):
    torch.manual_seed(0)
    stages = 1 if SCHEMES[scheme].one_width else 3
    model = TextConvNet(50, 3, depth=13, dim=8, stages=stages, scheme=scheme, shortcut=shortcut, pooling=pooling)
    model(torch.randint(50, (64, 20)))  # running statistics away from their start
    model.eval()
    for length in (1, 2, 5, 8):
        ids = torch.randint(50, (1, length))
        padded = torch.cat([ids, torch.randint(50, (1, 7))], 1)
        mask = torch.arange(length + 7)[None] < length
        torch.testing.assert_close(model(padded, mask), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "blocks"), [(2, 1), (3, 1), (9, 4), (12, 6), (17, 8), (29, 14)])
def test_depth_counts_convolutions(depth, blocks):
    model = TextConvNet(50, 3, depth=depth, dim=4)
    assert len(model.stack.residuals) == blocks
    branches = [m for r in model.stack.residuals for m in r.sublayer.modules() if isinstance(m, nn.Conv1d)]
    assert len(branches) == 2 * blocks


def test_stages_double_the_width_and_halve_the_length():
    model = TextConvNet(50, 3, depth=17, dim=4, stages=4)
    widths = [residual.sublayer.out.out_channels for residual in model.stack.residuals]
    strides = [residual.sublayer.stride for residual in model.stack.residuals]
    assert widths == [4, 4, 8, 8, 16, 16, 32, 32]
    assert strides == [1, 1, 2, 1, 2, 1, 2, 1]
    assert model.mask_stride == 8


@pytest.mark.parametrize(("shortcut", "kind"), [("pad", PadShortcut), ("projection", nn.Conv1d)])
def test_shortcuts_stand_where_the_shape_changes(shortcut, kind):
    model = TextConvNet(50, 3, depth=9, dim=4, stages=2, shortcut=shortcut, pooling="conv")
    shortcuts = [residual.connection.shortcut for residual in model.stack.residuals]
    assert [type(s) if s is None else isinstance(s, kind) for s in shortcuts] == [
        type(None),
        type(None),
        True,
        type(None),
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_reaches_the_embeddings(scheme):
    stages = 1 if SCHEMES[scheme].one_width else 2
    model = TextConvNet(50, 3, depth=9, dim=8, stages=stages, scheme=scheme, dropout=0.0)
    ids, mask = torch.randint(50, (4, 9)), torch.arange(9) < torch.tensor([9, 7, 4, 2])[:, None]
    nn.functional.cross_entropy(model(ids, mask), torch.tensor([0, 1, 2, 0])).backward()
    assert model.embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize(  # test_schemes compiles all
    ("scheme", "pooling"), [("residual", "max"), ("highway", "max"), ("reversible", "max"), ("preact", "kmax")]
)
def test_compiles_whole(scheme, pooling):
    torch._dynamo.reset()
    stages = 1 if SCHEMES[scheme].one_width else 2
    model = TextConvNet(50, 3, depth=9, dim=8, stages=stages, scheme=scheme, pooling=pooling).eval()
    ids, mask = torch.randint(50, (4, 9)), torch.arange(9) < torch.tensor([9, 7, 4, 2])[:, None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, mask), model(ids, mask))


def test_the_block_is_the_paper_s():
    """ReLU(x + BN(conv(ReLU(BN(conv(x)))))), written by hand."""
    model = TextConvNet(50, 3, depth=3, dim=4).eval()
    residual = model.stack.residuals[0]
    x = torch.randn(2, 4, 7)
    expected = torch.relu(x + residual.sublayer(x))
    torch.testing.assert_close(residual(x), expected)
    assert isinstance(residual.sublayer.last_norm, nn.BatchNorm1d)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1}, "got depth=1. Use depth=3 or more."),
        ({"shortcut": "conv"}, "shortcut is 'none', 'pad' or 'projection'; got shortcut='conv'. Use 'projection'."),
        ({"shortcut": "none"}, "every scheme but 'plain' needs a shortcut; got scheme='residual' and shortcut='none'"),
        ({"final_pooling": "median"}, "is one of max, kmax, conv, mean; got final_pooling='median'"),
        ({"pooling": "median"}, "is one of max, kmax, conv, mean; got pooling='median'"),
        ({"pooling": "cls"}, "is one of max, kmax, conv, mean; got pooling='cls'"),
        ({"depth": 9, "stages": (2, 3)}, r"sum to depth // 2 = 4; got stages=\(2, 3\). Use depth=11."),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        TextConvNet(50, 3, **options)


@pytest.mark.parametrize(
    ("depth", "shortcut", "count"),
    [
        (9, "none", 14_176_084),
        (17, "none", 16_268_884),
        (29, "none", 16_639_828),
        (49, "none", 19_768_404),
        (9, "projection", 14_348_116),
        (17, "projection", 16_440_916),
        (29, "projection", 16_811_860),
        (49, "projection", 19_940_436),
    ],
)
def test_vdcnn_has_the_paper_s_parameters(depth, shortcut, count):
    with torch.device("meta"):
        model = TextConvNet.vdcnn(num_classes=4, depth=depth, shortcut=shortcut)
    assert sum(p.numel() for p in model.parameters()) == count
    with torch.device("meta"):  # nor has the shortcut that pads any of its own
        padded = TextConvNet.vdcnn(num_classes=4, depth=depth, shortcut="pad")
    assert sum(p.numel() for p in padded.parameters()) == count - 172_032 * (shortcut == "projection")


@pytest.mark.parametrize("shortcut", ["none", "pad", "projection"])
@pytest.mark.parametrize("pooling", ["max", "kmax", "conv"])
def test_vdcnn_does_not_see_padding_and_takes_one_character(shortcut, pooling):
    model = TextConvNet.vdcnn(3, shortcut=shortcut, pooling=pooling).eval()
    ids = torch.randint(69, (2, 40))
    mask = torch.arange(40) < torch.tensor([[1], [21]])
    logits = model(ids, mask)
    torch.testing.assert_close(logits[:1], model(ids[:1, :1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1:], model(ids[1:, :21]), rtol=1e-4, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-5


def test_vdcnn_takes_any_scheme_where_there_is_a_shortcut():
    with torch.device("meta"):
        plain = TextConvNet.vdcnn(4, shortcut="projection", scheme="plain")
        gated = TextConvNet.vdcnn(4, shortcut="projection", scheme="highway")
    assert sum(p.numel() for p in plain.parameters()) == 14_176_084  # no shortcut stands beside a plain block
    assert sum(p.numel() for p in gated.parameters()) > 14_348_116
    with pytest.raises(ValueError, match=r"got scheme='pre' and shortcut='none'. Use shortcut='projection'."):
        TextConvNet.vdcnn(4, scheme="pre")
    with torch.device("meta"):
        by_object = TextConvNet.vdcnn(4, scheme=Plain())
    assert sum(p.numel() for p in by_object.parameters()) == 14_176_084
    with pytest.raises(ValueError, match="scheme is a name or an instance of a Scheme; got scheme='foo'"):
        TextConvNet.vdcnn(4, scheme="foo")


def test_vdcnn_refuses_what_the_paper_has_not():
    with pytest.raises(ValueError, match=r"depth is one of 9, 17, 29, 49; got depth=10. Use depth=9."):
        TextConvNet.vdcnn(4, depth=10)
    with pytest.raises(
        ValueError, match=r"shortcut is one of none, pad, projection; got shortcut=A. Use shortcut=none."
    ):
        TextConvNet.vdcnn(4, shortcut="A")
    with pytest.raises(ValueError, match=r"pooling is one of kmax, max, conv; got pooling=mean. Use pooling=kmax."):
        TextConvNet.vdcnn(4, pooling="mean")


def test_k_max_keeps_the_order_and_is_defined_for_few_positions():
    x = torch.tensor([[3.0, 9.0, -1.0, 5.0, 7.0], [3.0, 9.0, -1.0, 5.0, 7.0]])[..., None]
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    assert pool_kmax(x, mask).tolist() == [[3, 9, -1, 5, 7, 0, 0, 0], [3, 9, -1, 0, 0, 0, 0, 0]]
    halved = halve_by_kmax(x.transpose(1, 2), mask)
    assert halved[:, 0].tolist() == [[9, 5, 7], [3, 9, 0]]
    assert halve_by_max(x.transpose(1, 2), mask)[:, 0].tolist() == [[9, 9, 7], [9, 9, 0]]
    long = torch.arange(20.0).flip(0)[None, :, None]
    assert pool_kmax(long, torch.ones(1, 20, dtype=torch.bool))[0].tolist() == [19, 18, 17, 16, 15, 14, 13, 12]


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize(("dim", "dim_out", "stride"), [(4, 4, 1), (4, 8, 1), (4, 4, 2), (4, 8, 2)])
def test_a_single_block_fits_every_change_of_shape(shortcut, dim, dim_out, stride):
    block = BasicConvResBlock(dim, dim_out, stride=stride, shortcut=shortcut).eval()
    x = torch.randn(2, dim, 9)
    skip = block.block.connection.shortcut or (lambda x: x)
    expected = block.block.sublayer(x) + (skip(x) if shortcut else 0)
    torch.testing.assert_close(block(x), expected.relu())
    assert block(x).shape == (2, dim_out, (9 + stride - 1) // stride)


def test_a_single_block_takes_its_caller_s_downsampling():
    downsample = nn.Sequential(nn.Conv1d(4, 8, 1, stride=2), nn.BatchNorm1d(8))
    block = BasicConvResBlock(4, 8, stride=2, shortcut=True, downsample=downsample)
    assert block(torch.randn(2, 4, 9)).shape == (2, 8, 5)
    assert block.block.connection.shortcut is downsample
