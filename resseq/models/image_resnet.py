"""Residual networks for images, from CIFAR's 20 layers to ImageNet's 152, in any scheme; weights in and out."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from resseq.layers.convolution import PadShortcut
from resseq.layers.linear import Linear
from resseq.layers.stages import Step, plan_steps
from resseq.pretrained import find_weights, read_config, read_weights
from resseq.residual import reset_children
from resseq.schemes import Scheme, find_scheme
from resseq.stack import Stack

Stem = Literal["imagenet", "deep", "cifar"]
Shortcut = Literal["A", "B", "C", "D"]


class Conv2d(nn.Conv2d):
    """A convolution of images without bias that keeps height and width at stride 1; weights start ``N(0, 2/fan_out)``.

    Source: He et al. 2015, arXiv:1502.01852, section 2.2.
    Shapes: (B, C, H, W) -> (B, C', ⌈H/stride⌉, ⌈W/stride⌉).
    """

    def __init__(self, dim: int, dim_out: int, kernel_size: int, *, stride: int = 1):
        super().__init__(dim, dim_out, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class LastNorm(nn.BatchNorm2d):
    """The norm that ends a branch; with ``zero`` its weight starts at 0, and so the block as its shortcut.

    Source: Goyal et al. 2017, arXiv:1706.02677, section 5.1.
    """

    def __init__(self, dim: int, *, zero: bool = False):
        self.zero = zero  # before the constructor, which calls reset_parameters
        super().__init__(dim)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero:
            nn.init.zeros_(self.weight)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, the branch of the shallower ResNets.

    ``N(W₂ ∗ ReLU(N(W₁ ∗ x)))``; without the outer N where ``ends_in_norm`` is False, for schemes that bring their own.

    Source: He et al. 2015, arXiv:1512.03385, figure 5.
    Shapes: (B, C, H, W) -> (B, C', ⌈H/stride⌉, ⌈W/stride⌉).
    """

    expansion = 1

    def __init__(
        self, dim: int, dim_out: int, *, stride: int = 1, ends_in_norm: bool = True, zero_last_norm: bool = False
    ):
        super().__init__()
        self.conv1 = Conv2d(dim, dim_out, 3, stride=stride)
        self.bn1 = nn.BatchNorm2d(dim_out)
        self.conv2 = Conv2d(dim_out, dim_out, 3)
        self.bn2 = LastNorm(dim_out, zero=zero_last_norm) if ends_in_norm else nn.Identity()

    def weights(self) -> list[tuple[str, Tensor]]:
        """The filters by role, in order of application."""
        return [("in", self.conv1.weight), ("out", self.conv2.weight)]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions, the inner ones four times narrower: the branch of the deeper ResNets.

    ``N(W₃ ∗ ReLU(N(W₂ ∗ ReLU(N(W₁ ∗ x)))))``; the 3×3 convolution strides, as in everyone's published weights; in the
    paper the first one does.

    Source: He et al. 2015, arXiv:1512.03385, figure 5.
    Shapes: (B, C, H, W) -> (B, C', ⌈H/stride⌉, ⌈W/stride⌉).
    """

    expansion = 4

    def __init__(
        self, dim: int, dim_out: int, *, stride: int = 1, ends_in_norm: bool = True, zero_last_norm: bool = False
    ):
        super().__init__()
        inner = dim_out // self.expansion
        self.conv1 = Conv2d(dim, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = Conv2d(inner, inner, 3, stride=stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = Conv2d(inner, dim_out, 1)
        self.bn3 = LastNorm(dim_out, zero=zero_last_norm) if ends_in_norm else nn.Identity()

    def weights(self) -> list[tuple[str, Tensor]]:
        """The filters by role, in order of application."""
        return [("in", self.conv1.weight), ("in", self.conv2.weight), ("out", self.conv3.weight)]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


Block = type[BasicBlock] | type[Bottleneck]


def _norm_and_relu(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(dim), nn.ReLU())


def _stem(kind: Stem, dim: int, normed: bool) -> nn.Sequential:
    """From three colours to the first stage's width; it ends in a norm where the branches do."""
    pool, ends = nn.MaxPool2d(3, stride=2, padding=1), () if normed else _norm_and_relu(dim)
    if kind == "imagenet":
        return nn.Sequential(Conv2d(3, dim, 7, stride=2), *ends, pool)
    if kind == "cifar":
        return nn.Sequential(Conv2d(3, dim, 3), *ends)
    if kind == "deep":
        half = dim // 2
        first = nn.Sequential(
            Conv2d(3, half, 3, stride=2), *_norm_and_relu(half), Conv2d(half, half, 3), *_norm_and_relu(half)
        )
        return nn.Sequential(first.append(Conv2d(half, dim, 3)), *ends, pool)
    raise ValueError(f"ResNet: stem is 'imagenet', 'deep' or 'cifar'; got stem={kind!r}. Use stem='imagenet'.")


def _shortcut(kind: Shortcut, step: Step, normed: bool) -> nn.Module | None:
    """What stands on the shortcut beside a block; it ends in a norm where the branch does."""
    if kind not in ("A", "B", "C", "D"):
        raise ValueError(f"ResNet: shortcut is 'A', 'B', 'C' or 'D'; got shortcut={kind!r}. Use shortcut='B'.")
    if not step.reshapes and kind != "C":
        return None
    if kind == "A":
        return PadShortcut(step.dim, step.dim_out, step.stride)
    pools = kind == "D" and step.stride > 1
    norm = nn.Identity() if normed else nn.BatchNorm2d(step.dim_out)
    projection = nn.Sequential(Conv2d(step.dim, step.dim_out, 1, stride=1 if pools else step.stride), norm)
    if kind != "D":
        return projection
    pool = nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False) if pools else nn.Identity()
    return nn.Sequential(pool, *projection)


class ResNet(nn.Module):
    """An image classifier: a stem, stages of residual blocks, the mean over positions, one linear map.

    Each stage after the first starts with a block that halves height and width and doubles the channels.

    Source: He et al. 2015, arXiv:1512.03385; pre-activation: He et al. 2016, arXiv:1603.05027; stem "deep" and
    shortcut "D" together are ResNet-D: He et al. 2018, arXiv:1812.01187, section 4.
    Shapes: images (B, 3, H, W), in any memory format -> logits (B, C).
    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks in each stage.
        dim: channels that the stem gives, and those of the first stage before a bottleneck's fourfold expansion.
        stem: "imagenet", 7×7 with stride 2 and a maximum with stride 2; "deep", three 3×3 in the place of 7×7;
            "cifar", one 3×3 that keeps the size.
        shortcut: "A", where the shape changes every second position and new channels zero; "B", there a 1×1
            convolution; "C", a 1×1 convolution at every block; "D", as "B", with a mean of 2×2 in place of the stride.
        zero_init_residual: whether each block starts as its shortcut, its last norm's weight at 0.
        drop_path: stochastic depth: the last block's probability; it rises linearly from the first.
    Raises: ValueError for another stem or shortcut, and for zero_init_residual in a scheme whose branches end in no
        norm.

    >>> import torch
    >>> model = ResNet(BasicBlock, [1, 1], num_classes=10, dim=8)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        dim: int = 64,
        stem: Stem = "imagenet",
        scheme: str | Scheme = "residual",
        shortcut: Shortcut = "B",
        zero_init_residual: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        normed = find_scheme(scheme).normed
        if normed and zero_init_residual:
            raise ValueError(
                f"ResNet: zero_init_residual needs branches that end in a norm; got scheme={scheme!r}. "
                f"Use scheme='residual'."
            )
        self.layers, self.scheme = layers, scheme
        steps = plan_steps(dim, [dim * block.expansion * 2**stage for stage in range(len(layers))], layers)
        self.stem = _stem(stem, dim, normed)
        self.stack = Stack(
            [
                block(
                    step.dim,
                    step.dim_out,
                    stride=step.stride,
                    ends_in_norm=not normed,
                    zero_last_norm=zero_init_residual,
                )
                for step in steps
            ],
            dim=[dim, *(step.dim_out for step in steps)],
            scheme=scheme,
            norm=_norm_and_relu if normed else None,
            activation=nn.ReLU,
            drop_path=drop_path,
            shortcuts=[_shortcut(shortcut, step, normed) for step in steps],
            channel_dim=1,
        )
        self.head = Linear(steps[-1].dim_out, num_classes)

    reset_parameters = reset_children

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stack(self.stem(images)).mean((2, 3)))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "ResNet":
        """The net of a weights file, of a folder that holds one, or of a repository on the Hugging Face hub.

        Reads the names of torchvision, timm (ResNet-D's too) and Hugging Face's ResNetForImageClassification, from
        safetensors or a torch file of tensors alone. The shape of the net is read off the weights.

        Raises: ValueError where there is no such file, or where it holds another kind of net.
        """
        found = read_weights(find_weights(source))
        _check_config(read_config(source), source)
        weights = {_from_hugging_face(name): tensor for name, tensor in found.items()}
        if not {"bn1.weight", "layer1.0.conv1.weight", "fc.weight"} <= weights.keys():
            raise ValueError(
                f"ResNet.from_pretrained: needs a ResNet's stem, blocks and head; got {source}, which lacks one. "
                f"Use a ResNet for classification."
            )
        model = cls(**_options_of(weights))
        own = model.state_dict()
        ours = {model._torchvision_name(name): name for name in own}
        shapes = {name: own[ours[name]].shape for name in ours if name in weights or "num_batches" not in name}
        if wrong := sorted(shapes.items() ^ {(name, tensor.shape) for name, tensor in weights.items()}):
            raise ValueError(
                f"ResNet.from_pretrained: every weight must have its place in a ResNet; got {source}, where "
                f"{wrong[0][0]} is missing, unknown or of another shape. Use an unmodified ResNet's weights."
            )
        model.load_state_dict({ours[name]: tensor for name, tensor in weights.items()}, strict=False)
        return model.eval()

    def to_torchvision_state_dict(self) -> dict[str, Tensor]:
        """The weights and running statistics under torchvision's names, which timm reads too.

        Raises: ValueError for another scheme than "residual": torchvision has no names for its parts.
        """
        if self.scheme != "residual":
            raise ValueError(
                f"ResNet.to_torchvision_state_dict: torchvision knows scheme 'residual' alone; got "
                f"scheme={self.scheme!r}. Use state_dict()."
            )
        return {self._torchvision_name(name): tensor for name, tensor in self.state_dict().items()}

    def _torchvision_name(self, name: str) -> str:
        """``stack.residuals.3.sublayer.conv1.weight`` is ``layer2.0.conv1.weight`` after a stage of 3 blocks."""
        if found := re.match(r"stack\.residuals\.(\d+)\.(sublayer|connection\.shortcut)\.(.*)", name):
            block, stage = int(found[1]), 0
            while block >= self.layers[stage]:
                block, stage = block - self.layers[stage], stage + 1
            place = "" if found[2] == "sublayer" else "downsample."
            return f"layer{stage + 1}.{block}.{place}{found[3]}"
        for ours, theirs in (("stem.0.", "conv1."), ("stem.1.", "bn1."), ("head.", "fc.")):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


def _from_hugging_face(name: str) -> str:
    """Torchvision's name for one of Hugging Face's; any other stays."""
    block = (
        r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\.(convolution|normalization)"
    )
    if found := re.match(block, name):
        stage, index, layer, part = found.groups()
        kind = {"convolution": ("conv", 0), "normalization": ("bn", 1)}[part]
        place = f"downsample.{kind[1]}" if layer is None else f"{kind[0]}{int(layer) + 1}"
        return f"layer{int(stage) + 1}.{index}.{place}{name[found.end() :]}"
    name = re.sub(r"^(resnet\.)?embedder\.embedder\.convolution\.", "conv1.", name)
    name = re.sub(r"^(resnet\.)?embedder\.embedder\.normalization\.", "bn1.", name)
    return re.sub(r"^classifier\.1\.", "fc.", name)


def _check_config(config: dict[str, Any], source: str | Path) -> None:
    """Raise for what the weights' shapes do not show."""
    ours = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    for name, value in ours.items():
        if config.get("model_type") == "resnet" and config.get(name, value) != value:
            raise ValueError(
                f"ResNet.from_pretrained: needs {name}={value}; got {name}={config[name]} in {source}. "
                f"Use such as microsoft/resnet-50."
            )
    architecture = config.get("architecture", "resnet50")  # timm's; some pool elsewhere, which leaves no weights
    if not re.fullmatch(r"resnet\d+[bcd]?(\..*)?", architecture):
        raise ValueError(
            f"ResNet.from_pretrained: needs a plain ResNet or ResNet-D; got architecture={architecture!r} in {source}. "
            f"Use weights such as those of resnet50 or resnet50d."
        )


def _options_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The ResNet that weights under torchvision's names belong to."""
    blocks = {found.groups() for name in weights if (found := re.match(r"layer(\d+)\.(\d+)\.", name))}
    stages = sorted(int(stage) for stage, _ in blocks)
    reduced = [name for name in weights if re.fullmatch(r"layer\d+\.0\.downsample\.\d\.weight", name)]
    kernel = "deep" if "conv1.0.weight" in weights else weights["conv1.weight"].shape[-1]
    block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
    same = r"layer\d+\.[1-9]\d*" if block is Bottleneck else r"layer(1\.0|\d+\.[1-9]\d*)"  # blocks that keep the shape
    if any(re.match(rf"{same}\.downsample\.", name) for name in weights):
        shortcut = "C"
    else:
        shortcut = "A" if not reduced else "D" if any(name.endswith(".2.weight") for name in reduced) else "B"
    return {
        "block": block,
        "layers": [stages.count(stage) for stage in dict.fromkeys(stages)],
        "num_classes": len(weights["fc.weight"]),
        "dim": len(weights["bn1.weight"]),
        "stem": {"deep": "deep", 3: "cifar"}.get(kernel, "imagenet"),
        "shortcut": shortcut,
    }


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-18, 11.7 million weights at 1000 classes. Options are ResNet's."""
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-34, 21.8 million weights at 1000 classes. Options are ResNet's."""
    return ResNet(BasicBlock, [3, 4, 6, 3], num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-50, 25.6 million weights at 1000 classes. Options are ResNet's."""
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes, **options)


def resnet101(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-101, 44.5 million weights at 1000 classes. Options are ResNet's."""
    return ResNet(Bottleneck, [3, 4, 23, 3], num_classes, **options)


def resnet152(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-152, 60.2 million weights at 1000 classes. Options are ResNet's."""
    return ResNet(Bottleneck, [3, 8, 36, 3], num_classes, **options)


def cifar_resnet(
    depth: int = 20,
    num_classes: int = 10,
    *,
    shortcut: Shortcut = "A",
    scheme: str | Scheme = "residual",
    dim: int = 16,
    block: Block | None = None,
    **options: Any,
) -> ResNet:
    """A ResNet for images of 32×32: a 3×3 stem and three stages from 16 channels; plain, with scheme="plain".

    The paper's depths are 20, 32, 44, 56, 110 and 1202, those of pre-activation 110, 164 and 1001. The table of
    shortcuts in He et al. 2016 is, row by row: ``scheme=SumOnly(skip_scale=0.5)`` and ``SumOnly(0.5, 0.5)``;
    ``HighwayGates(bias=-6.0)``, the exclusive gate; ``HighwayGates(bias=0.0, gate="shortcut")``; ``shortcut="C"``;
    ``SumOnly(skip_dropout=0.5)``.

    Source: He et al. 2015, arXiv:1512.03385, section 4.2; He et al. 2016, arXiv:1603.05027, tables 1 and 4.
    Args:
        depth: layers with weights: 6n + 2 of BasicBlock, 9n + 2 of Bottleneck.
        block: unless given, Bottleneck for 164 and 1001, as in the source, and BasicBlock for the others.
        options: ResNet's.
    Raises: ValueError for a depth that leaves a remainder.
    """
    if block is None:
        block = Bottleneck if depth in (164, 1001) else BasicBlock
    convolutions = 9 if block is Bottleneck else 6  # of one block in each of three stages
    count, rest = divmod(depth - 2, convolutions)
    if rest or count < 1:
        raise ValueError(
            f"cifar_resnet: depth must be {convolutions}n + 2 for {block.__name__}; got depth={depth}. "
            f"Use depth={convolutions * max(1, round((depth - 2) / convolutions)) + 2}."
        )
    options = {"stem": "cifar"} | options
    return ResNet(block, [count] * 3, num_classes, shortcut=shortcut, scheme=scheme, dim=dim, **options)
