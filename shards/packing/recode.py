"""Pictures on their way into shards: checked, and on request made smaller or encoded anew."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from shards.damage import BadSample, Reason
from shards.decode import Limits, decode_image, sniff_extension

ENCODINGS = {"jpeg": "jpg", "webp": "webp", "png": "png"}
"""What pictures can be encoded to, with their extensions."""
SIDES = ("shorter", "longer")

_FORMATS = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
# Their own encoding loses nothing by becoming PNG, and few tools write them any more.
_KEPT_AS = {"gif": "png", "bmp": "png"}
_HAS_ALPHA = ("webp", "png", "gif")


@dataclass(frozen=True)
class Recode:
    """What becomes of pictures; without options they keep their bytes.

    A picture that needs no change keeps its bytes. One that is changed is turned upright by its
    EXIF tag, and of its metadata only the colour profile stays.

    Attributes:
        resize: Pixels that the side may have at most; None leaves pictures as large as they are.
        side: Which side: `shorter` or `longer`. The other one follows; nothing is enlarged.
        encode: `jpeg`, `webp` or `png`; None keeps the encoding, GIF and BMP become PNG if resized.
        quality: Of JPEG and WebP, 1 ... 100.
    """

    resize: int | None = None
    side: str = "shorter"
    encode: str | None = None
    quality: int = 95

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize={self.resize} must be at least 1 pixel")
        if self.side not in SIDES:
            raise ValueError(f"unknown side {self.side!r}; known: {', '.join(SIDES)}")
        if self.encode is not None and self.encode not in ENCODINGS:
            raise ValueError(f"unknown encoding {self.encode!r}; known: {', '.join(ENCODINGS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must lie in 1 ... 100")


@dataclass(frozen=True)
class Recoded:
    """A checked picture.

    Attributes:
        data: The encoded picture.
        extension: What fits it.
        size: Width and height, upright.
        original: Width and height before.
    """

    data: bytes
    extension: str
    size: tuple[int, int]
    original: tuple[int, int]


def recode(data: bytes, how: Recode, *, limits: Limits) -> Recoded:
    """Decodes a picture, which proves it sound, and changes it where that is asked for.

    Args:
        data: The encoded picture.
        how: What to change.
        limits: What the picture may ask for.

    Raises:
        BadSample: If the picture cannot be decoded, exceeds a limit, or cannot be encoded.
    """
    extension = sniff_extension(data) or ""
    changes = how.resize is not None or how.encode is not None
    channels = 4 if changes and extension in _HAS_ALPHA else 3
    pixels = decode_image(data, channels=channels, limits=limits)
    assert extension, "every format that is decoded is known by its first bytes"
    original = (pixels.shape[1], pixels.shape[0])
    size = _fit(original, how)
    wanted = ENCODINGS[how.encode] if how.encode else extension
    if size == original and wanted == extension:
        return Recoded(data, extension, size, original)
    wanted = _KEPT_AS.get(wanted, wanted)
    if channels == 4 and (pixels[..., 3] == 255).all():
        pixels = np.ascontiguousarray(pixels[..., :3])
    elif channels == 4 and wanted == "jpg":
        pixels = decode_image(data, limits=limits)  # laid onto white
    picture = Image.fromarray(pixels)
    if size != original:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return Recoded(_encoded(picture, wanted, how.quality, _profile(data)), wanted, size, original)


def _fit(size: tuple[int, int], how: Recode) -> tuple[int, int]:
    if how.resize is None:
        return size
    side = min(size) if how.side == "shorter" else max(size)
    if side <= how.resize:
        return size
    width, height = (max(1, round(length * how.resize / side)) for length in size)
    return width, height


def _profile(data: bytes) -> bytes | None:
    """The colour profile of a picture, if it is one for red, green and blue."""
    with Image.open(io.BytesIO(data)) as picture:
        return picture.info.get("icc_profile") if picture.mode in {"RGB", "RGBA"} else None


def _encoded(picture: Image.Image, extension: str, quality: int, profile: bytes | None) -> bytes:
    sink = io.BytesIO()
    options: dict[str, Any] = {} if extension == "png" else {"quality": quality}
    if profile:
        options["icc_profile"] = profile
    try:
        picture.save(sink, _FORMATS[extension], **options)
    except (OSError, ValueError) as error:  # WebP has a largest side
        raise BadSample(Reason.TOO_MANY_PIXELS, f"{extension} cannot hold it: {error}") from None
    return sink.getvalue()
