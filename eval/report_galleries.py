"""What a number looks like: queries with their hits, confused pairs, the map of the space."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from eval.report_html import EN_DASH, TIMES, Element, caption, data_island, element, only_for_ears
from eval.report_pictures import Picture, PictureStore, sprite_sheet

MOST_POINTS = 2000
"""Pictures on one map; more neither fit a page nor an eye."""

_MARKS = {
    "right": ("M3 8.5 6.5 12 13 4.5", "right: "),
    "wrong": ("M3.5 3.5 12.5 12.5M12.5 3.5 3.5 12.5", "wrong: "),
    "missed": ("M3.5 8a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0", "the target, not among the hits: "),
}


@dataclass(frozen=True)
class Hit:
    """One result: a picture, words, or both; `right` is None where nobody can say."""

    caption: str
    picture: Picture | None = None
    score: float | None = None
    right: bool | None = None


@dataclass(frozen=True)
class Query:
    """What was searched for (words, a picture, or a picture and words) and what came back.

    Attributes:
        hits: The results, the best first.
        text: The words of the query; beside a picture, the change that was asked for.
        picture: The picture of the query.
        picture_caption: What the picture of the query shows.
        target: The right answer, shown behind the hits where none of them is right.
        note: A few words on the target or the query, such as "target at rank 34".
    """

    hits: Sequence[Hit]
    text: str = ""
    picture: Picture | None = None
    picture_caption: str = ""
    target: Hit | None = None
    note: str = ""


@dataclass(frozen=True)
class Confusion:
    """Two things the model takes for one another: `name` was there, `mistaken_for` was said."""

    name: str
    mistaken_for: str
    count: int
    total: int | None = None
    picture: Picture | None = None
    mistaken_picture: Picture | None = None


@dataclass(frozen=True)
class Twins:
    """Two pictures that belong together, such as copies; `note` says how."""

    left: Hit
    right: Hit
    note: str = ""


def gallery(queries: Sequence[Query], store: PictureStore) -> Element:
    """Queries, each with its hits; where no hit has a picture, as cards with a list of words.

    Raises:
        ValueError: no queries, a query of nothing, without hits, or with a picture that is damaged.
    """
    if not queries:
        raise ValueError("gallery: no queries; pass at least one")
    for number, query in enumerate(queries):
        if query.picture is None and not query.text.strip():
            raise ValueError(f"gallery, query {number}: neither words nor a picture")
        if not query.hits:
            raise ValueError(f"gallery, query {number} ({query.text[:40]!r}): no hits")
    in_words = all(hit.picture is None for query in queries for hit in query.hits)
    draw = _word_card if in_words else _picture_row
    shown = [draw(query, store, f"gallery, query {number}") for number, query in enumerate(queries)]
    return element("div", *shown, class_="cards" if in_words else "rows")


def picture_grid(hits: Sequence[Hit], store: PictureStore) -> Element:
    """Pictures with their captions, without a question that they answer.

    Raises:
        ValueError: no pictures, or a damaged one.
    """
    if not hits:
        raise ValueError("pictures: none; leave the block out")
    tiles = [_hit(hit, store, f"pictures, number {number}") for number, hit in enumerate(hits)]
    return element("ol", *tiles, class_="hits")


def twins(pairs: Sequence[Twins], store: PictureStore) -> Element:
    """Pairs of pictures side by side, with a word between them.

    Raises:
        ValueError: no pairs, or a damaged picture.
    """
    if not pairs:
        raise ValueError("twins: no pairs; leave the block out")
    shown = []
    for number, pair in enumerate(pairs):
        place = f"twins, pair {number}"
        left, right = (
            _tile(hit.picture, hit.caption, store, place) for hit in (pair.left, pair.right)
        )
        between = element("div", caption(pair.note), class_="taken")
        shown.append(element("figure", left, between, right, class_="pair"))
    return element("div", *shown, class_="pairs")


def confusions(pairs: Sequence[Confusion], store: PictureStore) -> Element:
    """The most confused pairs: what was there, what was said instead, how often.

    Raises:
        ValueError: no pairs, a pair without counts, or a damaged picture.
    """
    if not pairs:
        raise ValueError("confusions: no pairs; leave the section out")
    cards = []
    for number, pair in enumerate(pairs):
        place = f"confusions, pair {number} ({pair.name[:40]!r})"
        if pair.count < 1 or (pair.total is not None and pair.total < pair.count):
            raise ValueError(f"{place}: {pair.count} of {pair.total} is no count of mistakes")
        often = (
            f"{pair.count}\u202f{TIMES}" if pair.total is None else f"{pair.count} of {pair.total}"
        )
        there = _tile(pair.picture, pair.name, store, place)
        said = _tile(pair.mistaken_picture, pair.mistaken_for, store, place)
        arrow = element(
            "div", element("b", often), _arrow(), only_for_ears("taken for"), class_="taken"
        )
        cards.append(element("figure", there, arrow, said, class_="pair"))
    return element("div", *cards, class_="pairs")


def space_map(
    coordinates: Float[np.ndarray, "points 2"],
    pictures: Sequence[Picture],
    captions: Sequence[str],
) -> Element:
    """Small pictures at given places, with a finder and a closer look under the pointer.

    Raises:
        ValueError: numbers of points, pictures and captions differ, no points, more than
            `MOST_POINTS`, coordinates that are not finite, or a damaged picture.
    """
    count = len(coordinates)
    if not count == len(pictures) == len(captions):
        raise ValueError(
            f"map: {count} points, {len(pictures)} pictures, {len(captions)} captions; "
            "pass one of each per point"
        )
    if not 0 < count <= MOST_POINTS:
        raise ValueError(
            f"map: {count} points; pass 1 to {MOST_POINTS}, a sample where there are more"
        )
    if not np.isfinite(coordinates).all():
        raise ValueError("map: coordinates that are not finite")
    low, high = coordinates.min(0), coordinates.max(0)
    places = np.rint((coordinates - low) / np.where(high > low, high - low, 1.0) * 9999)
    sheet, cell, columns = sprite_sheet(pictures, place="map")
    names = [caption(text).text or "" for text in captions]
    data = {
        "cell": cell,
        "columns": columns,
        "x": [int(x) for x in places[:, 0]],
        "y": [int(y) for y in places[:, 1]],
        "names": names,
    }
    finder = element(
        "input", type="search", placeholder="Find by name", aria_label="Find pictures by name"
    )
    card = element(
        "div", element("canvas"), element("p", dir="auto"), class_="look", hidden="hidden"
    )
    words = f"{count} pictures, each at its place in the embedding space; near means alike"
    return element(
        "figure",
        element("div", finder, element("output"), class_="finder"),
        element("div", element("canvas", role="img", aria_label=words), card, class_="stage"),
        element(
            "figcaption",
            "Pictures that would hide one another are moved a little apart.",
            class_="legend",
        ),
        element("img", src=sheet, alt="", hidden="hidden"),
        data_island(data),
        element(
            "noscript", "The map is drawn by the page's own script, which is switched off here."
        ),
        class_="map",
    )


def _picture_row(query: Query, store: PictureStore, place: str) -> Element:
    asked: list[Element] = []
    if query.picture is not None:
        asked.append(_tile(query.picture, query.picture_caption, store, place))
    if query.text:
        plus = element("span", "+", class_="plus") if query.picture is not None else None
        asked.append(element("p", plus, caption(query.text), class_="words"))
    if query.note:
        asked.append(element("p", caption(query.note), class_="note"))
    hits = [_hit(hit, store, place) for hit in query.hits]
    if query.target is not None and not any(hit.right for hit in query.hits):
        hits.append(_hit(query.target, store, place, missed=True))
    return element(
        "article",
        element("div", *asked, class_="asked"),
        element("ol", *hits, class_="hits"),
        class_="query",
    )


def _word_card(query: Query, store: PictureStore, place: str) -> Element:
    asked = [element("p", caption(query.text), class_="words")] if query.text else []
    if query.picture is not None:
        asked.insert(0, _tile(query.picture, query.picture_caption, store, place))
    hits = list(query.hits)
    missed = query.target is not None and not any(hit.right for hit in hits)
    lines = [_line(hit) for hit in hits]
    if missed and query.target is not None:
        lines.append(_line(query.target, missed=True))
    note = element("p", caption(query.note), class_="note") if query.note else None
    return element(
        "article",
        element("div", *asked, class_="asked"),
        element("div", element("ol", *lines, class_="said"), note),
        class_="card",
    )


def _hit(hit: Hit, store: PictureStore, place: str, *, missed: bool = False) -> Element:
    return element(
        "li",
        _tile(hit.picture, hit.caption, store, place, badge=_mark(hit, missed), score=hit.score),
        class_=_verdict(hit, missed),
    )


def _line(hit: Hit, *, missed: bool = False) -> Element:
    return element(
        "li",
        _mark(hit, missed),
        caption(hit.caption),
        _score(hit.score),
        class_=_verdict(hit, missed),
    )


def _verdict(hit: Hit, missed: bool) -> str | None:
    if missed:
        return "missed"
    return None if hit.right is None else "right" if hit.right else "wrong"


def _mark(hit: Hit, missed: bool) -> Element | None:
    """Right, wrong, or the target that was not found: a symbol, a colour, and a word to hear."""
    verdict = _verdict(hit, missed)
    if verdict is None:
        return None
    path, said = _MARKS[verdict]
    symbol = element("svg", element("path", d=path), viewBox="0 0 16 16", aria_hidden="true")
    return element("span", symbol, only_for_ears(said), class_="mark")


def _tile(
    picture: Picture | None,
    words: str,
    store: PictureStore,
    place: str,
    *,
    badge: Element | None = None,
    score: float | None = None,
) -> Element:
    shown = None
    if picture is not None:
        # The words stand beneath the picture already: nothing to say twice.
        drawing = store.show(picture, alt=words, place=place)
        shown = element("div", drawing, badge, class_="frame")
        badge = None
    below = element("div", badge, caption(words) if words else None, _score(score), class_="name")
    return element("div", shown, below, class_="shown")


def _score(score: float | None) -> Element | None:
    if score is None:
        return None
    return element("small", f"{score:.2f}" if math.isfinite(score) else EN_DASH, class_="score")


def _arrow() -> Element:
    return element(
        "svg",
        element("path", d="M1 6h28M24 1.5 29 6 24 10.5"),
        viewBox="0 0 30 12",
        aria_hidden="true",
    )
