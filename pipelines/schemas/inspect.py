"""What `inspect` can be told."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from pipelines.config import Config
from pipelines.schemas.values import CAPTION_FIELDS, PLACE, CaptionField, NonNegativeInt, Place


class InspectConfig(Config):
    """What a data set holds, what is wrong with it, and what it holds twice.

    Exit code 0: nothing found; 3: damage, disagreement or, with --against, an overlap was found.
    """

    positional: ClassVar[tuple[str, ...]] = ("data",)
    must_exist: ClassVar[tuple[str, ...]] = ("data", "against")

    data: Place = Field(description=PLACE)
    verify: bool = Field(
        default=False,
        description="Read and decode every sample, compare the shards with their SHA-256, and set\n"
        "aside what is bad: training leaves it out from then on.",
    )
    repair: Path | None = Field(
        default=None, description="Folder for a new data set of the good samples, under sound keys."
    )
    against: Place | None = Field(
        default=None,
        description="Another data set: which pictures and captions of data does it hold too?\n"
        "Data is the test set, say, and this what was trained on.",
    )
    out: Path | None = Field(
        default=None, description="Folder of the page; null = runs/inspect/NAME."
    )
    sample: PositiveInt = Field(
        default=1000,
        description="Samples drawn to be decoded, where neither --verify nor --against has all of\n"
        "them decoded.",
    )
    caption_fields: list[CaptionField] = Field(default_factory=list, description=CAPTION_FIELDS)
    distance: Annotated[int, Field(ge=0, lt=32)] = Field(
        default=12, description="Bits of 64 in which perceptual hashes of copies may differ."
    )
    likeness: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.94, description="Correlation of thumbnails from which on pictures are copies."
    )
    workers: NonNegativeInt | None = Field(
        default=None, description="Decoding threads; null = one for each core."
    )
