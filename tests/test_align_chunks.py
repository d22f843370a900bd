"""Chunks of like length: as many as asked for, and the fewest tokens that so many allow."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.encoders.chunks import Chunk, plan_chunks

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=9)


def cost(plan: list[Chunk]) -> int:
    return sum(len(chunk.rows) * chunk.length for chunk in plan)


def fewest_tokens(lengths: list[int], count: int) -> int:
    """Every way to cut the rows, in order of length, into so many parts."""
    ordered = sorted(lengths)
    return min(
        sum((end - begin) * ordered[end - 1] for begin, end in pairwise([0, *cuts, len(ordered)]))
        for cuts in combinations(range(1, len(ordered)), count - 1)
    )


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, count=st.integers(1, 12))
def test_no_other_cut_computes_fewer_tokens(lengths, count):
    plan = plan_chunks(lengths, count)
    assert cost(plan) == fewest_tokens(lengths, min(count, len(lengths)))


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, count=st.integers(1, 12))
def test_every_row_is_in_one_chunk_and_their_number_depends_on_the_rows_alone(lengths, count):
    plan = plan_chunks(lengths, count)
    assert len(plan) == min(count, len(lengths))
    assert sorted(row for chunk in plan for row in chunk.rows) == list(range(len(lengths)))
    for chunk in plan:
        assert chunk.rows, "a chunk without rows would be skipped on one process alone"
        assert chunk.length == max(lengths[row] for row in chunk.rows)
    longest = [lengths[row] for chunk in plan for row in chunk.rows]
    if len(plan) > 1:
        assert longest == sorted(longest)


def test_the_docstrings_example_is_true():
    plan = plan_chunks([3, 20, 4, 3], 2)
    assert [(len(chunk.rows), chunk.length) for chunk in plan] == [(3, 4), (1, 20)]
    assert plan[0].rows == [0, 3, 2]
    assert ">>> [(len(c.rows), c.length) for c in plan_chunks([3, 20, 4, 3], 2)]" in str(
        plan_chunks.__doc__
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_no_rows_are_one_chunk_of_nothing(count):
    assert plan_chunks([], count) == [Chunk([], 0)]


def test_a_large_batch_of_captions_is_cut_as_well_as_a_search_over_two_cuts_can():
    """More lengths than brute force allows: against all pairs of cuts."""
    lengths = [3 + (row * row * 7) % 61 for row in range(160)]
    assert cost(plan_chunks(lengths, 3)) == fewest_tokens(lengths, 3)
