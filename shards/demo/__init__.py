"""The built-in data set: 14,174 emoji by six artists, each with its name; see README.md here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shards.sources import ParquetSource

FOLDER = Path(__file__).parent
"""Where the Parquet files and the licences lie."""

IMAGE, CAPTION, KEY = "image", "name", "{vendor}-{codepoints}"
"""Columns of picture and text, and what names a record."""

TRAIN_VENDORS = ("noto", "blob", "fluent-3d", "fluent-flat", "fluent-contrast")
HELD_OUT_VENDOR = "twemoji"


@dataclass(frozen=True)
class Split:
    """A part of the data set.

    Attributes:
        description: What it holds, in one line.
        paths: The Parquet files.
        where: The rows that belong to it, as `ParquetSource` takes it.
    """

    description: str
    paths: tuple[Path, ...]
    where: Mapping[str, str]

    def records(self) -> ParquetSource:
        """The records of the split, captioned by their Unicode names."""
        return ParquetSource(
            self.paths, image=IMAGE, caption=CAPTION, key=KEY, where=dict(self.where)
        )


def _files(*vendors: str) -> tuple[Path, ...]:
    return tuple(FOLDER / f"{vendor}.parquet" for vendor in vendors)


SPLITS: dict[str, Split] = {
    "train": Split(
        "five artists, seen concepts",
        _files(*TRAIN_VENDORS),
        {"concept_split": "seen"},
    ),
    "vendor": Split(
        "an artist never trained on (Twemoji), seen concepts, all skin tones",
        _files(HELD_OUT_VENDOR),
        {"concept_split": "seen"},
    ),
    "unseen": Split(
        "concepts never trained on, all six artists",
        _files(*TRAIN_VENDORS, HELD_OUT_VENDOR),
        {"concept_split": "unseen"},
    ),
}
"""The splits by name."""
