"""Shards in a local folder."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.damage import BadSample, Reason
from shards.storage.cache import OpenFile, Recent
from shards.storage.storage import Storage, shards_among


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
        return f"{status.st_size} {status.st_mtime_ns}"

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
