"""Several weighted sources in one stream: the promises of the order hold for each of them."""

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from shards_corpus import SIDE, numbers_in, write_set

from shards.loader import ShardLoader, Source
from shards.manifest import Manifest
from shards.order import Mixture, Order, hash64, permute

LANES = 4


def mixture(totals, weights, *, seed=0, lanes=LANES):
    orders = [
        Order([total], seed=seed + n, lanes=lanes, window=5) for n, total in enumerate(totals)
    ]
    return Mixture(orders, weights, seed=seed)


def slow_stream(mixed, steps):
    """The stream written down from its definition: lane by lane, one step after the other."""
    firsts = np.cumsum([0, *(order.total for order in mixed.orders)])
    places, samples = [], []
    for lane in range(mixed.lanes):
        taken = [0] * len(mixed.orders)
        own = [[] for _ in mixed.orders]
        at = [[] for _ in mixed.orders]
        for cycle in range(-(-steps // 1000)):
            key = np.repeat(hash64(mixed.seed, 4, lane, cycle), 1000)
            spots = permute(np.arange(1000), np.full(1000, 1000), key).tolist()
            for step in range(cycle * 1000, min(steps, (cycle + 1) * 1000)):
                edges = np.cumsum(mixed.counts).tolist()
                source = next(n for n, edge in enumerate(edges) if spots[step % 1000] < edge)
                own[source].append(taken[source] * mixed.lanes + lane)
                at[source].append(step * mixed.lanes + lane)
                taken[source] += 1
        for source, order in enumerate(mixed.orders):
            places += at[source]
            samples += (firsts[source] + order.ids(np.array(own[source], np.int64))).tolist()
    return [sample for _, sample in sorted(zip(places, samples, strict=True))]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    st.integers(0, 2**62),
)
@settings(max_examples=8, deadline=None)
def test_it_is_the_stream_that_is_defined(totals, weights, seed):
    mixed = mixture(totals, weights[: len(totals)], seed=seed)
    expected = slow_stream(mixed, steps=1100)
    assert mixed.ids(np.arange(len(expected))).tolist() == expected


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=12))
@settings(max_examples=10, deadline=None)
def test_a_position_needs_no_other(positions):
    mixed = mixture([50, 7, 300], [1.0, 2.0, 3.0])
    together = mixed.ids(np.array(positions))
    alone = [int(mixed.ids(np.array([position]))[0]) for position in positions]
    assert together.tolist() == alone


def test_each_source_gives_each_sample_once_in_each_epoch_of_its_own():
    mixed = mixture([50, 7, 300], [0.5, 0.2, 0.3])
    positions = np.arange(3000 * LANES)
    ids, epochs = mixed.ids(positions), mixed.epochs(positions)
    sources, _ = mixed.split(positions)
    for source, order in enumerate(mixed.orders):
        mine = sources == source
        # After whole thousands of steps every lane has taken equally much from the source.
        whole = int(mine.sum()) // order.total
        assert whole >= 12
        for epoch in range(whole):
            times = Counter(ids[mine & (epochs == epoch)].tolist())
            assert len(times) == order.total
            assert set(times.values()) == {1}


def test_the_shares_are_exact_in_every_thousand_steps_of_a_lane():
    mixed = mixture([10, 10, 10], [1.0, 1.0, 1.0])
    assert mixed.counts.tolist() == [334, 333, 333]
    sources, _ = mixed.split(np.arange(5000 * LANES))
    for lane in range(LANES):
        for cycle in sources[lane::LANES].reshape(-1, 1000):
            assert np.bincount(cycle).tolist() == [334, 333, 333]
    # Lanes differ, so that a batch is a mixture too.
    assert (sources[0::LANES] != sources[1::LANES]).mean() > 0.5


@pytest.mark.parametrize("position", [0, 1, 3, 4, 4001, 9_999])
def test_the_counters_are_those_of_the_stream(position):
    mixed = mixture([50, 7], [3.0, 1.0])
    sources, _ = mixed.split(np.arange(position))
    assert mixed.consumed(position) == np.bincount(sources, minlength=2).tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 0.0], "positive"),
        ([1.0, -1.0], "positive"),
        ([1.0, float("nan")], "positive"),
        ([1.0, 1e-5], "1/1000"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        mixture([5, 5], weights)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    return [write_set(root / "a", [9, 0, 16]), write_set(root / "b", [5, 6])]


def stream(two, *, start=0, count=15, ranks=1, workers=0):
    out, report = [], {}
    for rank in range(ranks):
        sources = [Source(two[0], 1.0), Source(two[1], 2.0)]
        with ShardLoader(
            sources,
            batch_size=8,
            image_size=SIDE,
            lanes=4,
            window=5,
            rank=rank,
            world_size=ranks,
            workers=workers,
        ) as loader:
            loader.load_state_dict({"consumed": start})
            batches = [next(loader) for _ in range(count)]
            for batch in batches:
                sizes = [25, 11]
                numbers = [i if i < sizes[0] else i - sizes[0] for i in batch.ids.tolist()]
                assert numbers == numbers_in(batch)  # the picture is that of its source
            out.append([batch.ids.tolist() for batch in batches])
            report = loader.report()
    merged = [
        [out[place % ranks][number][place // ranks] for place in range(8)]
        for number in range(count)
    ]
    return merged, report


def test_the_same_global_batches_for_any_ranks_and_workers_and_after_a_resume(two):
    whole, report = stream(two)
    for ranks in (1, 2, 4):
        for workers in (0, 2):
            assert stream(two, ranks=ranks, workers=workers)[0] == whole
    assert stream(two, start=40, count=10, ranks=2)[0] == whole[5:]
    first, second = report["sources"]
    given = np.bincount([int(i >= 25) for batch in whole for i in batch]).tolist()
    assert [first["consumed"], second["consumed"]] == given
    assert (first["samples"], second["samples"]) == (25, 11)
    assert second["epochs"] == given[1] / 11
    assert (first["share"], second["share"]) == (0.333, 0.667)


def test_without_weights_the_sources_come_round_alike(two):
    with ShardLoader(
        [Source(two[0]), Source(two[1])], batch_size=8, image_size=SIDE, lanes=4
    ) as loader:
        shares = [source["share"] for source in loader.report()["sources"]]
    assert shares == [0.694, 0.306]  # 25 and 11 of 36


def test_a_weight_for_some_sources_only_is_refused(two):
    with pytest.raises(ValueError, match="every source a weight"):
        ShardLoader([Source(two[0], 1.0), Source(two[1])], batch_size=8, image_size=SIDE)


def test_problems_say_which_source_they_are_in(two):
    manifest = Manifest.joined([Manifest.open(two[0]), Manifest.open(two[1])])
    from shards.damage import Reason

    assert manifest.problem(0, Reason.NO_IMAGE).shard == f"{two[0]}/000.tar"
    assert manifest.problem(25, Reason.NO_IMAGE).shard == f"{two[1]}/000.tar"
    assert len(manifest) == 36
    assert manifest.place == f"{two[0]} + {two[1]}"
