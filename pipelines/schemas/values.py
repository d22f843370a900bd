"""Kinds of values that several verbs take."""

from typing import Annotated

from pydantic import Field

Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Where = dict[str, str | int | float | bool | list[str | int | float | bool]]
WHERE = (
    "Keep samples whose field has this value, or one of these values: {field: value or [values]}."
)
