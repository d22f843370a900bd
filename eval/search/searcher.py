"""Search in an index folder: vectors in, full lists of hits with their metadata out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from eval.index.folder import open_index
from eval.index.recall import exact_neighbours
from eval.metrics import check_rows
from eval.table import unit_rows

SampleId = int | np.integer
"""A stable sample id, as Python or NumPy count."""


@dataclass(frozen=True)
class Hits:
    """The hits of each query, best first.

    Where fewer rows remain than were asked for (all others excluded), a list ends with id -1 and
    score minus infinity.

    Attributes:
        ids: Stable sample ids.
        scores: Cosine similarities.
        rows: Per query the metadata of its hits, as one dictionary each.
    """

    ids: Int64[ndarray, "queries k"]
    scores: Float32[ndarray, "queries k"]
    rows: list[list[dict[str, Any]]]


@dataclass(frozen=True)
class Neighbours:
    """Hits without metadata: ids and scores, as in :class:`Hits`."""

    ids: Int64[ndarray, "queries k"]
    scores: Float32[ndarray, "queries k"]


class Searcher:
    """An open index that answers queries; many threads may ask at once.

    Args:
        folder: The index folder.
        check: As in :func:`eval.index.open_index`.

    Raises:
        FileNotFoundError: As :func:`eval.index.open_index`.
        ValueError: As :func:`eval.index.open_index`.
    """

    def __init__(self, folder: Path | str, *, check: Literal["sha256", "sizes"] = "sha256") -> None:
        opened = open_index(folder, check=check)
        self.card = opened.card
        self.rows = opened.rows
        self._index = opened.index
        self._removed = opened.removed

    @property
    def ids(self) -> Int64[ndarray, " rows"]:
        """The sample id of each row, ascending."""
        return self.rows.ids

    def search(
        self,
        vectors: Float[ndarray, "queries dim"],
        k: int,
        *,
        exclude: Sequence[Collection[SampleId]] | None = None,
    ) -> Hits:
        """The `k` most similar rows of each query with their metadata; all where there are fewer.

        Args:
            vectors: Queries of any length but zero.
            k: Hits per query.
            exclude: Per query the sample ids that may not be among its hits; ids that the index
                does not hold are ignored.

        Raises:
            ValueError: As :meth:`neighbours`.
        """
        found = self.neighbours(vectors, k, exclude=exclude)
        return Hits(found.ids, found.scores, [self.metadata(ids[ids >= 0]) for ids in found.ids])

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
        k = min(k, self.card.rows)
        ids = np.full((len(vectors), k), -1, dtype=np.int64)
        scores = np.full((len(vectors), k), -np.inf, dtype=np.float32)
        banned = [self.rows.held(some) for some in exclude or [()] * len(vectors)]
        if len(vectors):
            deepest = min(self.card.rows, k + max(len(rows) for rows in banned))
            all_scores, all_rows = self._full_lists(unit_rows(vectors), deepest)
            for query, rows in enumerate(banned):
                allowed = np.flatnonzero(~np.isin(all_rows[query], rows))[:k]
                ids[query, : len(allowed)] = self.ids[all_rows[query, allowed]]
                scores[query, : len(allowed)] = all_scores[query, allowed]
        return Neighbours(ids, scores)

    def metadata(self, ids: Int64[ndarray, " hits"]) -> list[dict[str, Any]]:
        """The metadata of these samples, in this order.

        Raises:
            ValueError: The index does not hold one of them.
        """
        rows = self.rows.places(ids)
        if (rows < 0).any():
            raise ValueError(f"the index holds no sample with id {ids[np.argmin(rows)]}")
        return self.rows.metadata(rows)

    def _full_lists(
        self, queries: Float32[ndarray, "queries dim"], k: int
    ) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
        scores, rows = self._index.search(queries, k)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            scores[short], rows[short] = exact_neighbours(queries[short], self.rows.blocks(), k)
        return scores, rows
