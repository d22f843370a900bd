"""Where shards lie: a local folder, or any place that fsspec reads by URL.

`storage_of` makes a `Storage` of what a user names. Compressed shards (`.tar.gz`, `.tgz`,
`.tar.zst`) are unpacked into a cache when they are first read; that is the slow way, and `align
pack` makes plain ones. Remote shards are read in blocks that a cache keeps (see `shards.remote`).
"""

import io
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from shards.cache import OpenFile, Recent
from shards.damage import BadSample, Reason

PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst")
"""Endings of compressed shards."""
TAR_SUFFIXES = (".tar", *PACKED_SUFFIXES)
"""Endings of files that are shards."""

_MAX_NAMES = 1_000_000
_NUMBERS = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_CHAINED = re.compile(r"::\w+://")
_CACHE_LIMIT = "CLIP_ALIGN_CACHE_BYTES"


def _cache_bytes() -> int:
    text = os.environ.get(_CACHE_LIMIT) or str(20 << 30)
    if not text.isdecimal():
        raise ValueError(f"{_CACHE_LIMIT}={text!r} must be a number of bytes, such as {20 << 30}")
    return int(text)


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "clip-align" / "shards"


@dataclass(frozen=True)
class Reading:
    """How remote and compressed shards are read.

    Attributes:
        timeout_s: Time limit of one request; a web server may be silent for a third of it.
        tries: How often a request is made that fails in a way which may pass.
        wait_s: Pause before the second try; it doubles each time, up to half a minute.
        block_bytes: How much is asked for at a time.
        connections: Requests at a time for what will be read soon.
        cache_bytes: Size of the local cache; 0 keeps nothing. `CLIP_ALIGN_CACHE_BYTES` or 20 GiB
            unless stated.
        cache_folder: Where it lies; `clip-align/shards` in the user's cache unless stated.

    Raises:
        ValueError: If a number is out of its range.
    """

    timeout_s: float = 30.0
    tries: int = 6
    wait_s: float = 0.5
    block_bytes: int = 4 << 20
    connections: int = 8
    cache_bytes: int = field(default_factory=_cache_bytes)
    cache_folder: Path = field(default_factory=_cache_folder)

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.wait_s < 0 or self.cache_bytes < 0:
            raise ValueError("timeout_s must be positive, wait_s and cache_bytes not negative")
        if min(self.tries, self.block_bytes, self.connections) < 1:
            raise ValueError("tries, block_bytes and connections must be at least 1")


class Storage(ABC):
    """A place that holds shards, read by name, offset and size; safe to share between threads.

    Attributes:
        url: The place as it is shown to people, without a slash at its end and without secrets.
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
        """Name and size in bytes of each shard as it lies there, sorted by name.

        Raises:
            FileNotFoundError: If there is no such place, a shard that was named, or no shard at
                all.
            OSError: If the place cannot be reached.
        """

    @abstractmethod
    def small_file(self, name: str) -> bytes | None:
        """A whole small file, such as a manifest; None where there is none.

        Raises:
            OSError: If the place cannot be reached.
        """

    @abstractmethod
    def version(self, name: str) -> str:
        """Which shard this is, as far as name, size and time tell: another one once it changed.

        Raises:
            BadSample: As from `read`.
        """

    @abstractmethod
    def open(self, name: str) -> io.BufferedReader:
        """A shard as a seekable stream of its uncompressed bytes, for one walk over its headers.

        Raises:
            BadSample: If the shard is gone, or will not become readable.
            OSError: Here or from the stream, if the place fails in a way that may pass.
        """

    @abstractmethod
    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of a shard, uncompressed.

        Raises:
            BadSample: If the shard is gone, too short or unreadable.
        """

    @abstractmethod
    def expect(self, shards: Mapping[str, tuple[int, str]]) -> None:
        """Tells size and SHA-256 (empty where unknown) of shards as a manifest has them.

        A remote shard of another size is then refused, and one whose hash is known needs no
        question whether what the cache has of it is current.
        """

    @abstractmethod
    def ahead(self, name: str, offset: int, size: int) -> None:
        """Tells that these bytes will be read soon; returns at once and never fails."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of files and connections, and ends requests; a later read opens them again."""


def storage_of(place: Path | str, *, reading: Reading | None = None) -> Storage:
    """The storage that a place names: a folder, one shard, or a pattern such as `a/{0..7}.tar`.

    Args:
        place: A path, or the URL of a protocol that fsspec knows (http, https, s3, gs, ...). How
            to get there (keys, endpoints, headers) is told through the means of fsspec and of the
            protocol's library, such as `AWS_ENDPOINT_URL` or `FSSPEC_HTTPS`.
        reading: How to read it, if it is not local.

    Raises:
        ValueError: If the pattern is malformed, or the protocol is not one that can be read.
    """
    # The other two modules build on this one.
    from shards.remote import RemoteStorage
    from shards.unpack import UnpackingStorage

    reading = reading or Reading()
    text = str(place)
    protocol = "" if isinstance(place, Path) else _protocol(text)
    if protocol in ("file", "local"):
        protocol, text = "", text.partition("://")[2]
    query = ""
    if protocol in ("http", "https"):
        text, _, query = text.partition("?")
    parent, slash, last = text.rstrip("/").rpartition("/")
    names = None
    if "{" in last or last.endswith(TAR_SUFFIXES):
        names = _names(last, place)
        text = parent or slash or "."
    if "{" in text:
        raise ValueError(f"{place}: braces may stand in the file name only; list several folders")
    if protocol:
        inner: Storage = RemoteStorage(text.rstrip("/"), names, query=query, reading=reading)
    else:
        inner = LocalStorage(Path(text), names)
    return UnpackingStorage(inner, reading=reading)


def shards_among(names: Iterable[str]) -> list[str]:
    """Those of the names that are shards, sorted; of `a.tar` and `a.tar.gz` the first only.

    Args:
        names: Names of files.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        if name.endswith(TAR_SUFFIXES) and not name.startswith("."):
            packed = next((end for end in PACKED_SUFFIXES if name.endswith(end)), ".tar")
            found.setdefault(name.removesuffix(packed), name)
    return sorted(found.values())


def _protocol(text: str) -> str:
    """What stands before `://`; empty for a path."""
    protocol, colon, _ = text.partition("://")
    if text.startswith("pipe:") or _CHAINED.search(text):
        raise ValueError(
            f"{text}: neither commands nor chained URLs are read; name a path, or a URL of file, "
            "http, https, s3, gs or another protocol of fsspec"
        )
    return protocol if colon else ""


def _names(pattern: str, place: Path | str) -> list[str]:
    """The names that a pattern stands for, sorted."""
    if "{" not in pattern:
        return [pattern]
    counts = [abs(int(stop) - int(start)) + 1 for start, stop in _NUMBERS.findall(pattern)]
    if math.prod(counts) > _MAX_NAMES:
        raise ValueError(f"{place}: that is more than {_MAX_NAMES:,} shards")
    try:
        return sorted(set(braceexpand(pattern)))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


class ByteStream(io.RawIOBase):
    """A file of what reads it by offset.

    Args:
        read: `read(offset, size)` gives bytes that lie inside the file.
        size: Size of the file.
        name: What it is called.
    """

    mode = "rb"

    def __init__(self, read: Callable[[int, int], bytes], size: int, *, name: str) -> None:
        self.name = name
        self._read = read
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        size = max(min(len(buffer), self._size - self._place), 0)
        buffer[:size] = self._read(self._place, size) if size else b""
        self._place += size
        return size


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
        self._files: Recent[OpenFile] = Recent()

    def tars(self) -> list[tuple[str, int]]:
        """See `Storage`."""
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"{self._folder} is not a folder; name the folder that holds the shards"
            )
        if self.names is not None:
            for name in self.names:
                if not (self._folder / name).is_file():
                    raise FileNotFoundError(f"{self._folder} holds no {name}")
        found = self.names or shards_among([path.name for path in self._folder.iterdir()])
        if not found:
            raise FileNotFoundError(f"{self._folder} holds no .tar file")
        return [(name, (self._folder / name).stat().st_size) for name in sorted(found)]

    def small_file(self, name: str) -> bytes | None:
        """See `Storage`."""
        try:
            return (self._folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def version(self, name: str) -> str:
        """See `Storage`."""
        path = self._folder / name
        with _as_bad_sample(path):
            status = path.stat()
        return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"

    def open(self, name: str) -> io.BufferedReader:
        """See `Storage`."""
        return io.BufferedReader(io.FileIO(self._folder / name), 1 << 16)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        path = self._folder / name
        with _as_bad_sample(path):
            data = self._file(name).read(offset, size)
        if len(data) < size:
            raise BadSample(Reason.TRUNCATED, f"{path} ends before byte {offset + size}")
        return data

    def ahead(self, name: str, offset: int, size: int) -> None:
        """See `Storage`."""
        with suppress(OSError):
            self._file(name).will_need(offset, size)

    def expect(self, shards: Mapping[str, tuple[int, str]]) -> None:
        """See `Storage`; a local file that changed is found out by what is read from it."""

    def close(self) -> None:
        """See `Storage`."""
        self._files.clear()

    def _file(self, name: str) -> OpenFile:
        file = self._files.get(name)
        if file is None:
            file = OpenFile(self._folder / name)
            self._files.put(name, file, self._max_open)
        return file


@contextmanager
def _as_bad_sample(path: Path) -> Iterator[None]:
    """Tells errors of the disk as what they are for the sample that is read."""
    try:
        yield
    except FileNotFoundError:
        raise BadSample(Reason.SHARD_MISSING, str(path)) from None
    except OSError as error:
        raise BadSample(Reason.UNREADABLE, f"{path}: {error.strerror}") from None
