"""Pictures inside the page: each one embedded once, however often it is shown.

A picture comes as a Pillow image or as the bytes of an image file, is checked, made small, and
kept as a data URI in one hidden SVG; every place that shows it only refers to it.
"""

import base64
import hashlib
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from eval.report_html import Element, clean, element

Picture = Image.Image | bytes

LARGEST_SOURCE = 50_000_000
"""Pixels of a source picture; anything larger is refused before it is decoded."""

_SIDE = 160  # shown at up to 80 CSS pixels, on screens of two device pixels each
_SHEET_BYTES = 3_500_000
_EMBEDDED_AS_IS = {"WEBP", "PNG", "JPEG"}
_BYTES_AS_IS = 16_000


class PictureStore:
    """The pictures of one page, embedded once each.

    >>> store = PictureStore()
    >>> shown = store.show(Image.new("RGB", (8, 8)), alt="a black square", place="example")
    >>> shown.get("viewBox"), len(store)
    ('0 0 8 8', 1)
    """

    def __init__(self) -> None:
        self._sources: dict[str, tuple[str, int, int]] = {}
        self._images: dict[str, Element] = {}

    def __len__(self) -> int:
        return len(self._images)

    def show(self, picture: Picture, *, alt: str, place: str) -> Element:
        """An inline SVG that shows `picture`; `alt` is its text, `place` names it in errors."""
        source = _source_key(picture)
        if source not in self._sources:
            self._sources[source] = self._add(picture, place)
        name, width, height = self._sources[source]
        return element(
            "svg",
            element("use", href=f"#{name}"),
            class_="picture",
            viewBox=f"0 0 {width} {height}",
            role="img",
            aria_label=clean(alt),
        )

    def definitions(self) -> Element:
        """The hidden SVG that holds every picture; put it once into the page."""
        images = element("defs", *self._images.values())
        return element(
            "svg", images, class_="definitions", width="0", height="0", aria_hidden="true"
        )

    def _add(self, picture: Picture, place: str) -> tuple[str, int, int]:
        data, kind, (width, height) = _encoded(picture, place)
        name = "picture-" + hashlib.sha256(data).hexdigest()[:16]
        self._images[name] = element(
            "image", id=name, width=width, height=height, href=data_uri(data, kind)
        )
        return name, width, height


def data_uri(data: bytes, kind: str) -> str:
    """`data` as a URI that needs no request; `kind` is the image subtype, such as `webp`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def open_picture(picture: Picture, *, place: str) -> Image.Image:
    """A decoded picture, upright, RGB or RGBA.

    Raises:
        ValueError: it is no picture, damaged, or beyond `LARGEST_SOURCE` pixels.
    """
    if isinstance(picture, bytes):
        try:
            opened = Image.open(io.BytesIO(picture))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{place}: the picture cannot be read ({clean(str(error))})") from None
    else:
        opened = picture
    if opened.width * opened.height > LARGEST_SOURCE:
        raise ValueError(
            f"{place}: the picture has {opened.width} x {opened.height} pixels, "
            f"more than {LARGEST_SOURCE}; make it smaller first"
        )
    try:
        upright = ImageOps.exif_transpose(opened)
        return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{place}: the picture cannot be read ({clean(str(error))})") from None


def sprite_sheet(pictures: Sequence[Picture], *, place: str) -> tuple[str, int, int]:
    """One image holding all `pictures` in a square grid of cells: (data URI, cell side, columns).

    The cell is 64 pixels wide, or less where that many pictures would make the page heavy.
    """
    opened = [
        open_picture(picture, place=f"{place}, picture {row}")
        for row, picture in enumerate(pictures)
    ]
    columns = int(np.ceil(np.sqrt(len(opened))))
    for cell in (64, 48, 40, 32, 24):
        data = _sheet(opened, cell, columns)
        if len(data) <= _SHEET_BYTES:
            break
    return data_uri(data, "webp"), cell, columns


def _sheet(pictures: Sequence[Image.Image], cell: int, columns: int) -> bytes:
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGBA", (columns * cell, rows * cell), (255, 255, 255, 0))
    for number, picture in enumerate(pictures):
        small = ImageOps.contain(picture, (cell, cell), Image.Resampling.LANCZOS)
        row, column = divmod(number, columns)
        left = column * cell + (cell - small.width) // 2
        sheet.paste(small, (left, row * cell + (cell - small.height) // 2))
    return _webp(sheet)


def _encoded(picture: Picture, place: str) -> tuple[bytes, str, tuple[int, int]]:
    """Small bytes of a well-known kind, without the source's metadata."""
    opened = open_picture(picture, place=place)
    if isinstance(picture, bytes) and len(picture) <= _BYTES_AS_IS:
        source = Image.open(io.BytesIO(picture))
        plain = not source.getexif() and not getattr(source, "is_animated", False)
        if plain and source.format in _EMBEDDED_AS_IS and max(opened.size) <= _SIDE:
            return picture, source.format.lower(), opened.size
    if max(opened.size) > _SIDE:
        opened.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return _webp(opened), "webp", opened.size


def _webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=84, method=4)
    return buffer.getvalue()


def _source_key(picture: Picture) -> str:
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    about = f"{picture.mode} {picture.size} {picture.getpalette()}".encode()
    return hashlib.sha256(about + picture.tobytes()).hexdigest()
