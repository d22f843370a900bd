"""Composed queries out of names: what a change says is what differs, and nothing else does."""

import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from shards import demo
from shards.demo.edits import ATTRIBUTES, base_of, composed_pairs, held_out, split_by_base

VALUES = sorted({value for families in ATTRIBUTES.values() for one in families for value in one})
WORDS = ["heart", "guard", "circle", "face", "hair", "skin tone", "with", "old", "dark", "button"]
NAMES = st.lists(
    st.lists(st.sampled_from([*VALUES, *WORDS]), min_size=1, max_size=3).map(" ".join),
    min_size=1,
    max_size=2,
).map(": ".join)


def real_names() -> dict[str, str]:
    table = parquet.read_table(demo.FOLDER / "twemoji.parquet", columns=["codepoints", "name"])
    return dict(zip(table["codepoints"].to_pylist(), table["name"].to_pylist(), strict=True))


def differs_only_by(reference: str, target: str, old: str, new: str) -> bool:
    """One place where `old` stands for itself is replaced by `new`, the rest is equal."""
    return any(
        reference[: place.start()] + new + reference[place.end() :] == target
        for place in re.finditer(re.escape(old), reference)
    )


def check(names: dict[str, str]) -> None:
    pairs = composed_pairs(names)
    assert pairs == composed_pairs(dict(reversed(names.items()))), "order does not matter"
    assert max(Counter(pairs).values(), default=1) == 1
    for pair in pairs:
        new, old = pair.change.split(" instead of ")
        reference, target = names[pair.reference], names[pair.target]
        assert new != old
        assert any(new in family and old in family for family in ATTRIBUTES[pair.kind])
        assert differs_only_by(reference, target, old, new), (reference, target, pair.change)
        assert pair.base == base_of(reference) == base_of(target)
    mirrored = {
        (one.target, one.reference, " instead of ".join(one.change.split(" instead of ")[::-1]))
        for one in pairs
    }
    assert mirrored == {(one.reference, one.target, one.change) for one in pairs}


@settings(max_examples=200, deadline=None)
@given(st.lists(NAMES, max_size=30, unique=True))
def test_names_differ_in_exactly_the_stated_change(names):
    check({f"key{number:02d}": name for number, name in enumerate(names)})


@pytest.mark.slow
def test_the_names_of_the_demo_keep_the_laws():
    names = real_names()
    check(names)
    pairs = composed_pairs(names)
    assert {pair.kind for pair in pairs} >= {"skin tone", "gender", "colour", "hair", "direction"}


def test_every_ordered_couple_of_siblings_is_a_pair():
    names = {"a": "red heart", "b": "blue heart", "c": "green heart", "d": "red circle"}
    found = {(pair.reference, pair.target) for pair in composed_pairs(names)}
    assert found == {(one, other) for one in "abc" for other in "abc" if one != other}


def test_two_changes_at_once_are_no_pair():
    names = {"a": "man: red hair", "b": "woman: bald"}
    assert composed_pairs(names) == []


@pytest.mark.parametrize(
    ("one", "other", "change"),
    [
        ("light blue heart", "red heart", "red instead of light blue"),
        ("woman: red hair", "woman: bald", "bald instead of red hair"),
        ("ear: red hair", "ear: white hair", "white hair instead of red hair"),
        ("old man", "older person", "older person instead of old man"),
        ("up-left arrow", "up arrow", "up instead of up-left"),
        ("keycap: 1", "keycap: 10", "10 instead of 1"),
    ],
)  # fmt: skip
def test_the_longest_value_is_the_one_that_changes(one, other, change):
    changes = [pair.change for pair in composed_pairs({"a": one, "b": other})]
    assert changes[0] == change


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("light blue heart", "light red heart"),
        ("red hair", "blue hair"),
        ("human", "huwoman"),
        ("bored face", "bblue face"),
        ("x-red face", "x-blue face"),
        ("man", "boy"),
        ("red", "left"),
    ],
)
def test_a_part_of_a_longer_value_or_word_is_no_value(one, other):
    assert composed_pairs({"a": one, "b": other}) == []


def test_a_name_that_two_pictures_share_is_no_change():
    pairs = composed_pairs({"a": "red heart", "b": "red heart", "c": "blue heart"})
    assert {(pair.reference, pair.target) for pair in pairs} == {
        *(("a", "c"), ("b", "c"), ("c", "a"), ("c", "b")),
    }


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("man firefighter: dark skin tone", "firefighter"),
        ("woman firefighter", "firefighter"),
        ("firefighter", "firefighter"),
        ("light blue heart", "heart"),
        ("person walking facing right", "walking"),
        ("woman and man holding hands: light skin tone, dark skin tone", "holding hands"),
        ("red", ""),
    ],
)
def test_a_base_is_the_name_without_attributes(name, base):
    assert base_of(name) == base


@settings(max_examples=50, deadline=None)
@given(st.lists(NAMES, max_size=30, unique=True), st.floats(0, 1))
def test_split_by_base_shares_no_base_and_loses_nothing(names, share):
    pairs = composed_pairs({f"key{number:02d}": name for number, name in enumerate(names)})
    kept, out = split_by_base(pairs, share=share)
    assert not {pair.base for pair in kept} & {pair.base for pair in out}
    assert sorted(map(repr, kept + out)) == sorted(map(repr, pairs))
    assert all(held_out(pair.base, share=share) for pair in out)


def test_the_share_that_is_held_out_is_about_what_was_asked_for_and_grows_with_it():
    bases = [f"base {number}" for number in range(2000)]
    chosen = [
        {base for base in bases if held_out(base, share=share)} for share in (0.0, 0.3, 0.6, 1.0)
    ]
    assert [len(one) for one in chosen[::3]] == [0, 2000]
    assert 0.25 < len(chosen[1]) / 2000 < 0.35
    assert all(less <= more for less, more in pairwise(chosen))
