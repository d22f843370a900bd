"""Threads that work ahead of a consumer, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int
) -> Generator[Result]:
    """Applies a function to items in background threads and yields the results in their order.

    What comes out does not depend on `workers`. An exception of the function is raised here, at the
    place of its item. Once the iterator has ended, failed or been closed, its threads have ended.

    Args:
        function: Called once per item, possibly by several threads at a time.
        items: May be endless.
        workers: Threads; 0 calls the function here, when a result is asked for.
        ahead: Results finished or under way beyond the one that is asked for.
    """
    if workers == 0:
        yield from map(function, items)
        return
    source = iter(items)
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, "shards", initializer=_compute_on_one_core)
    try:
        for item in source:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _compute_on_one_core() -> None:
    """Keeps a worker's tensor operations on its own core.

    Every thread that enters an OpenMP region gets a team of its own, so without this a few workers
    would start dozens of threads. Only the calling thread is limited: asking torch for its count
    first makes it take up its global setting now rather than later, on top of ours.
    """
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")
