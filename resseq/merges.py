"""How two tensors become one: x, what came along the shortcut, and y, the branch's output."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resseq.products import linear


def require_one_shape(x: Tensor, y: Tensor) -> None:
    """Raise a ValueError where the shapes differ; nothing is ever broadcast."""
    if x.shape != y.shape:
        raise ValueError(
            f"Residual: the branch must give the shape of the shortcut; got branch={tuple(y.shape)}, "
            f"shortcut={tuple(x.shape)}. Give shortcut=, a module that maps the stream to the branch's shape, "
            f"e.g. shortcut=nn.Linear(dim_in, dim_out) or nn.Conv2d(channels_in, channels_out, 1, stride)."
        )


def add(x: Tensor, y: Tensor) -> Tensor:
    """The residual connection.

    ``x + y``

    Source: He et al. 2015, arXiv:1512.03385, eq. 1.
    Shapes: x and y alike, any rank.
    Raises: ValueError where the shapes differ; nothing is ever broadcast.
    """
    require_one_shape(x, y)
    return x + y


def branch_only(x: Tensor, y: Tensor) -> Tensor:
    """No connection at all: ``y``. What a network without shortcuts does; the control of every experiment."""
    return y


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 at least: in float16 the square of 256 is infinite."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def fill(parameter: Any, values: Tensor) -> None:
    """Give a parameter these values, also where it is sharded and so has no views to fill."""
    values = values.to(parameter.device, parameter.dtype)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def along(weight: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """View a (D,) weight so that it multiplies x along channel_dim."""
    trailing = -channel_dim - 1 if channel_dim < 0 else x.ndim - 1 - channel_dim
    return weight.view(-1, *[1] * trailing)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, channel_dim: int) -> Tensor:
    """A linear map of x along channel_dim: for images the 1×1 convolution."""
    if channel_dim in (-1, x.ndim - 1):
        return linear(x, weight, bias)
    return linear(x.movedim(channel_dim, -1), weight, bias).movedim(-1, channel_dim)


class Highway(nn.Module):
    """A learned gate that trades the branch against the shortcut.

    ``T⊙y + (1−T)⊙x``, ``T = σ(Wx + b)``; with ``gate="shortcut"`` only the shortcut is gated: ``y + (1−T)⊙x``.
    W starts Xavier uniform and b at a negative value, so that the layer starts near the identity.

    Source: Srivastava et al. 2015, arXiv:1505.00387, eq. 3; the shortcut-only gate: He et al. 2016,
    arXiv:1603.05027, section 3.1.
    Shapes: x and y alike, any rank, with ``dim`` entries along ``channel_dim`` (1 for images: a 1×1 gate).
    Raises: ValueError for another gate; ValueError where the shapes differ.

    >>> merge = Highway(8, bias=-2.0)
    >>> merge(torch.zeros(4, 8), torch.ones(4, 8)).mean().item()  # doctest: +ELLIPSIS
    0.1192...
    """

    def __init__(self, dim: int, *, bias: float = -2.0, gate: str = "coupled", channel_dim: int = -1):
        super().__init__()
        if gate not in ("coupled", "shortcut"):
            raise ValueError(f"Highway: gate is 'coupled' or 'shortcut'; got gate={gate!r}. Use gate='coupled'.")
        self.start, self.gate, self.channel_dim = bias, gate, channel_dim
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.constant_(self.bias, self.start)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        require_one_shape(x, y)
        transform = torch.sigmoid(project(x, self.weight, self.bias, self.channel_dim))
        # x stands first in the sums: the result takes the memory format of its first operand.
        if self.gate == "shortcut":
            return x - x * transform + y
        return x + (y - x) * transform

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, bias={self.start}, gate={self.gate!r}, channel_dim={self.channel_dim}"


class GRUGate(nn.Module):
    """The gated recurrent unit as a merge: the shortcut is the state, the branch is the input.

    ``r = σ(W_r y + U_r x)``, ``z = σ(W_z y + U_z x − b)``, ``h = tanh(W y + U(r⊙x))``, ``(1−z)⊙x + z⊙h``.
    Every matrix starts Xavier uniform, b (one per channel, learned) at 2, which keeps z near 0.
    It differs from nn.GRUCell in three places: z weighs the candidate, not the state; r gates x before U is applied,
    not after; and −b is the only bias.

    Source: Parisotto et al. 2019, arXiv:1910.06764, section 3.2 ("Gated-Recurrent-Unit-type gating").
    Shapes: x and y alike, any rank, with ``dim`` entries along ``channel_dim``.
    Raises: ValueError where the shapes differ.

    >>> GRUGate(8)(torch.zeros(4, 8), torch.zeros(4, 8)).abs().max().item()
    0.0
    """

    def __init__(self, dim: int, *, bias: float = 2.0, channel_dim: int = -1):
        super().__init__()
        self.start, self.channel_dim = bias, channel_dim
        self.from_branch = nn.Parameter(torch.empty(3 * dim, dim))  # W_r, W_z, W
        self.from_shortcut = nn.Parameter(torch.empty(2 * dim, dim))  # U_r, U_z
        self.from_reset = nn.Parameter(torch.empty(dim, dim))  # U
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = (3 / len(self.bias)) ** 0.5  # of each matrix; those of one parameter have no views where it is sharded
        for matrices in (self.from_branch, self.from_shortcut, self.from_reset):
            nn.init.uniform_(matrices, -bound, bound)
        nn.init.constant_(self.bias, self.start)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        require_one_shape(x, y)
        dim = self.channel_dim
        y_r, y_z, y_h = project(y, self.from_branch, None, dim).chunk(3, dim)
        x_r, x_z = project(x, self.from_shortcut, None, dim).chunk(2, dim)
        r = torch.sigmoid(x_r + y_r)
        z = torch.sigmoid(x_z + y_z - along(self.bias, x, dim))
        candidate = torch.tanh(project(x * r, self.from_reset, None, dim) + y_h)
        return x + (candidate - x) * z

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, bias={self.start}, channel_dim={self.channel_dim}"


def orthogonal(x: Tensor, y: Tensor, channel_dim: int = -1) -> Tensor:
    """The sum with only that part of the branch which is new to the stream.

    ``x + y − x·⟨x, y⟩/(⟨x, x⟩ + 1e-6)``

    Source: Oh et al. 2025, arXiv:2505.11881 (its feature-wise form).
    Raises: ValueError where the shapes differ.
    """
    require_one_shape(x, y)
    a, b = at_least_float32(x), at_least_float32(y)
    share = (a * b).sum(channel_dim, keepdim=True) / (a.square().sum(channel_dim, keepdim=True) + 1e-6)
    return x + y - x * share.to(x.dtype)


def unit_rms(x: Tensor, channel_dim: int = -1) -> Tensor:
    """x with a root mean square of 1 along channel_dim: a point on the sphere of radius √D; 0 stays 0."""
    a = at_least_float32(x)
    return (a * (a.square().mean(channel_dim, keepdim=True) + 1e-12).rsqrt()).to(x.dtype)


class SphereStep(nn.Module):
    """A learned step on the sphere, from the stream towards the branch.

    ``N(N(x) + a⊙(N(y) − N(x)))``, N the scaling to a root mean square of 1, a one positive number per channel, 0.05 at
    the start. It is stored as ``|w|·0.05·√D`` with w = 1/√D, so that Adam moves it at the pace of the weights.

    Source: Loshchilov et al. 2024, arXiv:2410.01131, eq. 10 and 11, section 2.5; the radius there is 1.
    Shapes: x and y alike, any rank, with ``dim`` entries along ``channel_dim``.
    Raises: ValueError where the shapes differ.
    """

    def __init__(self, dim: int, *, step: float = 0.05, channel_dim: int = -1):
        super().__init__()
        self.step, self.channel_dim = step, channel_dim
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, len(self.weight) ** -0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        require_one_shape(x, y)
        step = self.weight.abs() * (self.step * len(self.weight) ** 0.5)
        x, y = unit_rms(x, self.channel_dim), unit_rms(y, self.channel_dim)
        return unit_rms(x + along(step.to(x.dtype), x, self.channel_dim) * (y - x), self.channel_dim)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, step={self.step}, channel_dim={self.channel_dim}"


class Delta(nn.Module):
    """The delta rule: the branch says along which direction the stream is rewritten.

    ``x + β(v − ⟨k, x⟩)k``, k = y/‖y‖, ``β = 2σ(⟨w, N(x)⟩ + b)``, ``v = ⟨u, x⟩ + c``. β = 0 leaves x, 1 puts v in the
    place of its part along k, 2 reflects that part (where v = 0). w, b and c start at 0, so β at 1; u at N(0, 0.02²).

    Source: Zhang et al. 2026, arXiv:2601.00417 (one value to a direction). There β reads the sublayer's input; here N
    is a scaling of the stream to a root mean square of 1.
    Shapes: x and y alike, any rank, with ``dim`` entries along ``channel_dim``.
    Raises: ValueError where the shapes differ.
    """

    def __init__(self, dim: int, *, channel_dim: int = -1):
        super().__init__()
        self.channel_dim = channel_dim
        self.strength = nn.Parameter(torch.empty(1, dim))  # w
        self.strength_bias = nn.Parameter(torch.empty(1))  # b
        self.value = nn.Parameter(torch.empty(1, dim))  # u
        self.value_bias = nn.Parameter(torch.empty(1))  # c
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for zero in (self.strength, self.strength_bias, self.value_bias):
            nn.init.zeros_(zero)
        nn.init.normal_(self.value, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        require_one_shape(x, y)
        dim = self.channel_dim
        k = F.normalize(at_least_float32(y), dim=dim, eps=1e-4).to(y.dtype)  # at y = 0 the gradient is 1/eps
        strength = 2 * torch.sigmoid(project(unit_rms(x, dim), self.strength, self.strength_bias, dim))
        value = project(x, self.value, self.value_bias, dim)
        return x + strength * (value - (k * x).sum(dim, keepdim=True)) * k

    def extra_repr(self) -> str:
        return f"{self.value.shape[1]}, channel_dim={self.channel_dim}"


class Balance(nn.Module):
    """A weighted sum whose two learned weights add up to 1.

    ``βx + αy``, ``(β, α) = softmax(w)``; w starts at 0, so both at ½.

    Source: Menghani et al. 2024, arXiv:2411.07501 (LAuReL-RW).
    Shapes: x and y alike, any rank.
    Raises: ValueError where the shapes differ.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        require_one_shape(x, y)
        skip, branch = self.weight.softmax(0).to(x.dtype)
        return skip * x + branch * y


class Concat(nn.Module):
    """The connection of DenseNet, of ESIM and of Bengio's language model: ``[x; y]`` along ``channel_dim``.

    Source: Huang et al. 2017, arXiv:1608.06993, eq. 2.
    Shapes: x and y alike but along ``channel_dim``, where the result has the sum of both widths.

    >>> Concat()(torch.zeros(4, 8), torch.zeros(4, 3)).shape
    torch.Size([4, 11])
    """

    def __init__(self, *, channel_dim: int = -1):
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y], self.channel_dim)

    def extra_repr(self) -> str:
        return f"channel_dim={self.channel_dim}"
