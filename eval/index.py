"""A FAISS index over an embedding table, behind a factory string, with a card of what it reaches.

An index folder stands alone (the table may be moved or deleted):

    index.faiss        unit-length vectors under the inner product
    metadata.parquet   the table's metadata; row i belongs to vector i
    index.json         the card: factory, rows, recall against exact search, fingerprints, checksums

Open only indexes you trust: FAISS reads its own files without regard for hostile bytes.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth
from jaxtyping import Float32, Int64
from numpy import ndarray
from pyarrow import parquet

from align.folders import whole_folder
from eval.intervals import bootstrap_mean
from eval.results import Figure
from eval.table import EmbeddingTable, file_sha256

INDEX_VERSION = 1
"""Version of `index.json`; a reader refuses any other."""

_TIE = 1e-6
"""Scores this near are equal: float32 products differ by as much between two kinds of search."""


@dataclass(frozen=True)
class IndexCard:
    """The content of `index.json`.

    Attributes:
        factory: FAISS factory string, e.g. `Flat` or `IVF1024,PQ64`.
        knobs: FAISS search parameters, e.g. `nprobe=16`; empty where there are none.
        modality: Which embeddings of the table are in it.
        rows: How many.
        dim: Length of a vector.
        bytes_per_vector: Size of the index file by row.
        build_seconds: Training and adding, without measuring the recall.
        recall: Recall@10 of this index against exact search, with its interval.
        recall_queries: What was asked to measure it: `text`, or `image` (each without itself).
        fingerprints: Model and data of the rows, as in the table.
        origin: Free values of the table.
        files: SHA-256 of the other files of the folder.
    """

    factory: str
    knobs: str
    modality: str
    rows: int
    dim: int
    bytes_per_vector: float
    build_seconds: float
    recall: Figure
    recall_queries: str
    fingerprints: dict[str, str]
    origin: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "IndexCard":
        """Read `index.json`.

        Raises:
            FileNotFoundError: The folder holds no index.
            ValueError: The file is damaged or of another version.
        """
        path = folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: not an index (no index.json in it)")
        try:
            value = json.loads(path.read_bytes())
            version = value.pop("version")
            if version != INDEX_VERSION:
                raise ValueError(f"version {version}, but this release reads {INDEX_VERSION}")
            return cls(**{**value, "recall": Figure(**value["recall"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not readable ({error}); build the index again") from error


@dataclass(frozen=True)
class OpenIndex:
    """An index that was checked on opening.

    Attributes:
        index: The FAISS index.
        card: What its folder says of it.
        metadata_path: The Parquet file whose row i belongs to vector i.
    """

    index: faiss.Index
    card: IndexCard
    metadata_path: Path


def build_index(
    table: EmbeddingTable,
    out: Path | str,
    *,
    factory: str = "Flat",
    knobs: str = "",
    modality: str = "image",
    train_rows: int = 262_144,
    recall_queries: int = 1000,
    seed: int = 0,
) -> IndexCard:
    """Build an index of one modality of a table; the folder appears whole or not at all.

    Memory is the index, `train_rows` vectors while training, then one part of the table.

    Args:
        table: Where the vectors come from.
        out: The index folder; an index that is there is replaced.
        factory: FAISS factory string; vectors have unit length, scores are cosines.
        knobs: Search parameters kept with the index, comma separated (`nprobe=16`).
        modality: Which embeddings to index.
        train_rows: At most so many rows, drawn at random, train the index.
        recall_queries: How many queries measure the recall. They are texts where the table has any,
            for an index that is good at its own vectors may be poor at what will be asked.
        seed: Draws the rows for training and the queries.

    Raises:
        ValueError: An option is out of range, `out` holds something else, or FAISS refuses the
            factory string, the knobs, or the number of training rows.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / "index.json").exists():
        raise ValueError(f"{out}: holds something other than an index; choose another folder")
    if train_rows < 1 or recall_queries < 1:
        raise ValueError(
            f"train_rows {train_rows} and recall_queries {recall_queries} must be at least 1"
        )
    generator = np.random.default_rng(seed)
    started = time.perf_counter()
    index = _faiss(
        f"index factory {factory!r}",
        lambda: faiss.index_factory(table.card.dim, factory, faiss.METRIC_INNER_PRODUCT),
    )
    if not index.is_trained:
        sample = _draw(generator, table.rows, train_rows)
        vectors = table.vectors(modality, sample)
        _faiss(f"index factory {factory!r}", lambda: index.train(vectors))
        del vectors
    for part in table.parts(modality):
        _faiss(f"index factory {factory!r}", lambda part=part: index.add(part))
    if knobs:
        space = faiss.ParameterSpace()
        _faiss(f"index knobs {knobs!r}", lambda: space.set_index_parameters(index, knobs))
    seconds = time.perf_counter() - started
    asked = "text" if "text" in table.card.modalities else "image"
    rows = _draw(generator, table.rows, recall_queries)
    recall = index_recall(index, table, modality=modality, asked=asked, rows=rows)
    with whole_folder(out) as folder:
        faiss.write_index(index, str(folder / "index.faiss"))
        _write_metadata(table, folder / "metadata.parquet")
        names = ("index.faiss", "metadata.parquet")
        card = IndexCard(
            factory=factory,
            knobs=knobs,
            modality=modality,
            rows=table.rows,
            dim=table.card.dim,
            bytes_per_vector=(folder / "index.faiss").stat().st_size / table.rows,
            build_seconds=seconds,
            recall=recall,
            recall_queries=asked,
            fingerprints=table.card.fingerprints,
            origin=table.card.origin,
            files={name: file_sha256(folder / name) for name in names},
        )
        text = json.dumps({"version": INDEX_VERSION, **asdict(card)}, indent=1)
        (folder / "index.json").write_text(text, encoding="utf-8")
    return card


def open_index(folder: Path | str, *, check: Literal["sha256", "sizes"] = "sha256") -> OpenIndex:
    """Open an index and compare its files with its card.

    Args:
        folder: The index folder.
        check: `sha256` reads every file once and compares; `sizes` only compares counts.

    Raises:
        FileNotFoundError: There is no index, or one of its files is missing.
        ValueError: A file was changed or does not fit the card; the line names it.
    """
    folder = Path(folder)
    card = IndexCard.load(folder)
    for name, expected in card.files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: this file of the index is missing; build it again")
        if check == "sha256" and file_sha256(path) != expected:
            raise ValueError(f"{path}: changed since it was written; build the index again")
    path = folder / "index.faiss"
    index = _faiss(f"{path}", lambda: faiss.read_index(str(path)))
    if (index.ntotal, index.d) != (card.rows, card.dim):
        raise ValueError(
            f"{path}: holds {index.ntotal} vectors of {index.d}, index.json says {card.rows} of "
            f"{card.dim}; build the index again"
        )
    metadata = folder / "metadata.parquet"
    if (rows := parquet.read_metadata(metadata).num_rows) != card.rows:
        raise ValueError(f"{metadata}: {rows} rows for {card.rows} vectors; build the index again")
    return OpenIndex(index=index, card=card, metadata_path=metadata)


def exact_neighbours(
    queries: Float32[ndarray, "queries dim"],
    blocks: Iterable[Float32[ndarray, "_ dim"]],
    k: int,
) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
    """Scores and rows of the `k` best of all blocks by exact search, one block in memory at a time.

    There must be at least `k` vectors in all.
    """
    return knn_ground_truth(queries, blocks, k, faiss.METRIC_INNER_PRODUCT)


def index_recall(
    index: faiss.Index,
    table: EmbeddingTable,
    *,
    modality: str,
    asked: str,
    rows: Int64[ndarray, " queries"],
) -> Figure:
    """Recall@10 of an index against exact search, over given rows of the table as queries.

    Per query the share of the returned rows whose score reaches the exact tenth best; rows with
    equal vectors may stand for each other. A query of the index's own modality is not counted as
    its own neighbour. With fewer than ten candidates, all of them are asked for.
    """
    queries = table.vectors(asked, rows)
    own = 1 if asked == modality else 0
    k = min(10, table.rows - own)
    if k == 0:  # a single row, asked for its neighbours: nothing can be missed
        return Figure.of("recall@10 against exact", bootstrap_mean(np.ones(len(rows))))
    floor, _ = exact_neighbours(queries, table.parts(modality), k + own)
    _, found = index.search(queries, k + own)
    hits = np.zeros(len(rows))
    for query, row in enumerate(rows):
        listed = found[query][found[query] >= 0]
        if own:
            listed = listed[listed != row]
        scores = table.vectors(modality, listed[:k]) @ queries[query]
        hits[query] = np.count_nonzero(scores >= floor[query, -1] - _TIE) / k
    return Figure.of("recall@10 against exact", bootstrap_mean(hits))


def _draw(generator: np.random.Generator, rows: int, count: int) -> Int64[ndarray, " drawn"]:
    return np.sort(generator.choice(rows, size=min(rows, count), replace=False))


def _write_metadata(table: EmbeddingTable, path: Path) -> None:
    schema = table.metadata_schema()
    with parquet.ParquetWriter(path, schema) as writer:
        for part in table.metadata_parts(schema):
            writer.write_table(part)


def _faiss(what: str, call: Callable[[], Any]) -> Any:
    """Run a FAISS call; its errors, many lines with C++ names, become one."""
    try:
        return call()
    except RuntimeError as error:
        line = " ".join(str(error).split())
        said = line.rsplit(" failed: ", 1)[-1] if " failed: " in line else line.rsplit(": ", 1)[-1]
        raise ValueError(f"{what}: FAISS says: {said}") from error
