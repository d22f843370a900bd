"""Search in an index folder: vectors in, full lists of hits with their metadata out."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from eval.index.folder import open_index
from eval.metrics import check_rows
from eval.search.exact import exact_among
from eval.search.filters import Allowed, RowFilter
from eval.search.hits import FieldSummary, Hits, Neighbours
from eval.search.summary import summaries
from eval.table import unit_rows

__all__ = ["FieldSummary", "Hits", "Neighbours", "SampleId", "Searcher"]

SampleId = int | np.integer
"""A stable sample id, as Python or NumPy count."""

Plan = Literal["auto", "exact", "selector", "overfetch"]


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
        self._index = opened.index
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
        allowed = self._filter.allowed(where, fields)
        found = self._lists(vectors, k, allowed, exclude)
        return Hits(
            found.ids,
            found.scores,
            [self.metadata(ids[ids >= 0]) for ids in found.ids],
            matching=self.card.rows if allowed is None else allowed.count,
            plan="exact",
            copies=np.zeros_like(found.ids),
        )

    def neighbours(
        self,
        vectors: Float[ndarray, "queries dim"],
        k: int,
        *,
        exclude: Sequence[Collection[SampleId]] | None = None,
    ) -> Neighbours:
        """As :meth:`search`, without looking up the metadata.

        A list that the index leaves short (IVF with too few probes, a graph with an unreachable
        corner) is completed by exact search over the index's own vectors.

        Raises:
            ValueError: `k` is below 1, the vectors are not as wide as the index, one of them has no
                direction (NaN, infinity, zeros), or `exclude` has another length.
        """
        return self._lists(vectors, k, self._filter.live, exclude)

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
        rows = self._places(np.array(list(ids), np.int64))
        return self.search(self.rows.vectors(rows), k, exclude=also, **options)

    def metadata(self, ids: Int64[ndarray, " hits"]) -> list[dict[str, Any]]:
        """The metadata of these samples, in this order.

        Raises:
            ValueError: The index does not hold one of them.
        """
        return self.rows.metadata(self._places(ids))

    def fields(self) -> list[FieldSummary]:
        """What the columns of the metadata hold, for a page's filters."""
        return self._fields

    @cached_property
    def _fields(self) -> list[FieldSummary]:
        return summaries(self._filter)

    def _places(self, ids: Int64[ndarray, " some"]) -> Int64[ndarray, " some"]:
        rows = self.rows.places(ids)
        if self._filter.live is not None:
            rows = np.where(self._filter.live.has(rows), rows, -1)
        if (rows < 0).any():
            raise ValueError(f"the index holds no sample with id {ids[np.argmin(rows)]}")
        return rows

    def _lists(
        self,
        vectors: Float[ndarray, "queries dim"],
        k: int,
        allowed: Allowed | None,
        exclude: Sequence[Collection[SampleId]] | None,
    ) -> Neighbours:
        self._check(vectors, k, exclude)
        most = self.card.rows if allowed is None else allowed.count
        k = min(k, most)
        ids = np.full((len(vectors), k), -1, dtype=np.int64)
        scores = np.full((len(vectors), k), -np.inf, dtype=np.float32)
        banned = [self.rows.held(some) for some in exclude or [()] * len(vectors)]
        if len(vectors) and k:
            deepest = min(most, k + max(len(rows) for rows in banned))
            all_scores, all_rows = self._full_lists(unit_rows(vectors), deepest, allowed)
            for query, rows in enumerate(banned):
                good = np.flatnonzero(~np.isin(all_rows[query], rows))[:k]
                ids[query, : len(good)] = self.ids[all_rows[query, good]]
                scores[query, : len(good)] = all_scores[query, good]
        return Neighbours(ids, scores)

    def _check(
        self,
        vectors: Float[ndarray, "queries dim"],
        k: int,
        exclude: Sequence[Collection[SampleId]] | None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        if vectors.shape[1] != self.card.dim:
            raise ValueError(
                f"queries are {vectors.shape[1]} wide, but the index holds vectors of "
                f"{self.card.dim}: they are not from the model of this index"
            )
        if exclude is not None and len(exclude) != len(vectors):
            raise ValueError(f"exclude: {len(exclude)} entries for {len(vectors)} queries")
        check_rows(vectors, "query")

    def _full_lists(
        self, queries: Float32[ndarray, "queries dim"], k: int, allowed: Allowed | None
    ) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
        if allowed is not None:
            return exact_among(self.rows, queries, k, allowed)
        scores, rows = self._index.search(queries, k)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            scores[short], rows[short] = exact_among(self.rows, queries[short], k)
        return scores, rows
