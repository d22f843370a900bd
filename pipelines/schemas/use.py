"""What `embed`, `index` and `search` can be told."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from pipelines.config import Config
from pipelines.schemas.values import (
    CAPTION_FIELDS,
    PLACE,
    BadFraction,
    CaptionField,
    Place,
    Seed,
    Strict,
)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


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


class IndexConfig(Config):
    """An embedding table into a FAISS index."""

    positional: ClassVar[tuple[str, ...]] = ("table", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("table",)

    table: Path = Field(description="Folder that `align embed` wrote.")
    out: Path = Field(description="Folder of the index.")
    factory: str = Field(default="Flat", description="FAISS factory string.")
    knobs: str = Field(default="", description="FAISS search parameters, such as nprobe=16.")
    modality: Literal["image", "text"] = Field(default="image", description="What to index.")
    seed: Seed = Field(default=0, description="Of the training sample.")


class SearchConfig(Config):
    """Pictures for a text, a picture, or both."""

    positional: ClassVar[tuple[str, ...]] = ("text",)
    must_exist: ClassVar[tuple[str, ...]] = ("index", "image", "head")

    text: str | None = Field(default=None, description="What to look for, in words.")
    image: Path | None = Field(default=None, description="A picture to look for.")
    index: Path = Field(default=Path("runs/demo/index"), description="Folder of the index.")
    model: str | None = Field(
        default=None, description="A bundle; null = the one the index was made with."
    )
    head: Path | None = Field(
        default=None,
        description="A trained fusion head for picture and text together; null = their mean.",
    )
    k: PositiveInt = Field(default=12, description="How many hits.")
    out: Path = Field(default=Path("search.png"), description="Picture of the hits.")

    @field_validator("out")
    @classmethod
    def _picture(cls, out: Path) -> Path:
        if out.suffix.lower() not in PICTURE_SUFFIXES or out.is_dir():
            raise ValueError(f"{out} is no picture file; name one, such as hits.png")
        return out

    @model_validator(mode="after")
    def _asks(self) -> "SearchConfig":
        if not self.text and self.image is None:
            raise ValueError('give a text to look for, as in: align search "red heart"')
        return self
