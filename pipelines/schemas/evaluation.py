"""What `evaluate` and `fuse` can be told."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from align.fusion import FUSION_HEADS
from pipelines.config import Config
from pipelines.schemas.values import (
    CAPTION_FIELDS,
    PLACE,
    WHERE,
    BadFraction,
    CaptionField,
    Place,
    Seed,
    Strict,
    Where,
)


class TaskConfig(Config):
    """One evaluation."""

    task: Literal["zero_shot", "retrieval"] = Field(description="Which evaluation.")
    data: Place = Field(description=PLACE)
    where: Where = Field(default_factory=dict, description=WHERE)
    caption_fields: list[CaptionField] = Field(
        default_factory=list, description=f"{CAPTION_FIELDS} Of several, the first."
    )
    label: str = Field(default="caption", description="Field that holds the class, or the caption.")
    templates: list[str] = Field(default=["{}"], description="Prompts around a class name.")


class EvaluateConfig(Config):
    """A model on zero-shot classification and retrieval, with 95 % intervals."""

    positional: ClassVar[tuple[str, ...]] = ("model", "data")
    must_exist: ClassVar[tuple[str, ...]] = ("data",)

    model: str = Field(description="A bundle: folder or hub id.")
    data: Place | None = Field(
        default=None, description="Shards for a plain retrieval task, where no tasks are given."
    )
    caption_fields: list[CaptionField] = Field(
        default_factory=list, description="Where captions of data stand, as in a task."
    )
    tasks: dict[str, TaskConfig] = Field(
        default_factory=dict,
        description="Evaluations by title: {title: {task: retrieval or zero_shot, data, where,\n"
        "label, templates}}.",
    )
    out: Path | None = Field(
        default=None, description="Folder for results.json; null = print only."
    )
    batch_size: PositiveInt = Field(default=256, description="Pictures at a time.")
    max_bad_fraction: BadFraction = 0.05
    strict: Strict = False

    @model_validator(mode="after")
    def _something(self) -> "EvaluateConfig":
        if not self.tasks and self.data is None:
            raise ValueError("give data, as in: align evaluate BUNDLE SHARDS; or tasks")
        return self


class HeadConfig(Config):
    """One fusion head."""

    name: str = Field(description="A registered head, or package.module:Name.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the head.")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FUSION_HEADS and ":" not in name:
            raise ValueError(
                f"unknown fusion head {name!r}; known: {', '.join(FUSION_HEADS)}, "
                "or package.module:Name"
            )
        return name


class FuseConfig(Config):
    """Fusion heads on composed retrieval: a picture and a change in words find the target."""

    must_exist: ClassVar[tuple[str, ...]] = ("data", "pairs", "test_data", "index", "test_pairs")

    model: str = Field(description="A bundle: folder or hub id.")
    data: Place = Field(description="Shards of the pictures to train on.")
    pairs: Path = Field(
        description="Training queries, Parquet: reference and target (keys), change (text),\n"
        "kind, base (what relatives share)."
    )
    test_data: Place = Field(description="Shards of the pictures to search.")
    index: Path = Field(description="Index of test_data's pictures by the same model.")
    test_pairs: Path = Field(description="Test queries; no base of theirs may be in pairs.")
    within: str | None = Field(
        default=None, description="Field in which a training query and its candidates agree."
    )
    heads: dict[str, HeadConfig] = Field(
        default={name: HeadConfig(name=name) for name in FUSION_HEADS},
        min_length=1,
        description="Heads to compare, by title.",
    )
    out: Path = Field(description="Run folder: results.json and the trained heads.")
    steps: PositiveInt = Field(default=500, description="Training steps of every head.")
    batch_size: PositiveInt = Field(default=256, description="Queries a step.")
    learning_rate: PositiveFloat = Field(default=1e-3, description="At its peak.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.01, description="On matrices.")
    temperature: PositiveFloat = Field(default=0.05, description="Of the contrastive loss.")
    seed: Seed = Field(default=0, description="Of weights and batches.")
