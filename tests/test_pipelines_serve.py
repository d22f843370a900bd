"""The server, over real sockets: right answers, the right status for everything else, and alive."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import httpx
import numpy as np
import pytest
from pairs_corpus import encoded, picture, tiny_model, write_pairs
from PIL import Image

from align.bundle import fingerprint, save
from align.fusion import fusion_head
from align.fusion.store import save_head
from eval.search.searcher import Searcher
from pipelines import knn_service
from pipelines.cli import VERBS, main, parse
from pipelines.config import ConfigError, build
from pipelines.pictures import IndexPictures
from pipelines.queries import Query, QueryEncoder, Term
from pipelines.schemas import ServeConfig
from pipelines.serve import address, app, asking, listening, prepare, read_token
from pipelines.serve import run as run_server
from pipelines.serve.answers import Service
from pipelines.serve.asking import json_bytes, vector_text
from pipelines.serve.batching import Batcher, rounded
from pipelines.serve.connections import limited
from pipelines.serve.limits import Limits, Refused
from pipelines.serve.metrics import Metrics
from pipelines.serve.thumbnails import Thumbnails

GOOD = {"terms": [{"text": "red circle"}], "k": 3}
PNG = encoded(picture("red", "cross", side=50))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two data sets, an untrained model with a fusion head, a table and an index of each."""
    root = tmp_path_factory.mktemp("served")
    model = tiny_model()
    save(model, root / "bundle")
    head = fusion_head("late")(
        dim=model.config.dim,
        image_width=model.image.token_width,
        text_width=model.text.token_width,
    )
    save_head(
        head,
        root / "bundle/heads/late",
        name="late",
        options={},
        towers=fingerprint(root / "bundle"),
    )
    for hand in ("one", "two"):
        write_pairs(root / f"data-{hand}", hand=hand)
        run("embed", f"{root}/bundle", f"{root}/data-{hand}", f"{root}/table-{hand}")
        run("index", f"{root}/table-{hand}", f"{root}/{hand}")
    return root


def run(verb: str, *arguments: str) -> None:
    assert resolve_name(VERBS[verb].run)(parse(verb, arguments)) in (0, None)


@dataclass
class Live:
    """A server that runs in a thread of this process."""

    url: str
    service: Service
    client: httpx.Client

    @property
    def place(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rstrip("/").rpartition(":")
        return host, int(port)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.client.post(path, **options)

    def ask(self, **changes: Any) -> dict[str, Any]:
        """A search that works."""
        response = self.post("api/search", json={**GOOD, **changes})
        assert response.status_code == 200, response.text
        return response.json()

    def is_alive(self) -> bool:
        return len(self.ask(index="one")["hits"]) == 3

    def raw(self, *sent: bytes, pause: float = 0.0) -> bytes:
        """All that comes back for these bytes."""
        with socket.create_connection(self.place, timeout=20) as client:
            try:
                for part in sent:
                    client.sendall(part)
                    time.sleep(pause)
            except OSError:  # it was closed before the end
                pass
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    received = b""
    try:
        while more := client.recv(65_536):
            received += more
    except ConnectionError:
        pass
    return received


def client_of(url: str) -> httpx.Client:
    """A client that does not spend its time on certificates."""
    return httpx.Client(base_url=url, verify=False, trust_env=False, timeout=60)


@contextmanager
def serving(world: Path, *, token: str | None = None, **changes: Any) -> Iterator[Live]:
    values = {"indexes": {"one": world / "one", "two": world / "two"}, "port": 0, **changes}
    config = build(ServeConfig, values, origin="test")
    with listening(config.host, config.port) as door:
        prepared = prepare(config, token)
        thread = threading.Thread(target=prepared.server.run, kwargs={"sockets": [door]})
        thread.start()
        try:
            while not prepared.server.started:
                time.sleep(0.01)
            with client_of(address(door)) as client:
                yield Live(address(door), prepared.service, client)
        finally:
            prepared.server.should_exit = True
            thread.join()
            prepared.service.close()


@pytest.fixture(scope="module")
def live(world) -> Iterator[Live]:
    with serving(world) as server:
        yield server


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def floats(text: str) -> np.ndarray:
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    return np.frombuffer(data, "<f2").astype(np.float32)


# --- answers ---


ENCODED = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    ("terms", "of"),
    [
        ([{"text": "red circle"}], [("red circle", 1.0)]),
        ([{"text": "red"}, {"text": "circle", "weight": -0.5}], [("red", 1.0), ("circle", -0.5)]),
        ([{"image": ENCODED}], [(PNG, 1.0)]),
        ([{"image": "data:image/png;base64," + ENCODED}], [(PNG, 1.0)]),
        ([{"image": ENCODED, "weight": 0.4}, {"text": "blue"}], [(PNG, 0.4), ("blue", 1.0)]),
    ],
)
def test_the_answer_is_that_of_the_library(terms, of, live, world):
    answer = live.ask(index="one", terms=terms, k=5)
    found = floats(answer["query"])
    searcher = Searcher(world / "one")
    hits = searcher.search(found[None], 5)
    assert [hit["id"] for hit in answer["hits"]] == hits.ids[0].tolist()
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(hits.scores[0], abs=1e-5)
    assert [hit["caption"] for hit in answer["hits"]] == [r["caption"] for r in hits.rows[0]]
    assert answer["hits"][0]["fields"].keys() == {"colour", "shape", "hand"}
    assert answer["matching"] == 48
    encoder = live.service.index("one").encoder.encoder
    values = [(Image.open(io.BytesIO(v)) if isinstance(v, bytes) else v, w) for v, w in of]
    expected = encoder.vectors([Query(tuple(Term(*one) for one in values))])[0]
    assert found @ expected == pytest.approx(1, abs=1e-3)


def test_a_row_is_like_others_but_not_among_them(live, world):
    answer = live.ask(index="one", terms=[{"id": 7}], k=48)
    searcher = Searcher(world / "one")
    hits = searcher.similar([7], 47)
    assert [hit["id"] for hit in answer["hits"]] == hits.ids[0].tolist()
    assert 7 not in hits.ids


def test_a_picture_that_is_sent_back_as_its_vector_gives_the_same_hits(live):
    first = live.ask(index="one", terms=[{"image": ENCODED}, {"text": "blue"}], k=10)
    vector, none = first["vectors"]
    assert none is None
    again = live.ask(index="one", terms=[{"vector": vector}, {"text": "blue"}], k=10)
    assert [h["id"] for h in again["hits"]] == [h["id"] for h in first["hits"]]
    assert again["query"] == first["query"]
    later = live.ask(index="one", terms=[{"vector": first["query"]}], k=5, offset=5)
    assert [h["id"] for h in later["hits"]] == [h["id"] for h in first["hits"]][5:]


def test_a_form_with_files_asks_what_json_asks(live):
    query = {"index": "one", "terms": [{"upload": 1}, {"text": "blue"}], "k": 4}
    files = [("images", ("a.png", b"unused")), ("images", ("../b.png", PNG))]
    form = live.post("api/search", data={"query": json.dumps(query)}, files=files)
    assert form.status_code == 200, form.text
    as_json = live.ask(**{**query, "terms": [{"image": ENCODED}, {"text": "blue"}]})
    assert form.json()["hits"] == as_json["hits"]


def test_filters_reach_the_index(live):
    one = live.ask(index="one", where="colour = 'red'", k=48)
    other = live.ask(index="one", fields={"colour": ["red"]}, k=48)
    assert one["matching"] == other["matching"] == 8
    assert {hit["fields"]["colour"] for hit in one["hits"]} == {"red"}
    assert one["hits"] == other["hits"]
    assert "picture" in one["hits"][0]


def test_two_indexes_at_once_share_their_model(live):
    assert {one["name"]: one["rows"] for one in live.get("api/indexes").json()} == {
        "one": 48,
        "two": 48,
    }
    for name in ("one", "two"):
        rows = live.ask(index=name)["hits"]
        assert all(hit["fields"]["hand"] == name for hit in rows)
        assert all(hit["picture"].startswith(f"/api/pictures/{name}/") for hit in rows)
    assert live.service.index("one").encoder is live.service.index("two").encoder


def test_a_fusion_head_fuses(live, world):
    terms = [{"image": ENCODED}, {"text": "blue"}]
    fused = live.ask(index="one", terms=terms, head="late")
    encoder = live.service.index("one").encoder.encoder
    query = Query((Term(Image.open(io.BytesIO(PNG))), Term("blue")), head="late")
    assert floats(fused["query"]) @ encoder.vectors([query])[0] == pytest.approx(1, abs=1e-3)
    assert fused["query"] != live.ask(index="one", terms=terms)["query"]
    assert fused["vectors"][0] == live.ask(index="one", terms=[{"image": ENCODED}])["vectors"][0]


def test_what_an_index_says_of_itself(live):
    one = next(one for one in live.get("api/indexes").json() if one["name"] == "one")
    assert one["heads"] == ["late"]
    assert one["recall"]["text"] == 1.0
    assert one["pictures"] is True
    assert (one["modality"], one["dim"]) == ("image", 16)
    assert {field["name"] for field in one["fields"]} >= {"colour", "shape"}
    assert not one["model"].startswith("/")
    assert len(one["sample"]) == 24
    assert live.get(one["sample"][3]["picture"]).status_code == 200


@pytest.mark.slow
def test_rows_that_are_fused_are_asked_with_their_head(world, tmp_path):
    bundle = world / "bundle"
    table = f"{tmp_path}/table"
    run(
        "embed",
        f"{bundle}",
        f"{world}/data-one",
        table,
        "rows=[fused]",
        f"head={bundle}/heads/late",
    )
    run("index", table, f"{tmp_path}/fused", "modality=fused")
    with serving(world, indexes={"fused": tmp_path / "fused", "one": world / "one"}) as live:
        terms = [{"image": ENCODED}, {"text": "blue"}]
        fused = live.ask(index="fused", terms=terms)
        assert fused["query"] == live.ask(index="one", terms=terms, head="late")["query"]
        assert fused["query"] != live.ask(index="one", terms=terms)["query"]


# --- what is refused, with the server alive after it ---


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few bytes."""
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(64) * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def vector64(*values: float) -> str:
    return vector_text(np.array(values, np.float32))


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("unknown index", {"index": "three"}, 404, "known: one, two"),
    ("no index named", {"index": None}, 400, "one, two"),
    ("path as index", {"index": "../one"}, 404, "unknown index"),
    ("no terms", {"terms": []}, 400, "text or a picture"),
    ("empty text", {"terms": [{"text": " "}]}, 400, "empty"),
    ("empty term", {"terms": [{}]}, 400, "exactly one"),
    ("two kinds", {"terms": [{"text": "a", "id": 1}]}, 400, "exactly one"),
    ("weightless", {"terms": [{"text": "a", "weight": 0}]}, 400, "weight"),
    ("huge weight", {"terms": [{"text": "a", "weight": 1e300}]}, 400, "weight"),
    ("text as weight", {"terms": [{"text": "a", "weight": "x"}]}, 422, "weight"),
    ("cancelled", {"terms": [{"text": "a"}, {"text": "a", "weight": -1}]}, 400, "cancel"),
    ("unknown key", {"kk": 3}, 422, "kk"),
    ("k of 0", {"k": 0}, 400, "k: from 1"),
    ("huge k", {"k": 10**12}, 400, "k: from 1"),
    ("k as text", {"k": "many"}, 422, "k: "),
    ("negative offset", {"offset": -1}, 400, "offset"),
    ("huge offset", {"offset": 10**9}, 400, "offset"),
    ("long text", {"terms": [{"text": "a" * 100_000}]}, 400, "characters"),
    ("long where", {"where": "a" * 100_000}, 400, "characters"),
    ("many terms", {"terms": [{"text": "a"}] * 1000}, 400, "terms: at most"),
    ("bad SQL", {"where": "colour = = 1"}, 400, "columns"),
    ("SQL of files", {"where": "(select count(*) from read_csv('/etc/passwd')) > 0"}, 400, ""),
    ("SQL statement", {"where": "1=1; drop table x"}, 400, ""),
    ("unknown field", {"fields": {"nope": ["x"]}}, 400, "nope"),
    ("unknown row", {"terms": [{"id": 10_000}]}, 404, "no such row"),
    ("huge row", {"terms": [{"id": 10**30}]}, 404, "no such row"),
    ("wide row", {"terms": [{"id": 2**62}]}, 404, "no such row"),
    ("deep variety", {"diversity": 0.5, "offset": 990, "k": 20}, 400, "at most"),
    ("deep collapse", {"collapse": 0.9, "offset": 9000}, 400, "at most"),
    ("score of no cosine", {"min_score": 5}, 400, "from -1 to 1"),
    ("score below all", {"min_score": -1.01}, 400, "from -1 to 1"),
    ("many values", {"fields": {"colour": ["x"] * 2000}}, 400, "2,000 fields and values"),
    ("many fields", {"fields": {f"f{n}": 1 for n in range(2001)}}, 400, "2,000 fields and values"),
    ("many within", {"fields": {"colour": {"min": [[1] * 999, [2] * 999]}}}, 400, "2,000 fields"),
    ("long value", {"fields": {"colour": ["x" * 5000]}}, 400, "4000 characters"),
    ("long key", {"y" * 50_000: 1}, 422, "y" * 100 + ": "),
    ("long field", {"fields": {"x" * 5000: 1}}, 400, "4000 characters"),
    ("odd diversity", {"diversity": 7}, 400, "diversity"),
    ("unknown head", {"head": "late?"}, 400, "known: late"),
    ("head without picture", {"head": "late"}, 400, "one picture and one text"),
    ("not base64", {"terms": [{"image": "###"}]}, 400, "base64"),
    ("no picture", {"terms": [{"image": text64(b"MZ" * 99)}]}, 415, "known type"),
    ("svg", {"terms": [{"image": text64(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}]}, 415, ""),
    ("half a picture", {"terms": [{"image": text64(PNG[:90])}]}, 400, "cannot be read"),
    ("bomb", {"terms": [{"image": text64(bomb(30_000))}]}, 413, "pixels"),
    ("upload without form", {"terms": [{"upload": 0}]}, 400, "0 files"),
    ("short vector", {"terms": [{"vector": vector64(1, 2, 3)}]}, 400, "16 numbers"),
    ("zero vector", {"terms": [{"vector": vector64(*[0] * 16)}]}, 400, "zeros"),
    ("NaN vector", {"terms": [{"vector": vector64(*[float("nan")] * 16)}]}, 400, "finite"),
    ("URL", {"terms": [{"image": "http://127.0.0.1/x.png"}]}, 400, "base64"),
    ("terms of text", {"terms": "red"}, 422, "terms"),
]


@pytest.mark.parametrize(
    ("changes", "status", "said"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED]
)
def test_what_cannot_be_is_refused_in_one_line(changes, status, said, live):
    response = live.post("api/search", json={**GOOD, "index": "one", **changes})
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    line = response.json()["error"]
    assert said in line
    assert "\n" not in line
    assert "Traceback" not in line
    assert live.is_alive()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[]", 422),
        (b'{"terms": [{"text": "a", "weight": NaN}]}', 422),
        (b'{"terms": [{"text": "a", "weight": 1e999}]}', 422),
        (b'{"terms": [{"text": "\\ud800"}]}', 400),
        (b"[" * 100_000, 400),
        (b'{"terms": [{"text": "a"}], "min_score": NaN}', 422),
    ],
)
def test_bodies_that_are_no_search(body, status, live):
    kind = {"content-type": "application/json"}
    response = live.post("api/search", content=body, headers=kind)
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert live.is_alive()


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"{}", 415),
        ("application/xml", b"<a/>", 415),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=a", b"--b\r\n\r\n", 400),
        ("multipart/form-data; boundary=a", b"--a--\r\n", 400),
    ],
)
def test_types_that_are_not_taken(kind, body, status, live):
    response = live.post("api/search", content=body, headers={"content-type": kind})
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert live.is_alive()


def test_forms_that_are_no_search(live):
    file = ("images", ("a.png", PNG))
    query = json.dumps({"index": "one", "terms": [{"upload": 0}]})
    many = live.post("api/search", data={"query": query}, files=[file] * 50)
    assert many.status_code == 400
    missing = live.post("api/search", files=[file])
    assert missing.status_code == 400
    assert "query" in missing.json()["error"]
    wrong = live.post("api/search", data={"query": query}, files=[("images", ("a.png", b"GIF"))])
    assert wrong.status_code == 415
    as_file = live.post("api/search", files=[("query", ("q.json", query.encode())), file])
    assert as_file.status_code == 400
    assert live.is_alive()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "api/search", 405),
        ("DELETE", "api/rows/one/3", 405),
        ("GET", "api/nothing", 404),
        ("GET", "api/rows/three/3", 404),
        ("GET", "api/rows/one/3000", 404),
        ("GET", "api/rows/one/-1", 404),
        ("GET", "api/rows/one/x", 422),
        ("GET", "api/rows/one/" + "9" * 40, 404),
        ("GET", "api/pictures/one/9999", 404),
        ("GET", "api/pictures/one/3?side=100000", 422),
        ("GET", "api/pictures/one/3?side=x", 422),
        ("POST", "docs", 405),
    ],
)
def test_paths_that_are_not_there(method, path, status, live):
    response = live.client.request(method, path)
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert live.is_alive()


@pytest.mark.parametrize(
    "target",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page.js/../../../../etc/passwd",
        "//etc/passwd",
        "/api/pictures/..%2f..%2fetc/passwd",
        "/api/pictures/one/..%2f..%2f..%2fetc%2fpasswd",
        "/api/rows/..%5c..%5c/1",
        "/api/rows/one%00/1",
        "/api/rows/%ff%fe/1",
        "/api/pictures/one/1/../../../../index.json",
        "/__init__.py",
        "/page/index.html",
        "/index.json",
        "http://example.org/etc/passwd",
    ],
)
def test_no_path_leads_out(target, live):
    host = "{}:{}".format(*live.place)
    answer = live.raw(
        f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )
    assert status_of(answer) in (404, 405, 422), answer
    assert b"root:" not in answer
    assert live.is_alive()


def test_what_is_no_http_is_a_400(live):
    assert status_of(live.raw(b"\x16\x03\x01 hello\r\n\r\n")) == 400
    long = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n"
    assert status_of(live.raw(long)) == 400
    assert live.is_alive()


# --- size, speed, many at once ---


def test_an_upload_of_50_mb_is_refused_before_it_is_read(live):
    started = time.perf_counter()
    large = live.post("api/search", content=bytes(50_000_000), headers=JSON)
    assert large.status_code == 413
    assert "20,000,000 bytes" in large.json()["error"]
    files = [("images", ("a.png", bytes(50_000_000)))]
    form = live.post("api/search", data={"query": json.dumps(GOOD)}, files=files)
    assert form.status_code == 413
    assert time.perf_counter() - started < 60
    head = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000000\r\n"
    assert status_of(live.raw(head + b"Expect: 100-continue\r\n\r\n")) == 413
    assert live.is_alive()


JSON = {"content-type": "application/json"}
SMALL = b'{"index":"one","terms":[{"text":"a"}],"fields":{"colour":[' + b"1," * 21_001 + b"1]}}"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("api/search", b'{"terms":[' + b'{"text":"a"},' * 21_001 + b"{}]}", "too many values"),
        ("api/search", SMALL, "too many values"),
        ("knn-service", b'{"embedding_input":[' + b"0," * 21_001 + b"0]}", "too many values"),
        ("metadata", b'{"ids":[' + b"0," * 21_001 + b"0]}", "too many values"),
        ("api/search", b'{"terms":[{"text":"' + b"\\u0041" * 500_001 + b'"}]}', "backslashes"),
        ("api/login", b'{"x":[' + b"0," * 21_001 + b"0]}", "too many values"),
    ],
)
def test_json_of_many_values_is_not_read(path, body, said, live, monkeypatch):
    """Reading it would hold up everyone else: a server has one thread for this."""
    for schema in (asking.Asked, knn_service.KnnAsked, knn_service.MetadataAsked, app._Login):
        monkeypatch.setattr(schema, "model_validate_json", None)
    response = live.post(path, content=body, headers=JSON)
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]


def test_a_form_of_many_values_is_not_read(live):
    form = {"query": SMALL.decode()}
    response = live.post("api/search", data=form, files=[("images", ("a.png", PNG))])
    assert response.status_code == 400
    assert "too many values" in response.json()["error"]


def test_as_many_values_as_allowed_are_searched_for(live):
    colours = ["red", *(f"other {number}" for number in range(1998))]
    found = live.ask(index="one", fields={"colour": colours}, k=48)
    assert found["hits"] == live.ask(index="one", fields={"colour": "red"}, k=48)["hits"]


@pytest.mark.parametrize("path", ["api/search", "knn-service", "metadata", "api/login"])
def test_pages_from_elsewhere_may_not_ask(path, live):
    """A browser sends what a page of anyone wants to this machine, and tells whose page it is."""
    body = json.dumps({**GOOD, "index": "one"})
    for origin in ("http://evil.example", "null", "", "http://evil.example:8000"):
        response = live.post(path, content=body, headers={**JSON, "origin": origin})
        assert response.status_code == 403, origin
        assert "hosts" in response.json()["error"]
    own = live.url.rstrip("/")
    for headers in ({"origin": own}, {"origin": own.upper()}, {}):
        response = live.post(path, content=body, headers={**JSON, **headers})
        assert response.status_code != 403, headers
    evil = {"origin": "http://evil.example"}
    assert live.get("health", headers=evil).status_code == 200, "it does no work"


def test_pages_under_a_name_of_the_server_may_ask(world, guarded):
    """A proxy may call it by another name than its clients do."""
    page = {**JSON, "origin": "https://search.example:8443"}
    body = json.dumps({**GOOD, "index": "one"})
    with serving(world, hosts=["search.example"]) as live:
        assert live.post("api/search", content=body, headers=page).status_code == 200
    right = {"authorization": f"Bearer {TOKEN}".encode(), **page}
    assert guarded.post("api/search", content=body, headers=right).status_code == 403


def test_a_body_without_a_length_is_measured_as_it_comes(live):
    def parts() -> Iterator[bytes]:
        for _ in range(50):
            yield bytes(1_000_000)

    answer = live.post("api/search", content=parts(), headers=JSON)
    assert answer.status_code == 413
    assert live.is_alive()


async def ask_all(url: str, count: int) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(
        timeout=120, limits=limits, verify=False, trust_env=False
    ) as client:

        async def one(number: int) -> httpx.Response:
            body = {"index": ("one", "two")[number % 2], "terms": [{"text": f"red {number}"}]}
            return await client.post(f"{url}api/search", json=body)

        return await asyncio.gather(*(one(number) for number in range(count)))


def test_200_requests_at_once_are_all_answered(live):
    answers = asyncio.run(ask_all(live.url, 200))
    assert {one.status_code for one in answers} == {200}
    assert live.is_alive()


@pytest.mark.slow
def test_1000_requests_at_once_are_answered_or_told_to_come_back(world):
    with serving(world, max_waiting=300) as live:
        answers = asyncio.run(ask_all(live.url, 1000))
        statuses = [one.status_code for one in answers]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 300
        busy = next(one for one in answers if one.status_code == 503)
        assert busy.headers["retry-after"] == "1"
        assert busy.json().keys() == {"error"}
        assert live.is_alive()


HEAD = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_slow_client_is_not_waited_for(world):
    with serving(world, read_timeout=0.3) as live:
        assert status_of(live.raw(b"GET / HT")) == 408, "headers that do not come"
        assert status_of(live.raw(b"")) == 408, "nothing at all"
        drop = [bytes([one]) for one in HEAD[:30]]
        assert status_of(live.raw(*drop, pause=0.1)) == 408, "a byte at a time"
        assert status_of(live.raw(HEAD + b"Content-Length: 99\r\n\r\n{")) == 408, "half a body"
        body = [HEAD + b"Content-Length: 99\r\n\r\n", *[b" "] * 20]
        assert status_of(live.raw(*body, pause=0.1)) == 408, "a body, a byte at a time"
        with socket.create_connection(live.place) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET ")
            answer = read_all(client)
        assert status_of(answer) == 200
        assert b"408" in answer, "the second request of a connection has its time, too"
        assert live.is_alive()


def test_who_does_not_read_is_dropped(world):
    with serving(world, read_timeout=0.3) as live:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(live.place)
            request = b"GET /api/indexes HTTP/1.1\r\nHost: localhost\r\n\r\n"
            for _ in range(1000):
                try:
                    client.settimeout(0.5)
                    client.sendall(request)
                except OSError:
                    break
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and not was_reset(client):
                time.sleep(0.05)
            assert was_reset(client)
        assert live.is_alive()


def was_reset(client: socket.socket) -> bool:
    try:
        client.send(b" ")
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def test_too_many_connections_are_closed(world):
    with serving(world, max_connections=4) as live:
        idle = [socket.create_connection(live.place, timeout=20) for _ in range(4)]
        try:
            assert status_of(live.raw(b"")) == 503
        finally:
            for one in idle:
                one.close()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if live.get("health").status_code == 200:
                break
        assert live.is_alive()


# --- the encoder ---


class Gated(QueryEncoder):
    """An encoder that waits until it is let go, and remembers its batches."""

    def __init__(self, encoder: QueryEncoder) -> None:
        super().__init__(encoder.model, encoder.heads)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[str]] = []

    def vectors(self, queries: Sequence[Query]) -> np.ndarray:
        if queries:
            self.batches.append([str(query.terms[0].value) for query in queries])
            self.entered.set()
            assert self.gate.wait(30)
        return super().vectors(queries)


@pytest.fixture
def gated(live) -> Iterator[tuple[Gated, Batcher]]:
    encoder = Gated(live.service.index("one").encoder.encoder)
    batcher = Batcher(encoder, max_batch=4, max_waiting=6, metrics=Metrics())
    yield encoder, batcher
    encoder.gate.set()
    batcher.close()


def words(text: str) -> Query:
    return Query((Term(text),))


def test_who_waits_is_encoded_together(gated):
    encoder, batcher = gated

    async def ask() -> list[Any]:
        first = asyncio.create_task(batcher.encode(words("first")))
        await asyncio.to_thread(encoder.entered.wait, 30)
        waiting = [asyncio.create_task(batcher.encode(words(f"red {n}"))) for n in range(6)]
        await asyncio.sleep(0.05)
        with pytest.raises(Refused) as refused:
            await batcher.encode(words("one too many"))
        assert refused.value.status == 503
        waiting[1].cancel()
        await asyncio.sleep(0.05)
        encoder.gate.set()
        return await asyncio.gather(first, *waiting, return_exceptions=True)

    found = asyncio.run(ask())
    assert encoder.batches == [["first"], ["red 0", "red 2", "red 3", "red 4"], ["red 5"]]
    assert isinstance(found[2], asyncio.CancelledError)
    for number in (0, 2, 5):
        alone = rounded(encoder.vectors([words(f"red {number}")]))[0]
        assert found[number + 1].vector == pytest.approx(alone, abs=2e-3)


def test_a_query_that_cannot_be_encoded_fails_alone(gated):
    encoder, batcher = gated
    cancelling = Query((Term("a"), Term("a", -1.0)))

    async def ask() -> list[Any]:
        tasks = [asyncio.create_task(batcher.encode(words("first")))]
        await asyncio.to_thread(encoder.entered.wait, 30)
        some = (words("red"), cancelling, words("blue"))
        tasks += [asyncio.create_task(batcher.encode(query)) for query in some]
        await asyncio.sleep(0.05)
        encoder.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask())
    assert isinstance(found[2], ConfigError)
    assert all(one.vector.shape == (16,) for one in (found[0], found[1], found[3]))


def test_an_answer_that_takes_too_long_is_a_504(world):
    with serving(world, timeout=0.5) as live:
        encoder = gate(live)
        response = live.post("api/search", json={**GOOD, "index": "one"})
        assert response.status_code == 504
        assert "0.5 s" in response.json()["error"]
        encoder.gate.set()
        assert live.is_alive()


def gate(live: Live) -> Gated:
    """Put a gate before the encoder of a server's first index."""
    one = live.service.indexes["one"]
    encoder = Gated(one.encoder.encoder)
    batcher = Batcher(encoder, max_batch=4, max_waiting=99, metrics=live.service.metrics)
    one.encoder.close()
    live.service.indexes = {"one": replace(one, encoder=batcher)}
    return encoder


def test_a_request_whose_client_hangs_up_is_dropped(world):
    with serving(world) as live:
        encoder = gate(live)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(live.is_alive)
            assert encoder.entered.wait(30)
            body = json.dumps({"index": "one", "terms": [{"text": "nobody waits"}]}).encode()
            with socket.create_connection(live.place) as client:
                client.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                batcher = live.service.indexes["one"].encoder
                while not batcher.waiting:
                    time.sleep(0.01)
            while 'status="499"' not in live.get("metrics").text:
                time.sleep(0.01)
            encoder.gate.set()
            assert first.result()
        assert live.is_alive()
        assert "nobody waits" not in str(encoder.batches)


def test_a_fault_of_ours_is_one_line_in_the_log(world, monkeypatch, capfd):
    with serving(world) as live:

        def broken(*_: Any, **__: Any) -> Any:
            raise KeyError("secret\nsecond line")

        with monkeypatch.context() as patch:
            patch.setattr(live.service.index("one").searcher, "search", broken)
            response = live.post("api/search", json={**GOOD, "index": "one"})
        assert response.status_code == 500
        assert response.json() == {"error": "something went wrong in the server"}
        logged, until = "", time.monotonic() + 10
        while not logged.endswith("\n") and time.monotonic() < until:  # the answer goes first
            logged += capfd.readouterr().err
            time.sleep(0.01)
        logged = logged.strip()
        assert logged.startswith("align serve: POST '/api/search': KeyError")
        assert len(logged.splitlines()) == 1
        assert live.is_alive()


# --- token ---


@pytest.fixture(scope="module")
def guarded(world) -> Iterator[Live]:
    with serving(world, token="öpen sesame") as server:
        yield server


TOKEN = "öpen sesame"


def test_a_token_is_asked_for(guarded):
    for path in ("api/indexes", "metrics", "api/rows/one/3", "api/pictures/one/3", "nothing"):
        answer = guarded.get(path)
        assert answer.status_code == 401, path
        assert answer.json().keys() == {"error"}
    for path in ("", "health", "page.js", "page.css"):
        assert guarded.get(path).status_code == 200, path
    wrong = (b"", b"Bearer", b"Bearer wrong", b"Basic x", "Bearer öpen".encode(), b"\xff\xff")
    for header in wrong:
        assert guarded.get("api/indexes", headers={"authorization": header}).status_code == 401
    right = {"authorization": f"Bearer {TOKEN}".encode()}
    assert guarded.get("api/indexes", headers=right).status_code == 200
    answer = guarded.post("api/search", json={**GOOD, "index": "one"}, headers=right)
    assert answer.status_code == 200


def test_a_browser_shows_the_token_once(guarded):
    with client_of(guarded.url) as client:
        assert client.post("api/login", json={"token": "wrong"}).status_code == 401
        assert client.post("api/login", json={}).status_code == 422
        assert client.get("api/indexes").status_code == 401
        shown = client.post("api/login", json={"token": TOKEN})
        assert shown.status_code == 200
        cookie = shown.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert TOKEN not in cookie
        assert client.get("api/indexes").status_code == 200
    for value in ("x", "", '"', "a=b; align_token=" + "0" * 64):
        answer = guarded.get("api/indexes", headers={"cookie": f"align_token={value}"})
        assert answer.status_code == 401


def test_an_upload_without_the_token_is_not_read(guarded):
    answer = guarded.raw(HEAD + b"Content-Length: 1000\r\nConnection: close\r\n\r\n")
    assert status_of(answer) == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("", 403),
    ],
)
def test_a_name_of_elsewhere_leads_nowhere(host, status, live):
    request = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert status_of(live.raw(request.encode())) == status


def test_names_may_be_given(world, guarded):
    request = b"GET /health HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
    assert status_of(guarded.raw(request % b"any.example")) == 200, "the token protects it"
    with serving(world, hosts=["search.example"]) as live:
        assert status_of(live.raw(request % b"Search.Example:8000")) == 200
        assert status_of(live.raw(request % b"other.example")) == 403
        assert live.is_alive()


# --- pictures, page, state ---


def test_pictures_are_small_and_kept(live):
    url = "api/pictures/two/5?side=32"
    answer = live.get(url)
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).size == (32, 32)
    assert Image.open(io.BytesIO(live.get("api/pictures/two/5").content)).size == (40, 40)
    tag = answer.headers["etag"]
    same = live.get(url, headers={"if-none-match": tag})
    assert (same.status_code, same.content) == (304, b"")
    assert live.get("api/pictures/two/5?side=33").headers["etag"] != tag


def test_kept_pictures_have_an_end(live):
    served = live.service.index("one")
    some = Thumbnails(max_bytes=1000)
    sizes = {row: len(some.made(served, row, 64)) for row in range(12)}
    kept = [row for row in sizes if some.kept(served, row, 64)]
    assert 0 < len(kept) < 12
    assert sum(sizes[row] for row in kept) <= 1000
    assert kept[-1] == 11


def test_shards_that_are_gone_are_a_404(live):
    served = live.service.index("one")
    sources = [replace(one, origin={"data": "/nowhere"}) for one in served.searcher.card.sources]
    lost = replace(served, pictures=IndexPictures(sources))
    with pytest.raises(Refused) as refused:
        Thumbnails().made(lost, 3, 64)
    assert refused.value.status == 404
    assert "/nowhere" not in refused.value.line


def test_the_page_and_its_files_load_nothing_from_elsewhere(live):
    page = live.get("")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    linked = re.findall(r'(?:src|href)="/?([a-z_-]+[.](?:js|css))"', page.text)
    assert linked
    for path in linked:
        answer = live.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = live.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304
    assert live.client.head("").status_code == 200


def test_the_interface_describes_itself(live):
    described = live.get("openapi.json").json()
    assert {"/api/search", "/api/indexes", "/api/rows/{index}/{id}"} <= described["paths"].keys()
    asked = described["components"]["schemas"]["Asked"]["properties"]
    assert {"terms", "k", "where", "head"} <= asked.keys()
    assert "AskedTerm" in described["components"]["schemas"]
    docs = live.get("docs")
    assert docs.status_code == 200
    assert "diversity" in docs.text
    assert "//" not in re.sub(r"<pre>.*?</pre>", "", docs.text, flags=re.DOTALL)


def test_health_and_metrics(live):
    assert live.get("health").json()["status"] == "ok"
    live.ask(index="one")
    live.get("api/nothing/at/all")
    text = live.get("metrics").text
    assert 'align_requests_total{method="POST",route="/api/search",status="200"}' in text
    assert 'route="other",status="404"' in text
    assert "nothing" not in text, "paths of strangers make no new series"
    for stage in ("encode", "search", "total"):
        assert f'align_stage_seconds_count{{stage="{stage}"}}' in text
    assert "align_encoder_queue 0.0" in text
    assert "align_encoder_batch_size_count" in text


def test_json_has_no_numbers_that_json_has_not():
    row = {"a": float("nan"), "b": [1.5, np.float32("inf")], "c": np.int64(3), "d": b"x", 5: "é"}
    read = json.loads(json_bytes(row))
    assert read == {"a": None, "b": [1.5, None], "c": 3, "d": "b'x'", "5": "é"}


# --- the verb ---


def refused(capsys, *arguments: str) -> str:
    """The one line of a command that is refused."""
    with pytest.raises(SystemExit) as left:
        main(["serve", *arguments])
    captured = capsys.readouterr()
    assert left.value.code == 2, captured.err
    return captured.err


def test_a_port_in_use_is_one_line(world, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused(capsys, str(world / "one"), f"port={port}")
    assert f"port: {port} is in use" in line
    assert len(line.splitlines()) == 1


def test_mistakes_are_told(world, tmp_path, capsys):
    assert "give an index" in refused(capsys)
    assert "there is no file" in refused(capsys, str(tmp_path / "none"))
    assert "there is no file" in refused(capsys, f"indexes={{a: {tmp_path}/none}}")
    line = refused(capsys, str(world / "bundle"))
    assert "bundle: not an index (no index.json)" in line
    assert "loading" not in line, "it is told before anything is loaded"
    assert "is no name" in refused(capsys, f"indexes={{a/b: {world}/one}}")
    assert "there twice" in refused(capsys, f"{world}/one", f"indexes={{one: {world}/two}}")
    assert "not both" in refused(capsys, f"{world}/one", "token=a", f"token_file={world}/one")
    assert "no address" in refused(capsys, f"{world}/one", "host=no.such.host.invalid")
    empty = tmp_path / "token"
    empty.write_text("\n")
    assert "is empty" in refused(capsys, f"{world}/one", f"token_file={empty}")
    empty.write_text(" secret \n")
    values = {"index": world / "one", "token_file": empty}
    assert read_token(build(ServeConfig, values, origin="test")) == "secret"
    assert "holds no fusion head" in refused(capsys, f"{world}/one", "port=0", f"heads={world}")


def test_a_model_that_does_not_fit_is_refused(world, tmp_path, capsys):
    save(tiny_model(seed=1), tmp_path / "other")
    line = refused(capsys, f"{world}/one", "port=0", f"model={tmp_path}/other")
    assert "not the model that" in line


def test_every_limit_of_a_connection_is_its_own():
    assert limited(read_seconds=2.0, most=3).read_seconds == 2.0
    assert limited(read_seconds=4.0, most=3).read_seconds == 4.0
    assert Limits().body == 20_000_000


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(sign, world, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    seen = []

    def interrupt() -> None:
        with client_of(url) as client:
            while not seen:
                try:
                    seen.append(client.get("health").status_code)
                except httpx.ConnectError:
                    time.sleep(0.02)
        os.kill(os.getpid(), sign)

    def serve() -> int:
        values = {"index": world / "one", "port": port}
        return run_server(build(ServeConfig, values, origin="test"))

    before = signal.getsignal(signal.SIGTERM), threading.active_count()
    thread = threading.Thread(target=interrupt)
    thread.start()
    if sign == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):  # which the command line makes an exit code of 130
            serve()
    else:
        assert serve() == 0
    thread.join()
    assert seen == [200]
    captured = capsys.readouterr()
    assert captured.out == f"one (48 rows): {url}\n"
    assert captured.err == "loading one and what asks them\n"
    assert (signal.getsignal(signal.SIGTERM), threading.active_count()) == before
