"""Shards behind http and s3: the same batches, few requests, and no trouble that ends a run."""

import functools
import gc
import gzip
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import fsspec.config
import pytest
from http_server import Site, serving
from shards_corpus import write_set

from shards.damage import BadSample, DamageTally, Reason, TooMuchDamageError
from shards.loader import ShardLoader, iterate
from shards.manifest import Manifest
from shards.read import ShardReader
from shards.storage import Reading, Storage, storage_of

SIZES = [50, 40, 60]
BLOCK = 1 << 14


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_set(tmp_path / "set", SIZES)


@pytest.fixture
def site(folder) -> Iterator[Site]:
    with serving(folder) as site:
        yield site


# A third of the limit is the time for an answer to begin, which a busy machine may need.
quick = functools.partial(Reading, timeout_s=6.0, tries=3, wait_s=0.01, block_bytes=BLOCK)


def at(site: Site, reading: Reading | None = None) -> Storage:
    return storage_of(site.url, reading=reading or quick())


def bodies(site: Site) -> list[tuple[str, str]]:
    """The requests for more of a shard than its size."""
    return [entry for entry in site.log if ".tar" in entry[0] and entry[1] != "bytes=0-0"]


def elsewhere(manifest: Manifest, storage: Storage) -> Manifest:
    """The same data set, read from another place."""
    return Manifest(storage, manifest.shards, manifest.samples, manifest.problems)


def batches(place: Path | str | Manifest, *, workers: int = 0) -> list[tuple[bytes, list[str]]]:
    with ShardLoader(
        place, batch_size=20, image_size=8, lanes=4, window=16, workers=workers
    ) as loader:
        return [
            (batch.images.numpy().tobytes(), batch.captions)
            for batch, _ in zip(loader, range(8), strict=False)
        ]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_over_http(folder, site, workers):
    from_folder = batches(folder)
    assert batches(site.url, workers=workers) == from_folder
    assert batches(f"{site.url}/{{000..002}}.tar", workers=workers) == from_folder
    # A second time the manifest comes from the cache, and so do the blocks.
    site.log.clear()
    assert batches(site.url, workers=workers) == from_folder
    assert not bodies(site)


def test_a_packed_set_is_found_by_its_manifest(folder, site):
    Manifest.open(folder)
    site.log.clear()
    manifest = Manifest.open(site.url)
    assert manifest.fingerprint == Manifest.open(folder).fingerprint
    assert not [
        path for path, wanted in site.log if path.endswith(".tar") and wanted != "bytes=0-0"
    ]


def test_requests_are_for_blocks_and_not_for_members(folder, site):
    manifest = elsewhere(Manifest.open(folder), at(site))
    batches(manifest, workers=2)
    blocks = sum(-(-shard.bytes // BLOCK) for shard in manifest.shards)
    assert len(bodies(site)) == len(set(bodies(site))), "no block comes twice"
    assert len(bodies(site)) <= blocks < sum(SIZES)
    assert len(site.log) - len(bodies(site)) <= len(manifest.shards)


def test_a_block_is_fetched_once_whoever_wants_it(folder, site):
    size = (folder / "000.tar").stat().st_size
    storage = at(site)
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, size - 500, 500):
            pool.submit(storage.read, "000.tar", start, 500)
            pool.submit(storage.ahead, "000.tar", start, 5000)
    assert len(site.log) == len(set(site.log))
    assert len(site.log) <= 1 + -(-size // BLOCK)


def test_what_was_announced_is_there_when_it_is_read(folder, site):
    storage = at(site, quick(timeout_s=5.0))
    storage.ahead("000.tar", 0, 3 * BLOCK)
    storage.ahead("000.tar", 0, 3 * BLOCK)
    deadline = time.monotonic() + 20
    while len(site.log) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert storage.read("000.tar", 0, 3 * BLOCK) == (folder / "000.tar").read_bytes()[: 3 * BLOCK]
    assert len(site.log) == 4


def test_a_second_process_asks_nothing(folder, site, tmp_path):
    code = (
        "import sys\n"
        "from shards.storage import Reading, storage_of\n"
        "storage = storage_of(sys.argv[1], reading=Reading(block_bytes=16384))\n"
        "storage.expect({'000.tar': (int(sys.argv[2]), 'its hash')})\n"
        "sys.stdout.buffer.write(storage.read('000.tar', 0, int(sys.argv[2])))\n"
    )
    data = (folder / "000.tar").read_bytes()
    command = [sys.executable, "-c", code, site.url, str(len(data))]
    assert subprocess.run(command, capture_output=True, timeout=60).stdout == data
    assert len(site.log) == -(-len(data) // BLOCK)
    site.log.clear()
    assert subprocess.run(command, capture_output=True, timeout=60).stdout == data
    assert not site.log


def test_two_processes_read_at_once(folder, site):
    code = (
        "import sys\n"
        "from shards.storage import Reading, storage_of\n"
        "storage = storage_of(sys.argv[1], reading=Reading(block_bytes=4096, cache_bytes=60000))\n"
        "for _ in range(3):\n"
        "    for name, size in storage.tars():\n"
        "        sys.stdout.buffer.write(storage.read(name, 0, size))\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, site.url], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.tar")))
    assert [process.communicate(timeout=60)[0] for process in both] == [data * 3] * 2


def test_the_cache_keeps_its_limit(folder, site, tmp_path):
    storage = at(site, quick(cache_bytes=5 * BLOCK))
    for name, size in storage.tars():
        storage.read(name, 0, size)
    held = [path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert 0 < sum(held) <= 5 * BLOCK


def test_without_a_cache_it_still_reads(folder, site):
    manifest = elsewhere(Manifest.open(folder), at(site, quick(cache_bytes=0)))
    assert batches(manifest, workers=2) == batches(folder)


def test_damage_in_the_cache_is_no_damage_of_the_data(folder, site, tmp_path):
    data = (folder / "000.tar").read_bytes()
    assert at(site).read("000.tar", 0, len(data)) == data
    for number, path in enumerate(sorted((tmp_path / "cache").rglob("*"))):
        if path.is_file():
            held = path.read_bytes()
            path.write_bytes(held[: len(held) // 2] if number % 2 else b"\x80" + held[1:])
    assert at(site).read("000.tar", 0, len(data)) == data


@pytest.mark.parametrize("fault", ["503", "429", "drop", "short", "gone", "stall"])
def test_trouble_that_passes_is_not_seen(folder, site, fault):
    site.break_down(fault, times=2)
    data = (folder / "000.tar").read_bytes()
    assert at(site).read("000.tar", 0, len(data)) == data


@pytest.mark.parametrize(
    ("fault", "requests", "detail"),
    [
        ("503", 3, "HTTP 503 Service Unavailable"),
        ("drop", 3, "the answer broke off"),
        ("short", 3, "bytes came"),
        ("gone", 3, "Server disconnected"),
        ("stall", 3, "no answer in time"),
        ("403", 1, "HTTP 403 Forbidden"),
        ("shifted", 1, "other bytes than it was asked for"),
        ("404", 1, ""),
    ],
)
def test_trouble_that_stays_is_a_bad_sample(folder, site, fault, requests, detail):
    storage = at(site)
    storage.read("000.tar", 0, 10)
    site.log.clear()
    site.break_down(fault)
    said = []
    for _ in range(3):
        with pytest.raises(BadSample) as caught:
            storage.read("000.tar", BLOCK, 10)
        said.append(str(caught.value))
        expected = Reason.SHARD_MISSING if fault == "404" else Reason.UNREADABLE
        assert caught.value.reason is expected
    assert len(set(said)) == 1
    assert f"{site.url}/000.tar" in said[0]
    assert detail in said[0]
    # A connection that was lost while idle is opened anew by the client itself.
    assert requests <= len(site.log) <= requests * (2 if fault == "gone" else 1)


def test_a_place_that_is_down_gets_one_try_until_it_is_back(folder, site):
    storage = at(site)
    data = (folder / "000.tar").read_bytes()
    storage.read("000.tar", 0, 10)
    site.break_down("503")
    site.log.clear()
    for block in range(1, 5):
        with pytest.raises(BadSample):
            storage.read("000.tar", block * BLOCK, 10)
    assert len(site.log) == 3 + 1 + 1 + 1
    site.break_down("")
    assert storage.read("000.tar", 5 * BLOCK, 10) == data[5 * BLOCK :][:10]
    site.break_down("503", times=2)
    assert storage.read("000.tar", 6 * BLOCK, 10) == data[6 * BLOCK :][:10]


@pytest.mark.parametrize("fault", ["stall", "gone", "404"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_vanishes_stops_the_run_and_everything_is_counted(
    folder, site, fault, workers
):
    manifest = elsewhere(Manifest.open(folder), at(site))
    with ShardLoader(
        manifest, batch_size=10, image_size=8, lanes=4, window=16, workers=workers
    ) as loader:
        next(loader)
        site.break_down(fault)
        with pytest.raises((TooMuchDamageError, ValueError), match=r"bad|readable"):
            list(loader)


def test_one_missing_shard_costs_its_own_samples_only(folder, site):
    manifest = elsewhere(Manifest.open(folder), at(site))
    site.break_down("404", paths="001.tar")
    tally = DamageTally(total=len(manifest))
    passed = list(iterate(manifest, batch_size=16, image_size=8, tally=tally, workers=2))
    assert tally.reasons == {Reason.SHARD_MISSING.value: SIZES[1]}
    assert sum(map(len, passed)) == SIZES[0] + SIZES[2]
    assert tally.seen == sum(SIZES)


def test_a_server_that_ignores_ranges_gives_whole_shards_once(folder, site):
    site.break_down("no_range")
    manifest = Manifest.open(site.url)
    assert batches(manifest, workers=2) == batches(folder)
    assert batches(site.url) == batches(folder)
    whole = [path for path, _ in site.log].count("/000.tar")
    # Each process asks for the size once; a body that is not read is no transfer.
    assert whole <= 4
    storage = at(site)
    data = (folder / "000.tar").read_bytes()
    storage.expect({"000.tar": (len(data), "a hash that spares the question")})
    storage.ahead("000.tar", 0, 10)
    assert storage.read("000.tar", 3 * BLOCK, 10) == data[3 * BLOCK :][:10]
    with pytest.raises(BadSample, match="no byte ranges"):
        at(site, quick(cache_bytes=1 << 16)).read("000.tar", 0, 10)


def test_a_shard_that_changed_is_refused_and_not_mixed(folder, site):
    storage = at(site)
    data = (folder / "000.tar").read_bytes()
    storage.read("000.tar", 0, 10)
    site.tag = "2"
    (folder / "000.tar").write_bytes(data[::-1])
    with pytest.raises(BadSample, match="it changed while it was read"):
        storage.read("000.tar", BLOCK, 10)
    assert at(site).read("000.tar", 0, len(data)) == data[::-1]
    (folder / "000.tar").write_bytes(data[:-512])
    storage = at(site)
    storage.expect({"000.tar": (len(data), "")})
    with pytest.raises(BadSample, match=r"has \d+ bytes; its manifest says"):
        storage.read("000.tar", 0, 10)
    storage.expect({"000.tar": (len(data), "a hash")})
    with pytest.raises(BadSample, match=r"has \d+ bytes now; \d+ were expected"):
        storage.read("000.tar", 0, 10)
    with pytest.raises(BadSample) as caught:
        at(site).read("000.tar", len(data) - 512, 100)
    assert caught.value.reason is Reason.TRUNCATED


def test_what_is_not_there_is_told_at_once(folder, site):
    with pytest.raises(FileNotFoundError, match=r"holds no 003\.tar"):
        storage_of(f"{site.url}/{{000..007}}.tar").tars()
    with pytest.raises(FileNotFoundError, match=r"lists no \.tar file.*name the files"):
        storage_of(f"{site.url}/nowhere").tars()
    assert at(site).small_file("manifest.json") is None
    site.break_down("503")
    with pytest.raises(OSError, match="HTTP 503"):
        at(site).small_file("manifest.json")
    with pytest.raises(OSError, match="HTTP 503"):
        at(site).tars()
    with pytest.raises(OSError, match="HTTP 503"):
        storage_of(f"{site.url}/000.tar", reading=quick()).tars()


def test_a_scan_that_is_cut_off_leaves_no_manifest(folder, site, tmp_path):
    storage = at(site)
    with storage.open("000.tar") as stream:
        stream.read(100)
        site.break_down("503")
        stream.seek(5 * BLOCK)
        with pytest.raises(OSError, match="HTTP 503"):
            stream.read(100)


def test_signatures_and_passwords_are_sent_but_never_shown(folder, site):
    place = site.url.replace("http://", "http://me:secret@") + "/000.tar?signature=hidden"
    storage = storage_of(place, reading=quick())
    assert storage.read("000.tar", 0, 10) == (folder / "000.tar").read_bytes()[:10]
    assert {path for path, _ in site.log} == {"/000.tar?signature=hidden"}
    site.break_down("503")
    with pytest.raises(BadSample) as caught:
        storage.read("000.tar", BLOCK, 10)
    shown = f"{storage!r} {storage.url} {caught.value}"
    assert "secret" not in shown
    assert "hidden" not in shown


def test_names_are_quoted(folder, site):
    data = (folder / "000.tar").read_bytes()
    (folder / "a b#1?.tar").write_bytes(data)
    storage = at(site)
    assert storage.read("a b#1?.tar", 0, 100) == data[:100]


def test_closing_ends_what_is_under_way(folder, site):
    storage = at(site, quick(timeout_s=300.0))
    site.break_down("stall")
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(storage.read, "000.tar", 0, 10)
        while not site.log:
            time.sleep(0.01)
        storage.close()
        with pytest.raises(BadSample, match="closed"):
            under_way.result(timeout=30)
    site.break_down("")
    assert storage.read("000.tar", 0, 10) == (folder / "000.tar").read_bytes()[:10]


def test_a_reader_that_is_stopped_waits_for_nothing(folder, site):
    reader = ShardReader(elsewhere(Manifest.open(folder), at(site, quick(timeout_s=300.0))))
    site.break_down("stall")
    with ThreadPoolExecutor(2) as pool:
        under_way = [pool.submit(reader.read, sample, ("txt",)) for sample in (0, 60)]
        while len(site.log) < 2:
            time.sleep(0.01)
        reader.stop()
        for read in under_way:
            with pytest.raises(BadSample):
                read.result(timeout=30)
    with pytest.raises(BadSample, match="stopped"):
        reader.read(1, ("txt",))
    reader.close()
    site.break_down("")
    assert reader.read(1, ("txt",)) == {"txt": b"caption 1"}


def test_threads_end_when_there_is_nothing_to_do(folder, site):
    storage = at(site)
    before = {thread.name for thread in threading.enumerate()}
    storage.ahead("000.tar", 0, 4 * BLOCK)
    storage.read("000.tar", 0, 4 * BLOCK)
    deadline = time.monotonic() + 20
    while "shards ahead" in {thread.name for thread in threading.enumerate()}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "shards ahead" not in before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_reads_with_connections_of_its_own(folder, site):
    gc.collect()  # file systems of other tests would wait for their loops in the child
    storage = at(site, quick(timeout_s=5.0))
    data = (folder / "000.tar").read_bytes()
    assert storage.read("000.tar", 0, 100) == data[:100]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=lambda: sender.send_bytes(storage.read("000.tar", BLOCK, 3 * BLOCK))
    )
    child.start()
    assert receiver.poll(30)
    assert receiver.recv_bytes() == data[BLOCK : 4 * BLOCK]
    child.join(30)
    assert child.exitcode == 0
    assert storage.read("000.tar", 5 * BLOCK, 100) == data[5 * BLOCK :][:100]


def test_compressed_shards_behind_http(folder, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in folder.glob("*.tar"):
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    with serving(packed) as site:
        assert batches(site.url, workers=2) == batches(folder)
        sizes = [path.stat().st_size for path in sorted(packed.glob("*.gz"))]
        assert [size for _, size in at(site).tars()] == sizes
        site.log.clear()
        assert batches(site.url) == batches(folder)
        assert not bodies(site)
        site.break_down("503")
        with pytest.raises(BadSample, match="HTTP 503"):
            at(site).read("000.tar.gz", 0, 10)


def test_any_other_file_system_of_fsspec(folder):
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    try:
        assert batches("memory://bucket/set", workers=2) == batches(folder)
        with pytest.raises(FileNotFoundError, match=r"holds no 009\.tar"):
            storage_of("memory://bucket/set/009.tar").tars()
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.fixture
def bucket(folder, monkeypatch) -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("pairs")
    for path in folder.glob("*.tar"):
        store.pipe_file(f"pairs/train/{path.name}", path.read_bytes())
    yield "s3://pairs/train"
    server.stop()


def test_an_object_store_that_stalls_is_a_bad_sample(folder, site, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", site.url)
    storage = storage_of("s3://pairs/train", reading=quick(tries=2, timeout_s=0.5))
    site.break_down("stall")
    begin = time.monotonic()
    with pytest.raises(BadSample, match="no answer in time"):
        storage.read("000.tar", 0, 10)
    assert time.monotonic() - begin < 30, "botocore alone would take minutes"
    storage.close()


def test_configuration_of_fsspec_is_used(folder, site, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"X-Token": "abc"}})
    assert at(site).read("000.tar", 0, 10)
    assert {headers["X-Token"] for headers in site.headers} == {"abc"}


def test_an_empty_shard_is_told(folder, site):
    (folder / "001.tar").write_bytes(b"")
    manifest = Manifest.open(site.url)
    assert [shard.samples for shard in manifest.shards] == [SIZES[0], 0, SIZES[2]]
    assert [problem.shard for problem in manifest.problems] == ["001.tar"]


def test_the_same_batches_over_s3(folder, bucket):
    from_folder = batches(folder)
    assert batches(bucket, workers=2) == from_folder
    assert batches(f"{bucket}/{{000..002}}.tar") == from_folder
    storage = storage_of(bucket, reading=quick(timeout_s=10.0))
    assert storage.tars() == storage_of(folder).tars()
    assert storage.small_file("none.json") is None
    data = (folder / "002.tar").read_bytes()
    assert storage.read("002.tar", 100, 3 * BLOCK) == data[100:][: 3 * BLOCK]
    with pytest.raises(FileNotFoundError, match=r"holds no 009\.tar"):
        storage_of(f"{bucket}/009.tar").tars()
    with pytest.raises(BadSample) as caught:
        storage.read("009.tar", 0, 10)
    assert caught.value.reason is Reason.SHARD_MISSING
    storage.close()
