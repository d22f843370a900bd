"""What a bundle may hold: data alone; code, pickles and ways out of its folder are refused."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align.encoders import LOOKED_UP


def _endings(*lines: str) -> frozenset[str]:
    return frozenset(f".{ending}" for line in lines for ending in line.split())


CODE = _endings(
    "py pyc pyo pyd pyw pyx ipynb so dll dylib exe com sh bash zsh bat cmd ps1 js mjs jar class",
    "wasm rb pl lua php",
)
"""Endings of files that somebody could run or import."""
PICKLES = _endings(
    "pkl pickle pck dill joblib pt pth pt2 ptl torch bin ckpt chkpt npy npz msgpack h5 hdf5 keras",
    "pb mar nemo t7 mat rds",
)
"""Endings of files that are pickles, may hold one, or are weights that no bundle has."""
ARCHIVES = _endings("zip tar tgz tbz tbz2 txz gz bz2 xz zst lz4 7z rar whl egg")
"""Endings of files that could hold any of them."""
_SIGNS = {
    b"PK\x03\x04": "an archive, as PyTorch's pickles are",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x7fELF": "a program",
    b"#!": "a script",
}
_ASKS_FOR_CODE = frozenset({"auto_map", "trust_remote_code", "custom_pipelines", "code_revision"})
_FETCHES = frozenset(
    {
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        *("pretrained_image", "pretrained_text", "pretrained_hf", "pretrained_image_path"),
        *("pretrained_text_path", "timm_model_pretrained", "use_pretrained_backbone"),
        *("hf_model_name", "hf_tokenizer_name"),
    }
)
_SKIPPED = frozenset({".git", ".cache"})
"""Folders that git and the hub's client keep for themselves; nothing of ours reads them."""


def refuse_names(names: Iterable[str], place: object) -> None:
    """Look at nothing but the names of files, as a hub lists them.

    Args:
        names: relative paths.
        place: what the message says they are in.

    Raises:
        ValueError: one of them is code, a pickle or an archive by its name.
    """
    for name in sorted(names):
        if kind := _kind(name):
            raise _refusal(place, name, kind)


def refuse_intruders(folder: Path, place: object = None) -> None:
    """Look through a folder, by names and by first bytes, before anything in it is read.

    Args:
        folder: of a bundle; in the hub's own cache its links to the cached files are fine.
        place: what the message calls it; None = the folder.

    Raises:
        ValueError: it holds code, a pickle or an archive, also under another name, a link that
            leads out of it, or something that is no file.
    """
    place = folder if place is None else place
    whole = folder.resolve()
    home = whole.parent.parent if whole.parent.name == "snapshots" else whole
    for path in _walk(whole):
        name = path.relative_to(whole).as_posix()
        target = Path(os.path.realpath(path))  # `resolve` raises where links lead round in a ring
        if path.is_symlink() and not target.is_relative_to(home):
            raise _refusal(place, name, "a link that leads out of the folder")
        if path.is_dir():
            continue
        if not path.is_file():
            raise _refusal(place, name, "no plain file")
        kind = _kind(name) or _kind(target.name) or _kind_by_content(path)
        if kind:
            raise _refusal(place, name, kind)


def refuse_calls(folder: Path, place: object = None) -> None:
    """Look through the configurations of a bundle for keys that run code of others.

    `config.json` must not name weights to fetch, either: a bundle has its own.

    Args:
        folder: of a bundle.
        place: what the message calls it; None = the folder.

    Raises:
        ValueError: there is such a key.
    """
    place = folder if place is None else place
    for name in ("config.json", "tokenizer/tokenizer_config.json", "tokenizer/config.json"):
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # whoever reads it says what is wrong with it
        if not isinstance(values, dict):
            continue
        if name == "config.json":  # where it came from is told, and never acted upon
            values = {key: value for key, value in values.items() if key != "provenance"}
            _refuse_names_of_towers(place, values.get("model"))
        for path, key in _truthy_keys(values):
            if key in _ASKS_FOR_CODE:
                raise _call(place, name, path, "runs code of others")
            if name == "config.json" and key in _FETCHES:
                raise _call(place, name, path, "fetches what it does not hold")


def _refuse_names_of_towers(place: object, model: Any) -> None:
    """A tower is built from a whole configuration, or by a name that its library itself knows."""
    for side in ("image", "text"):
        recipe = model.get(side) if isinstance(model, dict) else None
        if not isinstance(recipe, dict) or not isinstance(recipe.get("options"), dict):
            continue
        library, _, name = str(recipe.get("name")).partition(":")
        if library in LOOKED_UP:  # whole, its configuration leaves nothing to look for
            elsewhere = not isinstance(recipe["options"].get("config"), dict)
        else:
            elsewhere = library == "local" or any(sign in name for sign in ":/\\")
        if elsewhere:
            path = f"model.{side}.name"
            raise _call(
                place, "config.json", path, f"({recipe.get('name')}) reads what lies elsewhere"
            )


def data_alone(value: Any) -> Any:
    """Options of a tower without the keys that `refuse_calls` refuses, at any depth."""
    if isinstance(value, dict):
        return {
            key: data_alone(inner)
            for key, inner in value.items()
            if not (inner and key in _ASKS_FOR_CODE | _FETCHES)
        }
    return [data_alone(inner) for inner in value] if isinstance(value, list | tuple) else value


def _refusal(place: object, name: str, kind: str) -> ValueError:
    return ValueError(
        f"{place} is refused, since a bundle is data alone and it holds {name!r}, {kind}; remove "
        "that file if you trust the rest"
    )


def _call(place: object, name: str, path: str, does: str) -> ValueError:
    return ValueError(
        f"{place} is refused, since a bundle is data alone: {path} in its {name} {does}"
    )


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name not in _SKIPPED]
        folders.sort()
        yield from (Path(place, name) for name in sorted([*folders, *files]))


def _kind(name: str) -> str:
    """What a file is by its name; empty = nothing to fear."""
    endings = [one for one in Path(name.lower()).suffixes if not one[1:].isdecimal()]
    last = endings[-1] if endings else ""  # of `libx.so.1` the version is no ending
    if last in CODE:
        return "which is code"
    if last in PICKLES:
        return "which is or may hold a pickle"
    return "an archive" if last in ARCHIVES else ""


def _kind_by_content(path: Path) -> str:
    if path.suffix == ".safetensors":  # begins with a length, which may look like anything
        return ""
    with path.open("rb") as handle:
        head = handle.read(4)
    return next((kind for sign, kind in _SIGNS.items() if head.startswith(sign)), "")


def _truthy_keys(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key whose value is not empty: its whole path, and itself."""
    if isinstance(value, dict):
        for key, inner in value.items():
            here = f"{path}.{key}" if path else str(key)
            if inner:
                yield here, str(key)
            yield from _truthy_keys(inner, here)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _truthy_keys(inner, f"{path}[{number}]")
