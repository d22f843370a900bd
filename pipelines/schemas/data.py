"""What `pack` can be told."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from pipelines.config import Config
from pipelines.schemas.values import WHERE, NonNegativeInt, Place, Where


class PackConfig(Config):
    """Image-text pairs into WebDataset shards with a manifest; what was cut off goes on."""

    positional: ClassVar[tuple[str, ...]] = ("source", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("source", "root")

    source: Place | list[Place] = Field(
        description="A folder of pictures with .txt or .json beside them, or with class folders;\n"
        "Parquet, CSV, TSV or JSON lines (several as a list); a caption file of COCO or\n"
        "Flickr; shards: a folder, a tar, a pattern such as a/{0..7}.tar, or their URL."
    )
    out: Path = Field(description="Folder for the shards; must be new or empty.")
    format: str | None = Field(
        default=None,
        description="folder, classes, parquet, csv, jsonl, coco, flickr, shards, or\n"
        "package.module:Name; null = told from the source, and printed.",
    )
    image: str | None = Field(
        default=None,
        description="Tables: the column of the picture, as bytes or as a path; null = image.",
    )
    caption: str | None = Field(
        default=None,
        description="Tables: the column of the caption; null = caption. Shards: txt, txt.lines\n"
        "(each line is one) or json.KEY; null = json.captions, else txt, else json.caption.",
    )
    key: str | None = Field(
        default=None,
        description="Tables and shards: names a sample from its columns or JSON fields, such as\n"
        "'{vendor}-{codepoints}'; shards also have {__key__}, {__shard__} and {__index__}.\n"
        "null = the picture's path or the row's number; a sample of shards keeps its key.",
    )
    where: Where = Field(default_factory=dict, description=WHERE + "\nNot for folder and classes.")
    root: Path | None = Field(
        default=None,
        description="Tables and caption files: the folder that paths of pictures start from;\n"
        "null = the folder of the source.",
    )
    merge: bool | None = Field(
        default=None,
        description="Tables: rows with the same picture become one sample with several captions;\n"
        "null = true.",
    )
    template: str | None = Field(
        default=None, description="Classes: makes a caption of a name; null = 'a photo of a {}'."
    )
    resize: PositiveInt | None = Field(
        default=None, description="Make larger pictures smaller: pixels of a side at most."
    )
    resize_side: Literal["shorter", "longer"] = Field(
        default="shorter", description="The side that resize speaks of."
    )
    encode: Literal["keep", "jpeg", "webp", "png"] = Field(
        default="keep",
        description="Encode pictures anew; those that need no change keep their bytes.",
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(
        default=95, description="Of pictures that are encoded as JPEG or WebP."
    )
    samples_per_shard: PositiveInt = Field(default=1000, description="Samples in one tar, at most.")
    shuffle_seed: int | None = Field(
        default=None, description="Mix the samples before writing; null keeps the source's order."
    )
    sidecars: list[str] | None = Field(
        default=None,
        description="Files for other tools: sizes (OpenCLIP), nshards (CLIP_benchmark), wids,\n"
        "energon, img2dataset.",
    )
    workers: NonNegativeInt | None = Field(
        default=None, description="Threads, each with a shard of its own; null = one per core."
    )
    strict: bool = Field(default=False, description="Stop at the first bad pair.")
    overwrite: bool = Field(default=False, description="Replace a data set packed earlier.")
