"""clip-retrieval's interface: bodies as its `ClipClient` sends them, answers as it reads them."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
from fastapi.testclient import TestClient
from pairs_corpus import encoded, picture, tiny_model, write_pairs

from align.bundle import save
from eval.index.build import build_index
from eval.table import EmbeddingTable
from pipelines.cli import VERBS, parse
from pipelines.serve.answers import Service
from pipelines.serve.app import application
from pipelines.serve.indexes import open_indexes
from pipelines.serve.limits import Limits
from pipelines.serve.metrics import Metrics

PNG = base64.b64encode(encoded(picture("red", "cross", side=50))).decode()


def run(verb: str, *arguments: str) -> None:
    assert resolve_name(VERBS[verb].run)(parse(verb, arguments)) in (0, None)


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    """Pictures of two data sets, and the words of one of them."""
    root = tmp_path_factory.mktemp("knn")
    save(tiny_model(), root / "bundle")
    for hand in ("one", "two"):
        write_pairs(root / f"data-{hand}", hand=hand)
        places = (f"{root}/data-{hand}", f"{root}/table-{hand}")
        run("embed", f"{root}/bundle", *places, "rows=[image,text]")
        table = EmbeddingTable(root / f"table-{hand}", check="sizes")
        build_index(table, root / hand, factory="Flat", query_count=4)
        if hand == "one":
            build_index(table, root / "words", factory="Flat", modality="text", query_count=4)
    yield from served(root)


def served(root: Path) -> Iterator[Service]:
    metrics = Metrics()
    indexes = open_indexes(
        {name: root / name for name in ("one", "two", "words")},
        model=None,
        heads=None,
        check="sizes",
        memory_map=False,
        max_batch=8,
        max_waiting=8,
        metrics=metrics,
    )
    service = Service(indexes, limits=Limits(k=50, body=400_000), metrics=metrics, threads=1)
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service) -> Iterator[TestClient]:
    with TestClient(application(service)) as client:
        yield client


def asked(**changes):
    """What `ClipClient.query` sends."""
    return {
        "text": None,
        "image": None,
        "image_url": None,
        "embedding_input": None,
        "deduplicate": False,
        "use_safety_model": True,
        "use_violence_detector": True,
        "indice_name": "one",
        "use_mclip": False,
        "aesthetic_score": 9,
        "aesthetic_weight": 0.5,
        "modality": "image",
        "num_images": 5,
        "num_result_ids": 5,
        **changes,
    }


def knn(client, **changes):
    """Their client tells no type of its body."""
    return client.post("/knn-service", content=json.dumps(asked(**changes)))


def search(client, **changes):
    body = {"index": "one", "k": 5, **changes}
    return client.post("/api/search", json=body).json()["hits"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [({"text": "red circle"}, {"text": "red circle"}), ({"image": PNG}, {"image": PNG})],
)
def test_texts_and_pictures_find_what_our_search_finds(client, theirs, ours):
    found = knn(client, **theirs).json()
    expected = search(client, terms=[ours])
    assert [one["id"] for one in found] == [one["id"] for one in expected]
    scores = [one["score"] for one in expected]
    np.testing.assert_allclose([one["similarity"] for one in found], scores, atol=1e-5)
    assert [one["caption"] for one in found] == [one["caption"] for one in expected]
    assert found[0]["key"] == expected[0]["key"]


def test_an_embedding_may_have_any_length(client, service):
    index = service.indexes["one"].searcher
    vector = index.rows.vectors(np.array([3]))[0]
    found = knn(client, embedding_input=(7 * vector).tolist(), num_images=1).json()
    assert found[0]["id"] == index.ids[3]
    assert found[0]["similarity"] == pytest.approx(1.0, abs=1e-3)


def test_the_url_of_a_hit_is_its_picture(client):
    (first,) = knn(client, text="red", num_images=1, num_result_ids=1).json()
    answer = client.get(first["url"])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/webp"


def test_metadata_come_with_the_first_hits_and_for_others_when_asked(client):
    found = knn(client, text="red", num_images=2, num_result_ids=6).json()
    assert len(found) == 6
    assert [("caption" in one) for one in found] == [True, True, False, False, False, False]
    assert set(found[5]) == {"id", "similarity"}
    ids = [one["id"] for one in found]
    body = json.dumps({"ids": ids, "indice_name": "one"})
    told = client.post("/metadata", content=body).json()
    assert [one["id"] for one in told] == ids
    assert told[1]["metadata"]["caption"] == found[1]["caption"]
    assert "id" not in told[1]["metadata"]
    empty = client.post("/metadata", content=json.dumps({"ids": [], "indice_name": "one"}))
    assert empty.json() == []


def test_as_many_ids_as_may_be_asked_for(client, service):
    """Their web client asks for thousands of ids."""
    found = knn(client, text="red", num_images=2, num_result_ids=3000).json()
    assert len(found) == min(50, service.indexes["one"].searcher.live)


def test_duplicates_are_left_out_and_the_list_stays_full(client, service):
    index = service.indexes["one"].searcher
    found = knn(client, text="red", deduplicate=True, num_images=3, num_result_ids=3).json()
    rows = index.rows.vectors(index.rows.places(np.array([one["id"] for one in found])))
    assert (np.tril(rows @ rows.T, -1) < 0.94).all()


def test_names_and_modalities(client, service):
    assert client.get("/indices-list").json() == ["one", "two", "words"]
    found = knn(client, text="red", modality="text").json()
    expected = search(client, index="words", terms=[{"text": "red"}])
    assert [one["id"] for one in found] == [one["id"] for one in expected]
    answer = knn(client, text="red", indice_name="two", modality="text")
    assert answer.status_code == 400
    assert "holds image embeddings" in answer.json()["error"]
    first = knn(client, text="red", indice_name=None)
    assert first.json() == knn(client, text="red").json()


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, 400, "give one of"),
        ({"text": ""}, 400, "give one of"),
        ({"image_url": "http://127.0.0.1:9/x.png"}, 400, "fetches no URLs"),
        ({"text": "x", "use_mclip": True}, 400, "one text encoder"),
        ({"text": "x" * 5000}, 400, "4000 characters"),
        ({"text": "x", "indice_name": "three"}, 404, "unknown index"),
        ({"text": "x", "num_images": 51}, 400, "at most 50"),
        ({"text": "x", "num_images": 0}, 422, "num_images"),
        ({"text": "x", "num_result_ids": -1}, 422, "num_result_ids"),
        ({"text": "x", "modality": "sound"}, 422, "modality"),
        ({"text": 7}, 422, "text"),
        ({"image": "!!"}, 400, "base64"),
        ({"image": "aGVsbG8="}, 415, "no picture"),
        ({"embedding_input": [1.0, 2.0]}, 400, "vector"),
        ({"embedding_input": [0.0] * 16}, 400, "vector"),
        ({"embedding_input": [1e39] * 16}, 400, "vector"),
        ({"embedding_input": ["x"]}, 422, "embedding_input"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(client, changes, status, said):
    answer = knn(client, **changes)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]
    assert knn(client, text="red").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/knn-service", "{", 400),
        ("/knn-service", "[]", 422),
        ("/knn-service", '{"text":"x","embedding_input":[NaN]}', 422),
        ("/knn-service", "x" * 400_001, 413),
        ("/metadata", "{}", 422),
        ("/metadata", '{"ids":[-1],"indice_name":"one"}', 404),
        ("/metadata", '{"ids":[99999999999999999999],"indice_name":"one"}', 404),
        ("/metadata", json.dumps({"ids": list(range(51)), "indice_name": "one"}), 400),
    ],
)
def test_bodies_that_are_not_read(client, path, body, status):
    answer = client.post(path, content=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}


def test_the_token_is_wanted_here_too(service):
    with TestClient(application(service, token="secret")) as client:
        assert knn(client, text="red").status_code == 401
        assert client.get("/indices-list").status_code == 401
        client.headers["authorization"] = "Bearer secret"
        assert knn(client, text="red").status_code == 200


def test_the_interface_is_documented(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/knn-service", "/metadata", "/indices-list"} <= set(paths)
