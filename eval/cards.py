"""Cards: the JSON file of a folder that says what the folder holds, with a version."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")


def read_card(
    path: Path, *, version: int, kind: str, again: str, read: Callable[[dict[str, Any]], T]
) -> T:
    """Read a card.

    Args:
        path: The JSON file.
        version: The only version that is read.
        kind: What the folder should be, with its article: `an embedding table`.
        again: What to do where the file is damaged: `embed again`.
        read: Makes the result of the values without their version.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: not {kind} (no {path.name} in it)")
    try:
        value = json.loads(path.read_bytes())
        found = value.pop("version")
        if found != version:
            raise ValueError(f"version {found}, but this release reads {version}")
        return read(value)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({error}); {again}") from error


def write_card(path: Path, version: int, values: dict[str, Any]) -> None:
    """Write a card whole."""
    text = json.dumps({"version": version, **values}, indent=1)
    write_whole(path, lambda file: file.write(text.encode()))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> str:
    """Write a file beside its place, flush it to disk, rename it; return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    digest = file_sha256(beside)
    beside.replace(path)
    return digest
