"""Evaluation tasks by name: embeddings and labels in, a report with intervals out.

Every task takes NumPy arrays, checks them, and states what it did in the report's protocol. The
intervals are 95 % percentile bootstrap intervals (:mod:`eval.intervals`); ties count against the
model (:mod:`eval.metrics`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy import ndarray

from eval.intervals import bootstrap_mean, bootstrap_median
from eval.metrics import (
    chance_at_k,
    chance_median_rank,
    class_recall,
    first_hit_ranks,
    hits_at_k,
    right_counts,
    top_candidates,
)
from eval.results import Figure, Outcomes, Report
from eval.search.searcher import SampleId, Searcher

_TIES = "a wrong candidate that ties with the best right one is ranked before it"
_SCORE_TIE = 1e-6
"""FAISS scores this near count as ties: float32 products of equal vectors may differ as much."""

DIRECTIONS = ("image_to_text", "text_to_image")
"""The two ways of :func:`retrieval`."""


def zero_shot(
    images: Float[ndarray, "images dim"],
    classes: Float[ndarray, "classes dim"],
    labels: Int64[ndarray, " images"],
    class_names: Sequence[str],
    *,
    confused: int = 20,
    title: str = "",
    protocol: Mapping[str, Any] | None = None,
) -> Report:
    """Classify images by their nearest class vector: top-1, top-5, mean per class recall.

    Intervals of top-1 and top-5 are over images, that of mean per class recall over classes.

    Args:
        images: Embeddings of the images.
        classes: One vector per class, such as :func:`eval.prompts.class_prototypes` gives.
        labels: The class of each image, as a row of `classes`.
        class_names: The name of each class.
        confused: How many of the most frequent mistakes to list in `details["confused"]`, with up
            to eight of their images (row numbers) each.
        title: Title of the report.
        protocol: What else figures must share to be comparable (data fingerprint, templates).

    Raises:
        ValueError: No images, fewer than two classes, a label that is no class, as many names as
            no classes, or embeddings without a direction.
    """
    _check_options("zero_shot", confused=confused)
    if len(classes) < 2:
        raise ValueError(f"zero_shot: {len(classes)} classes; with fewer than two all is right")
    if len(class_names) != len(classes):
        raise ValueError(f"zero_shot: {len(class_names)} class names for {len(classes)} classes")
    if len(images) == 0:
        raise ValueError("zero_shot: there are no images")
    if (outside := (labels < 0) | (labels >= len(classes))).any():
        image = int(np.argmax(outside))
        raise ValueError(f"zero_shot: image {image} has label {labels[image]}, which is no class")
    ranks = first_hit_ranks(
        images, classes, query_labels=labels, candidate_labels=np.arange(len(classes))
    )
    outcomes = {f"top{k}": Outcomes(hits_at_k(ranks, k)) for k in (1, 5)}
    per_class = class_recall(outcomes["top1"].values, labels)
    outcomes["mean_per_class_recall"] = Outcomes(per_class.recall)
    chance = {f"top{k}": min(k, len(classes)) / len(classes) for k in (1, 5)}
    chance["mean_per_class_recall"] = 1 / len(classes)
    counted = zip(per_class.labels, per_class.recall, per_class.counts, strict=True)
    return Report(
        task="zero_shot",
        title=title,
        figures=tuple(_fraction(name, some, chance[name]) for name, some in outcomes.items()),
        protocol={
            "items": _items([labels.tolist()]),
            "images": len(images),
            "classes": len(classes),
            "classes_without_images": len(classes) - len(per_class.labels),
            "ties": _TIES,
            **(protocol or {}),
        },
        details={
            "confused": _confused(images, classes, labels, class_names, ranks, confused),
            "per_class": [
                {"name": class_names[label], "images": int(count), "recall": float(recall)}
                for label, recall, count in counted
            ],
        },
        outcomes=outcomes,
    )


def retrieval(
    images: Float[ndarray, "images dim"],
    texts: Float[ndarray, "texts dim"],
    *,
    image_labels: Int64[ndarray, " images"],
    text_labels: Int64[ndarray, " texts"],
    directions: Sequence[str] = DIRECTIONS,
    ks: Sequence[int] = (1, 5, 10),
    gallery: int = 12,
    seed: int = 0,
    title: str = "",
    protocol: Mapping[str, Any] | None = None,
) -> Report:
    """Find texts by images and images by texts: recall@k in the field's sense, and the median rank.

    A candidate is right if its label equals the query's, so that an image may have several captions
    and a caption several images; a query is hit if one right candidate is among the first k.
    Queries of one label (five captions of one image) are drawn together by the bootstrap.

    Args:
        images: Embeddings of the images.
        texts: Embeddings of the texts.
        image_labels: Which images and texts belong together.
        text_labels: The same for the texts.
        directions: Which of :data:`DIRECTIONS` to measure; with distractors among the candidates
            only one of them makes sense.
        ks: Where to cut.
        gallery: How many queries per direction, drawn at random, to list in `details["galleries"]`
            with their first five candidates (row numbers).
        seed: Draws the gallery.
        title: Title of the report.
        protocol: What else figures must share to be comparable (data fingerprint, split).

    Raises:
        ValueError: An empty side, a query without a right candidate (in the measured directions),
            an unknown direction, a cut below 1, or embeddings without a direction.
    """
    _check_options("retrieval", gallery=gallery, ks=ks)
    if unknown := [name for name in directions if name not in DIRECTIONS] or not directions:
        raise ValueError(f"retrieval: directions {unknown or '()'}; choose from {DIRECTIONS}")
    if len(images) == 0 or len(texts) == 0:
        raise ValueError(f"retrieval: {len(images)} images and {len(texts)} texts; both are needed")
    sides = {"image": (images, image_labels), "text": (texts, text_labels)}
    figures: list[Figure] = []
    outcomes: dict[str, Outcomes] = {}
    galleries: dict[str, Any] = {}
    for direction in directions:
        asked, answered = direction.split("_to_")
        (queries, labels), (candidates, candidate_labels) = sides[asked], sides[answered]
        try:
            ranks = first_hit_ranks(
                queries, candidates, query_labels=labels, candidate_labels=candidate_labels
            )
        except ValueError as error:
            raise ValueError(f"retrieval, {direction}: {error}") from error
        right = right_counts(labels, candidate_labels)
        among = np.full(len(queries), len(candidates))
        for k in ks:
            name = f"{direction}_recall@{k}"
            outcomes[name] = Outcomes(hits_at_k(ranks, k), labels)
            figures.append(_fraction(name, outcomes[name], chance_at_k(right, among, k)))
        median = bootstrap_median(ranks + 1.0, groups=labels)
        chance = chance_median_rank(right, among)
        name = f"{direction}_median_rank"
        figures.append(Figure.of(name, median, chance=chance, unit="rank", higher_is_better=False))
        drawn = _drawn(len(queries), gallery, seed=seed)
        matches = labels[drawn, None] == candidate_labels
        galleries[direction] = _gallery(queries[drawn], candidates, drawn, matches, ranks[drawn])
    return Report(
        task="retrieval",
        title=title,
        figures=tuple(figures),
        protocol={
            "items": _items([image_labels.tolist()], [text_labels.tolist()]),
            "images": len(images),
            "texts": len(texts),
            "labels": len(np.union1d(image_labels, text_labels)),
            "ties": _TIES,
            **(protocol or {}),
        },
        details={"galleries": galleries},
        outcomes=outcomes,
    )


def composed_retrieval(
    queries: Float[ndarray, "queries dim"],
    targets: Sequence[Collection[SampleId]],
    searcher: Searcher,
    *,
    references: Sequence[Collection[SampleId]] | None = None,
    groups: Int64[ndarray, " queries"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    gallery: int = 12,
    seed: int = 0,
    title: str = "",
    protocol: Mapping[str, Any] | None = None,
) -> Report:
    """Find target pictures in a FAISS index by composed queries (a picture and a change in words).

    Candidates are all rows of the index, less the query's references. Scores within 1e-6 of a
    target's count as ties, and ties against the model.

    Args:
        queries: One vector per query, in the space of the index.
        targets: Per query the sample ids that are right, at least one of them in the index.
        searcher: The open index.
        references: Per query the sample ids that are removed (the picture of the query itself).
        groups: Queries that the bootstrap draws together (those of one base concept).
        ks: Where to cut.
        gallery: How many queries, drawn at random, to list in `details["gallery"]` with their first
            five hits (sample ids).
        seed: Draws the gallery.
        title: Title of the report.
        protocol: What else figures must share to be comparable (data fingerprint, split, edits).

    Raises:
        ValueError: No queries, lists of different lengths, a query without a target in the index
            or with a target among its references, a cut below 1, or vectors the index cannot take.
    """
    _check_options("composed_retrieval", gallery=gallery, ks=ks)
    references = [()] * len(queries) if references is None else references
    right, among = _composed_counts(targets, references, searcher, count=len(queries))
    # If the wrong ones that tie with the best right one fill a list of this length, up to the last
    # cut, the right one is behind the cut wherever FAISS happened to put it.
    deepest = max(ks) + int(right.max())
    found = searcher.neighbours(queries, deepest, exclude=references)
    is_right = np.array(
        [
            np.isin(ids, [int(target) for target in some])
            for ids, some in zip(found.ids, targets, strict=True)
        ]
    )
    best = np.where(is_right, found.scores, -np.inf).max(axis=1)
    ahead = ~is_right & (found.ids >= 0) & (found.scores >= best[:, None] - _SCORE_TIE)
    ranks = np.count_nonzero(ahead, axis=1)
    outcomes = {f"recall@{k}": Outcomes(hits_at_k(ranks, k), groups) for k in ks}
    drawn = _drawn(len(queries), gallery, seed=seed)
    return Report(
        task="composed_retrieval",
        title=title,
        figures=tuple(
            _fraction(f"recall@{k}", outcomes[f"recall@{k}"], chance_at_k(right, among, k))
            for k in ks
        ),
        protocol={
            "items": _items(
                [sorted(map(int, some)) for some in targets],
                [sorted(map(int, some)) for some in references],
                [] if groups is None else [groups.tolist()],
            ),
            "queries": len(queries),
            "candidates": searcher.card.rows,
            "index": searcher.card.factory,
            "references_removed": sum(len(some) for some in references),
            "ties": _TIES,
            **(protocol or {}),
        },
        details={
            "gallery": [
                {
                    "query": int(query),
                    "hit": bool(ranks[query] < 1),
                    "targets": sorted(int(target) for target in targets[query]),
                    "candidates": [
                        {"id": int(row), "score": float(score), "right": bool(good)}
                        for row, score, good in zip(
                            found.ids[query, :5],
                            found.scores[query, :5],
                            is_right[query, :5],
                            strict=True,
                        )
                        if row >= 0
                    ],
                }
                for query in drawn
            ]
        },
        outcomes=outcomes,
    )


def _confused(
    images: Float[ndarray, "images dim"],
    classes: Float[ndarray, "classes dim"],
    labels: Int64[ndarray, " images"],
    class_names: Sequence[str],
    ranks: Int64[ndarray, " images"],
    most: int,
) -> list[dict[str, Any]]:
    """The most frequent pairs of a class and the nearest wrong class its missed images went to."""
    missed = np.flatnonzero(ranks > 0)
    if len(missed) == 0:
        return []
    nearest = top_candidates(images[missed], classes, 2).rows
    # Where the right class ties with a wrong one it may be listed first; the wrong one is second.
    guess = np.where(nearest[:, 0] == labels[missed], nearest[:, 1], nearest[:, 0])
    pairs = Counter(zip(labels[missed].tolist(), guess.tolist(), strict=True))
    frequent = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [
        {
            "truth": class_names[truth],
            "predicted": class_names[wrong],
            "count": count,
            "of": int(np.count_nonzero(labels == truth)),
            "images": missed[(labels[missed] == truth) & (guess == wrong)][:8].tolist(),
        }
        for (truth, wrong), count in frequent
    ]


def _gallery(
    queries: Float[ndarray, "drawn dim"],
    candidates: Float[ndarray, "candidates dim"],
    drawn: Int64[ndarray, " drawn"],
    right: Bool[ndarray, "drawn candidates"],
    ranks: Int64[ndarray, " drawn"],
) -> list[dict[str, Any]]:
    if len(drawn) == 0:
        return []
    top = top_candidates(queries, candidates, 5)
    return [
        {
            "query": int(query),
            "rank": int(rank) + 1,
            "candidates": [
                {"item": int(row), "score": float(score), "right": bool(right[place, row])}
                for row, score in zip(top.rows[place], top.scores[place], strict=True)
            ],
        }
        for place, (query, rank) in enumerate(zip(drawn, ranks, strict=True))
    ]


def _composed_counts(
    targets: Sequence[Collection[SampleId]],
    references: Sequence[Collection[SampleId]],
    searcher: Searcher,
    *,
    count: int,
) -> tuple[Int64[ndarray, " queries"], Int64[ndarray, " queries"]]:
    """Right candidates and all candidates of each query."""
    if count == 0:
        raise ValueError("composed_retrieval: there are no queries")
    if len(targets) != count or len(references) != count:
        raise ValueError(
            f"composed_retrieval: {count} queries, but targets for {len(targets)} and references "
            f"for {len(references)}"
        )
    right = np.empty(count, dtype=np.int64)
    among = np.empty(count, dtype=np.int64)
    for query, (some, removed) in enumerate(zip(targets, references, strict=True)):
        if both := set(some) & set(removed):
            raise ValueError(
                f"composed_retrieval: query {query} has sample {min(both)} as target and reference"
            )
        right[query] = len(searcher.rows.held(some))
        among[query] = searcher.card.rows - len(searcher.rows.held(removed))
        if right[query] == 0:
            raise ValueError(
                f"composed_retrieval: no target of query {query} is in the index "
                f"(sample ids {sorted(map(int, some))[:5]})"
            )
    return right, among


def _fraction(name: str, outcomes: Outcomes, chance: float) -> Figure:
    interval = bootstrap_mean(outcomes.values, groups=outcomes.groups)
    return Figure.of(name, interval, chance=chance)


def _drawn(total: int, count: int, *, seed: int) -> Int64[ndarray, " drawn"]:
    return np.random.default_rng(seed).choice(total, size=min(count, total), replace=False)


def _items(*parts: Sequence[Sequence[int]]) -> str:
    """A short fingerprint of what is right for which item, in order."""
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_options(
    task: str, *, ks: Sequence[int] = (1,), gallery: int = 0, confused: int = 0
) -> None:
    if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
        raise ValueError(f"{task}: ks must be different whole numbers from 1 on, not {list(ks)}")
    if gallery < 0 or confused < 0:
        raise ValueError(f"{task}: gallery and confused cannot be negative")


TASKS: dict[str, Callable[..., Report]] = {
    "zero_shot": zero_shot,
    "retrieval": retrieval,
    "composed_retrieval": composed_retrieval,
}
"""All tasks by name."""
