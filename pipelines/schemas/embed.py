"""What `embed` can be told."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from pipelines.config import Config
from pipelines.schemas.values import (
    CAPTION_FIELDS,
    PLACE,
    BadFraction,
    CaptionField,
    NonNegativeInt,
    Place,
    Strict,
)

Rows = Literal["image", "text", "fused"]


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EmbedConfig(Config):
    """Shards through a model into an embedding table."""

    positional: ClassVar[tuple[str, ...]] = ("model", "data", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("data", "head")

    model: str = Field(
        description="A bundle: folder or hub id; or a model of others: open_clip:NAME@TAG,\n"
        "hf:OWNER/NAME, or a folder."
    )
    data: Place = Field(description=PLACE)
    out: Path = Field(description="Folder of the table.")
    rows: Annotated[list[Rows], BeforeValidator(_several), Field(min_length=1)] = Field(
        default=["image", "text"],
        description="What to embed of each sample: image, text, fused (a picture with its words).",
    )
    head: Path | None = Field(
        default=None,
        description="Folder of the fusion head that makes fused rows; null = their unit-length\n"
        "mean.",
    )
    caption_fields: list[CaptionField] = Field(
        default_factory=list, description=f"{CAPTION_FIELDS} Of several, the first."
    )
    fields: list[str] | None = Field(
        default=None,
        description="JSON fields to keep, dots lead into objects; null = all of them.",
    )
    dtype: Literal["float16", "float32"] = Field(default="float16", description="Of the table.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Of the towers; auto = bf16 where the device multiplies in it (CUDA, AMX).",
    )
    rows_per_part: PositiveInt = Field(
        default=10_000, description="Samples that a part covers; what a kill can cost."
    )
    batch_size: PositiveInt = Field(default=256, description="Samples at a time.")
    workers: NonNegativeInt | None = Field(
        default=None, description="Threads that decode; null = a core each, at most 16."
    )
    max_bad_fraction: BadFraction = 0.05
    strict: Strict = False

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "EmbedConfig":
        if len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows: {', '.join(self.rows)}: name each once")
        if self.head is not None and "fused" not in self.rows:
            raise ValueError("head: it makes fused rows, and there are none: add fused to rows")
        return self

    def missing_places(self) -> list[str]:
        """As everywhere, and a model that is neither a folder nor a name elsewhere."""
        missing = super().missing_places()
        is_name = ":" in self.model or self.model.count("/") == 1
        if not is_name and not Path(self.model).exists():
            missing.append(
                f"model: there is no bundle {self.model}: no such folder, and no hub id "
                "(OWNER/NAME)"
            )
        return missing
