"""Files for other tools, each held against how its reader reads it."""

import hashlib
import json
import struct
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from shards_corpus import picture

from shards.manifest import Manifest
from shards.packing import pack
from shards.packing.recode import Recode
from shards.packing.sidecars import SIDECARS, possible_names
from shards.sources import Record


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Twelve records, two of them bad, in shards of 4, 3 and 3, with every sidecar."""
    out = tmp_path_factory.mktemp("packed")
    records = [
        Record(
            f"k{n:02d}",
            b"broken" if n in {5, 9} else picture(n, side=20),
            f"caption {n}",
            {"n": n, "file": f"files/{n}.png"},
            members={"cls": b"1"} if n % 2 else {},
        )
        for n in range(12)
    ]
    pack(records, out, samples_per_shard=4, sidecars=list(SIDECARS), recoding=Recode(resize=16))
    return out


def test_every_sidecar_lies_beside_the_shards(packed):
    manifest = Manifest.load(packed)
    shards = [shard.name for shard in manifest.shards]
    assert shards == ["000000.tar", "000001.tar", "000002.tar"]
    expected = {*shards, *possible_names(shards), "manifest.json", "samples.parquet"}
    assert {path.name for path in packed.iterdir()} == expected
    assert len(expected) == 3 + 3 + 3 * 3 + 2


def test_openclip_finds_the_sizes(packed):
    sizes = json.loads((packed / "sizes.json").read_bytes())
    # open_clip_train.data.get_dataset_size: the sum over sizes[basename of each shard].
    assert sizes == {"000000.tar": 4, "000001.tar": 3, "000002.tar": 3}


def test_clip_benchmark_finds_the_number_of_shards(packed):
    assert int((packed / "nshards.txt").read_text()) == 3


def test_wids_finds_its_index(packed):
    index = json.loads((packed / "shardindex.json").read_bytes())
    assert index["wids_version"] == 1
    assert index["__kind__"] == "wids-shard-index-v1"
    for entry, samples in zip(index["shardlist"], (4, 3, 3), strict=True):
        data = (packed / entry["url"]).read_bytes()
        assert entry["nsamples"] == samples
        assert entry["filesize"] == len(data)
        assert entry["md5sum"] == hashlib.md5(data).hexdigest()


def test_energon_finds_the_samples(packed):
    """As its own preparation makes the index: offsets of the first member of each key, and end."""
    for path in sorted(packed.glob("*.tar")):
        expected, last = [], None
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key = member.name.partition(".")[0]
                if key != last:
                    expected.append(member.offset)
                    last = key
            expected.append(tar.offset)
        data = path.with_suffix(".tar.idx").read_bytes()
        assert list(struct.unpack(f"<{len(data) // 8}Q", data)) == expected


def test_a_sample_lies_between_its_offsets(packed):
    path = packed / "000001.tar"
    offsets = np.fromfile(path.with_suffix(".tar.idx"), "<u8")
    with path.open("rb") as stream:
        stream.seek(int(offsets[1]))
        part = stream.read(int(offsets[2] - offsets[1]))
    (packed / "part").write_bytes(part)
    try:
        with tarfile.open(packed / "part", "r:") as tar:
            assert tar.getnames() == ["k06.json", "k06.png", "k06.txt"]
    finally:
        (packed / "part").unlink()


def test_tables_and_statistics_are_those_of_img2dataset(packed):
    rows = [
        row for path in sorted(packed.glob("0*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert [row["key"] for row in rows] == [f"k{n:02d}" for n in range(12)]
    good, bad = rows[4], rows[5]
    assert good == {
        "url": "files/4.png",
        "caption": "caption 4",
        "key": "k04",
        "status": "success",
        "error_message": None,
        "width": 16,
        "height": 16,
        "original_width": 20,
        "original_height": 20,
        "sha256": hashlib.sha256(picture(4, side=20)).hexdigest(),
    }
    assert bad["status"] == "failed_to_resize"
    assert bad["error_message"].startswith("undecodable image")
    assert bad["width"] is None
    stats = json.loads((packed / "000001_stats.json").read_bytes())
    assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (4, 3, 1)
    assert stats["status_dict"] == {"success": 3, bad["error_message"]: 1}


def test_an_unknown_sidecar_is_told_before_anything_is_packed(tmp_path):
    with pytest.raises(ValueError, match="unknown sidecar 'size'; known: sizes, nshards, wids, en"):
        pack([Record("a", picture(1), "x")], tmp_path / "out", sidecars=["size"])
    assert not (tmp_path / "out").exists()
