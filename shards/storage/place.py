"""From what a user names (a path, a pattern, a URL) to the storage that reads it."""

import hashlib
import math
import os
import re
from pathlib import Path

from braceexpand import braceexpand

from shards.storage.local import LocalStorage
from shards.storage.remote import RemoteStorage
from shards.storage.storage import TAR_SUFFIXES, Reading, Storage
from shards.storage.unpack import UnpackingStorage

_MAX_NAMES = 1_000_000
_NUMBERS = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_CHAINED = re.compile(r"::\w+://")


def storage_of(place: Path | str, *, reading: Reading | None = None) -> Storage:
    """The storage that a place names: a folder, one shard, or a pattern such as `a/{0..7}.tar`.

    Args:
        place: A path, or the URL of a protocol that fsspec knows (http, https, s3, gs, ...). How
            to get there (keys, endpoints, headers) is told through the means of fsspec and of the
            protocol's library, such as `AWS_ENDPOINT_URL` or `FSSPEC_HTTPS`.
        reading: How to read it, if it is not local.

    Raises:
        ValueError: If the pattern is malformed, or the protocol is not one that can be read.
    """
    reading = reading or Reading()
    text = str(place)
    protocol = "" if isinstance(place, Path) else _protocol(text)
    if protocol in ("file", "local"):
        protocol, text = "", text.partition("://")[2]
    query = ""
    if protocol in ("http", "https"):
        text, _, query = text.partition("?")
    parent, slash, last = text.rstrip("/").rpartition("/")
    names = None
    if "{" in last or last.endswith(TAR_SUFFIXES):
        names = _names(last, place)
        text = parent or slash or "."
    if "{" in text:
        raise ValueError(f"{place}: braces may stand in the file name only; list several folders")
    if protocol:
        inner: Storage = RemoteStorage(text.rstrip("/"), names, query=query, reading=reading)
    else:
        inner = LocalStorage(Path(text), names)
    return UnpackingStorage(inner, reading=reading)


def cache_folder(storage: Storage, *, whole: bool = False) -> Path:
    """Where the files of a remote or read-only data set are kept (below `$XDG_CACHE_HOME`).

    Args:
        storage: Where its shards lie.
        whole: For all shards of the place, whichever of them were named.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    url = storage.url if storage.folder is None else str(storage.folder.resolve())
    identity = "\0".join([url, *(() if whole else storage.names or ())])
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return root / "clip-align" / "manifests" / name


def _protocol(text: str) -> str:
    """What stands before `://`; empty for a path."""
    protocol, colon, _ = text.partition("://")
    if text.startswith("pipe:") or _CHAINED.search(text):
        raise ValueError(
            f"{text}: neither commands nor chained URLs are read; name a path, or a URL of file, "
            "http, https, s3, gs or another protocol of fsspec"
        )
    return protocol if colon else ""


def _names(pattern: str, place: Path | str) -> list[str]:
    """The names that a pattern stands for, sorted."""
    if "{" not in pattern:
        return [pattern]
    counts = [abs(int(stop) - int(start)) + 1 for start, stop in _NUMBERS.findall(pattern)]
    if math.prod(counts) > _MAX_NAMES:
        raise ValueError(f"{place}: that is more than {_MAX_NAMES:,} shards")
    try:
        return sorted(set(braceexpand(pattern)))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
