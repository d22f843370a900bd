"""Presets: parts of a `pretrain` configuration that come with the package, by name."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pipelines.config import read_yaml

_FOLDER = Path(str(resources.files("pipelines") / "configs" / "presets"))


def presets() -> list[str]:
    """The names of all presets."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """The values of a preset, as they stand in its file.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in presets():
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(presets())}")
    return read_yaml(_FOLDER / f"{name}.yaml")


def laid_under(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values with those of a preset where nothing was given; mappings are merged key by key.

    Options belong to what `name` stands for: where the name beside them is given otherwise, those
    of the preset go.

    Example:
        >>> base = {"dim": 512, "image": {"name": "timm:resnet50", "options": {"mean": 0.5}}}
        >>> laid_under(base, {"image": {"name": "timm:resnet18"}})
        {'dim': 512, 'image': {'name': 'timm:resnet18'}}
    """
    merged = dict(base)
    if "name" in base and given.get("name", base["name"]) != base["name"]:
        merged.pop("options", None)
    for key, value in given.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = laid_under(below, value)
        merged[key] = value
    return merged
