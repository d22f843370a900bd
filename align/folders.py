"""Folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".writing"
"""How the name of a folder ends while it is being written."""


@contextmanager
def whole_folder(target: Path | str) -> Iterator[Path]:
    """Write a folder beside its target, flush it to disk, then put it in place by renaming.

    Whatever happens in between (an exception, a full disk, kill -9), the target is either what it
    was before or the new whole; an unfinished folder ends in `.writing` and is removed by the next
    call for the same target.
    """
    target = Path(target)
    beside = target.with_name(target.name + UNFINISHED)
    previous = target.with_name(target.name + ".previous")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for path in [*beside.rglob("*"), beside]:
        _flush(path)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    beside.rename(target)
    _flush(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
