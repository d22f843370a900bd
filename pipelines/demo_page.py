"""The page of the demo: what was trained, how well it does, and what that looks like."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.bundle import load
from eval.index.card import IndexCard
from eval.projection import project_2d
from eval.report import Chart, Confusion, Hit, Page, Query, Series, Tile
from eval.results import Report
from eval.search.searcher import Searcher
from pipelines import run_folder
from pipelines.evaluate import Evaluation
from pipelines.fuse import Comparison
from pipelines.pictures import Pictures
from pipelines.schemas import DemoConfig

MAP_POINTS = 700
"""Pictures on the map: enough to see neighbourhoods, few enough to see pictures."""

_LABELS = {
    "image_to_text_recall@1": "picture to name, recall@1",
    "image_to_text_recall@5": "picture to name, recall@5",
    "image_to_text_recall@10": "picture to name, recall@10",
    "image_to_text_median_rank": "picture to name, median rank",
    "text_to_image_recall@1": "name to picture, recall@1",
    "text_to_image_recall@5": "name to picture, recall@5",
    "text_to_image_recall@10": "name to picture, recall@10",
    "text_to_image_median_rank": "name to picture, median rank",
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class_recall": "mean per class",
}


@dataclass(frozen=True)
class DemoRun:
    """What the stages of a demo found out."""

    config: DemoConfig
    evaluations: Mapping[str, Evaluation]
    comparison: Comparison
    seconds: Mapping[str, float]


def write_page(run: DemoRun, path: Path) -> None:
    """Compose the page and write it, whole or not at all."""
    out = run.config.out
    environment = run_folder.read_json(out / "pretrain" / "environment.json")
    pictures = Pictures(out / "shards" / "vendor")
    page = Page(
        "A CLIP-style model, trained here",
        f"{environment['data']['samples']:,} pictures with names by five artists, "
        f"{environment['parameters'] / 1e6:.1f} M parameters, "
        f"{run.seconds.get('pretrain', 0):.0f} seconds of training on "
        f"{environment['device']}. Tested on an artist and on concepts that it never saw.",
    )
    page.headline(_tiles(run))
    _training(page, out / "pretrain" / "metrics.jsonl")
    _retrieval(page, run, pictures)
    _search(page, run, pictures)
    _composed(page, run, pictures)
    _confusions(page, run, pictures)
    _map(page, run, pictures)
    _facts(page, run, environment)
    page.write(path)


def _tiles(run: DemoRun) -> list[Tile]:
    vendor, unseen = (
        run.evaluations[title].report for title in ("unseen artist", "unseen concepts")
    )
    best = run.comparison.reports[run.comparison.best]
    return [
        Tile("Unseen artist: picture to name, recall@1", vendor["image_to_text_recall@1"],
             f"among {vendor.protocol['texts']:,} names"),
        Tile("Unseen artist: picture to name, recall@5", vendor["image_to_text_recall@5"],
             f"among {vendor.protocol['texts']:,} names"),
        Tile("Unseen concepts: picture to name, recall@1", unseen["image_to_text_recall@1"],
             f"among {unseen.protocol['texts']:,} names"),
        Tile("Picture + words: recall@1", best["recall@1"],
             f"{run.comparison.best} fusion, {best.protocol['candidates']:,} candidates"),
    ]  # fmt: skip


def _training(page: Page, metrics: Path) -> None:
    lines = run_folder.read_metrics(metrics)
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "image_to_text_recall@1" in line]

    def series(name: str, key: str, source: list[dict[str, Any]]) -> Series:
        return Series(name, [one["samples"] for one in source], [one[key] for one in source])

    charts = [
        Chart("Loss", [series("InfoNCE", "loss", steps)], unit="nats"),
        Chart(
            "Accuracy within the batch",
            [series("picture to its name", "batch_accuracy", steps)],
            unit="fraction",
        ),
        Chart("Learning rate", [series("learning rate", "learning_rate", steps)]),
        Chart("Temperature", [series("temperature", "temperature", steps)]),
    ]
    if checks:
        recalls = Chart(
            "Recall on the unseen artist",
            [
                series("name @1", "image_to_text_recall@1", checks),
                series("name @5", "image_to_text_recall@5", checks),
                series("picture @1", "text_to_image_recall@1", checks),
            ],
            unit="fraction",
        )
        charts.insert(1, recalls)
    page.section("Training", "What the run wrote to metrics.jsonl.").charts(charts)


def _retrieval(page: Page, run: DemoRun, pictures: Pictures) -> None:
    section = page.section(
        "What it knows",
        "Every figure with its 95 % bootstrap interval; the mark is what guessing would reach. "
        "A wrong candidate that ties with the right one counts as ahead of it.",
    )
    for title, one in run.evaluations.items():
        section.subtitle(_capital(title), _describe(one.report)).figures(one.report, labels=_LABELS)
    vendor = run.evaluations["unseen artist"]
    galleries = vendor.report.details["galleries"]
    names = _distinct(vendor.pairs.captions)
    shown = page.section(
        "Pictures and names of the unseen artist",
        "Queries drawn at random, not chosen; the five best candidates of each.",
    )
    shown.subtitle("From picture to name").gallery(
        [
            Query(
                picture=pictures[int(vendor.pairs.ids[one["query"]])],
                picture_caption=vendor.pairs.captions[one["query"]],
                hits=[
                    Hit(names[hit["item"]], score=hit["score"], right=hit["right"])
                    for hit in one["candidates"]
                ],
                note="" if one["rank"] <= 5 else f"the right name is at rank {one['rank']:,}",
            )
            for one in galleries["image_to_text"][:8]
        ]
    )
    shown.subtitle("From name to picture").gallery(
        [
            Query(
                text=names[one["query"]],
                hits=[
                    Hit(
                        vendor.pairs.captions[hit["item"]],
                        pictures[int(vendor.pairs.ids[hit["item"]])],
                        hit["score"],
                        right=hit["right"],
                    )
                    for hit in one["candidates"]
                ],
                note="" if one["rank"] <= 5 else f"the right picture is at rank {one['rank']:,}",
            )
            for one in galleries["text_to_image"][:8]
        ]
    )


def _search(page: Page, run: DemoRun, pictures: Pictures) -> None:
    model, searcher = load(run.config.out / "bundle"), Searcher(run.config.out / "index")
    found = searcher.search(model.encode_text(run.config.queries).numpy(), 6)
    section = page.section(
        "Search in your own words",
        f"FAISS ({searcher.card.factory}) over {searcher.card.rows:,} pictures of the unseen "
        "artist; nobody says what is right here. To ask for more: align serve "
        f"{run.config.out / 'index'}",
    )
    section.gallery(
        [
            Query(
                text=text,
                hits=[
                    Hit(row["caption"], pictures[row["id"]], float(score))
                    for row, score in zip(rows, scores, strict=True)
                ],
            )
            for text, rows, scores in zip(run.config.queries, found.rows, found.scores, strict=True)
        ]
    )


def _composed(page: Page, run: DemoRun, pictures: Pictures) -> None:
    comparison = run.comparison
    best = comparison.reports[comparison.best]
    gain = comparison.gains[comparison.best]["recall@1"]
    section = page.section(
        "A picture and a change in words",
        f"{best.protocol['queries']:,} queries over {best.protocol['bases']} base concepts that no "
        "fusion head was trained on, by the unseen artist; intervals treat all queries of a base "
        f"as one draw. The {comparison.best} head gains {100 * gain.value:.1f} points of recall@1 "
        f"over the plain sum (95 % interval {100 * gain.low:.1f} to {100 * gain.high:.1f}); as the "
        f"best of {len(comparison.gains)} heads on these very queries, it is flattered a little.",
    )
    section.comparison(comparison.reports, figures=["recall@1", "recall@5", "recall@10"])
    index = Searcher(run.config.out / "index")
    row_of = {row["key"]: row for row in index.metadata(index.ids)}
    queries = []
    for one in best.details["gallery"][:8]:
        reference = row_of[comparison.pairs.reference[one["query"]]]
        target = row_of[comparison.pairs.target[one["query"]]]
        hits = [
            Hit(row["caption"], pictures[row["id"]], hit["score"], right=hit["right"])
            for hit in one["candidates"]
            for row in index.metadata(np.array([hit["id"]]))
        ]
        queries.append(
            Query(
                text=comparison.pairs.change[one["query"]],
                picture=pictures[reference["id"]],
                picture_caption=reference["caption"],
                hits=hits,
                target=Hit(target["caption"], pictures[target["id"]]),
            )
        )
    section.subtitle(
        f"With the {comparison.best} head", "Queries drawn at random, not chosen."
    ).gallery(queries)


def _confusions(page: Page, run: DemoRun, pictures: Pictures) -> None:
    """Confusions by subgroup happen often enough to count; by name each happens once."""
    one = run.evaluations["unseen artist, by subgroup"]
    first = {name: row for row, name in reversed(list(enumerate(one.pairs.values("subgroup"))))}
    pairs = [
        Confusion(
            name=pair["truth"],
            mistaken_for=pair["predicted"],
            count=pair["count"],
            total=pair["of"],
            picture=pictures[int(one.pairs.ids[pair["images"][0]])],
            mistaken_picture=pictures[int(one.pairs.ids[first[pair["predicted"]]])],
        )
        for pair in one.report.details["confused"][:12]
    ]
    if pairs:
        page.section(
            "Most confused", "Subgroups of Unicode that the model takes for one another."
        ).confusions(pairs)


def _map(page: Page, run: DemoRun, pictures: Pictures) -> None:
    pairs = run.evaluations["unseen artist"].pairs
    count = min(MAP_POINTS, len(pairs.ids))
    rows = np.sort(np.random.default_rng(0).choice(len(pairs.ids), count, replace=False))
    page.section(
        "The space",
        f"{count} pictures of the unseen artist where t-SNE puts their embeddings: neighbours are "
        "alike to the model, distances between groups mean nothing.",
    ).map(
        project_2d(pairs.images[rows]),
        [pictures[sample] for sample in pairs.ids[rows].tolist()],
        [pairs.captions[row] for row in rows],
    )


def _facts(page: Page, run: DemoRun, environment: dict[str, Any]) -> None:
    training = run.config.pretrain
    card = IndexCard.load(run.config.out / "index")
    page.section("How it was made").facts(
        {
            "Model": {
                "image tower": training.model.image.name,
                "text tower": training.model.text.name,
                "parameters": f"{environment['parameters']:,}",
                "space": f"{training.model.dim} dimensions",
                "picture size": f"{training.model.image_size} px",
            },
            "Training": {
                "samples": f"{training.samples:,}",
                "batch": training.batch_size,
                "optimiser": training.optimizer.name,
                "precision": training.precision,
                "compute threads": environment["threads"],
                "seed": training.seed,
                "data fingerprint": environment["data"]["fingerprint"][:16],
            },
            "Index": {
                "kind": " ".join([card.factory, card.knobs]).strip(),
                "rows": f"{card.rows:,}",
                "bytes a row": f"{card.bytes_per_vector:.0f}",
                **{
                    f"recall@10 of {one.queries} queries": f"{100 * one.at_10.value:.1f} %"
                    for one in card.reached
                },
            },
            "Seconds": {name: f"{value:.1f}" for name, value in run.seconds.items()},
            "Versions": environment["libraries"],
        }
    )


def _describe(report: Report) -> str:
    protocol = report.protocol
    if report.task == "retrieval":
        return f"{protocol['images']:,} pictures, {protocol['texts']:,} names."
    return f"{protocol['images']:,} pictures, {protocol['classes']:,} classes."


def _capital(title: str) -> str:
    return title[:1].upper() + title[1:]


def _distinct(captions: list[str]) -> list[str]:
    return list(dict.fromkeys(captions))
