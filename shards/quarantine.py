"""The list of samples that were set aside: found bad, and left out of the order since then.

It is a JSON file that names, for each shard it speaks of, what identifies that shard and which of
its samples are bad. A shard that changed since makes the list void, and that is told.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from shards.damage import Problem, Reason

QUARANTINE_FILE = "quarantine.json"

_VERSION = 1


@runtime_checkable
class Identified(Protocol):
    """A shard, as far as the list knows it; see `shards.manifest.Shard`."""

    @property
    def name(self) -> str:
        """Its file."""
        ...

    @property
    def samples(self) -> int:
        """How many it holds."""
        ...

    @property
    def identity(self) -> str:
        """Changes when the shard does."""
        ...


def read_list(
    data: bytes, shards: Sequence[Identified], *, path: str
) -> tuple[np.ndarray, list[Problem]]:
    """Which samples are set aside, and why.

    Args:
        data: The file.
        shards: Those of the manifest, in order, with all their samples; the list may speak of
            others too.
        path: Where it lies, for messages.

    Returns:
        Rows of the manifest, ascending, and what is wrong with each.

    Raises:
        ValueError: If the file is damaged, or a shard is another one than it was.
    """
    first = np.cumsum([0, *(shard.samples for shard in shards)]).tolist()
    known = {shard.name: (number, shard) for number, shard in enumerate(shards)}
    found: dict[int, Problem] = {}
    try:
        content = json.loads(data)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}; this program reads {_VERSION}")
        for name, listed in content["shards"].items():
            if name not in known:
                continue
            number, shard = known[name]
            if listed["identity"] != shard.identity:
                raise LookupError
            for entry in listed["samples"]:
                if not 0 <= entry["row"] < shard.samples:
                    raise LookupError
                problem = Problem(name, entry["key"], Reason(entry["reason"]), entry["detail"])
                found[first[number] + entry["row"]] = problem
    except LookupError as error:
        if isinstance(error, KeyError):
            raise _unreadable(path, error) from None
        raise ValueError(
            f"{path} was made for other shards than lie there now; make it anew with "
            "align inspect --verify, or remove it"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from None
    rows = sorted(found)
    return np.array(rows, np.int64), [found[row] for row in rows]


def written_list(
    bad: Mapping[int, Problem], shards: Sequence[Identified], *, before: bytes | None
) -> bytes | None:
    """The file that sets these samples aside; None where nothing is left to be listed.

    Args:
        bad: What is wrong with each, by its row in the manifest.
        shards: Those of the manifest, in order, with all their samples.
        before: The file that lies there; what it says of other shards stays.
    """
    listed: dict[str, Any] = {}
    if before is not None:
        try:
            listed = dict(json.loads(before)["shards"])
        except (ValueError, KeyError, TypeError):
            listed = {}  # damaged, so it says nothing
    ends = np.cumsum([shard.samples for shard in shards])
    for shard in shards:
        listed.pop(shard.name, None)
    for row in sorted(bad):
        number = int(np.searchsorted(ends, row, side="right"))
        shard, problem = shards[number], bad[row]
        entry = listed.setdefault(shard.name, {"identity": shard.identity, "samples": []})
        entry["samples"].append(
            {
                "row": int(row - ends[number] + shard.samples),
                "key": problem.key,
                "reason": problem.reason.value,
                "detail": problem.detail,
            }
        )
    if not listed:
        return None
    return json.dumps({"version": _VERSION, "shards": listed}, indent=1).encode()


def _unreadable(path: str, error: Exception) -> ValueError:
    return ValueError(f"{path} is unreadable ({error}); remove it")
