"""SigLIP's towers, timm's and OpenCLIP's, under Hugging Face's names, equal weight for weight.

OpenCLIP has the models of Zhai et al. 2023 (arXiv 2303.15343) with a ViT of timm's that pools by
attention and a text transformer of its own without a causal mask; Hugging Face has both its own
way. This is what lets a model trained with these towers, bias and all, become a `SiglipModel`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from align.encoders.tower import refusals
from align.interop.clip_names import SIDES, check_section, split
from align.model import DualEncoder
from align.model import Tower as Recipe

_IMAGE = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.out_proj."),
    ("attn_pool.latent", "head.probe"),
    ("attn_pool.proj.", "head.attention.out_proj."),
    ("attn_pool.norm.", "head.layernorm."),
    ("attn_pool.", "head."),
)
"""Parts of names: timm's, Hugging Face's. Attentions come in one matrix, or in two."""
_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")


def to_siglip(model: DualEncoder) -> DualEncoder:
    """The same model with Hugging Face's SigLIP towers, where both of its own are SigLIP's.

    Args:
        model: any; one that is no SigLIP, or has Hugging Face's towers already, is given back.

    Raises:
        ValueError: a SigLIP with a part that Hugging Face's has not.
    """
    image, text = _is_image(model), _is_text(model)
    hf_image = model.image.name == "hf:siglip_vision_model"
    hf_text = model.text.name == "hf:siglip_text_model"
    if not (image or text) or not (image or hf_image) or not (text or hf_text):
        return model
    recipes: dict[str, Recipe] = {}
    weights = dict(model.state_dict())
    for side, wanted, convert in (("image", image, _image), ("text", text, _text)):
        tower, projection = getattr(model, side), getattr(model.config, side).projection
        if not wanted:
            recipes[side] = Recipe(tower.name, tower.recipe(), projection)
            continue
        settings, renamed = convert(model)
        pooled = {"pooling": "native"} if side == "image" else {"pooler": "native"}
        statistics = model.image.statistics if side == "image" else {}
        options = {"config": settings, **pooled, **statistics}
        recipes[side] = Recipe(f"hf:{settings['model_type']}", options, projection)
        weights = {key: weights[key] for key in weights if not key.startswith(f"{side}.")}
        weights |= {f"{side}.{key}": value for key, value in renamed.items()}
    with refusals(f"{model.image.name} with {model.text.name} does not fit Hugging Face's SigLIP"):
        converted = DualEncoder(replace(model.config, **recipes), model.tokenizer)
        converted.load_state_dict(weights)
    return converted.to(model.device).train(model.training)


def _is_image(model: DualEncoder) -> bool:
    from timm.layers.attention_pool import AttentionPoolLatent
    from timm.models import VisionTransformer

    body: Any = model.image.body
    return (
        isinstance(body, VisionTransformer)
        and isinstance(body.attn_pool, AttentionPoolLatent)
        and body.num_prefix_tokens == 0
        and getattr(model.image, "pooling", "native") == "native"
    )


def _is_text(model: DualEncoder) -> bool:
    if not model.text.name.startswith("open_clip:"):
        return False
    section = model.text.recipe()["config"]["text_cfg"]
    return bool(section.get("no_causal_mask")) and section.get("pool_type") == "last"


def _image(model: DualEncoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Hugging Face's configuration of the image tower, and its weights by their names."""
    body: Any = model.image.body
    block = body.blocks[0]
    side, patch = body.patch_embed.img_size, body.patch_embed.patch_size
    if side[0] != side[1] or patch[0] != patch[1]:
        raise ValueError(f"{model.image.name}: pictures or patches that are no squares do not fit")
    settings = {
        "model_type": "siglip_vision_model",
        "hidden_size": body.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(body.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": side[0],
        "patch_size": patch[0],
        "hidden_act": _activation(block.mlp.act, model.image.name),
        "layer_norm_eps": _epsilon(body, model.image.name),
    }
    weights: dict[str, Tensor] = {}
    given = {key: value.clone() for key, value in body.state_dict().items()}
    for kind in ("weight", "bias"):
        both = [given.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
        weights[f"vision.head.attention.in_proj_{kind}"] = torch.cat(both)
    for key, value in given.items():
        name = f"post_layer{key}" if key.startswith("norm.") else key
        for theirs, hf in _IMAGE:
            name = name.replace(theirs, hf)
        if ".attn.qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                named = name.replace(".attn.qkv.", f".self_attn.{part}_proj.")
                weights[f"vision.{named}"] = third.clone()
        else:
            weights[f"vision.{name}"] = value[0] if key == "pos_embed" else value
    return settings, weights


def _text(model: DualEncoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Hugging Face's configuration of the text tower, and its weights by their names.

    Its last map, the head, is the identity: the model's own projection follows it.
    """
    from open_clip import CLIPTextCfg

    body: Any = model.text
    section = CLIPTextCfg(**model.text.recipe()["config"]["text_cfg"])
    causal = replace(section, no_causal_mask=False, pool_type="argmax")
    check_section(causal, model.text.name, "text")
    settings = {
        "model_type": "siglip_text_model",
        **{hf: getattr(section, theirs) for hf, theirs in SIDES["text"].sizes},
        "intermediate_size": int(section.width * section.mlp_ratio),
        "projection_size": section.width,
        "hidden_act": _activation(body.text.transformer.resblocks[0].mlp.gelu, model.text.name),
        "layer_norm_eps": _epsilon(body, model.text.name),
        "bos_token_id": None,
        "eos_token_id": model.tokenizer.end_id,
    }
    weights = split(dict(model.text.state_dict()), SIDES["text"])
    weights["transformer.head.weight"] = torch.eye(section.width)
    weights["transformer.head.bias"] = torch.zeros(section.width)
    return settings, weights


def _activation(module: Any, tower: str) -> str:
    """Hugging Face's name of an activation, found by what it does."""
    values = torch.linspace(-4, 4, 101)
    for name in _ACTIVATIONS:
        if torch.allclose(module(values), ACT2FN[name](values), rtol=0, atol=1e-6):
            return name
    raise ValueError(f"{tower}: its activation {type(module).__name__} does not fit SigLIP")


def _epsilon(body: nn.Module, tower: str) -> float:
    """What all layer norms add to the variance."""
    found = {part.eps for part in body.modules() if isinstance(part, nn.LayerNorm)}
    if len(found) != 1:
        raise ValueError(f"{tower}: layer norms of different eps {sorted(found)} do not fit SigLIP")
    return found.pop()
