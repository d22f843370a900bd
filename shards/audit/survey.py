"""What can be said of a data set without decoding it: counts, sizes, damage, disagreements.

Everything here comes from the manifest (one walk over the headers, made once) and from the small
files that tools leave beside shards. What is inside the samples is `shards.audit.examine`'s.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.catalog import MANIFEST_FILE
from shards.damage import BadSample, Problem
from shards.manifest import CAPTION_FIELD, JSON_FIELD, Manifest
from shards.storage import Storage

_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Spread:
    """How numbers are spread: the ends, the middle, and where all but a twentieth at each end lie.

    Attributes:
        count: How many numbers there are; with none, all else is 0.
    """

    count: int
    mean: float
    least: float
    low: float
    median: float
    high: float
    most: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """The spread of some numbers."""
        if not len(values):
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        least, low, median, high, most = np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist()
        return cls(len(values), float(values.mean()), least, low, median, high, most)


@dataclass(frozen=True)
class Mismatch:
    """Two places that should agree and do not: what `file` says, and what there is."""

    file: str
    says: str
    found: str

    def __str__(self) -> str:
        return f"{self.file} says {self.says}; found: {self.found}"


@dataclass(frozen=True)
class Survey:
    """What the headers tell of a data set.

    Attributes:
        place: Where it lies.
        fingerprint: Its identity, whatever was set aside.
        packed: Whether the hashes of whole shards are known.
        samples: How many there are, those set aside included.
        shards: How many there are.
        bytes: All shards together.
        fields: How many samples have each field.
        samples_per_shard: Their spread.
        image_bytes: Spread of the sizes of the encoded pictures.
        problems: Damage of the shards.
        left_out: Records that were bad when the data set was packed and never became samples.
        without_image: Samples that have no picture.
        without_text: Samples that have neither a text nor a JSON member.
        dotted_keys: Samples whose names have dots that are no extension; other readers split them
            at the first dot, which merges them.
        repeated_keys: Samples whose key another sample before them has.
    """

    place: str
    fingerprint: str
    packed: bool
    samples: int
    shards: int
    bytes: int
    fields: dict[str, int]
    samples_per_shard: Spread
    image_bytes: Spread
    problems: tuple[Problem, ...]
    left_out: tuple[Problem, ...]
    without_image: int
    without_text: int
    dotted_keys: int
    repeated_keys: int

    def as_dict(self) -> dict[str, Any]:
        """The survey as plain numbers, strings, lists and dictionaries, for JSON."""
        plain = {name: value for name, value in asdict(self).items() if "problem" not in name}
        return plain | {
            "reasons": by_reason(self.problems),
            "problems": [problem.as_dict() for problem in self.problems],
            "left_out": [problem.as_dict() for problem in self.left_out],
        }


def survey(manifest: Manifest) -> Survey:
    """What the headers tell of a data set; quick, and reads nothing.

    Args:
        manifest: Opened with `quarantine=False`, so that what was set aside counts too.
    """
    has = {name: offsets >= 0 for name, (offsets, _) in manifest.spans.items()}
    none = np.zeros(len(manifest), bool)
    texts = has.get(CAPTION_FIELD, none) | has.get(JSON_FIELD, none)
    return Survey(
        place=manifest.place,
        fingerprint=manifest.fingerprint,
        packed=manifest.is_packed,
        samples=len(manifest),
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        fields={name: int(there.sum()) for name, there in has.items()},
        samples_per_shard=Spread.of(np.array([shard.samples for shard in manifest.shards])),
        image_bytes=Spread.of(image_bytes(manifest)[manifest.image_choice >= 0]),
        # Shards that were packed here had no damage then; their problems are those of the source.
        problems=() if manifest.is_packed else manifest.problems,
        left_out=manifest.problems if manifest.is_packed else (),
        without_image=int((manifest.image_choice < 0).sum()),
        without_text=int((~texts).sum()),
        dotted_keys=_dotted(manifest.keys),
        repeated_keys=len(manifest) - pc.call_function("count_distinct", [manifest.keys]).as_py(),
    )


def image_bytes(manifest: Manifest) -> np.ndarray:
    """Size of each sample's encoded picture (int64); 0 where it has none."""
    sizes = np.zeros(len(manifest), np.int64)
    for number, name in enumerate(manifest.image_fields):
        chosen = manifest.image_choice == number
        sizes[chosen] = manifest.spans[name][1][chosen]
    return sizes


def by_reason(problems: Sequence[Problem]) -> dict[str, int]:
    """How many problems there are of each reason, the most frequent first."""
    return dict(Counter(problem.reason.value for problem in problems).most_common())


def mismatches(manifest: Manifest) -> list[Mismatch]:
    """Where small files beside the shards, or the shards' sizes, disagree with the manifest.

    Looked at: the sizes of the shards; the total in `manifest.json`; OpenCLIP's `sizes.json`;
    CLIP_benchmark's `nshards.txt`; img2dataset's `*_stats.json`. A shard that is gone, and one that
    the manifest does not know, are told too.

    Args:
        manifest: Opened with `quarantine=False`.
    """
    found: list[Mismatch] = []
    for number, storage in enumerate(manifest.storages):
        counts = {s.name: s.samples for s in manifest.shards if s.source == number}
        found += _size_mismatches(manifest, number)
        found += _count_mismatches(storage, counts)
    return found


def changed_shards(
    manifest: Manifest, *, progress: Callable[[int], object] | None = None
) -> list[Mismatch]:
    """Shards whose SHA-256 is no longer that of the manifest; reads every byte.

    Shards of which only the headers were read when the manifest was made cannot be checked.

    Args:
        manifest: The data set.
        progress: Called with each number of bytes read.
    """
    found: list[Mismatch] = []
    for shard in manifest.shards:
        if not shard.sha256:
            continue
        digest = hashlib.sha256()
        try:
            with manifest.storages[shard.source].open(shard.name) as stream:
                while block := stream.read(_HASH_BLOCK):
                    digest.update(block)
                    if progress is not None:
                        progress(len(block))
        except (OSError, BadSample) as error:
            says = f"{MANIFEST_FILE}: {shard.name}"
            found.append(Mismatch(says, f"SHA-256 {shard.sha256[:12]}", f"unreadable ({error})"))
            continue
        if digest.hexdigest() != shard.sha256:
            now = f"{digest.hexdigest()[:12]}: it was changed since it was packed"
            says = f"SHA-256 {shard.sha256[:12]}"
            found.append(Mismatch(f"{MANIFEST_FILE}: {shard.name}", says, now))
    return found


def _dotted(keys: pa.LargeStringArray) -> int:
    bases = pc.call_function(
        "replace_substring_regex", [keys], pc.ReplaceSubstringOptions(r".*/", "")
    )
    dotted = pc.call_function("match_substring", [bases], pc.MatchSubstringOptions("."))
    return pc.call_function("sum", [dotted]).as_py() or 0


def _size_mismatches(manifest: Manifest, number: int) -> Iterator[Mismatch]:
    shards = {shard.name: shard.bytes for shard in manifest.shards if shard.source == number}
    try:
        present = dict(manifest.storages[number].tars())
    except (OSError, ValueError) as error:
        yield Mismatch(MANIFEST_FILE, f"{len(shards)} shards", str(error))
        return
    for name, size in shards.items():
        if name not in present:
            yield Mismatch(f"{MANIFEST_FILE}: {name}", f"{size} bytes", "no such file")
        elif present[name] != size:
            yield Mismatch(f"{MANIFEST_FILE}: {name}", f"{size} bytes", f"{present[name]} bytes")
    for name in sorted(present.keys() - shards.keys()):
        yield Mismatch(MANIFEST_FILE, f"nothing of {name}", f"{present[name]} bytes")


@dataclass
class _Sidecars:
    """The small files beside the shards of one storage, read as JSON."""

    storage: Storage
    found: list[Mismatch] = field(default_factory=list)

    def read(self, name: str) -> Any:
        """What a file holds, or None; one that cannot be read is a mismatch of its own."""
        try:
            data = self.storage.small_file(name)
            return None if data is None else json.loads(data)
        except (OSError, ValueError, RecursionError, BadSample) as error:
            self.tell(name, "something", f"not readable ({error})")
            return None

    def tell(self, file: str, says: str, found: str) -> None:
        self.found.append(Mismatch(file, says, found))


def _count_mismatches(storage: Storage, counts: dict[str, int]) -> list[Mismatch]:
    beside = _Sidecars(storage)
    everything = storage.names is None
    sizes = beside.read("sizes.json")
    for name, said in sizes.items() if isinstance(sizes, dict) else ():
        if name in counts and said != counts[name]:
            beside.tell(f"sizes.json: {name}", f"{said} samples", f"{counts[name]}")
        elif name not in counts and everything:
            beside.tell(f"sizes.json: {name}", f"{said} samples", "no such shard")
    if isinstance(sizes, dict):
        for name in sorted(counts.keys() - sizes.keys()):
            beside.tell("sizes.json", f"nothing of {name}", f"{counts[name]} samples")
    number = beside.read("nshards.txt")
    if everything and isinstance(number, int) and number != len(counts):
        beside.tell("nshards.txt", f"{number} shards", f"{len(counts)}")
    manifest = beside.read(MANIFEST_FILE)
    total = manifest.get("total") if isinstance(manifest, dict) else None
    if everything and isinstance(total, int) and total != sum(counts.values()):
        beside.tell(MANIFEST_FILE, f"{total} samples", f"{sum(counts.values())}")
    for name, samples in counts.items():
        stats = f"{PurePosixPath(name).stem}_stats.json"
        values = beside.read(stats)
        said = values.get("successes") if isinstance(values, dict) else None
        if isinstance(said, int) and said != samples:
            beside.tell(stats, f"{said} successes", f"{samples} samples in {name}")
        if values is None and storage.folder is None:
            break  # asking a server for a file per shard is worth it only where there are some
    return beside.found
