"""A picture as the image tower wants it: RGB over white, square, uint8."""

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
