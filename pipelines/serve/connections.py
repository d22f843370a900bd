"""Connections that hold nothing for clients who are slow on purpose."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_LINGER = 5.0
"""Seconds for a client to read why its connection is closed."""


class Connection(H11Protocol):
    """HTTP/1.1 with time limits for headers and for clients that do not read.

    Uvicorn limits the time between requests, and nothing else: a client that sends one byte a
    minute would be waited for. Class attributes are set by :func:`limited`.
    """

    read_seconds = 15.0
    most = 2048

    _timer: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _ending = False

    def connection_made(self, transport: Any) -> None:
        """Wait for headers, unless there are too many others."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._say_and_close(503, "too many connections; try again", "Retry-After: 1\r\n")
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Stop waiting once a request has begun."""
        if self._ending or self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_timer()
        elif self._timer is None:
            self._wait_for_headers()

    def on_response_complete(self) -> None:
        """Wait for the rest of a next request that has begun to come."""
        super().on_response_complete()
        if self.cycle.response_complete and self.conn.trailing_data[0]:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave no timer behind."""
        self._forget_timer()
        self._unset_keepalive_if_required()
        if self._stuck is not None:
            self._stuck.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """A client that does not read its answer is waited for, but not for ever."""
        super().pause_writing()
        self._stuck = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def timeout_keep_alive_handler(self) -> None:
        """Closing waits until all is sent: drop what nobody reads."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _wait_for_headers(self) -> None:
        self._forget_timer()
        self._timer = self.loop.call_later(self.read_seconds, self._too_slow)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self._say_and_close(408, f"no request after {self.read_seconds:g} s")

    def _say_and_close(self, status: int, line: str, more: str = "") -> None:
        """Answer, and close a little later.

        A connection that is closed while the client still sends is reset, and the answer lost.
        """
        if self._ending or self.transport.is_closing():
            return
        self._ending = True
        body = json.dumps({"error": line})
        head = f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(
            f"{head}{more}Content-Length: {len(body)}\r\n\r\n{body}".encode("ascii")
        )
        self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER, self.transport.abort)


class Server(uvicorn.Server):
    """Uvicorn's server, which tells when the first client can come.

    Attributes:
        ready: Is called then.
    """

    ready: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Let clients in."""
        await super().startup(sockets)
        if self.ready is not None:
            self.ready()


def limited(*, read_seconds: float, most: int) -> type[Connection]:
    """A class of connections with these limits, for uvicorn.

    Args:
        read_seconds: For a client to send headers, or to read on.
        most: Connections at a time.
    """
    return type("LimitedConnection", (Connection,), {"read_seconds": read_seconds, "most": most})
