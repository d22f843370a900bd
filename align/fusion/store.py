"""A trained fusion head as a folder: what it is, its weights, and the towers it belongs to."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from align.folders import whole_folder
from align.fusion import fusion_head
from align.fusion.head import FusionHead


def save_head(
    head: FusionHead, folder: Path | str, *, name: str, options: dict[str, Any], towers: str
) -> None:
    """Write a head, whole or not at all.

    Args:
        head: what to save.
        folder: replaced if it is there.
        name: what `fusion_head` knows it by.
        options: what it was built with, beside its widths.
        towers: fingerprint of the bundle whose features it was trained on.
    """
    description = {
        "name": name,
        "options": options,
        "widths": {
            "dim": head.dim,
            "image_width": head.image_width,
            "text_width": head.text_width,
        },
        "towers": towers,
    }
    with whole_folder(folder) as beside:
        (beside / "head.json").write_text(json.dumps(description, indent=2) + "\n")
        tensors = {key: value.contiguous() for key, value in head.state_dict().items()}
        save_file(tensors, beside / "head.safetensors")


def load_head(folder: Path | str, *, towers: str) -> FusionHead:
    """Load a head, ready to fuse.

    Args:
        folder: what `save_head` wrote.
        towers: fingerprint of the bundle it is to be used with.

    Raises:
        ValueError: there is no head, it is damaged, or it was trained on other towers.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "head.json").read_text())
        head = fusion_head(description["name"])(**description["widths"], **description["options"])
        head.load_state_dict(load_file(folder / "head.safetensors"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no fusion head: it has no {error.filename}") from error
    except (KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{folder} is a damaged fusion head: {first}") from error
    if description["towers"] != towers:
        raise ValueError(
            f"{folder} was trained on other towers (fingerprint {description['towers'][:12]}, "
            f"these are {towers[:12]}): train it again with `align fuse`"
        )
    return head.eval()


def head_fingerprint(folder: Path | str) -> str:
    """What names a head: a SHA-256 over its description and its weights.

    Raises:
        ValueError: there is no head.
    """
    digest = hashlib.sha256()
    for name in ("head.json", "head.safetensors"):
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"{folder} is no fusion head: it has no {name}")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
