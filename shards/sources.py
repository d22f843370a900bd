"""Records out of what people have: Parquet tables with pictures in them, folders of pictures."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.decode import sniff_extension

_PICTURES = (".webp", ".jpg", ".jpeg", ".png", ".gif", ".bmp")
_UNFIT = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Record:
    """One image-text pair, not yet packed.

    Attributes:
        key: Names the record: letters, digits, `_` and `-` (see `safe_key`).
        image: The encoded picture.
        extension: Its format, such as `jpg`.
        caption: Its text, or None if it has none.
        fields: Everything else that is known of it; must be JSON.
        origin: Where it came from, for messages.
    """

    key: str
    image: bytes
    extension: str
    caption: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


def safe_key(name: str) -> str:
    """Turns a name into a key without dots, slashes and blanks, which tools for shards trip over.

    Runs of other characters become one `-`; if one of them was not a slash, a hash of the name is
    added, so that different names stay different.

        >>> safe_key("cats/0001"), safe_key("noto-1f600")
        ('cats-0001', 'noto-1f600')
    """
    key = _UNFIT.sub("-", name).strip("-")
    if _UNFIT.search(name.replace("/", "-")) or not key:
        key = f"{key}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return key.lstrip("-")


class ParquetSource(Sequence[Record]):
    """The rows of Parquet files as records; the columns not used for them go to `fields`.

    Args:
        paths: One or more files, with the same columns.
        image: Column with encoded pictures: bytes, or a struct with a field `bytes`.
        caption: Column with the text.
        key: Names a row from its columns, such as `"{vendor}-{codepoints}"`; without it, file name
            and row number.
        where: Keeps the rows in which each column has the value, or one of the values, given.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not Parquet, a column is missing, or no row is left.
    """

    def __init__(
        self,
        paths: Path | str | Sequence[Path | str],
        *,
        image: str = "image",
        caption: str = "caption",
        key: str | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> None:
        files = [Path(paths)] if isinstance(paths, Path | str) else [Path(path) for path in paths]
        if not files:
            raise ValueError("no Parquet file was named")
        self._image, self._caption = image, caption
        self._key = key
        names = [name for _, name, _, _ in Formatter().parse(key or "") if name is not None]
        needed = [image, caption, *names, *(where or {})]
        self._tables = [_select(path, needed, where or {}) for path in files]
        self._files = files
        self._ends = np.cumsum([len(table) for table, _ in self._tables])
        if not len(self):
            chosen = "; ".join(_offer(path, where or {}) for path in files[:3])
            raise ValueError(f"where={dict(where or {})!r} leaves no row: {chosen}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        file = int(np.searchsorted(self._ends, number, side="right"))
        table, rows = self._tables[file]
        row = number - (int(self._ends[file - 1]) if file else 0)
        values = table.slice(row, 1).to_pylist()[0]
        picture = values.pop(self._image)
        data = picture["bytes"] if isinstance(picture, dict) else picture
        name = (
            self._key.format(**values) if self._key else f"{self._files[file].stem}-{rows[row]:08d}"
        )
        return Record(
            key=safe_key(name),
            image=data or b"",
            extension=sniff_extension(data or b"") or "bin",
            caption=values[self._caption],
            fields={key: value for key, value in values.items() if key != self._caption},
            origin=self._files[file].name,
        )


class FolderSource(Sequence[Record]):
    """The pictures below a folder as records, sorted by path.

    `cat.jpg` takes its caption from `cat.txt`, or from `"caption"` in `cat.json`; the rest of
    `cat.json` goes to `fields`. Pictures are read when they are asked for.

    Args:
        folder: Searched with all folders below it; hidden files are passed over.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no picture.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; name the folder of the pictures")
        self._paths = sorted(
            path
            for path in self._folder.rglob("*")
            if path.suffix.lower() in _PICTURES and not path.name.startswith(".") and path.is_file()
        )
        if not self._paths:
            raise ValueError(f"{folder} holds no picture ({', '.join(_PICTURES)})")

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        path = self._paths[index]
        name = path.relative_to(self._folder).as_posix()
        fields = _beside(path, ".json")
        text = path.with_suffix(".txt")
        caption = text.read_text("utf-8") if text.is_file() else fields.pop("caption", None)
        return Record(
            key=safe_key(name.removesuffix(path.suffix)),
            image=path.read_bytes(),
            extension=path.suffix.lower().removeprefix("."),
            caption=caption,
            fields={**fields, "file": name},
            origin=str(self._folder),
        )


def _beside(path: Path, suffix: str) -> dict[str, Any]:
    beside = path.with_suffix(suffix)
    if not beside.is_file():
        return {}
    try:
        fields = json.loads(beside.read_bytes())
    except ValueError as error:
        raise ValueError(f"{beside} is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{beside} holds a {type(fields).__name__}; it must hold an object")
    return fields


def _select(
    path: Path, needed: Sequence[str], where: Mapping[str, Any]
) -> tuple[pa.Table, np.ndarray]:
    """The rows of a file that `where` keeps, and their numbers in the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error})") from None
    for name in needed:
        if name not in table.column_names:
            raise ValueError(
                f"{path} has no column {name!r}; it has {', '.join(table.column_names)}"
            )
    keep = np.ones(len(table), bool)
    for name, wanted in where.items():
        column = table[name]
        values = wanted if isinstance(wanted, list | tuple | set) else [wanted]
        try:
            lookup = pc.SetLookupOptions(pa.array(list(values), column.type))
            found = pc.call_function("is_in", [column], lookup)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{path}: column {name!r} holds {column.type}: {error}") from None
        keep &= np.asarray(found)
    return table.filter(pa.array(keep)), np.flatnonzero(keep)


def _offer(path: Path, where: Mapping[str, Any]) -> str:
    """What a file has to offer in the columns of a filter that left nothing."""
    table = pq.read_table(path, columns=list(where))
    offers = []
    for name in where:
        values = [str(value) for value in table[name].unique().to_pylist()]
        more = ", ..." if len(values) > 8 else ""
        offers.append(f"{name} is one of {', '.join(values[:8])}{more}")
    return f"{path.name}: {'; '.join(offers) or 'it has no row'}"
