"""What runs put into bundles: temperature, history without this machine's folders, results."""

import json
import math
from pathlib import Path

import pytest
from pairs_corpus import tiny_pretrain, write_pairs
from safetensors.torch import load_file

import align
from align.bundle import fingerprint
from align.checkpoint import checkpoints
from pipelines import pretrain
from pipelines.bundles import sources
from pipelines.cli import main
from pipelines.config import build
from pipelines.evaluate import record_reports
from pipelines.schemas import PretrainConfig


def config(values: dict) -> PretrainConfig:
    return build(PretrainConfig, values, origin="test")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Shards to train on, others to validate on, and a run."""
    root = tmp_path_factory.mktemp("bundles")
    write_pairs(root / "one")
    write_pairs(root / "two", hand="other")
    values = tiny_pretrain(root / "one", root / "run", samples=96, save_every=96)
    values["validation"] = {"data": str(root / "two"), "every": 96}
    assert pretrain.run(config(values)) == 0
    return root


def evaluate(bundle: Path, data: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(bundle), str(data)])
    assert left.value.code == 0


def results(bundle: Path) -> dict[tuple[str, str], dict]:
    rows = json.loads((bundle / "results.json").read_text())["results"]
    return {(row["task"], row["figure"]): row for row in rows}


def test_the_temperature_is_that_which_the_saved_weights_were_trained_with(place):
    average = load_file(checkpoints(place / "run")[-1] / "average.safetensors")
    model = align.load(place / "run" / "bundle")
    assert model.logit_scale.item() == average["module.loss.logit_scale"].item()
    assert model.logit_scale.item() != pytest.approx(math.log(1 / 0.07), abs=1e-6), "it learned"


def test_the_bundle_tells_its_history_and_nothing_of_this_machine(place):
    bundle = place / "run" / "bundle"
    provenance = json.loads((bundle / "config.json").read_text())["provenance"]
    assert provenance["sources"] == ["one"]
    assert (provenance["samples"], provenance["steps"]) == (96, 6)
    assert provenance["config"]["batch_size"] == 16
    for path in bundle.rglob("*"):
        if path.is_file():
            assert str(place).encode() not in path.read_bytes(), path.name
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert f"`{provenance['data']}`" in card
    assert "\nbatch_size: 16\n" in card


def test_the_last_validation_is_kept_with_its_intervals(place):
    bundle = place / "run" / "bundle"
    row = results(bundle)["validation", "image_to_text_recall@1"]
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    assert row["value"] == json.loads(lines[-1])["image_to_text_recall@1"]
    assert row["low"] <= row["value"] <= row["high"]
    assert row["count"] == 48
    assert len(row["protocol"]["data"]) == 64
    assert "| validation | image_to_text_recall@1 |" in (bundle / "README.md").read_text()


def test_a_run_gone_on_with_at_its_very_end_keeps_card_and_results(place):
    bundle = place / "run" / "bundle"
    (bundle / "README.md").write_text("# Mine\n\n" + (bundle / "README.md").read_text())
    before = {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file()}
    values = tiny_pretrain(place / "one", place / "run", samples=96, save_every=96, resume=True)
    values["validation"] = {"data": str(place / "two"), "every": 96}
    assert pretrain.run(config(values)) == 0
    assert {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file()} == before


def test_a_bundle_is_measured_even_where_the_last_step_is_not_taken_again(place, tmp_path):
    values = tiny_pretrain(place / "one", place / "run", samples=96, save_every=96, resume=True)
    values |= {"bundle": str(tmp_path / "b"), "validation": {"data": str(place / "two")}}
    assert pretrain.run(config(values)) == 0
    assert results(tmp_path / "b").keys() == {
        key for key in results(place / "run" / "bundle") if key[0] == "validation"
    }


def test_evaluate_keeps_its_figures_with_the_bundle(place, capsys):
    bundle = place / "run" / "bundle"
    before = fingerprint(bundle)
    evaluate(bundle, place / "two")
    kept = results(bundle)
    assert {task for task, _ in kept} == {"validation", "retrieval"}
    row = kept["retrieval", "text_to_image_recall@1"]
    assert f"{100 * row['value']:.1f} %" in capsys.readouterr().out
    assert fingerprint(bundle) == before
    evaluate(bundle, place / "two")
    assert results(bundle) == kept, "measured again, it is the same line"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("torn")])
def test_a_bundle_that_cannot_be_written_to_is_a_note(place, capsys, monkeypatch, error):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("pipelines.evaluate.record_results", refuse)
    evaluate(place / "run" / "bundle", place / "two")
    out = capsys.readouterr().out
    (note,) = [line for line in out.splitlines() if line.startswith("note:")]
    assert str(place / "run" / "bundle") in note
    assert ("Permission denied" in note) or ("torn" in note)
    assert "image_to_text_recall@1" in out


def test_nothing_is_written_to_what_is_no_bundle_of_ours(place, tmp_path, monkeypatch):
    def written(*_: object) -> None:
        raise AssertionError("written")

    monkeypatch.setattr("pipelines.evaluate.record_results", written)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    config_of_a_bundle = (place / "run" / "bundle" / "config.json").read_bytes()
    (snapshot / "config.json").write_bytes(config_of_a_bundle)
    for name in ("someone/model", "hf:someone/model", tmp_path, snapshot):
        record_reports(name, [])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("/home/me/secret/shards", ["shards"]),
        ("runs/demo/shards/train/", ["train"]),
        ("https://me:pass@example.org/a/{0..9}.tar?key=x#y", ["https://example.org/a/{0..9}.tar"]),
        ("s3://bucket/birds", ["s3://bucket/birds"]),
        ("file:///home/me/web", ["web"]),
        ([{"data": "/a/web", "weight": 2}, {"data": "gs://b/c"}], ["web", "gs://b/c"]),
    ],
)
def test_sources_are_told_without_folders_and_keys(tmp_path, data, told):
    values = {**tiny_pretrain(Path("x"), tmp_path / "run"), "data": data}
    assert sources(PretrainConfig.model_validate(values)) == told


def test_a_place_that_holds_something_else_is_refused_before_the_run(place, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("ten years")
    values = tiny_pretrain(place / "one", tmp_path / "run", bundle=str(tmp_path / "thesis"))
    with pytest.raises(ValueError, match="thesis is there and is no bundle"):
        pretrain.run(config(values))
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "thesis" / "thesis.tex").exists()
