"""Whole models of Hugging Face's as ours, and ours as theirs: CLIP, SigLIP, and any two encoders.

`CLIPModel` has CLIP's towers, `SiglipModel` SigLIP's and a bias, `VisionTextDualEncoderModel` any
image encoder beside any text encoder, each with its own pooling. The logits are the same on both
sides; what is written is read again and compared before it takes its place.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from align.encoders.huggingface import plain
from align.encoders.huggingface_text import longest_text
from align.encoders.reach import hub_if_it_answers
from align.encoders.tower import refusals
from align.folders import damage, whole_folder
from align.interop.agreement import Agreement, caveat, check
from align.interop.clip_names import LEGACY_END, to_huggingface
from align.interop.huggingface_parts import FAMILIES, as_huggingface
from align.interop.processors import (
    PictureFormat,
    read_picture_format,
    read_tokenizer,
    write_processor,
)
from align.interop.siglip_names import to_siglip
from align.interop.torch_readmes import huggingface_readme
from align.model import DualEncoder, DualEncoderConfig
from align.model import Tower as Recipe
from align.tokenizer import Tokenizer

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_huggingface(source: str | Path) -> DualEncoder:
    """A `CLIPModel`, `SiglipModel` or `VisionTextDualEncoderModel` whole, with equal logits.

    Equal on equal pixels and token ids. CLIP's early configurations name 2 for the end of a text
    and mean its greatest id; here the tokenizer's own end takes its place, which is the same for
    every text without tokens that were added behind it. SigLIP reads padding, always up to its
    longest text.

    Args:
        source: a hub id (`openai/clip-vit-base-patch32`) or a folder in the hub's format, with
            weights in safetensors, a tokenizer and an image processor.

    Raises:
        ValueError: another kind of model, something missing, or what does not fit together.
    """
    source = str(source)
    if not Path(source).is_dir() and not _HUB_ID.fullmatch(source):
        raise ValueError(f"hf:{source}: there is no such folder, and it is no hub id (OWNER/NAME)")
    with hub_if_it_answers(source) as silence:
        try:
            return _read(source)
        except ValueError as error:
            if silence and isinstance(error.__cause__, OSError):  # no fault of the model's
                raise ValueError(f"{str(error).rstrip('.')}{silence}") from error
            raise


def _read(source: str) -> DualEncoder:
    settings = _settings(source)
    whole = _pretrained(source, FAMILIES[settings.model_type], settings)
    pictures = read_picture_format(source)
    tokenizer = read_tokenizer(source, positions=longest_text(whole.text_model))
    projection = "none" if settings.model_type == "siglip" else "linear"
    config = DualEncoderConfig(
        image=_image_recipe(source, whole.vision_model, pictures, projection),
        text=_text_recipe(whole.text_model, tokenizer, projection),
        dim=getattr(settings, "projection_dim", None) or whole.text_model.head.out_features,
        image_size=pictures.size,
        context_length=tokenizer.context_length,
        fit=pictures.fit,
    )
    with refusals(f"{source} does not fit together"):
        model = DualEncoder(config, tokenizer)
        vision = getattr(whole.vision_model, "timm_model", whole.vision_model)
        model.image.body.load_state_dict(vision.state_dict())
        model.text.body.load_state_dict(whole.text_model.state_dict())
        if projection == "linear":
            model.image_projection.load_state_dict(whole.visual_projection.state_dict())
            model.text_projection.load_state_dict(whole.text_projection.state_dict())
    with torch.no_grad():
        model.logit_scale.copy_(whole.logit_scale.squeeze())
        if projection == "none":
            model.logit_bias.copy_(whole.logit_bias.squeeze())
    return model.eval()


def _settings(source: str) -> Any:
    """The configuration of the whole model."""
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"hf:{source}: the folder has no config.json")
    try:
        with refusals(f"hf:{source} could not be read"):
            settings = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(f"{source}: its config.json is damaged: {damage(error)}") from error
    if settings.model_type not in FAMILIES:
        raise ValueError(
            f"{source} is a model of the type {settings.model_type!r}; what can be read whole is "
            f"{', '.join(FAMILIES)} (a single tower: model.image.name or model.text.name=hf:...)"
        )
    return settings


def _pretrained(source: str, family: str, settings: Any) -> Any:
    """Hugging Face's own model with all of its weights, in fp32.

    Raises:
        ValueError: they are missing, damaged, of other shapes, or would have to be unpickled.
    """
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        raise ValueError(
            f"{source} has no weights in safetensors (model.safetensors)"
            + (
                f", only {pickles[0]}, a pickle, which can run code when it is read: load it where "
                "you trust it and save it again with transformers' save_pretrained"
                if pickles
                else ""
            )
        )
    with refusals(f"{source}: its weights could not be read"):
        try:
            model, report = getattr(transformers, f"{family}Model").from_pretrained(
                source,
                config=settings,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # safetensors and transformers have errors of their own
            raise ValueError(damage(error)) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source}: its weights lack {missing[0]} ({len(missing)} in all)")
    return model


def _image_recipe(source: str, vision: Any, pictures: PictureFormat, projection: str) -> Recipe:
    settings = vision.config
    built_for = getattr(settings, "image_size", None)
    if isinstance(built_for, int) and built_for != pictures.size:
        raise ValueError(
            f"{source}: its image processor makes pictures of {pictures.size} px, its image tower "
            f"takes {built_for}: correct preprocessor_config.json"
        )
    statistics = {"mean": pictures.mean, "std": pictures.std}
    if settings.model_type == "timm_wrapper":
        options = settings.model_args or {}
        return Recipe(f"timm:{settings.architecture}", {**options, **statistics}, projection)
    options = {"config": plain(settings), "pooling": "native", **statistics}
    return Recipe(f"hf:{settings.model_type}", options, projection)


def _text_recipe(text: Any, tokenizer: Tokenizer, projection: str) -> Recipe:
    settings = plain(text.config)
    match settings["model_type"]:
        case "clip_text_model":
            if settings["eos_token_id"] == LEGACY_END and tokenizer.end_id is not None:
                settings["eos_token_id"] = tokenizer.end_id
        case "siglip_text_model":  # it reads padding, so it is the tokenizer's that counts
            settings["pad_token_id"] = tokenizer.pad_id
    return Recipe(
        f"hf:{settings['model_type']}", {"config": settings, "pooler": "native"}, projection
    )


def write_huggingface(model: DualEncoder, folder: Path | str) -> Agreement | None:
    """Write a model so that transformers opens it, with equal logits; whole or not at all.

    A `CLIPModel` where both towers are CLIP's, a `SiglipModel` where both are SigLIP's, those of
    OpenCLIP and timm too (`align.interop.clip_names`, `align.interop.siglip_names`), else a
    `VisionTextDualEncoderModel`; with tokenizer, image processor and a README.md that says how to
    open them.

    Args:
        model: stays as it is.
        folder: replaced if it is there.

    Returns:
        What transformers makes of it.

    Raises:
        ValueError: a part that Hugging Face's classes cannot say.
    """
    try:
        model = to_huggingface(to_siglip(model))
        family, whole = as_huggingface(model)
        masked = whole.config.text_config.model_type != "siglip_text_model"
        with whole_folder(folder) as beside:
            whole.save_pretrained(beside)
            write_processor(model, beside, family=family, masked=masked)
            text = huggingface_readme(model, family, note=caveat(model, to="hf"))
            (beside / "README.md").write_text(text, encoding="utf-8")
            return check(model, beside, to="hf")
    except ValueError as error:
        raise ValueError(f"{error}; `--to onnx` takes any model") from error
