"""Laws of every format that is packed from, and what each of them does with damage."""

import csv
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from http_server import serving
from shards_corpus import picture, write_tar

from shards.captions import CaptionRule
from shards.damage import Reason
from shards.decode import Limits
from shards.loader import iterate
from shards.manifest import Manifest
from shards.packing import pack
from shards.read import ShardReader
from shards.sources import (
    FORMATS,
    ClassSource,
    CocoSource,
    FlickrSource,
    FolderSource,
    JsonTableSource,
    ParquetSource,
    Record,
    ShardSource,
    Source,
    TextTableSource,
    find_format,
    open_source,
    parquet,
)

PAIRS = {
    "p0": ["one cat"],
    "p1": ["two\ncats", 'two "cats", again', "deux chats à côté"],
    "p2": ["a dog"],
    "p3": ["a red dog", "a dog, red"],
}
"""Captions by key; the picture of `pN` encodes N."""

Written = tuple[list[str], dict[str, Any]]
Writer = Callable[[Path], Written]


def number(key: str) -> int:
    return int(key.removeprefix("p"))


def put(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def pictures(folder: Path) -> Path:
    return put(folder, {f"{key}.png": picture(number(key)) for key in PAIRS})


def as_folder(folder: Path) -> Written:
    pictures(folder)
    put(folder, {f"{key}.json": json.dumps({"captions": PAIRS[key]}) for key in ("p1", "p3")})
    put(folder, {"p0.txt": PAIRS["p0"][0], "p2.json": json.dumps({"caption": PAIRS["p2"][0]})})
    return [str(folder)], {}


def as_parquet(folder: Path) -> Written:
    folder.mkdir()
    rows = [{"name": k, "jpg": picture(number(k)), "caption": c} for k, c in PAIRS.items()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=2)
    return [str(folder / "pairs.parquet")], {"image": "jpg", "key": "{name}"}


def as_parquet_of_paths(folder: Path) -> Written:
    pictures(folder / "files")
    rows = [{"image": f"{k}.png", "text": c} for k, several in PAIRS.items() for c in several]
    # One picture's rows in two files are one record all the same.
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet")
    places = [str(folder / "a.parquet"), str(folder / "b.parquet")]
    return places, {"caption": "text", "root": folder / "files"}


def as_csv(folder: Path, *, ending: str = "csv", separator: str = ",", mark: str = "") -> Written:
    pictures(folder / "x")
    path = folder / f"pairs.{ending}"
    with path.open("w", encoding="utf-8", newline="") as stream:
        stream.write(mark)
        writer = csv.writer(stream, delimiter=separator, lineterminator="\r\n")
        writer.writerow(["filepath", "title"])
        for key, captions in PAIRS.items():
            writer.writerows([f"x/{key}.png", caption] for caption in captions)
    options = {"image": "filepath", "caption": "title", "key": "{filepath}"}
    return [str(path)], options


def as_jsonl(folder: Path) -> Written:
    pictures(folder)
    lines = [json.dumps({"image": f"{key}.png", "caption": c}) for key, c in PAIRS.items()]
    return [str(put(folder, {"pairs.jsonl": "\n".join(lines)}) / "pairs.jsonl")], {}


def as_coco(folder: Path) -> Written:
    pictures(folder / "val")
    images = [{"id": 70 + number(key), "file_name": f"{key}.png", "width": 8} for key in PAIRS]
    notes = [
        {"image_id": 70 + number(key), "id": 0, "caption": caption}
        for key, captions in PAIRS.items()
        for caption in captions
    ]
    content = json.dumps({"info": {}, "images": images, "annotations": notes})
    put(folder, {"annotations/captions_val.json": content})
    return [str(folder / "annotations/captions_val.json")], {"root": folder / "val"}


def as_flickr(folder: Path) -> Written:
    pictures(folder)
    images = [
        {"filename": f"{key}.png", "split": "test", "sentences": [{"raw": c} for c in captions]}
        for key, captions in PAIRS.items()
    ]
    images.append({"filename": "other.png", "split": "train", "sentences": []})
    put(folder, {"dataset_x.json": json.dumps({"dataset": "x", "images": images})})
    return [str(folder / "dataset_x.json")], {"where": {"split": "test"}}


def as_shards(folder: Path) -> Written:
    folder.mkdir()
    for shard, keys in enumerate((["p0", "p1"], ["p2", "p3"])):
        members: dict[str, bytes] = {}
        for key in keys:
            members[f"{key}.json"] = json.dumps({"texts": PAIRS[key]}).encode()
            members[f"{key}.png"] = picture(number(key))
        write_tar(folder / f"{shard}.tar", members)
    return [str(folder)], {"caption": "json.texts"}


def as_classes(folder: Path) -> Written:
    put(folder, {"dark_cat/a.png": picture(0), "ant/b.png": picture(1)})
    return [str(folder)], {}


WRITERS: dict[str, Writer] = {
    "folder": as_folder,
    "classes": as_classes,
    "parquet": as_parquet,
    "csv": as_csv,
    "jsonl": as_jsonl,
    "coco": as_coco,
    "flickr": as_flickr,
    "shards": as_shards,
}
VARIANTS: dict[str, Writer] = {
    "parquet of paths": as_parquet_of_paths,
    "tsv": lambda folder: as_csv(folder, ending="tsv", separator="\t"),
    "csv with tabs": lambda folder: as_csv(folder, separator="\t"),
    "csv with bars": lambda folder: as_csv(folder, separator="|"),
    "csv with a mark": lambda folder: as_csv(folder, mark="\ufeff"),
}


def opened(written: Written, name: str | None = None) -> Source:
    places, options = written
    return open_source(places, format=name or find_format(places), **options)


def packed(out: Path) -> list[tuple[str, bytes, list[str]]]:
    """Keys, pictures and captions, as the loader finds them."""
    manifest = Manifest.load(out)
    reader = ShardReader(manifest)
    found = []
    for sample in range(len(manifest)):
        members = reader.read(sample, manifest.fields)
        captions, _ = CaptionRule().read(members, Limits())
        found.append((manifest.keys[sample].as_py(), members["png"], captions))
    reader.close()
    return found


def test_every_format_is_under_the_laws():
    assert set(WRITERS) == set(FORMATS)


@pytest.mark.parametrize("name", sorted({*WRITERS, *VARIANTS} - {"classes"}))
def test_equal_pairs_are_packed_alike_from_every_format(name, tmp_path):
    source = opened({**WRITERS, **VARIANTS}[name](tmp_path / "in"))
    manifest = pack(source, tmp_path / "out")
    assert not manifest.problems
    keys = {f"{'x-' if 'csv' in name or name == 'tsv' else ''}{key}": key for key in PAIRS}
    found = packed(tmp_path / "out")
    if "csv" in name or name == "tsv":  # their key is a template over the path, ending included
        found = [(f"x-{key[2:4]}", image, captions) for key, image, captions in found]
    assert found == [(long, picture(number(key)), PAIRS[key]) for long, key in keys.items()]


@pytest.mark.parametrize("name", [*WRITERS, *VARIANTS])
def test_a_source_is_a_fixed_sequence(name, tmp_path):
    written = {**WRITERS, **VARIANTS}[name](tmp_path / "in")
    source, again = opened(written), opened(written)
    every = list(source)
    assert len(every) == len(source) > 0
    assert [one.key for one in every] == [one.key for one in again]
    assert source.identity == again.identity
    assert source[-1] == every[-1] == source[len(source) - 1]
    assert source[1:] == every[1:]
    with pytest.raises(IndexError):
        source[len(source)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.__getitem__, list(range(len(source))) * 8)) == every * 8
    assert all(one.origin and one.texts and not one.fault for one in every)
    assert json.loads(json.dumps([dict(one.fields) for one in every])) == [
        one.fields for one in every
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_another_content_is_another_identity(name, tmp_path):
    first = opened(WRITERS[name](tmp_path / "a")).identity
    assert opened(WRITERS[name](tmp_path / "b")).identity != first or name == "shards"
    places, _ = written = WRITERS[name](tmp_path / "c")
    before = opened(written).identity
    if name == "folder":
        put(tmp_path / "c", {"p0.txt": "another cat"})
    elif name in {"classes", "shards"}:
        changed = next(p for p in sorted((tmp_path / "c").rglob("*.*")) if p.suffix != ".json")
        changed.write_bytes(changed.read_bytes() + b"\0" * 512)
    else:
        Path(places[0]).write_bytes(Path(places[0]).read_bytes() + b"\n")
    if name == "parquet":
        return  # no longer one; its size is in the identity as that of the others
    assert opened(written).identity != before


@pytest.mark.parametrize("name", sorted(WRITERS.keys() - {"parquet", "shards"}))
def test_a_picture_that_is_gone_or_broken_is_told(name, tmp_path):
    written = WRITERS[name](tmp_path / "in")
    source = opened(written)
    files = sorted((tmp_path / "in").rglob("*.png"))
    files[0].unlink()
    if len(files) > 2:
        files[1].write_bytes(files[1].read_bytes()[:40])
    manifest = pack(source, tmp_path / "out")
    reasons = [problem.reason for problem in manifest.problems]
    assert reasons == [Reason.UNREADABLE, Reason.UNDECODABLE][: min(len(files) - 1, 2)]
    assert str(files[0]) in manifest.problems[0].detail
    assert len(manifest) == len(files) - len(reasons)


def test_unknown_formats_options_and_places_are_told_in_a_line(tmp_path):
    folder = str(pictures(tmp_path / "pictures"))
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        ([folder], {"format": "cvs"}, "unknown format 'cvs'; known: parquet, csv, jsonl, coco"),
        ([folder], {"format": "folder", "template": "{}"}, "folder does not take 'template'; it t"),
        ([folder], {"format": "coco", "image": "x"}, "coco does not take 'image'; it takes root,"),
        ([folder, folder], {"format": "folder"}, "format folder takes one source, not 2"),
        ([folder], {"format": "json:loads"}, "is no subclass of shards.sources.Source"),
        ([folder], {"format": "no.such:Thing"}, "'no.such:Thing' cannot be loaded"),
    ]
    for places, options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            open_source(places, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*none"):
        find_format([str(tmp_path / "none")])
    put(tmp_path, {"notes.docx": b"x", "two.csv": "image,caption\n"})
    with pytest.raises(ValueError, match=r"notes.docx is of no format that is known; set format"):
        find_format([str(tmp_path / "notes.docx")])
    with pytest.raises(ValueError, match=r"two.csv, .* are not all of one format"):
        find_format([str(tmp_path / "two.csv"), folder])


def test_a_format_of_ones_own_goes_by_its_name(tmp_path):
    source = open_source(["any"], format=f"{__name__}:Countdown", root=str(tmp_path))
    assert [one.key for one in source] == ["k2", "k1", "k0"]
    assert len(pack(source, tmp_path / "out")) == 3


class Countdown(Source):
    def __init__(self, place: str, *, root: str | None = None) -> None:
        self.identity = f"{place} {root}"

    def __len__(self) -> int:
        return 3

    def record(self, index: int) -> Record:
        return Record(f"k{2 - index}", picture(2 - index), f"caption {index}")


def test_a_folder_is_taken_for_what_is_in_it(tmp_path):
    classes = as_classes(tmp_path / "classes")[0]
    assert find_format(classes) == "classes"
    put(tmp_path / "classes", {"README.txt": "about"})  # beside the folders, not the pictures
    assert find_format(classes) == "classes"
    put(tmp_path / "classes", {"ant/b.txt": "an ant"})
    assert find_format(classes) == "folder"
    assert find_format(as_shards(tmp_path / "shards")[0]) == "shards"
    assert find_format([f"{tmp_path}/shards/{{0..1}}.tar"]) == "shards"
    assert find_format(["s3://bucket/pairs"]) == "shards"
    deep = put(tmp_path / "deep", {"train/cat/1.png": picture(1)})
    assert find_format([str(deep)]) == "folder"


def test_class_folders_make_captions_and_numbers(tmp_path):
    source = ClassSource(as_classes(tmp_path)[0][0], template="art of a {}, drawn")
    assert [one.caption for one in source] == ["art of a ant, drawn", "art of a dark cat, drawn"]
    assert [one.members for one in source] == [{"cls": b"0"}, {"cls": b"1"}]
    assert [one.fields["class"] for one in source] == ["ant", "dark_cat"]
    assert source.classes == ["ant", "dark_cat"]
    for template in ("a photo", "{} and {}", "{name}"):
        with pytest.raises(ValueError, match=r"must hold \{\} once"):
            ClassSource(tmp_path, template=template)
    with pytest.raises(ValueError, match="holds no class"):
        ClassSource(pictures(tmp_path / "flat" / "inner"))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ClassSource(tmp_path / "none")


def test_pictures_of_the_same_name_keep_apart(tmp_path):
    put(tmp_path, {"a/1.png": picture(1), "a-1.png": picture(2), "dog.png": picture(3)})
    put(tmp_path, {"dog.jpg": picture(4, form="JPEG"), "a.txt": "x"})
    assert len({one.key for one in FolderSource(tmp_path)}) == 4
    table = put(tmp_path, {"t.csv": "image,caption\ndog.png,a\ndog.jpg,b\na/1.png,c\n"}) / "t.csv"
    keys = [one.key for one in TextTableSource(table)]
    assert len(set(keys)) == 3
    assert keys[2] == "a-1"


def test_a_hidden_folder_is_passed_over(tmp_path):
    put(tmp_path, {".thumbs/1.png": picture(1), "1.png": picture(1), "1.txt": "one"})
    assert [one.key for one in FolderSource(tmp_path)] == ["1"]


def test_rows_with_one_picture_become_one_record(tmp_path):
    pictures(tmp_path)
    text = "image,caption,who,seen\np0.png,first,ann,7\np1.png,else,bob,8\np0.png,second,cid,7\n"
    path = put(tmp_path, {"t.csv": text}) / "t.csv"
    first, second = TextTableSource(path)
    assert first.texts == ("first", "second")
    assert first.fields == {"who": ["ann", "cid"], "seen": 7, "file": "p0.png"}
    assert second.texts == ("else",)
    assert second.fields == {"who": "bob", "seen": 8, "file": "p1.png"}
    apart = TextTableSource(path, merge=False)
    assert [one.key for one in apart] == ["t-0", "t-1", "t-2"]
    assert [one.caption for one in apart] == ["first", "else", "second"]


def test_columns_of_text_tables_have_types(tmp_path):
    pictures(tmp_path)
    head = "image,caption,whole,decimal,code,mixed,gone,odd\n"
    rows = "p0.png,2001,1,1.5,007,1,,nan\np1.png,1999,-2,3,100,x,,1\n"
    path = put(tmp_path, {"t.csv": head + rows}) / "t.csv"
    first, second = TextTableSource(path)
    assert first.texts == ("2001",)
    assert first.fields == {
        **{"whole": 1, "decimal": 1.5, "code": "007", "mixed": "1", "gone": "", "odd": "nan"},
        "file": "p0.png",
    }
    assert second.fields["whole"] == -2
    kept = TextTableSource(path, where={"whole": [-2, 5]})
    assert [one.key for one in kept] == ["p1"]
    with pytest.raises(ValueError, match=r"leaves no row of t.csv \(whole is one of 1, -2\)"):
        TextTableSource(path, where={"whole": 3})


def test_lines_that_are_no_rows_are_told(tmp_path):
    pictures(tmp_path)
    files = {
        "t.csv": b"image,caption\np0.png,fine\np1.png,too,many\n\np2.png,caf\xe9\np3.png,\n",
        "t.jsonl": b'{"image": "p0.png", "caption": "fine"}\n{"image": \n[1]\n'
        b'{"image": "p1.png"}\n{"caption": "no picture"}\n\n',
    }
    put(tmp_path, files)
    manifest = pack(TextTableSource(tmp_path / "t.csv"), tmp_path / "a")
    assert manifest.keys.to_pylist() == ["p0"]
    told = [(problem.key, problem.reason) for problem in manifest.problems]
    assert told == [
        ("", Reason.UNREADABLE),
        ("p2", Reason.BAD_TEXT),
        ("p3", Reason.EMPTY_CAPTION),
    ]
    assert manifest.problems[0].detail == "line 3 has 3 values, not 2"
    manifest = pack(JsonTableSource(tmp_path / "t.jsonl"), tmp_path / "b")
    assert manifest.keys.to_pylist() == ["p0"]
    assert [(one.key, one.reason) for one in manifest.problems] == [
        ("", Reason.BAD_JSON),
        ("", Reason.BAD_JSON),
        ("p1", Reason.NO_CAPTION),
        ("t-4", Reason.NO_IMAGE),
    ]
    with pytest.raises(ValueError, match=r"line 3 has 3 values, not 2.*strict packing stops"):
        pack(TextTableSource(tmp_path / "t.csv"), tmp_path / "c", strict=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "t.csv is empty; its first line must name the columns"),
        ("t.csv", b"\xef\xbb\xbf\n", "t.csv is empty"),
        ("t.csv", b"image,caption\n", "t.csv holds no row"),
        ("t.csv", b"image,title\np0.png,x\n", "no column 'caption'; it has image, title; set capt"),
        (
            "t.csv",
            b"path;caption\np0.png;x\n",
            "no column 'image'; it has path, caption; set image",
        ),
        ("t.csv", b"image,caption,image\na,b,c\n", "two columns named 'image'"),
        ("t.csv", b"PAR1\0\xff,\n", "is no text table: it holds zero bytes"),
        ("t.csv", b"image,caption\nhttps://a.b/c.jpg,x\n", r"holds URLs \(first: https://a.b/c.j"),
        ("t.csv", b"image,caption\nnone.png,x\n", "no picture .*none.png; set root"),
        ("t.jsonl", b"", "holds no row|no column"),
        ("t.jsonl", b"nothing\n", "holds no row that is a JSON object; line 1"),
        (
            "t.jsonl",
            b'{"image": 3, "caption": "x"}',
            "column 'image' holds int; it must hold paths",
        ),
        ("t.jsonl", b'{"image": "p0.png", "caption": 3}', "holds int; a caption must be a string"),
        ("t.jsonl", b"[{", "is not JSON"),
    ],
)
def test_tables_that_cannot_be_used_are_told(name, content, message, tmp_path):
    path = put(pictures(tmp_path), {name: content}) / name
    with pytest.raises(ValueError, match=message) as caught:
        opened(([str(path)], {}))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_quote_left_open_costs_no_more_than_it_must(tmp_path):
    pictures(tmp_path)
    rows = [f"p{n % 4}.png,caption {n}" for n in range(20_000)]
    rows[50] = 'p0.png,"caption without end'
    path = put(tmp_path, {"t.csv": "\n".join(["image,caption", *rows])}) / "t.csv"
    source = TextTableSource(path, merge=False)
    lost = 20_000 - len(source)
    assert 0 < lost * len("p0.png,caption 10000") < 150_000
    assert len(source.problems) == 1
    assert "is a quote left open?" in source.problems[0].detail
    assert source[-1].caption == "caption 19999"


def test_bytes_that_are_no_utf_8_cost_their_rows_only(tmp_path):
    pictures(tmp_path)
    data = b"image,caption,by\np0.png,fine,caf\xe9\np1.png,fine,ann\np2.png,bad\xff,a,b\n"
    path = put(tmp_path, {"t.csv": data}) / "t.csv"
    manifest = pack(TextTableSource(path), tmp_path / "out")
    assert manifest.keys.to_pylist() == ["p1"]
    assert [one.reason for one in manifest.problems] == [Reason.UNREADABLE, Reason.BAD_TEXT]


def test_a_list_in_a_json_file_is_a_table(tmp_path):
    rows = [{"image": f"{key}.png", "caption": captions} for key, captions in PAIRS.items()]
    path = put(pictures(tmp_path), {"t.json": "\ufeff" + json.dumps(rows)}) / "t.json"
    assert [list(one.texts) for one in JsonTableSource(path)] == list(PAIRS.values())


def test_a_table_in_utf_16_is_read(tmp_path):
    text = "image\tcaption\np0.png\tdeux chats à côté\n"
    path = put(pictures(tmp_path), {"t.csv": text.encode("utf-16")}) / "t.csv"
    assert [one.caption for one in TextTableSource(path)] == ["deux chats à côté"]


def test_what_is_no_file_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    huge = tmp_path / "huge.png"
    with huge.open("wb") as stream:
        stream.truncate(1 << 40)
    text = "image,caption\npipe.png,a\nfolder.png,b\nhuge.png,c\n/dev/zero,d\np0.png,e\n"
    path = put(pictures(tmp_path), {"t.csv": text}) / "t.csv"
    manifest = pack(TextTableSource(path), tmp_path / "out")
    assert len(manifest) == 1
    assert [one.reason for one in manifest.problems] == [
        *(Reason.UNREADABLE, Reason.UNREADABLE, Reason.TOO_MANY_BYTES, Reason.UNREADABLE)
    ]


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        (CocoSource, "{", "is not JSON"),
        (CocoSource, "[]", "holds no captions of this format: it holds a list"),
        (CocoSource, '{"images": [], "categories": []}', "its keys are images, categories"),
        (CocoSource, '{"images": [{}], "annotations": [{"caption": "x"}]}', "entry is malformed"),
        (FlickrSource, '{"images": [{"sentences": [{}]}]}', "entry is malformed"),
        (
            CocoSource,
            '{"images": [{"id": 1, "file_name": "p9.png"}], "annotations": [{"caption": "x", '
            '"image_id": 1}]}',
            "there is no picture .*p9.png; set root",
        ),
    ],
)
def test_caption_files_that_cannot_be_used_are_told(source, content, message, tmp_path):
    path = put(pictures(tmp_path), {"captions.json": content}) / "captions.json"
    with pytest.raises(ValueError, match=message) as caught:
        source(path)
    assert "\n" not in str(caught.value)
    if content == "{":
        with pytest.raises(ValueError, match="of no format that is known"):
            find_format([str(path)])


def test_a_filter_that_leaves_nothing_says_what_there_is(tmp_path):
    places, _ = as_flickr(tmp_path)
    with pytest.raises(ValueError, match="split is one of test, train"):
        FlickrSource(places[0], where={"split": "val"})
    places, _ = as_shards(tmp_path / "shards")
    with pytest.raises(ValueError, match="there is no size"):
        ShardSource(places[0], where={"size": 3})


def test_img2dataset_output_is_packed_anew(tmp_path):
    members: dict[str, bytes] = {}
    rows = []
    for n in range(4):
        key = f"{n:09d}"
        meta = {"url": f"http://a/{n}.jpg", "caption": f"cat {n}", "key": key, "status": "success"}
        rows.append(meta)
        members[f"{key}.jpg"] = picture(n, form="JPEG")
        members[f"{key}.json"] = json.dumps(meta, indent=4).encode()
        members[f"{key}.txt"] = f"cat {n}".encode()
    folder = put(tmp_path / "laion", {"00000_stats.json": json.dumps({"count": 4})})
    write_tar(folder / "00000.tar", members)
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    source = opened(([str(folder)], {"where": {"key": ["000000001", "000000003"]}}))
    manifest = pack(source, tmp_path / "out")
    assert manifest.keys.to_pylist() == ["000000001", "000000003"]
    assert source[0].caption == "cat 1"
    assert source[0].fields == rows[1]


def test_clip_benchmark_layout_is_packed_anew(tmp_path):
    members: dict[str, bytes] = {}
    for n in range(3):
        members[f"s{n:07d}.cls"] = str(n % 2).encode()
        members[f"s{n:07d}.txt"] = f"first {n}\nsecond {n}\n".encode()
        members[f"s{n:07d}.webp"] = picture(n, form="WEBP")
    folder = put(tmp_path / "set", {"test/nshards.txt": "1", "classnames.txt": "cat\ndog\n"})
    write_tar(folder / "test" / "0.tar", members)
    source = ShardSource(folder / "test", caption="txt.lines")
    assert [one.texts for one in source][2] == ("first 2", "second 2")
    manifest = pack(source, tmp_path / "out")
    assert manifest.fields == ("cls", "json", "txt", "webp")
    reader = ShardReader(manifest)
    assert [reader.read(n, ["cls"])["cls"] for n in range(3)] == [b"0", b"1", b"0"]
    assert reader.read(1, ["txt"])["txt"] == b"first 1\nsecond 1"
    reader.close()


def test_shards_with_damage_are_told_and_mended(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    good = {"a.b.1.png": picture(1), "a.b.1.txt": b"one", "a.b.2.png": picture(2)}
    write_tar(folder / "0.tar", {**good, "a.b.2.txt": b"two", "../up.png": picture(3)})
    write_tar(folder / "1.tar", {"x.png": picture(4), "x.json": b"[", "y.txt": b"no picture"})
    manifest = pack(ShardSource(folder), tmp_path / "out")
    assert len(manifest) == 2
    assert all(key.startswith("a-b-") for key in manifest.keys.to_pylist())
    assert sorted(problem.reason for problem in manifest.problems) == sorted(
        [Reason.UNSAFE_NAME, Reason.BAD_JSON, Reason.NO_IMAGE]
    )


def test_keys_of_shards_can_be_made_different(tmp_path):
    for shard in ("a", "b"):
        write_tar(tmp_path / f"{shard}.tar", {"0.png": picture(1), "0.txt": b"one"})
    with pytest.raises(ValueError, match="the key '0' comes twice"):
        pack(ShardSource(tmp_path), tmp_path / "out")
    source = ShardSource(tmp_path, key="{__shard__}-{__key__}")
    assert pack(source, tmp_path / "out").keys.to_pylist() == ["a-0", "b-0"]
    assert [one.key for one in ShardSource(tmp_path, key="{__index__}")] == ["0", "1"]
    with pytest.raises(ValueError, match=r"key='\{name\}' cannot be made .*; there is __key__, "):
        ShardSource(tmp_path, key="{name}")[0]


def test_pictures_in_parquet_are_read_by_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 1)
    images = [picture(n) for n in range(10)]
    path = tmp_path / "t.parquet"
    table = pa.table({"image": [{"bytes": one} for one in images], "caption": ["x"] * 10})
    pq.write_table(table, path, row_group_size=3)
    source = ParquetSource(path)
    assert [source[n].image for n in (9, 0, 4, 4, 2, 8)] == [images[n] for n in (9, 0, 4, 4, 2, 8)]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path):
    path = tmp_path / "t.parquet"
    images = [picture(n, side=40) for n in range(9)]
    table = pa.table({"image": images, "caption": ["x"] * 9})
    pq.write_table(table, path, row_group_size=3, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data, at = path.read_bytes(), column.data_page_offset + column.total_compressed_size - 60
    path.write_bytes(data[:at] + b"\xff" * 40 + data[at + 40 :])
    manifest = pack(ParquetSource(path), tmp_path / "out")
    assert [one.key for one in manifest.problems] == ["t-3", "t-4", "t-5"]
    assert {one.reason for one in manifest.problems} == {Reason.UNREADABLE}
    assert len(manifest) == 6


def test_members_that_cannot_come_along_are_told(tmp_path):
    members = {"a.png": picture(1), "a.txt": b"x", "a.cls": b"1", f"a.{'long' * 9}": b"2"}
    write_tar(tmp_path / "0.tar", members)
    manifest = pack(ShardSource(tmp_path), tmp_path / "out")
    assert manifest.fields == ("cls", "png", "txt")
    assert [str(problem) for problem in manifest.problems] == [
        f"{tmp_path}: unsafe member name (members '{'long' * 9}' stay behind)"
    ]


def test_names_that_are_no_text_are_packed(tmp_path):
    folder = pictures(tmp_path / "in")
    odd = os.fsencode(folder) + b"/caf\xe9\n"
    Path(os.fsdecode(odd + b".png")).write_bytes(picture(9))
    Path(os.fsdecode(odd + b".txt")).write_bytes(b"odd")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    manifest = pack(FolderSource(folder), tmp_path / "out", sidecars=["img2dataset"])
    assert len(manifest) == 1
    reader = ShardReader(manifest)
    assert json.loads(reader.read(0, ["json"])["json"]) == {"file": "caf\ufffd\n.png"}
    reader.close()
    reasons = {one.key: one.reason for one in manifest.problems}
    assert reasons.pop("gone") == Reason.UNREADABLE
    assert set(reasons.values()) == {Reason.NO_CAPTION}
    rows = pq.read_table(tmp_path / "out" / "000000.parquet").to_pylist()
    assert len(rows) == 6


def test_a_folder_that_cannot_be_looked_into_is_told(tmp_path, monkeypatch):
    pictures(tmp_path / "inner")
    scan = os.scandir

    def refuses(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(PermissionError, match="inner"):
        FolderSource(tmp_path)


def test_remote_shards_are_packed_as_local_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(as_shards(tmp_path / "in")[0][0])
    local = pack(ShardSource(folder, caption="json.texts"), tmp_path / "a", workers=2)
    with serving(folder) as site:
        places = [f"{site.url}/{{0..1}}.tar"]
        assert find_format(places) == "shards"
        source = open_source(places, format="shards", caption="json.texts")
        remote = pack(source, tmp_path / "b", workers=2)
    assert remote.fingerprint == local.fingerprint
    assert packed(tmp_path / "a") == packed(tmp_path / "b")


def test_foreign_layouts_are_read_without_packing(tmp_path):
    """Shards as img2dataset and CLIP_benchmark lay them out go straight into batches."""
    laion: dict[str, bytes] = {}
    bench: dict[str, bytes] = {}
    for n in range(4):
        key = f"{n:09d}"
        laion[f"{key}.jpg"] = picture(n, side=16, form="JPEG")
        laion[f"{key}.json"] = json.dumps({"caption": f"cat {n}", "key": key}).encode()
        laion[f"{key}.txt"] = f"cat {n}".encode()
        bench[f"s{n:07d}.cls"] = b"1"
        bench[f"s{n:07d}.txt"] = f"first {n}\nsecond {n}".encode()
        bench[f"s{n:07d}.webp"] = picture(n, form="WEBP")
    put(tmp_path / "laion", {"00000_stats.json": "{}", "00000.parquet": b""})
    put(tmp_path / "bench", {"nshards.txt": "1"})
    write_tar(tmp_path / "laion" / "00000.tar", laion)
    write_tar(tmp_path / "bench" / "0.tar", bench)
    (batch,) = iterate(tmp_path / "laion", batch_size=4, image_size=8)
    assert batch.captions == [f"cat {n}" for n in range(4)]
    (batch,) = iterate(tmp_path / "bench", batch_size=4, image_size=8)
    assert batch.captions == [f"first {n}\nsecond {n}" for n in range(4)]


def test_linked_folders_are_followed_once(tmp_path):
    folder = pictures(tmp_path / "in")
    elsewhere = pictures(tmp_path / "elsewhere")
    before = len(FolderSource(folder))
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    assert len(FolderSource(folder)) == before + len(FolderSource(elsewhere))


def test_a_quote_left_open_at_the_end_is_told(tmp_path):
    pictures(tmp_path)
    table = tmp_path / "table.csv"
    table.write_text('image,caption\np0.png,fine\np1.png,"open\np2.png,x\np3.png,y\n')
    source = open_source([str(table)], format="csv")
    assert "is a quote left open?" in source.problems[0].detail
