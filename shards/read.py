"""The bytes of a sample, by the offsets of the manifest."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from shards.damage import BadSample, Reason
from shards.manifest import Manifest

# Members further apart than this are read one by one instead of in one sweep.
_SWEEP_GAP = 1 << 16


class ShardReader:
    """Reads members of samples from local shards; safe to share between threads.

    Reads carry their own offset (`pread`), so threads need no turn. Only the `max_open` shards used
    last stay open.

    Args:
        manifest: The data set.
        max_open: Open files at most.
        max_bytes: Size of a member above which it is not read.
    """

    def __init__(
        self, manifest: Manifest, *, max_open: int = 64, max_bytes: int = 64 << 20
    ) -> None:
        self.manifest = manifest
        self._max_open = max_open
        self._max_bytes = max_bytes
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, sample: int, fields: Sequence[str]) -> dict[str, bytes]:
        """The bytes of some fields of a sample; those it does not have are left out.

        Args:
            sample: Sample id.
            fields: Names of fields.

        Raises:
            BadSample: If a member is too large, or the shard is gone, too short or unreadable.
        """
        spans: dict[str, tuple[int, int]] = {}
        for name in fields:
            if name in self.manifest.spans:
                offsets, sizes = self.manifest.spans[name]
                if sizes[sample] > self._max_bytes:
                    raise BadSample(Reason.TOO_MANY_BYTES, f"{name} has {sizes[sample]} bytes")
                if offsets[sample] >= 0:
                    spans[name] = (int(offsets[sample]), int(sizes[sample]))
        if not spans:
            return {}
        file = self._file(int(self.manifest.shard_numbers[sample]))
        first = min(offset for offset, _ in spans.values())
        last = max(offset + size for offset, size in spans.values())
        if last - first <= sum(size for _, size in spans.values()) + _SWEEP_GAP:
            sweep = file.read(first, last - first)
            return {
                name: sweep[offset - first : offset - first + size]
                for name, (offset, size) in spans.items()
            }
        return {name: file.read(offset, size) for name, (offset, size) in spans.items()}

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        with self._lock:
            self._files.clear()

    def _file(self, shard: int) -> "_OpenFile":
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
        file = _OpenFile(self.manifest.folder / self.manifest.shards[shard].name)
        with self._lock:
            self._files[shard] = file
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
