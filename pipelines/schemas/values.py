"""Kinds of values that several verbs take."""

import math
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


def _span(value: Any, units: tuple[str, ...]) -> Any:
    """A number of samples, or `NUMBER UNIT`, in one way of writing."""
    match = re.fullmatch(
        r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([a-z]*)", str(value).strip()
    )
    number, unit = (float(match[1]), match[2] or "samples") if match else (0.0, "")
    name = next((one for one in units if unit in (one, one.removesuffix("s"))), None)
    if name is None or not 0 < number < 1e18:
        known = ", ".join(units)
        raise ValueError(
            f"{value!r} is no span: give a number of samples, or one with a unit ({known}), such "
            f"as 500 {units[-1]}"
        )
    if name in ("samples", "steps") and number != int(number):
        raise ValueError(f"{value!r}: {name} come whole")
    return int(number) if name == "samples" else f"{number:.12g} {name}"


_LENGTHS = ("samples", "steps", "epochs")
_CADENCES = (*_LENGTHS, "minutes")


def unit_of(span: int | str) -> tuple[float, str]:
    """Number and unit of a span."""
    if isinstance(span, int):
        return float(span), "samples"
    number, unit = span.split()
    return float(number), unit


def steps_of(span: int | str, *, batch_size: int, epoch: int) -> int:
    """How many steps a span of samples, steps or epochs makes, rounded down; at least one.

    Args:
        span: a `Length`.
        batch_size: samples in a step.
        epoch: samples in an epoch.
    """
    return max(1, int(samples_of(span, batch_size=batch_size, epoch=epoch) // batch_size))


def samples_of(span: int | str, *, batch_size: int, epoch: int) -> float:
    """How many samples a span makes; of minutes, nobody knows: infinity."""
    number, unit = unit_of(span)
    each = {"samples": 1, "steps": batch_size, "epochs": epoch}
    return number * each[unit] if unit in each else math.inf


Length = Annotated[int | str, BeforeValidator(lambda value: _span(value, _LENGTHS))]
"""A number of samples, or as in `500 steps`, `20 epochs`."""
Cadence = Annotated[int | str, BeforeValidator(lambda value: _span(value, _CADENCES))]
"""Likewise, or as in `30 minutes`."""


def _part(value: Any) -> Any:
    if not isinstance(value, float) and value != 0:
        return _span(value, _LENGTHS)
    if not 0 <= value < 1:
        raise ValueError(
            f"{value!r} is no share of the run below 1, nor a length such as 500 steps, 1 epochs"
        )
    return float(value)


Part = Annotated[float | int | str, BeforeValidator(_part)]
"""A share of the run, below 1, or a length."""

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
