"""The pictures behind rows: from their shards, or from a user's file; and laid out in a grid."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.index.card import Source
from pipelines.config import ConfigError
from shards.damage import BadSample
from shards.decode import IMAGE_FORMATS, decode_image
from shards.manifest import Manifest
from shards.read import ShardReader

_CELL, _MARGIN, _TEXT, _HEAD = 148, 20, 62, 64
"""Pixels of a grid: a cell's width, the space between, the words below it, the title."""
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_COLUMNS = ((36, 6), (96, 8), (10**9, 12))
"""Up to so many hits, a grid has so many columns."""


_OTHER_SCRIPTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "seguisym.ttf")


class PicturesGoneError(ValueError):
    """A picture cannot be shown; one line says why."""


def read_picture(data: bytes, name: str) -> Image.Image:
    """A user's picture, read as those in shards are: upright, over white, 8-bit RGB.

    Of an animation the first frame is taken. Size is judged by the header, before decoding.

    Args:
        data: the encoded picture.
        name: what the message calls it.

    Raises:
        ConfigError: it is no picture of a known format, damaged, or too large.
    """
    try:
        return Image.fromarray(np.ascontiguousarray(decode_image(data)))
    except BadSample as error:
        raise ConfigError(
            f"{name} cannot be read as a picture ({error}); known formats: "
            f"{', '.join(IMAGE_FORMATS)}"
        ) from error


def open_picture(path: Path) -> Image.Image:
    """A user's picture in a file, as `read_picture`.

    Raises:
        ConfigError: it is missing, no picture, or too large.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"image: there is no file {path}") from error
    except OSError as error:
        raise ConfigError(f"image: {path} cannot be read ({error.strerror})") from error
    return read_picture(data, f"image: {path}")


class Pictures:
    """Pictures of a data set by their sample ids, over white; safe to share between threads."""

    def __init__(self, data: Path | str) -> None:
        self.manifest = Manifest.open(data)
        self._reader = ShardReader(self.manifest)

    def __getitem__(self, sample: int | np.integer) -> Image.Image:
        """Read one picture."""
        manifest = self.manifest
        name = manifest.image_fields[int(manifest.image_choice[sample])]
        members = self._reader.read(int(sample), (name,))
        return Image.fromarray(decode_image(members[name]))


class IndexPictures:
    """The pictures behind an index, by the id of their row, each from its source's data set.

    A data set is opened when the first of its pictures is asked for. Safe to share between threads.

    Args:
        sources: of the index.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._opened: dict[int, Pictures | PicturesGoneError] = {}
        self._lock = threading.Lock()

    def __getitem__(self, row_id: int | np.integer) -> Image.Image:
        """Read one picture.

        Raises:
            PicturesGoneError: its data set is no longer there or holds other samples, or the
                picture cannot be read.
        """
        firsts = [source.first_id for source in self._sources]
        number = int(np.searchsorted(firsts, int(row_id), side="right")) - 1
        pictures = self._open(max(number, 0))
        if isinstance(pictures, PicturesGoneError):
            raise PicturesGoneError(str(pictures))
        sample = int(row_id) - firsts[number]
        if number < 0 or sample >= len(pictures.manifest):
            raise PicturesGoneError(f"the index holds no row with id {row_id}")
        try:
            return pictures[sample]
        except (BadSample, OSError, KeyError) as error:
            raise PicturesGoneError(
                f"the picture of row {row_id} cannot be read ({error})"
            ) from error

    def why_gone(self) -> list[str]:
        """A line for each data set whose pictures cannot be shown; opens all of them."""
        opened = [self._open(number) for number in range(len(self._sources))]
        lines = [str(one) for one in opened if isinstance(one, PicturesGoneError)]
        return list(dict.fromkeys(lines))

    def _open(self, number: int) -> Pictures | PicturesGoneError:
        with self._lock:
            if number not in self._opened:
                self._opened[number] = _pictures_of(self._sources[number])
            return self._opened[number]


def _pictures_of(source: Source) -> Pictures | PicturesGoneError:
    data = source.origin.get("data")
    if data is None:
        return PicturesGoneError("the index does not say where the shards of its pictures are")
    try:
        pictures = Pictures(data)
    except (ValueError, OSError) as error:
        return PicturesGoneError(f"the shards are no longer at {data} ({error})")
    if pictures.manifest.fingerprint != source.data:
        return PicturesGoneError(f"{data} holds other samples than were embedded; embed it again")
    return pictures


@dataclass(frozen=True)
class GridHit:
    """One cell of a grid.

    Attributes:
        picture: None where it is gone; the caption takes its place.
        caption: what it is called.
        score: its similarity.
        copies: how many near-duplicates it stands for.
    """

    picture: Image.Image | None
    caption: str
    score: float
    copies: int = 0


def draw_grid(title: str, hits: Sequence[GridHit], *, columns: int | None = None) -> Image.Image:
    """Hits as a picture: best first, row by row, captions of two lines and scores below."""
    if columns is None:
        columns = next(wide for most, wide in _COLUMNS if len(hits) <= most)
    rows = -(-len(hits) // columns)
    size = (columns * _CELL + _MARGIN, _HEAD + rows * (_CELL + _TEXT) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    width = size[0] - 2 * _MARGIN
    font = _font(22, is_latin=_is_latin(title))
    draw.text((_MARGIN, _MARGIN), _lines(draw, title, width, 22, most=1)[0], "#111", font)
    for place, hit in enumerate(hits):
        left = _MARGIN + place % columns * _CELL
        top = _HEAD + place // columns * (_CELL + _TEXT)
        _draw_cell(sheet, draw, hit, left, top)
    return sheet


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Grids below each other."""
    size = (max(one.width for one in sheets), sum(one.height for one in sheets))
    whole = Image.new("RGB", size, "white")
    top = 0
    for one in sheets:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, hit: GridHit, left: int, top: int
) -> None:
    inner = _CELL - _MARGIN
    box = (left - 1, top - 1, left + inner, top + inner)
    below = top + inner + 5
    font = _font(13, is_latin=_is_latin(hit.caption))
    if hit.picture is None:
        draw.rectangle(box, fill="#eee", outline="#ddd")
        for number, line in enumerate(_lines(draw, hit.caption, inner - 16, 13, most=6)):
            draw.text((left + 8, top + 8 + 18 * number), line, "#222", font)
    else:
        scale = inner / max(hit.picture.size)
        wide, high = (max(1, round(side * scale)) for side in hit.picture.size)
        picture = hit.picture.convert("RGB").resize((wide, high), Image.Resampling.LANCZOS)
        corner = (left + (inner - picture.width) // 2, top + (inner - picture.height) // 2)
        sheet.paste(picture, corner)
        draw.rectangle(box, outline="#ddd")
        for line in _lines(draw, hit.caption, inner, 13, most=2):
            draw.text((left, below), line, "#222", font)
            below += 16
    alike = f"   and {hit.copies} alike" if hit.copies else ""
    draw.text((left, below + 2), f"{hit.score:.3f}{alike}", "#777", _font(12))


@cache
def _font(size: int, *, is_latin: bool = True) -> _Font:
    """Pillow's own font; for other scripts one of the system's, where there is one."""
    for name in () if is_latin else _OTHER_SCRIPTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _is_latin(text: str) -> bool:
    return all(ord(letter) < 0x250 or 0x2010 <= ord(letter) < 0x2070 for letter in text)


def _lines(draw: ImageDraw.ImageDraw, text: str, width: int, size: int, *, most: int) -> list[str]:
    """The text in lines of this width, broken between words; an ellipsis where it is cut."""
    font = _font(size, is_latin=_is_latin(text))
    longest = most * width // 2  # no letter is narrower than two pixels
    words = text.encode("utf-8", "replace").decode()[: longest + 1].split()
    lines = [""]
    while words:
        word = words.pop(0)
        joined = f"{lines[-1]} {word}".strip()
        if draw.textlength(joined, font) <= width:
            lines[-1] = joined
        elif len(lines) == most:
            lines[-1] = _cut(draw, joined, width, font)
            break
        elif lines[-1]:
            lines.append("")
            words.insert(0, word)
        else:  # a word wider than a line
            fits = _fitting(draw, word, float(width), font)
            lines[-1:] = [word[:fits], ""]
            words.insert(0, word[fits:])
    return lines


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int, font: _Font) -> str:
    dots = "..."
    left = width - draw.textlength(dots, font)
    return text[: _fitting(draw, text, left, font)].rstrip() + dots


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: float, font: _Font) -> int:
    """How many letters fit; at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = draw.textlength(text[:middle], font) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
