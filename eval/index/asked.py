"""The queries that measured an index, kept beside it: a change of the index measures it again.

They stand in one `.npz` file: for each kind the vectors, and the numbers of the rows that are each
query's own and its one right answer, as :class:`eval.index.recall.Queries` has them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from eval.index.card import IndexCard
from eval.index.recall import Queries, answer_exactly, reached, speed
from eval.index.rows import IndexRows
from eval.table import unit_rows

Asked = Mapping[str, Queries]
"""Queries by their kind."""


def keep_queries(asked: Asked, folder: Path, *, generation: int = 0) -> str:
    """Write queries into an index folder, in float16; return the file's name."""
    name = f"queries-{generation}.npz"
    arrays = {}
    for kind, one in asked.items():
        arrays[f"{kind}.vectors"] = one.vectors.astype(np.float16)
        arrays[f"{kind}.own"] = one.own
        arrays[f"{kind}.right"] = one.right
    with (folder / name).open("wb") as file:
        np.savez(file, **arrays)
    return name


def kept_queries(folder: Path, card: IndexCard) -> dict[str, Queries]:
    """The queries of an index folder, not answered yet; none where none were kept."""
    if card.queries_file is None:
        return {}
    with np.load(folder / card.queries_file, allow_pickle=False) as file:
        kinds = dict.fromkeys(name.partition(".")[0] for name in file.files)
        return {
            kind: _unanswered(
                kind, unit_rows(file[f"{kind}.vectors"]), file[f"{kind}.own"], file[f"{kind}.right"]
            )
            for kind in kinds
        }


def _unanswered(kind: str, vectors: ndarray, own: ndarray, right: ndarray) -> Queries:
    none = np.empty((len(vectors), 0))
    return Queries(kind, vectors, own, right, none.astype(np.float32), none.astype(np.int64))


def joined(before: Asked, more: Asked, *, share: float) -> dict[str, Queries]:
    """As many queries of each kind as before, this share of them from among `more`.

    They are taken at even steps; of a kind that only one side has, all of it.
    """
    found = {**more, **before}
    for kind in set(before) & set(more):
        one, other = before[kind], more[kind]
        new = min(len(other.vectors), round(share * len(one.vectors)))
        old = _even(len(one.vectors), len(one.vectors) - new)
        added = _even(len(other.vectors), new)
        found[kind] = _unanswered(
            kind,
            np.concatenate([one.vectors[old], other.vectors[added]]),
            np.concatenate([one.own[old], other.own[added]]),
            np.concatenate([one.right[old], other.right[added]]),
        )
    return found


def _even(count: int, some: int) -> Int64[ndarray, " some"]:
    """So many of `count` places, at even steps."""
    return np.arange(some) * count // max(1, some)


def shifted(asked: Asked, first_row: int) -> dict[str, Queries]:
    """Queries of a table whose rows follow others in an index."""
    return {
        kind: replace(
            one,
            own=np.where(one.own < 0, -1, one.own + first_row),
            right=np.where(one.right < 0, -1, one.right + first_row),
        )
        for kind, one in asked.items()
    }


def renumbered(asked: Asked, rows: Int64[ndarray, " before"]) -> dict[str, Queries]:
    """Queries after rows were taken out of an index: without those whose right answer is gone.

    Args:
        asked: Queries.
        rows: For each row before, its number now; -1 where it is gone.
    """
    found = {}
    for kind, one in asked.items():
        right = np.where(one.right < 0, -1, rows[one.right])
        stays = np.flatnonzero((one.right < 0) | (right >= 0))
        own = np.where(one.own < 0, -1, rows[one.own])
        if len(stays):
            found[kind] = _unanswered(kind, one.vectors[stays], own[stays], right[stays])
    return found


class _Held:
    """The rows of an index, as measuring asks a table for them."""

    def __init__(self, rows: IndexRows) -> None:
        self._rows = rows

    def vectors(self, modality: str, rows: Int64[ndarray, " rows"]) -> Float32[ndarray, "rows dim"]:
        """Unit-length rows by row number, of the one modality that there is."""
        del modality
        return self._rows.vectors(rows)


def measured_again(card: IndexCard, index: faiss.Index, rows: IndexRows, asked: Asked) -> IndexCard:
    """The card with what an index reaches now, its knobs set; unchanged without queries.

    Exact search passes over all vectors once, on disk.
    """
    if not asked:
        return card
    pairs = {kind: (one.vectors, one.own) for kind, one in asked.items()}
    answers = answer_exactly(pairs, rows.blocks())
    answered = {
        kind: replace(one, scores=answers[kind][0], rows=answers[kind][1])
        for kind, one in asked.items()
    }
    kind = card.tuned_for if card.tuned_for in answered else next(iter(answered))
    speeds = tuple(speed(index, answered[kind].vectors))
    alone = next(one for one in speeds if one.threads == 1)
    return replace(
        card,
        reached=reached(index, _Held(rows), card.modality, answered),
        speed=speeds,
        costs={**card.costs, "query_s": 1 / alone.queries_per_second},
        measured=card.generation,
    )
