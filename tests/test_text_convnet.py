import pytest
import torch
from torch import nn

from resseq import SCHEMES, TextConvNet
from resseq.layers.convolution import PadShortcut


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_padding_changes_no_logit_in_evaluation(scheme, shortcut, pooling):
    torch.manual_seed(0)
    model = TextConvNet(50, 3, depth=13, dim=8, stages=3, scheme=scheme, shortcut=shortcut, pooling=pooling)
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
    model = TextConvNet(50, 3, depth=9, dim=4, stages=2, shortcut=shortcut)
    shortcuts = [residual.connection.shortcut for residual in model.stack.residuals]
    assert [type(s) if s is None else isinstance(s, kind) for s in shortcuts] == [
        type(None),
        type(None),
        True,
        type(None),
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_reaches_the_embeddings_and_it_compiles_whole(scheme):
    torch._dynamo.reset()
    model = TextConvNet(50, 3, depth=9, dim=8, stages=2, scheme=scheme, dropout=0.0)
    ids, mask = torch.randint(50, (4, 9)), torch.arange(9) < torch.tensor([9, 7, 4, 2])[:, None]
    nn.functional.cross_entropy(model(ids, mask), torch.tensor([0, 1, 2, 0])).backward()
    assert model.embedding.weight.grad.abs().max() > 0
    model.eval()
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
    [({"depth": 1}, "got depth=1. Use depth=3 or more."), ({"shortcut": "conv"}, "got shortcut='conv'")],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        TextConvNet(50, 3, **options)
