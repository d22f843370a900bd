"""What a client may ask of the server, and the gate that every request passes."""

import asyncio
import hashlib
import hmac
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any

from pipelines.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

COOKIE = "align_token"
FAULT = "something went wrong in the server"
_PORT = re.compile(r":\d+$")
_READING = ("GET", "HEAD", "OPTIONS")
_DRAIN_SECONDS = 5.0
_BODIES = 16
"""So many bodies of the largest size are held in memory at most."""
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _PAGE_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body: Bytes of a request's body.
        pixels: Width times height of a picture that is sent.
        k: Hits of one answer.
        offset: Hits before the first one of an answer.
        varied: Offset and hits together, where hits are compared with each other (collapse,
            diversity): that takes time with their square.
        terms: Parts of a query.
        text: Characters of a text, and of an SQL expression.
        values: Fields and values of all filters by field together.
        commas: In a request's JSON, besides those between `k` ids. They bound what is built of it
            before anything else is known: a picture is one long text without any, and a million
            small values are no search.
        escapes: Backslashes in it; each is slow to read.
        waiting: Requests under way.
        seconds: Until an answer is there.
        read_seconds: Until a request's headers are there, and then its body.
    """

    body: int = 20_000_000
    pixels: int = 64_000_000
    k: int = 1000
    offset: int = 10_000
    varied: int = 1000
    terms: int = 16
    text: int = 4000
    values: int = 2000
    commas: int = 20_000
    escapes: int = 500_000
    waiting: int = 1024
    seconds: float = 30.0
    read_seconds: float = 15.0


class Refused(Exception):  # noqa: N818 - it is an answer, not a fault
    """An answer that is no success: its status and the line that says why."""

    def __init__(self, status: int, line: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(line)
        self.status = status
        self.line = line
        self.headers = headers or {}


class Gone(Exception):  # noqa: N818 - nobody is there to be told
    """The client has hung up."""


def busy() -> Refused:
    """The answer to a request that finds too many others under way."""
    return Refused(503, "too many requests under way; try again", headers={"retry-after": "1"})


def cookie_of(token: str) -> str:
    """What stands in the cookie of a browser that has shown the token."""
    return hmac.new(token.encode(), b"align serve", hashlib.sha256).hexdigest()


class Gate:
    """Limits, token, time and security headers around an application.

    A body is read here, whole and within its limits, before the application sees the request. An
    application whose client hangs up, or that takes too long, is cancelled. What it does not catch
    becomes one line in the log and status 500.

    Args:
        app: The application.
        limits: What a client may ask for.
        metrics: Counts requests.
        token: What clients must know; None = nothing.
        open_paths: Paths that need no token.
        hosts: Names that the server may be called by; None = any. A page from elsewhere that has
            its own name point at this machine (DNS rebinding) is told nothing. Pages under these
            names may also ask where a proxy gives the server another one.
    """

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        metrics: Metrics,
        token: str | None = None,
        open_paths: Collection[str] = (),
        hosts: Collection[str] | None = None,
    ) -> None:
        self.app = app
        self.limits = limits
        self._metrics = metrics
        self._token = token.encode() if token else None
        self._cookie = cookie_of(token).encode() if token else None
        self._open = frozenset(open_paths)
        self._hosts = None if hosts is None else frozenset(one.lower() for one in hosts)
        self._under_way = 0
        self._body_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        answer = _Answer(send)
        self._under_way += 1
        try:
            await self._answer(scope, receive, answer)
        except Refused as refused:
            await _refuse(answer, refused)
        except Gone:
            answer.status = 499
        except Exception as error:
            _log(scope, error)
            await _refuse(answer, Refused(500, FAULT))
        finally:
            self._under_way -= 1
            route = getattr(scope.get("route"), "path", "other")
            taken = time.perf_counter() - started
            self._metrics.answered(route, scope["method"], answer.status, taken)

    async def _answer(
        self, scope: MutableMapping[str, Any], receive: Receive, answer: "_Answer"
    ) -> None:
        headers = dict(scope["headers"])
        if self._under_way > self.limits.waiting and scope["path"] != "/health":
            raise busy()
        if self._hosts is not None:
            self._check_host(headers)
        if b"origin" in headers and scope["method"] not in _READING:
            self._check_origin(headers)
        if self._token is not None and scope["path"] not in self._open:
            self._check_token(headers)
        body = await self._body(headers, receive, answer)
        self._body_bytes += len(body)
        try:
            await self._run(scope, body, receive, answer)
        finally:
            self._body_bytes -= len(body)

    def _check_token(self, headers: dict[bytes, bytes]) -> None:
        assert self._token is not None
        assert self._cookie is not None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token):
            return
        try:
            jar = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            jar = SimpleCookie()
        shown = jar[COOKIE].value.encode("latin-1", "replace") if COOKIE in jar else b""
        if not hmac.compare_digest(shown, self._cookie):
            raise Refused(
                401, "this server wants its token", headers={"www-authenticate": "Bearer"}
            )

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        assert self._hosts is not None
        if _name(headers.get(b"host", b"").decode("latin-1").lower()) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            raise Refused(
                403, f"this server is called {known}; for other names start it with hosts or token"
            )

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Browsers tell whose page sends something; programs tell nothing."""
        origin = headers[b"origin"].decode("latin-1").lower()
        place = origin.partition("://")[2]
        if place and place == headers.get(b"host", b"").decode("latin-1").lower():
            return
        if _name(place) not in (self._hosts or ()):
            raise Refused(
                403,
                f"pages of {origin[:100]!r} may not ask this server; start it with their name "
                "in hosts",
            )

    async def _body(
        self, headers: dict[bytes, bytes], receive: Receive, answer: "_Answer"
    ) -> bytes:
        """The whole body."""
        most = self.limits.body
        told = headers.get(b"content-length", b"")
        too_large = Refused(
            413, f"a request may have {most:,} bytes", headers={"connection": "close"}
        )
        if told.isdigit() and int(told) > most:
            await _refuse(answer, too_large, drain=None if b"expect" in headers else receive)
            raise Gone
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        await _refuse(answer, too_large, drain=receive)
                        raise Gone
                    if self._body_bytes + size > _BODIES * most:
                        raise busy()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            line = f"the request was not here after {self.limits.read_seconds:g} s"
            raise Refused(408, line, headers={"connection": "close"}) from None

    async def _run(
        self,
        scope: MutableMapping[str, Any],
        body: bytes,
        receive: Receive,
        answer: "_Answer",
    ) -> None:
        """Run the application while the client is there and time is left."""
        hung_up = asyncio.create_task(_hung_up(receive))
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await hung_up
            return {"type": "http.disconnect"}

        app = asyncio.ensure_future(self.app(scope, replay, answer))
        try:
            await asyncio.wait(
                {app, hung_up},
                timeout=self.limits.seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if app.done():
                app.result()
            elif hung_up.done():
                raise Gone
            elif not answer.status:
                raise Refused(504, f"no answer after {self.limits.seconds:g} s; ask for less")
        finally:
            for task in (app, hung_up):
                task.cancel()


def _name(place: str) -> str:
    """A host without its port."""
    return place.rpartition(":")[0] if _PORT.search(place) else place


class _Answer:
    """Sends an answer with the security headers, and knows how it went."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name for name, _ in message["headers"]}
            added = [one for one in _HEADERS if one[0] not in given]
            message = {**message, "headers": [*message["headers"], *added]}
        await self._send(message)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(answer: _Answer, refused: Refused, *, drain: Receive | None = None) -> None:
    """Send an error; with `drain`, read on for a while, or the client never sees the answer."""
    if answer.status:
        return
    body = json.dumps({"error": refused.line}).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        **refused.headers,
    }
    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    await answer({"type": "http.response.start", "status": refused.status, "headers": listed})
    await answer({"type": "http.response.body", "body": body, "more_body": drain is not None})
    if drain is None:
        return
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while True:
                message = await drain()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    break
    except TimeoutError:
        pass
    await answer({"type": "http.response.body", "body": b""})


def _log(scope: MutableMapping[str, Any], error: Exception) -> None:
    lines = str(error).split("\n")
    line = f"{scope['method']} {scope['path']!r}: {type(error).__name__}: {lines[0][:300]}"
    print(f"align serve: {line}", file=sys.stderr, flush=True)
