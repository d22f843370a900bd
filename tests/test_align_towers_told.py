"""What is wrong with a tower is told in one line; weights in a folder are those that come out."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pairs_corpus import TINY_BERT, TINY_RESNET, TINY_VIT, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_align_encoders import (
    CLIP,
    HF_VIT,
    OC_TEXT,
    OC_VIT,
    stirred,
    write_bundle,
    write_hf_image,
    write_hf_text,
    write_open_clip,
    write_timm,
)
from transformers import AutoModel, BertConfig, BertForMaskedLM

from align.encoders import build_image_tower, build_text_tower
from align.model import DualEncoder, DualEncoderConfig, Tower


def told(build: Callable[..., Any], *args: Any, **options: Any) -> str:
    """What is said of a mistake."""
    with pytest.raises(ValueError, match=r".") as caught:
        build(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


IMAGE_MISTAKES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "name": ("timm:resnet10", {}, ["timm has no model 'resnet10'", "near:", "resnet10t"]),
    "tag": ("timm:resnet10t.no", {}, ["resnet10t.no", "no"]),
    "option": ("timm:resnet10t", {"no_such": 1}, ["timm:resnet10t does not take", "no_such"]),
    "no prefix": ("resnet10t", {}, ["'resnet10t'", "timm:, hf:, open_clip:, local:"]),
    "prefix": ("tim:resnet10t", {}, ["'tim:resnet10t'", "timm:"]),
    "prefix of timm": ("timm:hub:a/b", {}, ["hub:", "hf-hub:"]),
    "timm channels": ("timm:resnet10t", {"in_chans": 1}, ["'in_chans'", "3 channels"]),
    "timm classes": ("timm:resnet10t", {"num_classes": 5}, ["'num_classes'", "no classifier"]),
    "timm maps": ("timm:resnet10t", {"features_only": True}, ["'features_only'"]),
    "timm pooling": ("timm:resnet10t", {"pooling": "avg"}, ["'avg'", "native, mean, max, cls"]),
    "last patch": ("timm:vit_tiny_patch16_224", {**TINY_VIT, "pooling": "last"}, ["'last'"]),
    "no class token": ("timm:resnet10t", {"pooling": "cls"}, ["no class token"]),
    "unpooled": ("timm:resnet10t", {"global_pool": ""}, ["global_pool", "native"]),
    "timm patch": (
        "timm:vit_tiny_patch16_224",
        {**TINY_VIT, "img_size": 8},
        ["8 px", "smaller than a patch, 16 px"],
    ),
    "mean": ("timm:resnet10t", {"mean": [0.5]}, ["mean [0.5]", "3 channels"]),
    "std": ("timm:resnet10t", {"std": [0.5, 0.0, 0.5]}, ["std", "above 0"]),
    "timm folder": ("timm:local-dir:/no/where", {}, ["/no/where: there is no such folder"]),
    "hf option": ("hf:vit", {"hiden_size": 3}, ["no option 'hiden_size'", "near: hidden_size"]),
    "hf value": ("hf:vit", {"hidden_size": "x"}, ["hf:vit", "hidden_size", "'x'"]),
    "hf heads": ("hf:clip_vision_model", {"hidden_size": 33}, ["33", "attention heads"]),
    "hf channels": ("hf:vit", {**HF_VIT, "num_channels": 1}, ["3 channels, not 1"]),
    "hf pooling": ("hf:vit", {**HF_VIT, "pooling": "avg"}, ["'avg'", "native, mean, max, cls"]),
    "hf attention": ("hf:vit", {**HF_VIT, "attention": "flash"}, ["'flash'", "auto, sdpa, eager"]),
    "hf patch": ("hf:vit", {**HF_VIT, "image_size": 8}, ["8 px", "smaller than a patch, 16 px"]),
    "hf norm": ("hf:clip_vision_model", {**HF_VIT, "pooling": "max"}, ["no pooling but native"]),
    "hf no class token": (
        "hf:siglip_vision_model",
        {**HF_VIT, "pooling": "cls"},
        ["no class token"],
    ),
    "hf text": ("hf:bert", TINY_BERT, ["hf:bert is no image tower", "input_ids"]),
    "hf folder": ("hf:/no/where", {}, ["hf:/no/where: there is no such folder"]),
    "open_clip name": ("open_clip:ViT-B-33", {}, ["'ViT-B-33'", "near:", "ViT-B-32"]),
    "open_clip option": ("open_clip:ViT-B-32", {"withd": 3}, ["'withd'", "near: width"]),
    "open_clip pool": ("open_clip:ViT-B-32", {**OC_VIT, "pool_type": "none"}, ["pool_type"]),
    "open_clip pools": (
        "open_clip:ViT-B-32",
        {**OC_VIT, "attentional_pool": "cascade"},
        ["attentional_pool"],
    ),
    "open_clip patch": ("open_clip:ViT-B-32", {**OC_VIT, "image_size": 8}, ["smaller", "16 px"]),
    "open_clip timm": (
        "open_clip:convnext_base",
        {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "none"},
        ["timm_pool"],
    ),
    "local": ("local:/no/where", {}, ["local:/no/where: there is no such folder"]),
}
TEXT_MISTAKES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "name": ("hf:brt", {}, ["hf:brt", "near:", "bert"]),
    "option": ("hf:bert", {"hiden_size": 3}, ["no option 'hiden_size'", "near: hidden_size"]),
    "pooler": ("hf:bert", {"pooler": "avg"}, ["'avg'", "native, mean, max, cls, last"]),
    "no pooler": ("hf:electra", {**TINY_BERT, "pooler": "native"}, ["no pooler of its own"]),
    "attention": ("hf:bert", {**TINY_BERT, "attention": "x"}, ["'x'", "auto, sdpa, eager"]),
    "heads": ("hf:bert", {**TINY_BERT, "hidden_size": 33}, ["33", "attention heads"]),
    "no prefix": ("bert", {}, ["'bert'", "hf:, open_clip:, local:"]),
    "timm": ("timm:resnet10t", {}, ["'timm:resnet10t'", "hf:"]),
    "pictures": ("hf:vit", {}, ["hf:vit is no text tower"]),
    "folder": ("hf:./no/where", {}, ["hf:./no/where: there is no such folder"]),
    "weights of none": ("hf:bert", {"pretrained": True}, ["hf:bert", "no published model"]),
    "open_clip option": ("open_clip:ViT-B-32", {"withd": 3}, ["'withd'", "near: width"]),
    "open_clip of hf": ("open_clip:roberta-ViT-B-32", {}, ["hf:roberta-base"]),
    "open_clip coca": ("open_clip:coca_ViT-B-32", {}, ["CoCa"]),
    "local": ("local:/no/where", {}, ["local:/no/where: there is no such folder"]),
}


@pytest.mark.parametrize("mistake", IMAGE_MISTAKES)
def test_a_mistaken_image_tower_is_told_in_one_line(mistake, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec, options, parts = IMAGE_MISTAKES[mistake]
    message = told(build_image_tower, spec, **options)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("mistake", TEXT_MISTAKES)
def test_a_mistaken_text_tower_is_told_in_one_line(mistake, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec, options, parts = TEXT_MISTAKES[mistake]
    message = told(build_text_tower, spec, **options)
    for part in parts:
        assert part in message


PUBLISHED: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "hf text": (build_text_tower, "hf:nobody/nothing", {"pretrained": True}),
    "hf text, unprefixed": (build_text_tower, "hf:bert-base-nowhere", {}),
    "hf image": (build_image_tower, "hf:nobody/nothing", {}),
    "timm": (build_image_tower, "timm:resnet10t", {"pretrained": True}),
    "timm hub": (build_image_tower, "timm:hf-hub:nobody/nothing", {"pretrained": True}),
    "timm hub, fresh": (build_image_tower, "timm:hf-hub:nobody/nothing", {}),
}


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("offline", [True, False], ids=["offline", "silent"])
def test_a_hub_that_is_not_there_is_told_within_seconds(kind, offline, monkeypatch, tmp_path):
    """The address of a port where nothing listens stands for a network that is away."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    build, spec, options = PUBLISHED[kind]
    begun = time.monotonic()
    message = told(build, spec, **options)
    assert time.monotonic() - begun < 20, "the hub's client alone goes on for half a minute"
    assert spec in message
    assert ("HF_HUB_OFFLINE" if offline else "http://127.0.0.1:9 does not answer") in message


FOLDERS: dict[str, tuple[Callable[[Path], None], Callable[..., Any], str]] = {
    "bundle": (write_bundle, build_image_tower, "model.safetensors"),
    "text of a bundle": (write_bundle, build_text_tower, "model.safetensors"),
    "timm": (write_timm, build_image_tower, "model.safetensors"),
    "hf image": (write_hf_image, build_image_tower, "model.safetensors"),
    "hf text": (write_hf_text, build_text_tower, "model.safetensors"),
    "open_clip": (write_open_clip, build_image_tower, "open_clip_model.safetensors"),
    "text of open_clip": (write_open_clip, build_text_tower, "open_clip_model.safetensors"),
}


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def misshapen(path: Path) -> None:
    save_file(
        {
            key: value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value
            for key, value in load_file(path).items()
        },
        path,
        {"format": "pt"},
    )


def lacking(path: Path) -> None:
    """All but the first blocks."""
    weights = load_file(path)
    kept = {key: value for key, value in weights.items() if ".0." not in key}
    assert len(kept) < len(weights)
    save_file(kept, path, {"format": "pt"})


@pytest.mark.parametrize("harm", [missing, truncated, no_weights, misshapen, lacking])
@pytest.mark.parametrize("kind", FOLDERS)
def test_harmed_weights_are_told_in_one_line(kind, harm, tmp_path):
    write, build, name = FOLDERS[kind]
    folder = tmp_path / "tower"
    write(folder)
    harm(folder / name)
    assert str(folder) in told(build, f"local:{folder}")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model_type": "no-such"}', '{"a": 1}'])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_configuration_that_is_none_is_told_in_one_line(kind, text, tmp_path):
    write, build, _ = FOLDERS[kind]
    folder = tmp_path / "tower"
    write(folder)
    config = folder / ("open_clip_config.json" if "open_clip" in kind else "config.json")
    config.write_text(text)
    assert str(folder) in told(build, f"local:{folder}")


def test_the_tower_of_a_bundle_takes_no_options(tmp_path):
    write_bundle(tmp_path / "bundle")
    for build in (build_image_tower, build_text_tower):
        message = told(build, f"local:{tmp_path / 'bundle'}", pooling="mean")
        assert "no option 'pooling'" in message


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_tower_of_a_folder_can_be_had_without_its_weights(kind, tmp_path):
    write, build, _ = FOLDERS[kind]
    write(tmp_path / "tower")
    saved = build(f"local:{tmp_path / 'tower'}")
    fresh = build(f"local:{tmp_path / 'tower'}", pretrained=False)
    assert fresh.recipe() == saved.recipe()
    weights, others = saved.state_dict(), fresh.state_dict()
    assert weights.keys() == others.keys()
    wide = [key for key, value in weights.items() if value.ndim > 1 and key.endswith(".weight")]
    assert wide
    assert not any(torch.equal(weights[key], others[key]) for key in wide)


NAMES = {
    "bundle": "timm:vit_tiny_patch16_224",
    "text of a bundle": "hf:bert",
    "timm": "timm:resnet10t",
    "hf image": "hf:clip_vision_model",
    "hf text": "hf:bert",
    "open_clip": "open_clip:custom",
    "text of open_clip": "open_clip:custom",
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_neither_name_nor_recipe_of_a_tower_says_which_folder_it_was_read_from(kind, tmp_path):
    write, build, _ = FOLDERS[kind]
    for folder in (tmp_path / "a", tmp_path / "vit"):  # one is called as an architecture is
        write(folder)
        tower = build(f"local:{folder}")
        assert tower.name == NAMES[kind]
        assert str(tmp_path) not in json.dumps(tower.recipe())


@pytest.mark.parametrize("write", [write_hf_text, write_hf_image])
def test_a_folder_here_that_is_called_as_an_architecture_is_not_taken_for_it(
    write, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "vit")
    build: Any = build_image_tower if write is write_hf_image else build_text_tower
    read = build("hf:vit", pretrained=True)
    assert read.name == f"hf:{read.recipe()['config']['model_type']}" != "hf:vit"
    write(tmp_path / "own")
    assert build(read.name, **read.recipe()).name == read.name
    assert build("hf:own", **read.recipe()).name == "hf:own", "with a recipe a name is only that"
    assert build_image_tower("hf:vit", **HF_VIT).recipe()["config"]["model_type"] == "vit"
    assert build_image_tower("hf:vit", **HF_VIT).name == "hf:vit"


def test_a_folder_has_no_tower_of_a_kind_that_it_does_not_hold(tmp_path):
    write_timm(tmp_path / "timm")
    assert "no text tower" in told(build_text_tower, f"local:{tmp_path / 'timm'}")
    write_hf_text(tmp_path / "bert")
    assert "no image tower" in told(build_image_tower, f"local:{tmp_path / 'bert'}")


# --- weights that come out of a folder are those that went in ---


def test_pretrained_weights_of_a_folder_are_those_that_were_saved(tmp_path):
    for at, (write, build, name) in enumerate(FOLDERS.values()):
        folder = tmp_path / str(at)
        write(folder)
        saved = list(load_file(folder / name).values())
        for key, value in build(f"local:{folder}").state_dict().items():
            assert any(torch.equal(value, other) for other in saved), (folder, key)


def test_timms_folder_gives_what_timm_gives(tmp_path):
    torch.manual_seed(0)
    model = stirred(timm.create_model("resnet10t", num_classes=7, **TINY_RESNET))
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    timm.models.save_for_hf(model, tmp_path, model_args=TINY_RESNET, safe_serialization=True)
    tower = build_image_tower(f"timm:local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 64, 64)
    expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(tower.encode(pixels).pooled, expected)
    assert tower.statistics["mean"] == [0.1, 0.2, 0.3]
    fresh = build_image_tower(f"timm:local-dir:{tmp_path}").eval()
    assert not torch.allclose(fresh.encode(pixels).pooled, expected)


@pytest.mark.parametrize("write", [write_hf_text, write_hf_image])
def test_hugging_faces_folder_gives_what_transformers_gives(write, tmp_path):
    write(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    if write is write_hf_image:
        tower: Any = build_image_tower(f"hf:{tmp_path / 'model'}", pretrained=True).eval()
        pixels = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(tower.encode(pixels).pooled, model(pixels).pooler_output)
        return
    tower = build_text_tower(f"hf:{tmp_path / 'model'}", pretrained=True, pooler="native").eval()
    ids = torch.randint(4, 60, (2, 7))
    found = tower(ids, torch.ones(2, 7, dtype=torch.bool)).pooled
    torch.testing.assert_close(found, model(ids).pooler_output)


def test_the_body_of_a_language_model_is_read_without_its_head(tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=64, **TINY_BERT)).eval()
    model.save_pretrained(tmp_path / "model")
    tower = build_text_tower(f"local:{tmp_path / 'model'}", pooler="cls").eval()
    ids = torch.randint(4, 60, (2, 7))
    found = tower(ids, torch.ones(2, 7, dtype=torch.bool)).pooled
    torch.testing.assert_close(found, model.bert(ids).last_hidden_state[:, 0])
    message = told(build_text_tower, f"local:{tmp_path / 'model'}", pooler="native")
    assert "pooler.dense" in message, "weights that are not there must not be drawn in silence"


# --- the dual encoder ---


def dual(image: Tower, text: Tower | None = None, **changes: Any) -> DualEncoder:
    values: dict[str, Any] = {"dim": 16, "image_size": 32, "context_length": 16, **changes}
    tokenizer = tiny_tokenizer(context_length=values["context_length"])
    text = Tower("hf:bert", TINY_BERT) if text is None else text
    return DualEncoder(DualEncoderConfig(image=image, text=text, **values), tokenizer)


RESNET = Tower("timm:resnet10t", TINY_RESNET)


@pytest.mark.parametrize(
    ("image", "changes", "parts"),
    [
        (
            Tower("timm:vit_tiny_patch16_224", TINY_VIT),
            {"image_size": 48},
            ["timm:vit_tiny_patch16_224", "32 px", "image_size 48"],
        ),
        (
            Tower("hf:clip_vision_model", HF_VIT),
            {"image_size": 64},
            ["hf:clip_vision_model", "32 px", "image_size 64"],
        ),
        (Tower("open_clip:ViT-B-32", OC_VIT), {"image_size": 64}, ["32 px", "image_size 64"]),
        (Tower("timm:resnet10t", TINY_RESNET, "bilinear"), {}, ["'bilinear'", "linear, affine"]),
        (Tower("timm:resnet10t", TINY_RESNET, "none"), {}, ["none", "32 is not dim 16"]),
    ],
    ids=["timm size", "hf size", "open_clip size", "projection", "no projection"],
)
def test_what_does_not_fit_in_a_dual_encoder_is_told_in_one_line(image, changes, parts):
    message = told(dual, image, **changes)
    for part in parts:
        assert part in message


def test_a_tower_of_any_size_takes_any_size():
    assert dual(RESNET, image_size=48).image.picture_size is None
    fixed = dual(Tower("hf:clip_vision_model", {**HF_VIT, "image_size": 48}), image_size=48)
    assert fixed.image.picture_size == 48


@pytest.mark.parametrize(
    ("end", "looks_for"), [(2, "the greatest id"), (9, "9")], ids=["mistaken", "other"]
)
def test_a_tokenizer_whose_end_the_tower_does_not_look_for_is_refused(end, looks_for):
    options = {**CLIP, "vocab_size": 200, "eos_token_id": end, "pooler": "native"}
    message = told(dual, RESNET, Tower("hf:clip_text_model", options))
    assert f"by id {199 if end == 2 else end}" in message
    assert "ends texts with 3" in message


def test_a_text_tower_from_scratch_takes_over_the_vocabulary():
    model = dual(RESNET, Tower("open_clip:ViT-B-32", {**OC_TEXT, "vocab_size": 150}))
    assert isinstance(model.text.end_id, int)
    for name, options in (
        ("hf:bert", TINY_BERT),
        ("open_clip:ViT-B-32", {"width": 32, "heads": 2}),
    ):
        text = dual(RESNET, Tower(name, options)).text
        assert text.vocabulary_size == len(tiny_tokenizer())
        assert text.pad_id == tiny_tokenizer().pad_id


def test_a_model_of_a_bundles_towers_begins_with_their_weights(tmp_path):
    write_bundle(tmp_path / "bundle")
    place = f"local:{tmp_path / 'bundle'}"
    model = dual(Tower(place), Tower(place))
    saved = tiny_model(image="timm:vit_tiny_patch16_224", image_options=TINY_VIT)
    for key, value in saved.image.state_dict().items():
        assert torch.equal(model.image.state_dict()[key], value)
    for key, value in saved.text.state_dict().items():
        assert torch.equal(model.text.state_dict()[key], value)
    assert json.loads(json.dumps(model.text.recipe())) == model.text.recipe()
