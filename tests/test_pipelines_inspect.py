"""`align inspect` from end to end: what it says, writes, sets aside and repairs; its exit codes."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from http_server import serving
from PIL import Image, ImageEnhance
from shards_corpus import picture, sample, write_set, write_tar

from eval.report import Histogram, Hit, Number, Page, Twins
from eval.report_histograms import histogram
from eval.report_html import render
from pipelines.cli import main, parse
from pipelines.inspect import FOUND, run
from pipelines.inspect_text import counts, size, spread
from pipelines.schemas import InspectConfig
from shards.loader import ShardLoader
from shards.manifest import Manifest
from shards.packing import pack
from shards.sources import Record


def inspect(*arguments: object) -> int:
    config = parse("inspect", [str(argument) for argument in arguments])
    assert isinstance(config, InspectConfig)
    return run(config)


def scene(number: int, side: int = 96) -> Image.Image:
    """Overlapping blocks of colour: unlike any other number's."""
    rng = np.random.default_rng(number)
    pixels = np.full((side, side, 3), rng.integers(0, 256, 3), np.uint8)
    for _ in range(25):
        top, left = rng.integers(0, side - 8, 2)
        height, width = rng.integers(8, side // 2, 2)
        pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def record(number: int, image: bytes | None = None, caption: str = "") -> Record:
    data = encoded(scene(number)) if image is None else image
    return Record(f"k{number}", data, caption or f"scene {number}")


def read(folder: Path) -> dict:
    return json.loads((folder / "inspect.json").read_text())


@pytest.fixture
def broken(tmp_path) -> Path:
    """A packed set of ten, of which two lost their pictures and one its end."""
    folder = tmp_path / "broken"
    manifest = pack([record(i) for i in range(10)], folder, samples_per_shard=5)
    data = bytearray((folder / "000000.tar").read_bytes())
    for row in (1, 3):
        start = int(manifest.spans["png"][0][row])
        data[start : start + 20] = b"x" * 20
    (folder / "000000.tar").write_bytes(data)
    last = (folder / "000001.tar").read_bytes()
    (folder / "000001.tar").write_bytes(last[: int(manifest.spans["txt"][0][9])])
    return folder


def test_a_sound_set_ends_with_code_0_and_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack([record(i) for i in range(6)], "pairs")
    assert inspect("pairs") == 0
    said = capsys.readouterr().out
    assert "6 samples in 1 shard" in said
    assert said.endswith("Found: nothing.\nruns/inspect/pairs/inspect.html\n")
    out = tmp_path / "runs" / "inspect" / "pairs"
    report = read(out)
    assert (report["seen"]["seen"], report["seen"]["bad"], report["found"]) == (6, 0, {})
    assert report["seen"]["tokens"]["lengths"]["most"] == 4.0  # two words and two marks
    page = (out / "inspect.html").read_text()
    assert "scene 3" in page
    assert "Content-Security-Policy" in page
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert not list(Path("pairs").glob("quarantine*"))


def test_verify_sets_aside_what_the_loader_then_leaves_out(broken, tmp_path, capsys):
    out = tmp_path / "out"
    assert inspect(broken, "--verify", f"out={out}") == FOUND == 3
    said = capsys.readouterr().out
    assert "3: 2 undecodable image, 1 truncated" in said
    assert f"set aside        3 samples, listed in {broken}/quarantine.json; remove" in said
    assert said.count("was changed since it was packed") == 2
    report = read(out)
    assert (report["seen"]["whole"], report["set_aside"]["samples"]) == (True, 3)
    assert report["found"] == {"bad samples": 3, "disagreements": 3}
    left = Manifest.open(broken)
    assert left.keys.to_pylist() == ["k0", "k2", "k4", "k5", "k6", "k7", "k8"]
    with ShardLoader(broken, batch_size=7, image_size=8, strict=True, lanes=1) as loader:
        assert sorted(next(loader).keys) == left.keys.to_pylist()
    # What is set aside counts as dealt with; that the shards changed does not.
    assert inspect(broken, "--verify", f"out={out}") == FOUND
    assert read(out)["found"] == {"disagreements": 3}
    assert "set aside before  3 samples" in capsys.readouterr().out
    # Removing the file undoes it.
    (broken / "quarantine.json").unlink()
    assert len(Manifest.open(broken)) == 10


def test_a_list_that_is_no_longer_needed_goes(broken, tmp_path):
    whole = pack([record(i) for i in range(10)], tmp_path / "sound", samples_per_shard=5)
    assert inspect(broken, "--verify", f"out={tmp_path}/out") == FOUND
    for shard in whole.shards:
        (broken / shard.name).write_bytes((whole.folder / shard.name).read_bytes())
    assert inspect(broken, "--verify", f"out={tmp_path}/out") == 0
    assert not (broken / "quarantine.json").exists()
    assert Manifest.open(broken).fingerprint == whole.fingerprint
    (broken / "quarantine.json").write_text("{")
    assert inspect(broken, f"out={tmp_path}/out") == FOUND
    assert read(tmp_path / "out")["found"] == {"disagreements": 1}
    assert inspect(broken, "--verify", f"out={tmp_path}/out") == 0
    assert not (broken / "quarantine.json").exists()


def test_a_quick_look_draws_some_and_sets_nothing_aside(broken, tmp_path, capsys):
    assert inspect(broken, "sample=4", f"out={tmp_path}/out") == FOUND
    report = read(tmp_path / "out")
    assert report["seen"]["seen"] == 4
    assert not report["seen"]["whole"]
    assert "drawn at random; --verify looks at all" in capsys.readouterr().out
    assert not (broken / "quarantine.json").exists()


def test_repair_writes_a_sound_set_and_leaves_the_old_one_alone(broken, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    made = tmp_path / "made"
    assert inspect(broken, "--repair", made, f"out={tmp_path}/out") == FOUND
    assert "7 samples in" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == before
    assert inspect(made, "--verify", f"out={tmp_path}/again") == 0
    assert read(tmp_path / "out")["repair"]["left_out"] == 3


def test_copies_are_grouped_and_named(tmp_path):
    one = scene(1)
    records = [
        *[record(i) for i in range(8)],
        record(20, encoded(one)),
        record(21, encoded(one, "BMP")),
        record(22, encoded(one.resize((60, 60), Image.Resampling.BICUBIC), "JPEG", quality=60)),
        record(23, encoded(ImageEnhance.Brightness(scene(5)).enhance(0.9), "JPEG")),
        *[record(30 + i, picture(200 + i)) for i in range(4)],  # flat: no copies of each other
    ]
    pack(records, tmp_path / "set")
    assert inspect(tmp_path / "set", f"out={tmp_path}/out") == 0
    report = read(tmp_path / "out")["copies"]
    assert report["superfluous"] == {"same file": 1, "same pixels": 2, "looks alike": 4}
    assert (report["looked_at"], report["flat"], report["groups"]) == (16, 4, 2)
    groups = [json.loads(x) for x in (tmp_path / "out" / "copies.jsonl").read_text().splitlines()]
    keys = [[one["key"] for one in group["samples"]] for group in groups]
    assert keys == [["k1", "k20", "k21", "k22"], ["k5", "k23"]]
    assert {group["kind"] for group in groups} == {"looks alike"}
    assert "4 x looks alike" in (tmp_path / "out" / "inspect.html").read_text()


def test_overlap_of_test_and_training_data_is_told(tmp_path, capsys):
    pack([record(i) for i in range(12)], tmp_path / "train")
    test = [
        record(50, encoded(scene(3)), "another caption"),
        record(51, encoded(scene(4), "BMP"), "Scene  4"),
        record(52, encoded(scene(5).resize((64, 64)), "JPEG", quality=50), "scene five"),
        record(53, None, "scene 9"),
        *[record(60 + i) for i in range(4)],
    ]
    pack(test, tmp_path / "test")
    options = (tmp_path / "test", "--against", tmp_path / "train", f"out={tmp_path}/out")
    assert inspect(*options) == FOUND
    report = read(tmp_path / "out")
    overlap = report["overlap"]
    assert overlap["by_kind"] == {"same file": 1, "same pixels": 1, "looks alike": 1}
    assert (overlap["copied"], overlap["pictures"], overlap["share"]) == (3, 8, 3 / 8)
    assert (overlap["same_caption"], overlap["copied_with_the_caption"]) == (2, 1)
    assert report["found"] == {"pictures that both sets hold": 3}
    pairs = [json.loads(x) for x in (tmp_path / "out" / "overlap.jsonl").read_text().splitlines()]
    said = {(pair["sample"]["key"], pair["copy_of"]["key"]) for pair in pairs}
    assert said == {("k50", "k3"), ("k51", "k4"), ("k52", "k5")}
    assert "3 of 8 pictures (37.5 %)" in capsys.readouterr().out
    pack([record(70)], tmp_path / "clean")
    assert inspect(tmp_path / "clean", f"against={tmp_path}/train", f"out={tmp_path}/out") == 0


def test_shards_of_others_with_every_trouble(tmp_path, capsys):
    folder = tmp_path / "wild"
    folder.mkdir()
    hostile = "</script><script>alert(1)</script>\u202e" + "x" * 3000
    members = [
        *sample(0).items(),
        ("img.v1.0001.png", picture(2)),
        ("img.v1.0001.txt", hostile.encode()),
        ("img.v1.0002.png", picture(3)),
        ("img.v1.0002.txt", "赤いハート".encode()),
        ("alone.png", picture(4)),
        ("../evil.png", picture(1)),
        ("empty.png", b""),
        ("empty.txt", b"nothing to see"),
    ]
    write_tar(folder / "a.tar", members)
    (folder / "sizes.json").write_text('{"a.tar": 99}')
    assert inspect(folder, f"out={tmp_path}/out") == FOUND
    report = read(tmp_path / "out")
    assert report["found"] == {
        "damage of shards": 1,
        "bad samples": 2,
        "keys with dots": 2,
        "disagreements": 1,
    }
    page = (tmp_path / "out" / "inspect.html").read_text()
    assert "<script>alert" not in page
    assert "unsafe member name" in page
    assert report["seen"]["tokens"]["exceeding"] == 1 / 4
    assert "other readers cut them at the first dot" in capsys.readouterr().out


def test_nothing_but_bad_samples_is_told_and_not_set_aside(tmp_path, capsys):
    folder = tmp_path / "bad"
    folder.mkdir()
    write_tar(folder / "0.tar", {f"{n}.txt": b"no picture" for n in range(3)})
    assert inspect(folder, "--verify", f"out={tmp_path}/out") == FOUND
    assert "3: 3 no image" in capsys.readouterr().out
    assert not (folder / "quarantine.json").exists()


def test_read_only_data_is_inspected(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_set(tmp_path / "set", [3])
    names = sorted(path.name for path in folder.iterdir())

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    # The tests may run as root, whom no mode keeps from writing.
    real = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *rest, **options: (
            refuse()
            if "w" in mode and self.parent == folder
            else real(self, mode, *rest, **options)
        ),
    )
    assert inspect(folder, f"out={tmp_path}/out") == 0
    assert sorted(path.name for path in folder.iterdir()) == names


def test_what_a_server_does_not_give_is_not_set_aside(broken, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(tmp_path) as site:
        site.break_down("404", paths="000001.tar")
        place = f"{site.url}/broken/{{000000..000001}}.tar"
        assert inspect(place, "--verify", f"out={tmp_path}/out") == FOUND
    report = read(tmp_path / "out")
    assert report["seen"]["reasons"] == {"shard missing": 5, "undecodable image": 2}
    assert (report["set_aside"]["samples"], report["set_aside"]["passing"]) == (2, 5)
    assert "5 that the server did not give" in capsys.readouterr().out
    assert not (broken / "quarantine.json").exists()


def test_mistakes_are_one_line(tmp_path, capsys):
    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["inspect", *map(str, arguments)])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "there is no file or folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", f"out={tmp_path}/out").count("\n") == 1
    assert not (tmp_path / "out").exists()
    pack([record(1)], tmp_path / "set")
    said = refused(tmp_path / "set", f"repair={tmp_path}/set", f"out={tmp_path}/out")
    assert said.count("\n") == 1
    assert "name a new or empty folder" in said
    assert not (tmp_path / "out").exists()
    said = refused(tmp_path / "set", f"against={tmp_path}/empty", f"out={tmp_path}/out")
    assert "empty" in said
    assert not (tmp_path / "out").exists()


def test_words_for_numbers():
    assert spread({"least": 1, "low": 1, "median": 1, "high": 1, "most": 1}, "px") == "1 px"
    assert spread({"least": 1, "low": 2, "median": 1200, "high": 3, "most": 4}).startswith("1,200")
    assert counts({}) == "none"
    assert [size(n) for n in (0, 1500, 2.5e12)] == ["0 B", "1.5 kB", "2.5 TB"]


# What the page needed of the report's parts.


def bars(chart: Histogram) -> list[float]:
    return [
        float(x) for x in re.findall(r'height="([\d.]+)" class="bar"', render(histogram(chart)))
    ]


def test_histograms_count_every_value_once():
    values = [1, 2, 2, 3, 3, 3, 90]
    whole = Histogram.of("words", np.array(values * 50), x_label="words")
    assert sum(whole.counts) == 350
    short = Histogram.of("words", [1, 2, 2, 3], x_label="words")
    assert (list(short.edges), list(short.counts)) == ([0.5, 1.5, 2.5, 3.5], [1, 2, 1])
    log = Histogram.of("side", np.geomspace(10, 4000, 500), x_label="px", log=True)
    assert sum(log.counts) == 500
    assert np.allclose(np.diff(np.log(log.edges)), np.log(log.edges[1] / log.edges[0]))
    one = Histogram.of("side", [64.0] * 9, x_label="px", log=True)
    assert sum(one.counts) == 9
    heights = bars(short)
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    for wrong in ([], [1.0, np.nan]):
        with pytest.raises(ValueError, match="no values"):
            Histogram.of("words", wrong, x_label="words")
    with pytest.raises(ValueError, match="positive"):
        Histogram.of("words", [0.0, 1.0], x_label="words", log=True)
    with pytest.raises(ValueError, match="rising edges"):
        histogram(Histogram("x", [1.0, 1.0], [3], "words"))


def test_a_rare_value_still_has_a_bar():
    heights = bars(Histogram("x", [0.0, 1.0, 2.0, 3.0], [1_000_000, 1, 0], "words"))
    assert heights[0] > 100
    assert heights[1:] == [1.0, 0.0]


def test_tables_grids_and_twins_escape_and_refuse_nothing():
    page = Page("title")
    page.headline([Number("Samples", "3,519", "px", "<b>")])
    section = page.section("Section")
    section.table(("A", "B"), [("<i>", 1200), ("two", "words")])
    hits = [Hit("<u>", scene(1)), Hit("b", scene(2))]
    section.pictures(hits).twins([Twins(*hits, note="<s>")])
    html = page.html()
    for text in ("&lt;b&gt;", "&lt;i&gt;", "&lt;u&gt;", "&lt;s&gt;", "1,200"):
        assert text in html
    assert html.count("<image") == 2
    for call in (lambda: section.table(("A",), []), lambda: section.table(("A",), [("a", "b")])):
        with pytest.raises(ValueError, match="table A: no rows"):
            call()
    with pytest.raises(ValueError, match="pictures: none"):
        section.pictures([])
    with pytest.raises(ValueError, match="twins: no pairs"):
        section.twins([])
