import numpy as np
import pytest

from eval.intervals import bootstrap_difference, bootstrap_mean, bootstrap_median


def naive(values, statistic, groups=None, resamples=4000):
    """The textbook bootstrap: draw row numbers (or whole groups), one resample after the other."""
    generator = np.random.default_rng(99)
    groups = np.arange(len(values)) if groups is None else groups
    members = [np.flatnonzero(groups == label) for label in np.unique(groups)]
    found = []
    for _ in range(resamples):
        drawn = generator.integers(0, len(members), len(members))
        found.append(statistic(values[np.concatenate([members[place] for place in drawn])]))
    return np.quantile(found, [0.025, 0.975])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["hits", "ranks", "continuous"])
def test_intervals_equal_the_textbook_bootstrap(kind, grouped):
    generator = np.random.default_rng(1)
    values = {
        "hits": (generator.random(240) < 0.3).astype(np.float64),
        "ranks": generator.geometric(0.1, 240).astype(np.float64),
        "continuous": generator.standard_normal(240),
    }[kind]
    groups = generator.integers(0, 60, 240) if grouped else None
    for ours, statistic in ((bootstrap_mean, np.mean), (bootstrap_median, np.median)):
        interval = ours(values, groups=groups, resamples=4000)
        low, high = naive(values, statistic, groups)
        spread = max(high - low, 1e-9)
        steps = np.diff(np.unique(values)).max() if statistic is np.median else 0
        allowed = 0.1 * spread + (steps if kind == "ranks" else 0)
        assert interval.value == pytest.approx(statistic(values))
        assert interval.low == pytest.approx(low, abs=allowed)
        assert interval.high == pytest.approx(high, abs=allowed)
        assert interval.count == 240


@pytest.mark.parametrize("bootstrap", [bootstrap_mean, bootstrap_median])
@pytest.mark.parametrize("grouped", [False, True])
def test_order_changes_nothing_and_the_seed_decides(bootstrap, grouped):
    generator = np.random.default_rng(2)
    values = generator.standard_normal(100).round(1)
    groups = np.arange(100) // 4 if grouped else None
    order = generator.permutation(100)
    here = bootstrap(values, groups=groups)
    there = bootstrap(values[order], groups=None if groups is None else groups[order])
    assert here == there
    assert bootstrap_mean(values, groups=groups, seed=1) != bootstrap_mean(values, groups=groups)


def test_blocks_of_resamples_are_one_stream(monkeypatch):
    values = np.random.default_rng(3).standard_normal(50)
    whole = bootstrap_mean(values)
    monkeypatch.setattr("eval.intervals._CELLS_AT_ONCE", 70)
    parts = bootstrap_mean(values)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_groups_of_one_are_no_groups_and_few_groups_are_wider():
    hits = (np.arange(200) % 4 < 2).astype(np.float64)
    alone = bootstrap_mean(hits)
    single = bootstrap_mean(hits, groups=np.arange(200))
    assert (single.low, single.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    together = bootstrap_mean(hits, groups=np.arange(200) % 4 + 4 * (np.arange(200) // 40))
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_intervals_cover_the_truth():
    generator = np.random.default_rng(4)
    covered = 0
    for seed in range(1000):
        hits = (generator.random(300) < 0.4).astype(np.float64)
        interval = bootstrap_mean(hits, resamples=1000, seed=seed)
        covered += interval.low <= 0.4 <= interval.high
    assert 930 <= covered <= 970


def test_cluster_intervals_cover_the_truth_where_plain_ones_do_not():
    generator = np.random.default_rng(5)
    groups = np.repeat(np.arange(120), 5)
    clustered = plain = 0
    for seed in range(400):
        chances = generator.beta(0.8, 1.2, 120)  # mean 0.4
        hits = (generator.random(600) < np.repeat(chances, 5)).astype(np.float64)
        interval = bootstrap_mean(hits, groups=groups, resamples=1000, seed=seed)
        clustered += interval.low <= 0.4 <= interval.high
        interval = bootstrap_mean(hits, resamples=1000, seed=seed)
        plain += interval.low <= 0.4 <= interval.high
    assert 0.92 * 400 <= clustered <= 0.98 * 400
    assert plain < 0.85 * 400


def test_median_intervals_cover_the_truth():
    generator = np.random.default_rng(6)
    covered = 0
    for seed in range(300):
        values = generator.exponential(1.0, 151)
        interval = bootstrap_median(values, resamples=500, seed=seed)
        covered += interval.low <= np.log(2) <= interval.high
    assert 0.91 * 300 <= covered <= 0.98 * 300


def test_pairing_sees_what_two_intervals_cannot():
    generator = np.random.default_rng(7)
    easy = generator.random(1000)
    a, b = (easy < 0.53).astype(np.float64), (easy < 0.50).astype(np.float64)
    one, other = bootstrap_mean(a), bootstrap_mean(b)
    assert one.low < other.high  # they overlap
    difference = bootstrap_difference(a, b)
    assert 0 < difference.low < difference.value == pytest.approx(np.mean(a - b))
    same = bootstrap_difference(a, a)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    turned = bootstrap_difference(b, a)
    assert turned.value == pytest.approx(-difference.value)


def test_level_widens_and_bad_options_are_named():
    values = np.random.default_rng(8).standard_normal(80)
    narrow, wide = bootstrap_mean(values, level=0.5), bootstrap_mean(values, level=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    with pytest.raises(ValueError, match="no items"):
        bootstrap_mean(np.array([]))
    with pytest.raises(ValueError, match="item 1 is nan"):
        bootstrap_median(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="resamples must be at least 1, not 0"):
        bootstrap_mean(values, resamples=0)
    with pytest.raises(ValueError, match="level must lie between 0 and 1, not 95"):
        bootstrap_mean(values, level=95.0)
