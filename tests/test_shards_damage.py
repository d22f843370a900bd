import hashlib
import io
import tarfile
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from shards_corpus import SIDE, numbers_in, picture, sample, write_set, write_tar

from shards.damage import DamageTally, Problem, Reason, TooMuchDamageError
from shards.loader import ShardLoader, iterate
from shards.manifest import Manifest
from shards.packing import pack
from shards.sources import Record
from shards.storage import LocalStorage
from shards.tar import read_tar, unsafe


def good_ids(manifest):
    """The samples that one pass yields, and the tally of the others."""
    tally = DamageTally(total=len(manifest))
    batches = list(iterate(manifest, batch_size=3, image_size=SIDE, tally=tally))
    return [i for batch in batches for i in batch.ids.tolist()], tally


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One packed shard of four samples."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    records = [Record(f"k{i}", picture(i), f"caption {i}", {"number": i}) for i in range(4)]
    return pack(records, folder)


def last_bytes(manifest):
    """Where the last byte of each sample lies."""
    spans = manifest.spans.values()
    return [max(int(o[i] + s[i]) for o, s in spans) for i in range(len(manifest))]


def test_a_shard_cut_anywhere_loses_only_what_is_cut_off(whole, tmp_path):
    data = (whole.folder / "000000.tar").read_bytes()
    ends = last_bytes(whole)
    for cut in range(0, len(data) + 1, 512):
        (tmp_path / "000000.tar").write_bytes(data[:cut])
        left = [i for i in range(4) if ends[i] <= cut]
        known = Manifest(LocalStorage(tmp_path), whole.shards, whole.samples)
        ids, tally = good_ids(known)
        assert ids == left
        assert tally.reasons == ({Reason.TRUNCATED.value: 4 - len(left)} if len(left) < 4 else {})
        if left:
            stream = ShardLoader(known, batch_size=8, image_size=SIDE, max_bad_fraction=1.0)
            batch = next(stream)
            assert set(numbers_in(batch)) <= set(left)
            assert stream.report()["repeats"] == 2 * (4 - len(left))


def test_a_scan_of_a_cut_shard_tells_the_loss(whole, tmp_path):
    data = (whole.folder / "000000.tar").read_bytes()
    ends = last_bytes(whole)
    for cut in range(512, len(data) + 1, 512):
        (tmp_path / "000000.tar").write_bytes(data[:cut])
        scanned = Manifest.scan(tmp_path)
        ids, tally = good_ids(scanned)
        assert [scanned.keys[i].as_py() for i in ids] == [
            f"k{i}" for i in range(4) if ends[i] <= cut
        ]
        assert tally.bad + len(ids) == len(scanned)
        # An end marker is at least one block of zeros after the padded last member.
        is_whole = cut > (max(ends) + 511) // 512 * 512
        assert bool(scanned.problems) == (not is_whole)


@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_flipped_byte_never_stops_a_pass(whole, tmp_path, place, mask):
    data = bytearray((whole.folder / "000000.tar").read_bytes())
    spot = int(place * max(last_bytes(whole)))
    data[spot] ^= mask
    (tmp_path / "000000.tar").write_bytes(data)
    ids, tally = good_ids(Manifest(LocalStorage(tmp_path), whole.shards, whole.samples))
    assert len(ids) + tally.bad == 4
    assert len(ids) >= 3
    scanned = Manifest.scan(tmp_path)
    ids, tally = good_ids(scanned)
    assert len(ids) + tally.bad == len(scanned)
    untouched = [f"k{i}" for i in range(4) if not spot_in_sample(whole, i, spot)]
    assert set(untouched) <= {scanned.keys[i].as_py() for i in ids}
    # A broken header is passed over and told; what follows it is found again.
    if "txt" not in scanned.fields or len(scanned) < 4:
        assert scanned.problems


def spot_in_sample(manifest, number, spot):
    """Whether a byte belongs to a sample's headers or members."""
    return any(
        offsets[number] - 512 <= spot < (offsets[number] + sizes[number] + 511) // 512 * 512
        for offsets, sizes in manifest.spans.values()
    )


def test_a_broken_header_costs_one_member(tmp_path):
    write_set(tmp_path, [5])
    path = tmp_path / "000.tar"
    data = bytearray(path.read_bytes())
    spot = data.index(b"00002.txt")
    data[spot : spot + 5] = b"\xff" * 5
    path.write_bytes(data)
    scanned = Manifest.scan(tmp_path)
    assert [problem.reason for problem in scanned.problems] == [Reason.BAD_HEADER]
    ids, tally = good_ids(scanned)
    assert ids == [0, 1, 3, 4]
    assert tally.reasons == {"no caption": 1}


BAD = {
    "no image": ({"b.txt": b"x"}, Reason.NO_IMAGE),
    "empty image": ({"b.png": b"", "b.txt": b"x"}, Reason.EMPTY_IMAGE),
    "wrong extension": ({"b.jpg": b"text", "b.txt": b"x"}, Reason.UNDECODABLE),
    "no caption": ({"b.png": picture(1)}, Reason.NO_CAPTION),
    "empty caption": ({"b.png": picture(1), "b.txt": b" \n"}, Reason.EMPTY_CAPTION),
    "bad UTF-8": ({"b.png": picture(1), "b.txt": b"\xff\xfe"}, Reason.BAD_TEXT),
    "bad JSON": ({"b.json": b"[", "b.png": picture(1), "b.txt": b"x"}, Reason.BAD_JSON),
    "pickle": ({"b.pyd": b"cos\nsystem\n(S'false'\ntR.", "b.txt": b"x"}, Reason.NO_IMAGE),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_counted_and_named(tmp_path, name):
    members, reason = BAD[name]
    write_tar(tmp_path / "0.tar", sample(0) | members | sample(2))
    ids, tally = good_ids(Manifest.scan(tmp_path))
    assert ids == [0, 2]
    assert tally.reasons == {reason.value: 1}
    (problem,) = tally.listed.values()
    assert (problem.shard, problem.key) == ("0.tar", "b")


def test_a_wrong_extension_on_a_sound_picture_does_no_harm(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.jpg": picture(5), "a.txt": b"x"})
    assert good_ids(Manifest.scan(tmp_path))[0] == [0]


def test_a_vanished_and_an_unreadable_shard_are_counted(tmp_path):
    manifest = Manifest.scan(write_set(tmp_path, [3, 2, 4]))
    (tmp_path / "000.tar").unlink()
    (tmp_path / "001.tar").unlink()
    (tmp_path / "001.tar").mkdir()
    ids, tally = good_ids(manifest)
    assert ids == [5, 6, 7, 8]
    assert tally.reasons == {"shard missing": 3, "unreadable": 2}


def test_a_member_that_claims_to_be_huge_is_not_read(tmp_path):
    write_set(tmp_path, [2])
    path = tmp_path / "000.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"00001.png")
    header = tarfile.TarInfo("00001.png")
    header.size = 1 << 40
    data[start : start + 512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    scanned = Manifest.scan(tmp_path)
    ids, tally = good_ids(scanned)
    assert ids == [0]
    assert tally.reasons == {"too many bytes": 1}
    assert [problem.reason for problem in scanned.problems] == [Reason.TRUNCATED]


def test_names_that_lead_out_are_left_out_and_told(tmp_path):
    names = ["../evil", "/etc/evil", "a/../../evil", "C:/evil", "back\\evil", "bell\a"]
    members = [(f"{name}.png", picture(1)) for name in names]
    write_tar(tmp_path / "0.tar", [*members, *sample(0).items(), ("folder/b.txt", b"x")])
    scanned = Manifest.scan(tmp_path)
    assert scanned.keys.to_pylist() == ["00000", "folder/b"]
    assert [problem.reason for problem in scanned.problems] == [Reason.UNSAFE_NAME] * len(names)
    assert all(unsafe(name) for name in names)
    assert not unsafe("folder/写真.jpg")


def test_links_are_told_and_folders_and_hidden_files_passed_over(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        for entry in (link, folder):
            tar.addfile(entry)
        for name, data in (sample(0) | {"._c.png": b"x", "__meta__.json": b"{}"}).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    scanned = Manifest.scan(tmp_path)
    assert scanned.keys.to_pylist() == ["00000"]
    assert [problem.reason for problem in scanned.problems] == [Reason.NOT_A_FILE]


def keys_and_fields(path):
    content = read_tar(path)
    return {one.key: sorted(one.spans) for one in content.samples}, content.problems


def test_dotted_keys_are_told_apart(tmp_path):
    names = ["img.v1.0001.jpg", "img.v1.0001.txt", "img.v1.0002.jpg", "img.v1.0002.txt"]
    write_tar(tmp_path / "0.tar", dict.fromkeys(names, b"x"))
    found, problems = keys_and_fields(tmp_path / "0.tar")
    assert found == {"img.v1.0001": ["jpg", "txt"], "img.v1.0002": ["jpg", "txt"]}
    assert not problems


def test_extensions_of_several_parts_stay_one_field(tmp_path):
    write_tar(tmp_path / "0.tar", dict.fromkeys(["a.JPG", "a.seg.png", "a.txt"], b"x"))
    assert keys_and_fields(tmp_path / "0.tar")[0] == {"a": ["jpg", "seg.png", "txt"]}


def test_split_and_repeated_samples_are_told(tmp_path):
    names = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4"), ("b.jpg", b"5")]
    write_tar(tmp_path / "0.tar", names)
    content = read_tar(tmp_path / "0.tar")
    assert [(one.key, sorted(one.spans)) for one in content.samples] == [
        ("a", ["jpg", "txt"]),
        ("b", ["jpg", "txt"]),
        ("b", ["jpg"]),
    ]
    assert [problem.reason for problem in content.problems] == [
        Reason.SPLIT_SAMPLE,
        Reason.SPLIT_SAMPLE,
        Reason.DUPLICATE_KEY,
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(tmp_path, form):
    key = "f" * 90 + "/" + "ü" * 60
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        for name, data in {f"{key}.png": picture(9), f"{key}.txt": b"long"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    scanned = Manifest.scan(tmp_path)
    assert scanned.keys.to_pylist() == [key]
    assert not scanned.problems
    assert good_ids(scanned)[0] == [0]


def test_tars_laid_end_to_end_are_read_through(tmp_path):
    write_set(tmp_path, [2, 3])
    joined = b"".join((tmp_path / f"{i:03d}.tar").read_bytes() for i in range(2))
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "0.tar").write_bytes(joined)
    scanned = Manifest.scan(tmp_path / "joined")
    assert good_ids(scanned)[0] == [0, 1, 2, 3, 4]
    assert not scanned.problems


def test_spans_are_what_tarfile_says(tmp_path):
    write_set(tmp_path, [4])
    with tarfile.open(tmp_path / "000.tar") as tar:
        expected = {one.name: (one.offset_data, one.size) for one in tar}
    content = read_tar(tmp_path / "000.tar")
    found = {f"{one.key}.{name}": s for one in content.samples for name, s in one.spans.items()}
    assert found == expected


def test_a_tally_stops_only_when_the_share_is_large():
    problem = Problem("0.tar", "a", Reason.NO_CAPTION)
    tally = DamageTally(total=10_000, max_fraction=0.01)
    tally.add(10, [problem] * 10)  # all bad, but only ten of at least a thousand
    with pytest.raises(ValueError, match="11 of 11 samples are bad"):
        tally.add(1, [problem])
    assert len(tally.listed) == 1
    assert str(problem) == "0.tar, sample 'a': no caption"


def test_a_large_list_is_counted_in_full_and_named_in_part():
    tally = DamageTally(total=100, list_limit=5)
    tally.add(100, [Problem("0.tar", str(i), Reason.TRUNCATED) for i in range(50)])
    report = tally.report()
    assert (report["bad"], len(report["listed"])) == (50, 5)


def test_a_packed_shard_is_what_its_hash_says(whole):
    data = (whole.folder / "000000.tar").read_bytes()
    assert whole.shards[0].sha256 == hashlib.sha256(data).hexdigest()
    assert whole.shards[0].bytes == len(data)


def test_a_shard_that_is_lost_as_a_whole_counts(tmp_path):
    """An error page in place of a shard holds no sample, so no sample of it can be bad."""
    write_set(tmp_path, [3, 3, 3])
    (tmp_path / "001.tar").write_bytes(b"<html>not found</html>" * 50)
    manifest = Manifest.open(tmp_path)
    assert [problem.shard for problem in manifest.damage] == ["001.tar"]
    options: dict[str, Any] = {"batch_size": 2, "image_size": SIDE, "lanes": 1}
    with pytest.raises(TooMuchDamageError, match="1 of 3 shards hold damage and no sample"):
        ShardLoader(manifest, **options)
    with pytest.raises(TooMuchDamageError, match=r"001\.tar.*strict mode"):
        ShardLoader(manifest, strict=True, max_bad_fraction=0.5, **options)
    with ShardLoader(manifest, max_bad_fraction=0.5, **options) as loader:
        assert len(next(loader)) == 2
    tally = DamageTally(total=6, max_fraction=0.05)
    with pytest.raises(TooMuchDamageError, match="1 of 3 shards"):
        next(iterate(manifest, batch_size=2, image_size=SIDE, tally=tally))
    # What packing left out was dealt with, and an empty shard is no damage.
    assert not Manifest.open(write_set(tmp_path / "sound", [3, 0, 2])).damage
