"""What `index` can be told."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from pipelines.config import Config
from pipelines.schemas.values import Seed


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
