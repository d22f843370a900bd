"""`align search`: rows for words, pictures, or both, from the command line or a file of queries."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from tqdm import tqdm

from align.fusion.store import head_fingerprint
from align.preprocess import preprocess
from eval.search.searcher import Searcher
from pipelines import answers as written
from pipelines.answers import Answer, hit_of
from pipelines.config import ConfigError
from pipelines.heads import find_head
from pipelines.models import OpenModel, open_model
from pipelines.pictures import IndexPictures, open_picture
from pipelines.queries import Query, QueryEncoder, Term, check_terms, picture_and_text, summed
from pipelines.query_files import Asked, read_queries
from pipelines.schemas import SearchConfig
from pipelines.schemas.search import QueryConfig

_FILTERS = ("where", "fields", "min_score", "collapse", "diversity", "offset")


def run(config: SearchConfig) -> int:
    """Answer the query, or those of a file, in the format that was asked for."""
    search = Search(config)
    if config.queries is None:
        asked: Iterable[Asked] = [Asked(_query_of(config))]
    else:
        given = {name: getattr(config, name) for name in _said(config)}
        many = read_queries(config.queries, given)
        hidden = True if config.out is None else None  # the bar and the hits would mix
        asked = iter(tqdm(many, desc="search", unit=" queries", disable=hidden))
    _write(search.answers(asked), search, config)
    return 0


class Search:
    """An open index with its model, which is loaded when the first query needs it.

    Args:
        config: where index and model are.

    Raises:
        ConfigError: model and index do not belong together.
        ValueError: the index is damaged.
    """

    def __init__(self, config: SearchConfig) -> None:
        self.searcher = Searcher(config.index, check=config.check, memory_map=config.memory_map)
        self._config = config

    @cached_property
    def opened(self) -> OpenModel:
        """The model of the index."""
        card, config = self.searcher.card, self._config
        place = config.model or card.origin.get("model")
        if place is None:
            raise ConfigError(
                f"model: {config.index} does not say which model it was made with; name it"
            )
        opened = open_model(place)
        made_with = card.fingerprints.get("model")  # an index of another tool may not say
        if not made_with and opened.model.config.dim != card.dim:
            raise ConfigError(
                f"{place}: gives vectors of {opened.model.config.dim}, but {config.index} holds "
                f"vectors of {card.dim}: it was made with another model"
            )
        if made_with and opened.fingerprint != made_with:
            raise ConfigError(
                f"{place}: not the model that {config.index} was made with; embed and index again"
            )
        return opened

    @cached_property
    def encoder(self) -> QueryEncoder:
        """Its heads are added when they are asked for."""
        return QueryEncoder(self.opened.model)

    @property
    def searched(self) -> str:
        """What is searched, in words."""
        kind = {"image": "pictures", "text": "texts"}.get(self.searcher.card.modality, "rows")
        return f"{self.searcher.live} {kind} in {self._config.index}"

    def answers(self, asked: Iterable[Asked]) -> Iterator[Answer]:
        """Yield the answer of each query, in order, so many queries at a time."""
        waiting = iter(asked)
        while batch := list(islice(waiting, self._config.batch_size)):
            queries = [self._placed(one) for one in batch]
            vectors = self._vectors(queries, batch)
            numbered = enumerate(batch)
            for _, group in groupby(numbered, key=lambda one: _options(one[1].query)):
                members = [number for number, _ in group]
                yield from self._found(vectors[members], [batch[n] for n in members])

    def _found(
        self, vectors: Float32[np.ndarray, "queries dim"], asked: Sequence[Asked]
    ) -> Iterator[Answer]:
        """Answers of queries that have the same options."""
        query = asked[0].query
        options = {name: getattr(query, name) for name in _FILTERS if getattr(query, name)}
        if query.min_score is not None:
            options["min_score"] = query.min_score
        if any(one.query.like for one in asked):
            options["exclude"] = [one.query.like for one in asked]
        found = self.searcher.search(vectors, query.k, **options)
        for number, one in enumerate(asked):
            parts = zip(
                found.rows[number], found.scores[number], found.copies[number], strict=False
            )
            hits = [hit_of(row, float(score), int(copies)) for row, score, copies in parts]
            yield Answer(one, hits, found.matching, found.plan)

    def _placed(self, asked: Asked) -> Query:
        """A query with its pictures opened and its head loaded; mistakes say where they stand."""
        try:
            query = self._query(asked.query)
            if query.head is None and _is_ready(query):
                check_terms(query.terms, self.searcher.card.dim)
            else:
                self.encoder.check(query)
        except ConfigError as error:
            raise _at(asked, error) from error
        return query

    def _query(self, asked: QueryConfig) -> Query:
        balance = asked.balance
        if balance is not None and not (asked.text and asked.image):
            raise ConfigError("balance: lies between pictures and words; give image and text")
        picture, words = (1.0, 1.0) if balance is None else (2 * (1 - balance), 2 * balance)
        terms = [Term(self._picture(path), picture) for path in asked.image]
        terms += [Term(asked.text, words)] if asked.text else []
        terms += [Term(self._row(row), 1.0) for row in asked.like]
        for term in asked.terms:
            if term.id is not None:
                terms.append(Term(self._row(term.id), term.weight))
            elif term.image is not None:
                terms.append(Term(self._picture(term.image), term.weight))
            else:
                terms.append(Term(term.text or "", term.weight))
        terms += [Term(text, -1.0) for text in asked.minus]
        return Query(tuple(terms), self._head(asked.head, terms))

    def _picture(self, path: Path) -> Image.Image:
        """A user's picture as the tower takes it, so that many of them take little memory."""
        opened = open_picture(path)
        config = self.opened.model.config
        pixels = preprocess(opened, config.image_size, fit=config.fit)
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def _row(self, number: int) -> Float32[np.ndarray, " dim"]:
        """The vector of a row of the index."""
        row = self.searcher.places(np.array([number], np.int64))
        if row[0] < 0:
            raise ConfigError(f"like: the index holds no row with id {number}")
        return self.searcher.rows.vectors(row)[0]

    def _head(self, name: str | None, terms: Sequence[Term]) -> str | None:
        """The head to fuse with; of an index of fused rows, theirs."""
        if name is None:
            name = self._own_head() if picture_and_text(terms) else None
            if name is None:
                return None
        if name not in self.encoder.heads:
            head = find_head(name, self.opened.place, towers=self.opened.fingerprint)
            self.encoder.heads[name] = head
        return name

    def _own_head(self) -> str | None:
        """The folder of the head that fused the rows of the index; None where none did."""
        card = self.searcher.card
        place = card.origin.get("head") if card.modality == "fused" else None
        if place is None:
            return None
        if not Path(place).is_dir():
            raise ConfigError(
                f"head: the rows of {self._config.index} were fused by the head in {place}, which "
                "is no longer there; name its folder, or another head"
            )
        if head_fingerprint(place) != card.fingerprints.get("head"):
            raise ConfigError(
                f"head: {place} is not the head that {self._config.index} was made with; name that "
                "one, or embed and index again"
            )
        return str(place)

    def _vectors(
        self, queries: Sequence[Query], asked: Sequence[Asked]
    ) -> Float32[np.ndarray, "queries dim"]:
        try:
            if all(query.head is None and _is_ready(query) for query in queries):
                return np.stack([_summed(query) for query in queries])
            return self.encoder.vectors(queries)
        except ConfigError as error:
            if len(queries) == 1:
                raise _at(asked[0], error) from error
        # One of them is at fault: this finds which.
        return np.concatenate(
            [self._vectors([query], [one]) for query, one in zip(queries, asked, strict=True)]
        )


def _is_ready(query: Query) -> bool:
    """Whether a query needs no model: all of it was embedded before."""
    return all(isinstance(term.value, np.ndarray) for term in query.terms if term.weight)


def _summed(query: Query) -> Float32[np.ndarray, " dim"]:
    terms = [term for term in query.terms if term.weight]
    rows = [torch.from_numpy(np.asarray(term.value)) for term in terms]
    return summed([term.weight for term in terms], rows).numpy()


def _at(asked: Asked, error: ConfigError) -> ConfigError:
    return ConfigError(f"{asked.place}: {error}") if asked.place else error


def _options(query: QueryConfig) -> tuple[Any, ...]:
    """What queries must share to be searched for together."""
    return (query.k, *(repr(getattr(query, name)) for name in _FILTERS))


def _said(config: SearchConfig) -> list[str]:
    """Keys of a query that the verb was given."""
    return [name for name in QueryConfig.model_fields if name in config.model_fields_set]


def _query_of(config: SearchConfig) -> QueryConfig:
    return QueryConfig.model_construct(**{name: getattr(config, name) for name in _said(config)})


def _write(answers: Iterable[Answer], search: Search, config: SearchConfig) -> None:
    is_one = config.queries is None
    match config.output:
        case "table":
            draws = is_one or config.out is not None
            shown = list(answers) if draws else answers
            _print(written.as_table(shown, search.searched))
            if draws:
                _draw(shown, search, config.drawing)
        case "picture":
            _draw(answers, search, config.drawing)
        case "json":
            _put(written.as_json_text(answers, is_one=is_one), config.out)
        case "jsonl":
            _put(written.as_json_lines(answers), config.out)
        case "csv":
            _put(written.as_csv(answers), config.out)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _put(lines: Iterable[str], out: Path | None) -> None:
    """Print lines, or write them into a file that appears whole."""
    if out is None:
        _print(lines)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".writing-{out.name}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    print(f"hits: {out}")


def _draw(answers: Iterable[Answer], search: Search, out: Path) -> None:
    """Draw the hits; captions stand for pictures that are gone, and one line says why."""
    pictures = IndexPictures(search.searcher.card.sources)
    sheet, gone = written.as_picture(answers, pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".writing-{out.name}")
    try:
        sheet.save(beside)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    if gone:
        others = f" (and {len(gone) - 1} other reasons)" if gone[1:] else ""
        print(f"captions instead of pictures: {gone[0]}{others}")
    print(f"picture: {out}")


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("search")
