"""From the bytes of images to logits: normalised, in training shifted and mirrored, then any net."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHIFT, LARGEST = 4, 64  # pixels that an image is shifted at most; height of those that are


class ImageClassifier(nn.Module):
    """A net for images, and in front of it what makes its input of bytes: ``net((pixels/255 − mean)/std)``.

    The net is laid out in channels_last. In training mode each image is mirrored with probability ½ and, up to 64
    pixels high, cut out at a random place of itself framed by 4 pixels of the mean colour. What is drawn comes from
    torch's generator of the device.

    Source: He et al. 2015, arXiv:1512.03385, section 4.2 (the augmentation).
    Shapes: images (B, 3, H, W) of bytes -> logits (B, C).
    Args:
        mean, std: of each channel of the training images, from 0 to 1.
        augment: False leaves shift and mirror out.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float], augment: bool = True):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: it is documented
        self.augment = augment
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = (images / 255 - self.mean) / self.std
        if self.training and self.augment:
            x = shift_and_mirror(x, SHIFT if x.shape[2] <= LARGEST else 0)
        return self.net(x.contiguous(memory_format=torch.channels_last))


def shift_and_mirror(x: Tensor, most: int) -> Tensor:
    """Each image shifted by up to ``most`` pixels, zeros coming in, and mirrored with probability ½; (B, C, H, W)."""
    batch, _, height, width = x.shape
    down, right = torch.randint(2 * most + 1, (2, batch, 1), device=x.device)
    mirrored = torch.rand(batch, 1, device=x.device) < 0.5
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    columns = torch.where(mirrored, columns.flip(0), columns)
    each = torch.arange(batch, device=x.device)[:, None, None]
    # the three indices stand around the channels' slice: the result is (B, H, W, C), which is channels_last
    moved = F.pad(x, [most] * 4)[each, :, (down + rows)[:, :, None], (right + columns)[:, None, :]]
    return moved.permute(0, 3, 1, 2)
