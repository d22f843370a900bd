"""What `search` can be told."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, PositiveInt, field_validator, model_validator

from pipelines.config import Config

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


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
