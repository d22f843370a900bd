"""A small web server for the tests that can be told to misbehave."""

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Site:
    """A folder behind http, and what its server does wrong.

    Attributes:
        url: Where it answers.
        requests: How often each path was asked for.
        sent: Bytes of bodies.
        fault: What goes wrong: `""`, `503`, `404`, `drop`, `stall`, `short`, `no_range`, `shifted`,
            `gone` (no answer at all).
        faults_left: How many answers go wrong before all is well again.
        fault_paths: Only paths with this in them go wrong.
        tag: What every file's ETag says beside its size.
        busiest: Most requests under way at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.requests: Counter[str] = Counter()
        self.sent = 0
        self.fault = ""
        self.faults_left = 1 << 30
        self.fault_paths = ""
        self.tag = "1"
        self.log: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.released = threading.Event()

    @property
    def total(self) -> int:
        return self.requests.total()

    def reset(self) -> None:
        self.requests.clear()
        self.log.clear()
        self.sent = 0

    def break_down(self, fault: str, *, times: int = 1 << 30, paths: str = "") -> None:
        self.fault, self.faults_left, self.fault_paths = fault, times, paths

    def next_fault(self, path: str) -> str:
        with self.lock:
            if not self.fault or self.faults_left <= 0 or self.fault_paths not in path:
                return ""
            self.faults_left -= 1
            return self.fault


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    """Serves a folder from a thread."""
    site = Site(folder)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address) -> None:
            """Clients that hang up are part of the tests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            _answer(site, self)

    server = Server(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(site: Site, handler: BaseHTTPRequestHandler) -> None:
    path = handler.path.partition("?")[0]
    wanted = handler.headers.get("Range", "")
    with site.lock:
        site.requests[path] += 1
        site.log.append((path, wanted))
    fault = site.next_fault(path)
    if fault == "gone":
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        return
    if fault == "stall":
        site.released.wait(60)
        handler.close_connection = True
        return
    if fault.isdecimal():
        return _send(site, handler, int(fault), b"sorry", {})
    file = site.folder / path.lstrip("/")
    if file.is_dir():
        links = "".join(f'<a href="{name.name}">{name.name}</a>' for name in file.iterdir())
        page = f'<html><a href="../">up</a>{links}<a href="/elsewhere/x.tar">x</a></html>'
        return _send(site, handler, 200, page.encode(), {"Content-Type": "text/html"})
    if not file.is_file():
        return _send(site, handler, 404, b"no", {})
    data = file.read_bytes()
    headers = {"ETag": f'"{site.tag}-{len(data)}"'}
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
    if match is None or fault == "no_range":
        return _send(site, handler, 200, data, headers)
    start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
    if start >= len(data):
        return _send(site, handler, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
    told = start + 512 if fault == "shifted" else start
    headers["Content-Range"] = f"bytes {told}-{stop - 1}/{len(data)}"
    body = data[start:stop]
    if fault == "drop":
        return _send(site, handler, 206, body, headers, cut=len(body) // 2)
    if fault == "short":
        body = body[:-1]
    return _send(site, handler, 206, body, headers)


def _send(
    site: Site,
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str],
    cut: int | None = None,
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body if cut is None else body[:cut])
    with site.lock:
        site.sent += len(body)
    if cut is not None:
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
