"""OpenCLIP's models as dual encoders of ours, and ours as OpenCLIP's: the same logits both ways."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from open_clip.hf_model import (
    ClsLastHiddenStatePooler,
    ClsPooler,
    HFTextEncoder,
    MeanPooler,
)
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from align.encoders.huggingface import plain
from align.encoders.open_clip_source import Source, build_model, find_source, one_line
from align.encoders.timm_tower import TimmImageEncoder
from align.interop.open_clip_export import write_open_clip
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.tokenizer import Tokenizer

__all__ = ["read_open_clip", "write_open_clip"]

FITS = {"shortest": "crop", "squash": "squash"}
"""How a picture becomes square: OpenCLIP's word and ours."""
_TOKENIZER_KEYS = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
_POOLS = {"avg": "mean", "max": "max", "token": "cls"}


@dataclass(frozen=True)
class _Half:
    """One side of a model: what to build, and the weights of its tower and of its projection."""

    tower: Tower
    weights: dict[str, Tensor]
    projection: dict[str, Tensor] = field(default_factory=dict)


def read_open_clip(source: str, *, weights: str | bool = True) -> DualEncoder:
    r"""An OpenCLIP model, whole: for the same ids and pixels, the logits are OpenCLIP's.

    They are $e^{s} \langle u, v \rangle + b$ of unit vectors, as `DualEncoder.logits` computes
    them. Native towers stay OpenCLIP's (`open_clip:`), its adapters of timm and of Hugging Face
    become `timm:` and `hf:` towers; an adapter of timm that pools or projects in a way of its own
    stays whole. Pictures are always scaled bicubic, whatever a model was trained with.

    Args:
        source: a built-in name with its weights (`ViT-B-32@laion2b_s34b_b79k`), `local-dir:FOLDER`,
            `hf-hub:OWNER/NAME`, or a folder that holds `open_clip_config.json`.
        weights: True = those that `source` names, False = fresh ones; or a tag, or a file in
            safetensors.

    Raises:
        ValueError: there is no such model or no such weights, they are a pickle, or a part of it
            cannot be said here (CoCa's decoder, tokenizers that drop words, max_pooler, ...).
    """
    name, at, tag = source.rpartition("@")
    if at and weights is True and ":" not in source and not Path(source).is_dir():
        source, weights = name, tag
    found = find_source(source, weights)
    if "multimodal_cfg" in found.config:
        raise ValueError(f"{source} writes captions (CoCa); only its image tower can be read")
    theirs = build_model(found)
    size = _side_of(theirs.visual.image_size, source)
    tokenizer = _read_tokenizer(found)
    image = _image_half(theirs.visual, found, size)
    text = _text_half(theirs, found, tokenizer)
    config = DualEncoderConfig(
        image=image.tower,
        text=text.tower,
        dim=found.config["embed_dim"],
        image_size=size,
        context_length=tokenizer.context_length,
        fit=_fit(found),
    )
    model = DualEncoder(config, tokenizer)
    with one_line(f"the weights of {source} do not fit its towers"):
        model.image.load_state_dict(image.weights)
        model.image_projection.load_state_dict(image.projection)
        model.text.load_state_dict(text.weights)
        model.text_projection.load_state_dict(text.projection)
        model.logit_scale.fill_(theirs.logit_scale.detach().reshape(()))
        if theirs.logit_bias is not None:
            model.logit_bias.fill_(theirs.logit_bias.detach().reshape(()))
    return model.eval()


def _side_of(size: Any, source: str) -> int:
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height != width:
        raise ValueError(f"{source} takes pictures of {width} x {height}; only squares fit here")
    return int(height)


def _fit(source: Source) -> str:
    mode = source.preprocess["resize_mode"]
    if mode not in FITS:
        raise ValueError(
            f"{source.name} fits pictures by resize_mode {mode!r}; known: {', '.join(FITS)}"
        )
    return FITS[mode]


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def _options(source: Source, section: str) -> dict[str, Any]:
    """The options of one native tower, without the tokenizer's."""
    config = {
        key: source.config[key] for key in ("embed_dim", "quick_gelu") if key in source.config
    }
    own = {
        key: value for key, value in source.config[section].items() if key not in _TOKENIZER_KEYS
    }
    own.pop("output_tokens", None)
    return {"config": {**config, section: own}}


def _statistics(source: Source) -> dict[str, list[float]]:
    return {key: [float(x) for x in source.preprocess[key]] for key in ("mean", "std")}


def _image_half(visual: Any, source: Source, size: int) -> _Half:
    options = {**_options(source, "vision_cfg"), **_statistics(source)}
    tower = Tower(f"open_clip:{source.title}", options, "none")
    state = visual.state_dict()
    match visual:
        case VisionTransformer():
            matrix = state.pop("proj")
            return _Half(
                replace(tower, projection="linear"),
                _prefixed("visual.", state),
                {"weight": matrix.T},
            )
        case ModifiedResNet():
            return _Half(tower, _prefixed("visual.", state))
        case TimmModel():
            return _timm_half(visual, source, size) or _Half(tower, _prefixed("visual.", state))
    raise ValueError(f"OpenCLIP's {type(visual).__name__} is an image tower not known here")


@torch.no_grad()
def _timm_half(visual: TimmModel, source: Source, size: int) -> _Half | None:
    """OpenCLIP's adapter as a tower of timm's, where one says the same of a picture of noise."""
    section = source.config["vision_cfg"]
    parts = list(visual.head)
    if section.get("timm_drop") or len(parts) > 2 or (parts and not hasattr(visual.head, "proj")):
        return None  # dropout, pooling or a perceptron of the adapter's own
    trunk: Any = visual.trunk
    weights = trunk.state_dict()
    last: Any = getattr(visual.head, "proj", None)
    if last is None and section.get("timm_proj") != "none":  # the classifier is the projection
        last = trunk.get_classifier()
        if not isinstance(last, nn.Linear):
            return None
        name = next(name for name, part in trunk.named_modules() if part is last)
        weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
    kind = "none" if last is None else "linear" if last.bias is None else "affine"
    project = nn.Identity() if last is None else last
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with one_line(f"the image tower of {source.name} does not take pictures of {size} px"):
        expected = visual(noise)
    for tower in _timm_candidates(source, kind):
        try:
            candidate = TimmImageEncoder(
                tower.name.removeprefix("timm:"), image_size=size, **tower.options
            ).eval()
            candidate.load_state_dict(_prefixed("backbone.", weights))
            found = project(candidate.encode(noise).pooled)
        except (ValueError, RuntimeError):
            continue  # other weights, other shapes: another way to pool
        if found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5, rtol=1e-4):
            return _Half(
                tower,
                candidate.state_dict(),
                {} if last is None else last.state_dict(),
            )
    return None


def _timm_candidates(source: Source, projection: str) -> list[Tower]:
    """Towers of timm's that may be the same as OpenCLIP's adapter of it, the likeliest first."""
    section = source.config["vision_cfg"]
    name, options = section["timm_model_name"], _statistics(source)
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "config.json"
        with one_line(f"{path} cannot be read"):
            saved = json.loads(path.read_text(encoding="utf-8"))
            name, options = saved["architecture"], {**options, **saved.get("model_args", {})}
    if section.get("timm_drop_path") is not None:
        options["drop_path_rate"] = section["timm_drop_path"]
    if section.get("patch_dropout"):
        options["patch_drop_rate"] = section["patch_dropout"]
    pool = section.get("timm_pool", "avg")
    ways: list[dict[str, Any]] = [{}]
    if pool:
        ways.append({"global_pool": pool})
    if pool in _POOLS:
        ways.append({"pooling": _POOLS[pool]})
    return [Tower(f"timm:{name}", {**options, **way}, projection) for way in ways]


def _text_half(theirs: Any, source: Source, tokenizer: Tokenizer) -> _Half:
    text = getattr(theirs, "text", None)
    if isinstance(text, HFTextEncoder):
        return _hf_half(text, source, tokenizer)
    parts = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_proj")
    state = (
        {key: value for key, value in theirs.state_dict().items() if key.startswith(parts)}
        if text is None
        else text.state_dict()
    )
    projection, kind = {}, "none"
    if "text_projection" in state:
        projection, kind = {"weight": state.pop("text_projection").T}, "linear"
    elif "text_projection.weight" in state:
        projection = {key: state.pop(f"text_projection.{key}") for key in ("weight", "bias")}
        kind = "affine"
    options = _options(source, "text_cfg")
    _fit_to_tokenizer(options["config"]["text_cfg"], tokenizer, source)
    tower = Tower(f"open_clip:{source.title}", options, kind)
    return _Half(tower, _prefixed("text.", state), projection)


def _fit_to_tokenizer(section: dict[str, Any], tokenizer: Tokenizer, source: Source) -> None:
    """Say outright what OpenCLIP leaves to its tokenizer: which id pads, and which one ends.

    OpenCLIP's own tokenizer pads with 0. Where a text ends is found as the greatest id of all,
    which is the last of the vocabulary unless a model has spare ones.
    """
    pad = tokenizer.pad_id if source.config["text_cfg"].get("hf_tokenizer_name") else 0
    if section.get("embed_cls") and section.get("pad_id", 0) != pad:
        raise ValueError(
            f"{source.name} takes id {section.get('pad_id', 0)} for padding, its tokenizer pads "
            f"with {pad}"
        )
    section["pad_id"] = pad
    if section.get("pool_type", "argmax") == "argmax":
        spare = section.get("vocab_size", 49408) > len(tokenizer)
        if spare and tokenizer.end_id == len(tokenizer) - 1:
            section.update(pool_type="eos", eos_id=tokenizer.end_id)


def _hf_half(text: HFTextEncoder, source: Source, tokenizer: Tokenizer) -> _Half:
    """OpenCLIP's adapter of a Hugging Face model as a tower of Hugging Face's."""
    settings: Any = text.config
    section = source.config["text_cfg"]
    transformer: Any = text.transformer
    match text.pooler:
        case MeanPooler():
            pooler = "mean"
        case ClsPooler() if getattr(transformer, "pooler", None) is not None:
            pooler = "native"
        case ClsPooler() | ClsLastHiddenStatePooler():
            pooler = "cls"
        case _:
            raise ValueError(
                f"{source.name} pools texts by {section['hf_pooler_type']}, which reads padding; "
                "known: mean_pooler, cls_pooler, cls_last_hidden_state_pooler"
            )
    if tokenizer.pad_id != settings.pad_token_id:
        raise ValueError(
            f"the tokenizer of {source.name} pads with id {tokenizer.pad_id}, its text tower takes "
            f"id {settings.pad_token_id} for padding"
        )
    kinds = {nn.Identity: "none", nn.Linear: "linear", nn.Sequential: "mlp"}
    config = {**plain(settings), "_name_or_path": ""}
    told = str(section["hf_model_name"])
    name = settings.model_type if Path(told).is_dir() else told
    tower = Tower(f"hf:{name}", {"config": config, "pooler": pooler}, kinds[type(text.proj)])
    return _Half(tower, _prefixed("transformer.", transformer.state_dict()), text.proj.state_dict())


def _read_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer that OpenCLIP would take, with its way to clean texts."""
    section = source.config["text_cfg"]
    length = section.get("context_length", 77)
    named = section.get("hf_tokenizer_name")
    options = {
        key: value for key, value in (section.get("tokenizer_kwargs") or {}).items() if value
    }
    clean = options.pop("clean", "whitespace" if named else "lower")
    if mode := section.get("tokenizer_mode"):
        raise ValueError(f"{source.name}: tokenizer_mode {mode!r} is not known here")
    if options:
        raise ValueError(
            f"{source.name}: tokenizer_kwargs {sorted(options)[0]!r} is not known here; clean is"
        )
    if named:
        place = named if source.folder is None else source.folder
        return Tokenizer.load(place, context_length=length, clean=clean)
    if clean not in {"lower", "canonicalize"}:
        raise ValueError(f"{source.name}: CLIP's tokenizer with clean {clean!r} is not known here")
    tokenizer = Tokenizer.clip(context_length=length)
    tokenizer.clean = clean
    return tokenizer
