"""Bytes into pixels, captions and fields, within limits that hold before anything is decoded."""

import io
import json
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from shards.damage import BadSample, Reason

IMAGE_FORMATS = ("WEBP", "JPEG", "PNG", "GIF", "BMP")
"""Formats that are decoded, as Pillow names them; all others are refused unread."""

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
)
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Limits:
    """What a sample may ask of the machine; beyond it, the sample is bad.

    Attributes:
        image_bytes: Size of the encoded picture.
        pixels: Width times height, as the header states it, before decoding.
        aspect: Longer side over shorter side.
        caption_bytes: Size of the text member.
        json_bytes: Size of the JSON member.
    """

    image_bytes: int = 64 << 20
    pixels: int = 64_000_000
    aspect: float = 50.0
    caption_bytes: int = 1 << 16
    json_bytes: int = 1 << 20


def sniff_extension(data: bytes) -> str | None:
    """The file extension that fits the first bytes of a picture, or None for other content."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _MAGIC if data.startswith(magic)), None)


def decode_image(
    data: bytes, *, channels: int = 3, limits: Limits | None = None
) -> UInt8[ndarray, "height width {channels}"]:
    """Decodes a picture to 8-bit RGB, turned upright by its EXIF tag.

    Of an animation the first frame is taken. Gray, palette, CMYK and 16-bit pictures become RGB.

    Args:
        data: The encoded picture.
        channels: 3 lays transparent pictures onto white; 4 keeps their alpha channel.
        limits: What the picture may ask for.

    Raises:
        BadSample: If the picture is empty, exceeds a limit, or cannot be decoded.
    """
    limits = limits or Limits()
    if not data:
        raise BadSample(Reason.EMPTY_IMAGE, "zero bytes")
    if len(data) > limits.image_bytes:
        raise BadSample(Reason.TOO_MANY_BYTES, f"{len(data)} bytes")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as picture:
            _check_size(picture.size, limits)
            return np.asarray(_upright_rgb(picture, channels))
    except BadSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(Reason.TOO_MANY_PIXELS, str(error)) from None
    except UnidentifiedImageError:  # its message holds an address, which differs from run to run
        raise BadSample(Reason.UNDECODABLE, "not a picture of a known format") from None
    except Exception as error:  # whatever a decoder throws at damaged bytes means one bad sample
        raise BadSample(Reason.UNDECODABLE, f"{type(error).__name__}: {error}"[:200]) from None


def fit_square(image: UInt8[ndarray, "height width channels"], size: int) -> ndarray:
    """Cuts the central square out of a picture and resizes it (bicubic, antialiased).

    A picture that already has the size is returned as it is. With an alpha channel the colours are
    weighted by it, so that what is invisible does not bleed into what is visible.

    Args:
        image: The picture.
        size: Side of the result in pixels.

    Returns:
        The picture as `[size, size, channels]`, uint8.
    """
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return square
    tensor = torch.from_numpy(square.copy()).permute(2, 0, 1)[None]
    return resize(tensor, size)[0].permute(1, 2, 0).numpy().reshape(size, size, channels)


def resize(
    images: UInt8[Tensor, "batch channels height width"], size: int
) -> UInt8[Tensor, "batch channels {size} {size}"]:
    """Resizes pictures to a square of `size` pixels (bicubic, antialiased)."""
    if images.shape[1] == 4:
        alpha = images[:, 3:].float() / 255
        flat = torch.cat([images[:, :3] * alpha, images[:, 3:].float()], dim=1)
        flat = _scale(flat, size)
        colour = flat[:, :3] / (flat[:, 3:] / 255).clamp(min=1 / 255)
        return torch.cat([colour, flat[:, 3:]], dim=1).round().clamp(0, 255).to(torch.uint8)
    return _scale(images, size)


def decode_caption(data: bytes, *, limits: Limits | None = None) -> str:
    """Decodes a caption: UTF-8, Unicode-normalised (NFC), without white space at its ends.

    Args:
        data: The bytes of the text member.
        limits: What the caption may ask for.

    Raises:
        BadSample: If it is too long, not UTF-8, or empty.
    """
    limits = limits or Limits()
    text = unicodedata.normalize("NFC", _text(data, limits.caption_bytes)).strip()
    if not text:
        raise BadSample(Reason.EMPTY_CAPTION, f"{len(data)} bytes")
    return text


def decode_fields(data: bytes, *, limits: Limits | None = None) -> dict[str, Any]:
    """Decodes the JSON member, which must be an object.

    Args:
        data: The bytes of the JSON member.
        limits: What the member may ask for.

    Raises:
        BadSample: If it is too long, not UTF-8, not JSON, or not an object.
    """
    limits = limits or Limits()
    text = _text(data, limits.json_bytes)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.BAD_JSON, str(error)[:200]) from None
    if not isinstance(fields, dict):
        raise BadSample(Reason.BAD_JSON, f"a {type(fields).__name__} instead of an object")
    return fields


def _text(data: bytes, most: int) -> str:
    if len(data) > most:
        raise BadSample(Reason.TOO_MANY_BYTES, f"{len(data)} bytes of text; at most {most}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(Reason.BAD_TEXT, str(error)) from None


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadSample(Reason.EMPTY_IMAGE, f"{width} x {height} pixels")
    if width * height > limits.pixels:
        raise BadSample(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels")
    if max(width, height) > limits.aspect * min(width, height):
        raise BadSample(Reason.ABSURD_ASPECT, f"{width} x {height} pixels")


def _upright_rgb(picture: Image.Image, channels: int) -> Image.Image:
    """The picture as RGB or RGBA, upright."""
    mode = "RGB" if channels == 3 else "RGBA"
    if "exif" in picture.info and picture.getexif().get(_ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == mode:
        picture.load()
        return picture
    if picture.mode.startswith("I"):  # 16 bits of gray, which Pillow would clip instead of scale
        picture = Image.fromarray((np.asarray(picture, np.uint32) >> 8).astype(np.uint8))
    if channels == 4 or not picture.has_transparency_data:
        return picture.convert(mode)
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _scale(images: Tensor, size: int) -> Tensor:
    mode = functional.InterpolationMode.BICUBIC
    return functional.resize(images, [size, size], interpolation=mode, antialias=True)
