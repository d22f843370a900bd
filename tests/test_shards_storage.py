"""Places by name, compressed shards, the local cache, and what is told to be read soon."""

import errno
import gzip
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from shards_corpus import write_set

from shards.damage import BadSample, Reason
from shards.loader import ShardLoader
from shards.manifest import Manifest
from shards.read import ShardReader
from shards.storage import LocalStorage, Reading, storage_of, unpack
from shards.storage.cache import Cache

SIZES = [30, 20, 25]


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def packed(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".zst"):
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return gzip.compress(data, mtime=0)


def pack_all(folder: Path, suffix: str, into: Path) -> Path:
    into.mkdir()
    for path in folder.glob("*.tar"):
        (into / path.name.replace(".tar", suffix)).write_bytes(packed(path.read_bytes(), suffix))
    return into


def batches(place: Path | str | Manifest, count: int = 5) -> list[tuple[bytes, list[str]]]:
    with ShardLoader(place, batch_size=20, image_size=8, lanes=4, window=16) as loader:
        return [(next(loader).images.numpy().tobytes(), next(loader).keys) for _ in range(count)]


def test_places_by_name(tmp_path):
    folder = write_set(tmp_path / "set", SIZES)
    whole = storage_of(folder)
    assert [name for name, _ in whole.tars()] == ["000.tar", "001.tar", "002.tar"]
    assert (whole.url, whole.folder, whole.names) == (str(folder), folder, None)
    assert storage_of(f"{folder}/").tars() == storage_of(f"file://{folder}").tars() == whole.tars()
    assert storage_of(f"{folder}/001.tar").tars() == whole.tars()[1:2]
    assert storage_of(f"{folder}/{{000..001}}.tar").tars() == whole.tars()[:2]
    assert storage_of(f"{folder}/{{000,002}}.tar").names == ("000.tar", "002.tar")
    with pytest.raises(FileNotFoundError, match=r"holds no 003\.tar"):
        storage_of(f"{folder}/{{000..003}}.tar").tars()
    with pytest.raises(FileNotFoundError, match="not a folder"):
        storage_of(tmp_path / "nowhere").tars()


def test_a_compressed_shard_beside_itself_is_not_read_twice(tmp_path):
    folder = write_set(tmp_path / "set", SIZES)
    for name in ("000.tar.gz", "000.tgz", "001.tar.zst", "00.part.tar.gz", ".002.tar.gz", "x.gz"):
        (folder / name).touch()
    names = [name for name, _ in storage_of(folder).tars()]
    assert names == ["00.part.tar.gz", "000.tar", "001.tar", "002.tar"]


def test_names_that_cannot_be_read_are_refused_with_one_line(tmp_path):
    for place in ("pipe:cat x.tar", "pipe://cat", "zip://a::http://h/b", "simplecache::s3://b/x"):
        with pytest.raises(ValueError, match="neither commands nor chained") as caught:
            storage_of(place)
        assert "http" in str(caught.value)
    with pytest.raises(ValueError, match="known are paths, file, http, https, s3, gs"):
        storage_of("nonsense://bucket/x.tar")
    with pytest.raises(ValueError, match="file name only"):
        storage_of("http://host/{a,b}/x.tar")
    with pytest.raises(ValueError, match="more than 1,000,000 shards"):
        storage_of("a/{0..99999}-{0..99999}.tar")
    with pytest.raises(ValueError, match=r"\{0\.\.3"):
        storage_of("a/{0..3.tar")


def test_a_missing_library_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs:// .*pip install 'clip-align\[gs\]'"):
        storage_of("gs://bucket/x.tar")


def test_options_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        Reading(timeout_s=0.0)
    with pytest.raises(ValueError, match="at least 1"):
        Reading(tries=0)
    monkeypatch.setenv("CLIP_ALIGN_CACHE_BYTES", "1000")
    assert Reading().cache_bytes == 1000
    monkeypatch.setenv("CLIP_ALIGN_CACHE_BYTES", "20 GB")
    with pytest.raises(ValueError, match="CLIP_ALIGN_CACHE_BYTES='20 GB' must be a number"):
        Reading()


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_shards_give_the_same_batches(tmp_path, suffix):
    folder = write_set(tmp_path / "set", SIZES)
    compressed = pack_all(folder, suffix, tmp_path / "packed")
    manifest = Manifest.open(compressed)
    assert not manifest.problems
    assert [shard.bytes for shard in manifest.shards] == [
        (compressed / shard.name).stat().st_size for shard in manifest.shards
    ]
    assert batches(manifest) == batches(folder)
    assert batches(Manifest.open(compressed)) == batches(folder)


def test_shards_are_unpacked_once(tmp_path, monkeypatch):
    folder = pack_all(write_set(tmp_path / "set", SIZES), ".tar.gz", tmp_path / "packed")
    Manifest.open(folder)

    def fail(*_: object) -> None:
        raise AssertionError("unpacked again")

    monkeypatch.setattr(unpack, "_sound_part", fail)
    assert batches(folder)
    # Another file under the same name is another shard.
    data = gzip.decompress((folder / "000.tar.gz").read_bytes())
    (folder / "000.tar.gz").write_bytes(gzip.compress(data, 1))
    with pytest.raises(AssertionError, match="unpacked again"):
        batches(folder)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_what_was_unpacked_before_damage_is_used_and_the_damage_told(tmp_path, suffix):
    folder = tmp_path / "set"
    folder.mkdir()
    data = (write_set(tmp_path / "plain", [200]) / "000.tar").read_bytes()
    half = packed(data[: len(data) // 2 + 100], suffix), packed(data, suffix)[:-3000]
    wrong = bytearray(packed(data, suffix))
    wrong[-6 if suffix == ".tar.gz" else -2] ^= 255
    for name, content in zip("abc", (*half, bytes(wrong)), strict=True):
        (folder / f"{name}{suffix}").write_bytes(content)
    manifest = Manifest.open(folder)
    told = {problem.shard[0] for problem in manifest.problems}
    assert told == {"a", "b", "c"}, manifest.problems
    reasons = {problem.reason for problem in manifest.problems}
    assert reasons <= {Reason.TRUNCATED, Reason.BAD_HEADER}, "where half a header is left"
    sizes = [shard.samples for shard in manifest.shards]
    assert sizes[0] in (101, 102), sizes
    assert 20 < sizes[1] < 200, sizes
    assert 100 < sizes[2] <= 200, sizes
    reader = ShardReader(manifest)
    bad: list[Reason] = []
    for sample in range(len(manifest)):
        try:
            found = reader.read(sample, ("txt",))
        except BadSample as sample_is_bad:
            bad.append(sample_is_bad.reason)
        else:
            assert found in ({}, {"txt": b"caption %d" % int(manifest.keys[sample].as_py())})
    assert bad in ([Reason.TRUNCATED] * times for times in range(4)), "only the last of each shard"


def test_what_is_no_archive_is_told_and_not_raised(tmp_path):
    folder = write_set(tmp_path / "set", [10])
    (folder / "noise.tar.gz").write_bytes(bytes(range(256)) * 9)
    (folder / "noise2.tar.zst").write_bytes(bytes(range(256)) * 9)
    (folder / "empty.tar.gz").write_bytes(b"")
    (folder / "named.tar.gz").write_bytes((folder / "000.tar").read_bytes())
    manifest = Manifest.open(folder)
    assert len(manifest) == 20
    assert {problem.shard for problem in manifest.problems} >= {"noise.tar.gz", "noise2.tar.zst"}


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "_BOMB_BYTES", 1 << 20)
    folder = write_set(tmp_path / "set", [10])
    data = (folder / "000.tar").read_bytes().rstrip(b"\0") + bytes(1 << 27)
    (folder / "bomb.tar.gz").write_bytes(gzip.compress(data))
    manifest = Manifest.open(folder)
    assert [problem.shard for problem in manifest.problems] == ["bomb.tar.gz"]
    held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert held < 1 << 25


def test_without_room_compressed_shards_are_bad_samples(tmp_path):
    folder = pack_all(write_set(tmp_path / "set", [9]), ".tar.gz", tmp_path / "packed")
    storage = storage_of(folder, reading=Reading(cache_bytes=0))
    with pytest.raises(BadSample, match="no room to unpack"):
        storage.read("000.tar.gz", 0, 10)


def test_two_processes_unpack_one_shard_together(tmp_path):
    folder = pack_all(write_set(tmp_path / "set", [200]), ".tar.gz", tmp_path / "packed")
    code = (
        "import sys; from shards.storage import storage_of; "
        "print(len(storage_of(sys.argv[1]).read('000.tar.gz', 0, 100_000)))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0] for process in both] == ["100000\n"] * 2
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len([path for path in files if not path.name.startswith(".")]) == 1
    assert not [path for path in files if path.suffix == ".partial"]


def test_the_cache_keeps_its_limit_and_what_was_used_last(tmp_path):
    cache = Cache(tmp_path / "held", 100_000)
    for number in range(60):
        cache.add(str(number), [bytes(4000), bytes(1000)])
        assert cache.open("0") is not None, "it was used all the time"
        # The clock of file systems is coarse; nothing else tells the order.
        for path in (tmp_path / "held").iterdir():
            status = path.stat()
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))
    assert sum(path.stat().st_size for path in (tmp_path / "held").iterdir()) <= 100_000
    assert cache.open("30") is None
    assert cache.open("59") is not None


def test_a_damaged_torn_or_foreign_file_is_a_miss(tmp_path):
    held = tmp_path / "held"
    Cache(held, 1 << 20).add("a", [b"content" * 100])
    (path,) = held.iterdir()
    good = path.read_bytes()
    flipped = bytes([good[0] ^ 1, *good[1:]])
    for bad in (flipped, good[:-1], good + b"x", b"", good[:10]):
        path.write_bytes(bad)
        assert Cache(held, 1 << 20).open("a") is None
    Cache(held, 1 << 20).add("b", [b"other"])
    (other,) = held.iterdir()
    other.rename(path)
    assert Cache(held, 1 << 20).open("a") is None
    path.write_bytes(good)
    file = Cache(held, 1 << 20).open("a")
    assert file is not None
    assert file.read(0, 700) == b"content" * 100


def test_a_failing_source_leaves_nothing_in_the_cache(tmp_path):
    def chunks():
        yield b"begun"
        raise OSError("the server is gone")

    cache = Cache(tmp_path / "held", 1 << 20)
    with pytest.raises(OSError, match="the server is gone"):
        cache.add("a", chunks())
    assert not list((tmp_path / "held").iterdir())
    assert not cache.is_off


def test_a_disk_that_fails_turns_the_cache_off_with_one_line(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "held", 1 << 20)
    with caplog.at_level(logging.WARNING):
        assert cache.add("a", [b"x"]) is None
        assert cache.add("b", [b"x"]) is None
        assert cache.open("a") is None
    assert cache.is_off
    (record,) = caplog.records
    assert "going on without this cache" in record.getMessage()


def test_a_full_disk_turns_it_off_and_gives_half_back(tmp_path, monkeypatch, caplog):
    cache = Cache(tmp_path / "held", 100_000)
    for number in range(18):
        cache.add(str(number), [bytes(5000)])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert cache.add("last", [bytes(5000)], durable=True) is None
    assert "No space left on device" in caplog.text
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "held").iterdir()) <= 50_000


def test_a_file_that_was_evicted_stays_readable(tmp_path):
    cache = Cache(tmp_path / "held", 1000)
    file = cache.add("large", [b"y" * 5000])
    assert file is not None
    assert not list((tmp_path / "held").iterdir())
    assert file.read(4990, 10) == b"y" * 10


def test_local_shards_by_offset(tmp_path):
    folder = write_set(tmp_path / "set", [30])
    data = (folder / "000.tar").read_bytes()
    storage = LocalStorage(folder)
    assert storage.read("000.tar", 100, 700) == data[100:800]
    storage.ahead("000.tar", 0, 10_000)
    storage.ahead("none.tar", 0, 10)
    with pytest.raises(BadSample) as caught:
        storage.read("000.tar", len(data) - 10, 11)
    assert caught.value.reason is Reason.TRUNCATED
    with pytest.raises(BadSample) as caught:
        storage.read("none.tar", 0, 1)
    assert caught.value.reason is Reason.SHARD_MISSING
    (folder / "none.tar").mkdir()
    with pytest.raises(BadSample) as caught:
        storage.read("none.tar", 0, 1)
    assert caught.value.reason is Reason.UNREADABLE
    with storage.open("000.tar") as stream:
        stream.seek(-10, io.SEEK_END)
        assert stream.read() == data[-10:]
    storage.close()
    assert storage.read("000.tar", 0, 5) == data[:5]


def test_few_files_stay_open(tmp_path):
    folder = write_set(tmp_path / "set", [2] * 9)
    storage = LocalStorage(folder, max_open=3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name, size in storage.tars():
        storage.read(name, 0, size)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


def test_what_is_ahead_is_told_in_runs_per_shard(tmp_path):
    folder = write_set(tmp_path / "set", [40, 40])
    manifest = Manifest.open(folder)
    told: list[tuple[str, int, int]] = []

    class Told(LocalStorage):
        def ahead(self, name: str, offset: int, size: int) -> None:
            told.append((name, offset, offset + size))

    manifest.storages = (Told(folder),)
    reader = ShardReader(manifest)
    reader.ahead(np.array([79, 3, 1, 2, 41, 40], np.int64))
    assert [name for name, _, _ in told] == ["000.tar", "001.tar", "001.tar"], "79 lies apart"
    for sample in (1, 2, 3, 40, 41, 79):
        name = manifest.shards[int(manifest.shard_numbers[sample])].name
        for offsets, sizes in manifest.spans.values():
            assert any(
                name == shard
                and start <= offsets[sample]
                and offsets[sample] + sizes[sample] <= stop
                for shard, start, stop in told
            )
    assert told[0][1] == manifest.spans["json"][0][1], "what is not needed is left out"
    told.clear()
    reader.ahead(np.array([5], np.int64), ["txt"])
    offsets, sizes = manifest.spans["txt"]
    assert told == [("000.tar", offsets[5], offsets[5] + sizes[5])]
    reader.ahead(np.array([], np.int64))
    reader.ahead(np.array([5], np.int64), ["mp3"])
    assert len(told) == 1
