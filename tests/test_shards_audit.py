"""Every kind of damage is found and counted; what is seen of samples is what the loader sees."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from shards_corpus import SIDE, picture, sample, write_set, write_tar

from shards.audit.examine import Prospect, captions_of, draw, examine, plain_caption, script
from shards.audit.repair import MendedSource
from shards.audit.survey import Mismatch, Spread, by_reason, changed_shards, mismatches, survey
from shards.captions import CaptionRule
from shards.damage import DamageTally, Reason
from shards.decode import Limits
from shards.loader import iterate
from shards.manifest import Manifest
from shards.packing import pack
from shards.sources import Record


def scanned(folder, members):
    folder.mkdir(exist_ok=True)
    write_tar(folder / "0.tar", members)
    return Manifest.scan(folder)


def look(manifest, samples=None, **options):
    samples = np.arange(len(manifest)) if samples is None else samples
    prospect = Prospect(len(samples))
    for chunk in examine(manifest, samples, **options):
        for number, sight in chunk:
            prospect.add(number, sight)
    assert prospect.seen == len(samples)
    return prospect


def packed(folder, count=6):
    records = [Record(f"k{i}", picture(i), f"caption {i}", {"number": i}) for i in range(count)]
    return pack(records, folder, samples_per_shard=4)


def photo(width, height, *, form="JPEG", **options):
    sink = io.BytesIO()
    shades = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    Image.fromarray(shades.astype(np.uint8)).save(sink, form, **options)
    return sink.getvalue()


def test_a_sound_data_set_is_found_sound(tmp_path):
    manifest = packed(tmp_path / "set")
    found = survey(manifest)
    assert (found.samples, found.shards, found.packed) == (6, 2, True)
    assert found.fields == {"json": 6, "png": 6, "txt": 6}
    assert found.samples_per_shard == Spread(2, 3.0, 2.0, 2.1, 3.0, 3.9, 4.0)
    assert found.image_bytes.most == max(len(picture(i)) for i in range(6))
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.glob("set/*.tar"))
    nothing = (found.problems, found.left_out, found.without_image, found.without_text)
    assert nothing == ((), (), 0, 0)
    assert found.dotted_keys == found.repeated_keys == 0
    assert mismatches(manifest) == changed_shards(manifest) == []
    prospect = look(manifest)
    assert prospect.problems == {}
    assert json.loads(json.dumps(found.as_dict()))["samples"] == 6
    assert json.loads(json.dumps(prospect.summary()))["captions"]["distinct"] == 6


def test_a_survey_finds_what_headers_tell(tmp_path):
    members = [
        *sample(0).items(),
        *sample(1).items(),
        ("00000.cls", b"1"),  # apart from its sample
        *sample(1).items(),  # twice
        ("../evil.png", picture(1)),
        ("img.v1.0001.png", picture(2)),
        ("img.v1.0002.png", picture(3)),
        ("z.txt", b"alone"),
    ]
    found = survey(scanned(tmp_path, members))
    assert by_reason(found.problems) == {
        Reason.SPLIT_SAMPLE.value: 1,
        Reason.DUPLICATE_KEY.value: 1,
        Reason.UNSAFE_NAME.value: 1,
    }
    assert found.dotted_keys == 2
    assert found.repeated_keys == 1
    assert (found.without_image, found.without_text) == (1, 2)
    assert found.fields["cls"] == 1
    assert found.samples == 6


def test_a_folder_in_a_key_is_no_dot(tmp_path):
    found = survey(scanned(tmp_path, {"v1.2/a.png": picture(1), "v1.2/a.txt": b"x"}))
    assert found.dotted_keys == 0


@pytest.mark.parametrize("place", ["boundary", "header", "body"])
def test_a_cut_tar_is_found_by_scan_and_by_size(tmp_path, place):
    manifest = packed(tmp_path / "set", 4)
    offsets, sizes = manifest.spans["png"]
    end = int(offsets[2] + sizes[2])
    cut = {
        "boundary": (end + 511) // 512 * 512,
        "header": int(offsets[2]) - 200,
        "body": end - 20,
    }[place]
    path = tmp_path / "set" / "000000.tar"
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    known = Manifest.open(tmp_path / "set")
    (size,) = mismatches(known)
    assert size.found == f"{cut} bytes"
    assert Reason.TRUNCATED.value in look(known).summary()["reasons"]
    assert len(changed_shards(known)) == 1
    write_tar(tmp_path / "other.tar", {})
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "0.tar").write_bytes(data)
    assert survey(Manifest.scan(tmp_path / "plain")).problems


def test_a_broken_header_and_links_are_found(tmp_path):
    write_set(tmp_path, [3])
    path = tmp_path / "000.tar"
    data = bytearray(path.read_bytes())
    spot = data.index(b"00001.txt")
    data[spot : spot + 4] = b"\xff" * 4
    path.write_bytes(data)
    with tarfile.open(tmp_path / "001.tar", "w") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = survey(Manifest.scan(tmp_path))
    assert by_reason(found.problems) == {"bad tar header": 1, "not a regular file": 1}


def test_changed_missing_and_unknown_shards_are_told(tmp_path):
    manifest = packed(tmp_path / "set", 12)
    folder = tmp_path / "set"
    spot = int(manifest.spans["txt"][0][0])
    data = bytearray((folder / "000000.tar").read_bytes())
    data[spot] ^= 1  # the size stays
    (folder / "000000.tar").write_bytes(data)
    (folder / "000001.tar").unlink()
    write_tar(folder / "stray.tar", sample(7))
    known = Manifest.open(folder)
    said = {(one.file, one.found) for one in mismatches(known)}
    stray = f"{(folder / 'stray.tar').stat().st_size} bytes"
    assert said == {("manifest.json: 000001.tar", "no such file"), ("manifest.json", stray)}
    seen: list[int] = []
    changed = changed_shards(known, progress=seen.append)
    assert [one.file for one in changed] == [f"manifest.json: 00000{n}.tar" for n in (0, 1)]
    assert "was changed" in changed[0].found
    assert "unreadable" in changed[1].found
    assert sum(seen) == sum((folder / f"00000{n}.tar").stat().st_size for n in (0, 2))


def test_sidecars_that_disagree_are_told(tmp_path):
    write_set(tmp_path, [3, 2])
    (tmp_path / "sizes.json").write_text('{"000.tar": 3, "001.tar": 4, "gone.tar": 1}')
    (tmp_path / "nshards.txt").write_text("3\n")
    (tmp_path / "000_stats.json").write_text('{"successes": 3}')
    (tmp_path / "001_stats.json").write_text('{"successes": 5}')
    manifest = Manifest.open(tmp_path)
    assert mismatches(manifest) == [
        Mismatch("sizes.json: 001.tar", "4 samples", "2"),
        Mismatch("sizes.json: gone.tar", "1 samples", "no such shard"),
        Mismatch("nshards.txt", "3 shards", "2"),
        Mismatch("001_stats.json", "5 successes", "2 samples in 001.tar"),
    ]
    (tmp_path / "sizes.json").write_text('{"000.tar": 3}')
    (tmp_path / "nshards.txt").write_text("2")
    (tmp_path / "001_stats.json").write_text("{")
    said = [one.file for one in mismatches(manifest)]
    assert said == ["sizes.json", "001_stats.json"]
    content = json.loads((tmp_path / "manifest.json").read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"total": 77}))
    for name in ("sizes.json", "001_stats.json"):
        (tmp_path / name).unlink()
    assert [str(one) for one in mismatches(manifest)] == ["manifest.json says 77 samples; found: 5"]


def test_part_of_a_data_set_is_not_held_to_what_is_said_of_the_whole(tmp_path):
    write_set(tmp_path, [3, 2])
    (tmp_path / "sizes.json").write_text('{"000.tar": 3, "001.tar": 2}')
    (tmp_path / "nshards.txt").write_text("2")
    Manifest.scan(tmp_path)
    assert mismatches(Manifest.open(f"{tmp_path}/{{001..001}}.tar")) == []


BAD = {
    "no image": {"b.txt": b"x"},
    "empty image": {"b.png": b"", "b.txt": b"x"},
    "wrong content": {"b.jpg": b"text", "b.txt": b"x"},
    "cut picture": {"b.jpg": photo(40, 30)[:-200], "b.txt": b"x"},
    "no caption": {"b.png": picture(1)},
    "empty caption": {"b.png": picture(1), "b.txt": b" \n"},
    "bad UTF-8": {"b.png": picture(1), "b.txt": b"\xff\xfe"},
    "bad JSON": {"b.json": b"[", "b.png": picture(1), "b.txt": b"x"},
    "two faults": {"b.json": b"[", "b.png": b"no picture", "b.txt": b"x"},
    "pickle": {"b.pyd": b"cos\nsystem\n(S'false'\ntR.", "b.txt": b"x"},
    "absurd aspect": {"b.png": photo(900, 10, form="PNG"), "b.txt": b"x"},
    "megabyte of text": {"b.png": picture(1), "b.txt": b"x" * (1 << 20)},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_bad_to_the_loader_is_bad_here_for_the_same_reason(tmp_path, name, workers):
    manifest = scanned(tmp_path, sample(0) | BAD[name] | sample(2))
    tally = DamageTally(total=len(manifest))
    good = [
        number
        for batch in iterate(manifest, batch_size=1, image_size=SIDE, tally=tally)
        for number in batch.ids.tolist()
    ]
    prospect = look(manifest, workers=workers)
    assert sorted(set(range(3)) - set(prospect.problems)) == good == [0, 2]
    assert by_reason(list(prospect.problems.values())) == dict(tally.reasons)
    (problem,) = prospect.problems.values()
    assert (problem.shard, problem.key) == ("0.tar", "b")


def test_limits_and_vanished_shards_are_problems_of_samples(tmp_path):
    manifest = Manifest.scan(write_set(tmp_path, [2, 2]))
    (tmp_path / "000.tar").unlink()
    prospect = look(manifest, limits=Limits(pixels=SIDE * SIDE - 1))
    assert prospect.summary()["reasons"] == {"shard missing": 2, "too many pixels": 2}


def test_no_sample_of_all_has_a_picture(tmp_path):
    manifest = scanned(tmp_path, {f"{n}.txt": b"x" for n in range(5)})
    assert survey(manifest).without_image == 5
    summary = look(manifest).summary()
    assert summary["bad"] == 5
    assert summary["pictures"]["count"] == 0
    assert summary["pictures"]["width"]["most"] == 0


def test_pictures_are_measured_upright_by_their_first_bytes(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    members = {
        "a.jpg": photo(60, 40, exif=turned),
        "a.txt": b"one",
        "b.jpg": photo(30, 20, form="PNG"),
        "b.txt": b"two",
        "c.jpeg": photo(12, 12),
        "c.txt": b"three",
    }
    prospect = look(scanned(tmp_path, members))
    assert prospect.sizes[:, :2].tolist() == [[40, 60], [30, 20], [12, 12]]
    assert prospect.sizes[:, 2].tolist() == [
        len(members[f"{n}"]) for n in ("a.jpg", "b.jpg", "c.jpeg")
    ]
    pictures = prospect.summary()["pictures"]
    assert pictures["formats"] == {"jpg": 2, "png": 1}
    assert pictures["under_another_formats_name"] == 1
    assert pictures["shorter_side"]["median"] == 20


def test_equal_files_and_equal_pixels_have_equal_digests(tmp_path):
    members = {
        "a.png": photo(30, 20, form="PNG"),
        "b.png": photo(30, 20, form="PNG"),
        "c.bmp": photo(30, 20, form="BMP"),
        "d.png": photo(20, 30, form="PNG"),
    }
    members |= {f"{key}.txt": b"x" for key in "abcd"}
    prospect = look(scanned(tmp_path, dict(sorted(members.items()))))
    a, b, c, d = prospect.file_digests.tolist()
    assert a == b != c
    assert d != a
    a, b, c, d = prospect.pixel_digests.tolist()
    assert a == b == c != d


def test_captions_are_counted(tmp_path):
    several = json.dumps({"captions": ["A red  heart", "赤いハート"]}).encode()
    members = sample(0) | {
        "b.json": several, "b.png": picture(1),
        "c.png": picture(2), "c.txt": b"a red heart\n",
        "d.png": picture(3), "d.txt": "красное сердце".encode(),
    }  # fmt: skip
    manifest = scanned(tmp_path, members)
    prospect = look(manifest)
    captions = prospect.summary()["captions"]
    assert (captions["count"], captions["distinct"]) == (5, 4)
    assert captions["per_picture"] == {"1": 3, "2": 1}
    assert captions["scripts"] == {"latin": 3, "katakana": 1, "cyrillic": 1}
    assert prospect.characters.tolist() == [9, 12, 5, 11, 14]
    assert prospect.words.tolist() == [2, 3, 1, 3, 2]
    assert prospect.caption_rows.tolist() == [0, 1, 1, 2, 3]
    assert prospect.repeated_captions(5) == [(2, 1, 0)]
    assert captions_of(manifest, [1, 0]) == [["A red  heart", "赤いハート"], ["caption 0"]]
    lines = CaptionRule(("json.captions",))
    assert look(manifest, captions=lines).summary()["reasons"] == {"no caption": 3}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("red", "latin"),
        ("été", "latin"),
        ("1,5 %", "none"),
        ("", "none"),
        ("हिन्दी भाषा text", "devanagari"),
    ],
)
def test_script_is_that_of_most_letters(caption, expected):
    assert script(caption) == expected


def test_plain_captions_forget_case_and_blanks():
    assert plain_caption(" A  Red\tHeart ") == plain_caption("a red heart")


def test_a_draw_is_the_same_every_time_and_has_no_repeats(tmp_path):
    manifest = Manifest.scan(write_set(tmp_path, [40, 20]))
    first, again = draw(manifest, 25), draw(manifest, 25)
    assert first.tolist() == again.tolist() == sorted(set(first.tolist()))
    assert len(first) == 25
    assert first.tolist() != draw(manifest, 25, seed=1).tolist() != list(range(25))
    assert draw(manifest, 100).tolist() == list(range(60))


def test_compressed_shards_are_looked_at_like_others(tmp_path):
    write_set(tmp_path / "plain", [3])
    (tmp_path / "packed").mkdir()
    data = (tmp_path / "plain" / "000.tar").read_bytes()
    (tmp_path / "packed" / "000.tar.gz").write_bytes(gzip.compress(data))
    manifest = Manifest.open(tmp_path / "packed")
    assert mismatches(manifest) == []
    assert look(manifest).problems == {}


# Repair.


def broken(folder):
    """A data set with every trouble that keys can have, and some bad samples."""
    dotted = [(f"img.v1.000{n}.png", picture(10 + n)) for n in (1, 2)]
    texts = [(f"img.v1.000{n}.txt", f"dotted {n}".encode()) for n in (1, 2)]
    return scanned(
        folder,
        [
            *sample(0).items(),
            ("a b/c.png", picture(20)),
            ("a b/c.txt", "cafe\u0301 \n".encode()),
            *[pair for pairs in zip(dotted, texts, strict=True) for pair in pairs],
            *sample(1).items(),
            *sample(1).items(),  # a repeat, byte for byte
            *(sample(1) | {"00001.png": picture(99)}).items(),  # another picture
            ("bad.png", b"nothing"),
            ("bad.txt", b"x"),
            ("half.png", picture(30)),
            *sample(2).items(),
            ("half.txt", b"brought together"),
            ("00002.cls", b"7"),
        ],
    )


def test_repair_keeps_what_is_good_under_keys_that_are_fit(tmp_path):
    manifest = broken(tmp_path / "broken")
    before = (tmp_path / "broken" / "0.tar").read_bytes()
    source = MendedSource(manifest)
    assert source.mended.dropped == 1
    made = pack(source, tmp_path / "sound")
    keys = made.keys.to_pylist()
    assert len(made) == 8 == len(set(keys))
    assert source.mended.renamed == 4
    assert not any("." in key or " " in key or "/" in key for key in keys)
    found = survey(Manifest.open(tmp_path / "sound"))
    assert (found.problems, found.dotted_keys, found.repeated_keys) == ((), 0, 0)
    assert "undecodable image" in by_reason(found.left_out)
    assert look(made).problems == {}
    texts = dict(zip(keys, captions_of(made, range(8)), strict=True))
    assert texts["00000"] == ["caption 0"]
    assert texts["half"] == ["brought together"]
    assert texts["00001"] == texts["00001-2"] == ["caption 1"]
    assert sorted(text for (text,) in texts.values() if "dotted" in text) == [
        "dotted 1",
        "dotted 2",
    ]
    assert ["caf\u00e9"] in texts.values()
    assert made.fields == ("cls", "json", "png", "txt")
    assert (tmp_path / "broken" / "0.tar").read_bytes() == before


def test_a_repaired_set_is_repaired_into_itself(tmp_path):
    made = pack(MendedSource(broken(tmp_path / "broken")), tmp_path / "one")
    source = MendedSource(Manifest.open(tmp_path / "one"))
    assert (source.mended.renamed, source.mended.dropped) == (0, 0)
    again = pack(source, tmp_path / "two")
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in made.shards]


def test_names_that_would_become_one_stay_apart(tmp_path):
    members = []
    for name in ("a/b", "a-b", "x-2", "x", "x"):
        members += [(f"{name}.png", picture(len(members))), (f"{name}.txt", b"t")]
    source = MendedSource(scanned(tmp_path, members))
    assert [record.key for record in source] == ["a-b-2", "a-b", "x-2", "x", "x-3"]
