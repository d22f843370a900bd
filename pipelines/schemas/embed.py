"""What `embed` can be told."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from pipelines.config import Config
from pipelines.schemas.values import (
    CAPTION_FIELDS,
    PLACE,
    BadFraction,
    CaptionField,
    Place,
    Strict,
)


class EmbedConfig(Config):
    """Shards through a model into an embedding table."""

    positional: ClassVar[tuple[str, ...]] = ("model", "data", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("data",)

    model: str = Field(description="A bundle: folder or hub id.")
    data: Place = Field(description=PLACE)
    out: Path = Field(description="Folder of the table.")
    caption_fields: list[CaptionField] = Field(
        default_factory=list, description=f"{CAPTION_FIELDS} Of several, the first."
    )
    texts: bool = Field(default=True, description="Embed captions too.")
    dtype: Literal["float16", "float32"] = Field(default="float16", description="Of the table.")
    rows_per_part: PositiveInt = Field(default=100_000, description="Rows in one part.")
    batch_size: PositiveInt = Field(default=256, description="Pictures at a time.")
    max_bad_fraction: BadFraction = 0.05
    strict: Strict = False
