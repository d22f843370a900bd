"""Composed queries out of names: a picture, a change in words, and the picture that answers it.

Two names that differ in one attribute and nothing else make a pair: from "man firefighter: dark
skin tone" to "woman firefighter: dark skin tone" the change is "woman instead of man".
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import permutations

ATTRIBUTES: dict[str, tuple[tuple[str, ...], ...]] = {
    "skin tone": (
        (
            "light skin tone",
            "medium-light skin tone",
            "medium skin tone",
            "medium-dark skin tone",
            "dark skin tone",
        ),
    ),
    "gender": (
        ("man", "woman", "person"),
        ("men", "women", "people"),
        ("boy", "girl", "child"),
        ("mermaid", "merman", "merperson"),
        ("prince", "princess"),
        ("old man", "old woman", "older person"),
    ),
    "colour": (
        (
            *("red", "orange", "yellow", "green", "blue", "light blue", "purple", "brown"),
            *("black", "white", "grey", "pink"),
        ),
    ),
    "hair": (("red hair", "curly hair", "white hair", "blond hair", "bald"),),
    "direction": (
        (
            *("left", "right", "up", "down", "up-left", "up-right", "down-left", "down-right"),
            *("up-down", "left-right"),
        ),
        ("leftwards", "rightwards"),
        ("upwards", "downwards"),
    ),
    "number": (("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"),),
    "clock time": (
        tuple(
            f"{hour}{half}"
            for half in (" o’clock", "-thirty")
            for hour in (
                *("one", "two", "three", "four", "five", "six"),
                *("seven", "eight", "nine", "ten", "eleven", "twelve"),
            )
        ),
    ),
    "size": (("small", "medium", "large"),),
}
"""What may change, by kind; values of one tuple stand in for each other."""

_FAMILY = {
    value: (kind, index)
    for kind, families in ATTRIBUTES.items()
    for index, family in enumerate(families)
    for value in family
}
# The longest value first: "light blue" is one colour, "red hair" is hair and not a colour.
_VALUE = re.compile(
    r"(?<![\w-])("
    + "|".join(re.escape(value) for value in sorted(_FAMILY, key=len, reverse=True))
    + r")(?![\w-])"
)


@dataclass(frozen=True)
class ComposedPair:
    """One composed query.

    Attributes:
        reference: key of the picture that is asked with.
        target: key of the picture that answers.
        change: what differs, in words: "blue instead of red".
        kind: which attribute changes.
        base: the name without any attribute; all relatives share it, so splits go by base.
    """

    reference: str
    target: str
    change: str
    kind: str
    base: str


def base_of(name: str) -> str:
    """What is left of a name without attributes: "man guard: dark skin tone" gives "guard"."""
    words = re.findall(r"[^\W_]+", _VALUE.sub(" ", name))
    return " ".join(word for word in words if word not in {"facing", "and"})


def composed_pairs(names: Mapping[str, str]) -> list[ComposedPair]:
    """All ordered pairs of pictures whose names differ in one attribute, sorted by key.

    Args:
        names: the name of each picture by its key; of one artist, so that only the attribute
            differs.
    """
    siblings: dict[tuple[str, str, int], list[tuple[str, str]]] = defaultdict(list)
    for key, name in sorted(names.items()):
        for match in _VALUE.finditer(name):
            kind, family = _FAMILY[match[1]]
            template = f"{name[: match.start()]}*{name[match.end() :]}"
            siblings[template, kind, family].append((key, match[1]))
    return [
        ComposedPair(reference, target, f"{new} instead of {old}", kind, base_of(names[reference]))
        for (_, kind, _), members in sorted(siblings.items())
        for (reference, old), (target, new) in permutations(members, 2)
        if old != new
    ]


def held_out(base: str, *, share: float) -> bool:
    """Whether a base belongs to the held-out part: a hash of its text, so it never changes."""
    return int(sha256(base.encode()).hexdigest()[:8], 16) / 16**8 < share


def split_by_base(
    pairs: Iterable[ComposedPair], *, share: float
) -> tuple[list[ComposedPair], list[ComposedPair]]:
    """(kept, held out), so that no base is in both."""
    kept: list[ComposedPair] = []
    out: list[ComposedPair] = []
    for pair in pairs:
        (out if held_out(pair.base, share=share) else kept).append(pair)
    return kept, out
