"""A damaged data set as records that can be packed: what is good of it, under keys that are fit."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from shards.damage import BadSample
from shards.manifest import Manifest
from shards.read import ShardReader
from shards.sources import Record, ShardSource, Source, safe_key


@dataclass(frozen=True)
class Mended:
    """What had to be done to keys.

    Attributes:
        renamed: Samples whose key was unfit (dots, slashes, other signs) or taken.
        dropped: Samples that repeat an earlier one of the same key, byte for byte.
    """

    renamed: int
    dropped: int


class MendedSource(Source):
    """The samples of a data set as records, to be packed into a sound one.

    Keys become fit (`safe_key`), so that dots do not merge samples in other readers. Of samples
    that share a key, those that repeat the first byte for byte are dropped and the others get a
    number. Members that lay apart are together already, as the manifest brings them together;
    captions are normalised as the loader does it. Bad samples come with their fault, and `pack`
    leaves them out and names them.

    Args:
        manifest: The data set; opened with `quarantine=False` nothing is left out but what is bad.

    Attributes:
        mended: What had to be done.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._inner = ShardSource(manifest)
        self.problems = self._inner.problems
        self.identity = f"mended {self._inner.identity}"
        names: list[str] = manifest.keys.to_pylist()
        repeats = _repeats(manifest, names)
        self._rows = np.array([row for row in range(len(names)) if row not in repeats], np.int64)
        self._keys = _fit_keys([names[row] for row in self._rows.tolist()])
        kept = zip(self._rows.tolist(), self._keys, strict=True)
        renamed = sum(names[row] != key for row, key in kept)
        self.mended = Mended(renamed, len(repeats))

    @classmethod
    def recognises(cls, place: str) -> bool:
        """The same places as `ShardSource`."""
        return ShardSource.recognises(place)

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        """A sample, read anew, under its new key."""
        record = self._inner.record(int(self._rows[index]))
        return replace(record, key=self._keys[index])


def _fit_keys(names: list[str]) -> list[str]:
    """A fit key for each name, no two of them equal; fit names keep theirs wherever they can."""
    wanted = [safe_key(name) for name in names]
    taken = {name for name, key in zip(names, wanted, strict=True) if name == key}
    given: set[str] = set()
    keys: list[str] = []
    for name, key in zip(names, wanted, strict=True):
        if key in given or (key != name and key in taken):
            numbered = (safe_key(f"{key}-{number}") for number in count(2))
            key = next(one for one in numbered if one not in given and one not in taken)
        given.add(key)
        keys.append(key)
    return keys


def _repeats(manifest: Manifest, names: list[str]) -> set[int]:
    """The samples that repeat an earlier one: the same key, and the same bytes in every member."""
    often = {name for name, number in Counter(names).items() if number > 1}
    reader = ShardReader(manifest)
    first: dict[str, list[dict[str, bytes]]] = {}
    repeats: set[int] = set()
    for row, name in enumerate(names):
        if name not in often:
            continue
        try:
            members = reader.read(row, manifest.fields)
        except BadSample:
            continue  # it is bad by itself, which packing tells
        known = first.setdefault(name, [])
        if members in known:
            repeats.add(row)
        else:
            known.append(members)
    reader.close()
    return repeats
