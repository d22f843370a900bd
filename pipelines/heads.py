"""Trained fusion heads by name: those that lie in a bundle, or one in a folder of its own."""

import json
from pathlib import Path

from align.fusion import FUSION_HEADS
from align.fusion.head import FusionHead
from align.fusion.store import load_head
from pipelines.config import ConfigError

HEADS = "heads"
"""The folder of a bundle with a folder for each of its heads."""


def head_places(model: str | Path) -> dict[str, Path]:
    """The heads that lie in the folder of a bundle, by name; a model from elsewhere has none."""
    return {path.parent.name: path.parent for path in sorted(Path(model).glob("heads/*/head.json"))}


def heads_of(model: str | Path, *, towers: str) -> dict[str, FusionHead]:
    """Load all heads that lie in a bundle.

    A bundle is data: a head of it that names a class of another package is left out; who trusts
    that package names the head's folder.

    Args:
        model: folder of the bundle.
        towers: its fingerprint.

    Raises:
        ValueError: a head is damaged, or was trained on other towers.
    """
    return {
        name: load_head(place, towers=towers)
        for name, place in head_places(model).items()
        if _is_built_in(place)
    }


def find_head(name: str, model: str | Path, *, towers: str) -> FusionHead:
    """Load a head by its name in the bundle, or by its folder.

    Args:
        name: of a head, or its folder.
        model: folder of the bundle.
        towers: its fingerprint.

    Raises:
        ConfigError: there is no such head; those of the bundle are listed.
        ValueError: it is damaged, or was trained on other towers.
    """
    known = head_places(model)
    if name in known and _is_built_in(known[name]):
        return load_head(known[name], towers=towers)
    if Path(name).is_dir():
        return load_head(name, towers=towers)
    raise ConfigError(
        f"head: {name!r} is no folder of a fusion head, nor one of the heads of {model} (known: "
        f"{', '.join(known) or 'none there; train some with align fuse'})"
    )


def _is_built_in(place: Path) -> bool:
    try:
        return json.loads((place / "head.json").read_text()).get("name") in FUSION_HEADS
    except (OSError, ValueError, AttributeError):
        return True  # `load_head` says what is wrong with it
