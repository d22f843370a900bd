"""Choosing a FAISS factory string: by rows, width, memory and recall, tried on a sample."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from eval.index.folder import faiss_call
from eval.index.tune import downcast

FLAT_ROWS = 20_000
"""Up to so many rows exact search is quick enough, and nothing is gained by another index."""
GRAPH_DIM = 96
"""Below this width a graph is quicker than codes of a few bits a number."""
GRAPH_ROWS = 1_000_000
"""Above, a graph takes too long to build."""
LIST_ROWS = 50_000
"""From so many rows on, vectors are sorted into lists."""
GRAPH_LISTS = 16_384
"""From so many lists on, the nearest are found by a graph over them."""
PILOT_ROWS, PILOT_QUERIES = 16_384, 200
_ID = 8
_FASTSCAN_ROWS = 32


Train = Callable[[int, str, ndarray], faiss.Index]
"""Makes an empty, trained index of a width, a factory string and vectors."""


@dataclass(frozen=True)
class Candidate:
    """A factory string that may do.

    Attributes:
        factory: For FAISS.
        codes: The factory string of its codes without lists, whose recall a pilot can measure.
        bytes: Size of the FAISS index of all rows, in memory as on disk.
    """

    factory: str
    codes: str
    bytes: int


def candidates(rows: int, dim: int, *, max_bytes: int | None = None) -> list[Candidate]:
    """Factory strings whose index fits into the memory, the quickest to search first.

    The order is that of measurements on CLIP-like vectors (clusters, a gap between the modalities):
    sign codes in lists with a refinement, more bits a number where the memory is less, product
    quantisers where it is less than two bits a number; graphs only for short vectors, exact search
    only for few. Where not even the smallest fits, the list is empty.
    """
    found = []
    for turn, lists, codes in _ladder(rows, dim):
        factory = turn + lists + codes
        size = estimated_bytes(factory, rows, dim)
        if max_bytes is None or size <= max_bytes:
            found.append(Candidate(factory, turn + codes, size))
    return found


def _ladder(rows: int, dim: int) -> list[tuple[str, str, str]]:
    """Rotation, lists and codes of every candidate.

    Sign codes need a random rotation where a few coordinates vary more than the others, as they do
    in CLIP's vectors.
    """
    lists = _lists(rows)
    turn = f"RR{dim},"
    exact = [("", "", "Flat")]
    graph = [("", "", "HNSW32")] if dim < GRAPH_DIM and rows <= GRAPH_ROWS else []
    short = [("", lists, "Flat")] if dim < GRAPH_DIM and lists else []
    refined = [(turn, lists, f"RaBitQfs,Refine({last})") for last in ("SQ8", "SQfp16")]
    whole = [] if short else [("", lists, "Flat")]  # reaches any target, slowly
    bits = [(turn, lists, f"RaBitQfs{count}") for count in (8, 7, 6, 5, 4, 3, 2)]
    plain = [(turn, "", f"RaBitQfs{count}") for count in (7, 6, 5, 4, 3, 2)] if lists else []
    scalars = [("", "", name) for name in ("SQ8", "SQ6", "SQ4")]
    ones = [(turn, lists, "RaBitQfs")]
    products = [
        (f"OPQ{parts}_{4 * parts},", lists, f"PQ{parts}x4fs") for parts in _product_parts(dim)
    ]
    if rows <= FLAT_ROWS:
        return exact + scalars + bits + ones + products
    return graph + short + refined + whole + bits + scalars + plain + ones + products


def _product_parts(dim: int) -> list[int]:
    """Sub-quantisers of 4 bits: of dim / 4 (one bit a number) down to dim / 32."""
    return [max(2, dim // step // 2 * 2) for step in (4, 8, 16, 32) if dim >= 2 * step]


def _lists(rows: int) -> str:
    """The factory's part that sorts vectors into lists: about twice the root of the rows."""
    if rows < LIST_ROWS:
        return ""
    count = 2 ** round(math.log2(2 * math.sqrt(rows)))
    return f"IVF{count}_HNSW32," if count >= GRAPH_LISTS else f"IVF{count},"


def estimated_bytes(factory: str, rows: int, dim: int) -> int:
    """Size of the file of a FAISS index of so many rows, before it is built.

    Codes are counted exactly; lists of FastScan are padded to whole blocks of 32 rows, and the
    layers of a graph are taken at their expectation.

    Raises:
        ValueError: FAISS does not know the factory string.
    """
    what = f"index factory {factory!r}"
    index = faiss_call(what, lambda: faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT))
    return math.ceil(_bytes(index, rows))


def _bytes(index: faiss.Index, rows: int) -> float:
    index = whole = downcast(index)
    if isinstance(index, faiss.IndexRefine):
        return _bytes(index.base_index, rows) + _bytes(index.refine_index, rows)
    if isinstance(index, faiss.IndexPreTransform):
        turned = index.index.d
        return 4 * index.d * (turned + 1) + _bytes(index.index, rows)
    if isinstance(index, faiss.IndexHNSW):
        links = whole.hnsw.nb_neighbors(1)
        above = links / (links - 1)
        return rows * (4 + 8 + 4 * (2 * links + above)) + _bytes(index.storage, rows)
    if isinstance(index, faiss.IndexIVF):
        lists = index.nlist
        padded = rows
        if isinstance(index, faiss.IndexIVFFastScan):
            padded = rows + lists * (_FASTSCAN_ROWS - 1) / 2
        held = padded * index.code_size + rows * _ID + 8 * lists
        return held + _bytes(index.quantizer, lists) + _books(index)
    if isinstance(index, faiss.IndexFastScan):
        rows = math.ceil(rows / _FASTSCAN_ROWS) * _FASTSCAN_ROWS
    return rows * whole.code_size + _books(whole)


def _books(index: Any) -> float:
    """Bytes of the trained tables of a quantiser."""
    if hasattr(index, "pq"):
        return 4.0 * index.pq.M * index.pq.ksub * index.pq.dsub
    if hasattr(index, "sq"):
        return 8.0 * index.d
    return 4.0 * index.d


def piloted(
    found: Sequence[Candidate],
    sample: Float32[ndarray, "some dim"],
    asked: Float32[ndarray, "queries dim"],
    target_recall: float,
    train: Train,
) -> list[Candidate]:
    """The candidates worth building, the quickest first, as a pilot on a sample of rows advises.

    The codes of each, without lists, hold the sample; recall@10 against exact search in the sample
    is about the most that they can reach. Those that reach the target are worth building, and where
    none does, the one with the highest recall. Codes that fail spare their coarser siblings.

    Args:
        found: The quickest first.
        sample: Vectors of the table.
        asked: Queries of the kind that will be asked.
        target_recall: Recall@10 that is asked for.
        train: Makes an empty, trained index, as :func:`eval.index.train.trained`.
    """
    exact = faiss.IndexFlatIP(sample.shape[1])
    exact.add(sample)
    best = exact.search(asked, min(10, len(sample)))[1]
    recalls: dict[str, float] = {}
    failed: dict[str, float] = {}
    passed = []
    for candidate in found:
        codes, kind = candidate.codes, re.sub(r"\d+", "", candidate.codes)
        if kind in failed:
            continue
        if codes not in recalls:
            recalls[codes] = _pilot_recall(codes, sample, asked, best, train)
        if recalls[codes] >= target_recall - _DOUBT:
            passed.append(candidate)
        else:
            failed[kind] = recalls[codes]
        if len(passed) == _ENOUGH:
            break
    if passed:
        return passed
    return [max((one for one in found if one.codes in recalls), key=lambda one: recalls[one.codes])]


def _pilot_recall(
    codes: str, sample: ndarray, asked: ndarray, best: ndarray, train: Train
) -> float:
    if codes in ("Flat", "HNSW32"):
        return 1.0
    index = train(sample.shape[1], codes, sample)
    index.add(sample)
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = max(1.0, min(256.0, len(sample) / best.shape[1]))  # as tuning may
    rows = index.search(asked, best.shape[1])[1]
    return float(np.mean((rows[:, :, None] == best[:, None, :]).any(axis=1)))


_DOUBT = 0.01
"""So far below the target the pilot may be, by its few queries, of codes that reach it."""
_ENOUGH = 3
"""So many that pass the pilot are worth building."""
