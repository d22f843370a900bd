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
is computed without those before it. `Mixture` keeps the same promise for several weighted sources.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64, UInt64
from numpy import ndarray

_STEP = np.uint64(0x9E3779B97F4A7C15)
# With 6 rounds on halves of at least 3 bits, 300,000 permutations of 2 to 30 places show no bias;
# on halves of 2 bits they do.
_ROUNDS, _HALF_BITS = 6, 3
# What a hash is for, so that two uses with equal counters stay independent.
_SHARDS, _BLOCK, _SUBSTITUTE, _MIX = 1, 2, 3, 4
# Steps of a lane in which every source of a mixture gets exactly its share.
_CYCLE = 1000


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


class Mixture:
    """Several sources in fixed proportions, each in its own `Order`: one stream, still a function.

    A lane gives every source exactly its share of each `1000` of its steps, at places drawn anew
    for each lane and each thousand. What a lane takes from a source is that source's own lane, one
    sample after the other, so each source gives each of its samples once per epoch of its own: a
    small one with a large weight comes round sooner, and none loses a sample.

    Sample ids run through the sources one after the other, as in `Manifest.joined`.

    Args:
        orders: One for each source, with the same lanes.
        weights: Share of each source in the stream, in any unit; rounded to thousandths.
        seed: Names the draw.

    Raises:
        ValueError: If a weight is not positive or below a thousandth of their sum.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], *, seed: int = 0) -> None:
        assert len(orders) == len(weights) > 0
        assert len({order.lanes for order in orders}) == 1
        self.orders = tuple(orders)
        self.lanes = orders[0].lanes
        self.seed = seed
        self.counts = _whole_shares(weights, _CYCLE)
        sizes = np.array([order.total for order in orders], np.int64)
        self.total = int(sizes.sum())
        self._first_ids = np.cumsum(sizes) - sizes
        self._cycle_of = lru_cache(maxsize=8 * self.lanes)(self._draw_cycle)

    def epochs(self, positions: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        """The epoch that the source at each position is in, counted from 0."""
        return self._gather(positions, lambda order, own, _: order.epochs(own))

    def ids(self, positions: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        """The sample id at each position; see `Order.ids`."""
        return self._gather(positions, lambda order, own, first: order.ids(own) + first)

    def substitutes(self, positions: Int64[ndarray, " n"], attempt: int) -> Int64[ndarray, " n"]:
        """The sample of the same source that stands in for a bad one; see `Order.substitutes`."""
        return self._gather(
            positions, lambda order, own, first: order.substitutes(own, attempt) + first
        )

    def split(
        self, positions: Int64[ndarray, " n"]
    ) -> tuple[Int64[ndarray, " n"], Int64[ndarray, " n"]]:
        """The source of each position, and the position in that source's own stream."""
        lanes = positions % self.lanes
        cycles, steps = divmod(positions // self.lanes, _CYCLE)
        sources, own = np.empty_like(positions), np.empty_like(positions)
        for lane, cycle in np.unique(np.stack([lanes, cycles], axis=1), axis=0).tolist():
            here = (lanes == lane) & (cycles == cycle)
            chosen, before = self._cycle_of(lane, cycle)
            source = chosen[steps[here]]
            sources[here] = source
            own_step = cycle * self.counts[source] + before[steps[here]]
            own[here] = own_step * self.lanes + lane
        return sources, own

    def consumed(self, position: int) -> list[int]:
        """How many samples each source has given before a position."""
        steps = position // self.lanes + (np.arange(self.lanes) < position % self.lanes)
        given = np.zeros(len(self.orders), np.int64)
        for lane, step in enumerate(steps.tolist()):
            cycle, rest = divmod(step, _CYCLE)
            chosen, _ = self._cycle_of(lane, cycle)
            given += cycle * self.counts + np.bincount(chosen[:rest], minlength=len(given))
        return given.tolist()

    def _gather(
        self, positions: Int64[ndarray, " n"], value: Callable[[Order, ndarray, int], ndarray]
    ) -> Int64[ndarray, " n"]:
        """`value(order, its own positions, its first sample id)`, source by source."""
        sources, own = self.split(positions)
        out = np.empty_like(positions)
        for number, (order, first) in enumerate(
            zip(self.orders, self._first_ids.tolist(), strict=True)
        ):
            here = sources == number
            if here.any():
                out[here] = value(order, own[here], first)
        return out

    def _draw_cycle(self, lane: int, cycle: int) -> tuple[ndarray, ndarray]:
        """The source of each step of a lane's cycle, and how often it came before in the cycle."""
        steps = np.arange(_CYCLE, dtype=np.int64)
        key = np.broadcast_to(hash64(self.seed, _MIX, lane, cycle), steps.shape)
        place = permute(steps, np.full_like(steps, _CYCLE), key)
        chosen = np.searchsorted(np.cumsum(self.counts), place, side="right")
        before = np.empty_like(steps)
        for source in range(len(self.orders)):
            here = chosen == source
            before[here] = np.arange(here.sum())
        return chosen, before


def _whole_shares(weights: Sequence[float], total: int) -> Int64[ndarray, " n"]:
    """Whole numbers in the proportion of the weights that add up to `total` (largest remainder)."""
    given = np.asarray(weights, np.float64)
    if not (np.isfinite(given).all() and (given > 0).all()):
        raise ValueError(f"weights {list(weights)} must all be positive numbers")
    exact = given / given.sum() * total
    shares = np.floor(exact).astype(np.int64)
    missing = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    if not shares.all():
        raise ValueError(f"weights {list(weights)}: the smallest is below 1/{total} of their sum")
    return shares


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
