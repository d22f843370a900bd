"""Data sets by place, the quarantine list, and manifests that are kept elsewhere."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards_corpus import SIDE, picture, sample, write_set, write_tar

from shards import catalog as catalog_module
from shards import quarantine as quarantine_module
from shards.catalog import Shard
from shards.damage import Reason
from shards.loader import ShardLoader, iterate
from shards.manifest import Manifest
from shards.packing import pack
from shards.quarantine import QUARANTINE_FILE
from shards.sources import Record
from shards.storage import LocalStorage, cache_folder, storage_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "data", [3, 0, 4, 2])


def numbers(manifest):
    """What the JSON members of all samples say."""
    batches = iterate(manifest, batch_size=4, image_size=SIDE)
    return [fields["number"] for batch in batches for fields in batch.fields]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ("", range(9)),
        ("/", range(9)),
        ("/000.tar", range(3)),
        ("/{000..001}.tar", range(3)),
        ("/{000,003}.tar", [0, 1, 2, 7, 8]),
        ("/00{2..3}.tar", range(3, 9)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_place_names_a_folder_a_shard_or_a_pattern(folder, last, expected, packed):
    if packed:
        Manifest.scan(folder)
        assert (folder / "manifest.json").is_file()
    manifest = Manifest.open(f"{folder}{last}")
    assert numbers(manifest) == list(expected)
    again = Manifest.open(f"{folder}{last}")
    assert again.samples.equals(manifest.samples)
    assert again.fingerprint == manifest.fingerprint


def test_a_pattern_leaves_no_manifest_that_would_speak_for_the_folder(folder):
    Manifest.open(f"{folder}/00{{0..1}}.tar")
    assert not (folder / "manifest.json").exists()
    assert len(Manifest.open(folder)) == 9


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("{data}/nowhere", FileNotFoundError, "nowhere is not a folder"),
        ("{data}/009.tar", FileNotFoundError, "holds no 009.tar"),
        ("{data}/{{000..009}}.tar", FileNotFoundError, "holds no 004.tar"),
        ("{data}/{{000..0.tar", ValueError, "{{000..0.tar"),
        ("{data}{{a,b}}/0.tar", ValueError, "several folders"),
        ("{data}/empty", FileNotFoundError, "holds no .tar"),
    ],
)
def test_a_place_that_cannot_be_read_is_told_in_a_line(folder, place, error, message):
    (folder / "empty").mkdir()
    with pytest.raises(error) as caught:
        Manifest.open(place.format(data=folder))
    assert message.format() in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scan_is_made_anew_when_the_shards_change(folder, tmp_path):
    before = Manifest.open(folder)
    write_set(tmp_path / "other", [3, 0, 4, 2, 5])
    shutil.copy(tmp_path / "other" / "004.tar", folder)
    after = Manifest.open(folder)
    assert (len(before), len(after)) == (9, 14)
    assert before.fingerprint != after.fingerprint


def unwritable(monkeypatch, folder):
    """Makes a folder read-only, also for a super-user."""
    real = catalog_module.replacing

    def refusing(path):
        if path.parent == folder:
            raise PermissionError(13, "read-only", str(path))
        return real(path)

    for module in (catalog_module, quarantine_module):
        monkeypatch.setattr(module, "replacing", refusing)


def set_aside(place, rows):
    manifest = Manifest.open(place, quarantine=False)
    path = manifest.set_aside(
        {row: manifest.problem(row, Reason.UNDECODABLE, "found by a look at all") for row in rows}
    )
    assert path is not None
    return path


@pytest.mark.parametrize("read_only", [False, True])
def test_a_read_only_set_keeps_both_lists_in_the_cache(folder, monkeypatch, read_only):
    if read_only:
        unwritable(monkeypatch, folder)
    Manifest.open(folder)
    path = set_aside(folder, [1, 5])
    home = cache_folder(storage_of(folder), whole=True) if read_only else folder
    assert path == home / QUARANTINE_FILE
    assert {"manifest.json", "quarantine.json", "samples.parquet"} <= {
        path.name for path in home.iterdir()
    }
    assert numbers(Manifest.open(folder)) == [0, 2, 3, 4, 6, 7, 8]


def test_what_is_set_aside_is_out_of_the_order_and_told(folder):
    whole = Manifest.open(folder)
    path = set_aside(folder, [0, 1, 2, 5])  # all of the first shard
    left = Manifest.open(folder)
    assert [shard.samples for shard in left.shards] == [0, 0, 3, 2]
    assert numbers(left) == [3, 4, 6, 7, 8]
    assert [(p.shard, p.key, p.reason) for p in left.problems] == [
        ("000.tar", "00000", Reason.UNDECODABLE),
        ("000.tar", "00001", Reason.UNDECODABLE),
        ("000.tar", "00002", Reason.UNDECODABLE),
        ("002.tar", "00005", Reason.UNDECODABLE),
    ]
    assert left.fingerprint != whole.fingerprint
    with ShardLoader(folder, batch_size=5, image_size=SIDE, lanes=1) as loader:
        for _ in range(3):
            batch = next(loader)
            assert sorted(fields["number"] for fields in batch.fields) == [3, 4, 6, 7, 8]
        report = loader.report()
    assert (report["bad"], len(report["left_out"])) == (0, 4)
    # Another list, another data set; without the list, the first one again.
    set_aside(folder, [0])
    assert Manifest.open(folder).fingerprint not in {left.fingerprint, whole.fingerprint}
    path.unlink()
    assert Manifest.open(folder).fingerprint == whole.fingerprint
    assert len(Manifest.open(folder, quarantine=False)) == 9


def test_a_list_of_other_shards_is_refused(folder, tmp_path):
    path = set_aside(folder, [1])
    write_set(tmp_path / "other", [2, 0, 4, 2])
    shutil.copy(tmp_path / "other" / "002.tar", folder)  # the list does not speak of this one
    assert len(Manifest.open(folder)) == 8
    shutil.copy(tmp_path / "other" / "000.tar", folder)
    with pytest.raises(ValueError, match=r"quarantine\.json was made for other shards"):
        Manifest.open(folder)
    path.unlink()
    assert len(Manifest.open(folder)) == 8


def test_lists_of_parts_and_of_the_whole_go_together(folder):
    """What is set aside of some shards holds in the folder, and the other way round."""
    set_aside(f"{folder}/000.tar", [1])
    assert numbers(Manifest.open(folder)) == [0, 2, 3, 4, 5, 6, 7, 8]
    set_aside(f"{folder}/{{002,003}}.tar", [0, 5])
    assert numbers(Manifest.open(folder)) == [0, 2, 4, 5, 6, 7]
    assert numbers(Manifest.open(f"{folder}/00{{2..3}}.tar")) == [4, 5, 6, 7]
    set_aside(folder, [2])  # all shards were looked at, and this is all that is bad
    assert numbers(Manifest.open(f"{folder}/000.tar")) == [0, 1]
    whole = Manifest.open(folder, quarantine=False)
    assert whole.set_aside({}) is None
    assert not (folder / QUARANTINE_FILE).exists()
    assert Manifest.open(folder).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "unreadable"),
        ("[]", "unreadable"),
        ('{"version": 9, "shards": {}}', "version 9"),
        ('{"version": 1, "shards": {"000.tar": {"identity": "ID"}}}', "unreadable"),
        ('{"version": 1, "shards": {"000.tar": {"identity": "other", "samples": []}}}', "other"),
        (
            '{"version": 1, "shards": {"000.tar": {"identity": "ID", "samples": [{"row": 3}]}}}',
            "other shards",
        ),
    ],
)
def test_a_damaged_list_is_told_in_a_line(folder, content, message):
    content = content.replace("ID", Manifest.open(folder).shards[0].identity)
    (folder / QUARANTINE_FILE).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.open(folder)
    assert str(folder / QUARANTINE_FILE) in str(caught.value)


def test_a_list_of_everything_leaves_no_data_set(folder):
    set_aside(folder, range(9))
    with pytest.raises(ValueError, match="every sample"):
        Manifest.open(folder)


def test_joined_sets_read_as_their_parts(folder, tmp_path):
    other = write_set(tmp_path / "other", [2, 1])
    parts = [Manifest.open(folder), Manifest.open(other)]
    joined = Manifest.joined(parts)
    assert numbers(joined) == [*range(9), *range(3)]
    assert Manifest.joined(parts[:1]) is parts[0]
    assert joined.fingerprint != Manifest.joined(parts[::-1]).fingerprint
    assert np.array_equal(np.unique(joined.shard_numbers), [0, 2, 3, 4, 5])


def test_a_manifest_of_another_version_is_refused(folder):
    Manifest.open(folder)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        Manifest.open(folder)


def test_a_shard_of_equal_size_that_changed_is_scanned_anew(folder, tmp_path):
    """Tar files are padded, so that an edited caption seldom changes their size."""
    Manifest.open(folder)
    path = folder / "002.tar"
    before = path.stat()
    members = {}
    for number in range(3, 7):
        members |= sample(number)
    members["00004.txt"] = b"a longer caption than before, of the same sample"
    write_tar(path, members)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(0, before.st_mtime_ns - 10**9))  # older, as `cp -p` and `rsync -a` may leave
    (batch,) = iterate(folder, batch_size=9, image_size=SIDE)
    assert batch.captions[4] == "a longer caption than before, of the same sample"


def test_a_scan_that_was_cut_off_between_its_files_is_made_anew(folder, tmp_path):
    Manifest.open(folder)
    old = (folder / "manifest.json").read_bytes()
    write_set(tmp_path / "other", [3, 0, 4, 2, 5])
    shutil.copy(tmp_path / "other" / "004.tar", folder)
    Manifest.open(folder)
    (folder / "manifest.json").write_bytes(old)  # the second file never came
    assert len(Manifest.open(folder)) == 14


def test_offsets_that_are_not_those_of_the_manifest_are_found(tmp_path):
    packed = pack([Record(f"k{n}", picture(n), f"text {n}") for n in range(4)], tmp_path / "set")
    table = packed.samples.to_pydict()
    table["txt.offset"][2] += 512
    pq.write_table(pa.table(table, packed.samples.schema), tmp_path / "set" / "samples.parquet")
    with pytest.raises(ValueError, match="does not belong to"):
        Manifest.open(tmp_path / "set")


def test_the_fingerprint_knows_names_sizes_and_hashes():
    def fingerprint(**changes):
        shard = replace(Shard("a.tar", 0, 10240, "headers", "hash"), **changes)
        return Manifest(LocalStorage(Path("x")), [shard], pa.table({})).fingerprint

    changes = [{}, {"name": "b.tar"}, {"bytes": 512}, {"sha256": "other"}, {"sha256": ""}]
    prints = [fingerprint(**change) for change in changes]
    assert len(set(prints)) == len(prints)
    assert fingerprint(version="later", headers="others") == prints[0]


def test_a_list_in_the_cache_overrules_one_that_cannot_be_changed(folder, monkeypatch):
    """As with a list that came with read-only or remote data."""
    set_aside(folder, [0, 4])
    unwritable(monkeypatch, folder)
    path = set_aside(folder, [4, 8])
    assert path == cache_folder(storage_of(folder), whole=True) / QUARANTINE_FILE
    assert numbers(Manifest.open(folder)) == [0, 1, 2, 3, 5, 6, 7]
    assert numbers(Manifest.open(f"{folder}/003.tar")) == [7]  # also for a part of it
    whole = Manifest.open(folder, quarantine=False)
    assert whole.set_aside({}) is None
    assert len(Manifest.open(folder)) == 9
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parents[3]))
    set_aside(folder, [2])  # and what is written beside them is the last word again
    assert numbers(Manifest.open(folder)) == [0, 1, 3, 4, 5, 6, 7, 8]
