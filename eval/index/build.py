"""Building an index: trained on a sample, filled part by part, tuned, measured, written whole."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from align.folders import whole_folder
from eval.index.asked import keep_queries
from eval.index.blocks import blocks
from eval.index.card import IndexCard, Reached, Source, Speed
from eval.index.choose import (
    PILOT_QUERIES,
    PILOT_ROWS,
    Candidate,
    candidates,
    estimated_bytes,
    piloted,
)
from eval.index.folder import faiss_call, set_knobs, take_rows, with_checksums, write_faiss
from eval.index.recall import Queries, draw_queries, measured_costs, reached, speed
from eval.index.rows import IndexRows
from eval.index.train import Progress, trained, training_vectors
from eval.index.tune import Tuned, tune
from eval.table import EmbeddingTable

TUNING, MEASURING = slice(0, None, 2), slice(1, None, 2)
"""Which of the drawn queries tune an index, and which measure it."""

_BUILDS = 3
"""Indexes that `auto` builds at most."""


@dataclass(frozen=True)
class Aim:
    """What an index is built for.

    Attributes:
        target_recall: Recall@10 against exact search.
        max_bytes: Most that it may take; None for no limit.
        knobs: Search parameters; tuned where there are none.
    """

    target_recall: float
    max_bytes: int | None
    knobs: str


@dataclass(frozen=True)
class Measured:
    """An index after tuning: the facts that its card states of it.

    Attributes:
        knobs: The search parameters, set on the index.
        tuned_for: The kind of queries they were tuned on; None where they were given.
        target_recall: What was tuned for; None where knobs were given.
        modality: Which embeddings are in it.
        reached: By kind of query, on queries that tuning has not seen.
        speed: At one thread and at all.
        tune_seconds: What tuning took, its exact answers included.
        asked: The queries of `reached`.
    """

    knobs: str
    tuned_for: str | None
    target_recall: float | None
    modality: str
    reached: tuple[Reached, ...]
    speed: tuple[Speed, ...]
    tune_seconds: float
    asked: dict[str, Queries]


def build_index(
    table: EmbeddingTable,
    out: Path | str,
    *,
    factory: str = "auto",
    knobs: str = "",
    modality: str = "image",
    queries: str | None = None,
    target_recall: float = 0.95,
    max_bytes: int | None = None,
    train_rows: int = 262_144,
    query_count: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> IndexCard:
    """Build an index of one modality of a table; the folder appears whole or not at all.

    Memory is the index, at most `train_rows` vectors while training, then one block of the table.

    Args:
        table: Where the vectors come from.
        out: The index folder; an index that is there is replaced.
        factory: FAISS factory string, or `auto`. Vectors have unit length, scores are cosines.
        knobs: Search parameters kept with the index, comma separated (`nprobe=16`); tuned where
            there are none.
        modality: Which embeddings to index.
        queries: The kind of queries to tune for, as :func:`draw_queries` names them; by default
            the one that :func:`kind_asked` tells.
        target_recall: Recall@10 against exact search that tuning aims at.
        max_bytes: Most that the FAISS index may take, in memory as on disk.
        train_rows: At most so many rows, drawn at random, train the index.
        query_count: How many queries of each kind are drawn; half of them tune, half measure.
        seed: Draws the rows for training and the queries.
        progress: Told of long work.

    Raises:
        ValueError: An option is out of range, `out` holds something else, a vector is not finite,
            or FAISS refuses the factory string, the knobs, or the number of rows.
    """
    out = Path(out)
    refuse_strangers(out)
    _check_options(train_rows, query_count, target_recall)
    generator = np.random.default_rng(seed)
    started = time.perf_counter()
    training = training_vectors(table, modality, count=train_rows, generator=generator)
    if progress:
        progress("exact answers", 0, 1)
    drawn = draw_queries(table, modality, count=query_count, generator=generator)
    if progress:
        progress("exact answers", 1, 1)
    asked = drawn[kind_asked(drawn, modality, queries)].some(TUNING)
    aim = Aim(target_recall, max_bytes, knobs)
    if factory == "auto":
        tried = worth_building(table, training, asked, aim)
    else:
        tried = [given(factory, table, max_bytes)]
    index, factory, tuned = best_built(table, modality, training, asked, tried, aim, progress)
    del training
    seconds = time.perf_counter() - started
    facts = finished(
        index, table, modality, knobs=knobs, queries=asked.kind, target_recall=target_recall,
        drawn=drawn, tuned=tuned, seed=seed, progress=progress,
    )  # fmt: skip
    with whole_folder(out) as folder:
        digest = write_faiss(index, folder / "index.faiss")
        source = take_rows(table, modality, folder, number=0, first_id=0, first_part=0)
        size = (folder / "index.faiss").stat().st_size
        card = card_of(
            table, source, facts, folder, index, factory=factory, size=size, seconds=seconds
        )
        card = replace(card, files={"index.faiss": digest})
        _check_size(card, max_bytes)
        card = with_checksums(card, folder)
        card.save(folder)
    return card


def card_of(
    table: EmbeddingTable,
    source: Source,
    facts: Measured,
    folder: Path,
    index: faiss.Index,
    *,
    factory: str,
    size: int,
    seconds: float,
) -> IndexCard:
    """The card of a new index over one table, whose queries are written into its folder.

    Args:
        table: The one.
        source: Its rows as they lie in the folder.
        facts: Of the index after tuning.
        folder: The index folder.
        index: The FAISS index.
        factory: Its factory string.
        size: Bytes of it on disk.
        seconds: Before tuning.
    """
    return IndexCard(
        factory=factory,
        knobs=facts.knobs,
        tuned_for=facts.tuned_for,
        target_recall=facts.target_recall,
        modality=facts.modality,
        rows=table.rows,
        removed=0,
        dim=table.card.dim,
        bytes_per_vector=size / table.rows,
        build_seconds=seconds + facts.tune_seconds,
        reached=facts.reached,
        speed=facts.speed,
        costs=measured_costs(IndexRows(folder, (source,), index), facts.speed),
        fingerprints={k: v for k, v in table.card.fingerprints.items() if k != "data"},
        sources=(source,),
        queries_file=keep_queries(facts.asked, folder),
    )


def add_parts(
    index: faiss.Index,
    table: EmbeddingTable,
    modality: str,
    parts: range,
    *,
    progress: Progress | None = None,
) -> None:
    """Add these parts of a table to a trained index, in order, a block at a time.

    Raises:
        ValueError: A vector has no direction (NaN, infinity, zeros), named by file and row; or
            FAISS refuses to add.
    """
    rows = sum(table.card.parts[number].rows for number in parts)
    before, what = index.ntotal, f"index of FAISS type {type(faiss.downcast_index(index)).__name__}"
    for block in blocks(table, modality, parts):
        faiss_call(what, lambda block=block: index.add(block))
        if progress:
            progress("add", index.ntotal - before, rows)


def finished(
    index: faiss.Index,
    table: EmbeddingTable,
    modality: str,
    *,
    knobs: str = "",
    queries: str | None = None,
    target_recall: float = 0.95,
    query_count: int = 1000,
    seed: int = 0,
    drawn: dict[str, Queries] | None = None,
    tuned: Tuned | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Tune a filled index, leave the knobs set on it, and measure what it reaches.

    Args:
        index: Holds all rows of the table, in order.
        table: Its rows.
        modality: Which embeddings are in the index.
        knobs: Search parameters; tuned where there are none.
        queries: The kind of queries to tune for.
        target_recall: Recall@10 to tune for.
        query_count: How many queries of each kind are drawn; half of them tune, half measure. All
            measure where knobs are given.
        seed: Draws the queries.
        drawn: Queries of every kind, where they were drawn before.
        tuned: What tuning on their first half found, where it was done before.
        progress: Told of long work.

    Raises:
        ValueError: FAISS does not know a knob, or the table allows no queries of that kind.
    """
    started = time.perf_counter()
    if knobs:
        set_knobs(index, knobs)
    if drawn is None:
        if progress:
            progress("exact answers", 0, 1)
        generator = np.random.default_rng(seed)
        drawn = draw_queries(table, modality, count=query_count, generator=generator)
    kind = kind_asked(drawn, modality, queries)
    held_out = drawn
    if not knobs and len(drawn[kind].vectors) > 1:
        tuned = tuned or _tuned(index, table, modality, drawn[kind].some(TUNING), target_recall,
                                progress)  # fmt: skip
        held_out = {name: one.some(MEASURING) for name, one in drawn.items()}
        set_knobs(index, tuned.knobs)
    tune_seconds = time.perf_counter() - started
    if progress:
        progress("measure", 0, 1)
    reach = reached(index, table, modality, held_out)
    measured = tuple(speed(index, drawn[kind].vectors))
    if progress:
        progress("measure", 1, 1)
    return Measured(
        knobs=tuned.knobs if tuned else knobs,
        tuned_for=kind if tuned else None,
        target_recall=target_recall if tuned else None,
        modality=modality,
        reached=reach,
        speed=measured,
        tune_seconds=tune_seconds,
        asked=held_out,
    )


def _tuned(index: faiss.Index, table: EmbeddingTable, modality: str, asked: Queries,
           target_recall: float, progress: Progress | None) -> Tuned:  # fmt: skip
    if progress:
        progress("tune", 0, 1)
    found = tune(index, table, modality, asked, target_recall)
    if progress:
        progress("tune", 1, 1)
    return found


def kind_asked(drawn: dict[str, Queries], modality: str, queries: str | None) -> str:
    """The kind to tune for: the one named, else texts, or images where texts are indexed.

    Raises:
        ValueError: The table allows no queries of that kind.
    """
    if queries is None:
        wanted = "image" if modality == "text" else "text"
        return wanted if wanted in drawn else next(iter(drawn))
    if queries not in drawn:
        raise ValueError(
            f"queries {queries!r}: this table allows only queries of {' and '.join(drawn)}"
        )
    return queries


def refuse_strangers(out: Path) -> None:
    """An index may only replace an index.

    Raises:
        ValueError: The folder holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "index.json").exists():
        raise ValueError(f"{out}: holds something other than an index; choose another folder")


def _check_options(train_rows: int, query_count: int, target_recall: float) -> None:
    if train_rows < 1 or query_count < 1:
        raise ValueError(
            f"train_rows {train_rows} and query_count {query_count} must be at least 1"
        )
    if not 0 < target_recall <= 1:
        raise ValueError(f"target_recall {target_recall} must be above 0 and at most 1")


def given(factory: str, table: EmbeddingTable, max_bytes: int | None) -> Candidate:
    """A factory string that was asked for.

    Raises:
        ValueError: Its index would be larger than allowed.
    """
    if max_bytes is None:
        return Candidate(factory, factory, 0)
    size = estimated_bytes(factory, table.rows, table.card.dim)
    if size > max_bytes:
        raise ValueError(
            f"index factory {factory!r}: {size:,} bytes for {table.rows:,} rows of "
            f"{table.card.dim}, but max_bytes is {max_bytes:,}"
        )
    return Candidate(factory, factory, size)


def worth_building(
    table: EmbeddingTable,
    training: Float32[ndarray, "some dim"],
    asked: Queries,
    aim: Aim,
) -> list[Candidate]:
    """What `auto` builds, the first first, until one reaches the target.

    Raises:
        ValueError: Nothing fits into the memory.
    """
    rows, dim = table.rows, table.card.dim
    found = candidates(rows, dim, max_bytes=aim.max_bytes)
    if not found:
        least = min(candidates(rows, dim), key=lambda one: one.bytes)
        raise ValueError(
            f"max_bytes {aim.max_bytes:,}: {rows:,} rows of {dim} take at least {least.bytes:,} "
            f"({least.factory}); allow so much"
        )
    if len(found) == 1 or found[0].factory == "Flat":
        return found[:1]
    step = max(1, len(training) // PILOT_ROWS)
    sample = np.ascontiguousarray(training[::step][:PILOT_ROWS])
    return piloted(found, sample, asked.vectors[:PILOT_QUERIES], aim.target_recall, trained)


def best_built(
    table: EmbeddingTable,
    modality: str,
    training: Float32[ndarray, "some dim"],
    asked: Queries,
    tried: Sequence[Candidate],
    aim: Aim,
    progress: Progress | None = None,
) -> tuple[faiss.Index, str, Tuned | None]:
    """Build one candidate after the other until one reaches the target; else take the best.

    Returns:
        The index, its factory string, and what tuning found; None where knobs were given.
    """
    best: tuple[faiss.Index, str, Tuned | None] | None = None
    for candidate in tried[:_BUILDS]:
        index = trained(table.card.dim, candidate.factory, training, progress=progress)
        add_parts(index, table, modality, range(len(table.card.parts)), progress=progress)
        if aim.knobs or len(asked.vectors) < 2:
            return index, candidate.factory, None
        tuned = _tuned(index, table, modality, asked, aim.target_recall, progress)
        if best is None or best[2] is None or tuned.recall > best[2].recall:
            best = index, candidate.factory, tuned
        if tuned.enough:
            break
    assert best is not None
    return best


def _check_size(card: IndexCard, max_bytes: int | None) -> None:
    size = round(card.bytes_per_vector * card.rows)
    if max_bytes is not None and size > max_bytes:
        raise ValueError(
            f"index factory {card.factory!r}: took {size:,} bytes, but max_bytes is {max_bytes:,}"
        )
