"""`align serve`: a page and an HTTP interface over indexes.

limits.py        what a client may ask for; the gate that every request passes
connections.py   time limits of connections
batching.py      queries of many clients through one model
indexes.py       indexes with their models, heads and pictures
asking.py        from a request to a query
answers.py       from a query to an answer
thumbnails.py    small pictures of rows
metrics.py       what is counted
app.py           routes
docs_page.py     the page of the interface
page/            the page
"""

import errno
import os
import resource
import signal
import socket
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.config import ConfigError
from pipelines.schemas.serve import ServeConfig

if TYPE_CHECKING:
    from pipelines.serve.answers import Service
    from pipelines.serve.connections import Server


def run(config: ServeConfig) -> int:
    """Serve until a signal ends it: Ctrl-C (130) or SIGTERM (0)."""
    token = read_token(config)
    _check_folders(config)
    _allow_files(config.max_connections + 200)
    with listening(config.host, config.port) as door:
        names = ", ".join(config.folders)
        print(f"loading {names} and what asks them", file=sys.stderr, flush=True)
        served = prepare(config, token)
        is_open = token is None and not _is_loopback(door)
        served.server.ready = lambda: _tell(served, address(door), is_open=is_open)
        # Uvicorn stops at a signal and then raises it again.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            served.server.run(sockets=[door])
        finally:
            signal.signal(signal.SIGTERM, before)
            served.service.close()
    return 0


def _check_folders(config: ServeConfig) -> None:
    """See that there are indexes, before all that takes seconds to load."""
    for folder in config.folders.values():
        if not (folder / "index.json").is_file():
            raise ConfigError(
                f"{folder}: not an index (no index.json); make one with `align index TABLE FOLDER`"
            )


def _allow_files(count: int) -> None:
    """A connection is an open file, and many systems begin with 1,024 of these."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _tell(served: "Prepared", place: str, *, is_open: bool) -> None:
    """Say where the page is, once it can be opened."""
    indexes = served.service.indexes.values()
    names = ", ".join(f"{one.name} ({one.searcher.live:,} rows)" for one in indexes)
    print(f"{names}: {place}", flush=True)
    if is_open:
        line = "no token: open to all who reach this machine (token=... or token_file=...)"
        print(f"align serve: {line}", file=sys.stderr, flush=True)


_LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclass(frozen=True)
class Prepared:
    """A server with all it needs in memory, and what it answers with; close the service after."""

    server: "Server"
    service: "Service"


def prepare(config: ServeConfig, token: str | None) -> Prepared:
    """Load indexes, models and heads, and make a server that can run.

    Raises:
        ConfigError: As :func:`pipelines.serve.indexes.open_indexes`.
        ValueError: Likewise.
    """
    import uvicorn
    from PIL import Image

    from pipelines.serve.answers import Service
    from pipelines.serve.app import application
    from pipelines.serve.connections import Server, limited
    from pipelines.serve.indexes import open_indexes
    from pipelines.serve.limits import Limits
    from pipelines.serve.metrics import Metrics

    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    metrics = Metrics()
    limits = Limits(
        body=int(config.max_body_mb * 1_000_000),
        pixels=config.max_pixels,
        k=config.max_k,
        offset=config.max_offset,
        waiting=config.max_waiting,
        seconds=config.timeout,
        read_seconds=config.read_timeout,
    )
    indexes = open_indexes(
        config.folders,
        model=config.model,
        heads=config.heads,
        check=config.check,
        memory_map=config.memory_map,
        max_batch=config.max_batch,
        max_waiting=config.max_waiting,
        metrics=metrics,
    )
    threads = config.threads or os.cpu_count() or 1
    service = Service(indexes, limits=limits, metrics=metrics, threads=threads)
    service.warm_up()
    settings = uvicorn.Config(
        application(service, token=token, hosts=_names(config, token)),
        http=limited(read_seconds=limits.read_seconds, most=config.max_connections),
        ws="none",
        lifespan="off",
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=2048,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=5,
    )
    return Prepared(Server(settings), service)


def _names(config: ServeConfig, token: str | None) -> list[str] | None:
    """What the server may be called: anything, unless it is for this machine alone."""
    if config.hosts:
        return [*config.hosts, *_LOCAL]
    return [*_LOCAL] if token is None and config.host in _LOCAL else None


def read_token(config: ServeConfig) -> str | None:
    """The token of the configuration or of its file.

    Raises:
        ConfigError: The file is empty or cannot be read.
    """
    if config.token_file is None:
        return config.token
    try:
        token = config.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file: {config.token_file} cannot be read ({error})") from error
    if not token:
        raise ConfigError(f"token_file: {config.token_file} is empty")
    return token


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to an address, before anything long is loaded; nobody is let in yet.

    Raises:
        ConfigError: The port is in use, or the address is none of this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except socket.gaierror as error:
        raise ConfigError(f"host: {host} is no address ({error.strerror})") from error
    family, kind, protocol, _, place = found[0]
    # With its protocol named, asyncio sends at once (TCP_NODELAY); else answers wait 40 ms.
    door = socket.socket(family, kind, protocol)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(place)
    except OSError as error:
        door.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port: {port} is in use on {host}; choose another, such as port={port + 1}"
            ) from error
        raise ConfigError(f"host: cannot listen at {host}:{port} ({error.strerror})") from error
    return door


def address(door: socket.socket) -> str:
    """Where a browser finds what listens here."""
    host, port = door.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}/"


def _is_loopback(door: socket.socket) -> bool:
    host = str(door.getsockname()[0])
    return host.startswith("127.") or host == "::1"
