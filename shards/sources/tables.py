"""Records out of tables whose rows name picture files: CSV, JSON lines, and more to come."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar

import numpy as np

from shards.damage import BadSample, Reason
from shards.sources.record import (
    Record,
    Source,
    identity,
    picture_keys,
    read_file,
    safe_key,
    template_key,
)
from shards.sources.rows import JsonRows, Rows, read_text_table

_FIRST_LOOKED_FOR = 20


class TableSource(Source):
    """The rows of tables as records; the columns not used for them go to `fields`.

    Rows that name the same picture become one record with several captions; where their other
    columns differ, the field is the list of all values. Rows are held in memory, pictures are read
    when they are asked for.

    Args:
        paths: One or more files, with the same columns.
        image: Column with the path of each picture, from the folder of the table or `root`.
        caption: Column with the text, or a list of texts.
        key: Names a row from its columns, such as `"{vendor}-{codepoints}"`; without it, the path
            of the picture, or file name and row number where rows are not merged.
        where: Keeps the rows in which each column has the value, or one of the values, given.
        root: The folder that paths of pictures start from.
        merge: Whether rows with the same picture are one record.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is no such table, a column is missing or of the wrong type, no row is
            left, or the pictures are not there.
    """

    many: ClassVar[bool] = True
    endings: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        paths: Path | str | Sequence[Path | str],
        *,
        image: str = "image",
        caption: str = "caption",
        key: str | None = None,
        where: Mapping[str, Any] | None = None,
        root: Path | str | None = None,
        merge: bool = True,
    ) -> None:
        files = [Path(p) for p in ([paths] if isinstance(paths, Path | str) else paths)]
        if not files:
            raise ValueError(f"no {' or '.join(self.endings)} file was named")
        self._image, self._caption, self._key = image, caption, key
        self._root = None if root is None else Path(root)
        where = dict(where or {})
        named = (name for _, name, _, _ in Formatter().parse(key or "") if name)
        needed = {
            "image": [image],
            "caption": [caption],
            "key": [name.split(".")[0].split("[")[0] for name in named],
            "where": list(where),
        }
        self._tables = [self._read(path, needed) for path in files]
        if where:
            offers = [rows.offer(where) for rows in self._tables[:3]]
            for rows in self._tables:
                rows.keep(where)
            if not sum(map(len, self._tables)):
                raise ValueError(f"where={where} leaves no row of {'; '.join(offers)}")
        if not sum(map(len, self._tables)):
            found = next((rows.problems[0] for rows in self._tables if rows.problems), None)
            raise ValueError(f"{files[0]} holds no row" + (f" ({found.detail})" if found else ""))
        self.problems = tuple(problem for rows in self._tables for problem in rows.problems)
        self._starts, self._places, self._keys = self._groups(merge=merge)
        options = {"image": image, "caption": caption, "key": key, "where": where, "merge": merge}
        self.identity = identity(type(self).__name__, {**options, "root": root}, files)

    @classmethod
    def recognises(cls, place: str) -> bool:
        """A file with one of the endings."""
        return Path(place).suffix.lower() in cls.endings and Path(place).is_file()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def record(self, index: int) -> Record:
        """A row, or all rows of one picture."""
        places = self._places[self._starts[index] : self._starts[index + 1]].tolist()
        every = [self._tables[table].row(row) for table, row in places]
        (table, row), values = places[0], every[0]
        path = self._tables[table].path
        if self._key is not None:
            key = template_key(self._key, values)
        elif self._keys is not None:
            key = self._keys[index]
        else:
            key = safe_key(f"{path.stem}-{self._tables[table].numbers[row]}")
        try:
            image = self._picture(table, row, values.get(self._image))
        except BadSample as fault:
            return Record(key, b"", None, origin=path.name, fault=fault)
        captions: list[str] = []
        for one in every:
            text = one.get(self._caption)
            captions += text if isinstance(text, list) else [] if text is None else [text]
        captions = [text for text in captions if isinstance(text, str)]
        fields = self._fields(every)
        if len(captions) < 2:
            return Record(key, image, captions[0] if captions else None, fields, path.name)
        return Record(key, image, None, fields, path.name, captions=captions)

    @abstractmethod
    def _load(self, path: Path) -> Rows:
        """Reads a file."""

    def _read(self, path: Path, needed: Mapping[str, Sequence[str]]) -> Rows:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        rows = self._load(path)
        rows.need(needed)
        kind = rows.kind(self._caption)
        if kind not in {"text", "texts"}:
            raise ValueError(
                f"{path}: column {self._caption!r} holds {kind}; a caption must be a string"
            )
        return rows

    def _groups(self, *, merge: bool) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
        """Which rows form each record, `places[starts[i]:starts[i + 1]]` as (table, row); its key.

        Without keys each row is a record, named by its number.
        """
        named = [self._names(rows) for rows in self._tables]
        sizes = [len(rows) for rows in self._tables]
        numbers = np.concatenate([np.arange(size) for size in sizes])
        places = np.stack([np.repeat(np.arange(len(sizes)), sizes), numbers], axis=1)
        if not merge or None in named:
            return np.arange(len(places) + 1), places, None
        groups: dict[str | int, int] = {}
        of_row = np.zeros(len(places), np.int64)
        names: list[str] = []
        folders = [str(self._root or rows.path.parent) for rows in self._tables]
        every = [name for one in named if one is not None for name in one]
        for number, ((table, row), name) in enumerate(zip(places.tolist(), every, strict=True)):
            rows = self._tables[table]
            # A row without a picture stands alone: it will be told as bad.
            picture = number
            if name is not None:
                picture = name if name.startswith("/") else f"{folders[table]}/{name}"
            if picture not in groups:
                groups[picture] = len(groups)
                names.append(name or f"{rows.path.stem}-{rows.numbers[row]}")
            of_row[number] = groups[picture]
        order = np.argsort(of_row, kind="stable")
        starts = np.searchsorted(of_row[order], np.arange(len(groups) + 1))
        return starts, places[order], picture_keys(names)

    def _names(self, rows: Rows) -> list[str | None] | None:
        """The path of each row's picture; None if the table holds the pictures themselves."""
        kind = rows.kind(self._image)
        if kind != "text":
            raise ValueError(
                f"{rows.path}: column {self._image!r} holds {kind}; it must hold paths of pictures"
            )
        names = [name.strip() if name else None for name in rows.texts(self._image)]
        named = [name for name in names if name]
        if url := next((name for name in named if "://" in name), None):
            raise ValueError(
                f"{rows.path}: column {self._image!r} holds URLs (first: {url}); nothing is "
                "downloaded here: fetch the pictures first, with img2dataset for instance"
            )
        first = [self._place(rows, name) for name in named[:_FIRST_LOOKED_FOR]]
        if first and not any(map(_is_there, first)):
            raise ValueError(
                f"{rows.path}: there is no picture {first[0]}; set root to the folder that the "
                f"paths in column {self._image!r} start from"
            )
        return names

    def _place(self, rows: Rows, name: str) -> Path:
        return (self._root or rows.path.parent) / name

    def _picture(self, table: int, row: int, value: Any) -> bytes:
        del row
        if not isinstance(value, str) or not value.strip():
            raise BadSample(Reason.NO_IMAGE, f"column {self._image!r} is empty")
        return read_file(self._place(self._tables[table], value.strip()))

    def _fields(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name in rows[0]:
            if name not in {self._image, self._caption}:
                values = [row.get(name) for row in rows]
                alike = all(value == values[0] for value in values)
                fields[name] = values[0] if alike else values
        file = rows[0].get(self._image)
        return {**fields, "file": file} if isinstance(file, str) else fields


class TextTableSource(TableSource):
    """The rows of text tables; see `TableSource` and `rows.read_text_table`."""

    endings = (".csv", ".tsv")

    def _load(self, path: Path) -> Rows:
        return read_text_table(path, texts=[self._image, self._caption])


class JsonTableSource(TableSource):
    """The objects of JSON lines files, or of JSON lists; see `TableSource`."""

    endings = (".jsonl", ".ndjson")

    def _load(self, path: Path) -> Rows:
        return JsonRows(path)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False
