"""Where the weights of a run's towers come from, and what is said of those that have none."""

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
from accelerate import Accelerator
from pairs_corpus import TINY_BERT, TINY_RESNET, tiny_model, tiny_pretrain
from transformers import BertConfig, BertModel

from align import bundle
from align.encoders import build_text_tower
from align.encoders.tower import Vocabulary
from align.parameters import how_it_learns
from pipelines import export as exporting
from pipelines import pretrain, training
from pipelines.config import build
from pipelines.learning import learning_rules, locked_at_random, origins
from pipelines.schemas import ExportConfig, PretrainConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A bundle, timm's format, Hugging Face's."""
    place = tmp_path_factory.mktemp("folders")
    bundle.save(tiny_model(), place / "bundle")
    resnet = timm.create_model("resnet10t", **TINY_RESNET)
    timm.models.save_for_hf(
        resnet, str(place / "timm"), model_args=TINY_RESNET, safe_serialization=True
    )
    BertModel(BertConfig(vocab_size=200, **TINY_BERT)).save_pretrained(place / "hf")
    return {name: place / name for name in ("bundle", "timm", "hf")}


def config(image: dict[str, Any], text: dict[str, Any], **changes: Any) -> PretrainConfig:
    values = tiny_pretrain(Path("data"), Path("out"), **changes)
    values["model"] |= {
        "image": {"name": "timm:resnet10t", "options": dict(TINY_RESNET), **image},
        "text": {"name": "hf:bert", "options": dict(TINY_BERT), **text},
    }
    return build(PretrainConfig, values, origin="test")


def filled(values: dict[str, Any], folders: dict[str, Path]) -> dict[str, Any]:
    """With folders in the places of their names."""
    return {
        key: value.format(**folders) if isinstance(value, str) else value
        for key, value in values.items()
    }


# --- where weights come from ---

TOLD: dict[str, tuple[str, dict[str, Any], str]] = {
    "timm from scratch": ("image", {}, "image: timm:resnet10t, fresh weights"),
    "hf from scratch": ("text", {}, "text: hf:bert, fresh weights"),
    "a bundle": (
        "image",
        {"name": "local:{bundle}", "options": {}},
        "image: timm:resnet10t, weights from {bundle}; its projection begins anew",
    ),
    "a bundle, for its text": (
        "text",
        {"name": "local:{bundle}", "options": {}},
        "text: hf:bert, weights from {bundle}; its projection begins anew",
    ),
    "a folder of timm": (
        "image",
        {"name": "local:{timm}", "options": {}},
        "image: timm:resnet10t, weights from {timm}; its projection begins anew",
    ),
    "a folder of timm, by its architecture alone": (
        "image",
        {"name": "timm:local-dir:{timm}", "options": {}},
        "image: timm:resnet10t, fresh weights (model.image.options.pretrained=true takes those of "
        "{timm})",
    ),
    "a folder whose weights are not wanted": (
        "image",
        {"name": "local:{timm}", "options": {"pretrained": False}},
        "image: timm:resnet10t, fresh weights (model.image.options.pretrained=true takes those of "
        "{timm})",
    ),
    "a folder of Hugging Face, by its architecture alone": (
        "text",
        {"name": "hf:{hf}", "options": {}},
        "text: hf:bert, fresh weights (model.text.options.pretrained=true takes those of {hf})",
    ),
    "a folder of Hugging Face": (
        "text",
        {"name": "hf:{hf}", "options": {"pretrained": True}},
        "text: hf:bert, weights from {hf}; its projection begins anew",
    ),
    "no projection, so that none begins anew": (
        "image",
        {"name": "local:{timm}", "options": {}, "projection": "none"},
        "image: timm:resnet10t, weights from {timm}",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_line_says_where_the_weights_of_a_tower_come_from(case, folders):
    side, wanted, expected = TOLD[case]
    named: dict[str, Any] = {"image": {}, "text": {}, side: filled(wanted, folders)}
    named |= {"model__dim": 32} if wanted.get("projection") else {}
    settings = config(**named)
    model = training.make_model(settings.model, tiny_model().tokenizer)
    lines = origins(settings, model)
    assert lines[["image", "text"].index(side)] == expected.format(**folders)
    assert [line.partition(":")[0] for line in lines] == ["image", "text"]


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("timm:resnet10t", True, "published weights; its projection begins anew"),
        ("open_clip:ViT-B-32", "openai", "weights from openai; its projection begins anew"),
        (
            "timm:hf-hub:some/one",
            True,
            "weights from some/one; its projection begins anew",
        ),
        (
            "hf:some/one",
            False,
            "fresh weights (model.image.options.pretrained=true takes those of some/one)",
        ),
    ],
)
def test_weights_that_are_fetched_are_told_likewise(name, pretrained, expected):
    settings = config({"name": name, "options": {"pretrained": pretrained}}, {})
    model = tiny_model()  # in place of what would be fetched
    assert origins(settings, model)[0] == f"image: {model.image.name}, {expected}"


# --- what is locked without any ---


def notes(settings: PretrainConfig) -> list[str]:
    model = training.make_model(settings.model, tiny_model().tokenizer)
    learning = how_it_learns(model, learning_rules(settings, model), weight_decay=0.1)
    return locked_at_random(settings, model, learning)


def test_a_tower_that_is_locked_at_random_weights_is_told_with_the_way_to_some(folders):
    assert notes(config({"trainable": 0}, {})) == [
        "note: the image tower is locked at random weights: name some with "
        "model.image.name=local:FOLDER or model.image.options.pretrained=true"
    ]
    assert notes(config({}, {"trainable": 0})) == [
        "note: the text tower is locked at random weights: name some with model.text.name="
        "local:FOLDER or model.text.name=hf:HUB-ID with model.text.options.pretrained=true"
    ]
    by_name = {"name": f"hf:{folders['hf']}", "options": {}, "trainable": 0}
    assert notes(config({}, by_name)) == [
        "note: the text tower is locked at random weights: "
        f"model.text.options.pretrained=true takes those of {folders['hf']}"
    ]
    assert notes(config({}, {**by_name, "options": {"pretrained": True}})) == []
    assert (
        notes(config({"name": f"local:{folders['bundle']}", "options": {}, "trainable": 0}, {}))
        == []
    )
    assert notes(config({}, {})) == []


def test_so_is_one_of_which_the_last_groups_alone_learn_and_one_that_a_rule_locks():
    some = notes(config({"trainable": 2}, {}))
    assert len(some) == 1
    assert "weights of the image tower are locked as they were drawn at random: name" in some[0]
    kept, _, whole = some[0].removeprefix("note: ").partition(" weights ")[0].partition(" of ")
    assert 0 < int(kept.replace(",", "")) < int(whole.replace(",", ""))
    rule = [{"match": "text.transformer.encoder.*", "rate": 0}]
    assert "of the text tower are locked" in notes(config({}, {}, optimizer__rules=rule))[0]
    image, text = notes(config({"trainable": 0}, {"trainable": 0}))
    assert "the image tower" in image
    assert "the text tower" in text


def test_gains_and_what_an_architecture_holds_fixed_are_no_reason_for_a_note():
    biases = [{"match": "*.bias", "rate": 0}, {"match": "*LayerNorm*", "rate": 0}]
    assert notes(config({}, {}, optimizer__rules=biases)) == []
    fixed = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16}
    options = {**fixed, "pos_embed_type": "sin_cos_2d"}
    assert notes(config({"name": "open_clip:ViT-B-32", "options": options}, {})) == []


# --- what a run says ---


def test_a_run_says_all_of_it_before_it_trains_and_once(data, folders, tmp_path, capfd):
    values = tiny_pretrain(data, tmp_path / "run", samples=16)
    values["model"]["image"] |= {"trainable": 0}
    values["model"]["text"] = {"name": f"hf:{folders['hf']}", "options": {"pretrained": True}}
    values["tokenizer"] = {"name": str(folders["bundle"] / "tokenizer")}
    settings = build(PretrainConfig, values, origin="test")
    assert pretrain.run(settings) == 0
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert lines[1:3] == [
        "image: timm:resnet10t, fresh weights",
        f"text: hf:bert, weights from {folders['hf']}; its projection begins anew",
    ]
    assert lines[3].startswith("parameters")
    assert sum(line.startswith("note: the image tower is locked at random") for line in lines) == 1
    said, first_step = captured.out.index("note: "), captured.out.index("trained on 16 samples")
    assert said < first_step
    assert "Loading weights" not in captured.err
    again = settings.model_copy(update={"resume": True})
    assert pretrain.run(again) == 0
    assert "weights from" not in capfd.readouterr().out


def test_a_run_that_compiles_says_that_the_first_steps_are_slow(data, tmp_path):
    slow = "compiling the towers: the first step with pictures of a new size is slow"
    for compiles in (False, True):
        values = tiny_pretrain(data, tmp_path / "run", compile=compiles)
        run = training.build(build(PretrainConfig, values, origin="test"), Accelerator(cpu=True))
        assert (slow in pretrain.introduction(run)) == compiles


@pytest.mark.parametrize(
    ("to", "line"),
    [
        ("hf", "writing {out} ..."),
        ("onnx", "writing image.onnx and text.onnx, for which torch traces both towers ..."),
    ],
)
def test_an_export_says_what_it_does_before_it_takes_its_time(
    to, line, folders, tmp_path, capsys, monkeypatch
):
    said: list[str] = []
    monkeypatch.setattr(exporting, "export", lambda *_, **__: said.append(capsys.readouterr().out))
    wanted = {"bundle": str(folders["bundle"]), "out": str(tmp_path / "out"), "to": to}
    exporting.run(build(ExportConfig, wanted, origin="test"))
    assert said == [line.format(out=tmp_path / "out") + "\n"]


# --- what libraries say of a vocabulary ---


@pytest.mark.parametrize("name", ["t5", "umt5", "modernbert", "siglip_text_model"])
def test_a_vocabulary_is_taken_over_without_a_warning(name, caplog):
    small: dict[str, dict[str, Any]] = {
        "modernbert": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
        "siglip_text_model": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        },
    }
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        made = build_text_tower(
            f"hf:{name}", vocabulary=Vocabulary(61, 1, 3), **small.get(name, t5)
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert made.vocabulary_size == 61
    assert not caplog.records


def test_an_architecture_whose_texts_depend_on_their_padding_is_refused():
    with pytest.raises(ValueError, match=r"hf:funnel brings neighbouring .*; choose another"):
        build_text_tower("hf:funnel", vocabulary=Vocabulary(61, 1, 3))
