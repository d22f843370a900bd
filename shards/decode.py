"""Bytes into pixels, captions and fields, within limits that hold before anything is decoded."""

import io
import json
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from shards.crop import Box, BoxFinder, central_square
from shards.damage import BadSample, Reason
from shards.native import NATIVE

IMAGE_FORMATS = ("WEBP", "JPEG", "PNG", "GIF", "BMP")
"""Formats that are decoded, as Pillow names them; all others are refused unread."""

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
)
_ORIENTATION = 0x0112
# EXIF's orientations: those that swap rows and columns, then the steps along both.
_LYING = (5, 6, 7, 8)
_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
_JPEG_REDUCTIONS = (8, 4, 2)


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
    picture, orientation = _open(data, limits or Limits())
    with _any_failure_is_a_bad_sample():
        return _turned(_pillow_pixels(picture, channels), orientation)


def decode_square(
    data: bytes,
    size: int,
    *,
    crop: BoxFinder = central_square,
    channels: int = 3,
    fidelity: Literal["exact", "fast"] = "exact",
    limits: Limits | None = None,
) -> UInt8[Tensor, "{channels} {size} {size}"]:
    """Decodes a part of a picture to a square: what training reads.

    The order is: header, limits, box, decoding, box cut out, resizing of the box alone. `"exact"`
    gives `fit_square(decode_image(data), size)`, for any box, bit for bit.

    `"fast"` reads a JPEG at a half, a quarter or an eighth of its size while the box still has
    twice the pixels of the square; the box is then rounded to whole pixels of that smaller picture.
    From 2048 x 1536 to 224 that takes 0.7 to 0.8 of the time; on photos it is 52 to 56 dB from the
    exact square of the same box, 45 to 52 dB where the box had to be rounded.

    Args:
        data: The encoded picture.
        size: Side of the result in pixels.
        crop: Finds the box that is used, given height and width of the upright picture.
        channels: 3 lays transparent pictures onto white; 4 keeps their alpha channel.
        fidelity: Whether large JPEG may be read at a reduced size.
        limits: What the picture may ask for.

    Raises:
        BadSample: If the picture is empty, exceeds a limit, or cannot be decoded.
    """
    picture, orientation = _open(data, limits or Limits())
    height, width = picture.height, picture.width
    box = crop(width, height) if orientation in _LYING else crop(height, width)
    with _any_failure_is_a_bad_sample():
        shrink = _shrink(picture, box, size) if fidelity == "fast" else 1
        if shrink > 1:
            picture.draft(None, (width // shrink, height // shrink))
            box = _reduced(box, shrink)
        if shrink > 1 or channels == 4:
            pixels = _pillow_pixels(picture, channels)
        else:
            pixels = NATIVE.decode(data, picture, lambda: _pillow_pixels(picture, channels))
    return _fitted(_turned(pixels, orientation), box, size)


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
    height, width, _ = image.shape
    if (height, width) == (size, size):
        return image
    return _fitted(image, central_square(height, width), size).permute(1, 2, 0).numpy()


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


@contextmanager
def _any_failure_is_a_bad_sample() -> Generator[None]:
    """Whatever a decoder throws at damaged bytes means one bad sample."""
    try:
        yield
    except BadSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(Reason.TOO_MANY_PIXELS, str(error)) from None
    except UnidentifiedImageError:  # its message holds an address, which differs from run to run
        raise BadSample(Reason.UNDECODABLE, "not a picture of a known format") from None
    except Exception as error:
        raise BadSample(Reason.UNDECODABLE, f"{type(error).__name__}: {error}"[:200]) from None


def _open(data: bytes, limits: Limits) -> tuple[Image.Image, int]:
    """A picture whose header was read and keeps the limits, and its EXIF orientation."""
    if not data:
        raise BadSample(Reason.EMPTY_IMAGE, "zero bytes")
    if len(data) > limits.image_bytes:
        raise BadSample(Reason.TOO_MANY_BYTES, f"{len(data)} bytes")
    with _any_failure_is_a_bad_sample():
        picture = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        _check_size(picture.size, limits)
        return picture, picture.getexif().get(_ORIENTATION, 1) if "exif" in picture.info else 1


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadSample(Reason.EMPTY_IMAGE, f"{width} x {height} pixels")
    if width * height > limits.pixels:
        raise BadSample(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels")
    if max(width, height) > limits.aspect * min(width, height):
        raise BadSample(Reason.ABSURD_ASPECT, f"{width} x {height} pixels")


def _pillow_pixels(picture: Image.Image, channels: int) -> UInt8[ndarray, "h w {channels}"]:
    """The picture as RGB or RGBA, as it is stored."""
    mode = "RGB" if channels == 3 else "RGBA"
    if picture.mode.startswith("I"):  # 16 bits of gray, which Pillow would clip instead of scale
        picture = Image.fromarray((np.asarray(picture, np.uint32) >> 8).astype(np.uint8))
    if picture.mode == mode:
        return np.asarray(picture)
    if channels == 4 or not picture.has_transparency_data:
        return np.asarray(picture.convert(mode))
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return np.asarray(Image.alpha_composite(white, layer).convert("RGB"))


def _turned(pixels: UInt8[ndarray, "h w c"], orientation: int) -> UInt8[ndarray, "H W c"]:
    """A view of stored pixels, upright; what EXIF does not define is left as it is."""
    if orientation in _LYING:
        pixels = pixels.swapaxes(0, 1)
    down, across = _FLIPS.get(orientation, (1, 1))
    return pixels[::down, ::across]


def _shrink(picture: Image.Image, box: Box, size: int) -> int:
    """By how much a JPEG can be reduced while a box keeps twice the pixels that are asked for."""
    if picture.format not in ("JPEG", "MPO"):
        return 1
    side = min(box.height, box.width)
    return next((by for by in _JPEG_REDUCTIONS if side >= 2 * size * by), 1)


def _reduced(box: Box, by: int) -> Box:
    """A box in a picture reduced to `1 / by`, in whole pixels."""
    top, left = round(box.top / by), round(box.left / by)
    bottom, right = (box.top + box.height) // by, (box.left + box.width) // by
    return Box(top, left, bottom - top, right - left)


def _fitted(
    pixels: UInt8[ndarray, "height width channels"], box: Box, size: int
) -> UInt8[Tensor, "channels {size} {size}"]:
    """One part of a picture, resized to a square."""
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    assert part.shape[:2] == (box.height, box.width), f"{box} leaves the picture"
    # Torch's kernel is quickest on pixels that lie densely, channel by channel.
    dense = torch.from_numpy(np.require(part, requirements=("C", "W")))
    image = dense[None].permute(0, 3, 1, 2)
    return (image if part.shape[:2] == (size, size) else resize(image, size))[0]


def _scale(images: Tensor, size: int) -> Tensor:
    mode = functional.InterpolationMode.BICUBIC
    return functional.resize(images, [size, size], interpolation=mode, antialias=True)
