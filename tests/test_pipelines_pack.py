"""`align pack`, as it is called."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards_corpus import picture, write_set, write_tar

from pipelines import pack as pack_module
from pipelines.cli import main
from shards.manifest import Manifest
from shards.sources import FORMATS


def align(capsys, *arguments):
    """Exit code, and the lines of output and of errors."""
    with pytest.raises(SystemExit) as caught:
        main(["pack", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return caught.value.code, said.out.splitlines(), said.err.splitlines()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(5):
        (place / f"{number}.png").write_bytes(picture(number))
        (place / f"{number}.txt").write_text(f"caption {number}")
    return place


def test_a_folder_is_packed_and_told(folder, tmp_path, capsys):
    (folder / "3.png").write_bytes(b"broken")
    code, out, err = align(capsys, folder, tmp_path / "out", "samples_per_shard=2")
    fingerprint = Manifest.load(tmp_path / "out").fingerprint[:12]
    assert (code, err) == (0, [])
    assert out == [
        f"{folder}: taken as format=folder",
        f"left out: {folder}, sample '3': undecodable image (not a picture of a known format)",
        f"{tmp_path / 'out'}: 4 samples in 3 shards, 1 left out, fingerprint {fingerprint}",
    ]


def test_a_name_with_line_breaks_stays_in_its_line(folder, tmp_path, capsys):
    (folder / "a\nb\x1b[1m\udcff.png").write_bytes(b"broken")
    code, out, _ = align(capsys, folder, tmp_path / "out")
    assert (code, len(out)) == (0, 3)
    assert "left out" in out[1]
    assert out[1].isprintable()


def test_a_class_folder_is_told_for_one(tmp_path, capsys):
    for name in ("red_fox", "owl"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(picture(1))
    code, out, _ = align(capsys, tmp_path / "in", tmp_path / "out", "template=one {}")
    assert code == 0
    assert out[0] == f"{tmp_path / 'in'}: taken as format=classes"
    assert Manifest.load(tmp_path / "out").fields == ("cls", "json", "png", "txt")


def test_tables_take_a_list_and_columns(folder, tmp_path, capsys):
    for name, numbers in (("a", [0, 1]), ("b", [2])):
        lines = [f"{number}.png\tsaid {number}\n" for number in numbers]
        (folder / f"{name}.csv").write_text("".join(["filepath\ttitle\n", *lines]))
    arguments = [f"source=[{folder}/a.csv, {folder}/b.csv]", f"out={tmp_path / 'out'}"]
    code, out, _ = align(capsys, *arguments, "image=filepath", "caption=title")
    assert code == 0
    assert out[0].endswith("taken as format=csv")
    assert Manifest.load(tmp_path / "out").keys.to_pylist() == ["0", "1", "2"]


def test_shards_are_mixed_resized_and_described(tmp_path, capsys):
    source = write_set(tmp_path / "in", [3, 3])
    code, out, _ = align(
        capsys,
        f"{source}/{{000..001}}.tar",
        tmp_path / "out",
        *("shuffle_seed=3", "resize=4", "encode=webp", "sidecars=[sizes, wids]", "workers=2"),
        "samples_per_shard=4",
    )
    assert code == 0, out
    manifest = Manifest.load(tmp_path / "out")
    assert len(manifest) == 6
    assert manifest.fields == ("json", "txt", "webp")
    assert json.loads((tmp_path / "out" / "sizes.json").read_bytes()) == {
        "000000.tar": 4,
        "000001.tar": 2,
    }


def test_a_pack_that_was_cut_off_is_told_to_go_on(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    real = pack_module.pack

    def interrupted(source, *arguments, progress, **options):
        def stops(done, total):
            if done == 4:
                raise KeyboardInterrupt
            progress(done, total)

        return real(source, *arguments, progress=stops, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "pack", interrupted)
        code, _, err = align(capsys, folder, out, "samples_per_shard=2", "workers=0")
    assert (code, err) == (130, ["align pack: interrupted"])
    code, said, _ = align(capsys, folder, out, "samples_per_shard=2")
    assert code == 0
    assert f"{out}: going on with the pack that was cut off, 1 of 3 shards are done" in said
    code, _, err = align(capsys, folder, out, "samples_per_shard=2")
    assert (code, len(err)) == (2, 1)
    assert "holds a data set; choose another folder, or set overwrite" in err[0]


def test_piped_output_has_lines_of_progress(monkeypatch, capsys):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(pack_module.time, "monotonic", lambda: float(next(clock)))
    with pack_module._Progress(1000) as progress:
        for done in range(100, 600, 100):
            progress(done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "200 of 1,000 records, 17/s, 48 s left",
        "400 of 1,000 records, 17/s, 36 s left",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "format=cvs"], "unknown format 'cvs'; known: parquet, csv, jsonl"),
        (["{folder}", "template='{{}}'"], "format folder does not take 'template'"),
        (["{folder}", "sidecars=[size]"], "unknown sidecar 'size'; known: sizes"),
        (["{folder}", "workers=-1"], "workers: input should be greater than or equal to 0"),
        (["{folder}", "encode=jpg"], "encode: input should be 'keep', 'jpeg', 'webp' or 'png'"),
        (["{tmp}/empty"], "holds no picture"),
        (["{tmp}/tables"], "holds no picture .*; there is t.parquet"),
        (["{tmp}/none"], "there is no file or folder .*none"),
        (["{tmp}/tables/t.parquet"], "no column 'image'; it has picture, text; set image"),
        (["{tmp}/tables/t.parquet", "image=picture"], "no column 'caption'; .*; set caption"),
        (["{tmp}/tables/t.parquet", "format=coco"], "is not JSON"),
        (["[{folder}, {folder}]", "format=folder"], "takes one source, not 2"),
        (["{tmp}/out"], "source and out are both .*/out; choose another folder for out"),
        (["{tmp}/bare"], "all 1 are bad; the first: .*: no caption"),
        (["{tmp}/twice"], "the key 'a' comes twice; choose a key"),
    ],
)
def test_mistakes_are_told_in_a_line(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "twice").mkdir()
    (tmp_path / "bare" / "1.png").write_bytes(picture(1))
    for shard in "01":
        write_tar(tmp_path / "twice" / f"{shard}.tar", {"a.png": picture(1), "a.txt": b"x"})
    table = pa.table({"picture": [picture(1)], "text": ["x"]})
    pq.write_table(table, tmp_path / "tables" / "t.parquet")
    first, *rest = (one.format(folder=folder, tmp=tmp_path) for one in arguments)
    code, _, err = align(capsys, f"source={first}", f"out={tmp_path / 'out'}", *rest)
    assert code == 2
    assert len(err) <= 2  # a configuration's errors have a heading
    assert re.search(message, "\n".join(err)), err


def test_a_remote_target_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = align(capsys, folder, "s3://bucket/set")
    assert (code, len(err)) == (2, 1)
    assert "is no local folder" in err[0]
    assert not (tmp_path / "s3:").exists()


def test_the_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in FORMATS)
