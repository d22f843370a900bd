"""Folders that are written whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

UNFINISHED = ".writing"
"""How the name of a folder ends while it is being written."""


@contextmanager
def whole_folder(target: Path | str) -> Iterator[Path]:
    """Write a folder beside its target, flush it to disk, then put it in place by renaming.

    Whatever happens in between (an exception, a full disk, kill -9), the target is either what it
    was before or the new whole; an unfinished folder ends in `.writing` and is removed by the next
    call for the same target. A kill in the instant between the two renames of a replacement leaves
    the old folder under the name `.previous`; the next call puts it back first.
    """
    target = Path(target)
    beside = target.with_name(target.name + UNFINISHED)
    previous = target.with_name(target.name + ".previous")
    _put_back(previous, target)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in [*beside.rglob("*"), beside]:
            flush(path)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        beside.rename(target)
    except BaseException as error:
        _put_back(previous, target)
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, SafetensorError):  # it hides a full disk behind a name of its own
            raise OSError(
                errno.EIO, f"could not be written: {damage(error)}", str(target)
            ) from error
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
        raise
    flush(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _put_back(previous: Path, target: Path) -> None:
    if previous.exists() and not target.exists():
        previous.rename(target)


def identity(folder: Path, names: Iterable[str]) -> list[tuple[int, ...]]:
    """What changes when a file of a folder is replaced or written to; empty where one is missing.

    A folder that is read file by file while `whole_folder` replaces it would be read as a mixture:
    whoever reads one compares what this says before and after.
    """
    try:
        found = [(folder / name).stat() for name in names]
    except OSError:
        return []
    return [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found]


def json_object(folder: Path, name: str) -> dict[str, Any]:
    """The keys and values in a JSON file of a folder.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"its {name} is nested too deeply to be read") from error
    except ValueError as error:
        raise ValueError(f"its {name} is no JSON: {damage(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"its {name} holds {repr(values)[:40]}, and no keys with values")
    return values


def damage(error: Exception) -> str:
    """What is wrong with a folder, in one line, out of an error met while reading it.

    The first line of a mismatch of weights says only that there is one; the second says which.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return (said or repr(error))[:300]


def flush(path: Path) -> None:
    """Have what was written to a file, or which files are in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
