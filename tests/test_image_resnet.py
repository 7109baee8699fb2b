import itertools
import json
import re

import pytest
import torch
from torch import nn

from resseq import SCHEMES, ResNet, Stack, cifar_resnet, resnet18, resnet34, resnet50, resnet101, resnet152
from resseq.models.image_resnet import BasicBlock, Bottleneck, LastNorm
from resseq.schemes.gates import HighwayGates
from resseq.schemes.norms import SumOnly

SMALL = {"num_classes": 5, "dim": 8}


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomise(model):
    """Every weight, bias and running statistic away from its start."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator)
            matrix = tensor.ndim > 1
            tensor.copy_(((values - 0.5) * 4 / tensor[0].numel() ** 0.5) if matrix else values + 0.5)
        if name.endswith(("bias", "running_mean")):
            tensor.sub_(1.0)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (resnet18, 11_689_512),
        (resnet34, 21_797_672),
        (resnet50, 25_557_032),
        (resnet101, 44_549_160),
        (resnet152, 60_192_808),
    ],
)
def test_imagenet_models_have_the_published_parameters(build, parameters):
    with torch.device("meta"):
        assert count(build()) == parameters


@pytest.mark.parametrize(
    ("depth", "scheme", "millions"),
    [
        (20, "residual", 0.27),
        (20, "plain", 0.27),
        (32, "residual", 0.46),
        (44, "residual", 0.66),
        (56, "residual", 0.85),
        (56, "plain", 0.85),
        (110, "residual", 1.7),
        (110, "preact", 1.7),
        (164, "preact", 1.7),
        (1001, "preact", 10.2),
        (1202, "residual", 19.4),
    ],
)
def test_cifar_models_have_the_papers_parameters_and_layers(depth, scheme, millions):
    with torch.device("meta"):
        model = cifar_resnet(depth, scheme=scheme)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.005 if millions < 1 else 0.1)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) + 1 == depth  # and one linear map


def test_a_bottleneck_has_seventeen_times_fewer_weights():
    basic, bottleneck = (sum(w.numel() for _, w in block(256, 256).weights()) for block in (BasicBlock, Bottleneck))
    assert (basic, bottleneck) == (1_179_648, 69_632)
    assert round(basic / bottleneck, 2) == 16.94


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("shortcut", "stem"), [("A", "cifar"), ("B", "imagenet"), ("C", "cifar"), ("D", "deep")])
@pytest.mark.parametrize("scheme", ["residual", "plain", "preact", "highway", "sandwich"])
def test_channels_last_survives_and_gradients_reach_the_stem(block, shortcut, stem, scheme):
    model = ResNet(block, [2, 1], stem=stem, shortcut=shortcut, scheme=scheme, **SMALL)
    images = torch.randn(2, 3, 33, 31)
    model.eval()
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    assert model.stack(model.stem(images)).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    model.train()(images).square().sum().backward()
    assert model.stem.state_dict(keep_vars=True)["0.0.weight" if stem == "deep" else "0.weight"].grad.abs().max() > 0


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if not scheme.one_width])
def test_takes_every_scheme_that_may_change_its_width(scheme):
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    cifar_resnet(8, scheme=scheme, dim=4)(images).square().sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("scheme", ["plain", "residual", "preact", "highway"])  # test_schemes compiles all
def test_compiles_whole(scheme):
    torch._dynamo.reset()
    model = cifar_resnet(8, scheme=scheme, dim=4).eval()
    images = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_shortcuts_by_letter():
    def kinds(letter):
        residuals = ResNet(BasicBlock, [2, 2], shortcut=letter, **SMALL).stack.residuals
        return [count(s) if (s := r.connection.shortcut) else None for r in residuals]

    widening = 8 * 16 + 2 * 16
    assert kinds("A") == [None, None, 0, None]
    assert kinds("B") == kinds("D") == [None, None, widening, None]
    assert kinds("C") == [8 * 8 + 16, 8 * 8 + 16, widening, 16 * 16 + 32]
    pad = ResNet(BasicBlock, [1, 1], shortcut="A", **SMALL).stack.residuals[1].connection.shortcut
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(pad(x), torch.cat([x[..., ::2, ::2], torch.zeros(1, 8, 3, 3)], 1))
    mean = ResNet(BasicBlock, [1, 1], shortcut="D", **SMALL).stack.residuals[1].connection.shortcut[0]
    torch.testing.assert_close(mean(x)[..., :2, :2], nn.functional.avg_pool2d(x, 2))


def test_the_block_is_the_paper_s():
    model = randomise(ResNet(BasicBlock, [1, 1], **SMALL))
    residual = model.stack.residuals[1]
    x = torch.randn(2, 8, 7, 7)
    expected = torch.relu(residual.connection.shortcut(x) + residual.sublayer(x))
    torch.testing.assert_close(residual(x), expected)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (SumOnly(skip_scale=0.5), lambda x, y, r: 0.5 * x + y),
        (SumOnly(0.5, 0.5), lambda x, y, r: 0.5 * x + 0.5 * y),
        (HighwayGates(bias=-6.0), lambda x, y, r: (1 - gate(r, x)) * x + gate(r, x) * y),
        (HighwayGates(bias=0.0, gate="shortcut"), lambda x, y, r: (1 - gate(r, x)) * x + y),
    ],
)
def test_the_table_of_shortcuts(scheme, expected):
    residual = cifar_resnet(8, dim=4, scheme=scheme).eval().stack.residuals[0]
    x = torch.randn(2, 4, 6, 6)
    y = residual.sublayer(x)
    torch.testing.assert_close(residual(x), expected(x, y, residual).relu())


def gate(residual, x):
    weight, bias = residual.connection.merge.weight, residual.connection.merge.bias
    return torch.sigmoid(nn.functional.conv2d(x, weight[..., None, None], bias))


def test_dropout_on_the_shortcut():
    residual = cifar_resnet(8, dim=4, scheme=SumOnly(skip_dropout=0.5)).stack.residuals[0]
    nn.init.zeros_(residual.sublayer.bn2.weight)
    x = torch.ones(4, 4, 16, 16)
    assert set(residual(x).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(residual.eval()(x), x)
    with pytest.raises(ValueError, match=r"exclude each other; got skip_scale=0.5, skip_dropout=0.5. Leave out one"):
        SumOnly(skip_scale=0.5, skip_dropout=0.5)


def test_stochastic_depth_drops_whole_branches():
    model = cifar_resnet(8, dim=4, drop_path=1.0)
    assert [r.connection.drop_path for r in model.stack.residuals] == pytest.approx([1 / 3, 2 / 3, 1.0])
    last = model.stack.residuals[2]
    x = torch.rand(2, 8, 4, 4)
    assert torch.equal(last(x), last.connection.shortcut(x))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_zero_start_makes_each_block_its_shortcut(block):
    model = ResNet(block, [2, 2], zero_init_residual=True, **SMALL)
    for _ in range(2):
        for residual in model.stack.residuals:
            x = torch.rand(2, residual.sublayer.conv1.in_channels, 4, 4)
            shortcut = residual.connection.shortcut or nn.Identity()
            assert torch.equal(residual(x), shortcut(x).relu())
        for norm in (m for m in model.modules() if isinstance(m, LastNorm)):
            nn.init.ones_(norm.weight)
        for module in model.modules():  # as after to_empty
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    other = ResNet(block, [2, 2], **SMALL).stack.residuals[0]
    assert not torch.equal(other(x := torch.rand(2, 8, 4, 4)), (other.connection.shortcut or nn.Identity())(x).relu())


def test_in_a_preact_stage_of_zero_branches_the_gradient_passes_unchanged():
    stack = cifar_resnet(20, scheme="preact").stack
    for residual in stack.residuals[:3]:
        nn.init.zeros_(residual.sublayer.conv2.weight)
    entrance = torch.randn(2, 16, 8, 8, requires_grad=True)
    x = entrance
    for residual in stack.residuals[:3]:
        x = residual(x)
    x.retain_grad()
    stack.close(nn.Sequential(*stack.residuals[3:])(x)).square().sum().backward()
    assert x.grad.abs().max() > 0
    assert torch.equal(entrance.grad, x.grad)


def test_preact_projects_what_the_norm_gives():
    residual = cifar_resnet(11, scheme="preact", shortcut="B", block=Bottleneck, dim=4).eval().stack.residuals[1]
    x = torch.randn(2, 16, 6, 6)
    read = residual.connection.pre(x)
    torch.testing.assert_close(residual(x), residual.connection.shortcut(read) + residual.sublayer(read))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cifar_resnet(21), r"depth must be 6n \+ 2 for BasicBlock; got depth=21. Use depth=20."),
        (lambda: cifar_resnet(1000, block=Bottleneck), r"9n \+ 2 for Bottleneck; got depth=1000. Use depth=1001."),
        (lambda: cifar_resnet(2), r"got depth=2. Use depth=8."),
        (lambda: cifar_resnet(8, shortcut="E"), r"shortcut is 'A', 'B', 'C' or 'D'; got shortcut='E'. Use"),
        (lambda: resnet18(stem="wide"), r"stem is 'imagenet', 'deep' or 'cifar'; got stem='wide'. Use"),
        (lambda: cifar_resnet(8, scheme="preact", zero_init_residual=True), r"end in a norm; got scheme='preact'. Use"),
        (lambda: cifar_resnet(8, scheme="preact").to_torchvision_state_dict(), r"got scheme='preact'. Use state_dict"),
    ],
)
def test_what_it_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def torchvision_keys(layers, convolutions, projects_first):
    """Torchvision's naming rule: a stem, stages from layer1, blocks from 0, conv and bn numbered from 1, fc."""

    def norm(name):
        return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    keys = ["conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"]
    for stage, blocks in enumerate(layers, 1):
        for block, number in itertools.product(range(blocks), range(1, convolutions + 1)):
            keys += [f"layer{stage}.{block}.conv{number}.weight", *norm(f"layer{stage}.{block}.bn{number}")]
        if stage > 1 or projects_first:
            keys += [f"layer{stage}.0.downsample.0.weight", *norm(f"layer{stage}.0.downsample.1")]
    return keys


@pytest.mark.parametrize(
    ("build", "layers", "convolutions", "number"),
    [(resnet50, [3, 4, 6, 3], 3, 320), (resnet18, [2, 2, 2, 2], 2, 122)],
)
def test_the_state_dict_has_torchvision_s_keys(build, layers, convolutions, number):
    with torch.device("meta"):
        found = build().to_torchvision_state_dict()
    keys = torchvision_keys(layers, convolutions, projects_first=convolutions == 3)
    assert len(keys) == len(found) == number
    assert set(found) == set(keys)
    wide = 4 if convolutions == 3 else 1
    assert found["layer4.0.downsample.0.weight"].shape == (512 * wide, 256 * wide, 1, 1)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "checkpoint.pth"])
@pytest.mark.parametrize(
    ("block", "options"),
    [
        (BasicBlock, {}),
        (Bottleneck, {}),
        (Bottleneck, {"stem": "deep", "shortcut": "D"}),
        (BasicBlock, {"stem": "cifar", "shortcut": "A"}),
        (BasicBlock, {"stem": "cifar", "shortcut": "C"}),
        (Bottleneck, {"shortcut": "C"}),
    ],
)
def test_weights_go_out_and_come_back(tmp_path, suffix, block, options):
    from safetensors.torch import save_file

    model = randomise(ResNet(block, [2, 1, 2], **SMALL, **options))
    weights = model.to_torchvision_state_dict()
    if options.get("stem") == "deep":  # timm's names: the stem's and the projection's places in a sequence
        assert {"conv1.0.weight", "conv1.1.weight", "conv1.3.weight", "conv1.4.weight", "conv1.6.weight"} <= set(
            weights
        )
        assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.2.bias"} <= set(weights)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if suffix == "checkpoint.pth" else weights, file)
    again = ResNet.from_pretrained(file)
    images = torch.randn(2, 3, 40, 40)
    assert torch.equal(again(images), model(images))
    assert not again.training


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("prefix", [True, False])
def test_parity_with_hugging_face(tmp_path, kind, prefix):
    transformers = pytest.importorskip("transformers")
    expansion = {"basic": 1, "bottleneck": 4}[kind]
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8 * expansion, 16 * expansion, 32 * expansion],
        depths=[2, 1, 2],
        layer_type=kind,
        num_labels=5,
    )
    theirs = randomise(transformers.ResNetForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    if not prefix:  # a file of the weights alone, in torch's format
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ours = ResNet.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 50, 50)
    with torch.no_grad():
        expected = theirs(images).logits
        assert expected.std(0).max() > 1e-2  # the images differ
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)
        for name, tensor in ours.state_dict().items():
            if tensor.is_floating_point():
                kept = tensor.clone()
                tensor += torch.rand_like(tensor)
                assert not torch.allclose(ours(images), expected, rtol=1e-4, atol=1e-4), name
                tensor.copy_(kept)


def test_what_from_pretrained_refuses(tmp_path, monkeypatch):
    model = ResNet(BasicBlock, [1, 1], **SMALL)
    weights = model.to_torchvision_state_dict()
    file = tmp_path / "weights.pth"

    def refuses(found, message):
        torch.save(found, file)
        with pytest.raises(ValueError, match=message):
            ResNet.from_pretrained(file)

    refuses(
        {k: v for k, v in weights.items() if "fc" not in k}, "needs a ResNet's stem, blocks and head; got .*weights"
    )
    refuses(weights | {"layer1.0.se.weight": torch.ones(3)}, "where layer1.0.se.weight is missing, unknown or of")
    refuses({k: v for k, v in weights.items() if k != "layer1.0.bn1.bias"}, "where layer1.0.bn1.bias is missing")
    refuses(weights | {"layer1.0.bn1.bias": torch.ones(3)}, "where layer1.0.bn1.bias is missing, unknown or of another")
    refuses({"a": re.compile("x")}, r"must hold tensors alone, .*; got .*weights.pth \(UnpicklingError\)")
    refuses([torch.ones(1)], r"must hold tensors alone, .*; got .*weights.pth \(AttributeError\)")
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="must hold tensors alone"):
        ResNet.from_pretrained(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match="with model.safetensors or pytorch_model.bin; got .*empty, where there is none"
    ):
        ResNet.from_pretrained(tmp_path / "empty")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match="a folder or an id on the hub with .*; got no/such/folder, where there is none"
    ):
        ResNet.from_pretrained("no/such/folder")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for config, message in (
        ({"model_type": "resnet", "downsample_in_bottleneck": True}, "=False; got downsample_in_bottleneck=True"),
        ({"architecture": "resnetaa50"}, "needs a plain ResNet or ResNet-D; got architecture='resnetaa50'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            ResNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18d.ra2_in1k"}))
    ResNet.from_pretrained(tmp_path)


def test_batches_tracked_may_be_missing(tmp_path):
    model = randomise(ResNet(BasicBlock, [1, 1], **SMALL))
    weights = {k: v for k, v in model.to_torchvision_state_dict().items() if "num_batches" not in k}
    torch.save(weights, tmp_path / "weights.pth")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(ResNet.from_pretrained(tmp_path / "weights.pth")(images), model(images))


def test_the_whole_net_is_one_stack():
    model = cifar_resnet(20)
    assert sum(isinstance(m, Stack) for m in model.modules()) == 1
    assert len(model.stack.residuals) == 9
