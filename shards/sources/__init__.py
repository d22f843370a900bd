"""Records out of what people have: folders, tables, caption files, shards.

| module | holds |
|---|---|
| `record` | `Record`, and `Source`: the law of every format |
| `folders` | pictures with texts beside them; a folder for each class |
| `rows`, `tables`, `parquet` | tables with pictures in them, or with paths of pictures |
| `annotations` | the caption files of COCO and Flickr |
| `packed` | shards, to be packed anew |

A format is a subclass of `Source` and an entry in `FORMATS`; its keyword arguments are its options.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from shards.sources.annotations import CocoSource, FlickrSource
from shards.sources.folders import ClassSource, FolderSource
from shards.sources.packed import ShardSource
from shards.sources.parquet import ParquetSource
from shards.sources.record import MAX_KEY, Record, Source, safe_key
from shards.sources.tables import JsonTableSource, TextTableSource

__all__ = [
    "FORMATS",
    "MAX_KEY",
    "ClassSource",
    "CocoSource",
    "FlickrSource",
    "FolderSource",
    "JsonTableSource",
    "ParquetSource",
    "Record",
    "ShardSource",
    "Source",
    "TextTableSource",
    "find_format",
    "open_source",
    "safe_key",
]

FORMATS: dict[str, type[Source]] = {
    "parquet": ParquetSource,
    "csv": TextTableSource,
    "jsonl": JsonTableSource,
    "coco": CocoSource,
    "flickr": FlickrSource,
    "shards": ShardSource,
    "classes": ClassSource,
    "folder": FolderSource,
}
"""The formats by name; where several recognise a place, the first of them is meant."""


def find_format(places: Sequence[str]) -> str:
    """The name of the first format that recognises all places.

    Raises:
        FileNotFoundError: If a place is not there.
        ValueError: If there is no such format.
    """
    for name, source in FORMATS.items():
        if all(map(source.recognises, places)):
            return name
    for place in places:
        if "://" not in place and not Path(place).exists():
            raise FileNotFoundError(f"there is no file or folder {place}")
    several = " are not all of one format" if len(places) > 1 else " is of no format that is known"
    raise ValueError(f"{', '.join(places[:3])}{several}; set format to one of {', '.join(FORMATS)}")


def open_source(places: Sequence[str], *, format: str, **options: Any) -> Source:
    """Opens a source by the name of its format.

    Args:
        places: Files, folders, or URLs of shards.
        format: A name from `FORMATS`, or `package.module:Name` of a `Source` elsewhere.
        options: The format's own; those that are None keep its defaults.

    Raises:
        FileNotFoundError: If a place is not there.
        ValueError: If there is no such format, it does not take an option, or the source is unfit.
    """
    source = _format(format)
    takes = [
        name
        for name, parameter in inspect.signature(source).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := next((name for name in given if name not in takes), None):
        raise ValueError(
            f"format {format} does not take {unknown!r}; it takes {', '.join(takes) or 'nothing'}"
        )
    if not source.many and len(places) != 1:
        raise ValueError(f"format {format} takes one source, not {len(places)}")
    constructor: Any = source
    return constructor(list(places) if source.many else places[0], **given)


def _format(name: str) -> type[Source]:
    if ":" in name:
        try:
            found = resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"format {name!r} cannot be loaded ({error})") from None
        if not (isinstance(found, type) and issubclass(found, Source)):
            raise ValueError(f"format {name!r} is no subclass of shards.sources.Source")
        return found
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
