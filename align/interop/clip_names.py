"""CLIP's towers under two sets of names, OpenCLIP's and Hugging Face's, equal weight for weight.

Both libraries have the transformers of Radford et al. 2021 (arXiv 2103.00020), and call their parts
differently; OpenCLIP keeps the three maps of an attention in one matrix, Hugging Face in three. One
table of weights and one of sizes say it all, and are read in both directions. Towers that neither
table speaks of stay as they are. The tokens of a converted image tower are those of its new library
(OpenCLIP normalises them and leaves out the class token); what is pooled from them is the same.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from align.encoders.tower import TowerModule
from align.model import DualEncoder
from align.model import Tower as Recipe

_LAYERS = ("encoder.layers.", "transformer.resblocks.")
_LAYER = (
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("self_attn.q_proj.", "attn.in_proj_/0"),  # the first third of the rows of one matrix
    ("self_attn.k_proj.", "attn.in_proj_/1"),
    ("self_attn.v_proj.", "attn.in_proj_/2"),
    ("self_attn.out_proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)
"""What a block's weights are called: by Hugging Face, by OpenCLIP."""


@dataclass(frozen=True)
class Side:
    """What is one tower's own: its names, and which fields of the configurations are the same.

    Attributes:
        model_type: Hugging Face's name of the tower.
        module: where our towers keep the library's module: Hugging Face's, OpenCLIP's.
        section: of OpenCLIP's configuration.
        weights: outside the blocks.
        sizes: fields of the configurations.
    """

    model_type: str
    module: tuple[str, str]
    section: str
    weights: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[str, str], ...]


SIDES = {
    "image": Side(
        "clip_vision_model",
        ("vision.", "visual."),
        "vision_cfg",
        (
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.patch_embedding.", "conv1."),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("pre_layrnorm.", "ln_pre."),
            ("post_layernorm.", "ln_post."),
        ),
        (
            ("hidden_size", "width"),
            ("num_hidden_layers", "layers"),
            ("image_size", "image_size"),
            ("patch_size", "patch_size"),
        ),
    ),
    "text": Side(
        "clip_text_model",
        ("transformer.", "text."),
        "text_cfg",
        (
            ("embeddings.token_embedding.", "token_embedding."),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("final_layer_norm.", "ln_final."),
        ),
        (
            ("hidden_size", "width"),
            ("num_hidden_layers", "layers"),
            ("num_attention_heads", "heads"),
            ("vocab_size", "vocab_size"),
            ("max_position_embeddings", "context_length"),
            ("pad_token_id", "pad_id"),
        ),
    ),
}
"""CLIP's image tower and its text tower."""
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "quick_gelu": {"quick_gelu": True},
    "gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}},
}
"""Hugging Face's name of what stands between the two layers of a block, and OpenCLIP's options."""
_UNSAID = {
    *("attentional_pool", "embed_cls", "ls_init_value", "no_causal_mask", "no_ln_pre", "qk_norm"),
    *("scale_attn", "scale_attn_inner", "scale_fc", "scale_heads", "scaled_cosine_attn"),
}
"""Options of OpenCLIP's that change the mathematics to what Hugging Face's CLIP is not."""
LEGACY_END = 2
"""An `eos_token_id` with which Hugging Face's text tower looks for the greatest id instead."""


def to_open_clip(model: DualEncoder) -> DualEncoder:
    """The same model with OpenCLIP's towers in place of Hugging Face's CLIP towers.

    Args:
        model: `hf:` towers of the kinds `clip_vision_model` and `clip_text_model` are converted,
            with the pooling of the architecture; others stay.

    Raises:
        ValueError: a CLIP tower that OpenCLIP's configuration cannot say.
    """
    return _converted(model, _in_open_clip_names)


def to_huggingface(model: DualEncoder) -> DualEncoder:
    """The same model with Hugging Face's CLIP towers in place of OpenCLIP's own.

    Patch dropout, which only training sees, is left behind.

    Args:
        model: `open_clip:` towers that are a ViT or a causal text transformer are converted, others
            stay.

    Raises:
        ValueError: an OpenCLIP tower that Hugging Face's CLIP cannot say, such as a ModifiedResNet.
    """
    return _converted(model, _in_huggingface_names)


@dataclass(frozen=True)
class _Converted:
    """A tower in its new names: how it is built, and its weights."""

    recipe: Recipe
    weights: dict[str, Tensor]


def _converted(model: DualEncoder, convert: Any) -> DualEncoder:
    recipes, weights, anything = {}, {}, False
    for name, tower, recipe in (
        ("image", model.image, model.config.image),
        ("text", model.text, model.config.text),
    ):
        new: _Converted | None = convert(name, tower, model)
        anything |= new is not None
        kept = Recipe(tower.name, tower.recipe())
        new = new or _Converted(kept, dict(tower.state_dict()))
        recipes[name] = replace(new.recipe, projection=recipe.projection)
        weights |= {f"{name}.{key}": value for key, value in new.weights.items()}
    if not anything:
        return model
    others = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(("image.", "text."))
    }
    converted = DualEncoder(replace(model.config, **recipes), model.tokenizer)
    converted.load_state_dict(weights | others)
    return converted.to(model.device).train(model.training)


def _in_open_clip_names(name: str, tower: TowerModule, model: DualEncoder) -> _Converted | None:
    side = SIDES[name]
    settings: Any = getattr(tower.body, "config", None)
    if not tower.name.startswith("hf:") or settings.model_type != side.model_type:
        return None
    options = tower.recipe()
    pooling = options.get("pooling", options.get("pooler"))
    if pooling != "native":
        raise ValueError(f"the {name} tower's pooling {pooling!r} does not fit OpenCLIP's CLIP")
    if settings.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"the {name} tower's hidden_act {settings.hidden_act!r} does not fit OpenCLIP's CLIP; "
            f"known: {', '.join(_ACTIVATIONS)}"
        )
    section = {theirs: getattr(settings, ours) for ours, theirs in side.sizes}
    section["mlp_ratio"] = _ratio(settings.intermediate_size, settings.hidden_size)
    section["norm_kwargs"] = {"eps": settings.layer_norm_eps}
    if name == "image":
        section["head_width"] = settings.hidden_size // settings.num_attention_heads
    elif settings.eos_token_id not in (LEGACY_END, settings.vocab_size - 1):
        section |= {"pool_type": "eos", "eos_id": settings.eos_token_id}
    activation = dict(_ACTIVATIONS[settings.hidden_act])
    quick = activation.pop("quick_gelu", False)
    config = {
        "embed_dim": model.config.dim,
        "quick_gelu": quick,
        side.section: section | activation,
    }
    statistics = {key: options[key] for key in ("mean", "std") if key in options}
    return _Converted(
        Recipe("open_clip:CLIP", {"config": config, **statistics}),
        _fused(tower.state_dict(), side),
    )


def _in_huggingface_names(name: str, tower: TowerModule, model: DualEncoder) -> _Converted | None:
    if not tower.name.startswith("open_clip:"):
        return None
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    side, options = SIDES[name], tower.recipe()
    config: dict[str, Any] = options["config"]
    kind: Any = CLIPVisionCfg if name == "image" else CLIPTextCfg
    section = kind(**config[side.section])
    quick = config.get("quick_gelu", False)
    check_section(section, tower.name, name)
    settings: dict[str, Any] = {
        "model_type": side.model_type,
        **{ours: getattr(section, theirs) for ours, theirs in side.sizes},
        "intermediate_size": int(section.width * section.mlp_ratio),
        "hidden_act": _activation(section.act_kwargs, quick, tower.name),
        "layer_norm_eps": (section.norm_kwargs or {}).get("eps", 1e-5),
        "projection_dim": model.config.dim,
    }
    if name == "image":
        settings["num_attention_heads"] = section.width // section.head_width
    else:
        settings["bos_token_id"] = model.tokenizer.backend.bos_token_id
        last = section.vocab_size - 1
        settings["eos_token_id"] = section.eos_id if section.pool_type == "eos" else last
    pooled = {"pooling": "native"} if name == "image" else {"pooler": "native"}
    statistics = {key: options[key] for key in ("mean", "std") if key in options}
    return _Converted(
        Recipe(f"hf:{side.model_type}", {"config": settings, **pooled, **statistics}),
        split(tower.state_dict(), side),
    )


def check_section(section: Any, tower: str, side: str) -> None:
    """See that nothing is set which Hugging Face's CLIP has no word for.

    Args:
        section: `open_clip.CLIPVisionCfg` or `open_clip.CLIPTextCfg`.
        tower: its name, for the message.
        side: `image` or `text`.

    Raises:
        ValueError: something is.
    """
    refused = ""
    if getattr(section, "timm_model_name", None) or not isinstance(section.layers, int):
        refused = "an image tower that is no ViT of OpenCLIP's own"
    elif side == "image" and not isinstance(section.image_size, int):
        refused = f"image_size={section.image_size!r}"
    elif set(section.norm_kwargs or {}) - {"eps"}:
        refused = f"norm_kwargs={section.norm_kwargs!r}"
    elif section.block_type not in (None, "default"):
        refused = f"block_type={section.block_type!r}"
    elif section.pool_type not in {"image": ("tok",), "text": ("argmax", "eos")}[side]:
        refused = f"pool_type={section.pool_type!r}"
    elif section.pool_type == "eos" and section.eos_id == LEGACY_END:
        refused = f"eos_id={LEGACY_END}, which it takes for the greatest id,"
    else:
        for field in fields(section):
            if field.name in _UNSAID and getattr(section, field.name) != field.default:
                refused = f"{field.name}={getattr(section, field.name)!r}"
    if refused:
        raise ValueError(f"{tower}: {refused} does not fit Hugging Face's CLIP")


def _activation(act_kwargs: dict[str, Any] | None, quick: bool, tower: str) -> str:
    wanted: dict[str, Any] = {"quick_gelu": True} if quick else {}
    if act_kwargs and act_kwargs != {"approximate": "none"}:
        wanted["act_kwargs"] = act_kwargs
    for name, options in _ACTIVATIONS.items():
        if options == wanted:
            return name
    raise ValueError(f"{tower}: act_kwargs={act_kwargs!r} does not fit Hugging Face's CLIP")


def _ratio(inner: int, width: int) -> float:
    """What `width` is multiplied by, and then cut to a whole number, to give `inner`."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


def _fused(weights: dict[str, Tensor], side: Side) -> dict[str, Tensor]:
    """From Hugging Face's names to OpenCLIP's; queries, keys and values become one matrix."""
    renamed = dict(_renamed(weights.items(), side, 0))
    parts = {key: value for key, value in renamed.items() if "/" in key}
    for first in [key for key in parts if "/0" in key]:
        thirds = [parts[first.replace("/0", f"/{i}")] for i in range(3)]
        renamed[first.replace("/0", "")] = torch.cat(thirds)
    return {key: value for key, value in renamed.items() if key not in parts}


def split(weights: dict[str, Tensor], side: Side) -> dict[str, Tensor]:
    """From OpenCLIP's names to Hugging Face's; one matrix becomes queries, keys and values.

    Args:
        weights: of a tower, by name.
        side: one of `SIDES`.
    """
    parts: dict[str, Tensor] = {}
    for key, value in weights.items():
        before, fused, kind = key.partition("attn.in_proj_")
        thirds = value.chunk(3) if fused else (value,)
        for i, third in enumerate(thirds):
            parts[f"{before}{fused}/{i}{kind}" if fused else key] = third.clone()
    return dict(_renamed(parts.items(), side, 1))


def _renamed(
    weights: Iterable[tuple[str, Tensor]], side: Side, source: int
) -> Iterable[tuple[str, Tensor]]:
    """Weights of a tower under the names of the other library.

    Args:
        weights: by name.
        side: whose names.
        source: the column of the table that the names come from.
    """
    target = 1 - source
    for key, value in weights:
        rest = key.removeprefix(side.module[source])
        start, table = "", side.weights
        if rest.startswith(_LAYERS[source]):
            number, _, rest = rest.removeprefix(_LAYERS[source]).partition(".")
            start, table = f"{_LAYERS[target]}{number}.", _LAYER
        pair = next(pair for pair in table if rest.startswith(pair[source]))
        yield side.module[target] + start + pair[target] + rest.removeprefix(pair[source]), value
