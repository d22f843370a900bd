"""Going on from a bundle: all of its weights, its tokenizer, and nothing that it has not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from pairs_corpus import COLOURS, SHAPES, TINY_BERT, TINY_VIT, picture, tiny_model, tiny_pretrain
from torch import Tensor

import align
from align.bundle import fingerprint
from align.checkpoint import checkpoints
from align.model import DualEncoder
from pipelines import doctor, pretrain, run_folder, starting
from pipelines.config import ConfigError, build
from pipelines.schemas import DoctorConfig, PretrainConfig
from pipelines.training import build as build_training

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = {
    "image": {"name": "timm:vit_tiny_patch16_224", "options": TINY_VIT},
    "text": {"name": "hf:bert", "options": TINY_BERT},
    **{"dim": 16, "image_size": 32, "context_length": 16},
}
"""Towers without batch statistics, which move whatever the learning rate is."""


def config(values: dict[str, Any]) -> PretrainConfig:
    return build(PretrainConfig, values, origin="test")


def going_on(data: Path, out: Path, bundle: Path | str, **changes: Any) -> dict[str, Any]:
    """A run from a bundle, without a word on model and tokenizer."""
    values = tiny_pretrain(data, out, start_from=str(bundle), **changes)
    if "model" not in {path.partition("__")[0] for path in changes}:
        del values["model"]
    values.pop("tokenizer")
    return values


@pytest.fixture(scope="module")
def first(data, tmp_path_factory) -> Path:
    """A run that learnt something."""
    out = tmp_path_factory.mktemp("first") / "run"
    values = tiny_pretrain(data, out, samples=48 * 24, batch_size=48, save_every=48 * 24)
    values |= {"model": VIT, "augment": {"enabled": False}}
    values["optimizer"] = {"learning_rate": 5e-3}
    assert pretrain.run(config(values)) == 0
    return out


@pytest.fixture(scope="module")
def bundle(first, tmp_path_factory) -> Path:
    """Its bundle, alone."""
    folder = tmp_path_factory.mktemp("bundles") / "shapes-v1"
    shutil.copytree(first / "bundle", folder)
    return folder


def embeddings(model: DualEncoder) -> tuple[Tensor, Tensor]:
    names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return (
        model.encode_image([picture(*name) for name in names]),
        model.encode_text([" ".join(name) for name in names]),
    )


def losses(out: Path) -> list[float]:
    lines = run_folder.read_metrics(out / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def second(data, bundle, tmp_path_factory) -> Path:
    """A run from it that hardly moves."""
    out = tmp_path_factory.mktemp("second") / "run"
    values = going_on(data, out, bundle, samples=96, batch_size=48, save_every=48)
    values |= {"augment": {"enabled": False}}
    values["optimizer"] = {"learning_rate": 1e-9, "weight_decay": 0.0}
    assert pretrain.run(config(values)) == 0
    return out


def test_it_begins_with_the_bundle_itself(first, second, bundle):
    before, after = align.load(bundle), align.load(second / "bundle")
    assert after.config == before.config
    assert after.tokenizer.ids(["red dot"]) == before.tokenizer.ids(["red dot"])
    for old, new in zip(embeddings(before), embeddings(after), strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.logit_scale, before.logit_scale, atol=1e-6, rtol=0)
    assert losses(second)[0] == pytest.approx(losses(first)[-1], rel=0.1)
    assert losses(second)[0] < 0.7 * losses(first)[0]


def test_the_new_bundle_tells_where_it_came_from(second, bundle):
    provenance = json.loads((second / "bundle" / "config.json").read_text())["provenance"]
    said = provenance["start_from"]
    assert (said["bundle"], said["fingerprint"]) == ("shapes-v1", fingerprint(bundle))
    assert said["samples"] == 48 * 24
    assert "start_from" not in provenance["config"]
    card = (second / "bundle" / "README.md").read_text()
    assert f"| began as | `shapes-v1` ({fingerprint(bundle)[:12]}) |" in card
    for path in (second / "bundle").rglob("*"):
        assert not path.is_file() or str(bundle.parent).encode() not in path.read_bytes()


def test_a_bundle_is_named_by_its_run_where_all_are_called_bundle(first, bundle):
    _, start = starting.starting(config(going_on(Path("data"), Path("run"), first / "bundle")))
    assert start is not None
    assert start.origin["bundle"] == "run/bundle"


def test_the_recorded_configuration_is_valid_and_says_the_same(second, bundle):
    values = yaml.safe_load((second / "config.yaml").read_text())
    again = config({**values, "out": "elsewhere"})
    assert again.start_from == str(bundle)
    assert (again.model.dim, again.model.image.name) == (16, "timm:vit_tiny_patch16_224")
    resolved, start = starting.starting(again)
    assert resolved == again
    assert start is not None
    assert start.weights is not None


def test_a_run_that_is_resumed_does_not_need_the_bundle(second, bundle, data, tmp_path):
    moved, out = tmp_path / "shapes-v1", tmp_path / "run"
    shutil.copytree(bundle, moved)
    values = going_on(data, out, moved, samples=96, batch_size=48, save_every=48)
    assert pretrain.run(config(values)) == 0
    straight = (out / "bundle" / "model.safetensors").read_bytes()
    shutil.rmtree(checkpoints(out)[-1])
    shutil.rmtree(out / "bundle")
    shutil.rmtree(moved)
    with pytest.raises(ConfigError, match=r"started otherwise: .*batch_size: 48 -> 16"):
        pretrain.run(config({**values, "resume": True, "batch_size": 16}))
    assert pretrain.run(config({**values, "resume": True})) == 0
    assert (out / "bundle" / "model.safetensors").read_bytes() == straight
    assert len(losses(out)) == 2
    provenance = json.loads((out / "bundle" / "config.json").read_text())["provenance"]
    assert provenance["start_from"]["bundle"] == "shapes-v1"


# --- what is given beside it ---


def test_the_model_that_it_is_may_be_given_too(bundle):
    values = tiny_pretrain(Path("data"), Path("run"), start_from=str(bundle))
    values |= {"model": {**VIT, "image": {**VIT["image"], "trainable": 0}}}
    resolved, _ = starting.starting(config(values))
    assert resolved.model.image.trainable == 0
    assert resolved.model.image.options.items() >= TINY_VIT.items()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__dim": 32}, r"model\.dim: 32 was given, and .*shapes-v1 has 16; leave it out"),
        ({"model__fit": "squash"}, r"model\.fit: 'squash' was given"),
        ({"model__image": {"name": "timm:resnet18"}}, r"model\.image\.name: 'timm:resnet18' was"),
        ({"model__image": {"options": {"depth": 2}}}, r"model\.image\.options\.depth: 2 was given"),
        ({"model__text": {"projection": "mlp"}}, r"model\.text\.projection: 'mlp' was given"),
        ({"model__text": {"options": {"hidden_size": 8}}}, r"options\.hidden_size: 8 .* has 32;"),
        ({"model__image_size": 64}, "choose model.image_size=32"),
        ({"model__context_length": 25}, "context_length 25 is more than the text tower"),
        ({"model__context_length": 2}, "a context_length of 2 leaves no room"),
        ({"tokenizer": {"name": "clip"}}, r"tokenizer\.name: 'clip' was given"),
        ({"tokenizer": {"clean": "lower"}}, r"tokenizer\.clean: 'lower' .* has 'none'"),
    ],
)
def test_another_model_or_tokenizer_is_refused_by_its_key(changes, says, bundle):
    values = tiny_pretrain(Path("data"), Path("run"), start_from=str(bundle))
    values |= {"model": {}, "tokenizer": changes.pop("tokenizer", {})}
    values["model"] = {path.removeprefix("model__"): value for path, value in changes.items()}
    with pytest.raises(ConfigError, match=says) as caught:
        starting.starting(config(values))
    assert "\n" not in str(caught.value)


def test_other_sizes_are_taken_where_the_towers_take_them(data, tmp_path):
    align.save(tiny_model(), tmp_path / "small")  # a convolutional network
    values = going_on(data, tmp_path / "run", tmp_path / "small", samples=16)
    values["model"] = {"image_size": 48, "context_length": 8}
    assert pretrain.run(config(values)) == 0
    found = align.load(tmp_path / "run" / "bundle")
    assert (found.config.image_size, found.config.context_length) == (48, 8)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere", "start_from: there is no bundle nowhere"),
        ("{data}", "start_from: .* is no bundle: it has no config.json"),
        ("{run}", "start_from: .* is no bundle.*; .*run/bundle is one"),
    ],
)
def test_a_wrong_place_is_one_line_and_no_run(place, says, data, first, tmp_path):
    place = place.format(data=data, run=first)
    with pytest.raises(ConfigError, match=says) as caught:
        pretrain.run(config(going_on(data, tmp_path / "run", place)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_temperature_is_refused_but_that_of_a_run_that_named_none_is_not(bundle):
    def asked(**loss: float) -> PretrainConfig:
        return config({**going_on(Path("data"), Path("run"), bundle), "loss": loss})

    own = 1 / align.load(bundle).logit_scale.exp().item()
    for loss in ({}, {"temperature": 0.07}, {"temperature": float(f"{own:.4g}")}):
        starting.starting(asked(**loss))
    with pytest.raises(ConfigError, match=r"^loss\.temperature: 0\.9 was given, and .* leave it"):
        starting.starting(asked(temperature=0.9))


def test_the_temperature_of_a_preset_was_not_given(bundle):
    with_preset = {**going_on(Path("data"), Path("run"), bundle), "preset": "siglip-b-16"}
    assert config(with_preset).loss.temperature == 0.07
    del with_preset["start_from"]
    assert config(with_preset).loss.temperature == 0.1


# --- what learns, from which temperature ---


def test_a_locked_tower_stays_what_it_was_in_the_bundle(data, bundle, tmp_path, capsys):
    values = going_on(data, tmp_path / "run", bundle, samples=32)
    values["model"] = {"image": {"trainable": 0}, "text": {"layer_decay": 0.5}}
    assert pretrain.run(config(values)) == 0
    before, after = (align.load(one).state_dict() for one in (bundle, tmp_path / "run" / "bundle"))
    moved = {
        name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])
    }
    assert {"text", "image_projection", "text_projection"} <= moved
    assert "image" not in moved
    said = capsys.readouterr().out
    assert "towers, projections, tokenizer and temperature" in said
    assert "from shapes-v1; loss.temperature is not used" in said
    assert "random" not in said


@pytest.mark.parametrize(("bias", "expected"), [(-7.5, -7.5), (0.0, -10.0)])
def test_the_bias_is_the_bundles_where_it_has_one(bias, expected, data, tmp_path):
    model = tiny_model()
    model.logit_bias.fill_(bias)
    model.logit_scale.fill_(2.0)
    align.save(model, tmp_path / "it")
    values = going_on(data, tmp_path / "run", tmp_path / "it", loss__name="sigmoid")
    wanted, start = starting.starting(config(values))
    training = build_training(wanted, Accelerator(cpu=True), start)
    loss: Any = training.objective.loss
    assert (loss.logit_bias.item(), loss.logit_scale.item()) == (expected, 2.0)


def test_a_bias_that_the_loss_has_not_is_not_kept(data, tmp_path):
    model = tiny_model()
    model.logit_bias.fill_(-7.5)
    align.save(model, tmp_path / "it")
    values = going_on(data, tmp_path / "run", tmp_path / "it", samples=16)
    assert pretrain.run(config(values)) == 0
    assert align.load(tmp_path / "run" / "bundle").logit_bias.item() == 0


def test_a_temperature_too_low_is_set_to_the_least(data, tmp_path):
    model = tiny_model()
    model.logit_scale.fill_(6.0)
    align.save(model, tmp_path / "it")
    wanted, start = starting.starting(config(going_on(data, tmp_path / "run", tmp_path / "it")))
    training = build_training(wanted, Accelerator(cpu=True), start)
    assert training.objective.loss.scale().item() == pytest.approx(100)


# --- looked at before ---


def examined(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    asked = build(DoctorConfig, {**values, "seconds": 0.5, "output": "json"}, origin="test")
    capsys.readouterr()
    return doctor.run(asked), capsys.readouterr().out


def test_the_doctor_begins_there_too(data, bundle, tmp_path, capsys):
    values = going_on(data, tmp_path / "run", bundle)
    code, said = examined(values, capsys)
    assert code == 0, said
    values["start_from"] = "nowhere"
    code, said = examined(values, capsys)
    assert code == doctor.WOULD_FAIL
    assert "there is no bundle nowhere" in said


def test_the_doctor_finds_an_evaluation_that_could_not_be(data, bundle, tmp_path, capsys):
    task = {"task": "zero_shot", "data": str(data), "label": "size"}
    values = going_on(data, tmp_path / "run", bundle, validation={"tasks": {"x": task}})
    values["optimizer"] = {"warmup": "99 epochs"}
    code, said = examined(values, capsys)
    assert code == doctor.WOULD_FAIL
    assert "validation.tasks.x.label" in said
    assert "optimizer.warmup" in said
