"""What a place of shards promises, how it is read, and which of its files are shards."""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst")
"""Endings of compressed shards."""
TAR_SUFFIXES = (".tar", *PACKED_SUFFIXES)
"""Endings of files that are shards."""

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
        """Size, and time or tag, of a shard as it lies there: something else once it changed.

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
