import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from shards.order import Order, hash64, permute

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)


def slow_epoch(sizes, *, seed, epoch, lanes, window):
    """The order of one epoch, written down from its definition, one sample at a time."""
    total = sum(sizes)
    starts = [sum(sizes[:shard]) for shard in range(len(sizes))]
    chance = [int(hash64(seed, 1, epoch, shard)[0]) for shard in range(len(sizes))]
    row = [
        starts[shard] + place
        for shard in sorted(range(len(sizes)), key=lambda shard: chance[shard])
        for place in range(sizes[shard])
    ]
    positions = range(epoch * total, (epoch + 1) * total)
    turns = sorted({p % lanes for p in positions}, key=lambda lane: (lane - epoch * total) % lanes)
    of_position = {}
    for lane in turns:
        mine = [p for p in positions if p % lanes == lane]
        part, row = row[: len(mine)], row[len(mine) :]
        for block in range(0, len(mine), window):
            piece = part[block : block + window]
            key = int(hash64(seed, 2, epoch, lane, block // window)[0])
            sizes_now = np.full(len(piece), len(piece))
            keys = np.full(len(piece), key, np.uint64)
            goes = permute(np.arange(len(piece)), sizes_now, keys).tolist()
            for step, position in enumerate(mine[block : block + window]):
                of_position[position] = piece[goes[step]]
    return [of_position[p] for p in positions]


@given(SIZES, st.integers(0, 2**63 - 1), st.integers(0, 4), st.integers(1, 9), st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_it_is_the_order_that_is_defined(sizes, seed, epoch, lanes, window):
    order = Order(sizes, seed=seed, lanes=lanes, window=window)
    positions = np.arange(epoch * order.total, (epoch + 1) * order.total)
    expected = slow_epoch(sizes, seed=seed, epoch=epoch, lanes=lanes, window=window)
    assert order.ids(positions).tolist() == expected
    assert sorted(expected) == list(range(sum(sizes)))


@given(SIZES, st.lists(st.integers(0, 10**12), min_size=1, max_size=50))
@settings(max_examples=15, deadline=None)
def test_a_position_needs_no_other(sizes, positions):
    order = Order(sizes, seed=3, lanes=4, window=8)
    together = order.ids(np.array(positions))
    alone = [int(order.ids(np.array([position]))[0]) for position in positions]
    assert together.tolist() == alone


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
@settings(max_examples=30, deadline=None)
def test_permute_is_a_permutation(size, key):
    keys = np.full(size, key, np.uint64)
    assert sorted(permute(np.arange(size), np.full(size, size), keys)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5, 16, 17])
def test_permute_sends_every_place_everywhere_alike(size):
    draws = 20_000
    keys = np.repeat(hash64(np.arange(draws)), size)
    places = np.tile(np.arange(size), draws)
    goes = permute(places, np.full_like(places, size), keys)
    table = np.zeros((size, size))
    np.add.at(table, (places, goes), 1)
    expected = draws / size
    # Rows and columns have fixed sums, hence the factor and the degrees of freedom.
    chi_square = ((table - expected) ** 2 / expected).sum() * (size - 1) / size
    degrees = (size - 1) ** 2
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)  # five standard deviations


def test_neighbours_part():
    """In a window of 1000, samples that follow each other should not go on doing so."""
    ids = Order([1000], seed=0, lanes=1, window=1000).ids(np.arange(1000))
    assert (np.diff(ids) == 1).sum() < 10  # one is expected


def test_hash_is_splitmix64():
    # First output for seed 0 of the reference implementation (Vigna, splitmix64.c).
    assert int(hash64(0)[0]) == 0xE220A8397B1DCDAF


def test_hash_broadcasts_and_has_no_twins():
    bits = hash64(7, np.arange(300)[:, None], np.arange(300))
    assert bits.shape == (300, 300)
    assert len(np.unique(bits)) == bits.size


def test_epochs_and_seeds_differ():
    first = Order([50, 50], seed=0, lanes=2, window=10)
    other = Order([50, 50], seed=1, lanes=2, window=10)
    epochs = [first.ids(np.arange(k * 100, k * 100 + 100)).tolist() for k in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != other.ids(np.arange(100)).tolist()


def test_a_lane_reads_nearly_in_sequence():
    order = Order([100] * 8, seed=5, lanes=4, window=10)
    lane = order.ids(np.arange(0, 800, 4))
    for block in lane.reshape(-1, 10):
        assert block.max() - block.min() == 9


def test_substitutes_are_samples_and_change_with_the_attempt():
    order = Order([1000], seed=0)
    positions = np.arange(500)
    first, second = order.substitutes(positions, 0), order.substitutes(positions, 1)
    assert first.min() >= 0
    assert first.max() < 1000
    assert (first != second).mean() > 0.98
    assert (order.substitutes(positions[::-1], 0)[::-1] == first).all()
    assert (Order([1000], seed=1).substitutes(positions, 0) != first).mean() > 0.98


def test_no_two_uses_of_the_hash_share_their_counters():
    """Draws over the same counters would be correlated if their purposes had equal numbers."""
    from pipelines import captions as templates
    from shards import augment, captions, crop, order
    from shards.audit import examine

    order_uses = [order._SHARDS, order._BLOCK, order._SUBSTITUTE, order._MIX]
    others = [module._DRAW for module in (augment, captions, crop, examine, templates)]
    assert len({*order_uses, *others}) == len(order_uses) + len(others)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([0, 0], {}, "no sample"),
        ([], {}, "no sample"),
        ([3], {"lanes": 0}, "lanes=0"),
        ([3], {"window": 0}, "window=0"),
        ([3], {"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_options_are_refused(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        Order(sizes, **options)
