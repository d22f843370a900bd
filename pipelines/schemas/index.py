"""What `index` can be told."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from pipelines.config import Config
from pipelines.schemas.values import Seed

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _bytes(value: Any) -> Any:
    """A number of bytes, or `NUMBER UNIT`."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(value).strip())
    unit = (match[2].lower() or "b") if match else ""
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"{value!r} is no amount of memory: give it as in 200 MB or 4 GB")
    return int(float(match[1]) * _UNITS[unit])


Memory = Annotated[int, BeforeValidator(_bytes)]
"""Bytes, or as in `200 MB`, `4 GB`, `3.5 GiB`."""

_CHANGES = ("append", "remove", "remove_where", "compact", "export")
_IN_PLACE = ("remove", "remove_where", "compact")
_BUILDING = (
    *("factory", "knobs", "modality", "queries", "target_recall", "max_memory", "on_disk"),
    *("train_rows", "share_rows", "model", "embeddings"),
)


class IndexConfig(Config):
    """An embedding table into a FAISS index; or a change of an index.

    align index TABLE OUT                       build
    align index TABLE INDEX append=true         add a table's rows
    align index INDEX remove=ids.txt            have rows found no more
    align index INDEX compact=true              take removed rows out of the files
    align index INDEX OUT export=NAME           for another engine
    accelerate launch -m pipelines.index TABLE OUT factory=IVF4096,SQ8      build in shares
    """

    positional: ClassVar[tuple[str, ...]] = ("table", "out")
    must_exist: ClassVar[tuple[str, ...]] = ("table", "remove", "embeddings")

    table: Path = Field(
        description="Folder that `align embed` wrote, or an index or embeddings of clip-retrieval\n"
        "or autofaiss; to remove, compact or export: the index."
    )
    out: Path = Field(description="Folder of the index.")
    factory: str = Field(
        default="auto",
        description="FAISS factory string; auto = chosen by rows, dimension, memory and recall.",
    )
    knobs: str = Field(
        default="", description="FAISS search parameters, such as nprobe=16; empty = tuned."
    )
    modality: Literal["image", "text", "fused"] = Field(
        default="image", description="Which embeddings to index."
    )
    queries: Literal["text", "image", "fused"] | None = Field(
        default=None,
        description="What will be asked, and is tuned for; null = texts, or images where texts\n"
        "are indexed.",
    )
    target_recall: float = Field(
        default=0.95, gt=0, le=1, description="Recall@10 against exact search to tune for."
    )
    max_memory: Memory | None = Field(
        default=None, description="Most that the index may take: 200 MB, 4 GB; null = no limit."
    )
    on_disk: bool = Field(
        default=False,
        description="Build in shares and leave the inverted lists on disk: for an index larger\n"
        "than the memory.",
    )
    train_rows: PositiveInt = Field(
        default=262_144, description="Rows that train the index, at most."
    )
    share_rows: PositiveInt = Field(
        default=500_000, description="Rows of a share in memory, where it is built in shares."
    )
    append: bool = Field(default=False, description="Add the table's rows to the index.")
    remove: Path | None = Field(
        default=None, description="File with the ids of rows to remove, one a line."
    )
    remove_where: str | None = Field(
        default=None, description="SQL condition on the metadata of rows to remove."
    )
    compact: bool = Field(default=False, description="Take removed rows out of the files.")
    export: str | None = Field(
        default=None, description="Write the index for another engine: the name of one."
    )
    model: str | None = Field(
        default=None,
        description="Of an index or embeddings by other tools: the model that made them.",
    )
    embeddings: Path | None = Field(
        default=None,
        description="Of an index by other tools: their folder of embeddings, where it is apart.",
    )
    seed: Seed = Field(default=0, description="Draws the rows that train and the queries.")

    @model_validator(mode="before")
    @classmethod
    def _in_place(cls, values: Any) -> Any:
        """A change of an index needs no second folder."""
        if not isinstance(values, dict) or "out" in values:
            return values
        changed = any(values.get(name) for name in _IN_PLACE) and "table" in values
        return {**values, "out": values["table"]} if changed else values

    @model_validator(mode="after")
    def _makes_sense(self) -> "IndexConfig":
        wanted = [name for name in _CHANGES if getattr(self, name)]
        if self.on_disk and self.max_memory is not None:
            raise ValueError("max_memory: with on_disk, memory is that of share_rows; leave it out")
        if not wanted:
            return self
        if len(wanted) > 1 and set(wanted) not in (
            {"remove", "compact"},
            {"remove_where", "compact"},
        ):
            raise ValueError(f"{' and '.join(wanted)}: one at a time")
        first = wanted[0]
        given = [name for name in _BUILDING if self._differs(name)]
        if given:
            raise ValueError(
                f"{given[0]}: says how an index is built, and {first} is about one that is; leave "
                "it out"
            )
        if first in _IN_PLACE and self.out != self.table:
            raise ValueError(
                f"out: {first} changes the index itself; give it alone: align index "
                f"{self.table} {first}=..."
            )
        if first not in _IN_PLACE and self.out == self.table:
            raise ValueError(f"out: {first} needs a second folder, not {self.table} again")
        return self

    def _differs(self, name: str) -> bool:
        return getattr(self, name) != type(self).model_fields[name].default
