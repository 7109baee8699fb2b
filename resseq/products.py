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

    Where CONVOLVES_FASTER, many rows of float32 are a convolution of size 1 over 16 images or more (so many torch gives
    to oneDNN on any number of threads): about half the time, and the same but for rounding.

    Shapes: x (…, D), weight (D', D), bias (D',) -> (…, D').
    """
    images = _images(x, weight) if CONVOLVES_FASTER else None
    if images is None:
        return F.linear(x, weight, bias)
    pixels = x.reshape(images, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last: a view
    return F.conv2d(pixels, weight[..., None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _images(x: Tensor, weight: Tensor) -> int | None:
    """Of how many images x's rows are the pixels, 16 or more to each; None where a convolution is no faster."""
    plain = type(x) is Tensor and type(weight) is nn.Parameter and x.layout == weight.layout == torch.strided
    if not plain or not x.dtype == weight.dtype == torch.float32 or x.device.type != "cpu":
        return None
    keeps_more = x.requires_grad and not weight.requires_grad  # a convolution keeps x for backward even then
    if keeps_more or torch.is_autocast_enabled("cpu") or traced() or not torch.backends.mkldnn.enabled:
        return None
    rows = x.shape[:-1].numel()
    if rows * weight.numel() < 2**23 or x.shape[-1] != weight.shape[1]:  # torch's message names both
        return None
    return next((count for count in range(16, min(rows // 16, 63) + 1) if rows % count == 0), None)


def traced() -> bool:
    """Whether what is decided now would be decided for other inputs too."""
    functions = torch._C._are_functorch_transforms_active()
    return functions or torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
