"""Answers: a query through the encoder, its vector through the index, hits as JSON values."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import faiss
import numpy as np
from jaxtyping import Float32

from eval.index.card import Source
from eval.search.filters import FilterTimeoutError
from eval.search.searcher import Hits
from pipelines.config import ConfigError
from pipelines.queries import Query, Term
from pipelines.serve.asking import Asked, query_of, rows_of, vector_text
from pipelines.serve.batching import Encoded, encode_together
from pipelines.serve.indexes import ServedIndex
from pipelines.serve.limits import Limits, Refused
from pipelines.serve.metrics import Metrics

T = TypeVar("T")
_QUICK, _FEW = 0.0005, 100
"""Seconds of FAISS, and hits, up to which a search is quick."""
_OWN = ("id", "key", "caption", "shard")
"""Columns that every row has; the others are the samples' own fields."""


class Service:
    """Everything that answers, without HTTP.

    Args:
        indexes: By name, in the order in which they are listed.
        limits: What a client may ask for.
        metrics: Notes times.
        threads: Searches at a time.
    """

    def __init__(
        self,
        indexes: Mapping[str, ServedIndex],
        *,
        limits: Limits,
        metrics: Metrics,
        threads: int,
    ) -> None:
        self.indexes = dict(indexes)
        self.limits = limits
        self.metrics = metrics
        # Many clients are many threads: FAISS shall not start as many again for each.
        self._searches = ThreadPoolExecutor(
            threads, thread_name_prefix="search", initializer=lambda: faiss.omp_set_num_threads(1)
        )
        self._pictures = ThreadPoolExecutor(threads, thread_name_prefix="pictures")

    def index(self, name: str | None) -> ServedIndex:
        """The index of that name; None = the only one.

        Raises:
            Refused: There is none, or there are several.
        """
        known = ", ".join(self.indexes)
        if name is None and len(self.indexes) == 1:
            return next(iter(self.indexes.values()))
        if name is None:
            raise Refused(400, f"index: name one of {known}")
        if name not in self.indexes:
            raise Refused(404, f"unknown index {name[:100]!r}; known: {known}")
        return self.indexes[name]

    async def answer(self, asked: Asked, files: list[bytes]) -> dict[str, Any]:
        """Answer a search.

        Raises:
            Refused: Something in it cannot be.
        """
        started = time.perf_counter()
        served = self.index(asked.index)
        if any(term.image is not None or term.upload is not None for term in asked.terms):
            query, ids = await self.apart(query_of, asked, served, files, self.limits)
        else:
            query, ids = query_of(asked, served, files, self.limits)
        encoded = await self.encode(served, query)
        hits, seconds = await self.find(
            served,
            encoded.vector,
            asked.k,
            where=asked.where,
            fields=asked.fields or None,
            exclude=[ids] if ids else None,
            min_score=asked.min_score,
            collapse=asked.collapse,
            diversity=asked.diversity,
            offset=asked.offset,
        )
        return {
            "hits": _listed(hits, served),
            "matching": int(hits.matching),
            "plan": hits.plan,
            "vectors": [None if v is None else vector_text(v) for v in encoded.pictures],
            "query": vector_text(encoded.vector),
            "milliseconds": {
                "encode": round(1000 * encoded.seconds, 3),
                "search": round(1000 * seconds, 3),
                "total": round(1000 * (time.perf_counter() - started), 3),
            },
        }

    async def encode(self, served: ServedIndex, query: Query) -> Encoded:
        """The vector of a query.

        Raises:
            Refused: The query cannot be embedded (400), or too many wait (503).
        """
        try:
            return await served.encoder.encode(query)
        except ConfigError as error:
            raise Refused(400, str(error)) from None

    async def find(
        self, served: ServedIndex, vector: Float32[np.ndarray, " dim"], k: int, **options: Any
    ) -> tuple[Hits, float]:
        """Hits of a vector, and how many seconds the search took.

        Args:
            served: The index.
            vector: What to look for.
            k: How many.
            **options: As :meth:`Searcher.search`.

        Raises:
            Refused: A filter or another option cannot be (400).
        """

        def search() -> tuple[Hits, float]:
            started = time.perf_counter()
            hits = served.searcher.search(vector[None], k, **options)
            return hits, time.perf_counter() - started

        try:
            if _is_quick(served, k, options):
                faiss.omp_set_num_threads(1)  # of this thread, as of those
                hits, seconds = search()
            else:
                hits, seconds = await self._in(self._searches, search)
        except FilterTimeoutError as error:
            raise Refused(504, str(error)) from None
        except ValueError as error:
            raise Refused(400, " ".join(str(error).split())) from None
        self.metrics.took("search", seconds)
        return hits, seconds

    def row(self, name: str, row_id: int) -> dict[str, Any]:
        """The metadata of a row.

        Raises:
            Refused: There is no such index or row.
        """
        served = self.index(name)
        return _hit(served.searcher.rows.metadata(rows_of([row_id], served))[0], served)

    def row_source(self, served: ServedIndex, row_id: int) -> Source:
        """The source that a row came from.

        Raises:
            Refused: There is no such row.
        """
        return served.searcher.rows.source_of(rows_of([row_id], served)[0])

    def warm_up(self) -> None:
        """Use every model and index once: the first use of many things is slow."""
        for served in self.indexes.values():
            vector = encode_together(served.encoder.encoder, [Query((Term("a picture"),))])[0]
            served.searcher.search(vector.vector[None], 1)
            served.summary()

    async def apart(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run what takes a while (pictures) in a thread of its own."""
        return await self._in(self._pictures, lambda: call(*arguments))

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, call)

    def close(self) -> None:
        """End the threads."""
        for encoder in {id(one.encoder): one.encoder for one in self.indexes.values()}.values():
            encoder.close()
        for pool in (self._searches, self._pictures):
            pool.shutdown(wait=True, cancel_futures=True)


def _is_quick(served: ServedIndex, k: int, options: Mapping[str, Any]) -> bool:
    """Whether a search takes less than handing it to another thread and back.

    Nearly all of such a search is Python, which would hold up the event loop from there as well.
    """
    slow = ("where", "fields", "collapse", "diversity")
    cost = served.searcher.card.costs.get("query_s", math.inf)
    few = k + options.get("offset", 0) <= _FEW
    return cost < _QUICK and few and not any(options.get(name) for name in slow)


def _listed(hits: Hits, served: ServedIndex) -> list[dict[str, Any]]:
    copies = hits.copies[0] if hits.copies is not None else [0] * len(hits.rows[0])
    triples = zip(hits.rows[0], hits.scores[0].tolist(), copies, strict=False)
    return [
        {**_hit(row, served), "score": round(score, 6), "copies": int(more)}
        for row, score, more in triples
    ]


def _hit(row: Mapping[str, Any], served: ServedIndex) -> dict[str, Any]:
    return {
        **{name: row.get(name) for name in _OWN},
        "fields": {name: value for name, value in row.items() if name not in _OWN},
        "picture": served.picture(row["id"]),
    }
