"""Training an index: on a sample, in as few rounds as recall allows."""

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from eval.index.blocks import chosen_rows
from eval.index.folder import faiss_call
from eval.index.tune import downcast
from eval.table import EmbeddingTable

Progress = Callable[[str, int, int], None]
"""Told of long work: what it is, how much is done, of how much."""

_LIST_ROUNDS, _LIST_POINTS = 8, 48
_BOOK_ROUNDS, _BOOK_POINTS = 12, 256
_TURN_ROUNDS, _TURN_POINTS = 8, 16_384


def training_vectors(
    table: EmbeddingTable, modality: str, *, count: int, generator: np.random.Generator
) -> Float32[ndarray, "some dim"]:
    """At most so many rows of a table, drawn at random, of unit length.

    Raises:
        ValueError: One of them has no direction; names its file and row.
    """
    rows = generator.choice(table.rows, size=min(table.rows, count), replace=False)
    return chosen_rows(table, modality, np.sort(rows))


def trained(
    dim: int,
    factory: str,
    training: Float32[ndarray, "some dim"],
    *,
    progress: Progress | None = None,
) -> faiss.Index:
    """An empty FAISS index that is trained on these vectors.

    Lists, rotations and codebooks take a few rounds on some of the vectors: more of either costs
    minutes and moves recall by less than a point.

    Raises:
        ValueError: FAISS refuses the factory string or the number of training rows.
    """
    what = f"index factory {factory!r}"
    index = faiss_call(what, lambda: faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT))
    if index.is_trained:
        return index
    if progress:
        progress("train", 0, 1)
    books = _few_rounds(index)
    faiss_call(what, lambda: index.train(training))
    del books  # FAISS reads them while it trains
    if progress:
        progress("train", 1, 1)
    return index


def _few_rounds(index: faiss.Index) -> list[faiss.ProductQuantizer]:
    """Limit the training of an index and all in it; what is returned must outlive the training."""
    index = whole = downcast(index)
    if isinstance(index, faiss.IndexRefine):
        return _few_rounds(index.base_index)
    if isinstance(index, faiss.IndexPreTransform):
        return [*_few_turns(index), *_few_rounds(index.index)]
    if isinstance(index, faiss.IndexIVF):
        index.cp.niter = _LIST_ROUNDS
        index.cp.max_points_per_centroid = _LIST_POINTS
        index.cp.min_points_per_centroid = 1  # fewer only make FAISS print a warning
    if hasattr(whole, "pq"):
        whole.pq.cp.niter = _BOOK_ROUNDS
        whole.pq.cp.max_points_per_centroid = _BOOK_POINTS
        whole.pq.cp.min_points_per_centroid = 1
    return []


def _few_turns(index: Any) -> list[faiss.ProductQuantizer]:
    """Let OPQ turn for the codebooks that follow it, in few rounds."""
    books = []
    last = downcast(index.index)
    for place in range(index.chain.size()):
        turn = faiss.downcast_VectorTransform(index.chain.at(place))
        if isinstance(turn, faiss.OPQMatrix):
            turn.niter, turn.niter_pq, turn.niter_pq_0 = _TURN_ROUNDS, 2, 10
            turn.max_train_points = _TURN_POINTS
            if hasattr(last, "pq") and turn.d_out == last.d and turn.M == last.pq.M:
                books.append(faiss.ProductQuantizer(last.d, last.pq.M, last.pq.nbits))
                books[-1].cp.min_points_per_centroid = 1
                turn.pq = books[-1]
    return books
