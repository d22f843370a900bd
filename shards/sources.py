"""Records out of what people have: Parquet tables with pictures in them, folders of pictures."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.damage import BadSample, Reason

MAX_KEY = 80
"""Characters of a key; with its extension it must fit the 100 bytes of a tar header."""

_PICTURES = (".webp", ".jpg", ".jpeg", ".png", ".gif", ".bmp")
_UNFIT = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Record:
    """One image-text pair, not yet packed.

    Attributes:
        key: Names the record: letters, digits, `_` and `-` (see `safe_key`).
        image: The encoded picture; its format is told by its first bytes.
        caption: Its text, or None if it has none.
        fields: Everything else that is known of it; must be JSON.
        origin: Where it came from, for messages.
        fault: Why the source could not read all of it, if so.
    """

    key: str
    image: bytes
    caption: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    fault: BadSample | None = None


def safe_key(name: str) -> str:
    """Turns a name into a key without dots, slashes and blanks, which tools for shards trip over.

    Runs of other characters become one `-`. If anything but slashes was replaced, or the name is
    too long, a hash of it is added, so that different names stay different.

        >>> safe_key("cats/0001"), safe_key("noto-1f600"), safe_key("a b")
        ('cats-0001', 'noto-1f600', 'a-b-c8687a08')
    """
    key = _UNFIT.sub("-", name.strip("/"))
    if not key or len(key) > MAX_KEY or _UNFIT.search(name.replace("/", "-")):
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        key = f"{key[: MAX_KEY - 9]}-{digest}"
    return key


class ParquetSource(Sequence[Record]):
    """The rows of Parquet files as records; the columns not used for them go to `fields`.

    The rows that `where` keeps are held in memory, pictures still encoded.

    Args:
        paths: One or more files, with the same columns.
        image: Column with encoded pictures: bytes, or a struct with a field `bytes`.
        caption: Column with the text.
        key: Names a row from its columns, such as `"{vendor}-{codepoints}"`; without it, file name
            and row number.
        where: Keeps the rows in which each column has the value, or one of the values, given.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not Parquet, a column is missing or of the wrong type, or no row is
            left.
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
        self._files = [Path(p) for p in ([paths] if isinstance(paths, Path | str) else paths)]
        if not self._files:
            raise ValueError("no Parquet file was named")
        self._image, self._caption, self._key = image, caption, key
        where = dict(where or {})
        names = [name for _, name, _, _ in Formatter().parse(key or "") if name is not None]
        self._tables: list[pa.Table] = []
        self._rows: list[np.ndarray] = []
        for path in self._files:
            table = _read(path, [image, caption, *names, *where])
            _check_types(path, table, image=image, caption=caption)
            keep = _matches(path, table, where)
            self._tables.append(table.filter(pa.array(keep)))
            self._rows.append(np.flatnonzero(keep))
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        if not len(self):
            offers = "; ".join(_offer(path, list(where)) for path in self._files[:3])
            raise ValueError(f"where={where} leaves no row of {offers}")

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
        row = number - int(self._ends[file]) + len(self._rows[file])
        values = self._tables[file].slice(row, 1).to_pylist()[0]
        picture = values.pop(self._image)
        path = self._files[file]
        name = self._key.format(**values) if self._key else f"{path.stem}-{self._rows[file][row]}"
        return Record(
            key=safe_key(name),
            image=(picture["bytes"] if isinstance(picture, dict) else picture) or b"",
            caption=values.pop(self._caption),
            fields=values,
            origin=path.name,
        )


class FolderSource(Sequence[Record]):
    """The pictures below a folder as records, sorted by path.

    `cat.jpg` takes its caption from `cat.txt`, or from `"caption"` in `cat.json`; the rest of
    `cat.json` goes to `fields`, and so does the path, as `file`. Nothing is read before it is asked
    for.

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
        self._stems = Counter(path.with_suffix("") for path in self._paths)

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
        # Of `cat.jpg` and `cat.png`, side by side, each keeps its extension in its key.
        alone = self._stems[path.with_suffix("")] == 1
        key = safe_key(name.removesuffix(path.suffix) if alone else name)
        origin = str(self._folder)
        try:
            fields = _json_beside(path)
            text = path.with_suffix(".txt")
            # Bytes that are not UTF-8 survive as surrogates, to be found and told when packing.
            caption = fields.pop("caption", None)
            if text.is_file():
                caption = text.read_text("utf-8", "surrogateescape")
            image = path.read_bytes()
        except BadSample as fault:
            return Record(key, b"", None, origin=origin, fault=fault)
        except OSError as error:
            fault = BadSample(Reason.UNREADABLE, f"{error.filename}: {error.strerror}")
            return Record(key, b"", None, origin=origin, fault=fault)
        caption = caption if isinstance(caption, str) else None
        return Record(key, image, caption, {**fields, "file": name}, origin)


def _json_beside(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        fields = json.loads(beside.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.BAD_JSON, f"{beside.name}: {error}") from None
    if not isinstance(fields, dict):
        raise BadSample(Reason.BAD_JSON, f"{beside.name} holds a {type(fields).__name__}")
    return fields


def _read(path: Path, needed: Sequence[str]) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error})") from None
    for name in needed:
        if name not in table.column_names:
            columns = ", ".join(table.column_names)
            raise ValueError(f"{path} has no column {name!r}; it has {columns}")
    return table


def _check_types(path: Path, table: pa.Table, *, image: str, caption: str) -> None:
    kind = table.schema.field(image).type
    if pa.types.is_struct(kind) and "bytes" in {child.name for child in kind}:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(f"{path}: column {image!r} holds {kind}; it must hold encoded pictures")
    kind = table.schema.field(caption).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: column {caption!r} holds {kind}; a caption must be a string")


def _matches(path: Path, table: pa.Table, where: Mapping[str, Any]) -> np.ndarray:
    """Which rows `where` keeps (bool)."""
    keep = np.ones(len(table), bool)
    for name, wanted in where.items():
        values = list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]
        column = table[name]
        try:
            lookup = pc.SetLookupOptions(pa.array(values, column.type))
            keep &= np.asarray(pc.call_function("is_in", [column], lookup))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            raise ValueError(
                f"{path}: column {name!r} holds {column.type}, which {wanted!r} cannot be"
            ) from None
    return keep


def _offer(path: Path, columns: list[str]) -> str:
    """What a file has to offer in the columns of a filter that left nothing."""
    table = pq.read_table(path, columns=columns)
    offers = []
    for name in columns:
        values = [str(value) for value in table[name].unique().to_pylist()]
        more = ", ..." if len(values) > 8 else ""
        offers.append(f"{name} is one of {', '.join(values[:8])}{more}")
    return f"{path.name} ({'; '.join(offers) or 'it has none'})"
