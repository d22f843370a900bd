"""A small web server for the tests that can be told to misbehave."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Site:
    """A folder behind http, and what its server does wrong.

    Attributes:
        url: Where it answers.
        log: Path and range of each request.
        headers: All headers of each request.
        fault: What goes wrong: `""`, `503`, `404`, `drop`, `stall`, `short`, `no_range`, `shifted`,
            `gone` (hangs up).
        faults_left: How many answers go wrong before all is well again.
        fault_paths: Only paths with this in them go wrong.
        tag: What every file's ETag says beside its size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.fault = ""
        self.faults_left = 1 << 30
        self.fault_paths = ""
        self.tag = "1"
        self.log: list[tuple[str, str]] = []
        self.headers: list[Message] = []
        self.lock = threading.Lock()
        self.released = threading.Event()

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

        def do_HEAD(self) -> None:
            """Only ever asked while it stalls."""
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
    with site.lock:
        site.headers.append(handler.headers)
        site.log.append((handler.path, handler.headers.get("Range", "")))
    fault = site.next_fault(path)
    file = site.folder / unquote(path.lstrip("/"))
    if fault in ("gone", "stall"):
        if fault == "stall":
            site.released.wait(60)
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
    elif fault.isdecimal():
        _send(site, handler, int(fault), b"sorry", {})
    elif file.is_dir():
        links = "".join(f'<a href="{name.name}">{name.name}</a>' for name in file.iterdir())
        page = f'<html><a href="../">up</a>{links}<a href="/elsewhere/x.tar">x</a></html>'
        _send(site, handler, 200, page.encode(), {"Content-Type": "text/html"})
    elif not file.is_file():
        _send(site, handler, 404, b"no", {})
    else:
        _send_file(site, handler, file.read_bytes(), fault)


def _send_file(site: Site, handler: BaseHTTPRequestHandler, data: bytes, fault: str) -> None:
    headers = {"ETag": f'"{site.tag}-{len(data)}"'}
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    if match is None or fault == "no_range":
        cut = len(data) // 2 if fault == "drop" else None
        _send(site, handler, 200, data, headers, cut=cut)
        return
    start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
    if start >= len(data):
        _send(site, handler, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return
    told = start + 512 if fault == "shifted" else start
    headers["Content-Range"] = f"bytes {told}-{stop - 1}/{len(data)}"
    body = data[start:stop]
    cut = len(body) // 2 if fault == "drop" else None
    _send(site, handler, 206, body[:-1] if fault == "short" else body, headers, cut=cut)


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
    if cut is not None:
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
