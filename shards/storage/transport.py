"""One request to a remote place, by fsspec: what it gave, or which of three kinds of failure.

For http(s) the requests are made here, in the session of fsspec's file system, because fsspec reads
a whole file into memory when a server ignores the range that was asked for, takes a short answer
for a good one, and calls every failure "not found".
"""

import asyncio
import re
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import fsspec

Result = TypeVar("Result")

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_NO_RANGE = re.compile(r"bytes \*/(\d+)")
_MAY_PASS = (408, 425, 429)
_CHUNK = 1 << 20
# What file systems call the version of a file, the surest first.
_TAGS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class TroubleError(OSError):
    """A request failed in a way that may pass: no answer, a broken one, an overloaded server."""


class RefusedError(OSError):
    """A request failed in a way that will not pass: no permission, no byte ranges."""


class RangelessError(Exception):
    """The server gives a file as a whole or not at all."""


@dataclass(frozen=True)
class Facts:
    """What a place says of a file.

    Attributes:
        size: In bytes; -1 if it does not say.
        tag: Another one once the content changed; empty if it does not say.
        ranges: Whether parts of the file can be asked for.
    """

    size: int
    tag: str
    ranges: bool = True


class Transport:
    """Requests to one place; safe to share between threads, not between processes.

    Every method raises `FileNotFoundError`, `RefusedError` or `TroubleError`, with one line that
    says why and stays the same from run to run.

    Args:
        url: The place, without a slash at its end.
        query: What follows the `?` of each file's URL.
        timeout_s: Time limit of one request.

    Raises:
        ValueError: If fsspec does not know the protocol or lacks its library.
    """

    def __init__(self, url: str, query: str, *, timeout_s: float) -> None:
        self.url = url
        self.timeout_s = timeout_s
        protocol = url.partition("://")[0]
        self._is_http = protocol in ("http", "https")
        self._query = f"?{query}" if query else ""
        try:
            # Neither listings nor connections are shared: both must be fresh in each process.
            self._fs: Any = fsspec.url_to_fs(
                url, skip_instance_cache=True, use_listings_cache=False
            )[0]
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            how = f"pip install 'clip-align[{extra}]'" if extra else str(error)
            raise ValueError(f"{protocol}:// needs another library: {how}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{url}: {error}; known are paths, file, http, https, s3, gs and the other "
                "protocols of fsspec"
            ) from None
        self._under_way: set[Future[Any]] = set()
        self._tags: dict[str, str] = {}
        self._is_closed = False

    def facts(self, name: str, *, patience: float = 1.0) -> Facts:
        """Size and version of a file, by one small request.

        Args:
            name: Its name.
            patience: Share of the time limit that the place may stay silent.
        """
        if self._is_http:
            facts, _ = self._run(self._get(self._address(name), 0, 1, patience))
            self._tags[name] = facts.tag
            return facts
        return _facts(self._call("info", self._address(name)))

    def fetch(
        self, name: str, start: int, stop: int, facts: Facts, *, patience: float = 1.0
    ) -> bytes:
        """The bytes `start ... stop - 1` of a file, of which there must be that many.

        Args:
            name: The file.
            start: First byte.
            stop: The byte after the last one; not beyond the size.
            facts: What is known of the file; another size or version is refused.
            patience: Share of the time limit that the place may stay silent.

        Raises:
            RangelessError: If the server does not answer byte ranges.
        """
        if not self._is_http:
            data = self._call("cat_file", self._address(name), start=start, end=stop)
        else:
            found, data = self._run(self._get(self._address(name), start, stop, patience))
            if not found.ranges:
                raise RangelessError(self.url)
            if found.size != facts.size:
                raise RefusedError(f"it has {found.size} bytes now; {facts.size} were expected")
            if found.tag != self._tags.setdefault(name, found.tag):
                raise RefusedError("it changed while it was read")
        if len(data) != stop - start:
            raise TroubleError(f"{len(data)} bytes came; {stop - start} were asked for")
        return data

    def stream(self, name: str) -> Iterator[bytes]:
        """The whole of a file, chunk by chunk, from a server that does not answer byte ranges."""
        session = self._run(self._fs.set_session())
        reply = self._run(self._open(session, self._address(name), {}, 1.0))
        try:
            _check_status(reply)
            while chunk := self._run(reply.content.read(_CHUNK)):
                yield chunk
        finally:
            self._fs.loop.call_soon_threadsafe(reply.close)

    def list(self) -> dict[str, Facts | None]:
        """The files of the place by name, and what it says of each beside its name."""
        if not self._is_http:
            entries = self._call("ls", self.url, detail=True)
            files = [entry for entry in entries if entry["type"] == "file"]
            return {entry["name"].rpartition("/")[2]: _facts(entry) for entry in files}
        links = self._call("ls", f"{self.url}/{self._query}", detail=False)
        paths = [urlsplit(link).path for link in links]
        folder = urlsplit(self.url).path + "/"
        names = [unquote(path.removeprefix(folder)) for path in paths if path.startswith(folder)]
        return {name: None for name in names if name and "/" not in name}

    def close(self) -> None:
        """Ends what is under way and closes the connections."""
        self._is_closed = True
        for future in list(self._under_way):
            future.cancel()
        if self._is_http:
            with suppress(OSError, CancelledError):
                session = self._wait(self._fs.set_session(), 1.0)
                self._wait(session.close(), 1.0)

    def _address(self, name: str) -> str:
        if self._is_http:
            return f"{self.url}/{quote(name)}{self._query}"
        return f"{self.url}/{name}"

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method of the file system; those without asynchronous ones know no time limit."""
        if self._fs.async_impl:
            return self._run(getattr(self._fs, f"_{method}")(*arguments, **options))
        try:
            return getattr(self._fs, method)(*arguments, **options)
        except Exception as error:
            raise _verdict(error) from None

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._is_closed:
            work.close()
            raise TroubleError("closed")
        try:
            return self._wait(work, self.timeout_s)
        except CancelledError:
            raise TroubleError("closed") from None
        except Exception as error:
            raise _verdict(error) from None

    def _wait(self, work: Coroutine[Any, Any, Result], limit_s: float) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._fs.loop)
        self._under_way.add(future)
        try:
            return future.result(limit_s)
        finally:
            self._under_way.discard(future)
            future.cancel()

    async def _open(
        self, session: Any, address: str, headers: dict[str, str], patience: float
    ) -> aiohttp.ClientResponse:
        """Sends a request as fsspec would, asking for the bytes as they are."""
        options = dict(self._fs.kwargs)
        silence_s = self.timeout_s * patience
        options["timeout"] = aiohttp.ClientTimeout(
            total=None, sock_connect=silence_s, sock_read=silence_s
        )
        options["headers"] = {
            **options.get("headers", {}),
            "Accept-Encoding": "identity",
            **headers,
        }
        return await session.get(self._fs.encode_url(address), **options)

    async def _get(
        self, address: str, start: int, stop: int, patience: float
    ) -> tuple[Facts, bytes]:
        """Part of a file over http; no bytes from a server that does not answer ranges."""
        session = await self._fs.set_session()
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        async with await self._open(session, address, headers, patience) as reply:
            tag = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
            told = reply.headers.get("Content-Range", "")
            if reply.status == 416 and (match := _NO_RANGE.fullmatch(told)):
                return Facts(int(match[1]), tag), b""
            _check_status(reply)
            if reply.status != 206:
                size = reply.content_length
                return Facts(-1 if size is None else size, tag, ranges=False), b""
            match = _RANGE.fullmatch(told)
            if match is None or int(match[1]) != start:
                raise RefusedError(
                    f"the server answers other bytes than it was asked for: {told!r}"
                )
            parts: list[bytes] = []
            due = stop - start
            while due > 0 and (part := await reply.content.read(due)):
                parts.append(part)
                due -= len(part)
            return Facts(int(match[3]), tag), b"".join(parts)


def _facts(info: dict[str, Any]) -> Facts:
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    return Facts(-1 if info.get("size") is None else int(info["size"]), tag)


def _check_status(reply: aiohttp.ClientResponse) -> None:
    if reply.status >= 400:
        raise _of_status(reply.status, reply.reason or "")
    if reply.headers.get("Content-Encoding", "identity") != "identity":
        raise RefusedError("the server recodes it on the way (Content-Encoding)")


def _of_status(status: int, reason: str) -> OSError:
    line = f"HTTP {status} {reason}".strip()
    if status in (404, 410):
        return FileNotFoundError(line)
    return TroubleError(line) if status in _MAY_PASS or status >= 500 else RefusedError(line)


def _verdict(error: Exception) -> OSError:
    """Which kind of failure an error of any library is."""
    if isinstance(error, TroubleError | RefusedError | FileNotFoundError):
        return error
    if isinstance(error, aiohttp.ClientResponseError):
        return _of_status(error.status, error.message)
    if isinstance(error, aiohttp.InvalidURL):
        return RefusedError("this is no valid URL")
    if isinstance(error, aiohttp.ClientPayloadError):
        return TroubleError("the answer broke off")
    if isinstance(error, TimeoutError):
        return TroubleError("no answer in time")
    line = next(iter(str(error).splitlines()), "")
    text = f"{type(error).__name__}: {line}" if line else type(error).__name__
    wrong = (PermissionError, ValueError, TypeError, NotImplementedError, IsADirectoryError)
    certificate = isinstance(error, aiohttp.ClientConnectorCertificateError)
    # botocore has a dozen errors about credentials, and no class in common.
    if isinstance(error, wrong) or certificate or "Credentials" in type(error).__name__:
        return RefusedError(text)
    return TroubleError(text)
