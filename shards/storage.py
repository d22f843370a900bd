"""Where shards lie: a local folder, or any place that fsspec reads by URL."""

import io
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand

from shards.damage import BadSample, Reason

TAR_SUFFIXES = (".tar",)
"""Endings of files that are shards."""


class Storage(ABC):
    """A place that holds shards, read by name, offset and size; safe to share between threads.

    Attributes:
        url: The place as it is shown to people, without a slash at its end.
        folder: The same as a local folder; None where it is not one.
        names: The shards that are meant; None means all there are.
    """

    def __init__(self, url: str, folder: Path | None, names: Sequence[str] | None = None) -> None:
        self.url = url
        self.folder = folder
        self.names = None if names is None else tuple(names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def tars(self) -> list[tuple[str, int]]:
        """Name and size in bytes of each shard, sorted by name.

        Raises:
            FileNotFoundError: If there is no such place, a shard that was named, or no shard at
                all.
        """

    @abstractmethod
    def small_file(self, name: str) -> bytes | None:
        """A whole small file, such as a manifest; None where there is none."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A shard as a seekable stream of its uncompressed bytes, for one walk over its headers."""

    @abstractmethod
    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of a shard, uncompressed.

        Raises:
            BadSample: If the shard is gone, too short or unreadable.
        """

    def ahead(self, name: str, offset: int, size: int) -> None:
        """Tells that these bytes will be read soon; returns at once and never fails."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of files and connections; a later read opens them again."""


def storage_of(place: Path | str) -> Storage:
    """The storage that a place names: a folder, one shard, or a pattern such as `a/{0..7}.tar`.

    Raises:
        ValueError: If the pattern is malformed, or the protocol is not one that can be read.
    """
    text = str(place)
    parent, _, last = text.rstrip("/").rpartition("/")
    names = None
    if "{" in last or last.endswith(TAR_SUFFIXES):
        try:
            names = sorted(braceexpand(last))
        except UnbalancedBracesError as error:
            raise ValueError(f"{text}: {error}") from None
        text = parent or "."
    if "{" in text:
        raise ValueError(f"{place}: braces may stand in the file name only; list several folders")
    return LocalStorage(Path(text), names)


class LocalStorage(Storage):
    """A local folder.

    Reads carry their own offset (`pread`), so threads need no turn. Only the `max_open` shards used
    last stay open.

    Args:
        folder: Where the shards lie.
        names: The shards that are meant; None means all there are.
        max_open: Open files at most.
    """

    def __init__(
        self, folder: Path, names: Sequence[str] | None = None, *, max_open: int = 64
    ) -> None:
        super().__init__(str(folder), folder, names)
        self._folder = folder
        self._max_open = max_open
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def tars(self) -> list[tuple[str, int]]:
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"{self._folder} is not a folder; name the folder that holds the shards"
            )
        if self.names is not None:
            for name in self.names:
                if not (self._folder / name).is_file():
                    raise FileNotFoundError(f"{self._folder} holds no {name}")
        found = self.names or [
            path.name
            for path in self._folder.iterdir()
            if path.name.endswith(TAR_SUFFIXES) and not path.name.startswith(".")
        ]
        if not found:
            raise FileNotFoundError(f"{self._folder} holds no .tar file")
        return [(name, (self._folder / name).stat().st_size) for name in sorted(found)]

    def small_file(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        return io.BufferedReader(io.FileIO(self._folder / name), 1 << 16)

    def read(self, name: str, offset: int, size: int) -> bytes:
        return self._file(name).read(offset, size)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _file(self, name: str) -> "_OpenFile":
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        file = _OpenFile(self._folder / name)
        with self._lock:
            self._files[name] = file
            while len(self._files) > self._max_open:
                self._files.popitem(last=False)
        return file


class _OpenFile:
    """A file that closes with its last user, as a thread may still read one that was evicted."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise BadSample(Reason.SHARD_MISSING, str(path)) from None
        except OSError as error:
            raise BadSample(Reason.UNREADABLE, f"{path}: {error.strerror}") from None
        self._path = path

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise BadSample(Reason.UNREADABLE, f"{self._path}: {error.strerror}") from None
        if len(data) < size:
            # A signal or a network file system may cut a read short; only an empty one is the end.
            rest = self.read(offset + len(data), size - len(data)) if data else b""
            data += rest
        if len(data) < size:
            raise BadSample(Reason.TRUNCATED, f"{self._path} ends before byte {offset + size}")
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
