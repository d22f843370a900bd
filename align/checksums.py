"""Checksums of the files in a folder: a disk may change a number without anyone noticing."""

import zlib
from pathlib import Path

from align.folders import json_object

CHECKSUMS = "checksums.json"
"""What holds them, by file name, in the folder of the files."""

_CHUNK = 1 << 22  # bytes


def checksum(path: Path) -> int:
    """The CRC-32 of a file's bytes (zlib's): any flipped bit changes it."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def altered(folder: Path | str, *, part: int = 0, parts: int = 1) -> str | None:
    """Which file of a folder is not as it was written, in a line; else None.

    Reads every byte of the files. One without checksums, as earlier versions wrote it, is taken
    for what it is.

    Args:
        folder: of the files.
        part: which part of the files is looked at, where several processes share them out.
        parts: how many parts there are.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS).is_file():
        return None
    try:
        for name, expected in sorted(json_object(folder, CHECKSUMS).items())[part::parts]:
            if checksum(folder / name) != expected:
                return f"{name}: its bytes have changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None
