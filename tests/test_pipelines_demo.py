"""The demo in small: a part of the pictures, a moment of training, every stage and the page."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import align
from pipelines import demo, pretrain, run_folder
from pipelines.cli import parse
from pipelines.config import ConfigError
from pipelines.schemas import DemoConfig
from shards import demo as built_in
from shards.sources import Record

SUBGROUPS = ["heart", "geometric", "time", "hand-fingers-open", "person-sport"]
SMALL = [
    "pretrain.samples=256",
    "pretrain.batch_size=64",
    "pretrain.lanes=64",
    "pretrain.save_every=128",
    "pretrain.log_every=1",
    "pretrain.validation.every=256",
    "pretrain.stages=[{until: 0.5, image_size: 24}]",
    "pretrain.model.image_size=32",
    "pretrain.model.dim=32",
    "pretrain.augment.decode_size=32",
    "pretrain.precision=fp32",
    "fuse.steps=6",
    "fuse.batch_size=32",
]


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """A twentieth of the built-in data: five subgroups, two skin tones."""
    with pytest.MonkeyPatch.context() as patch:
        few = {
            name: replace(
                split, where={**split.where, "subgroup": SUBGROUPS, "skin_tone": ["", "dark"]}
            )
            for name, split in built_in.SPLITS.items()
        }
        patch.setattr(built_in, "SPLITS", few)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # weights are compared to the bit
        yield
        torch.set_num_threads(threads)


def config(out: Path, *more: str) -> DemoConfig:
    found = parse("demo", [f"out={out}", *SMALL, *more])
    assert isinstance(found, DemoConfig)
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    assert demo.run(config(out)) == 0
    return out


@pytest.mark.slow
def test_every_figure_has_its_interval_and_the_best_head_is_named(done):
    results = json.loads((done / "results.json").read_text())
    titles = {name.split(": ")[0] for name in results["figures"]}
    assert {"unseen artist", "unseen concepts", "composed, sum", "composed, late"} <= titles
    for name, figure in results["figures"].items():
        assert figure["low"] <= figure["value"] <= figure["high"], name
        assert figure["count"] > 0
    assert results["best_head"] in {"early", "intermediate", "late"}
    assert set(results["seconds"]) == {
        *("pack", "pretrain", "embed", "index", "evaluate", "fuse", "report"),
    }
    assert results["peak_memory_mb"] > 0


@pytest.mark.slow
def test_the_page_is_whole_and_needs_nothing_else(done):
    page = (done / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert page.count("data:image/") > 50
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    for title in ("Training", "What it knows", "Search in your own words", "The space"):
        assert title in page


@pytest.mark.slow
def test_the_bundle_loads_and_encodes(done):
    model = align.load(done / "bundle")
    pictures = model.encode_image([Image.new("RGBA", (50, 30), (255, 0, 0, 90))])
    texts = model.encode_text(["red heart", "blue circle"])
    assert pictures.shape == (1, 32)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))


@pytest.mark.slow
def test_the_index_is_exact_tuned_for_texts_and_searched_with_the_heads_of_the_bundle(
    done, tmp_path, capsys
):
    from eval.index.card import IndexCard
    from pipelines import search
    from pipelines.heads import head_places

    card = IndexCard.load(done / "index")
    assert card.factory == "Flat", "what fuse compares heads by is exact"
    assert card.reached_by("text").at_10.value == 1
    assert set(head_places(done / "bundle")) == {"early", "intermediate", "late"}
    key = json.loads((done / "results.json").read_text())["best_head"]
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    capsys.readouterr()
    asked = ["a heart", f"image={tmp_path}/red.png", f"head={key}", "where=skin_tone = ''", "k=3"]
    found = parse("search", [*asked, f"index={done}/index", "format=json"])
    assert search.run(found) == 0  # pyright: ignore[reportArgumentType]
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["hits"]) == 3
    assert {hit["fields"]["skin_tone"] for hit in answer["hits"]} == {""}


@pytest.mark.slow
def test_nothing_of_the_test_was_trained_on(done):
    def pairs_in(name: str) -> list[dict[str, str]]:
        from pyarrow import parquet

        return parquet.read_table(done / "pairs" / f"{name}.parquet").to_pylist()

    train, test = pairs_in("train"), pairs_in("test")
    assert train
    assert test
    assert not {one["base"] for one in train} & {one["base"] for one in test}
    assert all(one["reference"].startswith("twemoji-") for one in test)
    assert not any(one["reference"].startswith("twemoji-") for one in train)
    from shards.manifest import Manifest

    names = {
        split: {
            key.split("-", 1)[0] if split == "train" else key
            for key in Manifest.open(done / "shards" / split).keys.to_pylist()
        }
        for split in built_in.SPLITS
    }
    assert "twemoji" not in names["train"]
    assert not names["vendor"] & names["unseen"]


@pytest.mark.slow
def test_a_second_run_says_that_it_is_done_and_touches_nothing(done, capsys):
    def state() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file()}

    before = state()
    capsys.readouterr()
    assert demo.run(config(done)) == 0
    printed = capsys.readouterr().out
    assert "done before; add --restart to run it anew" in printed
    assert "unseen artist" in printed
    assert str((done / "report.html").resolve()) in printed
    assert printed.splitlines()[-1] == f"search   align serve {done / 'index'}"
    assert state() == before


@pytest.mark.slow
def test_another_configuration_is_refused_by_its_section(done):
    with pytest.raises(ConfigError, match=r"another configuration \(fuse\)") as caught:
        demo.run(config(done, "fuse.steps=7"))
    assert "add --restart" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_demo_that_was_stopped_in_training_goes_on_where_it_was(done, tmp_path, monkeypatch):
    """Ctrl-C at step 3 of 4; the weights are then those of the demo that was never stopped."""
    original = pretrain.step

    def interrupted(training, batch):
        import signal

        measured = original(training, batch)
        if training.step == 3:
            signal.raise_signal(signal.SIGINT)
        return measured

    out = tmp_path / "run"
    monkeypatch.setattr(pretrain, "step", interrupted)
    assert demo.run(config(out)) == 130
    assert not (out / "results.json").exists()
    assert not (out / "bundle").exists()
    monkeypatch.setattr(pretrain, "step", original)
    monkeypatch.setattr(demo.embed, "run", stop_here)
    with pytest.raises(KeyboardInterrupt):
        demo.run(config(out))
    for name in ("model.safetensors", "tokenizer/tokenizer.json"):
        assert (out / "bundle" / name).read_bytes() == (done / "bundle" / name).read_bytes()


def stop_here(_config):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_restart_throws_away_what_a_demo_wrote_and_nothing_else(done, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(done, out)
    (out / "mine.txt").write_text("kept")
    seen: list[set[str]] = []

    def stages(_config):
        seen.append({path.name for path in out.iterdir()})
        shutil.copy(done / "results.json", out)
        return 0

    monkeypatch.setattr(demo, "_run_stages", stages)
    assert demo.run(config(out, "--restart", "fuse.steps=7")) == 0
    assert seen == [{".lock", "mine.txt", "config.yaml", "environment.json"}]
    assert run_folder.read_json(out / "results.json")
    assert (out / "mine.txt").read_text() == "kept"


def test_two_demos_in_one_folder_are_refused(tmp_path):
    with (
        run_folder.locked(tmp_path / "run"),
        pytest.raises(ConfigError, match="another run is at work here"),
    ):
        demo.run(config(tmp_path / "run"))


def test_at_most_so_many_queries_of_a_base_chosen_by_their_text_alone():
    from shards.demo.edits import composed_pairs

    names = {
        f"k{n}": f"{colour} heart" for n, colour in enumerate(["red", "blue", "green", "pink"])
    }
    pairs = [*composed_pairs(names), *composed_pairs({"a": "red dot", "b": "blue dot"})]
    kept = demo.at_most(pairs, 5)
    assert [pair.base for pair in kept].count("heart") == 5
    assert [pair.base for pair in kept].count("dot") == 2
    assert set(demo.at_most(pairs[::-1], 5)) == set(kept)
    assert set(demo.at_most(pairs, 3)) <= set(kept)


class Drawings:
    """A split of three hearts by one artist, each drawn as told."""

    def __init__(self, *pictures: bytes) -> None:
        self.pictures = pictures

    def records(self) -> list[Record]:
        return [
            Record(colour, picture, f"{colour} heart", {"vendor": "one"})
            for colour, picture in zip(("red", "blue", "green"), self.pictures, strict=True)
        ]


def test_concepts_that_an_artist_draws_alike_to_the_byte_make_no_query(monkeypatch):
    monkeypatch.setitem(built_in.SPLITS, "three", Drawings(b"a", b"b", b"c"))
    assert len(demo._pairs_of("three")) == 6
    monkeypatch.setitem(built_in.SPLITS, "three", Drawings(b"a", b"b", b"a"))
    assert demo._pairs_of("three") == []
