"""Presets: what they stand for, what is laid over them, and one trained end to end, shrunk."""

import io
import re
import tomllib
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_corpus import encoded, random_pixels, tiny_tokenizer
from PIL import Image

import align
from align.preprocess import FITS as FITS_OF_ALIGN
from align.preprocess import preprocess
from align.tokenizer import Tokenizer
from pipelines import pretrain, run_folder
from pipelines.cli import main, parse, shipped
from pipelines.config import ConfigError, build, read_yaml, to_yaml
from pipelines.pairs import embed_pairs
from pipelines.schemas import DemoConfig, DoctorConfig, PretrainConfig
from pipelines.schemas.presets import laid_under, preset, presets
from pipelines.training import make_crop, make_model
from shards.crop import FITS, Box, RandomCrop, whole_picture
from shards.decode import decode_square
from shards.packing import pack
from shards.sources import Record

FOLDER = shipped("demo").parent / "presets"
LOGIT_SCALE = 1
"""OpenCLIP counts the temperature with the model; here it belongs to the loss."""
PARAMETERS = {
    "demo": (["model.text.options.vocab_size=1500"], 6_139_512),
    # torchvision's ResNet-50 without its classifier, bert-base-uncased without its pooler, two maps
    "resnet50-bert": (
        ["model.text.options.vocab_size=30522"],
        (25_557_032 - 2_049_000) + (109_482_240 - 590_592) + (2048 + 768) * 512,
    ),
    "vit-b-32": ([], 151_277_313 - LOGIT_SCALE),
    "vit-s-16": ([], 62_257_537 - LOGIT_SCALE),
    "siglip-b-16": (["model.text.options.vocab_size=32000"], 203_155_970 - LOGIT_SCALE - 1),
}


def of(*arguments: str) -> PretrainConfig:
    config = parse("pretrain", ["data", "out", *arguments])
    assert isinstance(config, PretrainConfig)
    return config


# --- each of them ---


def test_every_preset_is_tested_here():
    assert set(PARAMETERS) == set(presets()) == {path.stem for path in FOLDER.glob("*.yaml")}


def test_presets_come_with_the_package():
    project = tomllib.loads((shipped("demo").parents[2] / "pyproject.toml").read_text())
    globs = project["tool"]["setuptools"]["package-data"]["pipelines"]
    root = shipped("demo").parents[1]
    found = {path for pattern in globs for path in root.glob(pattern)}
    assert set(FOLDER.glob("*")) <= found


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_builds_the_model_that_was_published(name):
    """Counted without memory for the weights."""
    overrides, expected = PARAMETERS[name]
    config = of(f"preset={name}", *overrides)
    length = config.model.context_length
    tokenizer = tiny_tokenizer(context_length=length)
    if config.tokenizer.name == "clip":
        tokenizer = Tokenizer.clip(context_length=length)
    with torch.device("meta"):
        model = make_model(config.model, tokenizer)
    assert sum(one.numel() for one in model.parameters()) == expected
    assert model.config.fit == config.model.fit


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-S-16", "ViT-B-16-SigLIP"])
def test_what_was_published_is_what_open_clip_counts(name):
    config: Any = open_clip.get_model_config(name)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        theirs = sum(one.numel() for one in kind(**config).parameters())
    ours = {"ViT-B-32": "vit-b-32", "ViT-S-16": "vit-s-16", "ViT-B-16-SigLIP": "siglip-b-16"}
    own = 2 if "SigLIP" in name else 1  # temperature, and SigLIP's bias
    assert theirs - own == PARAMETERS[ours[name]][1]


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_a_preset_comes_to_can_be_printed_and_given_again(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["pretrain", "data", "out", f"preset={name}", "model.dim=768", "--print"])
    assert left.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    asked = of(f"preset={name}", "model.dim=768")
    assert parse("pretrain", [str(tmp_path / "printed.yaml")]) == asked
    assert asked.preset is None
    assert asked.model.dim == 768


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_a_preset_says_of_other_weights_is_valid(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    told = re.findall(r"(?:model|optimizer|tokenizer)\.[\w.]+=\S+", text)
    assert told or name == "demo"
    for one in told:
        key, _, value = one.partition("=")
        found: Any = of(f"preset={name}", one).model_dump()
        for part in key.split("."):
            found = found[part]
        assert str(found) in {value, "True", "0.0001", "1e-05"}


def test_a_preset_says_the_same_whichever_verb_takes_it():
    doctor = parse("doctor", ["data", "out", "preset=vit-s-16", "seconds=1"])
    assert isinstance(doctor, DoctorConfig)
    assert doctor.run == of("preset=vit-s-16")


def test_the_demo_is_its_preset_with_data_and_length():
    demo = parse("demo", [])
    assert isinstance(demo, DemoConfig)
    own = {"data", "out", "bundle", "samples", "workers", "save_every", "log_every", "validation"}
    own |= {"text_chunks"}  # like names are as long as one another
    values, base = demo.pretrain.model_dump(), of("preset=demo").model_dump()
    assert {key for key in values if values[key] != base[key]} <= own
    assert demo.pretrain.optimizer.name == "muon"
    assert demo.pretrain.model.text.options["hidden_size"] == 192


# --- what is given over a preset ---


def test_an_unknown_preset_is_one_line_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r".") as caught:
        of("preset=vit-b-31")
    first, line = str(caught.value).splitlines()
    assert first.startswith("1 error in ")
    known = ", ".join(sorted(PARAMETERS))
    assert line.strip() == f"preset: unknown preset 'vit-b-31'; known: {known}"
    with pytest.raises(ValueError, match=r"unknown preset '../demo'"):
        preset("../demo")


@pytest.mark.parametrize("value", [3, ["demo"], {"name": "demo"}])
def test_a_preset_is_a_name(value):
    with pytest.raises(ConfigError, match=r"preset: input should be a valid string"):
        build(PretrainConfig, {"data": "x", "out": "y", "preset": value}, origin="x")


def test_file_and_arguments_both_lie_over_the_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: a\nout: b\npreset: vit-b-32\nbatch_size: 64\n"
        "optimizer: {warmup: 0.2, learning_rate: 1e-3}\naugment: {crop: null}\n"
    )
    config = parse("pretrain", [str(path), "optimizer.learning_rate=2e-3"])
    assert isinstance(config, PretrainConfig)
    assert config.model == of("preset=vit-b-32").model
    assert (config.batch_size, config.augment.crop) == (64, None)
    assert (config.optimizer.warmup, config.optimizer.learning_rate) == (0.2, 2e-3)
    assert config.optimizer.weight_decay == 0.2
    assert config.augment.options["rotate"] == 0


def test_options_go_with_the_name_they_belong_to():
    base = of("preset=resnet50-bert")
    assert base.model.text.options["pooler"] == "cls"
    other = of("preset=resnet50-bert", "model.text.name=hf:gpt2", "model.text.options.n_layer=2")
    assert other.model.text.options == {"n_layer": 2}
    assert other.model.image == base.model.image
    same = of("preset=resnet50-bert", "model.text.name=hf:bert", "model.text.options.pooler=mean")
    assert same.model.text.options == {**base.model.text.options, "pooler": "mean"}
    muon = of("preset=resnet50-bert", "optimizer.name=muon", "optimizer.options={momentum: 0.9}")
    assert muon.optimizer.options == {"momentum": 0.9}
    assert muon.optimizer.weight_decay == base.optimizer.weight_decay


def test_mistakes_over_a_preset_are_found_as_ever():
    with pytest.raises(ConfigError, match=r"model\.imaje_size: unknown key; did you mean"):
        of("preset=vit-b-32", "model.imaje_size=3")
    with pytest.raises(ConfigError, match=r"model: input should be"):
        of("preset=vit-b-32", "model=3")


LEAVES = st.integers(0, 3) | st.none() | st.lists(st.integers(0, 2), max_size=2)
TREES = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), LEAVES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), LEAVES | inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(TREES, TREES)
def test_what_is_given_stands_and_what_is_not_comes_from_below(base, given):
    merged = laid_under(base, given)
    assert list(base.items()) == list(laid_under(base, {}).items())
    assert laid_under({}, given) == given
    assert laid_under(base, merged) == merged, "what was printed means the same again"
    assert merged.keys() == base.keys() | given.keys()
    for key, value in merged.items():
        if key not in given:
            assert value == base[key]
        elif isinstance(given[key], dict) and isinstance(base.get(key), dict):
            assert value == laid_under(base[key], given[key])
        else:
            assert value == given[key]


# --- squashed pictures ---

KINDS = {
    "wide": lambda: encoded(Image.fromarray(random_pixels(40, 61, 3))),
    "tall": lambda: encoded(Image.fromarray(random_pixels(57, 32, 3))),
    "right size already": lambda: encoded(Image.fromarray(random_pixels(32, 32, 3))),
    "one side right": lambda: encoded(Image.fromarray(random_pixels(32, 57, 3))),
    "rgba": lambda: encoded(Image.fromarray(random_pixels(45, 64, 4))),
    "gray": lambda: encoded(Image.fromarray(random_pixels(33, 48, 1)[..., 0])),
    "jpeg": lambda: encoded(Image.fromarray(random_pixels(64, 90, 3)), "JPEG"),
    "jpeg on its side": lambda: on_its_side(),
}


def on_its_side() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(random_pixels(30, 70, 3)), "JPEG", exif=exif.tobytes())


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_the_same_to_the_model_as_to_the_loader(kind, fit):
    data = KINDS[kind]()
    with Image.open(io.BytesIO(data)) as opened:
        found = preprocess(opened, 32, fit=fit)
    assert torch.equal(found, decode_square(data, 32, crop=FITS[fit]))


def test_the_fits_are_the_same_on_both_sides():
    assert tuple(FITS) == FITS_OF_ALIGN
    assert whole_picture(5, 9) == Box(0, 0, 5, 9)


def test_a_random_crop_is_taken_where_it_is_asked_for_and_else_the_fit():
    assert isinstance(make_crop(of("model.fit=squash")), RandomCrop)
    for off in ("augment.crop=null", "augment.enabled=false"):
        assert make_crop(of("model.fit=squash", off)) is whole_picture
        assert make_crop(of(off)) is FITS["crop"]


# --- end to end ---

SHRUNK = """
data: {data}
out: {out}
preset: siglip-b-16
model:
  image: {{options: {{embed_dim: 32, depth: 1, num_heads: 2}}}}
  text: {{options: {{width: 32, layers: 1, heads: 2}}}}
  dim: 32
  image_size: 32
tokenizer: {{vocabulary_size: 100}}
batch_size: 8
lanes: 4
samples: 16
precision: fp32
workers: 0
log_every: 1
validation: {{data: {data}}}
"""
WORDS = ("left", "right", "broad", "high", "near", "far", "plain", "mixed")


def pictures() -> list[Image.Image]:
    """None of them square."""
    return [Image.fromarray(random_pixels(24 + n, 60 - n, 3, seed=n)) for n in range(len(WORDS))]


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory) -> Path:
    """The preset with the most of its own, two steps long."""
    folder = tmp_path_factory.mktemp("shrunk")
    records = [
        Record(word, encoded(image), f"{word}, one of {len(WORDS)}!", {})
        for word, image in zip(WORDS, pictures(), strict=True)
    ]
    pack(records, folder / "data", samples_per_shard=4, shuffle_seed=None)
    (folder / "run.yaml").write_text(SHRUNK.format(data=folder / "data", out=folder / "run"))
    with pytest.raises(SystemExit) as left:
        main(["pretrain", str(folder / "run.yaml")])
    assert left.value.code == 0
    return folder


def test_a_preset_shrunk_by_overrides_trains(shrunk):
    lines = run_folder.read_metrics(shrunk / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2], "two steps and a validation"
    assert all(line["finite"] == 1 for line in lines[:2])
    model = align.load(shrunk / "run" / "bundle")
    assert model.config.fit == "squash"
    assert model.tokenizer.clean == "canonicalize"
    one, other = model.tokenize(["LEFT, one_of 8"]).ids, model.tokenize(["left one of 8!"]).ids
    assert torch.equal(one, other)


def test_a_squashed_data_set_is_embedded_as_its_pictures_are(shrunk):
    model = align.load(shrunk / "run" / "bundle")
    embedded = embed_pairs(model, str(shrunk / "data"))
    rows = [WORDS.index(key) for key in embedded.keys]
    expected = model.encode_image(pictures())[rows].numpy()
    torch.testing.assert_close(torch.from_numpy(embedded.images), torch.from_numpy(expected))


def test_what_a_run_from_a_preset_wrote_down_goes_on_with_it(shrunk, tmp_path):
    again = parse("pretrain", [str(shrunk / "run" / "config.yaml"), "--resume"])
    asked = parse("pretrain", [str(shrunk / "run.yaml"), "--resume"])
    assert again == asked
    assert isinstance(asked, PretrainConfig)
    pretrain.refuse_to_mix(asked)
    (tmp_path / "printed.yaml").write_text(to_yaml(asked))
    assert build(PretrainConfig, read_yaml(tmp_path / "printed.yaml"), origin="x") == asked
    changed = parse("pretrain", [str(shrunk / "run.yaml"), "--resume", "model.fit=crop"])
    assert isinstance(changed, PretrainConfig)
    with pytest.raises(ConfigError, match="the run was started otherwise: model"):
        pretrain.refuse_to_mix(changed)
