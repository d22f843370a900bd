"""What an index folder says of itself."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.cards import read_card, write_card
from eval.results import Figure

INDEX_VERSION = 2
"""Version of `index.json`; a reader refuses any other."""

DEPTHS = (1, 10, 100)
"""Lengths of the lists whose recall is measured."""


@dataclass(frozen=True)
class Source:
    """The rows that came from one table; they follow those of the source before.

    Attributes:
        data: Fingerprint of the data set.
        table: Fingerprint of the table.
        first_id: Id of the data set's sample 0 in this index: sample `s` has the id `first_id + s`.
        ids: How many ids are set aside for it.
        rows: How many rows of it are in the index, removed ones included.
        origin: Free values of the table: where model and data lie.
        vectors: Names of the `.npy` files in row order; empty where only FAISS holds the vectors.
        metadata: Names of the Parquet files in row order.
        arrow: Name of the metadata in Arrow's file format.
        id_file: Name of the `.npy` file with one int64 a row, ascending.
    """

    data: str
    table: str
    first_id: int
    ids: int
    rows: int
    origin: dict[str, Any]
    vectors: tuple[str, ...]
    metadata: tuple[str, ...]
    arrow: str
    id_file: str

    @property
    def names(self) -> list[str]:
        """All files of it."""
        return [*self.vectors, *self.metadata, self.arrow, self.id_file]


@dataclass(frozen=True)
class Reached:
    """What the index finds, for one kind of query.

    Attributes:
        queries: `text`, `image` or `fused` (a picture with the words of another).
        against_exact: Recall@k against exact search, for each k of `DEPTHS` that the rows allow.
        own_pair: Where each query has one right answer (a caption its picture): recall@k of it by
            `exact` search and by this index (`index`), by k of `DEPTHS`.
    """

    queries: str
    against_exact: tuple[Figure, ...]
    own_pair: dict[str, tuple[Figure, ...]] = field(default_factory=dict)

    @property
    def at_10(self) -> Figure:
        """Recall@10 against exact search, or that of all rows where there are fewer."""
        found = [one for one in self.against_exact if one.name.endswith("@10")]
        return found[0] if found else self.against_exact[-1]


@dataclass(frozen=True)
class Speed:
    """Queries a second, asked in batches, by so many threads."""

    threads: int
    queries_per_second: float


@dataclass(frozen=True)
class IndexCard:
    """The content of `index.json`.

    Attributes:
        factory: FAISS factory string, e.g. `Flat` or `IVF1024,PQ64`.
        knobs: FAISS search parameters, e.g. `nprobe=16`; empty where there are none.
        tuned_for: The kind of queries that the knobs were tuned on; None where they were given.
        target_recall: Recall@10 that was asked for; None where the knobs were given.
        modality: Which embeddings are in it.
        rows: Rows, removed ones included.
        removed: How many of them no search may find any more.
        dim: Length of a vector.
        bytes_per_vector: Size of the FAISS index by row.
        build_seconds: Choosing, training, adding and tuning, without measuring; of an index built
            in shares, those of all shares together.
        reached: By kind of query.
        speed: At one thread, and at all.
        costs: Seconds, measured when it was built: what the planner of filtered search weighs.
        fingerprints: Of `model`, and of `head` where rows are fused.
        sources: Where the rows came from.
        index_file: Name of the FAISS index.
        lists_file: Name of the inverted lists, where they lie beside it on disk.
        removed_file: Name of the `.npy` file with the removed row numbers.
        queries_file: Name of the `.npz` file with the queries that measured it, by which a change
            measures it again; None where they were not kept.
        generation: Counts the changes; part of the names of files that they write.
        measured: The generation that `reached` and `speed` are of.
        files: SHA-256 of every other file of the folder, by name.
    """

    factory: str
    knobs: str
    tuned_for: str | None
    target_recall: float | None
    modality: str
    rows: int
    removed: int
    dim: int
    bytes_per_vector: float
    build_seconds: float
    reached: tuple[Reached, ...]
    speed: tuple[Speed, ...]
    costs: dict[str, float]
    fingerprints: dict[str, str]
    sources: tuple[Source, ...]
    index_file: str = "index.faiss"
    lists_file: str | None = None
    removed_file: str | None = None
    queries_file: str | None = None
    generation: int = 0
    measured: int = 0
    files: dict[str, str] = field(default_factory=dict)

    @property
    def live(self) -> int:
        """Rows that a search may find."""
        return self.rows - self.removed

    @property
    def names(self) -> list[str]:
        """Every file that belongs to the index, but for the card itself."""
        own = (self.index_file, self.lists_file, self.removed_file, self.queries_file)
        of_sources = [name for source in self.sources for name in source.names]
        return [*of_sources, *(name for name in own if name is not None)]

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where model and data of the first rows lie."""
        return self.sources[0].origin

    def reached_by(self, queries: str) -> Reached:
        """What it finds for one kind of query.

        Raises:
            KeyError: That kind was not measured.
        """
        return {one.queries: one for one in self.reached}[queries]

    @classmethod
    def load(cls, folder: Path) -> "IndexCard":
        """Read `index.json`.

        Raises:
            FileNotFoundError: The folder holds no index.
            ValueError: The file is damaged or of another version.
        """
        return read_card(
            folder / "index.json",
            version=INDEX_VERSION,
            kind="an index",
            again="build the index again",
            read=cls._of,
        )

    @classmethod
    def _of(cls, value: dict[str, Any]) -> "IndexCard":
        value["reached"] = tuple(_reached(**one) for one in value["reached"])
        value["speed"] = tuple(Speed(**one) for one in value["speed"])
        value["sources"] = tuple(
            Source(**{**one, "vectors": tuple(one["vectors"]), "metadata": tuple(one["metadata"])})
            for one in value["sources"]
        )
        return cls(**value)

    def save(self, folder: Path) -> None:
        """Write `index.json` whole."""
        write_card(folder / "index.json", INDEX_VERSION, asdict(self))


def _reached(queries: str, against_exact: list[Any], own_pair: dict[str, list[Any]]) -> Reached:
    return Reached(
        queries,
        tuple(Figure(**one) for one in against_exact),
        {how: tuple(Figure(**one) for one in figures) for how, figures in own_pair.items()},
    )
