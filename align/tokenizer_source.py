"""Where a tokenizer comes from: a folder, or the hub; never code, never an empty vocabulary."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of whatever client the hub uses
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerFast

from align.folders import damage

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("config.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
)
"""What is fetched of a model on the hub for its tokenizer."""
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")
_PATIENCE = 10.0
"""Seconds that the hub has to answer; its own client would go on trying for most of a minute."""


def read_backend(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a folder in Hugging Face's format, or of the hub by its id.

    What the hub's cache holds is used unasked; otherwise the hub is asked, once.

    Raises:
        ValueError: there is none, it is no fast one, or it would run code of others.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"the tokenizer {name} is a file; name the folder that holds it")
    if not folder.is_dir():
        folder = _from_hub(name)
    if not _has_vocabulary(folder):
        raise ValueError(f"the tokenizer {name} has no vocabulary: there is no tokenizer.json")
    if asking := _asks_for_code(folder):
        raise ValueError(
            f"the tokenizer {name} runs code of others (auto_map in its {asking}), which is refused"
        )
    from transformers import AutoTokenizer  # a third of a second that bundles do without

    whole = (folder / "tokenizer.json").is_file()
    backend: Any = None
    try:
        backend = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # each of its hundred classes fails in a way of its own
        # Only some need sentencepiece to be what their tokenizer.json is without it.
        if not (whole and isinstance(error, ImportError)):
            raise ValueError(
                f"no tokenizer could be read from {name}: "
                + ("" if whole else "it has no tokenizer.json, and what it has does not do: ")
                + (damage(error) or type(error).__name__)
            ) from error
    if backend is not None and backend.is_fast:
        return backend
    if whole:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    raise ValueError(
        f"the tokenizer {name} ({type(backend).__name__}) is written in Python; only those with a "
        "tokenizer.json can be kept with a model"
    )


def tokenizer_of(tower: str, options: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """The tokenizer that the weights of a text tower were trained with.

    Args:
        tower: prefixed name, as `align.encoders` takes it.
        options: of the tower; `pretrained` says whether it has published weights.

    Returns:
        What `Tokenizer.load` takes as name and as `clean`; None for a tower from scratch.

    Raises:
        ValueError: OpenCLIP knows no such model.
    """
    library, _, name = tower.partition(":")
    if library == "local":
        return _of_folder(Path(name))
    if not options.get("pretrained"):
        return None
    return _of_open_clip(name) if library == "open_clip" else (name, None)


def _of_folder(folder: Path) -> tuple[str, str | None]:
    """That of a bundle of ours, or of a folder in OpenCLIP's format or Hugging Face's."""
    if (folder / "open_clip_config.json").is_file():
        return _of_open_clip(f"local-dir:{folder}")
    if not (folder / "tokenizer").is_dir():
        return str(folder), None
    told = _json(folder / "config.json").get("tokenizer") or {}
    return str(folder / "tokenizer"), told.get("clean")


def _of_open_clip(name: str) -> tuple[str, str | None]:
    from align.encoders.open_clip_source import find_source

    source = find_source(name)
    text = source.config["text_cfg"]
    hub = text.get("hf_tokenizer_name")
    clean = (text.get("tokenizer_kwargs") or {}).get("clean")
    if not hub:
        return "clip", clean
    beside = source.folder is not None and _has_vocabulary(source.folder)
    return str(source.folder) if beside else hub, clean or "whitespace"  # OpenCLIP's own default


def _json(path: Path) -> dict[str, Any]:
    """A mapping out of a file; an empty one where there is none, which its reader will tell."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _has_vocabulary(folder: Path) -> bool:
    # Without one, transformers makes an empty tokenizer, to which everything is unknown.
    return any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern))


def _asks_for_code(folder: Path) -> str | None:
    """The file that names a tokenizer class in code beside it."""
    for file in ("tokenizer_config.json", "config.json"):
        asked = _json(folder / file).get("auto_map")
        if asked and (file != "config.json" or "AutoTokenizer" in asked):
            return file
    return None


def _from_hub(name: str) -> Path:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"there is no tokenizer {name}: no such folder, and no hub id (OWNER/NAME)"
        ) from error
    try:
        cached = Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
        if _has_vocabulary(cached):
            return cached
    except OSError:
        pass  # it is not in the cache
    try:
        HfApi().model_info(name, timeout=_PATIENCE)
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"there is no folder {name}, and the hub gave no such tokenizer: {_told(error)}"
        ) from error


def _told(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"nothing of that name can be seen there ({error.response.status_code})"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to ask, and it is not in the hub's cache"
    return f"it cannot be reached ({damage(error)})"
