"""One self-contained HTML page out of reports and pictures: no requests, light and dark, for print.

Composed from the top down; every block refuses missing data with one clear line, and the same input
gives the same bytes.

    page = Page("Emoji demo", "A small dual encoder, trained here in eight minutes")
    page.headline([Tile("Image to text, recall@1", report["image_to_text_recall@1"])])
    section = page.section("Retrieval", "Pictures by an artist the model never saw.")
    section.figures(report)
    section.gallery([Query(text="red heart", hits=[Hit("red heart", picture, 0.71, right=True)])])
    page.write("report.html")

Captions are text from strangers: everything is escaped by construction (see `eval.report_html`),
and the page's own content policy lets no script run but the one that comes with it.
"""

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from eval.report_charts import Chart, Series, line_chart
from eval.report_galleries import (
    Confusion,
    Hit,
    Query,
    Twins,
    confusions,
    gallery,
    picture_grid,
    space_map,
    twins,
)
from eval.report_histograms import Histogram, histogram
from eval.report_html import EN_DASH, Element, caption, element, render
from eval.report_pictures import Picture, PictureStore
from eval.report_shares import shares_bar
from eval.report_tables import Number, Tile, figure_table, headline, method_table, word_table
from eval.results import Report

__all__ = [
    "Chart",
    "Confusion",
    "Histogram",
    "Hit",
    "Number",
    "Page",
    "Picture",
    "Query",
    "Section",
    "Series",
    "Tile",
    "Twins",
]


class Section:
    """A titled part of a page. Each method appends one block and returns the section."""

    def __init__(self, title: str, lead: str, anchor: str, pictures: PictureStore) -> None:
        self.title = title
        self.anchor = anchor
        self._pictures = pictures
        self._blocks = [element("h2", title)]
        self.text(lead)

    def text(self, paragraph: str) -> "Section":
        """A paragraph of plain text; empty adds nothing."""
        if paragraph:
            self._blocks.append(element("p", paragraph, class_="prose"))
        return self

    def subtitle(self, title: str, lead: str = "") -> "Section":
        """A smaller heading inside the section."""
        self._blocks.append(element("h3", title))
        return self.text(lead)

    def charts(self, charts: Sequence[Chart | Histogram]) -> "Section":
        """Line charts and histograms side by side."""
        if not charts:
            raise ValueError(f"section {self.title!r}: no charts; pass at least one")
        drawn = [
            line_chart(chart) if isinstance(chart, Chart) else histogram(chart) for chart in charts
        ]
        return self._add(element("div", *drawn, class_="charts"))

    def shares(self, parts: Mapping[str, float], *, unit: str = "") -> "Section":
        """Parts of a whole as one bar, with their numbers."""
        return self._add(shares_bar(parts, unit=unit))

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str | int]]) -> "Section":
        """A table of words and whole numbers."""
        return self._add(word_table(heads, rows))

    def pictures(self, hits: Sequence[Hit]) -> "Section":
        """Pictures with their captions, one beside the other."""
        return self._add(picture_grid(hits, self._pictures))

    def figures(self, report: Report, *, labels: Mapping[str, str] | None = None) -> "Section":
        """One report: a row per figure with its interval, how far above chance, how many items.

        `labels` maps figure names to words for readers.
        """
        return self._add(figure_table(report, labels or {}))

    def comparison(
        self,
        reports: Mapping[str, Report],
        *,
        figures: Sequence[str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> "Section":
        """Methods side by side: a row per method, a column per figure (default: the first's)."""
        return self._add(method_table(reports, figures, labels or {}))

    def gallery(self, queries: Sequence[Query]) -> "Section":
        """Queries (words, a picture, or both) with their hits, right and wrong ones marked."""
        return self._add(gallery(queries, self._pictures))

    def twins(self, pairs: Sequence[Twins]) -> "Section":
        """Pairs of pictures side by side."""
        return self._add(twins(pairs, self._pictures))

    def confusions(self, pairs: Sequence[Confusion]) -> "Section":
        """The pairs most often taken for one another."""
        return self._add(confusions(pairs, self._pictures))

    def map(
        self,
        coordinates: Float[np.ndarray, "points 2"],
        pictures: Sequence[Picture],
        captions: Sequence[str],
    ) -> "Section":
        """Pictures at their places in the embedding space (see `eval.projection.project_2d`)."""
        return self._add(space_map(coordinates, pictures, captions))

    def facts(self, groups: Mapping[str, Mapping[str, object]]) -> "Section":
        """Settings, versions, fingerprints and times, as named groups of name and value."""
        if not groups or not all(groups.values()):
            raise ValueError(f"section {self.title!r}: facts without entries")
        return self._add(
            element(
                "div", *[_fact_group(name, facts) for name, facts in groups.items()], class_="facts"
            )
        )

    def _add(self, block: Element) -> "Section":
        self._blocks.append(block)
        return self

    def _element(self) -> Element:
        return element("section", *self._blocks, id=self.anchor)


class Page:
    """A report page: a title, key figures, then sections in the order in which they are added.

    Args:
        title: its heading.
        subtitle: a sentence beneath.
        renew_s: seconds after which a reader's copy loads itself anew, for a page that is written
            again and again; None = never.
    """

    def __init__(self, title: str, subtitle: str = "", *, renew_s: int | None = None) -> None:
        if not title.strip():
            raise ValueError("report page: empty title")
        self._title = title
        self._subtitle = subtitle
        self._renew_s = renew_s
        self._headline: Element | None = None
        self._sections: list[Section] = []
        self._pictures = PictureStore()

    def headline(self, tiles: Sequence[Tile | Number]) -> None:
        """Set the key figures at the head of the page: value, interval, how many times chance."""
        self._headline = headline(tiles)

    def section(self, title: str, lead: str = "") -> Section:
        """Append a section and return it, to be filled."""
        if not title.strip():
            raise ValueError("report page: a section needs a title")
        words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        section = Section(title, lead, f"{len(self._sections) + 1}-{words}", self._pictures)
        self._sections.append(section)
        return section

    def html(self) -> str:
        """The whole page as text."""
        if self._headline is None and not self._sections:
            raise ValueError(f"report page {self._title!r}: nothing on it")
        script = _asset("page.js")
        links = [
            element("a", section.title, href=f"#{section.anchor}") for section in self._sections
        ]
        body = element(
            "body",
            element(
                "header",
                element("h1", self._title),
                element("p", self._subtitle, class_="subtitle") if self._subtitle else None,
                element("nav", *links, aria_label="Sections") if len(links) > 1 else None,
                self._headline,
            ),
            element("main", *[section._element() for section in self._sections]),
            self._pictures.definitions(),
            element("script", script),
        )
        return "<!DOCTYPE html>\n" + render(element("html", self._head(script), body, lang="en"))

    def write(self, path: str | Path) -> Path:
        """Write the page to `path`, whole or not at all, and return the path.

        Raises:
            ValueError: there is nothing on the page.
            FileNotFoundError: the folder does not exist.
        """
        path = Path(path)
        data = self.html().encode("utf-8")
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"{path}: the folder {path.parent} does not exist; make it first"
            )
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _head(self, script: str) -> Element:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        # No requests, and no script but ours: a caption that slipped through could do nothing.
        policy = (
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )
        renew = None
        if self._renew_s is not None:
            renew = element("meta", http_equiv="refresh", content=str(self._renew_s))
        return element(
            "head",
            element("meta", charset="utf-8"),
            renew,
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", self._title),
            element("link", rel="icon", href="data:,"),
            element("style", _asset("page.css")),
        )


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _fact_group(name: str, facts: Mapping[str, object]) -> Element:
    entries: list[Element] = []
    for key, value in facts.items():
        entries.append(element("dt", caption(key)))
        entries.append(element("dd", caption(_fact(value))))
    return element("div", element("h3", name), element("dl", *entries))


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact(part) for part in value)
    return EN_DASH if value is None else str(value)
