"""A trained dual encoder as a folder that anybody can load: weights, tokenizer, how to rebuild.

bundle/
  config.json         towers, width, picture size, pixel statistics; where it came from
  model.safetensors   the weights
  tokenizer/          Hugging Face's format
  README.md           the model card
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from align.folders import damage, whole_folder
from align.model import DualEncoder, DualEncoderConfig
from align.tokenizer import Tokenizer

FORMAT = 2


def save(
    model: DualEncoder,
    folder: Path | str,
    *,
    card: str = "",
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a bundle, whole or not at all.

    Args:
        model: what to save.
        folder: replaced if it is there.
        card: text of the model card (Markdown).
        provenance: JSON values that say where the weights came from.
    """
    config = _self_contained(model)
    with whole_folder(folder) as beside:
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, beside / "model.safetensors")
        model.tokenizer.save(beside / "tokenizer")
        description = {
            "format": FORMAT,
            "model": config.to_dict(),
            "tokenizer": {"clean": model.tokenizer.clean},
            "provenance": provenance or {},
        }
        (beside / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        (beside / "README.md").write_text(card or "# A dual encoder trained with Align\n")


def load(path: Path | str) -> DualEncoder:
    """Load a bundle from a folder, or from the Hugging Face hub by its id, ready to encode.

    Args:
        path: a folder that `save` wrote, or a hub id such as `someone/some-model`.

    Raises:
        ValueError: there is no bundle, or it is damaged.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _from_hub(str(path))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path} is no bundle: it has no config.json")
    try:
        description = json.loads((folder / "config.json").read_text())
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']}; this version reads {FORMAT}")
        config = DualEncoderConfig.from_dict(description["model"])
        tokenizer = Tokenizer.load(
            folder / "tokenizer", context_length=config.context_length, **description["tokenizer"]
        )
        model = DualEncoder(config, tokenizer)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except KeyError as error:
        raise ValueError(f"{path} is a damaged bundle: its config.json lacks {error}") from error
    except (ValueError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is a damaged bundle: {damage(error)}") from error
    return model.eval()


def _from_hub(name: str) -> Path:
    if "/" not in name:  # not asked for by an id: no network
        raise ValueError(f"there is no bundle {name}: no such folder, and no hub id (OWNER/NAME)")
    try:
        return Path(huggingface_hub.snapshot_download(name))
    except HFValidationError as error:
        raise ValueError(f"there is no bundle {name}: no such folder") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"there is no folder {name}, and the hub gave no such model: {first}"
        ) from error


def _self_contained(model: DualEncoder) -> DualEncoderConfig:
    """The configuration with everything resolved that otherwise a hub or a library would supply."""
    towers = {
        side: replace(recipe, name=tower.name, options=tower.recipe())
        for side, recipe, tower in (
            ("image", model.config.image, model.image),
            ("text", model.config.text, model.text),
        )
    }
    return replace(model.config, **towers)


def fingerprint(path: Path | str) -> str:
    """What names a bundle's weights, vocabulary and configuration: a SHA-256 over all three.

    Raises:
        ValueError: there is no bundle.
    """
    folder = Path(path) if Path(path).exists() else _from_hub(str(path))
    digest = hashlib.sha256()
    for name in ("model.safetensors", "tokenizer/tokenizer.json", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{path} is no bundle: it has no {name}")
        with (folder / name).open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
