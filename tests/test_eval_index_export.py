import datetime
import json
import re

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from qdrant_client import QdrantClient, models

from eval.embed import EmbeddedRows, write_table
from eval.index import qdrant
from eval.index.build import build_index
from eval.index.change import append, remove
from eval.index.export import (
    EXPORTS,
    export_clip_retrieval,
    export_parquet,
    plain_names,
    plain_type,
)
from eval.search.searcher import Searcher

ROWS, DIM = 300, 16


def make_table(folder, *, seed=0, rows=ROWS, data="d", rows_per_part=30):
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((rows, DIM)).astype(np.float32)
    batch = EmbeddedRows(
        ids=2 * np.arange(rows) + 1,
        keys=[f"k{row}" for row in range(rows)],
        captions=[None if row % 7 == 0 else f"caption {row}" for row in range(rows)],
        shards=["a.tar"] * rows,
        embeddings={"image": images},
        fields=[
            {"exif": {"year": 2000 + row % 9}, "vendor": "abc"[row % 3], "tags": ["x", str(row)]}
            for row in range(rows)
        ],
    )
    return write_table(
        folder,
        lambda _start: [batch],
        modalities=("image",),
        dim=DIM,
        fingerprints={"model": "m", "data": data},
        rows_per_part=rows_per_part,
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index of two tables, without some rows."""
    root = tmp_path_factory.mktemp("export")
    build_index(make_table(root / "one"), root / "index", factory="Flat", query_count=20)
    append(root / "index", make_table(root / "two", seed=1, rows=40, data="e"))
    gone = Searcher(root / "index").ids[[0, 5, 301]]
    remove(root / "index", gone.tolist())
    return root / "index"


@pytest.fixture(scope="module")
def rows(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("parquet") / "rows"
    (line,) = export_parquet(index, out)
    assert "337 rows" in line
    return out


def test_parquet_holds_the_rows_that_are_left(index, rows):
    searcher = Searcher(index)
    table = parquet.read_table(rows / "rows")
    assert table.schema.field("id").type == pa.int64()
    assert table.schema.field("vector").type.list_size == DIM
    gone = searcher.ids[[0, 5, 301]]
    left = searcher.ids[~np.isin(searcher.ids, gone)]
    np.testing.assert_array_equal(table["id"].to_numpy(), left)
    vectors = np.stack(table["vector"].to_pylist())
    np.testing.assert_allclose(
        vectors, searcher.rows.vectors(searcher.rows.places(left)), atol=1e-6
    )
    expected = searcher.metadata(left[[7, 330]])
    for ours, row in zip(expected, table.take([7, 330]).to_pylist(), strict=True):
        assert (row["caption"], row["vendor"]) == (ours["caption"], ours["vendor"])
        assert row["exif_year"] == ours["exif.year"]
        assert json.loads(row["tags"]) == ours["tags"]
    names = json.loads((rows / "columns.json").read_text())
    assert names["exif.year"] == "exif_year"


def test_files_and_groups_have_their_size(index, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.index.export.FILE_ROWS", 100)
    monkeypatch.setattr("eval.index.export.GROUP_ROWS", 40)
    export_parquet(index, tmp_path / "rows")
    files = sorted((tmp_path / "rows" / "rows").glob("*.parquet"))
    assert [parquet.read_metadata(path).num_rows for path in files] == [100, 100, 100, 37]
    first = parquet.read_metadata(files[0])
    assert [first.row_group(n).num_rows for n in range(first.num_row_groups)] == [40, 40, 20]
    ids = np.concatenate([parquet.read_table(path)["id"].to_numpy() for path in files])
    assert (np.diff(ids) > 0).all()
    assert len(ids) == 337


@pytest.fixture(scope="module")
def collection(rows):
    client = QdrantClient(":memory:")
    assert qdrant.load(rows, client, "rows") == 337
    yield client
    client.close()


def queries():
    return np.random.default_rng(5).standard_normal((6, DIM)).astype(np.float32)


def test_qdrant_answers_as_the_index_does(index, collection):
    vectors = queries() / np.linalg.norm(queries(), axis=1, keepdims=True)
    ours = Searcher(index).search(vectors, 10)
    for query, vector in enumerate(vectors):
        found = collection.query_points("rows", query=vector.tolist(), limit=10).points
        assert [point.id for point in found] == ours.ids[query].tolist()
        np.testing.assert_allclose([point.score for point in found], ours.scores[query], atol=1e-5)
        captions = [point.payload.get("caption") for point in found]
        assert captions == [row["caption"] for row in ours.rows[query]]


def test_qdrant_filters_as_the_index_does(index, collection):
    vectors = queries() / np.linalg.norm(queries(), axis=1, keepdims=True)
    where = "vendor = 'b' AND \"exif.year\" >= 2004"
    ours = Searcher(index).search(vectors, 10, where=where)
    match = models.FieldCondition(key="vendor", match=models.MatchValue(value="b"))
    years = models.FieldCondition(key="exif_year", range=models.Range(gte=2004))
    for query, vector in enumerate(vectors):
        found = collection.query_points(
            "rows",
            query=vector.tolist(),
            limit=10,
            query_filter=models.Filter(must=[match, years]),
        ).points
        assert [point.id for point in found] == ours.ids[query].tolist()


def test_qdrant_refuses_a_collection_that_exists_and_a_folder_without_rows(collection, rows):
    with pytest.raises(ValueError, match="exists"):
        qdrant.load(rows, collection, "rows")
    with pytest.raises(FileNotFoundError, match="no rows/"):
        qdrant.load(rows.parent, collection, "others")


def test_duckdb_answers_as_the_readme_says(index, rows):
    (sql,) = re.findall(r"SELECT .*?;", (rows / "README.md").read_text(), re.DOTALL)
    vector = queries()[0] / np.linalg.norm(queries()[0])
    with duckdb.connect() as connection:
        answer = connection.execute(sql, {"query": vector.tolist()})
        names = [one[0] for one in answer.description]
        found = [dict(zip(names, row, strict=True)) for row in answer.fetchall()]
    ours = Searcher(index).search(vector[None], 10)
    assert [row["id"] for row in found] == ours.ids[0].tolist()
    np.testing.assert_allclose([row["score"] for row in found], ours.scores[0], atol=1e-5)


def test_names_that_every_engine_takes():
    given = ["exif.year", "exif_year", "Exif_Year", "größe", "_x", "9", "id", "vector", "a b"]
    names = plain_names(given)
    assert names["exif.year"] == "exif_year"
    assert names["exif_year"] == "exif_year_2"
    assert all(re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) for name in names.values())
    assert len({name.lower() for name in names.values()} | {"id", "vector"}) == len(given) + 2


def test_types_that_every_engine_takes(tmp_path):
    day = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    fields = [
        {"flag": True, "small": 1.5, "when": day, "nested": [{"a": 1}], "blob": b"\xff"},
        {"flag": None, "small": None, "when": None, "nested": None, "blob": None},
    ]
    batch = EmbeddedRows(
        ids=np.arange(2),
        keys=["a", "b"],
        captions=["x", "y"],
        shards=["s", "s"],
        embeddings={"image": np.eye(2, DIM, dtype=np.float32)},
        fields=fields,
    )
    table = write_table(
        tmp_path / "table",
        lambda _start: [batch],
        modalities=("image",),
        dim=DIM,
        fingerprints={"model": "m", "data": "d"},
    )
    build_index(table, tmp_path / "index", factory="Flat")
    export_parquet(tmp_path / "index", tmp_path / "out")
    rows = parquet.read_table(tmp_path / "out/rows").to_pylist()
    assert rows[0]["flag"] is True
    assert rows[0]["small"] == 1.5
    assert rows[0]["when"].startswith("2020-01-02T03:04:05")
    assert json.loads(rows[0]["nested"]) == [{"a": 1}]
    assert isinstance(rows[0]["blob"], str)
    assert all(rows[1][name] is None for name in fields[1])
    assert plain_type(pa.uint64()) == pa.float64()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An index of many parts: their names sort otherwise as text than as numbers."""
    root = tmp_path_factory.mktemp("whole")
    table = make_table(root / "table", rows=330)
    build_index(table, root / "index", factory="HNSW8,SQ8", query_count=20)
    return root / "index"


def test_clip_retrieval_reads_the_rows_in_their_order(whole, tmp_path):
    """As its backend does: files by name, rows by place, hits with their decoded vectors."""
    out = tmp_path / "peer"
    export_clip_retrieval(whole, out)
    theirs = faiss.read_index(str(out / "image.index"))
    knobs = Searcher(whole).card.knobs
    hnsw = faiss.downcast_index(theirs).hnsw  # pyright: ignore
    assert knobs == f"efSearch={hnsw.efSearch}"
    paths = sorted((out / "metadata").glob("*.parquet"))
    assert len(paths) > 10
    metadata = [row for path in paths for row in parquet.read_table(path).to_pylist()]
    vectors = np.concatenate([np.load(path) for path in sorted((out / "img_emb").glob("*.npy"))])
    assert len(metadata) == len(vectors) == theirs.ntotal == 330
    query = vectors[[123, 329]].astype(np.float32)
    _, rows, decoded = theirs.search_and_reconstruct(query, 3)
    ours = Searcher(whole).search(query, 3)
    for query_rows, expected in zip(rows, ours.rows, strict=True):
        assert [metadata[row]["key"] for row in query_rows] == [row["key"] for row in expected]
    np.testing.assert_allclose(decoded[0, 0], vectors[123], atol=0.03)
    assert json.loads((out / "indices_paths.json").read_text()) == {"peer": str(out)}
    assert '"caption"' in (out / "README.md").read_text()


def test_what_we_export_is_adopted_again(whole, tmp_path):
    from eval.index.peers import adopt

    export_clip_retrieval(whole, tmp_path / "peer")
    card = adopt(tmp_path / "peer", tmp_path / "again", query_count=20)
    assert (card.rows, card.factory, card.knobs) == (
        330, "HNSW8,SQ8", Searcher(whole).card.knobs,
    )  # fmt: skip
    found = Searcher(tmp_path / "again").search(queries(), 5)
    ours = Searcher(whole).search(queries(), 5)
    keys = [[row["key"] for row in rows] for rows in found.rows]
    assert keys == [[row["key"] for row in rows] for rows in ours.rows]


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("RaBitQ", "FAISS 1.8 does not know IndexRaBitQ .*another factory"),
        ("IVF4,RaBitQfs,Refine(SQ8)", "another factory"),
        ("IVF4,PQ8x4fs", "cannot give back"),
    ],
)
def test_kinds_that_clip_retrieval_cannot_open(tmp_path, factory, said):
    build_index(make_table(tmp_path / "t"), tmp_path / "index", factory=factory, query_count=20)
    with pytest.raises(ValueError, match=said) as caught:
        export_clip_retrieval(tmp_path / "index", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_removed_rows_are_not_given_to_an_index_that_would_find_them(index, tmp_path):
    with pytest.raises(ValueError, match="compact"):
        export_clip_retrieval(index, tmp_path / "out")


@pytest.mark.parametrize("name", EXPORTS)
def test_a_folder_that_is_taken(name, index, tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(ValueError, match="choose a new folder"):
        EXPORTS[name](index, tmp_path)
    with pytest.raises(FileNotFoundError, match="not an index"):
        EXPORTS[name](tmp_path / "none", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
