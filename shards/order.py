"""Which sample stands at which place of an endless training stream: a pure function.

A *position* counts the samples that all ranks together have consumed. Epoch `e` of a set of `N`
samples is the positions `e * N ... (e + 1) * N - 1`, and `Order.ids` tells the sample of each:

    >>> order = Order([3, 0, 5], seed=1, lanes=2, window=4)
    >>> sorted(order.ids(np.arange(8, 16)).tolist())  # the second epoch: each sample once
    [0, 1, 2, 3, 4, 5, 6, 7]
    >>> bool((order.ids(np.arange(11, 16)) == order.ids(np.arange(8, 16))[3:]).all())
    True

How: in each epoch the shards are shuffled and laid end to end; the row is cut into `lanes`
contiguous ranges; position `p` belongs to lane `p % lanes`, and a lane reads its range in blocks of
`window` samples, each block in a shuffled order. So every lane reads its shards nearly in
sequence, and a rank that owns the positions `p % world_size == rank` owns whole lanes.

All randomness is a hash of counters (splitmix64), so there is no state to save, and any position
is computed without those before it.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64, UInt64
from numpy import ndarray

_STEP = np.uint64(0x9E3779B97F4A7C15)
# With 6 rounds on halves of at least 3 bits, 300,000 permutations of 2 to 30 places show no bias;
# on halves of 2 bits they do.
_ROUNDS, _HALF_BITS = 6, 3
# What a hash is for, so that two uses with equal counters stay independent.
_SHARDS, _BLOCK, _SUBSTITUTE = 1, 2, 3


def hash64(*words: Int64[ndarray, "..."] | UInt64[ndarray, "..."] | int) -> UInt64[ndarray, "..."]:
    """Hashes counters to 64 random bits each, element by element with broadcasting.

    The words are absorbed one after the other, each followed by the finaliser of splitmix64
    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

    Args:
        *words: Integers or integer arrays; at least one dimension comes out.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        array = np.atleast_1d(np.asarray(word))
        state = _finalise((state ^ array.astype(np.uint64)) + _STEP)
    return state


def permute(
    index: Int64[ndarray, " n"], size: Int64[ndarray, " n"], key: UInt64[ndarray, " n"]
) -> Int64[ndarray, " n"]:
    """Where `index` goes under the permutation of `0 ... size - 1` that `key` names.

    A Feistel network over the next power of four, walked again while it leaves the range (Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002): constant work per element and no
    table, whatever the size.

    Args:
        index: Places, each in `0 ... size - 1`.
        size: Size of each permutation, at least 1.
        key: Name of each permutation.
    """
    bits = np.frexp((size - 1).astype(np.float64))[1]
    half = np.maximum(_HALF_BITS, (bits + 1) // 2).astype(np.uint64)
    out = index.astype(np.uint64)
    limit = size.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        out[todo] = _feistel(out[todo], half[todo], key[todo])
        todo = todo[out[todo] >= limit[todo]]
    return out.astype(np.int64)


class Order:
    """The order of a training stream; see the top of this module for how it is made.

    Args:
        shard_sizes: Samples in each shard, in the order of the manifest; 0 is allowed.
        seed: Names the order; epochs differ under one seed.
        lanes: Contiguous ranges read side by side; a multiple of every number of ranks to be used.
        window: Samples among which a lane shuffles; larger mixes better and reads less in sequence.

    Raises:
        ValueError: If there is no sample, or an option is out of its range.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, seed: int = 0, lanes: int = 64, window: int = 4096
    ) -> None:
        if lanes < 1 or window < 1:
            raise ValueError(f"lanes={lanes} and window={window} must both be at least 1")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed} must lie in 0 ... 2**63 - 1")
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.total = int(self._sizes.sum())
        if self.total == 0:
            raise ValueError("the data set holds no sample, so there is nothing to order")
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self._shard_row = lru_cache(maxsize=4)(self._lay_shards)

    def epochs(self, positions: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        """The epoch of each position, counted from 0."""
        return positions // self.total

    def ids(self, positions: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        """The sample id (row of the manifest) at each position.

        Args:
            positions: Any positions from 0 on, in any order.
        """
        epoch = self.epochs(positions)
        first = epoch * self.total
        lane = positions % self.lanes
        # The lanes of an epoch, counted from the one that its first position falls into.
        turn = (lane - first) % self.lanes
        base, extra = divmod(self.total, self.lanes)
        length = base + (turn < extra)
        start = turn * base + np.minimum(turn, extra)
        step = (positions - first - turn) // self.lanes
        block = step // self.window
        place = block * self.window
        key = hash64(self.seed, _BLOCK, epoch, lane, block)
        place += permute(step % self.window, np.minimum(self.window, length - place), key)
        return self._locate(epoch, start + place)

    def substitutes(self, positions: Int64[ndarray, " n"], attempt: int) -> Int64[ndarray, " n"]:
        """The sample that stands in where the one at a position is bad.

        Args:
            positions: Positions of bad samples.
            attempt: 0 for the first substitute, 1 for the next if that one is bad too, and so on.
        """
        bits = hash64(self.seed, _SUBSTITUTE, positions, attempt)
        return (bits % np.uint64(self.total)).astype(np.int64)

    def _locate(
        self, epoch: Int64[ndarray, " n"], place: Int64[ndarray, " n"]
    ) -> Int64[ndarray, " n"]:
        """Sample ids at places of the row of shuffled shards, epoch by epoch."""
        ids = np.empty_like(place)
        for one in np.unique(epoch).tolist():
            here = epoch == one
            ends, shift = self._shard_row(one)
            ids[here] = place[here] + shift[np.searchsorted(ends, place[here], side="right")]
        return ids

    def _lay_shards(self, epoch: int) -> tuple[ndarray, ndarray]:
        """Ends of the shuffled shards in their row, and what turns a place into a sample id."""
        bits = hash64(self.seed, _SHARDS, epoch, np.arange(len(self._sizes)))
        row = np.argsort(bits, kind="stable")
        ends = np.cumsum(self._sizes[row])
        return ends, self._starts[row] - (ends - self._sizes[row])


def _finalise(state: UInt64[ndarray, "..."]) -> UInt64[ndarray, "..."]:
    """The output function of splitmix64; arrays wrap around without a warning."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _feistel(
    value: UInt64[ndarray, " n"], half: UInt64[ndarray, " n"], key: UInt64[ndarray, " n"]
) -> UInt64[ndarray, " n"]:
    """One pass of the network over numbers of `2 * half` bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for _ in range(_ROUNDS):
        key = key + _STEP
        left, right = right, left ^ (_finalise(key ^ (right * _STEP)) & mask)
    return (left << half) | right
