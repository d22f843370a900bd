"""Hugging Face's whole models as ours and back: the same logits, the same tokens, like pixels."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from pairs_corpus import TINY_BERT, TINY_RESNET, TINY_VIT, random_pixels, tiny_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from align.interop.clip_names import to_open_clip
from align.interop.huggingface import read_huggingface, write_huggingface
from align.interop.huggingface_parts import as_huggingface
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.tokenizer import Tokenizer

SCALE = math.log(37.5)  # no default
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
VISION: dict[str, Any] = {**SIZES, "patch_size": 8}
TEXT: dict[str, Any] = {**SIZES, "max_position_embeddings": 16}
TEXTS = ["red circle", "blue", "a green cross and a black dot in a yellow ring", "purple frame"]
CLIP = (
    Tower("hf:clip_vision_model", VISION),
    Tower("hf:clip_text_model", {**TEXT, "pooler": "native"}),
)
SIGLIP = (
    Tower("hf:siglip_vision_model", VISION, "none"),
    Tower("hf:siglip_text_model", {**TEXT, "pooler": "native"}, "none"),
)


def cased_tokenizer() -> Tokenizer:
    """Byte pairs to which case, spaces and punctuation matter; its end is the greatest id."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=letters, show_progress=False, special_tokens=["<start>"]
    )
    raw.train_from_iterator(TEXTS, trainer)
    raw.add_special_tokens(["<end>"])
    ends = [(name, raw.token_to_id(name)) for name in ("<start>", "<end>")]
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=ends
    )
    backend = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<end>",
        model_max_length=16,
    )
    return Tokenizer(backend, context_length=16)


def stir(module: Any) -> Any:
    """Nothing zero, nothing alike."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.sub_(0.1)
    return module.eval()


def theirs(kind: str, folder: Path, **pixels: Any) -> Any:
    """A tiny model of Hugging Face's, in a folder with its tokenizer and image processor."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend.model_max_length = 16
    ends = {"eos_token_id": tokenizer.end_id, "pad_token_id": 0, "bos_token_id": None}
    vision, text = {**VISION, "image_size": 32}, {**TEXT, "vocab_size": 120, **ends}
    torch.manual_seed(0)
    match kind:
        case "clip":
            config = transformers.CLIPConfig(
                vision_config=vision, text_config=text, projection_dim=16
            )
            model: Any = transformers.CLIPModel(config)
        case "siglip":
            text["pad_token_id"] = 1  # as published configurations have it, whatever the tokenizer
            config = transformers.SiglipConfig(vision_config=vision, text_config=text)
            model = transformers.SiglipModel(config)
        case _:
            towers = {
                "vit": transformers.ViTConfig(**vision),
                "timm": transformers.TimmWrapperConfig(
                    architecture="resnet10t",
                    model_args=TINY_RESNET,
                    hidden_size=32,  # pyright: ignore[reportCallIssue] - any field can be added
                ),
            }
            config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
                towers[kind],
                transformers.BertConfig(**TINY_BERT, vocab_size=120),
                projection_dim=16,
            )
            model = transformers.VisionTextDualEncoderModel(config)
    with torch.no_grad():
        stir(model).logit_scale.fill_(SCALE)
        if kind == "siglip":
            model.logit_bias.fill_(-4.25)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    if kind == "siglip":
        processor: Any = transformers.SiglipImageProcessor
        given = {"size": {"height": 32, "width": 32}, **pixels}
    else:
        processor = transformers.CLIPImageProcessor
        side = {"height": 32, "width": 32}
        given = {"size": {"shortest_edge": 32}, "crop_size": side, **pixels}
    processor(**given).save_pretrained(folder)
    return model


def ours(image: Tower, text: Tower, *, tokenizer: Tokenizer | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    config = {"dim": 16, "image_size": 32, "context_length": 16, **more}
    tokenizer = tokenizer or tiny_tokenizer(context_length=config["context_length"])
    model = DualEncoder(DualEncoderConfig(image, text, **config), tokenizer)
    model.logit_scale.fill_(SCALE)
    return stir(model)


def pictures(mode: str = "RGB") -> list[Image.Image]:
    sizes = [(48, 80), (70, 40), (32, 32)]
    return [Image.fromarray(random_pixels(*size, 3, seed=i)) for i, size in enumerate(sizes)]


def normalised(model: DualEncoder, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(model.image.statistics[key]) for key in ("mean", "std"))
    return (images / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def their_logits(whole: Any, folder: Path, pixels: torch.Tensor, **padding: Any) -> torch.Tensor:
    """What transformers makes of its own tokens and the given pixels."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        TEXTS, truncation=True, return_tensors="pt", **{"padding": True, **padding}
    )
    if isinstance(whole, transformers.SiglipModel):
        tokens.pop("attention_mask", None)  # it was trained to look at padding
    with torch.no_grad():
        return whole(pixel_values=pixels, **tokens).logits_per_image


def our_logits(model: DualEncoder, images: torch.Tensor) -> torch.Tensor:
    return model.logits(model.encode_image(images), model.encode_text(TEXTS)).detach()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-6 * math.exp(SCALE), rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "timm"])
def test_a_model_of_huggingface_s_gives_its_own_logits(kind, tmp_path):
    whole = theirs(kind, tmp_path)
    model = read_huggingface(str(tmp_path))
    assert not model.training
    images = model.preprocess(pictures())
    pixels = normalised(model, images)
    padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {}
    close(our_logits(model, images), their_logits(whole, tmp_path, pixels, **padding))
    if kind != "siglip":  # whose texts are what they are with all their padding
        longer = their_logits(whole, tmp_path, pixels, padding="max_length", max_length=16)
        close(our_logits(model, images), longer)


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "timm"])
def test_what_was_read_is_written_with_no_weight_changed(kind, tmp_path):
    whole = theirs(kind, tmp_path / "theirs")
    write_huggingface(read_huggingface(str(tmp_path / "theirs")), tmp_path / "ours")
    written = AutoModel.from_pretrained(tmp_path / "ours")
    assert type(written) is type(whole)
    weights = whole.state_dict()
    assert list(written.state_dict()) == list(weights)
    for name, value in written.state_dict().items():
        assert torch.equal(value, weights[name]), name


SIGLIP_TEXT: dict[str, Any] = {"layers": 2, "width": 18, "heads": 3, "context_length": 16}
MODELS: dict[str, Any] = {
    "clip": (CLIP, {}, "CLIPModel"),
    "open_clip": (
        (
            Tower(
                "open_clip:ViT-S-16", {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8}
            ),
            Tower(
                "open_clip:ViT-S-16", {"layers": 1, "width": 24, "heads": 2, "context_length": 16}
            ),
        ),
        {},
        "CLIPModel",
    ),
    "siglip": (SIGLIP, {"dim": 24, "fit": "squash"}, "SiglipModel"),
    "siglip, longer head": (
        (SIGLIP[0], Tower("hf:siglip_text_model", SIGLIP[1].options, "affine")),
        {"dim": 24},
        "SiglipModel",
    ),
    "siglip of timm and open_clip": (
        (
            Tower(
                "timm:vit_base_patch16_siglip_224",
                {**TINY_VIT, "patch_size": 8, "depth": 2},
                "none",
            ),
            Tower("open_clip:ViT-B-16-SigLIP", SIGLIP_TEXT, "affine"),
        ),
        {"dim": 24, "fit": "squash"},
        "SiglipModel",
    ),
    "siglip of timm and open_clip, other activations": (
        (
            Tower(
                "timm:vit_so400m_patch14_siglip_224", {**TINY_VIT, "act_layer": "gelu_tanh"}, "none"
            ),
            Tower("open_clip:ViT-B-16-SigLIP2", {**SIGLIP_TEXT, "width": 24}, "none"),
        ),
        {"dim": 24},
        "SiglipModel",
    ),
    "siglip's texts of open_clip": (
        (SIGLIP[0], Tower("open_clip:ViT-B-16-SigLIP", SIGLIP_TEXT, "linear")),
        {"dim": 24},
        "SiglipModel",
    ),
    "vit, bert": (
        (Tower("hf:vit", VISION), Tower("hf:bert", {**TINY_BERT, "pooler": "native"})),
        {},
        "VisionTextDualEncoderModel",
    ),
    "convnext, clip": (
        (
            Tower("hf:convnext", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, "none"),
            CLIP[1],
        ),
        {"fit": "squash"},
        "VisionTextDualEncoderModel",
    ),
    "resnet, bert by its first token": (
        (Tower("timm:resnet10t", TINY_RESNET), Tower("hf:bert", {**TINY_BERT, "pooler": "cls"})),
        {},
        "VisionTextDualEncoderModel",
    ),
    "timm vit, roberta by its first token": (
        (
            Tower("timm:vit_tiny_patch16_224", {**TINY_VIT, "mean": [0.1, 0.2, 0.3]}),
            Tower("hf:roberta", {**TINY_BERT, "pooler": "cls", "type_vocab_size": 1}),
        ),
        {},
        "VisionTextDualEncoderModel",
    ),
    "timm vit of another size, albert by its first token": (
        (
            Tower(
                "timm:vit_tiny_patch16_224", {k: TINY_VIT[k] for k in TINY_VIT if k != "img_size"}
            ),
            Tower("hf:albert", {**TINY_BERT, "pooler": "cls", "embedding_size": 16}),
        ),
        {},
        "VisionTextDualEncoderModel",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_ours_gives_its_logits_in_transformers(name, tmp_path):
    towers, more, kind = MODELS[name]
    model = ours(*towers, **more)
    if kind == "SiglipModel":
        model.logit_bias.fill_(-2.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    write_huggingface(model, tmp_path / "out")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    whole = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(whole).__name__ == kind
    images = model.preprocess(pictures())
    padding = "max_length" if kind == "SiglipModel" else True
    found = their_logits(whole, tmp_path / "out", normalised(model, images), padding=padding)
    close(found, our_logits(model, images))
    again = read_huggingface(str(tmp_path / "out"))
    close(our_logits(again, images), our_logits(model, images))
    assert again.config.fit == model.config.fit
    for key, values in model.image.statistics.items():
        assert again.image.statistics[key] == pytest.approx(values)


def test_a_first_token_keeps_its_length_too(tmp_path):
    model = ours(RESNET, BERT)
    write_huggingface(model, tmp_path / "out")
    whole = AutoModel.from_pretrained(tmp_path / "out").eval()
    tokens = model.tokenize(TEXTS)
    with torch.no_grad():
        found = whole.get_text_features(tokens.ids, tokens.mask.long()).pooler_output
        expected = model.text_projection(model.text.pool(tokens.ids, tokens.mask))
    torch.testing.assert_close(found, expected)


def test_siglip_of_timm_and_open_clip_keeps_every_weight(tmp_path):
    towers, more, _ = MODELS["siglip of timm and open_clip, other activations"]
    model = ours(*towers, **more)
    write_huggingface(model, tmp_path / "out")
    written = AutoModel.from_pretrained(tmp_path / "out")
    body, settings = model.image.body, written.config
    matrices = [
        getattr(written.vision_model.encoder.layers[0].self_attn, f"{p}_proj") for p in "qkv"
    ]
    fused = torch.cat([matrix.weight for matrix in matrices])
    assert torch.equal(fused, body.blocks[0].attn.qkv.weight)
    assert torch.equal(written.vision_model.head.probe, body.attn_pool.latent)
    assert settings.vision_config.layer_norm_eps == settings.text_config.layer_norm_eps == 1e-6
    assert settings.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert settings.text_config.hidden_act == "gelu_pytorch_tanh"


def test_clip_goes_around_by_way_of_open_clip_with_no_weight_changed(tmp_path):
    whole = theirs("clip", tmp_path / "theirs")
    write_huggingface(to_open_clip(read_huggingface(str(tmp_path / "theirs"))), tmp_path / "ours")
    written = AutoModel.from_pretrained(tmp_path / "ours")
    assert isinstance(written, transformers.CLIPModel)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, written.state_dict()[name]), name


def test_the_end_that_early_configurations_name_is_the_greatest_id(tmp_path):
    whole = theirs("clip", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["eos_token_id"] = 2
    path.write_text(json.dumps(config))
    tokenizer = cased_tokenizer()
    tokenizer.save(tmp_path)
    whole.text_model.embeddings.token_embedding = torch.nn.Embedding(len(tokenizer), 24)
    config["text_config"]["vocab_size"] = len(tokenizer)
    whole.save_pretrained(tmp_path)
    path.write_text(json.dumps(config))
    legacy = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert legacy.text_model.eos_token_id == 2
    model = read_huggingface(str(tmp_path))
    images = model.preprocess(pictures())
    close(our_logits(model, images), their_logits(legacy, tmp_path, normalised(model, images)))
    write_huggingface(model, tmp_path / "out")
    settings = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert settings.text_config.eos_token_id == tokenizer.end_id


@pytest.mark.parametrize("clean", ["none", "whitespace", "lower", "canonicalize"])
def test_texts_become_the_same_tokens_in_transformers(clean, tmp_path):
    backend = cased_tokenizer().backend
    model = ours(*CLIP, tokenizer=Tokenizer(backend, context_length=16, clean=clean))
    write_huggingface(model, tmp_path / "out")
    texts = ["A  Dog,\n\trunning!", " under_score (and) `more` ", "ÉCOLE d'été", "", "one " * 40]
    expected = model.tokenize(texts)
    for tokenizer in (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoProcessor.from_pretrained(tmp_path / "out").tokenizer,
    ):
        found = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        assert torch.equal(found["input_ids"], expected.ids)
        assert torch.equal(found["attention_mask"].bool(), expected.mask)


def test_siglip_s_texts_come_without_a_mask_and_as_long_as_it_was_trained(tmp_path):
    write_huggingface(ours(*SIGLIP, dim=24), tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(["red"], padding="max_length")
    assert set(tokens) == {"input_ids"}
    assert len(tokens["input_ids"][0]) == 16
    shorter = ours(*SIGLIP, dim=24, context_length=12)
    with pytest.raises(ValueError, match=r"pads texts to 16 tokens, .* context_length of 12"):
        write_huggingface(shorter, tmp_path / "shorter")


def their_pixels(folder: Path, images: list[Image.Image]) -> torch.Tensor:
    found = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    whole = AutoProcessor.from_pretrained(folder).image_processor(images, return_tensors="pt")
    assert torch.equal(found["pixel_values"], whole["pixel_values"])
    return found["pixel_values"]


def levels(model: DualEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised pixels as they were, in [0, 255]."""
    mean, std = (torch.tensor(model.image.statistics[key]) for key in ("mean", "std"))
    return (pixels * std.view(-1, 1, 1) + mean.view(-1, 1, 1)) * 255


@pytest.mark.parametrize("towers", [CLIP, SIGLIP])
def test_squeezed_pictures_become_the_same_pixels_in_transformers(towers, tmp_path):
    model = ours(*towers, fit="squash", dim=24)
    write_huggingface(model, tmp_path / "out")
    found = levels(model, their_pixels(tmp_path / "out", pictures()))
    assert (found - model.preprocess(pictures())).abs().max() < 1.01  # half a level, rounded


def test_cut_pictures_become_like_pixels_in_transformers(tmp_path):
    model = ours(*CLIP)
    write_huggingface(model, tmp_path / "out")
    # Theirs scales before it cuts. Where the cut falls between two pixels, the result is the same
    # but for the border, which theirs scales with what lies beyond it.
    even = [Image.fromarray(random_pixels(64, 96, 3)), Image.fromarray(random_pixels(128, 64, 3))]
    found = levels(model, their_pixels(tmp_path / "out", even))
    difference = (found - model.preprocess(even)).abs()
    assert difference[..., 4:-4, 4:-4].max() < 1.01
    # Elsewhere it is shifted by up to half a pixel: not seen where a picture is smooth.
    smooth = [image.resize((8, 8)).resize(image.size) for image in pictures()]
    found = levels(model, their_pixels(tmp_path / "out", smooth))
    difference = (found - model.preprocess(smooth)).abs()
    assert difference.mean() < 3


def one_line(error: pytest.ExceptionInfo[ValueError], *named: str) -> None:
    said = str(error.value)
    assert "\n" not in said
    for word in named:
        assert word in said


def test_a_hub_id_without_a_network_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not be read") as error:
        read_huggingface("nobody/nothing-of-that-name")
    one_line(error, "nobody/nothing-of-that-name")


def test_a_path_that_is_not_there_asks_no_hub(tmp_path):
    with pytest.raises(ValueError, match="no such folder") as error:
        read_huggingface(str(tmp_path / "not" / "there"))
    one_line(error, "there")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    theirs("clip", folder)
    return folder


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights in safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"torn"), "weights could not be read"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "image processor"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (lambda f: edit(f / "config.json", model_type="bert"), "'bert'"),
        (lambda f: edit(f / "config.json", model_type="siglip2"), "'siglip2'"),
        (lambda f: edit(f / "config.json", projection_dim=17), "weights could not be read"),
        (lambda f: edit(f / "config.json", projection_dim="many"), "projection_dim"),
        (lambda f: edit(f / "preprocessor_config.json", do_resize=False), "image processor"),
        (lambda f: edit(f / "preprocessor_config.json", size={"shortest_edge": 36}), "36"),
        (lambda f: edit(f / "preprocessor_config.json", size={"shortest_edge": 48},
                        crop_size={"height": 48, "width": 48}), "48 px"),
    ],
)  # fmt: skip
def test_a_folder_with_a_fault_is_one_clear_line(spoil, named, clip_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    spoil(folder)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        read_huggingface(str(folder))
    one_line(error, str(folder))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_only_a_pickle_is_refused_and_not_opened(clip_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle") as error:
        read_huggingface(str(folder))
    one_line(error, "save_pretrained")


def test_weights_that_lack_some_are_refused(clip_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack visual_projection\.weight") as error:
        read_huggingface(str(folder))
    one_line(error, str(folder))


RESNET, BERT = (
    Tower("timm:resnet10t", TINY_RESNET),
    Tower("hf:bert", {**TINY_BERT, "pooler": "cls"}),
)
REFUSED: dict[str, tuple[Tower, Tower, str]] = {
    "mean pooler": (RESNET, Tower("hf:bert", TINY_BERT), "pooler 'mean'"),
    "attention pooler": (
        RESNET,
        Tower("hf:bert", {**TINY_BERT, "pooler": "attention"}),
        "pooler 'attention'",
    ),
    "no pooling layer": (
        RESNET,
        Tower("hf:distilbert", {"dim": 24, "n_layers": 1, "n_heads": 2, "pooler": "cls"}),
        "distilbert",
    ),
    "image pooling": (
        Tower("timm:resnet10t", {**TINY_RESNET, "pooling": "max"}),
        BERT,
        "pooling 'max'",
    ),
    "mlp": (Tower("timm:resnet10t", TINY_RESNET, "mlp"), BERT, "image projection 'mlp'"),
    "affine": (RESNET, Tower("hf:bert", BERT.options, "affine"), "text projection 'affine'"),
    "ModifiedResNet": (
        Tower(
            "open_clip:RN50", {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
        ),
        BERT,
        "no ViT",
    ),
    "siglip's image tower with a projection": (
        Tower("hf:siglip_vision_model", VISION),
        SIGLIP[1],
        "image projection 'linear'",
    ),
    "siglip with layer scale": (
        Tower("timm:vit_base_patch16_siglip_224", {**TINY_VIT, "init_values": 0.1}, "none"),
        Tower("open_clip:ViT-B-16-SigLIP", {"layers": 1, "width": 24, "heads": 2}, "none"),
        "SigLIP",
    ),
    "siglip's text tower alone": (RESNET, SIGLIP[1], "VisionTextDualEncoderModel"),
    "pooled to a map": (Tower("hf:resnet", {"hidden_sizes": [8, 16], "depths": [1, 1],
                                            "embedding_size": 8}), BERT, "hf:resnet"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named_and_nothing_is_written(name, tmp_path):
    image, text, named = REFUSED[name]
    dim = 24 if "siglip" in name else 16
    model = ours(image, text, dim=dim)
    with pytest.raises(ValueError, match="--to onnx") as error:
        write_huggingface(model, tmp_path / "out")
    one_line(error, named)
    assert list(tmp_path.iterdir()) == []


def test_a_bias_fits_no_clip_model(tmp_path):
    model = ours(*CLIP)
    model.logit_bias.fill_(-1.0)
    with pytest.raises(ValueError, match="logit_bias -1 does not fit CLIPModel"):
        write_huggingface(model, tmp_path / "out")


def test_logits_that_came_out_different_are_not_written(tmp_path, monkeypatch):
    def wrong(model: DualEncoder) -> Any:
        family, whole = as_huggingface(model)
        with torch.no_grad():
            whole.text_projection.weight[:8] *= -1
        return family, whole

    monkeypatch.setattr("align.interop.huggingface.as_huggingface", wrong)
    with pytest.raises(ValueError, match="gives other logits in transformers") as error:
        write_huggingface(ours(*CLIP), tmp_path / "out")
    one_line(error, "nothing was written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", ["vision_config", "text_config"])
def test_an_activation_by_another_formula_is_more_than_rounding(side, tmp_path, monkeypatch):
    def wrong(model: DualEncoder) -> Any:
        family, whole = as_huggingface(model)
        assert getattr(whole.config, side).hidden_act == "gelu"
        getattr(whole.config, side).hidden_act = "gelu_pytorch_tanh"
        return family, whole

    monkeypatch.setattr("align.interop.huggingface.as_huggingface", wrong)
    towers = [Tower(one.name, {**one.options, "hidden_act": "gelu"}) for one in CLIP]
    with pytest.raises(ValueError, match=r"cosines differ by \d"):
        write_huggingface(ours(*towers), tmp_path / "out")


def test_the_readme_says_how_to_open_what_was_written(tmp_path):
    write_huggingface(ours(*SIGLIP, dim=24, fit="squash"), tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```python")[1].split("```")[0]
    pictures()[0].save(tmp_path / "picture.png")
    code = code.replace('"."', repr(str(tmp_path / "out")))
    space: dict[str, Any] = {}
    exec(code.replace('"picture.jpg"', repr(str(tmp_path / "picture.png"))), space)
    assert space["logits"].shape == (1, 2)


def test_pixels_in_other_units_are_converted(clip_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    edit(folder / "preprocessor_config.json", do_rescale=False, image_mean=[100.0, 110.0, 120.0])
    statistics = read_huggingface(str(folder)).image.statistics
    assert statistics["mean"] == pytest.approx([100 / 255, 110 / 255, 120 / 255])
    edit(folder / "preprocessor_config.json", do_normalize=False)
    statistics = read_huggingface(str(folder)).image.statistics
    assert statistics == {"mean": [0.0] * 3, "std": pytest.approx([1 / 255] * 3)}
