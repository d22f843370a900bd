"""Hugging Face's CLIP towers as OpenCLIP's and back: the same weights, the same logits."""

from typing import Any

import pytest
import torch
from pairs_corpus import TINY_BERT, TINY_RESNET, picture, tiny_tokenizer

from align.interop.clip_names import to_huggingface, to_open_clip
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.tokenizer import Tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,  # no whole multiple of the width
}
HF_IMAGE = {**SIZES, "patch_size": 8}
HF_TEXT = {**SIZES, "hidden_size": 18, "max_position_embeddings": 20, "pooler": "native"}
VIT: dict[str, Any] = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8}
TRANSFORMER: dict[str, Any] = {"layers": 2, "width": 18, "heads": 3, "context_length": 20}
TEXTS = ["red circle", "blue", "a green cross and a black dot in a yellow ring", "purple frame"]


def dual_encoder(
    image: Tower, text: Tower, *, tokenizer: Tokenizer | None = None, seed: int = 0
) -> DualEncoder:
    """Two towers, stirred so that nothing in them is zero or alike."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or tiny_tokenizer()
    config = DualEncoderConfig(image, text, dim=16, image_size=32, context_length=16)
    model = DualEncoder(config, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.logit_scale.fill_(3.0)
        model.logit_bias.fill_(-1.5)
    return model.eval()


def huggingface_clip(**changes: Any) -> DualEncoder:
    return dual_encoder(
        Tower("hf:clip_vision_model", {**HF_IMAGE, **changes}),
        Tower("hf:clip_text_model", {**HF_TEXT, **changes}),
    )


def open_clip_clip(
    image: dict[str, Any] | None = None, text: dict[str, Any] | None = None
) -> DualEncoder:
    return dual_encoder(
        Tower("open_clip:ViT-S-16", {**VIT, **(image or {})}),
        Tower("open_clip:ViT-S-16", {**TRANSFORMER, **(text or {})}),
    )


def logits(model: DualEncoder) -> torch.Tensor:
    torch.manual_seed(1)
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    pictures = torch.cat([model.encode_image([picture("red", "ring")]), model.encode_image(pixels)])
    return model.logits(pictures, model.encode_text(TEXTS))


def settings_of(tower: Any) -> Any:
    """Hugging Face's configuration."""
    return tower.body.config


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_huggingface_towers_become_open_clip_s_with_equal_logits(activation):
    model = huggingface_clip(hidden_act=activation, layer_norm_eps=1e-3)
    converted = to_open_clip(model)
    assert converted.image.name.startswith("open_clip:")
    assert converted.text.name.startswith("open_clip:")
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", [{}, {"act_kwargs": {"approximate": "tanh"}}])
def test_open_clip_towers_become_huggingface_s_with_equal_logits(activation):
    options = {**activation, "norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.2}
    model = open_clip_clip(options, options)
    converted = to_huggingface(model)
    assert converted.image.name == "hf:clip_vision_model"
    assert converted.text.name == "hf:clip_text_model"
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-5, rtol=0)


def test_a_model_with_quick_gelu_keeps_it():
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": {**VIT, "image_size": 32}}
    text = {"embed_dim": 16, "quick_gelu": True, "text_cfg": {**TRANSFORMER, "vocab_size": 120}}
    text["text_cfg"] |= {"pool_type": "eos", "eos_id": tiny_tokenizer().end_id}
    model = dual_encoder(
        Tower("open_clip:own", {"config": config}), Tower("open_clip:own", {"config": text})
    )
    converted = to_huggingface(model)
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-5, rtol=0)
    assert settings_of(converted.image).hidden_act == "quick_gelu"


def test_there_and_back_no_weight_has_changed():
    model = huggingface_clip()
    back = to_huggingface(to_open_clip(model))
    weights = model.state_dict()
    assert list(back.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())
    settings, before = settings_of(back.text), settings_of(model.text)
    assert settings.intermediate_size == before.intermediate_size == 40
    assert settings.eos_token_id == before.eos_token_id
    assert settings.pad_token_id == before.pad_token_id


def test_open_clip_s_weights_come_back_too():
    model = open_clip_clip({"mlp_ratio": 2.2}, {"mlp_ratio": 2.2})
    back = to_open_clip(to_huggingface(model))
    weights = model.state_dict()
    assert list(back.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())
    again = to_open_clip(to_huggingface(back))
    assert again.config.to_dict() == back.config.to_dict()


def test_the_last_id_is_clip_s_own_end_of_a_text():
    tokenizer = Tokenizer.clip(context_length=16)
    model = dual_encoder(
        Tower("hf:clip_vision_model", HF_IMAGE),
        Tower("hf:clip_text_model", HF_TEXT),
        tokenizer=tokenizer,
    )
    converted = to_open_clip(model)
    assert converted.text.recipe()["config"]["text_cfg"].get("pool_type", "argmax") == "argmax"
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-5, rtol=0)
    back = to_huggingface(converted)
    assert settings_of(back.text).eos_token_id == tokenizer.end_id == len(tokenizer) - 1


def test_projections_statistics_and_temperature_stay():
    image = Tower("hf:clip_vision_model", {**HF_IMAGE, "mean": [0.1, 0.2, 0.3]}, "mlp")
    model = dual_encoder(image, Tower("hf:clip_text_model", HF_TEXT, "affine"))
    converted = to_open_clip(model)
    assert converted.image.statistics["mean"] == [0.1, 0.2, 0.3]
    assert converted.config.image.projection == "mlp"
    assert converted.logit_bias == model.logit_bias
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-5, rtol=0)


def test_other_towers_stay_what_they_are():
    resnet = Tower("timm:resnet10t", TINY_RESNET)
    model = dual_encoder(resnet, Tower("hf:clip_text_model", HF_TEXT))
    converted = to_open_clip(model)
    assert converted.image.name == "timm:resnet10t"
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-5, rtol=0)
    plain = dual_encoder(resnet, Tower("hf:bert", TINY_BERT))
    assert to_open_clip(plain) is plain
    assert to_huggingface(plain) is plain


@pytest.mark.parametrize(
    ("image", "text", "named"),
    [
        ({"ls_init_value": 0.1}, {}, "ls_init_value=0.1"),
        ({"no_ln_pre": True}, {}, "no_ln_pre=True"),
        ({"pool_type": "avg"}, {}, "pool_type='avg'"),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, {}, "attentional_pool=True"),
        ({"qk_norm": True}, {}, "qk_norm=True"),
        ({"layers": [1, 1, 1, 1], "width": 16, "head_width": 8}, {}, "no ViT"),
        ({}, {"no_causal_mask": True, "pool_type": "last"}, "pool_type='last'"),
        ({}, {"no_causal_mask": True}, "no_causal_mask=True"),
        ({}, {"scale_fc": True}, "scale_fc=True"),
        ({}, {"act_kwargs": {"approximate": "other"}}, "approximate"),
    ],
)
def test_what_huggingface_cannot_say_is_named(image, text, named):
    model = open_clip_clip(image, text)
    with pytest.raises(ValueError, match="does not fit Hugging Face's CLIP") as error:
        to_huggingface(model)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"), [({"hidden_act": "relu"}, "'relu'"), ({"pooler": "mean"}, "'mean'")]
)
def test_what_open_clip_cannot_say_is_named(changes, named):
    text = Tower("hf:clip_text_model", {**HF_TEXT, **changes})
    model = dual_encoder(Tower("timm:resnet10t", TINY_RESNET), text)
    with pytest.raises(ValueError, match="does not fit OpenCLIP's CLIP") as error:
        to_open_clip(model)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_patch_dropout_is_left_behind_and_the_mode_is_kept():
    model = open_clip_clip({"patch_dropout": 0.5})
    torch.testing.assert_close(logits(to_huggingface(model)), logits(model), atol=1e-5, rtol=0)
    assert not to_huggingface(model).training
    assert to_huggingface(model.train()).training
