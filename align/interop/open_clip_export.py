"""A dual encoder as a folder that OpenCLIP opens, seen to give the same before it is put in place.

folder/
  open_clip_config.json          `model_cfg` and `preprocess_cfg`
  open_clip_model.safetensors    the weights
  tokenizer.json, ...            where the tokenizer is not CLIP's own
  text/, image/                  an architecture of Hugging Face's or timm's, where one is named
  README.md                      how to open it
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.hf_configs import arch_dict
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from align.encoders.huggingface_text import HuggingFaceTextEncoder
from align.encoders.open_clip_tower import OpenCLIPImageEncoder, OpenCLIPTextEncoder
from align.encoders.timm_tower import TimmImageEncoder
from align.folders import whole_folder
from align.interop.agreement import Agreement, caveat, check
from align.interop.open_clip_timm import timm_part
from align.interop.torch_readmes import PATHS, open_clip_readme
from align.model import DualEncoder
from align.tokenizer import Tokenizer

_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler", "native": "cls_pooler"}
_CLIP_ENTRIES = 49408
_LIMITS = {"truncation", "padding"}
_RESIZE = {"crop": "shortest", "squash": "squash"}


@dataclass(frozen=True)
class Part:
    """One side of a model in OpenCLIP's terms.

    Attributes:
        section: its `vision_cfg` or `text_cfg`.
        weights: under OpenCLIP's names, with `visual.` or `text.` in front.
        quick_gelu: whether it computes QuickGELU; None = it is not asked.
    """

    section: dict[str, Any]
    weights: dict[str, Tensor]
    quick_gelu: bool | None = None


def write_open_clip(model: DualEncoder, folder: Path | str) -> Agreement | None:
    """Write a folder that `open_clip.create_model("local-dir:FOLDER")` opens, whole or not at all.

    Texts are cleaned as OpenCLIP cleans them: where the model's tokenizer cleans nothing
    OpenCLIP's still repairs broken encodings, resolves HTML entities and joins spaces.

    Args:
        model: `open_clip:` towers; `timm:` images; `hf:` texts of the architectures that OpenCLIP
            knows; Hugging Face's CLIP, if both towers are.
        folder: replaced if it is there. If there are subfolders `text` or `image` in it, the
            configuration names them by their full path.

    Returns:
        What OpenCLIP makes of it.

    Raises:
        ValueError: OpenCLIP has no word for a part of the model.
    """
    folder = Path(folder)
    model = _in_open_clip_terms(model)
    with whole_folder(folder) as beside, torch.no_grad():
        image, text = _image_part(model, beside), _text_part(model, beside)
        config = _config(model, image, text)
        weights = {**image.weights, **text.weights}
        weights["logit_scale"] = model.logit_scale
        if "init_logit_bias" in config:
            weights["logit_bias"] = model.logit_bias
        if not config["custom_text"]:
            weights = {key.removeprefix("text."): value for key, value in weights.items()}
        weights = {key: value.cpu().clone().contiguous() for key, value in weights.items()}
        save_file(weights, beside / HF_SAFE_WEIGHTS_NAME)
        preprocess = {
            **model.image.statistics,
            "size": model.config.image_size,
            "interpolation": "bicubic",
            "resize_mode": _RESIZE[model.config.fit],
        }
        folders = [name for name in PATHS if (beside / name).is_dir()]
        text = open_clip_readme(model, folders, note=caveat(model, to="open_clip"))
        (beside / "README.md").write_text(text, encoding="utf-8")
        # Architectures beside the weights are named by full paths: where they are, to be compared,
        # then where they will be.
        _write_config(beside, _moved(config, beside.resolve()), preprocess)
        agreement = check(model, beside, to="open_clip")
        _write_config(beside, _moved(config, folder.resolve()), preprocess)
        return agreement


def _write_config(folder: Path, config: dict[str, Any], preprocess: dict[str, Any]) -> None:
    written = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / HF_CONFIG_NAME).write_text(json.dumps(written, indent=2) + "\n")


def refuse(part: str, why: str) -> ValueError:
    """The one line that says what OpenCLIP's format has no word for."""
    return ValueError(f"{part} does not fit OpenCLIP's format: {why}; `--to onnx` takes any model")


def _in_open_clip_terms(model: DualEncoder) -> DualEncoder:
    bodies: list[Any] = [model.image.body, model.text.body]
    families = [getattr(getattr(body, "config", None), "model_type", "") for body in bodies]
    if not {"clip_vision_model", "clip_text_model"} & set(families):
        return model
    from align.interop.clip_names import to_open_clip

    return to_open_clip(model)


def _config(model: DualEncoder, image: Part, text: Part) -> dict[str, Any]:
    quick = {part.quick_gelu for part in (image, text)} - {None}
    if len(quick) > 1:
        raise refuse("the pair of towers", "one computes QuickGELU and the other does not")
    config: dict[str, Any] = {
        "embed_dim": model.config.dim,
        "quick_gelu": quick == {True},
        "custom_text": bool(text.section.get("hf_model_name") or text.section.get("embed_cls")),
        "vision_cfg": image.section,
        "text_cfg": text.section,
    }
    if bias := float(model.logit_bias):
        config["init_logit_bias"] = bias
    return config


def _moved(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with the architectures beside the weights where they will be."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if str(vision.get("timm_model_name")).startswith("local-dir:"):
        vision["timm_model_name"] = f"local-dir:{folder / 'image'}"
    if text.get("hf_model_name"):
        text["hf_model_name"] = str(folder / "text")
    return {**config, "vision_cfg": vision, "text_cfg": text}


def _image_part(model: DualEncoder, beside: Path) -> Part:
    match model.image:
        case OpenCLIPImageEncoder():
            return _native_image(model, model.image)
        case TimmImageEncoder():
            section, weights = timm_part(model, model.image, beside / "image")
            return Part(section, weights)
    raise refuse(f"the image tower {model.image.name}", "it is neither OpenCLIP's nor timm's")


def _native_image(model: DualEncoder, tower: OpenCLIPImageEncoder) -> Part:
    kind, dim = model.config.image.projection, model.config.dim
    section = dict(tower.config["vision_cfg"])
    visual: Any = tower.visual
    weights = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    last = model.image_projection.state_dict()
    if isinstance(visual, VisionTransformer):
        if kind not in {"linear", "none"}:
            raise refuse(f"the image projection {kind}", "a ViT of OpenCLIP's has a matrix alone")
        if section.get("attentional_pool") and tower.config["embed_dim"] != dim:
            raise refuse(f"dim {dim}", f"attentional_pool gives {tower.config['embed_dim']}")
        matrix = last["weight"].T if last else torch.eye(dim)
        quick = bool(tower.config.get("quick_gelu", False))
        return Part(section, {**weights, "visual.proj": matrix}, quick)
    name = "attnpool.c_proj" if isinstance(visual, ModifiedResNet) else "head.proj"
    if kind != "none":
        if kind == "mlp" or f"visual.{name}.weight" not in weights:
            raise refuse(f"the image projection {kind}", f"{tower.name} ends with its own")
        # Two linear maps in a row are one.
        matrix, bias = last["weight"].double(), f"visual.{name}.bias"
        inner = weights[f"visual.{name}.weight"].double()
        moved = matrix @ weights[bias].double() if bias in weights else torch.zeros(())
        if "bias" in last or bias in weights:
            moved = moved + last.get("bias", torch.zeros(dim).to(moved))
            weights[bias] = moved.float()
            if isinstance(visual, TimmModel):
                section["timm_proj_bias"] = True
        weights[f"visual.{name}.weight"] = (matrix @ inner).float()
    return Part(section, weights)


def _text_part(model: DualEncoder, beside: Path) -> Part:
    match model.text:
        case OpenCLIPTextEncoder():
            part = _native_text(model, model.text)
        case HuggingFaceTextEncoder():
            part = _hf_text(model, model.text, beside / "text")
        case _:
            raise refuse(f"the text tower {model.text.name}", "it is neither OpenCLIP's nor hf:")
    part.section["context_length"] = model.config.context_length
    _write_tokenizer(model, part.section, beside)
    return part


def _native_text(model: DualEncoder, tower: OpenCLIPTextEncoder) -> Part:
    kind, length = model.config.text.projection, model.config.context_length
    section = dict(tower.config["text_cfg"])
    weights = {f"text.{key}": value for key, value in tower.text.state_dict().items()}
    if length < tower.max_length:
        if tower.fixed_length is not None:
            raise refuse(
                f"context_length {length}",
                f"{tower.name} reads {tower.max_length} tokens of each text, padding included",
            )
        # A causal tower never sees the places behind the end.
        weights["text.positional_embedding"] = weights["text.positional_embedding"][:length]
    last = model.text_projection.state_dict()
    match kind:
        case "linear":
            weights["text.text_projection"] = last["weight"].T
        case "affine":
            weights |= {f"text.text_projection.{key}": value for key, value in last.items()}
        case "none":
            pass
        case _:
            raise refuse(f"the text projection {kind}", "a text tower of OpenCLIP's has none such")
    section["proj_bias"] = kind == "affine"
    section["proj_type"] = "none" if kind == "none" else "linear"
    return Part(section, weights, bool(tower.config.get("quick_gelu", False)))


def _hf_text(model: DualEncoder, tower: HuggingFaceTextEncoder, folder: Path) -> Part:
    kind, pooler = model.config.text.projection, tower.own["pooler"]
    transformer: Any = tower.transformer
    family = transformer.config.model_type
    if family not in arch_dict:
        raise refuse(f"the text tower {tower.name}", f"it takes {', '.join(arch_dict)}")
    if pooler not in _POOLERS:
        raise refuse(f"the text pooler {pooler}", f"it takes {', '.join(_POOLERS)}")
    if kind == "affine":
        raise refuse("the text projection affine", "a Hugging Face tower takes linear, mlp, none")
    pad = transformer.config.pad_token_id
    if model.tokenizer.pad_id != pad or model.tokenizer.end_id == pad:
        raise refuse("the tokenizer", f"it has to pad with an id of its own, the tower's {pad}")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tower.config, indent=2) + "\n")
    section = {
        "hf_model_name": str(folder),
        "hf_model_pretrained": False,
        "hf_pooler_type": _POOLERS[pooler],
        "hf_proj_type": None if kind == "none" else kind,
    }
    weights = {f"text.transformer.{key}": value for key, value in transformer.state_dict().items()}
    last = model.text_projection.state_dict()
    return Part(section, {**weights, **{f"text.proj.{key}": value for key, value in last.items()}})


def _write_tokenizer(model: DualEncoder, section: dict[str, Any], beside: Path) -> None:
    """Let OpenCLIP's tokenizer give the ids that the model's does, padded as its tower needs it."""
    tokenizer, tower = model.tokenizer, model.text
    for key in ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"):
        section.pop(key, None)
    clean = "whitespace" if tokenizer.clean == "none" else tokenizer.clean
    padding_counts = tower.fixed_length is not None
    if (
        clean in {"lower", "canonicalize"}
        and not section.get("hf_model_name")
        and (tower.pad_id == 0 or not padding_counts)
        and _is_clips_own(tokenizer)
    ):
        section["tokenizer_kwargs"] = {"clean": clean}
        return
    section["hf_tokenizer_name"] = "."
    section["tokenizer_kwargs"] = {"clean": clean}
    tokenizer.save(beside)
    if padding_counts and tower.pad_id is not None and tower.pad_id != tokenizer.pad_id:
        written = AutoTokenizer.from_pretrained(str(beside))
        written.pad_token = written.convert_ids_to_tokens(tower.pad_id)
        written.save_pretrained(str(beside))


def _is_clips_own(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is `Tokenizer.clip()`, but for how far it cuts and pads."""
    if len(tokenizer) != _CLIP_ENTRIES:
        return False
    clip = Tokenizer.clip()
    both = [json.loads(one.backend.backend_tokenizer.to_str()) for one in (tokenizer, clip)]
    return all(both[0][key] == both[1][key] for key in both[1] if key not in _LIMITS)
