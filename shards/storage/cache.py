"""A folder of files that may be thrown away: whole or absent, limited in size, shared by processes.

Every file ends in a digest of its key and its content, so a torn, damaged or foreign file is no
more than a miss. Nothing is locked for it, as locks and databases are what network file systems are
bad at: files appear under their name by a rename, and one that is removed stays readable to those
who have it open.
"""

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

Value = TypeVar("Value")

DIGEST_BYTES = 32
"""What every file of a cache ends in."""

_STEP = 1 << 20
# After a sweep this much is free, so that not every file that comes in needs another one.
_HEADROOM = 0.1
_STALE_S = 3600
_LOCK_WAIT_S, _LOCK_STEP_S = 600, 0.05

_log = logging.getLogger(__name__)


class OpenFile:
    """A file read by offset; closes with its last user, as a thread may still read an evicted one.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from an offset on; fewer at the end of the file.

        Raises:
            OSError: If the disk fails.
        """
        data = os.pread(self._descriptor, size, offset)
        # A signal or a network file system may cut a read short; only an empty one is the end.
        while data and len(data) < size:
            rest = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not rest:
                break
            data += rest
        return data

    def will_need(self, offset: int, size: int) -> None:
        """Asks the system to read ahead, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class Recent(Generic[Value]):
    """The values used last; safe to share between threads."""

    def __init__(self) -> None:
        self._values: OrderedDict[object, Value] = OrderedDict()
        self._lock_of: dict[int, threading.Lock] = {}

    def get(self, key: object) -> Value | None:
        """The value of a key, which now counts as used; None where there is none."""
        with self._lock():
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: object, value: Value, limit: int) -> None:
        """Keeps a value, and of all of them the `limit` used last."""
        with self._lock():
            self._values[key] = value
            while len(self._values) > limit:
                self._values.popitem(last=False)

    def clear(self) -> None:
        """Lets go of everything."""
        with self._lock():
            self._values.clear()

    def _lock(self) -> threading.Lock:
        """A lock for this process: the one it was forked from may have died with a thread in it."""
        process = os.getpid()
        return self._lock_of.get(process) or self._lock_of.setdefault(process, threading.Lock())


class Cache:
    """Files by key in one folder, of which those used last are kept.

    The first error of the disk turns it off, and one line of the log says so: a full disk makes
    reading slower, not impossible.

    Args:
        folder: Made when the first file comes.
        limit: Bytes that all files together may take; 0 keeps nothing.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._is_off = limit <= 0
        self._verified: set[str] = set()
        # The first file of a process has the folder measured: short runs add up too.
        self._since_sweep = limit

    @property
    def is_off(self) -> bool:
        """Whether nothing is kept."""
        return self._is_off

    def open(self, key: str, *, verify: bool = True) -> OpenFile | None:
        """The file of a key; None where there is none, or a damaged one.

        What `read` gives beyond the content's own size is the digest.

        Args:
            key: What it was added under.
            verify: Compare the digest, once per process; only its presence is relied on otherwise.
        """
        if self._is_off:
            return None
        path = self._path(key)
        try:
            file = OpenFile(path)
            if verify and path.name not in self._verified:
                if not _is_sound(file, key):
                    path.unlink(missing_ok=True)
                    return None
                self._verified.add(path.name)
            # Files of other users can be read without being ours to touch.
            with suppress(PermissionError):
                os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._turn_off(error)
            return None
        return file

    def add(self, key: str, chunks: Iterable[bytes], *, durable: bool = False) -> OpenFile | None:
        """Keeps a file and opens it; None where the disk does not take it.

        Args:
            key: Its name.
            chunks: Its content; an exception of theirs leaves nothing behind.
            durable: Sync it to disk first, for content that is not verified later.
        """
        if self._is_off:
            return None
        path = self._path(key)
        beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        digest = _digest(key)
        try:
            with _disk_errors():
                self.folder.mkdir(parents=True, exist_ok=True)
                stream = beside.open("wb", buffering=0)
            with stream:
                for chunk in chunks:
                    digest.update(chunk)
                    _write(stream, chunk)
                _write(stream, digest.digest())
                with _disk_errors():
                    if durable:
                        os.fsync(stream.fileno())
                    file = OpenFile(beside)
                    beside.replace(path)
                    self._make_room(file.size)
        except BaseException as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            if not isinstance(error, _DiskError):
                raise
            self._turn_off(error)
            with suppress(OSError):
                # A full disk needs the room for something better.
                self._shrink_to(self.limit / 2)
            return None
        return file

    @contextmanager
    def turn(self, key: str) -> Iterator[None]:
        """Lets one thread of all processes at a time make the file of a key.

        A courtesy that saves double work: after ten minutes, or where files cannot be locked, the
        caller goes on without it.
        """
        descriptor = -1
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self.folder / f".{self._path(key).name[:2]}.lock"
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            _lock(descriptor)
        try:
            yield
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:40]

    def _turn_off(self, error: Exception) -> None:
        if not self._is_off:
            self._is_off = True
            _log.warning("%s: %s; going on without this cache", self.folder, error)

    def _make_room(self, added: int) -> None:
        """Sweeps now and then, as looking through the folder takes a while."""
        self._since_sweep += added
        if self._since_sweep < self.limit * _HEADROOM / 2:
            return
        self._since_sweep = 0
        self._shrink_to(self.limit * (1 - _HEADROOM))

    def _shrink_to(self, size: float) -> None:
        """Removes the files that were used longest ago until the others take no more than this."""
        found: list[tuple[float, int, Path]] = []
        for entry in os.scandir(self.folder):
            # Another process may be sweeping too.
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in found)
        stale = time.time() - _STALE_S
        for used, taken, path in sorted(found):
            is_left_over = path.suffix == ".partial" and used < stale
            is_file = not path.name.startswith(".")
            if is_left_over or (is_file and total > size):
                path.unlink(missing_ok=True)
                total -= taken


class _DiskError(Exception):
    """The disk of the cache failed, as opposed to what was to be put there."""


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _DiskError(error.strerror or str(error)) from error


def _write(stream: BinaryIO, data: bytes) -> None:
    """Writes all of it; a disk that fills up takes the first part without an error."""
    rest = memoryview(data)
    with _disk_errors():
        while rest:
            rest = rest[stream.write(rest) :]


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_STEP_S)
        else:
            return


def _digest(key: str) -> "hashlib.blake2b":
    return hashlib.blake2b(key.encode(), digest_size=DIGEST_BYTES)


def _is_sound(file: OpenFile, key: str) -> bool:
    """Whether the file ends in the digest of its key and content."""
    digest = _digest(key)
    end = file.size - DIGEST_BYTES
    for start in range(0, end, _STEP):
        digest.update(file.read(start, min(_STEP, end - start)))
    return end >= 0 and file.read(end, DIGEST_BYTES) == digest.digest()
