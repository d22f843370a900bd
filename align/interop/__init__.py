"""Models of others in, ours out: OpenCLIP, Hugging Face, ONNX; the same logits on both sides.

    >>> import align
    >>> model = align.load("open_clip:ViT-B-32@laion2b_s34b_b79k")   # or hf:OWNER/NAME, or a folder
    >>> align.export(model, "out", to="onnx")                        # or hf, open_clip

Naming a format costs nothing: its module is imported when it is read or written.
"""

import json
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.model import DualEncoder

EXPORTS = {
    "open_clip": "align.interop.open_clip:write_open_clip",
    "hf": "align.interop.huggingface:write_huggingface",
    "onnx": "align.interop.onnx:write_onnx",
}
"""What writes a model for another library: `function(model, folder)`."""
READERS = {
    "open_clip": "align.interop.open_clip:read_open_clip",
    "hf": "align.interop.huggingface:read_huggingface",
}
"""What reads a model of another library: `function(source)`; its keys are prefixes of sources."""


def export(
    model: "DualEncoder | Path | str", folder: Path | str, *, to: str, overwrite: bool = False
) -> None:
    """Write a model so that another library opens it, with equal logits; whole or not at all.

    Args:
        model: ours, or what `align.load` takes.
        folder: made.
        to: one of `EXPORTS`.
        overwrite: replace a model, of whatever format, that the folder holds.

    Raises:
        ValueError: an unknown format, a model that cannot be said in it, a folder in use, or a
            library that is not installed.
    """
    if to not in EXPORTS:
        raise ValueError(f"unknown format {to!r}; known: {', '.join(EXPORTS)}")
    refuse_to_replace(folder, overwrite=overwrite)
    if isinstance(model, Path | str):
        if Path(model).resolve() == Path(folder).resolve():
            raise ValueError(f"{folder}: a model cannot be exported over itself")
        from align.bundle import load

        model = load(model)
    resolve_name(EXPORTS[to])(model, folder)


def read_foreign(source: Path | str) -> "DualEncoder":
    """A model of another library as one of ours, with equal logits, ready to encode.

    Args:
        source: `open_clip:NAME@TAG` (a tag of `open_clip.list_pretrained()`), `hf:OWNER/NAME`, or
            a folder in OpenCLIP's or Hugging Face's format, with or without its prefix.

    Raises:
        ValueError: none of these, or a model that cannot be read.
    """
    kind = format_of(source)
    if kind in READERS:
        return resolve_name(READERS[kind])(str(source).removeprefix(f"{kind}:")).eval()
    if kind == "onnx":
        raise ValueError(
            f"{source} was exported to ONNX, which is not read; load what it came from"
        )
    if kind == "bundle":
        raise ValueError(f"{source} is a bundle already: align.load reads it")
    what = "holds no model that is known" if Path(source).is_dir() else "there is no such folder"
    raise ValueError(
        f"{source}: {what}; name open_clip:NAME@TAG, hf:OWNER/NAME, or a folder in OpenCLIP's or "
        "Hugging Face's format"
    )


def is_foreign(source: Path | str) -> bool:
    """Whether `read_foreign`, and not a bundle's reader, is the one to ask."""
    return format_of(source) not in (None, "bundle")


def format_of(source: Path | str) -> str | None:
    """The format of a model by its prefix, or by what its folder holds.

    Returns:
        A key of `EXPORTS`, or `bundle`; None for what is none of them, or not here.
    """
    prefix, colon, _ = str(source).partition(":")
    if colon and prefix in READERS and not isinstance(source, Path):
        return prefix
    folder = Path(source)
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    config = _json(folder / "config.json")
    if config.get("format") == "onnx":
        return "onnx"
    if "format" in config and "model" in config:
        return "bundle"
    return "hf" if "model_type" in config else None


def refuse_to_replace(folder: Path | str, *, overwrite: bool) -> None:
    """See that a model may be written to a folder.

    Args:
        folder: free where it is not there, or empty.
        overwrite: it may hold a model too, but nothing else.

    Raises:
        ValueError: it holds something.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if format_of(folder) is None:
        raise ValueError(f"{folder} holds something other than a model; choose another folder")
    if not overwrite:
        raise ValueError(f"{folder} holds a model; choose another folder, or set overwrite")


def _json(path: Path) -> dict[str, Any]:
    """A mapping out of a file; an empty one where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
