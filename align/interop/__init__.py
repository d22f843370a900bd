"""Models of others in, ours out: OpenCLIP, Hugging Face, ONNX; the same logits on both sides.

    >>> import align
    >>> model = align.load("open_clip:ViT-B-32@laion2b_s34b_b79k")   # or hf:OWNER/NAME, or a folder
    >>> align.export(model, "out", to="onnx")                        # or hf, open_clip

Naming a format costs nothing: its module is imported when it is read or written.
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.interop.agreement import Agreement
    from align.model import DualEncoder

EXPORTS = {
    "open_clip": "align.interop.open_clip:write_open_clip",
    "hf": "align.interop.huggingface:write_huggingface",
    "onnx": "align.interop.onnx:write_onnx",
}
"""What writes a model for another library: `function(model, folder)`, which returns how far the
two agree (`align.interop.agreement.check`) before the folder is put in its place."""
READERS = {
    "open_clip": "align.interop.open_clip:read_open_clip",
    "hf": "align.interop.huggingface:read_huggingface",
}
"""What reads a model of another library: `function(source)`; its keys are prefixes of sources."""
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
FILES = {
    "bundle": (
        *("config.json", "model.safetensors", "README.md", "results.json"),
        *(f"tokenizer/{name}" for name in _TOKENIZER),
    ),
    "open_clip": (
        *("open_clip_config.json", "open_clip_model.safetensors", "README.md"),
        *("text/config.json", "image/config.json", *_TOKENIZER),
    ),
    "hf": (
        *("config.json", "model.safetensors", "model-*-of-*.safetensors", "README.md"),
        *("model.safetensors.index.json", "generation_config.json"),
        *("preprocessor_config.json", "processor_config.json", *_TOKENIZER),
    ),
    "onnx": (
        *("config.json", "image.onnx*", "text.onnx*", "README.md"),
        *(f"tokenizer/{name}" for name in _TOKENIZER),
    ),
}
"""What each format writes, as patterns of paths inside its folder; nothing else is replaced."""


def export(
    model: "DualEncoder | Path | str", folder: Path | str, *, to: str, overwrite: bool = False
) -> "Agreement | None":
    """Write a model so that another library opens it, with equal logits; whole or not at all.

    What was written is opened with that library and compared before it is put in its place.

    Args:
        model: ours, or what `align.load` takes.
        folder: made.
        to: one of `EXPORTS`.
        overwrite: replace a model of this format that the folder holds.

    Returns:
        How far the cosines of both libraries are apart; None where the one that opens the format
        is not installed.

    Raises:
        ValueError: an unknown format, a model that cannot be said in it or comes out different, a
            folder in use, or a library that is not installed.
    """
    if to not in EXPORTS:
        raise ValueError(f"unknown format {to!r}; known: {', '.join(EXPORTS)}")
    if isinstance(model, Path | str) and Path(model).resolve() == Path(folder).resolve():
        raise ValueError(f"{folder}: a model cannot be exported over itself")
    refuse_to_replace(folder, to, overwrite=overwrite)
    if isinstance(model, Path | str):
        from align.bundle import load

        model = load(model)
    return resolve_name(EXPORTS[to])(model, folder)


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


def refuse_to_replace(folder: Path | str, kind: str, *, overwrite: bool) -> None:
    """See that a model may be written to a folder: what it replaces is lost.

    Args:
        folder: free where it is not there, or empty.
        kind: the format to be written, a key of `FILES`.
        overwrite: the folder may hold a model of this format too, but no file besides.

    Raises:
        ValueError: it holds something; the line names it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    held = format_of(folder)
    if held is None:
        raise ValueError(f"{folder} holds something other than a model; choose another folder")
    if held != kind:
        names = {"bundle": "a bundle", **{name: f"a model for {name}" for name in EXPORTS}}
        raise ValueError(
            f"{folder} holds {names[held]}, which {names[kind]} does not replace; "
            "choose another folder"
        )
    if not overwrite:
        raise ValueError(f"{folder} holds a model; choose another folder, or set overwrite")
    if stranger := _stranger(folder, kind):
        raise ValueError(
            f"{folder} holds {stranger}, which is no part of the model and would be lost; "
            "move it away, or choose another folder"
        )


def _stranger(folder: Path, kind: str) -> str | None:
    """The first file in a folder that its format does not write; no link is one of its files."""
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink() or not any(fnmatchcase(place, one) for one in FILES[kind]):
            return place
    return None


def _json(path: Path) -> dict[str, Any]:
    """A mapping out of a file; an empty one where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
