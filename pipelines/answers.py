"""What was found, as a table for people, JSON, CSV or a picture."""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipelines.config import ConfigError
from pipelines.pictures import GridHit, IndexPictures, PicturesGoneError, draw_grid, stacked
from pipelines.query_files import Asked
from pipelines.schemas.search import QueryConfig

MOST_DRAWN = 480
"""Hits in one picture."""
_KNOWN = ("id", "key", "caption", "shard")


@dataclass(frozen=True)
class Answer:
    """What one query found.

    Attributes:
        asked: the query.
        hits: best first: id, score, caption, key, shard, copies (how many near-duplicates it
            stands for), fields.
        matching: how many rows the filters and removals leave.
        plan: how it was looked for, in words.
    """

    asked: Asked
    hits: list[dict[str, Any]]
    matching: int
    plan: str

    @property
    def shortage(self) -> str:
        """Why there are fewer hits than were asked for; empty where there are not."""
        query, found = self.asked.query, len(self.hits)
        if found == query.k:
            return ""
        by = [f"min_score={query.min_score:g}"] if query.min_score is not None else []
        by += [f"collapse={query.collapse:g}"] if query.collapse is not None else []
        by += [f"offset={query.offset}"] if query.offset else []
        by += ["like (they are left out themselves)"] if query.like else []
        filtered = " match the filter" if query.where or query.fields else " can be found"
        also = f"; fewer remain by {', '.join(by)}" if by else ""
        return f"{found} hits instead of {query.k}: {self.matching:,} rows{filtered}{also}"

    def as_json(self) -> dict[str, Any]:
        """As JSON values: what was asked, and what was found."""
        query = self.asked.query
        return {
            "query": query.model_dump(mode="json", exclude_defaults=True),
            "k": query.k,
            "matching": self.matching,
            "plan": self.plan,
            "hits": self.hits,
        }


def hit_of(row: Mapping[str, Any], score: float, copies: int) -> dict[str, Any]:
    """A hit by its parts: what every row has, and its own fields apart."""
    return {
        "id": int(row["id"]),
        "score": round(score, 6),
        **{name: row.get(name) for name in _KNOWN[1:]},
        "copies": copies,
        "fields": {name: value for name, value in row.items() if name not in _KNOWN},
    }


def in_words(query: QueryConfig) -> str:
    """A query as one line."""
    parts = [(1.0, str(path)) for path in query.image]
    parts += [(1.0, query.text)] if query.text else []
    parts += [(1.0, f"like {number}") for number in query.like]
    for term in query.terms:
        what = term.text or term.image or f"like {term.id}"
        size = "" if abs(term.weight) == 1 else f"{abs(term.weight):g} * "
        parts.append((term.weight, f"{size}{what}"))
    parts += [(-1.0, text) for text in query.minus]
    line = ""
    for weight, what in parts:
        sign = "- " if weight < 0 else "+ "
        line += sign.lstrip("+ ") + what if not line else f" {sign}{what}"
    line += f", balance {query.balance:g}" if query.balance is not None else ""
    line += f", fused by {query.head}" if query.head else ""
    line += f", where {query.where}" if query.where else ""
    line += f", with {json.dumps(query.fields, ensure_ascii=False)}" if query.fields else ""
    return " ".join(line.split())


def as_table(answers: Iterable[Answer], searched: str) -> Iterator[str]:
    """Lines for people: each query, then its hits.

    Args:
        answers: of the queries.
        searched: what was searched, for the line of the query.
    """
    for number, answer in enumerate(answers):
        if number:
            yield ""
        yield f"{in_words(answer.asked.query)}  ({searched})"
        for place, hit in enumerate(answer.hits, answer.asked.query.offset + 1):
            caption = " ".join(str(hit["caption"] or "").split())
            alike = f"  and {hit['copies']} alike" if hit["copies"] else ""
            yield f"{place:3d}  {hit['score']:6.3f}  {caption}  [{hit['key'] or hit['id']}]{alike}"
        if answer.shortage:
            yield answer.shortage


def as_json_text(answers: Iterable[Answer], *, is_one: bool) -> Iterator[str]:
    """One JSON value: of one query an object, of several a list of them."""
    if is_one:
        for answer in answers:
            yield _dumps(answer.as_json(), indent=1)
        return
    begin = "["
    for answer in answers:
        yield begin + "\n" + _dumps(answer.as_json())
        begin = ","
    yield "]"


def as_json_lines(answers: Iterable[Answer]) -> Iterator[str]:
    """A JSON object a query, each on a line."""
    for answer in answers:
        yield _dumps(answer.as_json())


def as_csv(answers: Iterable[Answer]) -> Iterator[str]:
    """A line a hit; `query` counts the queries from 0, `fields` is JSON."""
    names = ["query", "asked", "rank", "id", "score", "caption", "key", "shard", "copies", "fields"]
    yield _csv_line(names)
    for number, answer in enumerate(answers):
        asked = in_words(answer.asked.query)
        for rank, hit in enumerate(answer.hits, answer.asked.query.offset + 1):
            values = {**hit, "query": number, "asked": asked, "rank": rank}
            values["fields"] = _dumps(hit["fields"])
            yield _csv_line([values[name] for name in names])


def _csv_line(values: list[Any]) -> str:
    sink = io.StringIO()
    csv.writer(sink, lineterminator="").writerow(values)
    return sink.getvalue()


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_numbers_of_json(value), ensure_ascii=False, indent=indent, default=str)


def _numbers_of_json(value: Any) -> Any:
    """JSON has neither NaN nor infinity: metadata that holds them gets null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _numbers_of_json(one) for key, one in value.items()}
    return [_numbers_of_json(one) for one in value] if isinstance(value, list) else value


def as_picture(answers: Iterable[Answer], pictures: IndexPictures) -> tuple[Image.Image, list[str]]:
    """The hits of each query as a grid, below each other; and lines about pictures that are gone.

    Raises:
        ConfigError: they are more hits than fit into a picture.
    """
    sheets, gone, drawn = [], [], 0
    for answer in answers:
        drawn += len(answer.hits)
        if drawn > MOST_DRAWN:
            raise ConfigError(
                f"format: a picture shows {MOST_DRAWN} hits at most; ask for fewer, or for "
                "format=jsonl"
            )
        cells = []
        for hit in answer.hits:
            try:
                picture = pictures[hit["id"]]
            except PicturesGoneError as error:
                picture = None
                gone.append(str(error))
            name = hit["caption"] or hit["key"] or str(hit["id"])
            cells.append(GridHit(picture, name, hit["score"], hit["copies"]))
        sheets.append(draw_grid(in_words(answer.asked.query), cells))
    return stacked(sheets), list(dict.fromkeys(gone))
