"""Indexes in shares, their lists on disk: equal to one process's, by one, by two, after a kill."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from test_eval_index_change import make

from eval.index import lists, partial
from eval.index.build import build_index
from eval.index.card import IndexCard, Speed
from eval.index.change import append, compact, remove
from eval.index.folder import open_index
from eval.index.partial import (
    build_in_shares,
    build_share,
    factory_for,
    is_mergeable,
    merged,
    prepared,
    work_folder,
)
from eval.search.searcher import Searcher
from eval.table import EmbeddingTable
from pipelines.config import build
from pipelines.index import run
from pipelines.schemas import IndexConfig

KINDS = ["IVF4,Flat", "IVF4,SQ8", "PCA8,IVF4,PQ4x4", "IVF4,RaBitQ"]
SMALL = {"query_count": 40, "knobs": "nprobe=4"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Parts of different sizes, the last of them small."""
    return make(tmp_path_factory.mktemp("data") / "table", 410)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "more", 150, seed=3, data="e")


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Timing takes long, and says nothing here."""
    monkeypatch.setattr("eval.index.build.speed", lambda *_: [Speed(1, 1000.0)])
    monkeypatch.setattr("eval.index.asked.speed", lambda *_: [Speed(1, 1000.0)])


def hits(folder, table, k=12):
    found = Searcher(folder).neighbours(table.vectors("text"), k)
    return found.ids.tolist(), found.scores.tolist()


def test_the_corpus_has_shares_of_different_sizes(table):
    rows = [part.rows for part in table.card.parts]
    assert len(rows) >= 4
    assert len(set(rows)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_shares_make_the_index_of_one_process(table, more, tmp_path, kind, capfd):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    card = build_index(table, whole, factory=kind, **SMALL)
    shares = build_in_shares(table, shared, factory=kind, share_rows=150, **SMALL)
    assert shares.lists_file == "lists-0.ivfdata"
    assert shares.reached == card.reached
    assert not work_folder(shared).exists()
    assert hits(shared, table) == hits(whole, table)
    shutil.move(shared, tmp_path / "moved")  # index and lists find each other anywhere
    moved = tmp_path / "moved"
    assert hits(moved, table) == hits(whole, table)
    for folder in (whole, moved):
        append(folder, more)
    assert hits(moved, more) == hits(whole, more)
    gone = open_index(whole).rows.ids[::3]
    cards = []
    for folder in (whole, moved):
        remove(folder, gone)
        cards.append(compact(folder))
    assert cards[1].reached == cards[0].reached
    assert hits(moved, more) == hits(whole, more)
    names = {path.name for path in moved.iterdir() if path.is_file()}
    assert {"lists-3.ivfdata", "index-3.faiss", "index.json"} < names
    assert not names & {"lists-0.ivfdata", "lists-1.ivfdata", "index.faiss"}
    assert not capfd.readouterr().out


def test_tuned_knobs_are_those_of_one_process(table, tmp_path):
    card = build_index(table, tmp_path / "whole", factory="IVF8,Flat", query_count=60)
    shares = build_in_shares(
        table, tmp_path / "shared", factory="IVF8,Flat", query_count=60, share_rows=150
    )
    assert (shares.knobs, shares.reached) == (card.knobs, card.reached)
    assert shares.tuned_for == "text"


def test_kinds_that_have_no_lists_to_merge_are_refused(table, tmp_path):
    for kind in ("Flat", "HNSW8", "IVF4,PQ8x4fs", "IVF4,Flat,Refine(SQ8)", "RaBitQfs"):
        assert not is_mergeable(kind, 16)
        with pytest.raises(ValueError, match=r"cannot be built in shares.* IVF4096,SQ8"):
            prepared(table, tmp_path / "index", factory=kind)
    assert all(is_mergeable(kind, 16) for kind in [*KINDS, "PCA8,IVF4_HNSW8,Flat"])
    with pytest.raises(ValueError, match="index factory 'Nonsense'"):
        prepared(table, tmp_path / "index", factory="Nonsense")
    assert not list(tmp_path.iterdir())


def test_auto_has_lists_as_the_rows_allow():
    assert factory_for(1) == "IVF1,SQ8"
    assert factory_for(410) == "IVF10,SQ8"
    assert factory_for(1_000_000) == "IVF4096,SQ8"
    assert factory_for(100_000_000) == "IVF32768,SQ8"


# --- kills ---


def test_shares_of_a_killed_run_are_kept_and_half_written_ones_are_not(
    table, tmp_path, monkeypatch
):
    out, whole = tmp_path / "index", tmp_path / "whole"
    plan = prepared(table, out, factory="IVF4,SQ8", share_rows=150)
    assert len(plan.shares) >= 3
    build_share(table, out, plan, 1)
    (work_folder(out) / "share-0.faiss.writing").write_bytes(b"half")
    kept = (work_folder(out) / "share-1.faiss").stat().st_mtime_ns

    def trained_again(*_args, **_options):
        pytest.fail("trained again")

    monkeypatch.setattr(partial, "trained", trained_again)
    again = prepared(table, out, factory="IVF4,SQ8", share_rows=150)
    assert again == plan
    for number in range(len(plan.shares)):
        build_share(table, out, plan, number)
    assert (work_folder(out) / "share-1.faiss").stat().st_mtime_ns == kept

    def killed(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(partial, "finished", killed)
    with pytest.raises(KeyboardInterrupt):
        merged(table, out, plan)
    assert not out.exists()
    monkeypatch.undo()
    card = merged(table, out, plan, **SMALL)
    assert card.reached == build_index(table, whole, factory="IVF4,SQ8", **SMALL).reached
    assert hits(out, table) == hits(whole, table)
    assert not work_folder(out).exists()


def test_shares_of_another_plan_are_thrown_away(table, more, tmp_path):
    out = tmp_path / "index"
    plan = prepared(table, out, factory="IVF4,SQ8")
    build_share(table, out, plan, 0)
    for change in ({"seed": 1}, {"factory": "IVF4,Flat"}, {"modality": "text"}):
        other = prepared(table, out, **{"factory": "IVF4,SQ8", **change})
        assert other != plan
        assert not list(work_folder(out).glob("share-*"))
    with pytest.raises(ValueError, match="not the table that the index is built from"):
        build_share(more, out, plan, 0)


def test_shares_of_other_vectors_under_the_same_fingerprints_are_thrown_away(table, tmp_path):
    out = tmp_path / "index"
    plan = prepared(table, out, factory="IVF4,SQ8")
    build_share(table, out, plan, 0)
    other = make(tmp_path / "other", 410, seed=9)
    assert other.card.fingerprints == table.card.fingerprints
    with pytest.raises(ValueError, match="not the table that the index is built from"):
        build_share(other, out, plan, 0)
    prepared(other, out, factory="IVF4,SQ8")
    assert not list(work_folder(out).glob("share-*"))


def test_a_folder_of_others_stays(table, more, tmp_path):
    out = tmp_path / "index"
    work = work_folder(out)
    work.mkdir()
    (work / "my_file").write_text("mine")
    (work / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"my_file: not of an index built in shares"):
        build_in_shares(table, out, factory="IVF4,SQ8", **SMALL)
    assert not out.exists()
    (work / "my_file").rename(tmp_path / "my_file")
    build_in_shares(table, out, factory="IVF4,SQ8", **SMALL)
    plan = prepared(table, out, factory="IVF4,SQ8", seed=5)  # a build anew that was killed
    build_share(table, out, plan, 0)
    (tmp_path / "my_file").rename(work / "my_file")
    kept = {path.name for path in work.iterdir()}
    append(out, more)
    remove(out, [5])
    compact(out)
    assert {path.name for path in work.iterdir()} == kept
    assert not list(out.glob("share-*"))


def test_a_change_that_was_killed_leaves_pieces_to_the_next(table, more, tmp_path, monkeypatch):
    out = tmp_path / "index"
    build_in_shares(table, out, factory="IVF4,SQ8", **SMALL)

    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(lists, "write_lists", killed)
    with pytest.raises(KeyboardInterrupt):
        append(out, more)
    assert list(out.glob("share-*"))
    monkeypatch.undo()
    remove(out, [5])
    assert not list(out.glob("share-*"))


def test_seconds_of_all_shares_are_counted(table, tmp_path):
    out = tmp_path / "index"
    plan = prepared(table, out, factory="IVF4,SQ8", share_rows=150)
    for number in range(len(plan.shares)):
        build_share(table, out, plan, number)
        assert 0 < json.loads((work_folder(out) / f"share-{number}.json").read_text()) < 1000
        (work_folder(out) / f"share-{number}.json").write_text("1000")
    assert merged(table, out, plan, **SMALL).build_seconds > 1000 * len(plan.shares)


def test_a_disk_without_room_for_the_lists_is_said_before_they_are_written(
    table, tmp_path, monkeypatch
):
    out = tmp_path / "index"
    build_index(table, out, factory="Flat", query_count=10)
    before = IndexCard.load(out)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(OSError, match="No space left on device"):
        build_in_shares(table, out, factory="IVF4,SQ8")
    assert open_index(out).card == before


# --- processes ---


def ranks_index(rank: int, world: int, values: dict) -> None:
    import os

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        ACCELERATE_USE_CPU="true",
    )
    assert run(build(IndexConfig, values, origin="test")) == 0


@pytest.mark.slow
def test_two_processes_make_the_index_of_one(table, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "index"
    values = {"table": table.folder, "factory": "IVF4,SQ8", "knobs": "nprobe=2"}
    run_ranks(ranks_index, 2, {**values, "out": out})
    assert run(build(IndexConfig, {**values, "out": whole}, origin="test")) == 0
    card, one = IndexCard.load(out), IndexCard.load(whole)
    assert card.lists_file is not None
    assert one.lists_file is None
    assert card.reached == one.reached
    assert hits(out, table) == hits(whole, table)
    assert not work_folder(out).exists()
    assert not np.isinf(card.bytes_per_vector)
    assert EmbeddingTable(table.folder).rows == Searcher(Path(out)).live
