"""A FAISS index asked with more or less effort, with or without a selector of rows."""

import math
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from eval.search.filters import Allowed

_faiss: Any = faiss
"""Its keyword arguments are made when it is imported, so that no type checker knows them."""
_LEAST_CANDIDATES = 64
"""So many are ranked again, however few are wanted, where the index's own scores are rough."""


class Engine:
    """What a FAISS index can be asked, told from its parts.

    Search parameters replace what is set on the index, so that what is set there is carried over,
    times an effort: probes of inverted lists, breadth of a graph's search, candidates that a
    refinement ranks again.

    Args:
        index: The index, its knobs set.
    """

    def __init__(self, index: faiss.Index) -> None:
        self.index = index
        parts = _parts(index)
        self._refined = any(isinstance(one, faiss.IndexRefine) for one in parts)
        self.navigated = any(isinstance(one, _NAVIGATED) for one in parts)
        """Looks only at some lists or a part of a graph, as far as knobs and effort say."""
        self.lossless = _is_lossless(index)
        """Its scores are the cosines of the vectors themselves."""

    @cached_property
    def selects(self) -> bool:
        """Whether it can be asked for some rows only."""
        probe = np.zeros((1, self.index.d), np.float32)
        probe[0, 0] = 1.0
        try:
            selector = faiss.IDSelectorRange(0, 1)
            self.index.search(probe, 1, params=_parameters(self.index, 1.0, selector, 1))
        except RuntimeError:
            return False
        return True

    def as_tuned(
        self, queries: Float32[ndarray, "queries dim"], k: int
    ) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
        """Scores and rows as the knobs have it."""
        return self.index.search(queries, k)

    def wanted(self, k: int, effort: float) -> int:
        """How many candidates are asked for, to have the `k` best among them."""
        if self.lossless:
            return k
        if self._refined:
            return 2 * k
        return math.ceil(max(4 * k, _LEAST_CANDIDATES) * effort)

    def selected(
        self, queries: Float32[ndarray, "queries dim"], k: int, allowed: Allowed, effort: float
    ) -> tuple[Float32[ndarray, "queries some"], Int64[ndarray, "queries some"]]:
        """Candidates among the allowed rows; -1 where there are too few."""
        share = allowed.count / allowed.of
        asked = min(self.wanted(k, effort), allowed.count)
        selector = _faiss.IDSelectorBitmap(allowed.bits)
        further = effort / math.sqrt(share)
        parameters = _parameters(self.index, further, selector, asked)
        return self.index.search(queries, asked, params=parameters)

    def overfetched(
        self, queries: Float32[ndarray, "queries dim"], k: int, allowed: Allowed, effort: float
    ) -> tuple[Float32[ndarray, "queries some"], Int64[ndarray, "queries some"]]:
        """Candidates among all rows, those that are not allowed taken out (-1)."""
        share = allowed.count / allowed.of
        more = 1.0 if not self.lossless else effort
        asked = min(math.ceil(self.wanted(k, effort) * more / share * 1.1) + 16, allowed.of)
        parameters = _parameters(self.index, effort, None, asked)
        scores, rows = self.index.search(queries, asked, params=parameters)
        good = allowed.has(rows)
        return np.where(good, scores, -np.inf), np.where(good, rows, -1)


_NAVIGATED = (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexNSG)


def _parts(index: faiss.Index) -> list[Any]:
    """An index and those within it, down to the one that holds the codes."""
    found = [faiss.downcast_index(index)]
    while True:
        last = found[-1]
        if isinstance(last, faiss.IndexPreTransform):
            found.append(faiss.downcast_index(last.index))
        elif isinstance(last, faiss.IndexRefine):
            found.append(faiss.downcast_index(last.base_index))
        else:
            return found


def _is_lossless(index: faiss.Index) -> bool:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _is_lossless(index.refine_index)
    if isinstance(index, faiss.IndexHNSW):
        return _is_lossless(index.storage)
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat)


def _parameters(index: faiss.Index, effort: float, selector: Any, asked: int) -> Any:
    """Search parameters of an index and all within it; None where it takes none."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(index.index, effort, selector, asked)
        return inner and _faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        factor = min(max(index.k_factor, 1.0) * effort, max(index.ntotal / asked, 1.0))
        inner = _parameters(index.base_index, effort, selector, math.ceil(asked * factor))
        return _faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        probes = min(math.ceil(index.nprobe * effort), index.nlist)
        return _faiss.SearchParametersIVF(
            sel=selector, nprobe=probes, max_codes=math.ceil(index.max_codes * effort)
        )
    if isinstance(index, faiss.IndexHNSW):
        breadth = math.ceil(max(index.hnsw.efSearch, asked) * effort)
        return _faiss.SearchParametersHNSW(sel=selector, efSearch=min(breadth, index.ntotal))
    return selector and _faiss.SearchParameters(sel=selector)
