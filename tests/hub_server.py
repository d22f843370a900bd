"""A small server that plays the Hugging Face hub, as far as its client needs for a bundle."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_the_test"
OWNER = "someone"


class Hub:
    """Repositories in memory.

    Attributes:
        url: Where it answers.
        files: Of each repository and branch.
        private: What each repository was made as.
        log: Method and path of each request.
        messages: What commits said.
        fault: A status with which everything is answered; 0 = none.
    """

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.log: list[tuple[str, str]] = []
        self.messages: list[str] = []
        self.fault = 0

    def fetched(self) -> set[str]:
        """Paths of the files whose content was asked for."""
        return {
            path.partition("/resolve/")[2].partition("/")[2]
            for method, path in self.log
            if method == "GET" and "/resolve/" in path
        }


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Serves a hub from a thread."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            path = unquote(self.path.partition("?")[0])
            hub.log.append((self.command, path))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, answer, headers = _answer(hub, self.command, path, body, token)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_WRONG = [{"message": "no library"}]
Answer = tuple[int, Any, dict[str, str]]


def _answer(hub: Hub, method: str, path: str, body: bytes, token: str) -> Answer:
    if hub.fault:
        return hub.fault, {"error": "out of order"}, {}
    if method == "POST" and token != TOKEN:
        return 401, {"error": "Invalid credentials"}, {}
    if path == "/api/repos/create":
        return _create(hub, json.loads(body))
    if "/resolve/" in path:
        return _resolve(hub, path)
    if path == "/api/validate-yaml":
        wrong = [] if "library_name: clip-align" in json.loads(body)["content"] else _WRONG
        return (400 if wrong else 200), {"errors": wrong, "warnings": []}, {}
    owner, name, *rest = path.removeprefix("/api/models/").split("/")
    repo = f"{owner}/{name}"
    if repo not in hub.private:
        return 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"}
    what, branch = rest[0] if rest else "", _branch(hub, repo, rest[1] if len(rest) > 1 else "main")
    files = hub.files.setdefault((repo, branch), {})
    match what:
        case "branch":
            return 200, {}, {}
        case "preupload":
            asked = [one["path"] for one in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": one, **regular} for one in asked]}, {}
        case "commit":
            for line in body.splitlines():
                _change(hub, files, json.loads(line))
            url = f"{hub.url}/{repo}/commit/{_commit(files)}"
            return 200, {"success": True, "commitUrl": url, "commitOid": _commit(files)}, {}
        case "tree":
            listed = [
                {"type": "file", "path": one, "size": len(data), "oid": _oid(data)}
                for one, data in files.items()
            ]
            return 200, listed, {}
    siblings = [{"rfilename": one} for one in files]
    return 200, {"id": repo, "sha": _commit(files), "siblings": siblings}, {}


def _create(hub: Hub, asked: dict[str, Any]) -> Answer:
    repo = f"{asked['organization']}/{asked['name']}"
    if asked["organization"] != OWNER:
        return 403, {"error": "You don't have the rights to create a model there"}, {}
    if repo in hub.private:
        return 409, {"error": "You already created this", "url": f"{hub.url}/{repo}"}, {}
    hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.files[repo, "main"] = {".gitattributes": b"*.safetensors filter=lfs\n"}
    return 200, {"url": f"{hub.url}/{repo}"}, {}


def _change(hub: Hub, files: dict[str, bytes], line: dict[str, Any]) -> None:
    value = line["value"]
    match line["key"]:
        case "header":
            hub.messages.append(value["summary"])
        case "file":
            files[value["path"]] = base64.b64decode(value["content"])
        case "deletedFile":
            del files[value["path"]]


def _resolve(hub: Hub, path: str) -> Answer:
    repo, _, rest = path.strip("/").partition("/resolve/")
    revision, _, name = rest.partition("/")
    files = hub.files.get((repo, _branch(hub, repo, revision)), {})
    if name not in files:
        return 404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"}
    return 200, files[name], {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": _commit(files)}


def _branch(hub: Hub, repo: str, revision: str) -> str:
    for (known, branch), files in hub.files.items():
        if known == repo and revision == _commit(files):
            return branch
    return revision


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _commit(files: dict[str, bytes]) -> str:
    listed = "".join(f"{name} {_oid(data)}\n" for name, data in sorted(files.items()))
    return hashlib.sha1(listed.encode()).hexdigest()
