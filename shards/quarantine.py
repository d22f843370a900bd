"""The list of samples that were set aside: found bad, and left out of the order since then.

It is a JSON file that names, for each shard it speaks of, what identifies that shard and which of
its samples are bad. A shard that changed since makes the list void, and that is told.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.atomic import replacing
from shards.catalog import Shard
from shards.damage import Problem, Reason
from shards.storage import Storage, cache_folder

QUARANTINE_FILE = "quarantine.json"

_VERSION = 1


def find_lists(storage: Storage) -> dict[str, bytes]:
    """The lists of a place: the one beside the shards, then the one in the user's cache."""
    _, cached = _places(storage)
    lists: dict[str, bytes] = {}
    if (data := storage.small_file(QUARANTINE_FILE)) is not None:
        lists[f"{storage.url}/{QUARANTINE_FILE}"] = data
    if cached.is_file():
        lists[str(cached)] = cached.read_bytes()
    return lists


def write_lists(
    storage: Storage, bad: Mapping[int, Problem], shards: Sequence[Shard]
) -> Path | None:
    """Sets samples aside; see `shards.manifest.Manifest.set_aside`."""
    beside, cached = _places(storage)
    if beside is not None and _write(beside, bad, shards):
        _write(cached, {}, shards)
        return beside if beside.is_file() else None
    # What lies beside them cannot be changed; the list in the cache has the last word.
    overrules = storage.small_file(QUARANTINE_FILE) is not None
    if not _write(cached, bad, shards, overrules=overrules):
        raise OSError(f"{cached} cannot be written")
    return cached if bad else None


def read_lists(
    lists: Mapping[str, bytes], shards: Sequence[Shard]
) -> tuple[np.ndarray, list[Problem]]:
    """Which samples are set aside, and why.

    Args:
        lists: The files, by where they lie; of a shard that several speak of, the last is right.
        shards: Those of the manifest, in order, with all their samples; the lists may speak of
            others too.

    Returns:
        Rows of the manifest, ascending, and what is wrong with each.

    Raises:
        ValueError: If a file is damaged, or a shard is another one than it was.
    """
    said: dict[str, dict[int, Problem]] = {}
    known = {shard.name: shard for shard in shards}
    for path, data in lists.items():
        try:
            said |= _said(data, known)
        except _OtherShardsError:
            raise ValueError(
                f"{path} was made for other shards than lie there now; make it anew with "
                "align inspect --verify, or remove it"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is unreadable ({error}); remove it") from None
    rows: list[int] = []
    problems: list[Problem] = []
    first = 0
    for shard in shards:
        for row, problem in sorted(said.get(shard.name, {}).items()):
            rows.append(first + row)
            problems.append(problem)
        first += shard.samples
    return np.array(rows, np.int64), problems


def written_list(
    bad: Mapping[int, Problem],
    shards: Sequence[Shard],
    *,
    before: bytes | None,
    overrules: bool = False,
) -> bytes | None:
    """The file that sets these samples aside; None where nothing is left to be listed.

    Args:
        bad: What is wrong with each, by its row in the manifest.
        shards: Those of the manifest, in order, with all their samples.
        before: The file that lies there; what it says of other shards stays.
        overrules: Whether to name sound shards too, as another list may say something of them.
    """
    listed: dict[str, Any] = {}
    if before is not None:
        try:
            listed = dict(json.loads(before)["shards"])
        except (ValueError, KeyError, TypeError):
            listed = {}  # damaged, so it says nothing
    rows, first = np.array(sorted(bad), np.int64), 0
    for shard in shards:
        listed.pop(shard.name, None)
        here = rows[(rows >= first) & (rows < first + shard.samples)].tolist()
        if here or overrules:
            samples = [
                {
                    "row": int(row - first),
                    "key": bad[row].key,
                    "reason": bad[row].reason.value,
                    "detail": bad[row].detail,
                }
                for row in here
            ]
            listed[shard.name] = {"identity": shard.identity, "samples": samples}
        first += shard.samples
    if not listed:
        return None
    return json.dumps({"version": _VERSION, "shards": listed}, indent=1).encode()


class _OtherShardsError(Exception):
    """A shard is not the one that the list speaks of."""


def _said(data: bytes, known: Mapping[str, Shard]) -> dict[str, dict[int, Problem]]:
    """What one list says of the shards that are known."""
    content = json.loads(data)
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']}; this program reads {_VERSION}")
    said: dict[str, dict[int, Problem]] = {}
    for name, listed in content["shards"].items():
        if name not in known:
            continue
        if listed["identity"] != known[name].identity:
            raise _OtherShardsError
        said[name] = {}
        for entry in listed["samples"]:
            if not 0 <= entry["row"] < known[name].samples:
                raise _OtherShardsError
            said[name][entry["row"]] = Problem(
                name, entry["key"], Reason(entry["reason"]), entry["detail"]
            )
    return said


def _places(storage: Storage) -> tuple[Path | None, Path]:
    """Where the lists of a place lie: beside the shards, if they are local, and in the cache."""
    beside = None if storage.folder is None else storage.folder / QUARANTINE_FILE
    return beside, cache_folder(storage, whole=True) / QUARANTINE_FILE


def _write(
    path: Path,
    bad: Mapping[int, Problem],
    shards: Sequence[Shard],
    *,
    overrules: bool = False,
) -> bool:
    """Writes a list, or removes one that says nothing any more; False where that cannot be done."""
    before = path.read_bytes() if path.is_file() else None
    content = written_list(bad, shards, before=before, overrules=overrules)
    try:
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                stream.write(content)
    except OSError:
        return False
    return True
