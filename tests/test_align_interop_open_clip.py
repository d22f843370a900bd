"""OpenCLIP's models read here, and ours opened there: the same logits, tokens and weights."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from pairs_corpus import TINY_BERT, TINY_RESNET, TINY_VIT, tiny_tokenizer
from safetensors.torch import load_file, save_file

from align.interop.open_clip import read_open_clip, write_open_clip
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.tokenizer import Tokenizer

SIDE = 32
SCALE, BIAS = math.log(37.5), -4.25  # neither a default nor what a configuration says
TEXTS = [
    "red circle",
    "a green cross, and a black dot in a yellow ring!",
    "purple " * 30,
    "",
    "BLUE&amp;  bar",
]
VIT = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": SIDE}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": SIDE}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
OWN_TEXT = {**TEXT, "vocab_size": 120, "hf_tokenizer_name": "theirs", "pool_type": "eos"}
SIGLIP_TEXT = {
    **TEXT,
    "vocab_size": 120,
    "hf_tokenizer_name": "theirs",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
HF_TEXT = {"context_length": 16, "hf_model_name": "bert", "hf_tokenizer_name": "theirs"}


def timm_vision(name: str, pool: str, projection: str | None, **more: Any) -> dict[str, Any]:
    size = 160 if name.startswith("test_vit") else SIDE
    return {
        "timm_model_name": name,
        "timm_pool": pool,
        "timm_proj": projection,
        "image_size": size,
        **more,
    }


def hf_text(pooler: str, projection: str | None) -> dict[str, Any]:
    return {**HF_TEXT, "hf_pooler_type": pooler, "hf_proj_type": projection}


SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": timm_vision("test_vit", "map", "none"),
    "text_cfg": SIGLIP_TEXT,
}
MODELS: dict[str, dict[str, Any]] = {
    "vit, ids to spare": {"vision_cfg": VIT, "text_cfg": {**TEXT, "vocab_size": 49412}},
    "vit, quick": {"quick_gelu": True, "vision_cfg": VIT, "text_cfg": OWN_TEXT},
    "vit, mean of the places": {
        "vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        "text_cfg": OWN_TEXT,
    },
    "vit, pooled by attention": {
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2},
        "text_cfg": {**OWN_TEXT, "proj_type": "none"},
        "custom_text": True,
        "embed_dim": 32,
    },
    "vit, custom text": {"custom_text": True, "vision_cfg": VIT, "text_cfg": OWN_TEXT},
    "vit, scale of one entry": {
        "nonscalar_logit_scale": True,
        "init_logit_bias": -3.0,
        "vision_cfg": VIT,
        "text_cfg": OWN_TEXT,
    },
    "class token of the text": {
        "custom_text": True,
        "vision_cfg": VIT,
        "text_cfg": {**OWN_TEXT, "embed_cls": True},
    },
    "resnet": {"vision_cfg": RESNET, "text_cfg": OWN_TEXT},
    "timm, convolutions": {
        "vision_cfg": timm_vision("test_convnext", "", "linear", timm_drop_path=0.1),
        "text_cfg": OWN_TEXT,
    },
    "timm, vit, mean": {
        "vision_cfg": timm_vision("test_vit", "avg", "linear", timm_proj_bias=True),
        "text_cfg": OWN_TEXT,
    },
    "timm, vit, its own classifier": {
        "vision_cfg": timm_vision("test_vit", "token", None),
        "text_cfg": OWN_TEXT,
    },
    "timm, perceptron": {"vision_cfg": timm_vision("test_resnet", "", "mlp"), "text_cfg": OWN_TEXT},
    "siglip": SIGLIP,
    "hf, mean, mlp": {"vision_cfg": VIT, "text_cfg": hf_text("mean_pooler", "mlp")},
    "hf, cls, linear": {"vision_cfg": VIT, "text_cfg": hf_text("cls_pooler", "linear")},
    "hf, last hidden state, none": {
        "embed_dim": 32,
        "vision_cfg": VIT,
        "text_cfg": hf_text("cls_last_hidden_state_pooler", None),
    },
}
STAYS_WHOLE = {"timm, perceptron"}
every_model = pytest.mark.parametrize("name", MODELS)


def stir(module: torch.nn.Module) -> None:
    """So that nothing is zero, and no two parts are alike."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point() and "logit" not in key:
                value.add_(0.05 * torch.rand(value.shape, generator=generator))


@torch.no_grad()
def set_temperature(model: Any) -> None:
    """A scale, and where a model has one a bias, that nothing else would give."""
    model.logit_scale.fill_(SCALE)
    if model.logit_bias is not None:
        model.logit_bias.fill_(BIAS)


def write_theirs(folder: Path, name: str, **preprocess: Any) -> Any:
    """A folder as OpenCLIP's `save_for_hf` writes it; returns the model."""
    config = json.loads(json.dumps({"embed_dim": 24, **MODELS[name]}))
    folder.mkdir(parents=True)
    text = config["text_cfg"]
    if text.get("hf_model_name"):
        write_bert(folder.parent / "bert")
        text["hf_model_name"] = str(folder.parent / "bert")
    if text.get("hf_tokenizer_name"):
        tokenizer = tiny_tokenizer()
        tokenizer.save(folder)
        if text.get("pool_type") == "eos":
            text["eos_id"] = tokenizer.end_id
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.4] * 3, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    model = open_clip.create_model(
        f"local-dir:{folder}", load_weights=False, pretrained_text=False, pretrained_image=False
    ).eval()
    stir(model)
    set_temperature(model)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return model


def write_bert(folder: Path) -> None:
    from transformers import BertConfig

    BertConfig(vocab_size=len(tiny_tokenizer()), **TINY_BERT).save_pretrained(folder)


@torch.no_grad()
def assert_equal_logits(ours: DualEncoder, theirs: Any, source: str) -> None:
    """For OpenCLIP's own ids, and the same pixels: those of our arithmetic."""
    size, tower = ours.config.image_size, ours.image
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    texts = TEXTS if ours.tokenizer.clean != "none" else TEXTS[:-1]  # OpenCLIP's always clean
    ids = open_clip.get_tokenizer(source)(texts)
    expected, _ = theirs.get_logits((images.float() - tower.pixel_mean) / tower.pixel_std, ids)
    found = ours.logits(ours.encode_image(images), ours.encode_text(texts))
    torch.testing.assert_close(found, expected, atol=1e-6 * math.exp(SCALE), rtol=0)
    assert expected.std().item() > 1e-3  # pictures and texts make a difference
    assert ours.logit_scale.item() == theirs.logit_scale.item()
    bias = 0.0 if theirs.logit_bias is None else theirs.logit_bias.item()
    assert ours.logit_bias.item() == bias


def assert_equal_weights(ours: DualEncoder, other: DualEncoder) -> None:
    weights = ours.state_dict()
    assert weights.keys() == other.state_dict().keys()
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, weights[key], atol=0, rtol=0, msg=key)


@every_model
def test_a_model_of_open_clip_is_read_and_written_with_equal_logits_and_weights(
    tmp_path: Path, name: str
) -> None:
    theirs = write_theirs(tmp_path / "theirs", name)
    ours = read_open_clip(str(tmp_path / "theirs"))
    assert_equal_logits(ours, theirs, f"local-dir:{tmp_path / 'theirs'}")
    assert ours.logit_scale.shape == ()
    assert ours.tokenizer.clean != "none"  # OpenCLIP's always clean
    assert ours.image.statistics["mean"] == [0.4] * 3
    assert ours.image.statistics["std"] == list(open_clip.OPENAI_DATASET_STD)
    adapted = "timm_model_name" in MODELS[name]["vision_cfg"] and name not in STAYS_WHOLE
    assert ours.config.image.name.partition(":")[0] == ("timm" if adapted else "open_clip")
    assert str(tmp_path) not in json.dumps(ours.config.to_dict())

    write_open_clip(ours, tmp_path / "again")
    source = f"local-dir:{tmp_path / 'again'}"
    reopened: Any = open_clip.create_model(source).eval()
    assert_equal_logits(ours, reopened, source)
    told = [json.dumps(model.visual.preprocess_cfg) for model in (reopened, theirs)]
    assert told[0] == told[1]
    again = read_open_clip(source)
    assert_equal_weights(ours, again)
    assert again.config == replace(ours.config, image=again.config.image, text=again.config.text)


@pytest.mark.slow
def test_a_built_in_model_is_read_by_its_name() -> None:
    torch.manual_seed(0)
    ours = read_open_clip("RN50-quickgelu", weights=False)
    assert (ours.config.dim, ours.config.context_length) == (1024, 77)
    assert ours.config.image.name == ours.config.text.name == "open_clip:RN50-quickgelu"
    torch.manual_seed(0)
    theirs = open_clip.create_model("RN50-quickgelu").eval()
    assert_equal_logits(ours, theirs, "RN50-quickgelu")


def our_model(image: str, text: str, **changes: Any) -> DualEncoder:
    """A model of towers by name, each with a projection, all weights stirred."""
    torch.manual_seed(1)
    options = changes.pop("options", {})
    projections = changes.pop("projections", ("linear", "linear"))
    tokenizer = changes.pop("tokenizer", None) or tiny_tokenizer()
    config = DualEncoderConfig(
        image=Tower(image, options.get("image", {}), projections[0]),
        text=Tower(text, options.get("text", {}), projections[1]),
        **{"dim": 24, "image_size": SIDE, "context_length": 16, **changes},
    )
    model = DualEncoder(config, tokenizer).eval()
    stir(model)
    set_temperature(model)
    return model


TINY_TOWERS: dict[str, dict[str, Any]] = {
    "open_clip:ViT-B-32": {"layers": 1, "width": 64, "head_width": 32},
    "open_clip:RN50": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "timm:resnet10t": TINY_RESNET,
    "timm:vit_tiny_patch16_224": TINY_VIT,
    "timm:test_convnext": {"drop_path_rate": 0.1},
    "hf:bert": TINY_BERT,
    "hf:roberta": TINY_BERT,
    "hf:xlm-roberta": TINY_BERT,
    "hf:m2m_100": {
        **{"d_model": 32, "max_position_embeddings": 24, "dropout": 0.0},
        **dict.fromkeys(["encoder_layers", "decoder_layers"], 1),
        **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
        **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 48),
    },
    "hf:mt5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2},
}
OC_TEXT = {"layers": 1, "width": 32, "heads": 2, "context_length": 20}
EXPORTS: dict[str, tuple[str, dict[str, Any], str, str, dict[str, Any], str]] = {
    "from scratch": ("open_clip:ViT-B-32", {}, "linear", "open_clip:ViT-B-32", OC_TEXT, "affine"),
    "no maps": ("open_clip:ViT-B-32", {}, "none", "open_clip:ViT-B-32", OC_TEXT, "linear"),
    "resnet, a map": ("open_clip:RN50", {}, "linear", "hf:m2m_100", {"pooler": "cls"}, "linear"),
    "resnet, a map and a bias": ("open_clip:RN50", {}, "affine", "hf:bert", {}, "mlp"),
    "options of timm": ("timm:resnet10t", {}, "linear", "hf:bert", {"pooler": "cls"}, "linear"),
    "perceptrons": ("timm:resnet10t", {}, "mlp", "hf:bert", {"pooler": "native"}, "mlp"),
    "a small vit": ("timm:vit_tiny_patch16_224", {}, "affine", "hf:roberta", {}, "linear"),
    "the mean of places": (
        "timm:vit_tiny_patch16_224",
        {"pooling": "mean"},
        "linear",
        "hf:xlm-roberta",
        {},
        "mlp",
    ),
    "the backbone's own mean": (
        "timm:vit_tiny_patch16_224",
        {"global_pool": "avg"},
        "linear",
        "hf:bert",
        {},
        "none",
    ),
    "an adapter, mapped": (
        "open_clip:convnext_base",
        {"timm_model_name": "test_convnext"},
        "affine",
        "hf:mt5",
        {},
        "linear",
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_model_of_ours_opens_in_open_clip_with_equal_logits(tmp_path: Path, name: str) -> None:
    image, image_options, first, text, text_options, second = EXPORTS[name]
    model = our_model(
        image,
        text,
        dim={"none": 64}.get(first, {"none": 32}.get(second, 24)),
        projections=(first, second),
        options={
            "image": {**TINY_TOWERS.get(image, {}), **image_options},
            "text": text_options | ({} if text.startswith("open_clip") else TINY_TOWERS[text]),
        },
        fit="squash",
    )
    write_open_clip(model, tmp_path / "out")
    source = f"local-dir:{tmp_path / 'out'}"
    theirs: Any = open_clip.create_model(source).eval()
    assert_equal_logits(model, theirs, source)
    assert theirs.visual.preprocess_cfg["resize_mode"] == "squash"
    assert_equal_logits(read_open_clip(source), theirs, source)
    assert "repairs broken encodings" in (tmp_path / "out" / "README.md").read_text()
    assert "local-dir:." in (tmp_path / "out" / "README.md").read_text()


def test_hugging_faces_clip_is_written_in_open_clips_names(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 1}  # OpenCLIP's have 64 channels
    model = our_model(
        "hf:clip_vision_model",
        "hf:clip_text_model",
        options={
            "image": {**sizes, **heads, "patch_size": 16},
            "text": {**sizes, **heads, "max_position_embeddings": 16, "pooler": "native"},
        },
    )
    write_open_clip(model, tmp_path / "out")
    source = f"local-dir:{tmp_path / 'out'}"
    assert_equal_logits(model, open_clip.create_model(source).eval(), source)


def test_a_moved_folder_is_still_read_here(tmp_path: Path) -> None:
    """Architectures beside the weights are found where the folder is now."""
    options = {"image": TINY_TOWERS["timm:resnet10t"], "text": TINY_BERT}
    model = our_model("timm:resnet10t", "hf:bert", options=options)
    write_open_clip(model, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert_equal_weights(model, read_open_clip(str(tmp_path / "moved")))
    config = json.loads((tmp_path / "moved" / "open_clip_config.json").read_text())["model_cfg"]
    assert config["text_cfg"]["hf_model_name"] == str(tmp_path / "out" / "text")
    assert config["vision_cfg"]["timm_model_name"] == f"local-dir:{tmp_path / 'out' / 'image'}"
    readme = (tmp_path / "moved" / "README.md").read_text()
    assert "text_cfg.hf_model_name" in readme
    assert "vision_cfg.timm_model_name" in readme


@pytest.mark.parametrize("kind", ["clip", "own, cleaned", "own, padding counts"])
def test_open_clips_tokenizer_gives_the_ids_of_ours(tmp_path: Path, kind: str) -> None:
    text: dict[str, Any] = dict(OC_TEXT)
    tokenizer = Tokenizer.clip(context_length=16) if kind == "clip" else tiny_tokenizer()
    if kind == "clip":
        tokenizer.clean = "canonicalize"
    else:
        tokenizer.clean = "lower"
    if kind == "own, padding counts":  # the tower was trained with another id for padding
        text.update(no_causal_mask=True, pool_type="last", context_length=16, pad_id=3)
    model = our_model(
        "open_clip:ViT-B-32",
        "open_clip:ViT-B-32",
        options={"image": TINY_TOWERS["open_clip:ViT-B-32"], "text": text},
        tokenizer=tokenizer,
    )
    write_open_clip(model, tmp_path / "out")
    source = f"local-dir:{tmp_path / 'out'}"
    ids = open_clip.get_tokenizer(source)(TEXTS)
    ours = model.tokenize(TEXTS)
    assert ids.shape == (len(TEXTS), 16)
    padding = {"clip": 0, "own, cleaned": tokenizer.pad_id, "own, padding counts": 3}[kind]
    for row, found, mask in zip(ids, ours.ids, ours.mask, strict=True):
        count = int(mask.sum())
        assert row[:count].tolist() == found[mask].tolist()
        assert set(row[count:].tolist()) <= {padding}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("tokenizer.json" in files) == (kind != "clip")
    assert_equal_logits(model, open_clip.create_model(source).eval(), source)
    again = read_open_clip(source)
    assert again.tokenizer.clean == tokenizer.clean
    assert again.text.pad_id == padding


def test_the_resize_mode_and_the_file_of_weights_are_chosen(tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs", "vit, quick", resize_mode="squash")
    assert read_open_clip(f"local-dir:{tmp_path / 'theirs'}").config.fit == "squash"
    named = tmp_path / "theirs" / "open_clip_model.safetensors"
    named.rename(tmp_path / "elsewhere.safetensors")
    fresh = read_open_clip(str(tmp_path / "theirs"), weights=False)
    told = read_open_clip(str(tmp_path / "theirs"), weights=str(tmp_path / "elsewhere.safetensors"))
    key = "image.visual.conv1.weight"
    expected = load_file(tmp_path / "elsewhere.safetensors")["visual.conv1.weight"]
    assert torch.equal(told.state_dict()[key], expected)
    assert not torch.equal(fresh.state_dict()[key], expected)


def change(folder: Path, *path: str, value: Any) -> None:
    """Set, or with None remove, one entry of a folder's configuration."""
    file = folder / "open_clip_config.json"
    whole = json.loads(file.read_text())
    inner = whole
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    file.write_text(json.dumps(whole))


TEXT_CFG = ("model_cfg", "text_cfg")
REFUSED: list[tuple[tuple[str, ...], Any, str]] = [
    (("model_cfg",), None, "open_clip_config.json lacks 'model_cfg'"),
    (("model_cfg", "vision_cfg"), None, "lacks 'vision_cfg' in 'model_cfg'"),
    (("model_cfg", "embed_dim"), 12, "open_clip_model.safetensors does not fit .*size mismatch"),
    (("model_cfg", "nonsense"), 1, "could not be made .*nonsense"),
    (("model_cfg", "multimodal_cfg"), {}, "writes captions"),
    (("model_cfg", "vision_cfg", "image_size"), [32, 16], "only squares fit"),
    (("preprocess_cfg", "resize_mode"), "longest", "'longest'; known: shortest, squash"),
    ((*TEXT_CFG, "tokenizer_mode"), "clips", "tokenizer_mode 'clips' is not known"),
    (
        (*TEXT_CFG, "tokenizer_kwargs"),
        {"strip_sep_token": True},
        "tokenizer_kwargs 'strip_sep_token' is not known",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    write_theirs(tmp_path / "theirs", "vit, quick")
    change(tmp_path / "theirs", *path, value=value)
    with pytest.raises(ValueError, match=message) as caught:
        read_open_clip(str(tmp_path / "theirs"))
    assert "\n" not in str(caught.value)


def test_hugging_face_towers_that_read_padding_are_refused(tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs", "hf, mean, mlp")
    change(tmp_path / "theirs", *TEXT_CFG, "hf_pooler_type", value="max_pooler")
    with pytest.raises(ValueError, match="max_pooler, which reads padding; known: mean_pooler"):
        read_open_clip(str(tmp_path / "theirs"))
    change(tmp_path / "theirs", *TEXT_CFG, "hf_pooler_type", value="mean_pooler")
    bert = tmp_path / "bert" / "config.json"
    bert.write_text(json.dumps({**json.loads(bert.read_text()), "pad_token_id": 7}))
    with pytest.raises(ValueError, match="pads with id 0, its text tower takes id 7"):
        read_open_clip(str(tmp_path / "theirs"))


def test_pickles_and_folders_without_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    write_theirs(folder, "vit, quick")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors does not fit"):
        read_open_clip(str(folder))
    weights.unlink()
    with pytest.raises(ValueError, match=r"no weights: open_clip_model.safetensors is missing"):
        read_open_clip(str(folder))
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"never read")
    for source in (str(folder), f"local-dir:{folder}"):
        with pytest.raises(ValueError, match=r"but open_clip_pytorch_model.bin, a pickle; .*once"):
            read_open_clip(source)
    with pytest.raises(ValueError, match="is no file in safetensors"):
        read_open_clip(str(folder), weights=str(folder / "open_clip_pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"missing.safetensors: there is no such file"):
        read_open_clip(str(folder), weights="missing.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ViT-B-33", r"OpenCLIP has no model 'ViT-B-33' \(near: .*ViT-B-32"),
        ("ViT-B-32", r"say which weights, as in ViT-B-32@TAG \(tags: .*laion2b_e16"),
        ("ViT-B-32@laion2b", r"has no 'laion2b' \(near: .*laion2b_e16"),
        ("local-dir:/nowhere", "there is no such folder"),
        ("local-dir:", "Empty path"),
        (".", "no model '.'"),
        ("coca_ViT-B-32@laion2b_s13b_b90k", "could not be fetched"),
        ("ViT-B-16-SigLIP@webli", "could not be fetched .*HF_HUB_OFFLINE"),
        ("hf-hub:someone/some-model", "hf-hub:someone/some-model: open_clip_config.json could not"),
    ],
)
def test_sources_that_are_not_there_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as caught:
        read_open_clip(source)
    assert "\n" not in str(caught.value)


def test_weights_are_named_only_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCLIP lists weights trained with QuickGELU under models that compute without it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in {
        "ViT-B-32@openai": "trained with QuickGELU, .*take ViT-B-32-quickgelu@openai",
        "ViT-B-32-quickgelu@laion2b_e16": "has no 'laion2b_e16'",
        "ViT-B-32-quickgelu@OpenAI": "could not be fetched",
        "roberta-ViT-B-32@laion2b_s12b_b32k": "could not be fetched",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_open_clip(name)
    with pytest.raises(ValueError, match=r"\(tags: ((?!openai).)*\)"):
        read_open_clip("ViT-B-32")


UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("open_clip:ViT-B-32", {"projections": ("mlp", "linear")}, "the image projection mlp"),
    ("open_clip:ViT-B-32", {"projections": ("affine", "linear")}, "the image projection affine"),
    ("open_clip:ViT-B-32", {"projections": ("linear", "mlp")}, "the text projection mlp"),
    ("timm:vit_tiny_patch16_224", {"pooling": "attention"}, "with pooling attention"),
]


@pytest.mark.parametrize(("image", "changes", "message"), UNFIT)
def test_what_open_clip_has_no_word_for_is_said(
    tmp_path: Path, image: str, changes: dict[str, Any], message: str
) -> None:
    changes = dict(changes)
    pooling = {"pooling": changes.pop("pooling")} if "pooling" in changes else {}
    options = {"image": {**TINY_TOWERS[image], **pooling}, "text": OC_TEXT}
    model = our_model(image, "open_clip:ViT-B-32", options=options, **changes)
    with pytest.raises(ValueError, match=f"{message}.*`--to onnx` takes any model") as caught:
        write_open_clip(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


HF_UNFIT = [
    ("hf:distilbert", {"dim": 32, "n_heads": 2, "n_layers": 1, "hidden_dim": 48}, "linear"),
    ("hf:bert", {**TINY_BERT, "pooler": "max"}, "linear"),
    ("hf:bert", TINY_BERT, "affine"),
]


@pytest.mark.parametrize(("text", "options", "projection"), HF_UNFIT)
def test_hugging_face_texts_that_open_clip_does_not_know_are_refused(
    tmp_path: Path, text: str, options: dict[str, Any], projection: str
) -> None:
    model = our_model(
        "timm:resnet10t",
        text,
        options={"image": TINY_RESNET, "text": options},
        projections=("linear", projection),
    )
    with pytest.raises(ValueError, match=r"does not fit OpenCLIP's format: .*takes"):
        write_open_clip(model, tmp_path / "out")


def test_a_pair_with_and_without_quick_gelu_is_refused(tmp_path: Path) -> None:
    model = our_model(
        "open_clip:ViT-B-32-quickgelu",
        "open_clip:ViT-B-32",
        options={"image": TINY_TOWERS["open_clip:ViT-B-32"], "text": OC_TEXT},
    )
    with pytest.raises(ValueError, match="one computes QuickGELU and the other does not"):
        write_open_clip(model, tmp_path / "out")


def test_an_export_that_would_say_something_else_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last word is a comparison with what OpenCLIP computes."""
    options = {"image": TINY_TOWERS["open_clip:ViT-B-32"], "text": OC_TEXT}
    model = our_model("open_clip:ViT-B-32", "open_clip:ViT-B-32", options=options)
    whole = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda texts: whole(texts) + 0.01)
    with pytest.raises(ValueError, match=r"gives other logits in OpenCLIP .*nothing was written"):
        write_open_clip(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_shorter_context_than_the_towers_is_kept(tmp_path: Path) -> None:
    text = {**OC_TEXT, "no_causal_mask": True, "pool_type": "last"}
    options = {"image": TINY_TOWERS["open_clip:ViT-B-32"], "text": text}
    model = our_model("open_clip:ViT-B-32", "open_clip:ViT-B-32", options=options)
    with pytest.raises(ValueError, match=r"context_length 16 does not fit .* reads 20 tokens"):
        write_open_clip(model, tmp_path / "out")
