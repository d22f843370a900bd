"""What `pack` can be told."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, PositiveInt

from pipelines.config import Config
from pipelines.schemas.values import WHERE, Where


class PackConfig(Config):
    """Image-text pairs into WebDataset shards with a manifest."""

    positional: ClassVar[tuple[str, ...]] = ("source", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("source",)

    source: Path | list[Path] = Field(
        description="Parquet file or files with image bytes, or a folder of pictures with\n"
        ".txt or .json files of the same name beside them."
    )
    out: Path = Field(description="Folder for the shards; must be new or empty.")
    where: Where = Field(default_factory=dict, description=WHERE + " Parquet only.")
    image: str = Field(default="image", description="Column of the encoded picture. Parquet only.")
    caption: str = Field(default="caption", description="Column of the caption. Parquet only.")
    key: str | None = Field(
        default=None,
        description="Names a sample from its columns, such as '{vendor}-{codepoints}';\n"
        "null = file name and row. Parquet only.",
    )
    samples_per_shard: PositiveInt = Field(default=1000, description="Samples in one tar.")
    shuffle_seed: int | None = Field(
        default=None, description="Mix the samples before writing; null keeps the source's order."
    )
    strict: bool = Field(default=False, description="Stop at the first bad pair.")
    overwrite: bool = Field(default=False, description="Replace a data set packed earlier.")
