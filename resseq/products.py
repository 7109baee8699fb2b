"""A linear map, by the faster of torch's ways."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 lacks it
CONVOLVES_FASTER = (  # MKL, which multiplies matrices, keeps AVX-512 from AMD; oneDNN, which convolves, does not
    "AMD" in _cpu.get("cpu_name", "")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``Wx + b`` for each of x's rows.

    Where CONVOLVES_FASTER, many rows of float32 are a convolution of size 1 over 16 images (from 16 on torch gives it
    to oneDNN on any number of threads): about half the time, and the same but for rounding.

    Shapes: x (…, D), weight (D', D), bias (D',) -> (…, D').
    """
    if not CONVOLVES_FASTER or not _is_large(x, weight):
        return F.linear(x, weight, bias)
    images = x.reshape(16, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last: a view
    return F.conv2d(images, weight[..., None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution is faster for x: float32 on a CPU, from 256 rows and 2²³ multiplications on."""
    plain = type(x) is Tensor and type(weight) is nn.Parameter and x.dtype == weight.dtype == torch.float32
    if not plain or x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or traced():
        return False
    rows = x.shape[:-1].numel()
    return rows >= 256 and rows % 16 == 0 and rows * weight.numel() >= 2**23


def traced() -> bool:
    """Whether what is decided now would be decided for other inputs too."""
    functions = torch._C._are_functorch_transforms_active()
    return functions or torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
