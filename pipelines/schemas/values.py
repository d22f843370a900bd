"""Kinds of values that several verbs take."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PositiveFloat, Tag

from pipelines.config import KIND, Config


def _text(value: Any) -> Any:
    """A folder may be called 2024, and a default may be a path."""
    return str(value) if isinstance(value, int | Path) else value


def _caption_field(name: str) -> str:
    if not re.fullmatch(r"txt|txt\.lines|json(\.[^.]+)+", name):
        raise ValueError(f"unknown place of captions {name!r}; known: txt, txt.lines, json.KEY")
    return name


CaptionField = Annotated[str, AfterValidator(_caption_field)]
Place = Annotated[str, BeforeValidator(_text)]
"""A folder of shards, one shard, or a pattern such as a/{0..7}.tar: a path or an fsspec URL."""
PLACE = (
    "Shards: a folder, one .tar or a pattern such as a/{0..7}.tar; a path or a URL\n(http, s3, gs)."
)

Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Where = dict[str, str | int | float | bool | list[str | int | float | bool]]
BadFraction = Annotated[
    float, Field(ge=0, lt=1, description="The run stops where more of the samples are bad.")
]
Strict = Annotated[bool, Field(description="Stop at the first bad sample.")]
WHERE = (
    "Keep samples whose field has this value, or one of these values: {field: value or [values]}."
)
CAPTION_FIELDS = (
    "Where captions stand: txt (the text member), txt.lines (each of its lines is one),\n"
    "json.KEY (a text or a list in the JSON member); [] = json.captions, else txt, else\n"
    "json.caption."
)


class SourceConfig(Config):
    """One of several data sets that are mixed."""

    must_exist: ClassVar[tuple[str, ...]] = ("data",)

    data: Place = Field(description=PLACE)
    weight: PositiveFloat | None = Field(
        default=None, description="Share of the stream, in any unit; null = its number of samples."
    )


Data = Annotated[
    Annotated[Place, Tag(f"{KIND}one")] | Annotated[list[SourceConfig], Tag(f"{KIND}several")],
    Discriminator(lambda value: f"{KIND}{'several' if isinstance(value, list) else 'one'}"),
]
"""One data set, or several with weights."""
