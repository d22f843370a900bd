"""Building an index: trained on a sample, filled part by part, measured, written whole."""

import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from align.folders import whole_folder
from eval.index.card import IndexCard
from eval.index.folder import faiss_call, set_knobs, take_rows, with_checksums
from eval.index.recall import draw_queries, reached, speed
from eval.table import EmbeddingTable

Progress = Callable[[str, int, int], None]
"""Told of long work: what it is, how much is done, of how much."""


def build_index(
    table: EmbeddingTable,
    out: Path | str,
    *,
    factory: str = "Flat",
    knobs: str = "",
    modality: str = "image",
    train_rows: int = 262_144,
    query_count: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> IndexCard:
    """Build an index of one modality of a table; the folder appears whole or not at all.

    Memory is the index, `train_rows` vectors while training, then one part of the table.

    Args:
        table: Where the vectors come from.
        out: The index folder; an index that is there is replaced.
        factory: FAISS factory string. Vectors have unit length, scores are cosines.
        knobs: Search parameters kept with the index, comma separated (`nprobe=16`).
        modality: Which embeddings to index.
        train_rows: At most so many rows, drawn at random, train the index.
        query_count: How many queries of each kind measure it.
        seed: Draws the rows for training and the queries.
        progress: Told of long work.

    Raises:
        ValueError: An option is out of range, `out` holds something else, or FAISS refuses the
            factory string, the knobs, or the number of rows.
    """
    out = Path(out)
    refuse_strangers(out)
    if train_rows < 1 or query_count < 1:
        raise ValueError(
            f"train_rows {train_rows} and query_count {query_count} must be at least 1"
        )
    generator = np.random.default_rng(seed)
    started = time.perf_counter()
    training = table.vectors(modality, _draw(generator, table.rows, train_rows))
    index = filled(table, modality, factory, training, progress=progress)
    set_knobs(index, knobs)
    seconds = time.perf_counter() - started
    asked = draw_queries(table, modality, count=query_count, generator=generator)
    with whole_folder(out) as folder:
        faiss.write_index(index, str(folder / "index.faiss"))
        source = take_rows(table, modality, folder, number=0, first_id=0, first_part=0)
        card = IndexCard(
            factory=factory,
            knobs=knobs,
            tuned_for=None,
            target_recall=None,
            modality=modality,
            rows=table.rows,
            removed=0,
            dim=table.card.dim,
            bytes_per_vector=(folder / "index.faiss").stat().st_size / table.rows,
            build_seconds=seconds,
            reached=reached(index, table, modality, asked),
            speed=tuple(speed(index, next(iter(asked.values())).vectors)),
            costs={},
            fingerprints={k: v for k, v in table.card.fingerprints.items() if k != "data"},
            sources=(source,),
        )
        card = with_checksums(card, folder)
        card.save(folder)
    return card


def filled(
    table: EmbeddingTable,
    modality: str,
    factory: str,
    training: Float32[ndarray, "some dim"],
    *,
    progress: Progress | None = None,
) -> faiss.Index:
    """A FAISS index that is trained on these vectors and holds all rows of a table.

    Raises:
        ValueError: FAISS refuses the factory string or the number of training rows.
    """
    what = f"index factory {factory!r}"
    index = faiss_call(
        what, lambda: faiss.index_factory(table.card.dim, factory, faiss.METRIC_INNER_PRODUCT)
    )
    if not index.is_trained:
        if progress:
            progress("train", 0, 1)
        faiss_call(what, lambda: index.train(training))
        if progress:
            progress("train", 1, 1)
    for part in table.parts(modality):
        faiss_call(what, lambda part=part: index.add(part))
        if progress:
            progress("add", index.ntotal, table.rows)
    return index


def refuse_strangers(out: Path) -> None:
    """An index may only replace an index.

    Raises:
        ValueError: The folder holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "index.json").exists():
        raise ValueError(f"{out}: holds something other than an index; choose another folder")


def _draw(generator: np.random.Generator, rows: int, count: int) -> Int64[ndarray, " drawn"]:
    return np.sort(generator.choice(rows, size=min(rows, count), replace=False))
