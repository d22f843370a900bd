import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from eval.metrics import (
    chance_at_k,
    chance_median_rank,
    class_recall,
    first_hit_ranks,
    hits_at_k,
    mean_reciprocal_rank,
    median_rank,
    recall_at_k,
    right_counts,
    top_candidates,
)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def whole_number_rows(rows):
    """The documented rounding, row by row in Python integers."""
    out = []
    for row in rows.astype(np.float64):
        scaled = row / np.abs(row).max()
        length = math.sqrt(float(np.sum(scaled * scaled)))
        out.append([round(float(x * (2.0**26 / length))) for x in scaled])
    return out


def slow_ranks(queries, candidates, query_labels, candidate_labels, excluded):
    left, right = whole_number_rows(queries), whole_number_rows(candidates)
    ranks = []
    for query, row in enumerate(left):
        scores = [sum(a * b for a, b in zip(row, other, strict=True)) for other in right]
        there = [c for c in range(len(right)) if c != excluded[query]]
        best = max(scores[c] for c in there if candidate_labels[c] == query_labels[query])
        wrong = [c for c in there if candidate_labels[c] != query_labels[query]]
        ranks.append(sum(scores[c] >= best for c in wrong))
    return ranks


@st.composite
def problems(draw):
    """Rows of few small whole numbers, so that ties and duplicates are common."""
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    dim, labels = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    queries, candidates = draw(st.integers(1, 9)), draw(st.integers(0, 12)) + 2 * labels
    rows = generator.integers(-2, 3, (queries + candidates, dim)).astype(np.float32)
    rows[~rows.any(axis=1), 0] = 1
    if draw(st.booleans()):  # nearly equal rows: the coarse product alone cannot decide
        rows = 1 + rows * np.float32(1e-6)
    query_labels = generator.integers(0, labels, queries)
    candidate_labels = np.concatenate(
        [
            np.repeat(np.arange(labels), 2),
            generator.integers(0, labels + 2, candidates - 2 * labels),
        ]
    )
    excluded = generator.integers(-1, candidates, queries)
    return rows[:queries], rows[queries:], query_labels, candidate_labels, excluded


@given(problems(), st.sampled_from([1, 2, 3, 5, 2048]))
@settings(max_examples=150, deadline=None)
def test_ranks_equal_the_slow_transcription_at_any_tile(problem, tile):
    queries, candidates, query_labels, candidate_labels, excluded = problem
    ranks = first_hit_ranks(
        queries,
        candidates,
        query_labels=query_labels,
        candidate_labels=candidate_labels,
        excluded=excluded,
        tile=tile,
    )
    assert ranks.tolist() == slow_ranks(*problem)


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_queries_and_candidates_changes_nothing(problem, random):
    queries, candidates, query_labels, candidate_labels, _ = problem
    one, other = list(range(len(queries))), list(range(len(candidates)))
    random.shuffle(one)
    random.shuffle(other)
    ranks = first_hit_ranks(
        queries, candidates, query_labels=query_labels, candidate_labels=candidate_labels
    )
    shuffled = first_hit_ranks(
        queries[one],
        np.asfortranarray(candidates[other]),
        query_labels=query_labels[one],
        candidate_labels=candidate_labels[other],
        tile=3,
    )
    assert shuffled.tolist() == ranks[one].tolist()


@pytest.mark.parametrize("noise", [1.0, 1e-6, 1e-8, 0.0])
@pytest.mark.parametrize("dim", [7, 64, 513])
def test_tiles_and_order_change_nothing_at_real_sizes(noise, dim):
    generator = np.random.default_rng(dim)
    base = generator.standard_normal((1, dim))
    rows = (base + noise * generator.standard_normal((260, dim))).astype(np.float32)
    rows[40:60] = rows[60:80]  # exact duplicates among the noise
    queries, candidates = rows[:80], rows[80:]
    labels, others = np.arange(80) % 45, np.arange(180) % 60
    ranks = first_hit_ranks(queries, candidates, query_labels=labels, candidate_labels=others)
    order, shuffle = generator.permutation(80), generator.permutation(180)
    again = first_hit_ranks(
        queries[order],
        candidates[shuffle],
        query_labels=labels[order],
        candidate_labels=others[shuffle],
        tile=31,
    )
    assert again.tolist() == ranks[order].tolist()


def test_ranks_equal_plain_float64_where_nothing_is_near_a_tie():
    generator = np.random.default_rng(1)
    candidates = generator.standard_normal((300, 48))
    labels = np.arange(300) // 3
    queries = candidates[::2] + 2.5 * generator.standard_normal((150, 48))
    scores = unit(queries) @ unit(candidates).T
    right = labels[::2, None] == labels
    expected = (~right & (scores >= np.where(right, scores, -9).max(1, keepdims=True))).sum(1)
    found = first_hit_ranks(
        queries.astype(np.float32),
        candidates.astype(np.float32),
        query_labels=labels[::2],
        candidate_labels=labels,
    )
    assert found.tolist() == expected.tolist()
    assert 0.1 < recall_at_k(found, 1) < 0.9  # the example is neither trivial nor hopeless


def test_perfect_embeddings_are_first_and_collapsed_ones_last():
    rows = np.eye(6, dtype=np.float32)
    labels = np.arange(6)
    perfect = first_hit_ranks(rows, 3 * rows, query_labels=labels, candidate_labels=labels)
    assert perfect.tolist() == [0] * 6
    same = np.ones((6, 3), dtype=np.float16)
    collapsed = first_hit_ranks(same, same, query_labels=labels, candidate_labels=labels)
    assert collapsed.tolist() == [5] * 6
    assert recall_at_k(collapsed, 5) == 0.0


def test_the_length_of_rows_does_not_matter():
    generator = np.random.default_rng(2)
    rows = generator.standard_normal((40, 5)).astype(np.float32)
    labels = np.arange(20)
    plain = first_hit_ranks(rows[:20], rows[20:], query_labels=labels, candidate_labels=labels)
    lengths = (2.0 ** generator.integers(-100, 100, (40, 1))).astype(np.float32)
    scaled = rows * lengths
    other = first_hit_ranks(scaled[:20], scaled[20:], query_labels=labels, candidate_labels=labels)
    assert other.tolist() == plain.tolist()


def test_bad_rows_and_lost_queries_are_named():
    rows, labels = np.eye(4, dtype=np.float32), np.arange(4)

    def ranks(queries=rows, candidates=rows, **options):
        given = {"query_labels": labels, "candidate_labels": labels, **options}
        return first_hit_ranks(queries, candidates, **given)

    broken = rows.copy()
    broken[2, 1], broken[3, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"query embeddings: 2 of 4 rows hold NaN .* rows 2, 3"):
        ranks(queries=broken)
    with pytest.raises(ValueError, match="candidate embeddings: 1 of 4 rows are all zero: rows 1"):
        ranks(candidates=rows * np.array([[1], [0], [1], [1]], dtype=np.float32))
    with pytest.raises(
        ValueError, match=r"1 of 4 queries have no right candidate.*query 3.*label 9"
    ):
        ranks(query_labels=np.array([0, 1, 2, 9]))
    with pytest.raises(ValueError, match="no right candidate, the first is query 1 "):
        ranks(excluded=np.array([-1, 1, -1, -1]))
    with pytest.raises(ValueError, match="query 0: excluded row is not one of the 4"):
        ranks(excluded=np.array([4, -1, -1, -1]))
    with pytest.raises(ValueError, match="tile"):
        ranks(tile=0)


def test_top_candidates_are_exact_and_ties_go_by_row():
    generator = np.random.default_rng(3)
    queries, candidates = generator.standard_normal((9, 6)), generator.standard_normal((30, 6))
    candidates[20:] = candidates[:10]
    found = top_candidates(queries, candidates, 7)
    scores = unit(queries) @ unit(candidates).T
    assert np.allclose(found.scores, -np.sort(-scores, axis=1)[:, :7], atol=1e-7)
    assert np.allclose(np.take_along_axis(scores, found.rows, 1), found.scores, atol=1e-7)
    equal = np.diff(found.scores, axis=1) == 0
    assert equal.any()
    assert (np.diff(found.rows, axis=1)[equal] > 0).all()
    assert top_candidates(queries, candidates[:2], 7).rows.shape == (9, 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        top_candidates(queries, candidates, 0)


def test_classification_agrees_with_scikit_learn():
    generator = np.random.default_rng(4)
    images, classes = generator.standard_normal((400, 8)), generator.standard_normal((11, 8))
    labels = generator.integers(0, 11, 400)
    ranks = first_hit_ranks(images, classes, query_labels=labels, candidate_labels=np.arange(11))
    scores = unit(images) @ unit(classes).T
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(11))
        assert recall_at_k(ranks, k) == pytest.approx(expected)
    per_class = class_recall(hits_at_k(ranks, 1), labels)
    expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert per_class.recall.mean() == pytest.approx(expected)
    assert per_class.counts.sum() == 400


def test_summaries_of_ranks():
    ranks = np.array([0, 0, 1, 9])
    assert recall_at_k(ranks, 1) == 0.5
    assert recall_at_k(ranks, 2) == 0.75
    assert median_rank(ranks) == 1.5
    assert mean_reciprocal_rank(ranks) == pytest.approx((1 + 1 + 0.5 + 0.1) / 4)
    nothing = np.array([], dtype=np.int64)
    for summary in (median_rank, mean_reciprocal_rank, lambda some: recall_at_k(some, 1)):
        with pytest.raises(ValueError, match="no queries"):
            summary(nothing)
    with pytest.raises(ValueError, match="k must"):
        hits_at_k(ranks, 0)


@pytest.mark.parametrize(("right", "among"), [(1, 5), (2, 5), (3, 6), (6, 6)])
def test_chance_is_the_share_of_all_orders(right, among):
    orders = list(itertools.permutations(range(among)))
    firsts = [min(order.index(item) for item in range(right)) for order in orders]
    many = (np.full(4, right), np.full(4, among))
    for k in range(1, among + 2):
        expected = sum(first < k for first in firsts) / len(orders)
        assert chance_at_k(*many, k) == pytest.approx(expected, abs=1e-12)
    half = next(k for k in range(1, among + 1) if chance_at_k(*many, k) >= 0.5)
    assert chance_median_rank(*many) == half


def test_random_embeddings_reach_chance():
    generator = np.random.default_rng(5)
    images, texts = generator.standard_normal((900, 16)), generator.standard_normal((300, 16))
    labels, others = np.arange(900) % 150, np.arange(300) % 150
    ranks = first_hit_ranks(images, texts, query_labels=labels, candidate_labels=others)
    right = right_counts(labels, others)
    assert right.tolist() == [2] * 900
    for k in (5, 10, 50):
        chance = chance_at_k(right, np.full(900, 300), k)
        error = math.sqrt(chance * (1 - chance) / 900)
        assert abs(recall_at_k(ranks, k) - chance) < 4 * error


def test_right_counts_of_labels_that_no_candidate_has():
    found = right_counts(np.array([3, -5, 99]), np.array([3, 3, 4]))
    assert found.tolist() == [2, 0, 0]
    assert right_counts(np.array([3]), np.array([], dtype=np.int64)).tolist() == [0]
