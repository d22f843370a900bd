"""Compressed shards: unpacked once, as a stream, into the cache, then read like plain ones.

What was unpacked before damage (a cut-off file, a wrong checksum, a bomb) is kept without the end
marker of a tar, so that a walk over it tells that the shard is truncated.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping

import zstandard

from shards.damage import BadSample, Reason
from shards.storage.cache import DIGEST_BYTES, Cache, OpenFile, Recent
from shards.storage.storage import PACKED_SUFFIXES, ByteStream, Reading, Storage

# What an unpacker reads at a time is lost with the damage that it finds there.
_CHUNK = 1 << 17
_TAR_BLOCK = 512
_MAX_OPEN = 64
# Pictures hardly shrink, and text shrinks to a tenth.
_BOMB_RATIO, _BOMB_BYTES = 100, 1 << 30


class UnpackingStorage(Storage):
    """A storage whose compressed shards are read as if they were not.

    Reading them in shuffled order keeps them all unpacked, as far as the cache has room, and
    unpacks them again where it has not.

    Args:
        inner: Where the shards lie.
        reading: Place and size of the cache.
    """

    def __init__(self, inner: Storage, *, reading: Reading | None = None) -> None:
        super().__init__(inner.url, inner.folder, inner.names)
        self._inner = inner
        reading = reading or Reading()
        self._cache = Cache(reading.cache_folder, reading.cache_bytes)
        self._files: Recent[OpenFile] = Recent()

    def __repr__(self) -> str:
        return repr(self._inner)

    def tars(self) -> list[tuple[str, int]]:
        """See `Storage`."""
        return self._inner.tars()

    def small_file(self, name: str) -> bytes | None:
        """See `Storage`."""
        return self._inner.small_file(name)

    def version(self, name: str) -> str:
        """See `Storage`."""
        return self._inner.version(name)

    def open(self, name: str) -> io.BufferedReader:
        """See `Storage`."""
        if not name.endswith(PACKED_SUFFIXES):
            return self._inner.open(name)
        file = self._file(name)
        stream = ByteStream(file.read, file.size - DIGEST_BYTES, name=name)
        return io.BufferedReader(stream, 1 << 16)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        if not name.endswith(PACKED_SUFFIXES):
            return self._inner.read(name, offset, size)
        try:
            file = self._file(name)
            if offset + size <= file.size - DIGEST_BYTES:
                return file.read(offset, size)
        except FileNotFoundError:
            raise BadSample(Reason.SHARD_MISSING, f"{self.url}/{name}") from None
        except OSError as error:
            line = error.strerror or str(error)
            raise BadSample(Reason.UNREADABLE, f"{self.url}/{name}: {line}") from None
        raise BadSample(Reason.TRUNCATED, f"{self.url}/{name} ends before byte {offset + size}")

    def expect(self, shards: Mapping[str, tuple[int, str]]) -> None:
        """See `Storage`."""
        self._inner.expect(shards)

    def ahead(self, name: str, offset: int, size: int) -> None:
        """See `Storage`; compressed shards are not unpacked ahead."""
        if not name.endswith(PACKED_SUFFIXES):
            self._inner.ahead(name, offset, size)

    def close(self) -> None:
        """See `Storage`."""
        self._files.clear()
        self._inner.close()

    def _file(self, name: str) -> OpenFile:
        """A compressed shard, unpacked; it ends in the cache's digest."""
        file = self._files.get(name)
        if file is None:
            place = self.url if self.folder is None else self.folder.resolve()
            key = f"{place}/{name} {self._inner.version(name)} unpacked"
            with self._cache.turn(key):
                file = self._cache.open(key, verify=False) or self._cache.add(
                    key, self._unpacked(name), durable=True
                )
            if file is None:
                raise BadSample(
                    Reason.UNREADABLE,
                    f"{self.url}/{name}: no room to unpack it in {self._cache.folder}; "
                    "`align pack` makes shards that need none",
                )
            self._files.put(name, file, _MAX_OPEN)
        return file

    def _unpacked(self, name: str) -> Iterator[bytes]:
        with self._inner.open(name) as stream:
            limit = max(_BOMB_BYTES, _BOMB_RATIO * stream.seek(0, io.SEEK_END))
            stream.seek(257)
            is_plain = stream.read(5) == b"ustar"
            stream.seek(0)
            if is_plain:
                read = stream.read1
            elif name.endswith(".zst"):
                read = (
                    zstandard.ZstdDecompressor()
                    .stream_reader(stream, read_across_frames=True, closefd=False)
                    .read1
                )
            else:
                read = gzip.GzipFile(fileobj=stream).read1
            yield from _sound_part(read, limit)


def _sound_part(read: Callable[[int], bytes], limit: int) -> Iterator[bytes]:
    """What an unpacker gives until it ends; without the last zeros where it ends badly.

    Args:
        read: `read(size)` gives the next bytes, up to so many.
        limit: More bytes than this are a bomb.
    """
    size, zeros = 0, 0
    try:
        while chunk := read(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise EOFError
            content = chunk.rstrip(b"\0")
            if content:
                yield from _zeros(zeros)
                zeros = 0
                yield content
            zeros += len(chunk) - len(content)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError):
        # The padding of the last file belongs to it; the blocks after it would be an end marker.
        zeros = min(zeros, (zeros - size) % _TAR_BLOCK)
    yield from _zeros(zeros)


def _zeros(size: int) -> Iterator[bytes]:
    while size > 0:
        yield bytes(min(size, _CHUNK))
        size -= _CHUNK
