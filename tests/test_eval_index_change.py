"""Rows behind an index, and its changes: added, removed, compacted, killed at any instant."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from eval.embed import EmbeddedRows, write_table
from eval.index import change
from eval.index import folder as index_folder
from eval.index.build import build_index
from eval.index.card import IndexCard, Speed
from eval.index.change import append, compact, remove
from eval.index.describe import describe
from eval.index.folder import open_index, remove_leftovers, write_arrow, write_faiss
from eval.index.rows import ARROW_ROWS, mapped
from eval.search.searcher import Searcher
from eval.table import EmbeddingTable

DIM = 16
KINDS = [
    "Flat",
    "SQ8",
    "HNSW8",
    "IVF4,Flat",
    "OPQ4,IVF4,PQ4x4",
    "IVF4,PQ8x4fs,Refine(SQ8)",
    "RaBitQfs,Refine(SQ8)",
]


def make(folder, rows, *, seed=1, data="d", model="m", fields=lambda row: {"parity": row % 2}):
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((rows, DIM)).astype(np.float32)
    texts = images + 0.5 * generator.standard_normal((rows, DIM)).astype(np.float32)
    batch = EmbeddedRows(
        ids=3 * np.arange(rows) + 5,
        keys=[f"{data}{row}" for row in range(rows)],
        captions=[f"caption {row}" if row % 3 else None for row in range(rows)],
        shards=["a.tar"] * rows,
        embeddings={"image": images, "text": texts},
        fields=[fields(row) for row in range(rows)],
    )
    return write_table(
        folder,
        lambda _start: [batch],
        modalities=("image", "text"),
        dim=DIM,
        fingerprints={"model": model, "data": data},
        rows_per_part=200,
        origin={"data": data},
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "first", 300)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    more = {"fields": lambda row: {"year": row}, "seed": 2, "data": "e"}
    return make(tmp_path_factory.mktemp("data") / "second", 130, **more)


@pytest.fixture
def built(first, tmp_path) -> Path:
    build_index(first, tmp_path / "index", factory="Flat", query_count=40)
    return tmp_path / "index"


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Timing takes long, and says nothing here."""
    monkeypatch.setattr("eval.index.build.speed", lambda *_: [Speed(1, 1000.0)])
    monkeypatch.setattr("eval.index.asked.speed", lambda *_: [Speed(1, 1000.0)])


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_whole(folder: Path) -> IndexCard:
    """Everything that the card names is there as it says, and nothing else."""
    card = open_index(folder, check="sha256").card
    assert set(files_in(folder)) == {*card.files, "index.json"}
    return card


def all_vectors(first, second) -> np.ndarray:
    return np.concatenate([first.vectors("image"), second.vectors("image")])


# --- rows ---


def test_vectors_and_metadata_are_those_of_the_tables(built, first, second):
    append(built, second)
    rows = open_index(built).rows
    numbers = np.array([429, 0, 299, 300, 12, 12])
    expected = all_vectors(first, second)
    np.testing.assert_allclose(rows.vectors(numbers), expected[numbers], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(list(rows.blocks())), expected, rtol=0, atol=1e-6)
    said = first.metadata().to_pylist() + second.metadata().to_pylist()
    offset = int(first.metadata()["id"][-1].as_py()) + 1
    for number, found in zip(numbers, rows.metadata(numbers), strict=True):
        wanted = {"parity": None, "year": None, **said[number]}
        assert found == {**wanted, "id": wanted["id"] + (offset if number >= 300 else 0)}
    assert rows.table.num_rows == 430
    assert rows.table["id"].to_pylist() == rows.ids.tolist()
    assert rows.table["year"].to_pylist()[298:302] == [None, None, 0, 1]
    assert rows.source_of(299).data == "d"
    assert rows.source_of(300).data == "e"


def test_metadata_is_found_across_record_batches_of_any_sizes(tmp_path, monkeypatch):
    table = make(tmp_path / "table", 300)
    monkeypatch.setattr(index_folder, "ARROW_ROWS", 7)  # fewer than a reader expects
    build_index(table, tmp_path / "index", factory="Flat", query_count=10)
    rows = open_index(tmp_path / "index").rows
    found = rows.metadata(np.arange(300))
    assert [one["key"] for one in found] == [f"d{row}" for row in range(300)]
    assert ARROW_ROWS > 300


def test_arrow_batches_are_full_but_for_the_last(tmp_path):
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    sizes = [1, ARROW_ROWS, 0, 5, ARROW_ROWS * 2 - 3]
    starts = np.cumsum([0, *sizes])
    tables = [
        pa.table({"id": np.arange(start, start + size), "text": ["x"] * size}, schema=schema)
        for start, size in zip(starts, sizes, strict=False)
    ]
    ids = write_arrow(tmp_path / "rows.arrow", schema, tables)
    assert ids.tolist() == list(range(sum(sizes)))
    with pa.ipc.open_file(pa.memory_map(str(tmp_path / "rows.arrow"))) as file:
        found = [file.get_batch(number).num_rows for number in range(file.num_record_batches)]
    assert found == [ARROW_ROWS, ARROW_ROWS, ARROW_ROWS, 3]


def test_mapped_files_are_not_kept_open(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(12, dtype=np.float16).reshape(4, 3))
    np.save(tmp_path / "none.npy", np.empty((0, 3), np.float16))
    before = len(list(Path("/proc/self/fd").iterdir()))
    arrays = [mapped(tmp_path / "a.npy") for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    (tmp_path / "a.npy").unlink()
    assert arrays[7][2].tolist() == [6, 7, 8]
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0, 0] = 1
    assert mapped(tmp_path / "none.npy").shape == (0, 3)


@pytest.mark.parametrize("name", ["img_emb", "rows-0.arrow", "ids-0.npy", "metadata"])
@pytest.mark.parametrize("check", ["sha256", "sizes"])
def test_a_damaged_or_missing_file_is_one_line_that_names_it(built, name, check):
    names = [one for one in IndexCard.load(built).files if one.startswith(name)]
    path = built / names[0]
    content = path.read_bytes()
    if not (name == "metadata" and check == "sizes"):  # Parquet is for others: not read
        path.unlink()
        path.write_bytes(content[:-40])
        with pytest.raises(ValueError, match=path.name) as caught:
            open_index(built, check=check)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        open_index(built, check=check)


def test_sizes_reads_no_file_for_its_checksum(built, monkeypatch):
    monkeypatch.setattr(index_folder, "file_sha256", lambda _path: pytest.fail("hashed"))
    open_index(built, check="sizes")


def test_ids_that_do_not_ascend_are_refused(first, tmp_path, monkeypatch):
    original = EmbeddingTable.metadata_parts

    def repeated(self, schema):
        for part in original(self, schema):
            ids = part["id"].to_numpy().copy()
            ids[7] = ids[6]
            yield part.set_column(0, "id", pa.array(ids))

    monkeypatch.setattr(EmbeddingTable, "metadata_parts", repeated)
    with pytest.raises(ValueError, match="id of row 7, 23, does not ascend from 23"):
        build_index(first, tmp_path / "index", factory="Flat", query_count=10)
    assert not (tmp_path / "index").exists()


# --- adding ---


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_every_kind_keep_ids_and_recall(first, second, tmp_path, kind):
    out = tmp_path / "index"
    build_index(first, out, factory=kind, query_count=60)
    before = open_index(out).rows.ids.copy()
    card = append(out, second)
    assert (card.rows, card.generation, card.measured) == (430, 1, 1)
    ids = open_index(out).rows.ids
    assert ids[:300].tolist() == before.tolist()
    assert ids[300:].tolist() == (second.metadata()["id"].to_numpy() + before[-1] + 1).tolist()
    searcher = Searcher(out)
    texts = np.concatenate([first.vectors("text"), second.vectors("text")])
    gone = ids[::3]
    remove(out, gone)
    assert not np.isin(Searcher(out).neighbours(texts, 10).ids, gone).any()
    card = compact(out)
    assert (card.rows, card.removed, card.measured) == (286, 0, 3)
    assert not card.files.keys() & {"removed-2.npy", "index-1.faiss"}
    is_whole(out)
    found = Searcher(out)
    assert found.ids.tolist() == np.setdiff1d(ids, gone).tolist()
    kept = ~np.isin(ids, gone)
    exact = texts @ all_vectors(first, second)[kept].T
    best = found.ids[np.argmax(exact, axis=1)]
    hit = (found.neighbours(texts, 10).ids == best[:, None]).any(axis=1).mean()
    assert hit >= (0.55 if kind == "OPQ4,IVF4,PQ4x4" else 0.9)
    rows = np.flatnonzero(kept)
    again = [one["key"] for one in found.metadata(ids[rows])]
    assert again == [one["key"] for one in searcher.metadata(ids[rows])]


def test_an_index_with_more_rows_is_the_index_of_all_rows(built, first, second):
    card = append(built, second)
    queries = first.vectors("text")
    exact = queries @ all_vectors(first, second).T
    found = Searcher(built).neighbours(queries, 5)
    rows = open_index(built).rows.places(found.ids.ravel()).reshape(found.ids.shape)
    np.testing.assert_allclose(np.take_along_axis(exact, rows, 1), found.scores, atol=1e-5)
    np.testing.assert_allclose(found.scores, -np.sort(-exact, axis=1)[:, :5], atol=1e-5)
    assert [one.origin for one in card.sources] == [{"data": "d"}, {"data": "e"}]
    assert all(one.at_10.value == 1.0 for one in card.reached)
    kept = np.load(built / str(card.queries_file))
    assert (kept["text.right"] >= 300).sum() == round(20 * 130 / 430)
    assert kept["text.right"].max() > 400
    is_whole(built)


def test_what_does_not_fit_is_not_added(built, first, second, tmp_path):
    before = files_in(built)
    with pytest.raises(ValueError, match="holds the rows of this data already"):
        append(built, first)
    with pytest.raises(ValueError, match="embedded by another model than"):
        append(built, make(tmp_path / "model", 20, data="x", model="other"))
    texts = make(tmp_path / "texts", 20, data="x", fields=lambda _: {"parity": "even"})
    with pytest.raises(ValueError, match="changes its type"):
        append(built, texts)
    assert files_in(built) == before
    append(built, second)
    with pytest.raises(ValueError, match="holds the rows of this data already"):
        append(built, second)


# --- removing ---


def test_removing_is_refused_or_done_whole(built):
    before = files_in(built)
    ids = open_index(built).rows.ids
    with pytest.raises(ValueError, match="no row with the id 6 and 1 others; nothing removed"):
        remove(built, [6, 7])
    with pytest.raises(ValueError, match="no row would be left"):
        remove(built, ids)
    assert files_in(built) == before
    assert remove(built, [5, 8]).removed == 2
    again = remove(built, [8, 9])  # as after a kill
    assert (again.removed, again.generation) == (2, 1)
    assert remove(built, [8, 11]).removed == 3
    assert open_index(built).removed.tolist() == [0, 1, 2]
    assert is_whole(built).removed_file == "removed-2.npy"


def test_compacting_leaves_files_without_removed_rows(built, second):
    append(built, second)
    before = IndexCard.load(built)
    ids = open_index(built).rows.ids
    remove(built, ids[[1, 2]])
    card = compact(built)
    assert card.sources[1] == before.sources[1]
    assert card.sources[0].vectors[1:] == before.sources[0].vectors[1:]
    assert card.sources[0].vectors[0] != before.sources[0].vectors[0]
    remove(built, ids[300:])  # a source without rows keeps its ids
    card = compact(built)
    assert (card.sources[1].rows, card.sources[1].vectors) == (0, ())
    assert card.sources[1].ids == before.sources[1].ids
    is_whole(built)
    assert compact(built) == card
    append(built, second)  # none of its rows are there any more
    again = is_whole(built)
    assert (again.rows, again.sources[2].rows) == (428, 130)
    assert again.sources[2].first_id == card.sources[1].first_id + card.sources[1].ids
    with pytest.raises(ValueError, match="already"):
        append(built, second)


def test_an_index_whose_measuring_queries_are_gone_is_described(first, tmp_path):
    out = tmp_path / "index"
    build_index(first, out, factory="Flat", query_count=40)
    card = IndexCard.load(out)
    right = np.load(out / str(card.queries_file))["text.right"]
    remove(out, open_index(out).rows.ids[right])
    card = compact(out)
    assert {one.queries for one in card.reached} == {"image", "fused"}
    assert "no text queries are left that measure it" in describe(card)[-1]


def test_a_second_change_at_once_is_refused_and_harms_nothing(built, second, monkeypatch):
    original = change.draw_queries

    def meanwhile(*arguments, **options):
        for other in (lambda: append(built, second), lambda: compact(built)):
            with pytest.raises(ValueError, match="another process changes this index; wait"):
                other()
        with pytest.raises(ValueError, match="another process changes this index; wait"):
            remove(built, [5])
        return original(*arguments, **options)

    monkeypatch.setattr(change, "draw_queries", meanwhile)
    append(built, second)
    assert is_whole(built).rows == 430
    remove(built, [5])


def test_what_is_open_goes_on(built, first, second):
    searcher = Searcher(built)
    queries = first.vectors("text")[:20]
    before = searcher.search(queries, 5)
    append(built, second)
    remove(built, searcher.ids[::2])
    compact(built)
    after = searcher.search(queries, 5)
    assert after.ids.tolist() == before.ids.tolist()
    assert after.rows == before.rows
    assert searcher.similar([5], 3).ids.shape == (1, 3)


def test_an_index_that_changes_while_it_is_opened_is_opened_as_it_is_then(
    built, second, monkeypatch
):
    stale = IndexCard.load(built)
    append(built, second)
    load, cards = IndexCard.load, [stale]
    monkeypatch.setattr(IndexCard, "load", lambda folder: cards.pop() if cards else load(folder))
    assert open_index(built).card.rows == 430


def test_a_change_of_another_process_meanwhile_is_not_overwritten(built):
    stale = open_index(built).card
    remove(built, [5])
    with pytest.raises(ValueError, match="another process changed this index"):
        index_folder.commit(replace(stale, generation=1), built)
    assert IndexCard.load(built).removed == 1


# --- kills and full disks ---


def test_a_copy_that_finds_no_room_names_the_file_that_found_none(tmp_path, monkeypatch):
    (tmp_path / "one").write_bytes(b"x")

    def elsewhere(*_args):
        raise OSError(errno.EXDEV, "")

    def full(source, target):
        raise OSError(errno.ENOSPC, "", str(source), None, str(target))

    monkeypatch.setattr(Path, "hardlink_to", elsewhere)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        index_folder.link(tmp_path / "one", tmp_path / "other/two")
    assert caught.value.filename == str(tmp_path / "other/two")


def test_leftovers_go_and_other_files_stay(built):
    own = ["index-9.faiss", "rows-9.arrow", "img_emb/img_emb_99.npy", "index.json.writing"]
    for name in [*own, "README.md", "notes.npy", "img_emb/mine.npy"]:
        (built / name).write_bytes(b"x")
    remove_leftovers(built, IndexCard.load(built))
    left = set(files_in(built)) - set(IndexCard.load(built).files)
    assert left == {"index.json", "README.md", "notes.npy", "img_emb/mine.npy"}


_KILLED = """
import os, signal, sys
from pathlib import Path
import faiss
from eval.index import change
from eval.table import EmbeddingTable

def run(path, table, what, at):
    count = 0
    def die(event, arguments):
        nonlocal count
        watched = event in ("open", "os.rename", "os.remove", "os.link")
        if watched and str(path) in str(arguments[0:2]):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(die)
    if what == "append":
        change.append(path, table)
    else:
        change.compact(path)

faiss.omp_set_num_threads(1)
table = EmbeddingTable(sys.argv[1])
for line in sys.stdin:
    path, what, at = line.split()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(Path(path), table, what, int(at))
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_kill_leaves_the_index_before_or_after(built, second, tmp_path):
    """Whenever a file of the index is opened, linked, renamed or removed: now and then of those."""
    remove(built, [5, 8])
    cases = []
    for what, after in (("append", 430), ("compact", 298)):
        for at in (*range(13, 56, 6), 1000):
            cases.append((tmp_path / f"{what}{at}", what, at, after))
            shutil.copytree(built, cases[-1][0])
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(second.folder)],
        input="".join(f"{path} {what} {at}\n" for path, what, at, _ in cases),
        capture_output=True,
        text=True,
        check=True,
    )
    codes = [int(line) for line in done.stdout.split()]
    assert set(codes) == {0, -signal.SIGKILL}, done.stderr
    assert len(codes) == len(cases)
    seen = set()
    for path, what, _, after in cases:
        rows = open_index(path).card.rows
        seen.add((what, rows))
        if rows == 300:
            append(path, second) if what == "append" else compact(path)
        assert is_whole(path).rows == after
    assert seen == {("append", 300), ("append", 430), ("compact", 300), ("compact", 298)}


def test_a_full_disk_leaves_the_index_as_it_was(built, second, monkeypatch):
    before = files_in(built)

    def full(index, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("eval.index.change.write_faiss", full)
    with pytest.raises(OSError, match="No space left"):
        append(built, second)
    monkeypatch.undo()
    assert open_index(built).card.rows == 300
    remove_leftovers(built, IndexCard.load(built))
    assert files_in(built) == before
    assert append(built, second).rows == 430


def test_an_index_that_finds_no_room_is_said_so(built):
    index = open_index(built).index
    with pytest.raises(OSError, match="No space left on device"):
        write_faiss(index, Path("/dev/full"))
