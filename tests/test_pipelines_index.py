"""`align index` as a command: building, changing, and what it says to those who ask wrongly."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_eval_index_change import make

from eval.index.card import IndexCard, Speed
from eval.index.folder import open_index
from eval.index.partial import work_folder
from eval.search.searcher import Searcher
from pipelines import index
from pipelines.cli import main, parse
from pipelines.config import ConfigError
from pipelines.together import Share


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Timing takes long, and says nothing here."""
    monkeypatch.setattr("eval.index.build.speed", lambda *_: [Speed(1, 1000.0)])
    monkeypatch.setattr("eval.index.asked.speed", lambda *_: [Speed(1, 1000.0)])


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make(root / "one", 300)
    make(root / "two", 130, seed=2, data="e")
    return root


@pytest.fixture
def built(tables, tmp_path, capsys) -> Path:
    assert call(capsys, tables / "one", tmp_path / "index", "factory=Flat")[0] == 0
    return tmp_path / "index"


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["index", *map(str, arguments)])
    said = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, said.out, said.err


def refused(capsys, *arguments: object) -> str:
    code, _, said = call(capsys, *arguments)
    assert code == 2
    lines = said.splitlines()
    assert len(lines) == (2 if "1 error in" in said else 1), said
    return lines[-1]


def test_an_index_is_built_and_changed_by_the_command(tables, tmp_path, capsys):
    out = tmp_path / "index"
    code, said, errors = call(capsys, tables / "one", out, "knobs=nprobe=4", "factory=IVF4,Flat")
    assert (code, errors) == (0, "")
    assert said.startswith(f"{out}: IVF4,Flat: 300 rows of image, 16 wide")
    assert call(capsys, tables / "two", out, "append=true")[0] == 0
    assert Searcher(out).live == 430
    (tmp_path / "ids").write_text("5\n\n 8 \n7\n-3\n")
    code, said, _ = call(capsys, out, f"remove={tmp_path}/ids")
    assert said.startswith(f"{out}: 2 rows removed, 428 left; figures from before")
    assert "\n2 ids that the index does not hold passed over\n" in said
    assert "from before the last change: with 2 removed rows" in said
    code, said, _ = call(capsys, out, "remove_where=parity = 0 AND id < 305")
    assert said.startswith(f"{out}: 49 rows removed, 379 left")
    code, said, _ = call(capsys, out, "compact=true")
    assert said.startswith(f"{out}: 51 removed rows taken out")
    card = IndexCard.load(out)
    assert (card.rows, card.removed, card.knobs) == (379, 0, "nprobe=4")
    code, said, _ = call(capsys, out, "remove_where=key LIKE 'e%'", "compact=true")
    assert said.startswith(f"{out}: 130 removed rows taken out")
    assert IndexCard.load(out).rows == 249


def test_lists_on_disk_answer_as_those_in_memory(tables, tmp_path, capsys):
    options = ("factory=IVF4,SQ8", "knobs=nprobe=2")
    assert call(capsys, tables / "one", tmp_path / "memory", *options)[0] == 0
    more = ("on_disk=true", "share_rows=100")
    code, said, _ = call(capsys, tables / "one", tmp_path / "disk", *options, *more)
    assert code == 0
    assert said.startswith(f"{tmp_path}/disk: IVF4,SQ8")
    queries = np.eye(16, dtype=np.float32)
    one, other = (Searcher(tmp_path / name).neighbours(queries, 9) for name in ("memory", "disk"))
    assert one.ids.tolist() == other.ids.tolist()


def test_exports_are_known_by_name(built, tmp_path, capsys):
    said = refused(capsys, built, tmp_path / "out", "export=nothing")
    assert "export: unknown 'nothing'; known: " in said
    assert call(capsys, built, tmp_path / "out", "export=parquet")[0] == 0
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["x"], "out: required, and not given"),
        (["x", "y", "factory=Flat", "append=true"], "factory: says how an index is built, and app"),
        (["x", "y", "target_recall=0.9", "append=true"], "target_recall: says how"),
        (["x", "compact=true", "remove=ids", "knobs=a=1"], "knobs: says how an index is built"),
        (["x", "append=true", "remove=ids"], "append and remove: one at a time"),
        (["x", "remove=ids", "remove_where=a"], "remove and remove_where: one at a time"),
        (["x", "y", "export=parquet", "compact=true"], "compact and export: one at a time"),
        (["x", "y", "compact=true"], "compact changes the index itself; give it alone: align ind"),
        (["x", "x", "append=true"], "append needs a second folder, not x again"),
        (["x", "y", "on_disk=true", "max_memory=1GB"], "max_memory: with on_disk, memory is"),
        (["x", "y", "max_memory=1 XB"], "max_memory: '1 XB' is no amount of memory: give it as in"),
        (["x", "y", "max_memory=0"], "max_memory: 0 is no amount of memory"),
        (["x", "y", "target_recall=1.5"], "target_recall: input should be less than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(capsys, arguments, line):
    assert line in refused(capsys, *arguments)


def test_amounts_of_memory():
    for said, amount in {
        "200 MB": 200_000_000,
        "4GB": 4_000_000_000,
        "1.5 GiB": 3 * 2**29,
        "12345": 12345,
    }.items():
        config = parse("index", ["x", "y", f"max_memory={said}"])
        assert config.max_memory == amount  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError):
        parse("index", ["x", "y", "max_memory=lots"])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("5\nx7\n", "line 2 is no id: 'x7'"),
        ("\n", "holds no ids"),
        ("99999\n", "holds no row with the id 99999; nothing removed"),
    ],
)
def test_lists_of_ids_that_cannot_be_used(built, tmp_path, capsys, content, line):
    (tmp_path / "ids").write_text(content)
    assert line in refused(capsys, built, f"remove={tmp_path}/ids")
    assert IndexCard.load(built).generation == 0


def test_conditions_that_cannot_be_used(built, capsys):
    assert "holds of no row; nothing removed" in refused(capsys, built, "remove_where=id < 0")
    assert "parity" in refused(capsys, built, "remove_where=nothing = 1")
    said = refused(capsys, built, "remove_where=id >= 0")
    assert "no row would be left" in said


def test_tables_that_cannot_be_used(tables, tmp_path, capsys):
    one = tables / "one"
    out = tmp_path / "index"
    assert "there is no file or folder" in refused(capsys, tmp_path / "nowhere", out)
    assert "FAISS says" in refused(capsys, one, out, "factory=Nonsense")
    said = refused(capsys, one, out, "max_memory=1KB")
    assert "max_memory 1,000: 300 rows of 16 take at least" in said
    assert said.endswith("allow so much")
    assert "holds no fused embeddings" in refused(capsys, one, out, "modality=fused")
    assert "can: IVF4096,Flat" in refused(capsys, one, out, "on_disk=true", "factory=HNSW16")
    assert "says itself which model" in refused(capsys, one, out, "model=somewhere")
    assert "is no index by other tools" in refused(capsys, one, out, f"embeddings={one}")
    assert not out.exists()


@pytest.mark.parametrize("factory", ["factory=auto", "factory=IVF4,SQ8"])
def test_several_processes_refuse_what_they_cannot_keep_to(tables, tmp_path, factory):
    values = [str(tables / "one"), str(tmp_path / "index"), factory, "max_memory=1GB"]
    for rank in (0, 1):
        with pytest.raises(ConfigError, match=r"max_memory: several processes build in shares"):
            index._run(parse("index", values), Share(rank, 2))  # pyright: ignore
    theirs = tmp_path / "theirs"
    shutil.copytree(tables / "one", theirs)
    (theirs / "table.json").unlink()
    config = parse("index", [str(theirs), str(tmp_path / "index"), factory])
    with pytest.raises(ConfigError, match=r"theirs is by another tool, and one process takes"):
        index._run(config, Share(1, 2))  # pyright: ignore
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}


def test_embeddings_by_others_have_no_lists_on_disk(tables, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    shutil.copytree(tables / "one", theirs)
    (theirs / "table.json").unlink()
    assert "theirs is by another tool" in refused(capsys, theirs, tmp_path / "x", "on_disk=true")


def test_embeddings_by_clip_retrieval_are_indexed(tables, tmp_path, capsys):
    """Their layout is that of our tables without the card."""
    theirs = tmp_path / "theirs"
    shutil.copytree(tables / "one", theirs)
    (theirs / "table.json").unlink()
    shutil.rmtree(theirs / "parts", ignore_errors=True)
    code, _, errors = call(capsys, theirs, tmp_path / "index", "factory=Flat")
    assert code == 0, errors
    assert Searcher(tmp_path / "index").live == 300


# --- kills and full disks ---


@pytest.mark.parametrize("options", [["factory=Flat"], ["factory=IVF2,Flat", "on_disk=true"]])
def test_a_file_that_finds_no_room_leaves_nothing_half(tables, tmp_path, capsys, options):
    """The system refuses to write more than a limit as it refuses where a disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        said = refused(capsys, tables / "one", tmp_path / "x", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in said
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.writing").exists()
    assert call(capsys, tables / "one", tmp_path / "x", *options)[0] == 0


@pytest.mark.slow
def test_a_killed_build_done_again_is_that_of_one_never_killed(tables, tmp_path, capsys):
    out = tmp_path / "killed"
    arguments = [str(tables / "one"), str(out), "factory=IVF4,SQ8", "on_disk=true", "share_rows=40"]
    command = [sys.executable, "-m", "pipelines.index", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 100
        while not list(work_folder(out).glob("share-*.faiss")) and time.monotonic() < until:
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(work_folder(out).glob("share-*.faiss"))
    assert not out.exists()
    assert call(capsys, *arguments)[0] == 0
    whole = tmp_path / "whole"
    assert call(capsys, arguments[0], whole, *arguments[2:])[0] == 0
    opened, other = open_index(out), open_index(whole)
    unlike = {"files", "build_seconds", "speed", "costs"}
    for name, value in vars(opened.card).items():
        assert name in unlike or value == getattr(other.card, name), name
    names = set(opened.card.files) - {"queries-0.npz"}  # a ZIP file holds the time
    assert {n: opened.card.files[n] for n in names} == {n: other.card.files[n] for n in names}
    assert not work_folder(out).exists()
