import dataclasses
import errno
import fcntl
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from shards_corpus import SIDE, picture, write_set, write_tar
from webdataset.compat import WebDataset

from shards.captions import CaptionRule
from shards.damage import Reason
from shards.decode import Limits
from shards.demo import FOLDER, SPLITS
from shards.loader import ShardLoader, iterate
from shards.manifest import Manifest
from shards.packing import WORK_FOLDER, pack
from shards.packing.recode import Recode
from shards.packing.sidecars import SIDECARS
from shards.read import ShardReader
from shards.sources import MAX_KEY, FolderSource, ParquetSource, Record, Source, safe_key


def records(count, *, bad=()):
    return [
        Record(f"k{i:03d}", b"broken" if i in bad else picture(i), f"caption {i}", {"n": i})
        for i in range(count)
    ]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_equal_input_gives_equal_bytes(tmp_path):
    first = pack(records(25), tmp_path / "a", samples_per_shard=10, shuffle_seed=3)
    second = pack(records(25), tmp_path / "b", samples_per_shard=10, shuffle_seed=3)
    other = pack(records(25), tmp_path / "c", samples_per_shard=10, shuffle_seed=4)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert [shard.samples for shard in first.shards] == [10, 10, 5]


def test_what_was_packed_comes_back_in_order_and_mixed(tmp_path):
    plain = pack(iter(records(25)), tmp_path / "a", samples_per_shard=10)
    assert plain.keys.to_pylist() == [f"k{i:03d}" for i in range(25)]
    mixed = pack(iter(records(25)), tmp_path / "b", samples_per_shard=10, shuffle_seed=1)
    assert mixed.keys.to_pylist() != plain.keys.to_pylist()
    assert sorted(mixed.keys.to_pylist()) == plain.keys.to_pylist()
    for manifest in (plain, mixed):
        for batch in iterate(manifest, batch_size=8, image_size=SIDE):
            assert batch.captions == [f"caption {fields['n']}" for fields in batch.fields]


def test_webdataset_reads_it(tmp_path):
    manifest = pack(records(23), tmp_path, samples_per_shard=10)
    samples = webdataset_samples(tmp_path, manifest)
    assert [one["__key__"] for one in samples] == [f"k{i:03d}" for i in range(23)]
    for number, one in enumerate(samples):
        assert one["png"] == picture(number)
        assert one["txt"] == f"caption {number}".encode()
        assert json.loads(one["json"]) == {"n": number}


def test_a_loaded_manifest_equals_the_packed_one(tmp_path):
    packed = pack(records(12, bad=[5]), tmp_path, samples_per_shard=5)
    loaded = Manifest.load(tmp_path)
    assert loaded.shards == packed.shards
    assert loaded.samples.equals(packed.samples)
    assert loaded.problems == packed.problems
    assert loaded.fingerprint == packed.fingerprint
    assert loaded.fields == ("json", "png", "txt")
    assert loaded.is_packed
    scanned = Manifest.scan(tmp_path)
    assert scanned.samples.equals(packed.samples)


def test_bad_records_are_left_out_and_named(tmp_path):
    many = [*records(5, bad=[2]), Record("none", picture(1), None), Record("void", b"", "x")]
    many.append(Record("text", picture(1), "\udcff"))
    manifest = pack(many, tmp_path)
    assert manifest.keys.to_pylist() == ["k000", "k001", "k003", "k004"]
    assert {problem.key: problem.reason for problem in manifest.problems} == {
        "k002": Reason.UNDECODABLE,
        "none": Reason.NO_CAPTION,
        "void": Reason.EMPTY_IMAGE,
        "text": Reason.BAD_TEXT,
    }
    report = ShardLoader(manifest, batch_size=2, image_size=SIDE).report()
    assert {entry["key"] for entry in report["left_out"]} == {"k002", "none", "void", "text"}


@pytest.mark.parametrize(
    ("given_records", "options", "message"),
    [
        ([], {}, "no usable record for .*: there is none at all"),
        (records(2, bad=[0, 1]), {}, "all 2 are bad; the first: .*'k000': undecodable"),
        (records(2, bad=[1]), {"strict": True}, "'k001': undecodable .* strict"),
        ([*records(1), *records(1)], {}, "'k000' comes twice"),
        ([Record("a.b", picture(1), "x")], {}, "'a.b' is unfit"),
        ([Record("", picture(1), "x")], {}, "'' is unfit"),
        (records(1), {"samples_per_shard": 0}, "samples_per_shard is 0"),
    ],
)
def test_what_cannot_be_packed_is_told_in_one_line(tmp_path, given_records, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        pack(given_records, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    pack(records(3), tmp_path / "out")  # nothing that was left behind is in the way


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds 'thesis.txt'; pack into a new or empty folder"):
        pack(records(2), tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        pack(records(2), tmp_path / "thesis.txt")
    assert files(tmp_path) == {"thesis.txt": b"precious"}


def test_shards_of_others_are_never_overwritten(tmp_path):
    Manifest.scan(write_set(tmp_path, [3]))
    before = files(tmp_path)
    with pytest.raises(ValueError, match="were not packed here"):
        pack(records(2), tmp_path, overwrite=True)
    assert files(tmp_path) == before


def test_a_data_set_is_replaced_only_on_request_and_only_by_a_whole_one(tmp_path):
    pack(records(25), tmp_path, samples_per_shard=5)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="set overwrite"):
        pack(records(3), tmp_path)

    def breaks():
        yield from records(7)
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        pack(breaks(), tmp_path, overwrite=True, samples_per_shard=5)
    assert (tmp_path / WORK_FOLDER).is_dir()
    assert {k: v for k, v in files_only(tmp_path).items() if k in before} == before
    assert len(pack(records(3), tmp_path, overwrite=True)) == 3
    assert set(files(tmp_path)) == {"000000.tar", "manifest.json", "samples.parquet"}


def files_only(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_pack_that_was_cut_off_is_packed_anew(tmp_path):
    work = tmp_path / WORK_FOLDER
    work.mkdir()
    (work / "000000.tar").write_bytes(b"half")
    (work / ".000001.tar.77.partial").write_bytes(b"less")
    assert len(pack(records(3), tmp_path)) == 3
    assert not work.exists()


def test_two_packs_into_one_folder_are_refused(tmp_path):
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="another process is packing"):
            pack(records(1), tmp_path)
    finally:
        os.close(holder)


def test_progress_is_told(tmp_path):
    calls = []
    pack(records(4, bad=[1]), tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


class Numbered(Source):
    """Records, at one of which something happens when a shard is written."""

    def __init__(self, count, *, bad=(), at=None, act=lambda: None, identity="numbered"):
        self.records = records(count, bad=bad)
        self.at, self.act, self.identity = at, act, identity
        self.armed = False

    def arm(self, *_):
        # The type checks of the tests look at a record now and then, before any is packed.
        self.armed = True

    def __len__(self):
        return len(self.records)

    def record(self, index):
        if index == self.at and self.armed:
            self.act()
        return self.records[index]


def shards_at_work(out):
    """The finished shards of a pack that was cut off, and what tells if they were rewritten."""
    notes = (out / WORK_FOLDER).glob("[0-9]*.json")
    tars = [path.with_suffix(".tar") for path in sorted(notes)]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tars}


EVERY_SIDECAR = list(SIDECARS)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    source = Numbered(47, bad=[0, 9, 20, 21, 22, 23, 24, 46])
    options = {"samples_per_shard": 5, "shuffle_seed": None, "sidecars": EVERY_SIDECAR}
    for workers in (0, 1, 3):
        manifest = pack(source, tmp_path / str(workers), workers=workers, **options)
    # The fifth shard is empty, and the numbers of the others close up.
    assert [shard.samples for shard in manifest.shards] == [4, 4, 5, 5, 5, 5, 5, 5, 1]
    assert [shard.name for shard in manifest.shards] == [f"{n:06d}.tar" for n in range(9)]
    assert len(manifest.problems) == 8
    assert [one.key for one in manifest.problems] == [
        f"k{n:03d}" for n in sorted([0, 9, 20, 21, 22, 23, 24, 46])
    ]
    assert files(tmp_path / "0") == files(tmp_path / "1") == files(tmp_path / "3")
    plain = pack(iter(source.records), tmp_path / "iterable", workers=3, **options)
    assert plain.fingerprint == manifest.fingerprint
    assert files(tmp_path / "iterable") == files(tmp_path / "0")


@pytest.mark.parametrize("workers", [0, 3])
def test_a_pack_that_broke_goes_on_where_it_was(tmp_path, workers):
    whole = pack(Numbered(30, bad=[4, 17]), tmp_path / "whole", samples_per_shard=5)
    out, said = tmp_path / "out", []
    broken = Numbered(30, bad=[4, 17], at=22, act=breaks)
    with pytest.raises(OSError, match="the source broke"):
        pack(broken, out, samples_per_shard=5, workers=workers, progress=broken.arm)
    before = shards_at_work(out)
    assert {"000000.tar", "000001.tar"} <= set(before)
    assert "000004.tar" not in before
    calls = []
    again = pack(
        Numbered(30, bad=[4, 17]),
        out,
        samples_per_shard=5,
        workers=workers,
        tell=said.append,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert again.fingerprint == whole.fingerprint
    assert again.problems == whole.problems
    assert files(out) == files(tmp_path / "whole")
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.tar")}
    assert {name: after[name] for name in before} == before
    assert said == [
        f"{out}: going on with the pack that was cut off, {len(before)} of 6 shards are done"
    ]
    assert calls[-1] == (30, 30)


def breaks():
    raise OSError("the source broke")


def cut_off(out, **options):
    broken = Numbered(12, at=11, act=breaks, **options)
    with pytest.raises(OSError, match="the source broke"):
        pack(broken, out, samples_per_shard=5, progress=broken.arm)
    return shards_at_work(out)


@pytest.mark.parametrize(
    "changed",
    [
        {"samples_per_shard": 4},
        {"shuffle_seed": 1},
        {"recoding": Recode(resize=4)},
        {"limits": Limits(pixels=10_000)},
        {"sidecars": ["img2dataset"]},
        {"source": "another"},
        {"source": "longer"},
    ],
)
def test_another_source_or_other_options_start_anew(tmp_path, changed):
    out = tmp_path / "out"
    assert len(cut_off(out)) == 2
    source, options = Numbered(12), {"samples_per_shard": 5, **changed}
    if (what := options.pop("source", "")) == "another":
        source.identity = "else"
    elif what == "longer":
        source.records += [Record("more", picture(1), "more")]
    said = []
    pack(source, out, tell=said.append, **options)
    assert said == [
        f"{out}: what was begun here was another source or other options; starting anew"
    ]
    pack(source, tmp_path / "fresh", **options)
    assert files(out) == files(tmp_path / "fresh")


def test_a_shard_that_was_damaged_since_is_written_anew(tmp_path):
    out = tmp_path / "out"
    before = cut_off(out)
    (out / WORK_FOLDER / "000000.tar").write_bytes(b"cut")
    (out / WORK_FOLDER / ".000002.tar.9.partial").write_bytes(b"half")
    pack(Numbered(12), out, samples_per_shard=5)
    pack(Numbered(12), tmp_path / "fresh", samples_per_shard=5)
    assert files(out) == files(tmp_path / "fresh")
    assert (out / "000001.tar").stat().st_ino == before["000001.tar"][0]


def test_kept_shards_are_held_to_strictness_too(tmp_path):
    cut_off(tmp_path, bad=[1])
    with pytest.raises(ValueError, match=r"'k001': undecodable .* strict packing stops"):
        pack(Numbered(12, bad=[1]), tmp_path, samples_per_shard=5, strict=True)


def test_the_first_bad_record_ends_a_strict_pack_whatever_the_workers(tmp_path):
    for workers in (0, 4):
        with pytest.raises(ValueError, match="'k007': undecodable"):
            pack(
                Numbered(30, bad=[7, 21, 29]),
                tmp_path / str(workers),
                samples_per_shard=5,
                strict=True,
                workers=workers,
            )


def test_a_key_that_comes_twice_is_found_over_shards(tmp_path):
    source = Numbered(30, bad=[3])
    for first, second in ((2, 28), (3, 12), (1, 4)):
        twins = Numbered(0, identity=f"{first} {second}")
        twins.records = list(source.records)
        twins.records[second] = dataclasses.replace(
            source.records[second], key=source.records[first].key
        )
        for workers in (0, 2):
            with pytest.raises(ValueError, match=f"the key 'k00{first}' comes twice"):
                pack(twins, tmp_path, samples_per_shard=5, workers=workers)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    left = [
        11
    ]  # syncs: of a file and its folder, for the plan and then for tar and note of a shard
    sync = os.fsync

    def fills(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fills)
    message = (
        r"No space left on device; 2 finished shards stay; make room and give the same command"
    )
    out = tmp_path / "out"
    with pytest.raises(OSError, match=message) as caught:
        pack(Numbered(30), out, samples_per_shard=5)
    assert caught.value.filename == str(out)
    monkeypatch.undo()
    before = shards_at_work(out)
    assert len(before) == 2
    pack(Numbered(30), out, samples_per_shard=5)
    pack(Numbered(30), tmp_path / "fresh", samples_per_shard=5)
    assert files(out) == files(tmp_path / "fresh")
    assert (out / "000001.tar").stat().st_ino == before["000001.tar"][0]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_move_that_was_cut_off_is_ended(tmp_path, monkeypatch, overwrite):
    options = {"samples_per_shard": 6, "sidecars": ["sizes", "energon"]}
    expected = pack(Numbered(12), tmp_path / "whole", **options)
    began = tmp_path / "began"
    if overwrite:  # more shards and other sidecars than the new set has
        pack(records(15), began, samples_per_shard=5, sidecars=["nshards", "energon"])
    with monkeypatch.context() as patch:
        kill_in_move(patch, began, after=0)
        with pytest.raises(Killed):
            pack(Numbered(12), began, overwrite=overwrite, **options)
    assert (began / WORK_FOLDER / "move.json").is_file()
    steps, out, ended = 0, tmp_path, False
    while not ended:
        out = tmp_path / str(steps)
        shutil.copytree(began, out)
        try:
            with monkeypatch.context() as patch:
                kill_in_move(patch, out, after=steps)
                again = pack(Numbered(12), out, **options)
            ended = True
        except Killed:
            assert_not_mixed(out)
            again = pack(Numbered(12), out, **options)
        assert again.fingerprint == expected.fingerprint
        assert files(out) == files(tmp_path / "whole")
        steps += 1
    assert steps > 8


def assert_not_mixed(out):
    """Where there is a manifest, all its shards are there as it says."""
    if (out / "manifest.json").exists():
        for shard in Manifest.load(out).shards:
            data = (out / shard.name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard.sha256


class Killed(BaseException):
    """Stands in for a process that is gone."""


def kill_in_move(patch, out, *, after):
    """Lets a pack die once it has changed so many names while it moves shards into place."""
    left = [after]

    def killable(act):
        def acts(self, *arguments, **options):
            if (out / WORK_FOLDER / "move.json").exists() and out in self.parents:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return act(self, *arguments, **options)

        return acts

    # The last two names, of order and plan, are only reached when all else is done.
    for name in ("replace", "unlink"):
        patch.setattr(Path, name, killable(getattr(Path, name)))


def test_a_pack_that_was_killed_goes_on(tmp_path):
    """A real process, killed with -9 in the middle of a shard."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(picture(number))
        (folder / f"{number:02d}.txt").write_text(f"caption {number}")
    script = f"""
import os, signal
from shards.sources import FolderSource
from shards.packing import pack

class Deadly(FolderSource):
    def record(self, index):
        if index == 23:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().record(index)

pack(Deadly({str(folder)!r}), {str(tmp_path / "out")!r}, samples_per_shard=5)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    before = shards_at_work(tmp_path / "out")
    assert sorted(before) == [f"{number:06d}.tar" for number in range(4)]
    said = []
    again = pack(FolderSource(folder), tmp_path / "out", samples_per_shard=5, tell=said.append)
    fresh = pack(FolderSource(folder), tmp_path / "fresh", samples_per_shard=5)
    assert "4 of 8 shards are done" in said[0]
    assert files(again.folder) == files(fresh.folder)
    after = {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in again.folder.glob("*.tar")
    }
    assert {name: after[name] for name in before} == before


def test_an_interrupt_ends_the_threads_at_once(tmp_path):
    entered, seen = threading.Event(), []

    class Slow(Numbered):
        def record(self, index):
            seen.append(index)
            time.sleep(0.01)
            return self.records[index]

    def interrupt():
        entered.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    # The signal reaches the main thread, which waits for the first shard.
    timer = threading.Thread(target=interrupt)
    # A shell's background job starts with interrupts ignored; a terminal's does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pack(
                Slow(1000),
                tmp_path,
                samples_per_shard=500,
                workers=2,
                progress=lambda *_: entered.set(),
            )
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert 0 < len(seen) < 500
    assert not [one for one in threading.enumerate() if one.name.startswith("pack")]


def test_several_captions_come_back(tmp_path):
    several = [
        Record("a", picture(1), None, {"n": 1}, captions=["one\ncat", " ", "a cat"]),
        Record("b", picture(2), "a dog", {"captions": ["not", "these"]}),
        Record("c", picture(3), None, captions=["", " "]),
        Record("d", picture(4), None, captions=["fine", "\udcff"]),
        Record("e", picture(5), "with a class", members={"cls": b"7"}),
    ]
    manifest = pack(several, tmp_path)
    assert [(one.key, one.reason) for one in manifest.problems] == [
        ("c", Reason.EMPTY_CAPTION),
        ("d", Reason.BAD_TEXT),
    ]
    reader = ShardReader(manifest)
    first, second, last = (reader.read(n, manifest.fields) for n in range(3))
    reader.close()
    assert CaptionRule().read(first, Limits()) == (
        ["one\ncat", "a cat"],
        {"n": 1, "captions": ["one\ncat", "a cat"]},
    )
    assert CaptionRule(("txt.lines",)).read(first, Limits())[0] == ["one cat", "a cat"]
    assert CaptionRule().read(second, Limits()) == (["a dog"], {})
    assert last["cls"] == b"7"
    samples = webdataset_samples(tmp_path, manifest)
    assert [one["txt"] for one in samples] == [b"one cat\na cat", b"a dog", b"with a class"]
    assert samples[2]["cls"] == b"7"


def webdataset_samples(folder, manifest):
    urls = [str(folder / shard.name) for shard in manifest.shards]
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        samples = list(WebDataset(urls, shardshuffle=False))
        gc.collect()  # it leaves the shards open
    return samples


def test_overwriting_takes_sidecars_and_quarantine_away(tmp_path):
    first = pack(records(12), tmp_path, samples_per_shard=5, sidecars=EVERY_SIDECAR)
    first.set_aside({1: first.problem(1, Reason.UNDECODABLE)})
    (tmp_path / "classnames.txt").write_text("mine")
    assert len(Manifest.open(tmp_path)) == 11
    pack(records(3), tmp_path, overwrite=True, sidecars=["sizes"])
    assert set(files(tmp_path)) == {
        *("000000.tar", "manifest.json", "samples.parquet", "sizes.json", "classnames.txt")
    }
    assert len(Manifest.open(tmp_path)) == 3


@pytest.mark.parametrize("name", ["manifest.json", "samples.parquet"])
def test_a_damaged_manifest_is_refused(tmp_path, name):
    pack(records(4), tmp_path)
    data = (tmp_path / name).read_bytes()
    for damaged in (b"", data[: len(data) // 2], data.replace(b"k001", b"k00X") + b" "):
        (tmp_path / name).write_bytes(damaged)
        if name == "manifest.json" and damaged.endswith(b"} "):
            continue
        with pytest.raises(ValueError, match="to scan the shards"):
            Manifest.open(tmp_path)


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path):
    pack(records(4), tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"000000.tar"', '"../000000.tar"'))
    with pytest.raises(ValueError, match="does not belong to"):
        Manifest.load(tmp_path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="this program reads version 1"):
        Manifest.load(tmp_path)


def test_a_scan_is_kept_and_made_anew_when_the_shards_change(tmp_path):
    first = Manifest.open(write_set(tmp_path, [3, 2]))
    stamp = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert Manifest.open(tmp_path).fingerprint == first.fingerprint
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == stamp
    write_set(tmp_path, [3, 2, 4])
    again = Manifest.open(tmp_path)
    assert len(again) == 9
    assert again.fingerprint != first.fingerprint


def test_a_scan_of_what_cannot_be_written_to_is_kept_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_set(tmp_path / "set", [3])
    (folder / "samples.parquet").mkdir()  # stands in for a folder that refuses the file
    assert len(Manifest.open(folder)) == 3
    assert not (folder / "manifest.json").exists()
    assert list((tmp_path / "cache").rglob("manifest.json"))
    assert len(Manifest.open(folder)) == 3


def test_folders_without_shards_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no .tar file$"):
        Manifest.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no manifest.json"):
        Manifest.load(tmp_path)
    write_tar(tmp_path / "0.tar", {"README": b"no sample"})
    with pytest.raises(ValueError, match="no sample in 1 tar files"):
        Manifest.open(tmp_path)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "pairs.parquet"
    columns = {
        "image": [picture(i) for i in range(6)],
        "caption": ["a", "b", "c", "d", "e", None],
        "kind": ["x", "y", "x", "y", "x", "y"],
        "number": list(range(6)),
        "struct": [{"bytes": picture(i), "path": "p"} for i in range(6)],
        "tags": [["t"]] * 6,
    }
    pq.write_table(pa.table(columns), path)
    return path


def test_rows_become_records(table, tmp_path):
    source = ParquetSource([table, table], key="{kind}/{number}", where={"kind": "x"})
    assert len(source) == 6
    assert [one.key for one in source] == ["x-0", "x-2", "x-4"] * 2
    assert [one.image for one in source[:3]] == [picture(i) for i in (0, 2, 4)]
    assert source[-1].caption == "e"
    assert set(source[0].fields) == {"kind", "number", "tags"}
    assert source[1].fields["number"] == 2
    one = ParquetSource(table, image="struct", where={"number": [1, 3], "kind": "y"})
    assert [record.key for record in one] == ["pairs-1", "pairs-3"]
    assert one[0].image == picture(1)
    manifest = pack(ParquetSource(table, key="{number}"), tmp_path / "out")
    assert [problem.key for problem in manifest.problems] == ["5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "picture"}, "no column 'picture'; it has image, caption, kind, number"),
        ({"key": "{vendor}"}, "no column 'vendor'"),
        ({"where": {"sort": 1}}, "no column 'sort'"),
        ({"where": {"kind": "z"}}, r"leaves no row of pairs.parquet \(kind is one of x, y\)"),
        ({"where": {"number": "two"}}, "column 'number' holds int64, which 'two' cannot be"),
        (
            {"image": "number"},
            "column 'number' holds int64; it must hold encoded pictures, or path",
        ),
        ({"image": "kind"}, "there is no picture .*/x; set root to the folder that the paths"),
        ({"caption": "number"}, "column 'number' holds int64; a caption must be a string"),
        ({"caption": "struct"}, "column 'struct' holds struct.*; a caption must be a string"),
        ({"where": {"struct": 1}}, "column 'struct' holds bytes; where cannot look at it"),
    ],
)
def test_wrong_columns_are_told(table, options, message):
    with pytest.raises(ValueError, match=message):
        ParquetSource(table, **options)


def test_wrong_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.parquet does not exist"):
        ParquetSource(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        ParquetSource(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"no .parquet or .pq file was named"):
        ParquetSource([])


def test_a_folder_becomes_records(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "cats").mkdir(parents=True)
    layout = {
        "cats/1.png": picture(1),
        "cats/1.txt": b"one cat",
        "cats/1.json": b'{"caption": "unused", "age": 3}',
        "cats/2.JPG": picture(2),
        "cats/2.json": b'{"caption": "two cats"}',
        "cats/3.png": picture(3),
        "dog.png": picture(4),
        "dog.jpg": picture(5),
        "dog.txt": b"a dog",
        "bad.png": picture(6),
        "bad.json": b"[",
        "latin.png": picture(7),
        "latin.txt": b"caf\xe9",
        ".hidden.png": b"x",
        "notes.md": b"x",
    }
    for name, data in layout.items():
        (folder / name).write_bytes(data)
    manifest = pack(FolderSource(folder), tmp_path / "out", shuffle_seed=0)
    assert {problem.key: problem.reason for problem in manifest.problems} == {
        "cats-3": Reason.NO_CAPTION,
        "bad": Reason.BAD_JSON,
        "latin": Reason.BAD_TEXT,
    }
    found = {}
    for batch in iterate(manifest, batch_size=4, image_size=SIDE):
        found |= dict(zip(batch.keys, zip(batch.captions, batch.fields, strict=True), strict=True))
    assert found.pop("cats-1") == ("one cat", {"age": 3, "file": "cats/1.png"})
    assert found.pop("cats-2") == ("two cats", {"file": "cats/2.JPG"})
    assert sorted(one[1]["file"] for one in found.values()) == ["dog.jpg", "dog.png"]
    assert all(one[0] == "a dog" for one in found.values())


def test_folders_without_pictures_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        FolderSource(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        FolderSource(tmp_path / "none")


@given(st.lists(st.text(max_size=120), unique=True, max_size=8))
def test_keys_are_fit_and_stay_different(names):
    keys = [safe_key(name) for name in names if "/" not in name]
    assert all(0 < len(key) <= MAX_KEY for key in keys)
    assert all(key.isascii() and not set(key) & set("./ ") for key in keys)
    assert len(set(keys)) == len(keys)
    assert safe_key("noto-1f600") == "noto-1f600"


def test_the_demo_has_its_splits(tmp_path):
    counts = {name: len(split.records()) for name, split in SPLITS.items()}
    assert counts == {"train": 9459, "vendor": 3496, "unseen": 1219}
    assert sum(counts.values()) == 14_174
    unseen = SPLITS["unseen"].records()
    manifest = pack(unseen[::10], tmp_path, shuffle_seed=0)
    assert not manifest.problems
    batch = next(ShardLoader(manifest, batch_size=32, image_size=64))
    assert {fields["concept_split"] for fields in batch.fields} == {"unseen"}
    assert len({fields["vendor"] for fields in batch.fields}) > 2
    assert "name" not in batch.fields[0]
    assert batch.keys[0] == "{vendor}-{codepoints}".format(**batch.fields[0])


def test_the_demo_names_its_sources():
    text = (FOLDER / "README.md").read_text("utf-8")
    for path in FOLDER.glob("*.parquet"):
        assert f"`{path.name}`" in text
    licences = {path.stem for path in (FOLDER / "LICENSES").iterdir()}
    assert licences == {"Apache-2.0", "OFL-1.1", "MIT", "CC-BY-4.0", "Unicode-3.0"}
    assert "Copyright Twitter, Inc and other contributors" in text


@pytest.mark.parametrize(
    "record",
    [
        {"caption": "half a pair: \ud800"},
        {"caption": "x", "fields": {"title": "half a pair: \udfff"}},
        {"caption": "x", "fields": {"\ud800": 1}},
    ],
)
def test_text_that_is_no_unicode_is_a_bad_record(tmp_path, record):
    records = [Record("a", picture(1), **record), Record("b", picture(2), "fine")]
    manifest = pack(records, tmp_path / "out")
    assert [problem.reason for problem in manifest.problems] == [Reason.BAD_TEXT]
    assert manifest.keys.to_pylist() == ["b"]
