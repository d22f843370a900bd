"""Which texts are encoded together: sorted by length, so that little padding is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Chunk:
    """Rows of a batch that are encoded together, cut to the longest of them.

    Attributes:
        rows: places in the batch, from the shortest text to the longest.
        length: of the longest, in tokens.
    """

    rows: list[int]
    length: int


def plan_chunks(lengths: Sequence[int], count: int) -> list[Chunk]:
    r"""Cut a batch into `count` chunks so that the fewest tokens are computed.

    With the rows in order of length, $\ell_1 \le \dots \le \ell_n$, the best cuts minimise
    $\sum_c |c| \max_{i \in c} \ell_i$; they are found exactly, by dynamic programming over the
    distinct lengths. The number of chunks depends on the number of rows alone: sharded models
    exchange weights once a chunk, so that all processes must agree on it without asking.

    Args:
        lengths: real tokens of each row.
        count: of chunks; no more than rows.

    Example:
        >>> [(len(c.rows), c.length) for c in plan_chunks([3, 20, 4, 3], 2)]
        [(3, 4), (1, 20)]
    """
    order = np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable")
    ordered = np.asarray(lengths, dtype=np.int64)[order]
    count = min(count, len(order))
    if count <= 1:
        return [Chunk(list(range(len(order))), int(ordered[-1]) if len(order) else 0)]
    cuts = _best_cuts(ordered, count)
    while len(cuts) <= count:  # fewer lengths than chunks: halve the largest
        at = int(np.argmax(np.diff(cuts)))
        cuts.insert(at + 1, (cuts[at] + cuts[at + 1]) // 2)
    return [
        Chunk(order[begin:end].tolist(), int(ordered[end - 1])) for begin, end in pairwise(cuts)
    ]


def _best_cuts(ordered: Int[np.ndarray, " rows"], count: int) -> list[int]:
    """Where to cut rows in order of length into at most `count` parts, ends included."""
    # A cut pays only where the length grows.
    edges = np.flatnonzero(np.diff(ordered, prepend=-1, append=np.iinfo(np.int64).max))
    longest = ordered[edges[1:] - 1]
    # cost[i, j]: tokens computed if one chunk goes from edge i to edge j + 1.
    never = np.iinfo(np.int64).max // 4
    cost = (edges[None, 1:] - edges[:-1, None]) * longest[None, :]
    cost = np.where(np.tri(len(longest), k=-1, dtype=bool), never, cost)
    best, origins = cost[0], []
    for _ in range(min(count, len(longest)) - 1):
        through = best[:-1, None] + cost[1:]
        origins.append(np.argmin(through, axis=0))
        best = np.minimum(through.min(axis=0), never)
    cuts = [len(ordered)]
    at = len(longest) - 1
    for origin in reversed(origins):
        at = int(origin[at])
        cuts.append(int(edges[at + 1]))
    return [0, *reversed(cuts)]
