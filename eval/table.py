"""Reading an embedding table: what its card says, whether its files agree, and their rows."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Int64
from numpy import ndarray
from pyarrow import parquet

from eval.cards import file_sha256, read_card, write_card

TABLE_VERSION = 2
"""Version of `table.json` and of the parts' cards; a reader refuses any other."""

MODALITIES = {"image": "img_emb", "text": "text_emb", "fused": "fused_emb"}
"""What can be embedded, and the folder it lies in; `fused` is a picture with its words."""


@dataclass(frozen=True)
class Part:
    """One part of a table: its rows, the last sample id in it, and its files' SHA-256 by path.

    The files are one `.npy` for each modality in the folder of :data:`MODALITIES`, and one Parquet
    file in `metadata/`.
    """

    rows: int
    last_id: int
    files: dict[str, str]

    def path(self, folder: str) -> str:
        """The part's file in one of the table's folders."""
        return next(name for name in self.files if name.startswith(f"{folder}/"))


@dataclass(frozen=True)
class PartCard:
    """The content of `parts/part_NNNNN.json`, whose appearance makes the part exist.

    Attributes:
        number: Which part of the table.
        rows: Rows in it; there may be none, and then there are no files.
        last_id: The last sample id in it; -1 where there are no rows.
        files: SHA-256 of its files by their path in the table.
        facts: Free JSON values, such as what was left out and how long it took.
    """

    number: int
    rows: int
    last_id: int
    files: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def part(self) -> Part:
        """What the table's card says of it."""
        return Part(self.rows, self.last_id, self.files)

    def save(self, folder: Path) -> None:
        """Write the card whole into a table's folder."""
        write_card(folder / part_path(self.number), TABLE_VERSION, asdict(self))


def part_path(number: int) -> str:
    """Where the card of a part lies in its table."""
    return f"parts/part_{number:05d}.json"


def read_parts(folder: Path) -> dict[int, PartCard]:
    """The cards of all whole parts by number, ascending.

    Raises:
        ValueError: One of them is damaged, of another version, or lies under another's name.
    """
    found = {}
    for path in sorted((folder / "parts").glob("part_*.json")):
        card = read_card(
            path,
            version=TABLE_VERSION,
            kind="part of a table",
            again="remove it and embed again, which makes this part anew",
            read=lambda value: PartCard(**value),
        )
        if path != folder / part_path(card.number):
            raise ValueError(f"{path}: is the card of part {card.number}; embed again")
        found[card.number] = card
    return found


@dataclass(frozen=True)
class TableCard:
    """The content of `table.json`.

    Attributes:
        modalities: What was embedded, in a fixed order.
        dim: Length of a row.
        dtype: `float16` or `float32`.
        rows_per_part: Part `p` holds the samples with ids from `p * rows_per_part` on, so many at
            most.
        fingerprints: Which model and data the rows are from; a resumed run must have the same.
        options: What else the rows depend on, as JSON values; likewise.
        origin: Free JSON values for the reader, such as where model and data lie.
        complete: Whether all parts were written.
        parts: The parts that have rows, in order; none before all are written.
    """

    modalities: tuple[str, ...]
    dim: int
    dtype: str
    rows_per_part: int
    fingerprints: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    parts: tuple[Part, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @classmethod
    def load(cls, folder: Path) -> "TableCard":
        """Read `table.json`.

        Raises:
            FileNotFoundError: The folder holds no table.
            ValueError: The file is damaged or of another version.
        """
        return read_card(
            folder / "table.json",
            version=TABLE_VERSION,
            kind="an embedding table",
            again="embed again",
            read=cls._of,
        )

    @classmethod
    def _of(cls, value: dict[str, Any]) -> "TableCard":
        value["modalities"] = tuple(value["modalities"])
        value["parts"] = tuple(Part(**part) for part in value["parts"])
        return cls(**value)

    def save(self, folder: Path) -> None:
        """Write `table.json` whole."""
        write_card(folder / "table.json", TABLE_VERSION, asdict(self))


class EmbeddingTable:
    """A complete table on disk, checked on opening.

    Args:
        folder: Where it lies.
        check: `sha256` reads every file once and compares; `sizes` only looks that rows and files
            agree.

    Raises:
        FileNotFoundError: No table there, or one of its files is missing.
        ValueError: The table is unfinished or a file was changed; the line names it.
    """

    def __init__(self, folder: Path | str, *, check: Literal["sha256", "sizes"] = "sha256") -> None:
        self.folder = Path(folder)
        self.card = TableCard.load(self.folder)
        if not self.card.complete:
            rows = sum(part.rows for part in read_parts(self.folder).values())
            raise ValueError(
                f"{self.folder}: unfinished, {rows} rows so far; run the same embedding again to "
                "complete it"
            )
        verify_parts(self.folder, self.card.parts, check=check)

    @property
    def rows(self) -> int:
        """How many samples there are."""
        return self.card.rows

    @property
    def fingerprint(self) -> str:
        """What names the table's rows: a SHA-256 over its card's fingerprints and checksums."""
        parts = [sorted(part.files.items()) for part in self.card.parts]
        said = json.dumps([sorted(self.card.fingerprints.items()), parts])
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    def metadata_paths(self) -> list[Path]:
        """The Parquet files, in row order."""
        return [self.folder / part.path("metadata") for part in self.card.parts]

    def vector_paths(self, modality: str) -> list[Path]:
        """The `.npy` files of a modality, in row order.

        Raises:
            ValueError: The table lacks it.
        """
        if modality not in self.card.modalities:
            raise ValueError(
                f"{self.folder}: holds no {modality} embeddings, only "
                f"{' and '.join(self.card.modalities)}"
            )
        return [self.folder / part.path(MODALITIES[modality]) for part in self.card.parts]

    def parts(self, modality: str) -> Iterator[Float32[ndarray, "rows dim"]]:
        """Yield the unit-length rows part by part, each in memory only while it is used."""
        for number in range(len(self.card.parts)):
            yield unit_rows(self._open_part(modality, number))

    def vectors(
        self, modality: str, rows: Int64[ndarray, " rows"] | None = None
    ) -> Float32[ndarray, "rows dim"]:
        """Unit-length rows by row number, in the order asked for; all of them by default."""
        if rows is None:
            return np.concatenate(list(self.parts(modality)))
        ends = np.cumsum([part.rows for part in self.card.parts])
        part_of = np.searchsorted(ends, rows, side="right")
        found = np.empty((len(rows), self.card.dim), dtype=np.float32)
        for number in np.unique(part_of):
            here = np.flatnonzero(part_of == number)
            first = ends[number] - self.card.parts[number].rows
            found[here] = self._open_part(modality, int(number))[rows[here] - first]
        return unit_rows(found)

    def metadata_schema(self) -> pa.Schema:
        """The columns of all parts together."""
        schemas = [parquet.read_schema(path) for path in self.metadata_paths]
        return unified_schema(schemas)

    def metadata_parts(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yield the metadata part by part in this schema; a column that a part lacks is null."""
        for path in self.metadata_paths:
            part = parquet.ParquetFile(path).read()
            columns = [
                part[column.name].cast(column.type)
                if column.name in part.column_names
                else pa.nulls(len(part), column.type)
                for column in schema
            ]
            yield pa.table(columns, schema=schema)

    def metadata(self) -> pa.Table:
        """The metadata of all rows."""
        return pa.concat_tables(self.metadata_parts(self.metadata_schema()))

    def _open_part(self, modality: str, number: int) -> Float[ndarray, "rows dim"]:
        path = self.vector_paths(modality)[number]
        return np.load(path, mmap_mode="r", allow_pickle=False)


def unit_rows(rows: Float[ndarray, "rows dim"]) -> Float32[ndarray, "rows dim"]:
    """Rows scaled to unit length, in float32."""
    exact = rows.astype(np.float32)
    return exact / np.sqrt(np.sum(exact * exact, axis=1, keepdims=True))


def unified_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema that holds the columns of all, each in the widest of its types.

    Raises:
        ValueError: A column has types that no common one holds, such as text and numbers.
    """
    try:
        # Metadata on the schema (of pandas, say) is no part of the columns.
        plain = [schema.remove_metadata() for schema in schemas]
        return pa.unify_schemas(plain, promote_options="permissive")
    except pa.ArrowException as error:
        line = " ".join(str(error).split())
        raise ValueError(f"a field changes its type between parts of the table: {line}") from error


def verify_parts(folder: Path, parts: Sequence[Part], *, check: Literal["sha256", "sizes"]) -> None:
    """Compare a table's files with its card, as :class:`EmbeddingTable` describes."""
    for part in parts:
        for name, expected in part.files.items():
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path}: this part of the table is missing; embed again")
            if check == "sha256" and file_sha256(path) != expected:
                raise ValueError(f"{path}: changed since it was written; embed again")
            if check == "sizes" and _rows_in(path) != part.rows:
                raise ValueError(f"{path}: {_rows_in(path)} rows, table.json says {part.rows}")


def _rows_in(path: Path) -> int:
    if path.suffix == ".npy":
        return len(np.load(path, mmap_mode="r", allow_pickle=False))
    return parquet.read_metadata(path).num_rows
