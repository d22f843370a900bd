"""A picture as the image tower wants it: RGB over white, square, uint8."""

import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms


def preprocess(image: Image.Image, size: int) -> UInt8[Tensor, "3 size size"]:
    """Lay a picture over white, scale its shorter side to `size` (antialiased), cut the centre.

    This is the protocol of CLIP (Radford et al. 2021), bilinear, on uint8; a picture that already
    has the size passes unchanged. Rotation by EXIF is honoured.

    Args:
        image: any size, any mode.
        size: side of the square that comes out, in pixels.
    """
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    pixels = transforms.pil_to_tensor(image.convert("RGB"))
    if pixels.shape[1:] != (size, size):
        pixels = transforms.resize(pixels, [size], antialias=True)
        pixels = transforms.center_crop(pixels, [size, size])
    return pixels.to(torch.uint8)
