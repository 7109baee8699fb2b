"""Linear maps, convolutions and embeddings whose starting weights have a name."""

import math
from typing import Literal

from torch import Tensor, nn

from resseq.products import linear

Init = Literal["xavier", "torch", "normal"]


def start(weight: Tensor, bias: Tensor | None, init: Init, parts: int = 1) -> None:
    """Fill a projection with its starting weights.

    "xavier": ``U(−a, a)``, ``a = √(6/(fan_in + fan_out))``, zero biases; of a weight that holds several matrices,
    the fans are those of one. "normal": ``N(0, 0.02²)``, zero biases, BERT's. "torch": torch's default, ``U(−b, b)``,
    ``b = 1/√fan_in`` for weights and biases.

    Source: Glorot & Bengio 2010, eq. 16; Devlin et al. 2018, arXiv:1810.04805.
    Raises: ValueError for another name.
    """
    fan_in = math.prod(weight.shape[1:])
    if init == "xavier":
        fan_out = weight.numel() // weight.shape[1] // parts
        bound = math.sqrt(3) * math.sqrt(2 / (fan_in + fan_out))
        nn.init.uniform_(weight, -bound, bound)  # all parts at once: a sharded weight has no views
    elif init == "normal":
        nn.init.normal_(weight, std=0.02)
    elif init == "torch":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    else:
        raise ValueError(f"init: is 'xavier', 'torch' or 'normal'; got init={init!r}. Use init='xavier'.")
    if bias is not None and init == "torch":
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(bias, -bound, bound)
    elif bias is not None:
        nn.init.zeros_(bias)


class Linear(nn.Linear):
    """``Wx + b``; W may hold several matrices of one size (query, key and value), each of which starts by itself.

    Shapes: (…, dim_in) -> (…, parts · dim_out).
    """

    def __init__(self, dim_in: int, dim_out: int, *, parts: int = 1, bias: bool = True, init: Init = "xavier"):
        self.parts = parts  # before nn.Linear's constructor, which calls reset_parameters
        self.init: Init = init
        super().__init__(dim_in, parts * dim_out, bias=bias)

    def reset_parameters(self) -> None:
        start(self.weight, self.bias, self.init, self.parts)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Conv1d(nn.Conv1d):
    """A one-dimensional convolution that keeps the length at stride 1.

    Shapes: (B, C, L) -> (B, C', ⌈L/stride⌉).
    Raises: ValueError for an even kernel_size.
    """

    def __init__(
        self, dim_in: int, dim_out: int, kernel_size: int, *, stride: int = 1, bias: bool = True, init: Init = "xavier"
    ):
        if kernel_size % 2 == 0:
            raise ValueError(
                f"Conv1d: kernel_size must be odd to keep the length; got kernel_size={kernel_size}. "
                f"Use kernel_size={kernel_size + 1}."
            )
        self.init: Init = init
        super().__init__(dim_in, dim_out, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias)

    def reset_parameters(self) -> None:
        start(self.weight, self.bias, self.init)


class Embedding(nn.Embedding):
    """A vector for each token, ``N(0, 0.02²)`` at the start; ``N(0, 1)`` with init="torch"."""

    def __init__(self, count: int, dim: int, *, init: Init = "xavier"):
        self.init: Init = init
        super().__init__(count, dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1.0 if self.init == "torch" else 0.02)
