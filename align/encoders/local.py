"""Towers in local folders: a bundle of ours, or what timm, OpenCLIP or Hugging Face wrote."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from align.encoders import build_image_tower, build_text_tower
from align.encoders.tower import ImageTower, TextTower
from align.folders import damage
from align.trust import refuse_calls, refuse_intruders


def local_image_tower(name: str, **options: Any) -> ImageTower:
    """The image tower in a folder, with its weights.

    Args:
        name: the folder.
        options: passed to the library that wrote it; with `pretrained=False` weights are fresh.

    Raises:
        ValueError: there is no folder, or nothing in it that is known.
    """
    return _local_tower(Path(name), "image", options)


def local_text_tower(name: str, **options: Any) -> TextTower:
    """The text tower in a folder, with its weights.

    Args:
        name: the folder.
        options: passed to the library that wrote it; with `pretrained=False` weights are fresh.

    Raises:
        ValueError: there is no folder, or nothing in it that is known.
    """
    return _local_tower(Path(name), "text", options)


def _local_tower(folder: Path, side: str, options: dict[str, Any]) -> Any:
    build = build_image_tower if side == "image" else build_text_tower
    if not folder.is_dir():
        raise ValueError(f"local:{folder}: there is no such folder")
    if (folder / "open_clip_config.json").is_file():
        return build(f"open_clip:local-dir:{folder}", **{"pretrained": True, **options})
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"local:{folder}: holds neither config.json nor open_clip_config.json"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: holds no settings")
    if "model" in config and "format" in config:
        refuse_intruders(folder)
        refuse_calls(folder)
        try:
            recipe = {"name": config["model"][side]["name"], **config["model"][side]["options"]}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / 'config.json'}: tells of no {side} tower ({error})"
            ) from error
        return _from_bundle(folder, recipe, side, options)
    if "architecture" in config and side == "image":
        return build(f"timm:local-dir:{folder}", **{"pretrained": True, **options})
    if "model_type" in config:
        return build(f"hf:{folder}", **{"pretrained": True, **options})
    raise ValueError(f"local:{folder}: its config.json tells of no {side} tower")


def _from_bundle(folder: Path, recipe: dict[str, Any], side: str, options: dict[str, Any]) -> Any:
    """The tower of a bundle, built by its recipe and given its weights, unless fresh ones do."""
    # The model around it tells each tower of its pictures or tokenizer; these have theirs.
    if unknown := sorted(options.keys() - {"image_size", "vocabulary", "pretrained"}):
        raise ValueError(f"local:{folder} is a bundle, which has no option {unknown[0]!r}")
    size = {"image_size": options["image_size"]} if options.get("image_size") else {}
    build = build_image_tower if side == "image" else build_text_tower
    tower = build(recipe.pop("name"), **{**recipe, **size})
    if not options.get("pretrained", True):
        return tower
    weights: dict[str, torch.Tensor] = {}
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no dictionary
                if key.startswith(f"{side}."):
                    weights[key.removeprefix(f"{side}.")] = tensors.get_tensor(key)
        tower.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / 'model.safetensors'}: {damage(error)}") from error
    return tower
