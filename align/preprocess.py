"""A picture as the image tower wants it: RGB over white, square, uint8."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

FITS = ("crop", "squash")
"""How a picture becomes square: its central square is cut out, or all of it is squeezed."""


def preprocess(
    image: Image.Image, size: int, *, fit: str = "crop"
) -> UInt8[Tensor, "3 {size} {size}"]:
    """Turn upright by EXIF, lay over white, cut the central square, scale it (bicubic).

    The protocol of CLIP (Radford et al. 2021); a picture that already has the size passes
    unchanged. Sixteen bits of gray are scaled to eight.

    Args:
        image: any size, any mode.
        size: side of the square that comes out, in pixels.
        fit: `crop`, or `squash` as SigLIP's pictures are.

    Raises:
        ValueError: an unknown fit.
    """
    if fit not in FITS:
        raise ValueError(f"unknown fit {fit!r}; known: {', '.join(FITS)}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels = transforms.pil_to_tensor(image.convert("RGB"))
    height, width = pixels.shape[1:]
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
    if pixels.shape[1:] == (size, size):
        return pixels
    mode = transforms.InterpolationMode.BICUBIC
    scaled = transforms.resize(pixels, [size, size], interpolation=mode, antialias=True)
    return scaled.to(torch.uint8)


def preprocess_all(
    images: Sequence[Image.Image | Path | str], size: int, *, fit: str = "crop", first: int = 0
) -> UInt8[Tensor, "batch 3 {size} {size}"]:
    """`preprocess` of each picture, or of each file of one.

    Args:
        images: pictures, or files of them; none are fine.
        size: side of the squares that come out, in pixels.
        fit: as for `preprocess`.
        first: the place of the first of them in a longer list, for messages.

    Raises:
        ValueError: something is no picture: its place or file, and what is wrong.
        OSError: there is no such file.
    """
    check_pictures(images, first=first)
    rows = [torch.empty(0, 3, size, size, dtype=torch.uint8)]
    for place, image in enumerate(images, first):
        name = f"picture {place}" if isinstance(image, Image.Image) else str(image)
        try:
            rows.append(_squared(image, size, fit)[None])
        except Exception as error:  # each decoder has errors of its own, of many kinds
            if isinstance(error, OSError) and error.errno is not None:
                raise  # there is no such file, or it is a folder: the error names it
            raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    return torch.cat(rows)


def check_pictures(images: Sequence[Image.Image | Path | str], *, first: int = 0) -> None:
    """See whether a list holds pictures with pixels, or files, and nothing else; opens none.

    Raises:
        ValueError: it is no list, or something in it is no picture: its place and type.
    """
    if not is_list(images):
        raise ValueError(f"encoding takes a list of pictures, not a {type(images).__name__}")
    for place, image in enumerate(images, first):
        if not isinstance(image, Image.Image | Path | str):
            raise ValueError(
                f"picture {place} is a {type(image).__name__}: pictures are PIL images or files of "
                "them; numbers come as one uint8 tensor of them all"
            )
        if isinstance(image, Image.Image) and not min(image.size):
            raise ValueError(f"picture {place} has no pixels: it is {image.width} x {image.height}")


def is_list(values: object) -> bool:
    """Whether something has places that can be counted: a list, a tuple, an array, a column."""
    return hasattr(values, "__len__") and not isinstance(
        values, str | bytes | bytearray | Mapping | AbstractSet
    )


def _squared(image: Image.Image | Path | str, size: int, fit: str) -> Tensor:
    if isinstance(image, Image.Image):
        return preprocess(image, size, fit=fit)
    with Image.open(image) as opened:
        return preprocess(opened, size, fit=fit)
