import json
import shutil

import numpy as np
import pytest

from eval.embed import EmbeddedRows, write_table
from eval.index.build import build_index
from eval.index.folder import open_index
from eval.search.searcher import Searcher

ROWS, DIM = 400, 16
FACTORIES = {
    "Flat": 1.0,
    "SQ8": 0.95,
    "HNSW16": 0.93,
    "IVF4,Flat": 0.93,
    "OPQ4,IVF4,PQ4x4": 0.42,  # the most that the codes allow is 0.47; one list, 0.39
    "IVF4,PQ8x4fs,Refine(SQ8)": 0.93,
    "RaBitQfs,Refine(SQ8)": 0.93,
}


def make_table(folder, *, rows=ROWS, modalities=("image", "text"), duplicates=False):
    generator = np.random.default_rng(rows)
    images = generator.standard_normal((rows, DIM))
    if duplicates:
        images[:] = images[:1]
    texts = images + 0.5 * generator.standard_normal((rows, DIM))
    vectors = {"image": images.astype(np.float32), "text": texts.astype(np.float32)}
    names = [f"k{row}" for row in range(rows)]
    batch = EmbeddedRows(
        ids=3 * np.arange(rows) + 5,  # sample ids are not row numbers
        keys=names,
        captions=[f"caption of {name}" for name in names],
        shards=["a.tar"] * rows,
        embeddings={name: vectors[name] for name in modalities},
        fields=[{"parity": row % 2} for row in range(rows)],
    )
    return write_table(
        folder,
        lambda _start: [batch],
        modalities=modalities,
        dim=DIM,
        fingerprints={"model": "m", "data": "d"},
        rows_per_part=150,
        origin={"data": "shards/x"},
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_table(tmp_path_factory.mktemp("data") / "table")


@pytest.fixture(scope="module", params=FACTORIES)
def folder(request, table, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "index"
    build_index(table, out, factory=request.param)
    return out


@pytest.fixture(scope="module")
def flat(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "flat"
    build_index(table, out)
    return out


def exact(table, queries, k):
    """Sample ids and scores of the best rows, in float64."""
    scores = queries.astype(np.float64) @ table.vectors("image").astype(np.float64).T
    rows = np.argsort(-scores, axis=1)[:, :k]
    return 3 * rows + 5, np.take_along_axis(scores, rows, axis=1)


def test_every_kind_meets_its_floor_on_text_queries(table, folder):
    searcher = Searcher(folder)
    queries = table.vectors("text")[::4]
    found = searcher.neighbours(queries, 10)
    best, _ = exact(table, queries, 10)
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(found.ids, best, strict=True)]
    floor = FACTORIES[searcher.card.factory]
    assert np.mean(shared) >= floor
    recall = searcher.card.reached_by("text").at_10
    assert recall.low <= recall.value <= recall.high
    assert recall.value == pytest.approx(np.mean(shared), abs=0.06)  # other texts of the same table
    assert [one.queries for one in searcher.card.reached] == ["text", "image", "fused"]


def test_every_kind_gives_full_lists_without_repeats(table, folder):
    searcher = Searcher(folder)
    queries = table.vectors("text")[:6]
    everything = searcher.neighbours(queries, ROWS + 50)
    assert everything.ids.shape == (6, ROWS)
    assert all(sorted(ids) == sorted(searcher.ids) for ids in everything.ids)
    assert (np.diff(everything.scores, axis=1) <= 1e-6).all()
    exclude = [
        everything.ids[0, :200].tolist(),
        [],
        [5, 8, 999_999],
        {8},
        everything.ids[4],
        [5, 5],
    ]
    found = searcher.neighbours(queries, 30, exclude=exclude)
    for ids, banned in zip(found.ids, exclude, strict=True):
        assert not set(ids) & set(banned)
    full = (found.ids >= 0).sum(axis=1)
    assert full.tolist() == [30, 30, 30, 30, 0, 30]
    assert np.isneginf(found.scores[4]).all()


def test_every_kind_is_the_same_after_opening_again(table, folder):
    queries = table.vectors("text")[:20]
    one, other = Searcher(folder), Searcher(folder, check="sizes")
    here, there = one.neighbours(queries, 7), other.neighbours(queries, 7)
    assert np.array_equal(here.ids, there.ids)
    assert np.array_equal(here.scores, there.scores)


def test_flat_is_exact_and_brings_metadata(table, flat):
    searcher = Searcher(flat)
    queries = 7 * table.vectors("text")[:30]  # of any length
    hits = searcher.search(queries, 5)
    ids, scores = exact(table, table.vectors("text")[:30], 5)
    assert np.array_equal(hits.ids, ids)
    assert np.allclose(hits.scores, scores, atol=1e-5)
    row = (int(ids[3, 0]) - 5) // 3
    assert hits.rows[3][0] == {
        "id": ids[3, 0],
        "key": f"k{row}",
        "caption": f"caption of k{row}",
        "shard": "a.tar",
        "parity": row % 2,
    }
    assert [[hit["id"] for hit in hits_of] for hits_of in hits.rows] == ids.tolist()
    assert searcher.metadata(np.array([8, 5]))[0]["key"] == "k1"
    with pytest.raises(ValueError, match="holds no sample with id 6"):
        searcher.metadata(np.array([5, 6]))


def test_the_card_says_what_is_there(table, flat):
    card = open_index(flat).card
    assert (card.factory, card.modality, card.rows, card.dim) == ("Flat", "image", ROWS, DIM)
    assert card.reached[0].at_10.value == card.reached[0].at_10.low == 1.0
    assert card.reached[0].at_10.count == ROWS // 2  # the other half was for tuning
    assert (card.tuned_for, card.target_recall, card.knobs) == ("text", 0.95, "")
    assert card.bytes_per_vector == pytest.approx(4 * DIM, abs=1)
    assert card.fingerprints == {"model": "m"}
    assert card.origin == {"data": "shards/x"}
    json.loads((flat / "index.json").read_text())


def test_recall_is_asked_with_images_where_there_are_no_texts(tmp_path):
    table = make_table(tmp_path / "table", modalities=("image",))
    for factory, knobs, least, most in (
        ("HNSW16", "efSearch=400", 1.0, 1.0),
        ("IVF8,Flat", "nprobe=1", 0.1, 0.9),
    ):
        out = tmp_path / "index"
        card = build_index(table, out, factory=factory, knobs=knobs, query_count=100)
        assert card.reached[0].queries == "image"
        assert least <= card.reached[0].at_10.value <= most
        assert card.reached[0].at_10.count == 100
    opened = open_index(tmp_path / "index").index
    vectors = table.vectors("image")
    generator = np.random.default_rng(0)
    generator.choice(ROWS, size=ROWS, replace=False)  # the draw for training comes first
    asked = np.sort(generator.choice(ROWS, size=100, replace=False))
    found = opened.search(vectors[asked], 11)[1]
    best = np.argsort(-(vectors[asked] @ vectors.T), axis=1)
    shares = []
    for row, listed, order in zip(asked, found, best, strict=True):
        others = [some for some in listed if some not in (row, -1)][:10]
        shares.append(len(set(others) & set(order[order != row][:10])) / 10)
    assert card.reached[0].at_10.value == pytest.approx(np.mean(shares), abs=1e-9)


def test_knobs_are_kept_and_raise_recall(table, tmp_path):
    one = build_index(table, tmp_path / "one", factory="IVF8,Flat", knobs="nprobe=1")
    assert one.tuned_for is one.target_recall is None
    all_lists = build_index(table, tmp_path / "all", factory="IVF8,Flat", knobs="nprobe=8")
    assert all_lists.reached[0].at_10.value == 1.0 > one.reached[0].at_10.value
    queries = table.vectors("text")[:50]
    found = Searcher(tmp_path / "all").neighbours(queries, 5)
    assert np.array_equal(found.ids, exact(table, queries, 5)[0])


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("modalities", [("image",), ("image", "text")])
def test_tiny_tables_can_be_indexed(tmp_path, rows, modalities):
    table = make_table(tmp_path / "table", rows=rows, modalities=modalities)
    assert build_index(table, tmp_path / "index").reached[0].at_10.value == 1.0
    found = Searcher(tmp_path / "index").search(table.vectors("image"), 10)
    assert found.ids.shape == (rows, rows)
    assert found.ids[:, 0].tolist() == [3 * row + 5 for row in range(rows)]


def test_equal_vectors_count_for_each_other(tmp_path):
    table = make_table(tmp_path / "table", rows=60, duplicates=True)
    card = build_index(table, tmp_path / "index", factory="HNSW8")
    assert card.reached[0].at_10.value == 1.0
    found = Searcher(tmp_path / "index").neighbours(table.vectors("image")[:3], 60)
    assert all(len(set(ids)) == 60 for ids in found.ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"factory": "Nope"},
            "index factory 'Nope': FAISS says: could not parse index string Nope",
        ),
        ({"factory": ""}, "index factory '': FAISS says: could not parse"),
        ({"factory": "PQ7"}, "index factory 'PQ7': FAISS says: The dimension of the vector"),
        ({"factory": "IVF999,Flat"}, "FAISS says: Number of training points .400. should be"),
        ({"factory": "IVF8,Flat", "train_rows": 7}, "Number of training points .7. should be"),
        ({"factory": "IDMap,Flat"}, "FAISS type IndexIDMap: FAISS says: add does not make"),
        ({"knobs": "nprobe=3"}, "index knobs 'nprobe=3': FAISS says"),
        ({"modality": "sound"}, "holds no sound embeddings, only image and text"),
        ({"train_rows": 0}, "train_rows 0"),
        ({"query_count": 0}, "query_count 0"),
        ({"target_recall": 0.0}, "target_recall 0.0 must be above 0 and at most 1"),
        ({"target_recall": 1.5}, "target_recall 1.5 must be above 0 and at most 1"),
        ({"queries": "sound"}, "'sound': .* only queries of text and image and fused"),
        ({"factory": "SQ8", "max_bytes": 5000}, "'SQ8': 6,... bytes for 400 rows of 16, but max_b"),
        ({"max_bytes": 100}, "max_bytes 100: 400 rows of 16 take at least .* [(]"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(table, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_index(table, tmp_path / "index", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_other_peoples_folders_are_left_alone(table, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than an index"):
        build_index(table, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damage_is_found_on_opening(flat, table, tmp_path):
    out = tmp_path / "index"
    shutil.copytree(flat, out)
    sound = (out / "index.faiss").read_bytes()
    (out / "index.faiss").write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"index.faiss: changed since"):
        open_index(out)
    (out / "index.faiss").write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ValueError, match=r"index.faiss: FAISS says: "):
        open_index(out, check="sizes")
    build_index(make_table(tmp_path / "small", rows=7), tmp_path / "other")
    shutil.copy(tmp_path / "other/index.faiss", out / "index.faiss")
    with pytest.raises(ValueError, match=r"holds 7 vectors of 16, index.json says 400 of 16"):
        open_index(out, check="sizes")
    (out / "index.faiss").write_bytes(sound)
    (out / "metadata/metadata_0.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata_0.parquet: this file .* is missing"):
        open_index(out)
    (out / "index.json").write_text('{"version": 1, "rows": 4}')
    with pytest.raises(ValueError, match=r"index.json: not readable"):
        open_index(out)
    with pytest.raises(FileNotFoundError, match="not an index"):
        open_index(tmp_path / "nowhere")


def test_bad_queries_are_refused(table, flat):
    searcher = Searcher(flat)
    queries = table.vectors("text")[:3]
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        searcher.search(queries, 0)
    with pytest.raises(ValueError, match="queries are 15 wide, but the index holds vectors of 16"):
        searcher.search(queries[:, :15], 3)
    with pytest.raises(ValueError, match="exclude: 1 entries for 3 queries"):
        searcher.search(queries, 3, exclude=[[1]])
    with pytest.raises(ValueError, match=r"query embeddings: 1 of 3 rows hold NaN .*: rows 1"):
        searcher.search(queries + np.array([[0], [np.nan], [0]]), 3)
    nothing = searcher.search(queries[:0], 3)
    assert nothing.ids.shape == (0, 3)
    assert nothing.rows == []
