"""Queries of many clients through one model: whoever waits is encoded together."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from PIL import Image

from pipelines.queries import Query, QueryEncoder, Term
from pipelines.serve.limits import busy
from pipelines.serve.metrics import Metrics


@dataclass(frozen=True)
class Encoded:
    """A query as a vector.

    Attributes:
        vector: Of unit length, within the precision of float16.
        pictures: Of each term that is a picture its own vector; None for other terms.
        seconds: How long the model took, for all that were encoded with it.
    """

    vector: Float32[np.ndarray, " dim"]
    pictures: list[Float32[np.ndarray, " dim"] | None]
    seconds: float


class Batcher:
    """One thread that encodes queries, as many together as there are when it is free.

    Nothing is waited for: a query that comes alone is encoded alone. A query whose future is
    cancelled before its turn is left out.

    Args:
        encoder: Makes vectors of queries.
        max_batch: Queries that are encoded together at most.
        max_waiting: Queries in the queue; more are refused.
        metrics: Notes sizes and times.
    """

    def __init__(
        self, encoder: QueryEncoder, *, max_batch: int, max_waiting: int, metrics: Metrics
    ) -> None:
        self.encoder = encoder
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._metrics = metrics
        self._queue: deque[tuple[Query, Future[Encoded]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="encoder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Queries in the queue."""
        return len(self._queue)

    async def encode(self, query: Query) -> Encoded:
        """Encode a query, together with others that wait.

        Raises:
            ConfigError: As :meth:`QueryEncoder.vectors`.
            Refused: The queue is full.
        """
        self.encoder.check(query)
        if not any(isinstance(term.value, str | Image.Image) for term in query.terms):
            return Encoded(
                rounded(self.encoder.vectors([query]))[0], [None] * len(query.terms), 0.0
            )
        future: Future[Encoded] = Future()
        with self._changed:
            if self._closed or len(self._queue) >= self._max_waiting:
                raise busy()
            self._queue.append((query, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread after the batch that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for _, future in self._queue:
            future.cancel()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                batch = []
                while self._queue and len(batch) < self._max_batch:
                    query, future = self._queue.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((query, future))
            if batch:
                self._encode(batch)

    def _encode(self, batch: list[tuple[Query, "Future[Encoded]"]]) -> None:
        self._metrics.batch(len(batch))
        try:
            found = encode_together(self.encoder, [query for query, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for one in batch:  # a query that cannot be encoded fails alone
                self._encode([one])
            return
        self._metrics.took("encode", found[0].seconds)
        for (_, future), encoded in zip(batch, found, strict=True):
            future.set_result(encoded)


def encode_together(encoder: QueryEncoder, queries: Sequence[Query]) -> list[Encoded]:
    """Encode queries in one pass over all pictures and one over all texts.

    Vectors are rounded as clients get them, so that a client who sends the vector of its picture
    back, for the next page of hits or in a link, gets the hits that belong to the first.

    Raises:
        ConfigError: As :meth:`QueryEncoder.vectors`.
    """
    started = time.perf_counter()
    pictures = [term for query in queries for term in query.terms if _is_picture(term)]
    alone = iter(rounded(encoder.vectors([Query((Term(term.value),)) for term in pictures])))
    own = [[next(alone) if _is_picture(term) else None for term in q.terms] for q in queries]
    ready = [
        query if query.head else Query(_with_vectors(query.terms, known))
        for query, known in zip(queries, own, strict=True)
    ]
    vectors = rounded(encoder.vectors(ready))
    seconds = time.perf_counter() - started
    return [Encoded(*one, seconds) for one in zip(vectors, own, strict=True)]


def rounded(vectors: Float32[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows dim"]:
    """Vectors with the precision that clients get; of unit length but for that."""
    return vectors.astype(np.float16).astype(np.float32)


def _is_picture(term: Term) -> bool:
    return isinstance(term.value, Image.Image)


def _with_vectors(
    terms: Sequence[Term], known: Sequence[Float32[np.ndarray, " dim"] | None]
) -> tuple[Term, ...]:
    """The terms, with vectors in the place of pictures."""
    pairs = zip(terms, known, strict=True)
    return tuple(term if own is None else Term(own, term.weight) for term, own in pairs)
