import json
import shutil

import faiss
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from eval.index.build import build_index
from eval.index.change import compact, remove
from eval.index.describe import describe
from eval.index.folder import open_index
from eval.index.peers import adopt, adopt_table, kind_of
from eval.search.searcher import Searcher

ROWS, DIM = 130, 16


def rows_of(count, *, seed=0):
    """Unit-length pictures in clusters, and texts near them."""
    generator = np.random.default_rng(seed)
    images = 2 * generator.standard_normal((8, DIM))[generator.integers(8, size=count)]
    images += generator.standard_normal((count, DIM))
    texts = images + 0.3 * generator.standard_normal((count, DIM))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return {"img_emb": images.astype(np.float32), "text_emb": texts.astype(np.float32)}


def write_peer(folder, *, parts=3, dtype=np.float16, rows=ROWS):
    """A folder as clip-retrieval's inference writes it, with its names and columns."""
    vectors = rows_of(rows)
    digits = len(str(parts))
    for number, chosen in enumerate(np.array_split(np.arange(rows), parts)):
        name = str(number).zfill(digits)
        for kind, array in vectors.items():
            path = folder / kind / f"{kind}_{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array[chosen].astype(dtype))
        path = folder / "metadata" / f"metadata_{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "image_path": [f"{row:06d}.jpg" for row in chosen],
            "caption": [f"caption {row}" for row in chosen],
            "width": pa.array(chosen),
            "exif.make": pa.array([f"m{row % 2}" for row in chosen]).dictionary_encode(),
            "id": pa.array(-chosen),  # numbers something of theirs
            "__index_level_0__": pa.array(chosen),
        }
        parquet.write_table(pa.table(columns), path)
    return vectors


def write_index(path, vectors, factory="HNSW8", knobs=""):
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.ParameterSpace().set_index_parameters(index, knobs)
    faiss.write_index(index, str(path))
    return index


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """Embeddings and indexes as clip-retrieval lays them out."""
    root = tmp_path_factory.mktemp("peer")
    vectors = write_peer(root / "emb")
    (root / "index").mkdir()
    (root / "index" / "metadata").symlink_to(root / "emb" / "metadata")
    half = {kind: array.astype(np.float16).astype(np.float32) for kind, array in vectors.items()}
    write_index(root / "index" / "image.index", half["img_emb"])
    write_index(root / "index" / "text.index", half["text_emb"], "Flat")
    said = {"index_key": "HNSW8", "index_param": "efSearch=77", "nb vectors": ROWS}
    (root / "index" / "image.json").write_text(json.dumps(said))
    return root, half


def test_their_embeddings_become_a_table(peer, tmp_path):
    root, vectors = peer
    table = adopt_table(root / "emb", tmp_path / "table", model_fingerprint="m")
    assert (table.rows, table.card.dim, table.card.dtype) == (ROWS, DIM, "float16")
    np.testing.assert_allclose(table.vectors("image"), vectors["img_emb"], atol=1e-3)
    np.testing.assert_allclose(table.vectors("text"), vectors["text_emb"], atol=1e-3)
    rows = table.metadata().to_pylist()
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert rows[77] == {
        "id": 77, "key": "000077.jpg", "caption": "caption 77", "shard": None,
        "image_path": "000077.jpg", "width": 77, "exif.make": "m1",
    }  # fmt: skip
    build_index(table, tmp_path / "index", factory="Flat", query_count=10)
    found = Searcher(tmp_path / "index").search(vectors["img_emb"][[100]], 1)
    assert found.rows[0][0]["caption"] == "caption 100"


def test_their_index_answers_as_it_did_there(peer, tmp_path):
    root, vectors = peer
    card = adopt(
        root / "index", tmp_path / "index", embeddings=root / "emb", origin={"model": "place"}
    )
    assert (card.factory, card.knobs, card.tuned_for) == ("HNSW8", "efSearch=77", None)
    assert {one.queries for one in card.reached} == {"text", "image", "fused"}
    assert card.reached_by("text").at_10.value > 0.9
    theirs = faiss.read_index(str(root / "index" / "image.index"))
    faiss.ParameterSpace().set_index_parameters(theirs, "efSearch=77")
    scores, rows = theirs.search(vectors["text_emb"], 5)
    found = Searcher(tmp_path / "index").search(vectors["text_emb"], 5)
    np.testing.assert_array_equal(found.ids, rows)
    np.testing.assert_allclose(found.scores, scores, atol=1e-3)
    assert found.rows[3][0]["caption"] == f"caption {rows[3, 0]}"
    assert found.rows[3][0]["width"] == rows[3, 0]
    assert card.origin["model"] == "place"


def test_what_was_adopted_can_be_changed(peer, tmp_path):
    root, vectors = peer
    adopt(root / "index", tmp_path / "index", embeddings=root / "emb")
    remove(tmp_path / "index", [100])
    card = compact(tmp_path / "index")
    assert (card.rows, card.removed, card.factory) == (ROWS - 1, 0, "HNSW8")
    assert {one.queries for one in card.reached} == {"text", "image", "fused"}
    assert card.reached_by("text").at_10.count > 0
    found = Searcher(tmp_path / "index").search(vectors["img_emb"][[99, 101]], 1)
    assert [rows[0]["caption"] for rows in found.rows] == ["caption 99", "caption 101"]


def test_the_text_index_of_the_same_folder(peer, tmp_path):
    root, vectors = peer
    card = adopt(root / "index", tmp_path / "index", modality="text", embeddings=root / "emb")
    assert (card.modality, card.factory) == ("text", "Flat")
    found = Searcher(tmp_path / "index").neighbours(vectors["text_emb"], 1)
    np.testing.assert_array_equal(found.ids[:, 0], np.arange(ROWS))


def test_knobs_are_tuned_anew_where_a_recall_is_asked_for(peer, tmp_path):
    root, _ = peer
    card = adopt(root / "index", tmp_path / "index", embeddings=root / "emb", target_recall=0.5)
    assert card.tuned_for == "text"
    assert card.target_recall == 0.5
    assert card.knobs != "efSearch=77"


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "RR16,IVF2,SQ8"])
def test_an_index_without_embeddings_gives_its_own_vectors(peer, tmp_path, factory):
    _, vectors = peer
    (tmp_path / "peer").mkdir()
    index = write_index(tmp_path / "peer" / "knn.index", vectors["img_emb"], factory, "")
    card = adopt(tmp_path / "peer", tmp_path / "index")
    assert card.origin["decoded"] is True
    assert "vectors that this index decodes" in describe(card)[-1]
    assert [one.queries for one in card.reached] == ["image"]
    opened = open_index(tmp_path / "index")
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        ivf.make_direct_map()
        assert card.knobs == ("nprobe=1" if factory.startswith("IVF") else card.knobs)
    decoded = index.reconstruct_n(0, ROWS)
    decoded /= np.linalg.norm(decoded, axis=1, keepdims=True)
    np.testing.assert_allclose(opened.rows.vectors(np.arange(ROWS)), decoded, atol=1e-3)
    found = Searcher(tmp_path / "index").search(vectors["img_emb"][:3], ROWS)
    assert sorted(found.ids[0].tolist()) == list(range(ROWS))
    assert found.rows[0][0]["key"] == str(found.ids[0, 0])
    assert not list((tmp_path / "index").glob("**/*.npy.writing"))
    assert not (tmp_path / "index" / "table").exists()


@pytest.mark.parametrize("with_embeddings", [True, False])
def test_an_index_on_disk(peer, tmp_path, with_embeddings):
    from faiss.contrib.ondisk import merge_ondisk

    root, vectors = peer
    place = tmp_path / "peer" / "image.index"
    place.mkdir(parents=True)
    index = faiss.index_factory(DIM, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors["img_emb"])
    empty = faiss.clone_index(index)
    index.add(vectors["img_emb"])
    faiss.write_index(index, str(tmp_path / "part"))
    merge_ondisk(empty, [str(tmp_path / "part")], str(place / "merged_index.ivfdata"))
    faiss.ParameterSpace().set_index_parameters(empty, "nprobe=4")
    faiss.write_index(empty, str(place / "populated.index"))
    del empty
    emb = root / "emb" if with_embeddings else None
    card = adopt(tmp_path / "peer", tmp_path / "index", embeddings=emb)
    assert (card.lists_file, card.knobs) == ("lists.ivfdata", "nprobe=4")
    (tmp_path / "index").rename(tmp_path / "moved")
    for path in place.iterdir():
        path.unlink()
    opened = open_index(tmp_path / "moved")
    np.testing.assert_allclose(
        opened.rows.vectors(np.array([7, 99])), vectors["img_emb"][[7, 99]], atol=1e-3
    )
    found = Searcher(tmp_path / "moved").neighbours(vectors["img_emb"], 1)
    np.testing.assert_array_equal(found.ids[:, 0], np.arange(ROWS))


def test_arrow_metadata_and_one_file_for_several_parts(tmp_path):
    folder = tmp_path / "emb"
    write_peer(folder, parts=3)
    whole = pa.concat_tables(
        parquet.read_table(path, columns=["caption", "width"])
        for path in sorted((folder / "metadata").iterdir())
    )
    for path in (folder / "metadata").iterdir():
        path.unlink()
    place = str(folder / "metadata" / "0.arrow")
    with pa.OSFile(place, "wb") as file, pa.ipc.new_file(file, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=17)
    table = adopt_table(folder, tmp_path / "table")
    assert [row["width"] for row in table.metadata().to_pylist()] == list(range(ROWS))
    assert [part.rows for part in table.card.parts] == [44, 43, 43]


def test_the_same_embeddings_may_be_taken_again(peer, tmp_path):
    root, _ = peer
    first = adopt_table(root / "emb", tmp_path / "table")
    again = adopt_table(root / "emb", tmp_path / "table", model_fingerprint="m")
    assert again.card.fingerprints == {**first.card.fingerprints, "model": "m"}
    with pytest.raises(ValueError, match="choose"):
        adopt_table(root / "emb" / "img_emb", tmp_path / "table")


def test_links_to_files_elsewhere(peer, tmp_path):
    """What is adopted stands alone, also where the peer's files were symbolic links."""
    root, vectors = peer
    write_peer(tmp_path / "real")
    for path in sorted((tmp_path / "real").rglob("*_*.*")):
        place = tmp_path / "emb" / path.relative_to(tmp_path / "real")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    (tmp_path / "emb" / "image.index").symlink_to(root / "index" / "image.index")
    adopt(tmp_path / "emb", tmp_path / "index")
    shutil.rmtree(tmp_path / "real")
    shutil.rmtree(tmp_path / "emb")
    assert not any(path.is_symlink() for path in (tmp_path / "index").rglob("*"))
    found = Searcher(tmp_path / "index").search(vectors["img_emb"][[100]], 1)
    assert found.rows[0][0]["caption"] == "caption 100"


def test_what_their_folders_are(peer, tmp_path):
    root, _ = peer
    assert kind_of(root / "emb") == "embeddings"
    assert kind_of(root / "emb" / "img_emb") == "embeddings"
    assert kind_of(root / "index") == "index"
    assert kind_of(tmp_path) is None
    adopt_table(root / "emb", tmp_path / "table")
    assert kind_of(tmp_path / "table") is None


def test_autofaiss_embeddings_have_no_folders_and_no_metadata(peer, tmp_path):
    root, vectors = peer
    table = adopt_table(root / "emb" / "text_emb", tmp_path / "table", modality="text")
    assert table.card.modalities == ("text",)
    np.testing.assert_allclose(table.vectors("text"), vectors["text_emb"], atol=1e-3)
    assert table.metadata().to_pylist()[5] == {
        "id": 5, "key": "5", "caption": None, "shard": None,
    }  # fmt: skip


def damage_one_row_less(folder):
    path = sorted((folder / "metadata").iterdir())[1]
    parquet.write_table(parquet.read_table(path).slice(1), path)


def damage_slipped(folder):
    paths = sorted((folder / "metadata").iterdir())
    first, second = (parquet.read_table(path) for path in paths[:2])
    parquet.write_table(pa.concat_tables([first, second.slice(0, 1)]), paths[0])
    parquet.write_table(second.slice(1), paths[1])


def damage_other_number(folder):
    paths = sorted((folder / "metadata").iterdir())
    paths[-1].rename(paths[-1].with_name("metadata_7.parquet"))


def damage_pickled(folder):
    np.save(
        folder / "img_emb" / "img_emb_1.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True
    )


def damage_wide(folder):
    np.save(folder / "img_emb" / "img_emb_1.npy", np.ones((43, DIM), np.float64))


def damage_cut(folder):
    path = folder / "img_emb" / "img_emb_1.npy"
    path.write_bytes(path.read_bytes()[:-9])


def damage_not_finite(folder):
    path = folder / "img_emb" / "img_emb_1.npy"
    rows = np.load(path)
    rows[7, 3] = np.nan
    np.save(path, rows)


def damage_hdf5(folder):
    for path in (folder / "metadata").iterdir():
        path.unlink()
    (folder / "metadata.hdf5").write_bytes(b"x")


def damage_parquet(folder):
    path = sorted((folder / "metadata").iterdir())[1]
    path.write_bytes(path.read_bytes()[:50])


def damage_texts_fewer(folder):
    (folder / "text_emb" / "text_emb_2.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_one_row_less, "129 rows, but 130 vectors"),
        (damage_slipped, "45 rows beside 44 of img_emb_0.npy"),
        (damage_other_number, "metadata_7.parquet: 43 rows beside 43 of img_emb_2.npy"),
        (damage_pickled, "img_emb_1.npy: not a plain array"),
        (damage_wide, "img_emb_1.npy: float64"),
        (damage_cut, "img_emb_1.npy: not a plain array"),
        (damage_not_finite, r"img_emb_1.npy embeddings: 1 of 43 rows hold NaN .* rows 7"),
        (damage_hdf5, "HDF5 are not read"),
        (damage_parquet, "metadata_1.parquet: not readable"),
        (damage_texts_fewer, "text_emb: 87 rows of 16 in 2 files"),
    ],
)
def test_damaged_embeddings_are_refused_in_one_line(tmp_path, damage, said):
    write_peer(tmp_path / "emb")
    damage(tmp_path / "emb")
    with pytest.raises(ValueError, match=said) as caught:
        adopt_table(tmp_path / "emb", tmp_path / "table")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "table").exists()


def other_count(folder, vectors):
    write_index(folder / "image.index", vectors[:-1], "Flat")
    return "129 vectors, but 130 rows"


def other_order(folder, vectors):
    write_index(folder / "image.index", vectors[::-1].copy(), "Flat")
    return "another order"


def distances(folder, vectors):
    index = faiss.IndexFlatL2(DIM)
    index.add(vectors)
    faiss.write_index(index, str(folder / "image.index"))
    return "no cosines"


def own_numbers(folder, vectors):
    index = faiss.IndexIDMap(faiss.IndexFlatIP(DIM))
    index.add_with_ids(vectors, np.arange(ROWS) + 7)
    faiss.write_index(index, str(folder / "image.index"))
    return "numbers its vectors itself"


def broken(folder, vectors):
    write_index(folder / "image.index", vectors, "Flat")
    path = folder / "image.index"
    path.write_bytes(path.read_bytes()[:100])
    return "FAISS says"


@pytest.mark.parametrize("made", [other_count, other_order, distances, own_numbers, broken])
def test_an_index_that_does_not_belong_is_refused(peer, tmp_path, made):
    root, vectors = peer
    (tmp_path / "peer").mkdir()
    said = made(tmp_path / "peer", vectors["img_emb"])
    with pytest.raises(ValueError, match=said) as caught:
        adopt(tmp_path / "peer", tmp_path / "index", embeddings=root / "emb")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "index").exists()


def test_rows_that_are_not_of_unit_length(peer, tmp_path):
    _, vectors = peer
    (tmp_path / "emb" / "img_emb").mkdir(parents=True)
    (tmp_path / "peer").mkdir()
    long = 3 * vectors["img_emb"]
    np.save(tmp_path / "emb" / "img_emb" / "img_emb_0.npy", long)
    table = adopt_table(tmp_path / "emb", tmp_path / "table")
    np.testing.assert_allclose(table.vectors("image"), vectors["img_emb"], atol=1e-3)
    write_index(tmp_path / "peer" / "image.index", long, "Flat")
    with pytest.raises(ValueError, match="no cosines"):
        adopt(tmp_path / "peer", tmp_path / "index", embeddings=tmp_path / "emb")
    with pytest.raises(ValueError, match="no cosines"):
        adopt(tmp_path / "peer", tmp_path / "index")


def test_a_missing_index_and_a_folder_that_is_taken(peer, tmp_path):
    root, _ = peer
    with pytest.raises(FileNotFoundError, match="no image index"):
        adopt(root / "emb", tmp_path / "index")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    with pytest.raises(ValueError, match="choose"):
        adopt(root / "index", tmp_path / "taken")
    with pytest.raises(ValueError, match="choose"):
        adopt_table(root / "emb", tmp_path / "taken")
    with pytest.raises(FileNotFoundError, match="no embeddings"):
        adopt_table(tmp_path, tmp_path / "table")
