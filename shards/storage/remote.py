"""Shards behind a URL: read in aligned blocks, which a local cache keeps.

A block is fetched once, whatever number of threads want it. Requests that fail in a way that may
pass are made again, with growing pauses. Once a block has used up its tries the place counts as
down, and every further one gets a single try until one succeeds, so that a dead server makes a run
stop soon instead of after days of patience.

Connections, threads and locks belong to a process: one that was forked off starts with none.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit, urlunsplit

from shards.damage import BadSample, Reason
from shards.storage.cache import Cache, OpenFile, Recent
from shards.storage.fetching import Ahead, Insistence, Shared
from shards.storage.storage import ByteStream, Reading, Storage, shards_among
from shards.storage.transport import Facts, RangelessError, RefusedError, Transport, TroubleError

# Blocks kept open as files of the cache, and in memory where there is no cache.
_OPEN_BLOCKS, _MEMORY_BLOCKS = 128, 32
# What stands for a number of a block: a shard's size and version, or all of it.
_FACTS, _WHOLE = -1, -2


class RemoteStorage(Storage):
    """Shards behind a URL.

    Without a cache (no space, no permission, `cache_bytes=0`) the last blocks stay in memory;
    shuffled reading then fetches many of them again and again.

    Args:
        url: The place, without a slash at its end.
        names: The shards that are meant; None means all that the place lists.
        query: What follows the `?` of each file's URL, such as a signature; never shown.
        reading: Limits, tries, sizes.

    Raises:
        ValueError: If fsspec does not know the protocol or lacks its library.
    """

    def __init__(
        self,
        url: str,
        names: Sequence[str] | None = None,
        *,
        query: str = "",
        reading: Reading | None = None,
    ) -> None:
        super().__init__(_without_password(url), None, names)
        self._address, self._query = url, query
        self._reading = reading or Reading()
        self._expected: dict[str, tuple[int, str]] = {}
        self._connections: dict[int, _Connection] = {}
        self._connection()

    def tars(self) -> list[tuple[str, int]]:
        """See `Storage`."""
        connection = self._connection()
        try:
            names = list(self.names) if self.names is not None else connection.list()
        except (FileNotFoundError, RefusedError):
            names = []
        except OSError as error:
            raise OSError(f"{self.url}: {error}") from None
        if not names:
            raise FileNotFoundError(
                f"{self.url} is not there, or lists no .tar file; where a server gives no lists, "
                f"name the files: {self.url}/{{00000..00099}}.tar"
            )
        with ThreadPoolExecutor(self._reading.connections) as pool:
            sizes = list(pool.map(self._size, names))
        return sorted(zip(names, sizes, strict=True))

    def small_file(self, name: str) -> bytes | None:
        """See `Storage`."""
        try:
            return self._connection().small_file(name)
        except (FileNotFoundError, RefusedError):
            # Object stores answer "forbidden" for what is not there to those who may not list.
            return None
        except OSError as error:
            raise OSError(f"{self.url}/{name}: {error}") from None

    def version(self, name: str) -> str:
        """See `Storage`."""
        facts = self._connection().facts(name)
        return f"{facts.size} {facts.tag}"

    def open(self, name: str) -> io.BufferedReader:
        """See `Storage`; what lies ahead is fetched while a walk goes on."""
        end = self._size(name)

        def read(offset: int, size: int) -> bytes:
            self.ahead(name, offset, min(2 * self._reading.block_bytes, end - offset))
            try:
                return self.read(name, offset, size)
            except BadSample as bad:
                raise OSError(bad.detail) from None

        return io.BufferedReader(ByteStream(read, end, name=name), 1 << 16)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        return self._connection().read(name, offset, size)

    def expect(self, shards: Mapping[str, tuple[int, str]]) -> None:
        """See `Storage`."""
        self._expected.update(shards)

    def ahead(self, name: str, offset: int, size: int) -> None:
        """See `Storage`; what is too much at once is left to the reads themselves."""
        self._connection().ahead(name, offset, size)

    def close(self) -> None:
        """See `Storage`."""
        connection = self._connections.pop(os.getpid(), None)
        if connection is not None:
            connection.close()

    def _connection(self) -> "_Connection":
        process = os.getpid()
        connection = self._connections.get(process)
        if connection is None:
            # Two threads may both make one; neither has connected yet, and one is taken.
            transport = Transport(self._address, self._query, timeout_s=self._reading.timeout_s)
            made = _Connection(self.url, transport, self._reading, self._expected)
            connection = self._connections.setdefault(process, made)
        return connection

    def _size(self, name: str) -> int:
        """Size of a shard, with the errors of `tars` and `open`."""
        try:
            return self._connection().facts(name).size
        except BadSample as bad:
            if bad.reason is Reason.SHARD_MISSING:
                raise FileNotFoundError(f"{self.url} holds no {name}") from None
            raise OSError(bad.detail) from None


class _Connection:
    """What one process has of a place: connections, open blocks, requests under way."""

    def __init__(
        self,
        url: str,
        transport: Transport,
        reading: Reading,
        expected: Mapping[str, tuple[int, str]],
    ) -> None:
        self.url = url
        self.transport = transport
        self.step = reading.block_bytes
        self.cache = Cache(reading.cache_folder, reading.cache_bytes)
        self.blocks: Recent[OpenFile | bytes] = Recent()
        self._reading = reading
        self._expected = expected
        self._known: dict[str, Facts] = {}
        self._is_rangeless = False
        self._insistently = Insistence(tries=reading.tries, wait_s=reading.wait_s)
        self._shared = Shared(self._bad_sample)
        self._ahead = Ahead(reading.connections)

    def list(self) -> list[str]:
        """The names of the shards that the place lists."""
        found = self._insistently(lambda _: self.transport.list())
        self._known.update({name: facts for name, facts in found.items() if facts is not None})
        return shards_among(found)

    def facts(self, name: str) -> Facts:
        """Size and version of a shard: asked for once, or never if a manifest knows its hash."""
        size, digest = self._expected.get(name, (-1, ""))
        if digest:
            return Facts(size, digest, ranges=not self._is_rangeless)
        facts = self._known.get(name)
        if facts is None:
            facts = self._shared.once((name, _FACTS), partial(self._ask, name))
        if facts.size < 0:
            raise BadSample(Reason.UNREADABLE, f"{self.url}/{name}: its size is not told")
        if size not in (-1, facts.size):
            raise BadSample(
                Reason.UNREADABLE,
                f"{self.url}/{name} has {facts.size} bytes; its manifest says {size}",
            )
        return facts

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of a shard, from as many blocks as it takes."""
        facts = self.facts(name)
        if offset + size > facts.size:
            raise BadSample(Reason.TRUNCATED, f"{self.url}/{name} ends before byte {offset + size}")
        if facts.ranges:
            try:
                return self._from_blocks(name, facts, offset, size)
            except RangelessError:
                self._is_rangeless = True
        return _cut(
            self._shared.once((name, _WHOLE), partial(self._whole, name, facts)), offset, size
        )

    def ahead(self, name: str, offset: int, size: int) -> None:
        """Fetches blocks in the background, unless too many are waiting there already."""
        for number in range(offset // self.step, -(-(offset + size) // self.step)):
            if self.blocks.get((name, number)) is None:
                self._ahead.add((name, number), partial(self._prepare, name, number))

    def small_file(self, name: str) -> bytes:
        """A whole file, as it is now; raises the errors of `Transport`."""
        facts = self._insistently(lambda patience: self.transport.facts(name, patience=patience))
        if not facts.ranges:
            return self._insistently(lambda _: b"".join(self.transport.stream(name)))

        numbers = range(-(-facts.size // self.step))
        with ThreadPoolExecutor(self._reading.connections) as pool:
            return b"".join(pool.map(partial(self._fetch, name, facts), numbers))

    def close(self) -> None:
        """Ends requests and threads; who waits for them gets a bad sample."""
        self._insistently.close()
        self._ahead.close()
        self.transport.close()
        self.blocks.clear()

    def _ask(self, name: str) -> Facts:
        if name not in self._known:
            self._known[name] = self._insistently(
                lambda patience: self.transport.facts(name, patience=patience)
            )
        return self._known[name]

    def _prepare(self, name: str, number: int) -> None:
        facts = self.facts(name)
        if facts.ranges and number * self.step < facts.size:
            self._shared.once((name, number), partial(self._block, name, facts, number))

    def _from_blocks(self, name: str, facts: Facts, offset: int, size: int) -> bytes:
        numbers = range(offset // self.step, -(-(offset + size) // self.step))
        if len(numbers) > 1:
            rest = numbers[1] * self.step
            self.ahead(name, rest, offset + size - rest)
        parts: list[bytes] = []
        for number in numbers:
            block = self.blocks.get((name, number))
            if block is None:
                work = partial(self._block, name, facts, number)
                block = self._shared.once((name, number), work)
            start = max(offset - number * self.step, 0)
            stop = min(offset + size - number * self.step, self.step)
            parts.append(_cut(block, start, stop - start))
        return b"".join(parts)

    def _block(self, name: str, facts: Facts, number: int) -> OpenFile | bytes:
        """A block from memory, from the cache, or from the place."""
        key = f"{self.url}/{name} {facts.size} {facts.tag} {self.step} {number}"
        block = self.blocks.get((name, number)) or self.cache.open(key)
        if block is None:
            data = self._fetch(name, facts, number)
            block = self.cache.add(key, [data]) or data
        limit = _MEMORY_BLOCKS if isinstance(block, bytes) else _OPEN_BLOCKS
        self.blocks.put((name, number), block, limit)
        return block

    def _fetch(self, name: str, facts: Facts, number: int) -> bytes:
        start, stop = number * self.step, min((number + 1) * self.step, facts.size)
        return self._insistently(
            lambda patience: self.transport.fetch(name, start, stop, facts, patience=patience)
        )

    def _whole(self, name: str, facts: Facts) -> OpenFile:
        """All of a shard, from a server that does not answer byte ranges."""
        held = self.blocks.get((name, _WHOLE))
        if isinstance(held, OpenFile):
            return held
        key = f"{self.url}/{name} {facts.size} {facts.tag} whole"
        if self.cache.is_off or facts.size > self.cache.limit // 2:
            raise RefusedError(
                "the server answers no byte ranges, and the cache has no room for whole shards"
            )
        with self.cache.turn(key):
            file = self.cache.open(key) or self._insistently(
                lambda _: self.cache.add(key, self._download(name, facts))
            )
        if file is None:
            raise RefusedError("the server answers no byte ranges, and the cache takes no file")
        self.blocks.put((name, _WHOLE), file, _OPEN_BLOCKS)
        return file

    def _download(self, name: str, facts: Facts) -> Iterator[bytes]:
        size = 0
        for chunk in self.transport.stream(name):
            size += len(chunk)
            yield chunk
        if size != facts.size:
            raise TroubleError(f"{size} bytes came; {facts.size} were expected")

    def _bad_sample(self, name: str, error: OSError) -> BadSample:
        if isinstance(error, FileNotFoundError):
            return BadSample(Reason.SHARD_MISSING, f"{self.url}/{name}")
        return BadSample(Reason.UNREADABLE, f"{self.url}/{name}: {error}")


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _cut(block: OpenFile | bytes, start: int, size: int) -> bytes:
    if isinstance(block, bytes):
        return block[start : start + size]
    try:
        data = block.read(start, size)
    except OSError as error:
        raise BadSample(Reason.UNREADABLE, f"local cache: {error.strerror}") from None
    if len(data) < size:
        raise BadSample(Reason.UNREADABLE, "local cache: a file was cut off while in use")
    return data
