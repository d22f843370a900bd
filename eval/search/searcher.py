"""Search in an index folder: vectors in, full lists of hits with their metadata out."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from eval.index.folder import open_index
from eval.metrics import check_rows
from eval.search.diverse import collapse_copies, spread
from eval.search.engine import Engine
from eval.search.filters import Allowed, RowFilter
from eval.search.hits import FieldSummary, Hits, Neighbours
from eval.search.plan import Plan, Planner
from eval.search.ranking import Ranking
from eval.search.summary import summaries
from eval.table import unit_rows

__all__ = ["FieldSummary", "Hits", "Neighbours", "SampleId", "Searcher"]

SampleId = int | np.integer
"""A stable sample id, as Python or NumPy count."""

_POOL = 5
"""Candidates for each hit of a page, among which hits unlike each other are picked."""


@dataclass(frozen=True)
class _Picked:
    """Some hits of one query, and how many near-duplicates each stands for."""

    rows: Int64[ndarray, " hits"]
    scores: Float32[ndarray, " hits"]
    copies: Int64[ndarray, " hits"]

    def at(self, places: Int64[ndarray, " some"], copies: Int64[ndarray, " some"]) -> "_Picked":
        """Those at these places, standing for so many."""
        return _Picked(self.rows[places], self.scores[places], copies)

    def first(self, count: int) -> "_Picked":
        """The first so many."""
        return _Picked(self.rows[:count], self.scores[:count], self.copies[:count])


class Searcher:
    """An open index that answers queries; many threads may ask at once.

    Args:
        folder: The index folder.
        check: As in :func:`eval.index.open_index`.
        memory_map: As in :func:`eval.index.open_index`.

    Raises:
        FileNotFoundError: As :func:`eval.index.open_index`.
        ValueError: As :func:`eval.index.open_index`.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        check: Literal["sha256", "sizes"] = "sha256",
        memory_map: bool = False,
    ) -> None:
        opened = open_index(folder, check=check, memory_map=memory_map)
        self.card = opened.card
        self.rows = opened.rows
        self._planner = Planner(Engine(opened.index), opened.rows, opened.card)
        self._filter = RowFilter(opened.rows, opened.removed)

    @property
    def ids(self) -> Int64[ndarray, " rows"]:
        """The sample id of each row, ascending; removed ones included."""
        return self.rows.ids

    @property
    def live(self) -> int:
        """How many rows can be found."""
        return self.card.rows - self.card.removed

    def search(
        self,
        vectors: Float[ndarray, "queries dim"],
        k: int,
        *,
        where: str | None = None,
        fields: Mapping[str, Any] | None = None,
        exclude: Sequence[Collection[SampleId]] | None = None,
        min_score: float | None = None,
        collapse: float | None = None,
        diversity: float = 0.0,
        offset: int = 0,
        plan: Plan = "auto",
    ) -> Hits:
        """The `k` most similar rows of each query with their metadata; all where there are fewer.

        Args:
            vectors: Queries of any length but zero.
            k: Hits per query.
            where: An SQL expression over the metadata columns, such as `year > 2000`.
            fields: What fields must hold, as :func:`eval.search.fields.conditions` says.
            exclude: Per query the sample ids that may not be among its hits; ids that the index
                does not hold are ignored.
            min_score: Hits score at least so much.
            collapse: Rows at least so similar to a better hit are counted as its copies.
            diversity: From 0, the most similar, to 1, as unlike each other as can be.
            offset: So many hits are left out first: the next page of a list.
            plan: How to look under filters; `auto` takes what is quickest.

        Raises:
            ValueError: As :meth:`neighbours`.
        """
        _check_options(min_score, collapse, diversity, offset)
        _check_count(k)
        allowed = self._filter.allowed(where, fields)
        first = k * (1 if diversity == 0 else _POOL) * (1 if collapse is None else 2)
        ranking = self._ranking(vectors, first, allowed, exclude, plan)
        picked = self._picked(
            ranking,
            offset + k,
            page=k,
            min_score=-np.inf if min_score is None else min_score,
            collapse=collapse,
            diversity=diversity,
        )
        pages = [(one.rows[offset:], one.scores[offset:], one.copies[offset:]) for one in picked]
        matching = self.card.rows if allowed is None else allowed.count
        width = max(min(k, matching - offset), 0)
        ids = np.full((len(vectors), width), -1, np.int64)
        scores = np.full((len(vectors), width), -np.inf, np.float32)
        copies = np.zeros((len(vectors), width), np.int64)
        for query, (rows, cosines, stands_for) in enumerate(pages):
            ids[query, : len(rows)] = self.ids[rows]
            scores[query, : len(rows)] = cosines
            copies[query, : len(rows)] = stands_for
        metadata = [self.rows.metadata(rows) for rows, *_ in pages]
        return Hits(ids, scores, metadata, matching, ranking.plan, copies)

    def neighbours(
        self,
        vectors: Float[ndarray, "queries dim"],
        k: int,
        *,
        exclude: Sequence[Collection[SampleId]] | None = None,
        plan: Plan = "auto",
    ) -> Neighbours:
        """As :meth:`search`, without looking up the metadata.

        A list that the index leaves short (IVF with too few probes, a graph with an unreachable
        corner) is completed by exact search over the index's own vectors.

        Raises:
            ValueError: `k` is below 1, the vectors are not as wide as the index, one of them has no
                direction (NaN, infinity, zeros), or `exclude` has another length.
        """
        _check_count(k)
        live = self._filter.live
        ranking = self._ranking(vectors, k, live, exclude, plan)
        ranking.deepen(k)
        width = min(k, self.live)
        ids = np.full((len(vectors), width), -1, np.int64)
        scores = np.full((len(vectors), width), -np.inf, np.float32)
        for query, (rows, found) in enumerate(zip(ranking.rows, ranking.scores, strict=True)):
            ids[query, : len(rows)] = self.ids[rows[:width]]
            scores[query, : len(rows)] = found[:width]
        return Neighbours(ids, scores)

    def similar(self, ids: Sequence[SampleId], k: int, **options: Any) -> Hits:
        """Rows like these rows of the index, each without itself.

        Args:
            ids: Stable sample ids; their stored vectors are the queries.
            k: Hits per row.
            **options: As :meth:`search`.

        Raises:
            ValueError: The index does not hold one of them, or as :meth:`search`.
        """
        exclude = options.pop("exclude", None) or [()] * len(ids)
        also = [{*some, one} for some, one in zip(exclude, ids, strict=True)]
        rows = self._held(np.array(list(ids), np.int64))
        return self.search(self.rows.vectors(rows), k, exclude=also, **options)

    def metadata(self, ids: Int64[ndarray, " hits"]) -> list[dict[str, Any]]:
        """The metadata of these samples, in this order.

        Raises:
            ValueError: The index does not hold one of them.
        """
        return self.rows.metadata(self._held(ids))

    def fields(self) -> list[FieldSummary]:
        """What the columns of the metadata hold, for a page's filters."""
        return self._fields

    @cached_property
    def _fields(self) -> list[FieldSummary]:
        return summaries(self._filter)

    def places(self, ids: Int64[ndarray, " some"]) -> Int64[ndarray, " some"]:
        """Row numbers of sample ids, -1 for those that the index does not hold or not any more."""
        rows = self.rows.places(ids)
        return (
            rows if self._filter.live is None else np.where(self._filter.live.has(rows), rows, -1)
        )

    def _held(self, ids: Int64[ndarray, " some"]) -> Int64[ndarray, " some"]:
        rows = self.places(ids)
        if (rows < 0).any():
            raise ValueError(f"the index holds no sample with id {ids[np.argmin(rows)]}")
        return rows

    def _ranking(
        self,
        vectors: Float[ndarray, "queries dim"],
        first: int,
        allowed: Allowed | None,
        exclude: Sequence[Collection[SampleId]] | None,
        plan: Plan,
    ) -> Ranking:
        self._check(vectors, exclude)
        return Ranking(
            self._planner,
            unit_rows(vectors),
            first=first,
            allowed=allowed,
            banned=[self.rows.held(some) for some in exclude or [()] * len(vectors)],
            plan=plan,
        )

    def _picked(
        self,
        ranking: Ranking,
        count: int,
        *,
        page: int,
        min_score: float,
        collapse: float | None,
        diversity: float,
    ) -> list[_Picked]:
        """The first so many hits of every list."""
        wanted = count if diversity == 0 else _POOL * count
        depth = wanted if collapse is None else 2 * wanted
        while True:
            ranking.deepen(depth)
            picked, all_full = [], True
            for rows, scores in zip(ranking.rows, ranking.scores, strict=True):
                good = scores >= min_score
                left = _Picked(rows[good], scores[good], np.zeros(good.sum(), np.int64))
                if collapse is not None:
                    vectors = self.rows.vectors(left.rows)
                    kept = collapse_copies(vectors, collapse, wanted)
                    all_full &= len(kept.places) == wanted or not good.all()
                    left = left.at(kept.places, kept.copies)
                picked.append(left)
            if collapse is None or all_full or ranking.whole:
                break
            depth *= 2
        if diversity == 0:
            return [one.first(count) for one in picked]
        return [self._spread(one, count, page, diversity) for one in picked]

    def _spread(self, hits: _Picked, count: int, page: int, diversity: float) -> _Picked:
        places = spread(
            hits.scores,
            self.rows.vectors(hits.rows),
            count=count,
            diversity=diversity,
            page=page,
            pool=_POOL * page,
        )
        return hits.at(places, hits.copies[places])

    def _check(
        self,
        vectors: Float[ndarray, "queries dim"],
        exclude: Sequence[Collection[SampleId]] | None,
    ) -> None:
        if vectors.shape[1] != self.card.dim:
            raise ValueError(
                f"queries are {vectors.shape[1]} wide, but the index holds vectors of "
                f"{self.card.dim}: they are not from the model of this index"
            )
        if exclude is not None and len(exclude) != len(vectors):
            raise ValueError(f"exclude: {len(exclude)} entries for {len(vectors)} queries")
        check_rows(vectors, "query")


def _check_count(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")


def _check_options(
    min_score: float | None, collapse: float | None, diversity: float, offset: int
) -> None:
    if min_score is not None and not np.isfinite(min_score):
        raise ValueError(f"min_score must be a number, not {min_score}")
    if collapse is not None and not 0 < collapse <= 1:
        raise ValueError(f"collapse must be above 0 and at most 1, not {collapse}")
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity must be from 0 to 1, not {diversity}")
    if offset < 0:
        raise ValueError(f"offset must be at least 0, not {offset}")
