"""Labelled images from anywhere, decoded once into one tensor of bytes."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resseq.data.rows import Data, DataOptions, Picture, find_column, name_rows, number_rows, read_rows
from resseq.data.sources import Table, read_class_folder, read_source

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

IMAGE_COLUMNS = ("image", "img", "picture", "photo")
JPEG = (".jpg", ".jpeg", ".jfif", ".jpe", ".jp2")
# those too that Pillow may not read here: it then says so
ENDINGS = (*JPEG, ".png", ".bmp", ".gif", ".webp", ".avif", ".heic", ".tif", ".tiff", ".ppm", ".pgm")
USUAL_SIZE = 224  # of images that differ in size


@dataclass(frozen=True, kw_only=True)
class ImageOptions(DataOptions):
    """Which images to learn from, and of what size."""

    image_column: str | None = None
    """The column of the images; by default a usual name such as image or img."""
    image_size: int | None = None
    """Height and width to which images are resized; that of the data unless given, or 224 where the
    images differ in size or are not square."""
    augment: bool = True
    """Mirror the training images at random, and shift those of up to 64 x 64 by up to 4 pixels."""


def load_images(options: ImageOptions, classes: list[str] | None = None, carve: bool = True) -> Data:
    """Load labelled images, not yet decoded, and number their classes; arguments and errors are those of load_text."""

    def take(table: Table, where: str) -> list[Picture]:
        column = table[find_column(table, where, "image", options.image_column, IMAGE_COLUMNS)]
        if missing := [row for row, value in enumerate(column, 1) if value is None]:
            raise ValueError(
                f"data: every row must have an image; got none in {name_rows(missing)} of {where}. Fill the row."
            )
        return [_picture(value, f"{where}, row {row}") for row, value in enumerate(column, 1)]

    if options.data.partition(":")[0] in ("pystdlib", "listops"):
        raise ValueError(
            f"data: --task image needs images; got data='{options.data}', which is texts. Give --data FOLDER, with a "
            f"folder of images for each label."
        )
    folder = Path(options.data)
    sources = read_class_folder(folder, "image", ENDINGS, read_picture) if folder.is_dir() else {}
    return number_rows(read_rows(sources or read_source(options.data), options, take), options, classes, carve)


def _picture(value: Any, name: str) -> Picture:
    """A column's value: a file read from a folder, or what Hugging Face datasets writes, {"bytes", "path"}."""
    if isinstance(value, Picture):
        return value
    if isinstance(value, dict) and value.get("bytes") is not None:
        return Picture(name, value["bytes"])
    if isinstance(value, dict) and value.get("path") is not None:
        return read_picture(value["path"])
    raise ValueError(
        f"data: an image is a struct of bytes and path; got a {type(value).__name__} in {name}. "
        f"Name another column by --image-column."
    )


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """An image file, not yet decoded. Raises: ValueError for one that is not there."""
    try:
        return Picture(str(path), Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"data: an image must be a file that can be read; got {path}: {reason}. Check it.") from error


def open_picture(picture: "Picture | Image.Image") -> "Image.Image":
    """Open an image, reading its header alone; PIL's are taken as they are. Raises: ValueError for what is no image."""
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    try:
        return Image.open(io.BytesIO(picture.content))
    except Exception as error:  # each format has errors of its own
        raise _unreadable(picture, error) from error


def common_size(pictures: Sequence[Picture]) -> int:
    """The height and width of all the images, or 224 where they differ or are not square."""
    sizes = {open_picture(picture).size for picture in pictures}
    width, height = next(iter(sizes))
    return width if len(sizes) == 1 and width == height else USUAL_SIZE


def decode(pictures: "Sequence[Picture | Image.Image]", size: int) -> "Tensor":
    """Images as bytes (N, 3, size, size) in RGB, upright; resized where they are of another size, grey behind what is
    transparent."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    pixels = np.empty((len(pictures), size, size, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        image = open_picture(picture)
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"data: an image must have 8 bits a channel; got {_name_of(picture)}, which has more (PIL's mode "
                f"{image.mode}). Convert it: which of its values are black and white, only you know."
            )
        try:
            image = _opaque(ImageOps.exif_transpose(image))  # upright, however the camera was held
        except Exception as error:  # what is cut off or damaged shows only here
            raise _unreadable(picture, error) from error
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels[i] = np.asarray(image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _opaque(image: "Image.Image") -> "Image.Image":
    """As RGB; behind what is transparent stands grey, on which a black and a white drawing can be seen."""
    from PIL import Image

    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
    return image.convert("RGB")


def _unreadable(picture: "Picture | Image.Image", error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if isinstance(picture, Picture) and "BytesIO" not in str(error) else "no image"
    return ValueError(
        f"data: an image must be whole, of a known format; got {_name_of(picture)}: {reason}. Mend it, or remove it."
    )


def _name_of(picture: "Picture | Image.Image") -> str:
    return picture.name if isinstance(picture, Picture) else getattr(picture, "filename", "an image")
