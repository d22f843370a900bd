"""Many queries from one file."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from pipelines.config import ConfigError, build, value_for
from pipelines.schemas.search import QueryConfig


@dataclass(frozen=True)
class Asked:
    """A query and where it stands: `queries.txt line 3`; empty for that of the command line."""

    query: QueryConfig
    place: str = ""


def read_queries(path: Path, given: Mapping[str, Any]) -> Iterator[Asked]:
    """Yield the queries of a file in order.

    - `.txt`: a text a line; empty lines are passed over.
    - `.jsonl`: an object a line with keys of `QueryConfig`, or a text.
    - `.csv`, `.parquet`: columns named as these keys; empty cells are not given.

    Pictures are looked for beside the file, where their path is relative.

    Args:
        path: the file; its suffix says the format.
        given: keys of `QueryConfig` that hold for every query which does not say otherwise.

    Raises:
        ConfigError: the file cannot be read, or a line of it is no query; the line is named.
    """
    count = 0
    try:
        for place, values in _READERS[path.suffix.lower()](path):
            for picture in _pictures_in(values):
                picture["image"] = _beside(path, picture["image"])
            query = build(QueryConfig, {**given, **values}, origin=place)
            if not query.asks:
                raise ConfigError(f"{place}: nothing to look for; give text or image")
            count += 1
            yield Asked(query, place)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error})") from error
    except (pa.ArrowException, csv.Error) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as {path.suffix[1:]} ({line})") from error
    if not count:
        raise ConfigError(f"{path}: holds no query")


def _pictures_in(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The mappings of a query that name a picture."""
    terms = values.get("terms")
    for one in (values, *(terms if isinstance(terms, list) else ())):
        if isinstance(one, dict) and one.get("image") is not None:
            yield one


def _beside(path: Path, image: Any) -> Any:
    if isinstance(image, list):
        return [_beside(path, one) for one in image]
    return str(path.parent / image) if isinstance(image, str) else image


def _texts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        yield f"{path} line {number}", {"text": line}


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        place = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place}: is not JSON ({error})") from error
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise ConfigError(f"{place}: is neither an object nor a text")
        yield place, value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.strip()


def _cells(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _check_columns(path, reader.fieldnames or [])
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise ConfigError(f"{place}: has not as many cells as the first line")
            yield place, {key: _cell(key, text) for key, text in row.items() if text.strip()}


def _cell(key: str, text: str) -> Any:
    """A list where it is written as one; names of files and words stay as they are."""
    plain = key in ("image", "minus") and not text.lstrip().startswith("[")
    return text if plain else value_for(QueryConfig, key, text)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    file = parquet.ParquetFile(path)
    _check_columns(path, file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            yield f"{path} row {number}", {k: v for k, v in row.items() if v is not None}
            number += 1


def _check_columns(path: Path, names: list[str] | Any) -> None:
    known = list(QueryConfig.model_fields)
    if not {"text", "image", "like", "terms"} & set(names):
        raise ConfigError(f"{path}: has no column text or image; it has {', '.join(names)}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"{path}: unknown column {unknown[0]!r}; leave it out or rename it; known: "
            f"{', '.join(known)}"
        )


_READERS = {".txt": _texts, ".jsonl": _objects, ".csv": _cells, ".parquet": _rows}
