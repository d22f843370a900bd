"""The pictures behind rows: read from their shards, and laid out in a grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.decode import decode_image
from shards.manifest import Manifest
from shards.read import ShardReader


class Pictures:
    """Pictures of a data set by their sample ids, over white."""

    def __init__(self, data: Path | str) -> None:
        self.manifest = Manifest.open(data)
        self._reader = ShardReader(self.manifest)

    def __getitem__(self, sample: int | np.integer) -> Image.Image:
        """Read one picture."""
        manifest = self.manifest
        name = manifest.image_fields[int(manifest.image_choice[sample])]
        members = self._reader.read(int(sample), (name,))
        return Image.fromarray(decode_image(members[name]))


@dataclass(frozen=True)
class GridHit:
    """One cell of a grid: a picture, what it is called, and its score."""

    picture: Image.Image
    caption: str
    score: float


def draw_grid(title: str, hits: Sequence[GridHit], *, columns: int = 6) -> Image.Image:
    """Hits as a picture: best first, row by row, captions and scores below."""
    cell, margin, text_height, head = 148, 20, 46, 64
    rows = -(-len(hits) // columns)
    size = (columns * cell + margin, head + rows * (cell + text_height) + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), _fit(draw, title, size[0] - 2 * margin, 22), "#111", _font(22))
    for place, hit in enumerate(hits):
        left = margin + place % columns * cell
        top = head + place // columns * (cell + text_height)
        inner = cell - margin
        picture = hit.picture.copy()
        if max(picture.size) < inner:
            picture = picture.resize(
                (round(picture.width * inner / max(picture.size)),
                 round(picture.height * inner / max(picture.size))),
                Image.Resampling.LANCZOS,
            )  # fmt: skip
        picture.thumbnail((inner, inner), Image.Resampling.LANCZOS)
        corner = (left + (inner - picture.width) // 2, top + (inner - picture.height) // 2)
        sheet.paste(picture, corner)
        draw.rectangle((left - 1, top - 1, left + inner, top + inner), outline="#ddd")
        draw.text((left, top + inner + 5), _fit(draw, hit.caption, inner, 13), "#222", _font(13))
        draw.text((left, top + inner + 22), f"{hit.score:.3f}", "#777", _font(12))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis where it is too long."""
    font = _font(size)
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
