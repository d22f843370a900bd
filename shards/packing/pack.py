"""Packing: records into tar shards and a manifest, with equal bytes for equal input."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from shards.catalog import MANIFEST_FILE, SAMPLES_FILE
from shards.damage import Problem
from shards.decode import Limits
from shards.manifest import Manifest
from shards.order import hash64
from shards.packing.assemble import Rules, ShardWriter, WrittenShard, too_strict
from shards.packing.recode import Recode
from shards.packing.sidecars import SIDECARS, PackedShard, check_names
from shards.packing.work import WorkFolder
from shards.sources import Record
from shards.tar import TarContent

# Changes where shards made of the same records would differ, so that no old ones are gone on with.
_RECIPE = 1


def pack(
    records: Iterable[Record],
    out: Path | str,
    *,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = None,
    recoding: Recode | None = None,
    sidecars: Sequence[str] = (),
    strict: bool = False,
    overwrite: bool = False,
    limits: Limits | None = None,
    workers: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Manifest:
    """Writes records as WebDataset shards with a manifest.

    Every picture is decoded once, and what cannot be used is left out and told in the manifest's
    `problems`. Shard `k` holds the good ones of records `k * samples_per_shard` and following, so
    shards do not depend on each other. Time stamps, owners and the order of members are fixed, so
    equal records give equal bytes, whatever the number of workers. The shards appear in `out` when
    all of them are whole, and the manifest last. A pack that was cut off goes on with the shards
    that it had finished, if the records are a `Source` and nothing has changed.

    Args:
        records: From `shards.sources`, or any others.
        out: The folder to write; new, empty, or left by a pack that was cut off.
        samples_per_shard: Records of each shard but the last.
        shuffle_seed: Mixes the records. A sequence is mixed by its index; any other iterable is
            held in memory for it.
        recoding: What becomes of pictures; they keep their bytes unless stated.
        sidecars: Names from `SIDECARS`: files for other tools, beside the shards.
        strict: Stop at the first bad record instead of leaving it out.
        overwrite: Replace a packed data set in `out`, once the new one is whole.
        limits: What a record may ask for.
        workers: Background threads, each with a shard of its own; 0 packs in this one. Records that
            are no sequence are packed in this one.
        progress: Called with the records done and their number, if known, after each of them;
            without it a bar is shown on a terminal.
        tell: Called with a line where there is something to say of a pack that was cut off.

    Returns:
        The manifest of the new data set.

    Raises:
        ValueError: If `out` holds something else, a key repeats or is unfit, or no record is good.
        OSError: If the disk is full; the finished shards stay for the next try.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    if workers < 0:
        raise ValueError(f"workers={workers} must not be negative")
    check_names(sidecars)
    out, tell = Path(out), tell or (lambda _: None)
    rules = Rules(limits or Limits(), recoding or Recode(), strict, "img2dataset" in sidecars)
    plan = _plan(records, rules, samples_per_shard, shuffle_seed)
    with WorkFolder.of(out) as work:
        if work.end_move(plan, sidecars):
            tell(f"{out}: the last step of the pack that was cut off is done")
            return Manifest.load(out)
        old = work.replaceable(overwrite=overwrite)
        kept = work.begin(plan)
        if kept is None:
            tell(f"{out}: what was begun here was another source or other options; starting anew")
        elif kept:
            every = -(-int((plan or {})["records"]) // samples_per_shard)
            tell(
                f"{out}: going on with the pack that was cut off, {kept} of {every} shards are done"
            )
        threads = workers if isinstance(records, Sequence) else 0
        with _Progress(records, progress) as done:
            writer = ShardWriter(work, rules, done.add)
            batches = _batches(records, samples_per_shard, shuffle_seed)
            packed = _Packed(list(getattr(records, "problems", ())), strict)
            try:
                with closing(writer.all(batches, threads)) as run:
                    manifest = Manifest.from_contents(out, packed.contents(run, work))
                if not len(manifest):
                    work.clear()
                    raise ValueError(f"no usable record for {out}{packed.summary()}")
                manifest.problems = (*packed.problems, *manifest.problems)
                moves = packed.beside(manifest, sidecars, work)
                work.move_in(moves, old, sidecars)
            except OSError as error:
                raise _explained(error, out, work.done()) from None
    return manifest


@dataclass
class _Packed:
    """Collects what was packed, shard by shard, and numbers the shards that are not empty."""

    problems: list[Problem]
    strict: bool
    moves: dict[str, str] = field(default_factory=dict)
    shards: list[PackedShard] = field(default_factory=list)

    def contents(self, run: Iterator[WrittenShard], work: WorkFolder) -> Iterator[TarContent]:
        """The walks over the shards, for the manifest."""
        keys = _Keys()
        if self.strict and self.problems:
            raise too_strict(self.problems[0])
        for shard in run:
            content, problems = shard.content, shard.problems
            if self.strict and problems:
                raise too_strict(problems[0])
            self.problems += problems
            keys.add([*(one.key for one in content.samples), *(bad.key for bad in problems)])
            if not content.samples:
                continue
            written, content.name = content.name, f"{len(self.shards):06d}.tar"
            content.sha256 = shard.note["sha256"]
            self.moves[written] = content.name

            def rows(number: int = shard.number) -> list[dict[str, Any]]:
                return (work.finished(number) or {})["rows"]

            self.shards.append(PackedShard.of(content, md5=shard.note["md5"], rows=rows))
            yield content

    def beside(
        self, manifest: Manifest, sidecars: Sequence[str], work: WorkFolder
    ) -> dict[str, str]:
        """Writes manifest and sidecars; returns what moves where, shards included."""
        manifest.save(work.folder)
        moves = {**self.moves, SAMPLES_FILE: SAMPLES_FILE, MANIFEST_FILE: MANIFEST_FILE}
        for name in dict.fromkeys(sidecars):
            for file, data in SIDECARS[name](self.shards):
                work.write(f"side-{file}", data)
                moves[f"side-{file}"] = file
        return moves

    def summary(self) -> str:
        """How many records are bad, and the first of them."""
        if not self.problems:
            return ": there is none at all"
        return f": all {len(self.problems)} are bad; the first: {self.problems[0]}"


class _Keys:
    """The keys that came so far, by 8 bytes of their hashes."""

    def __init__(self) -> None:
        self._known = np.zeros(0, np.uint64)

    def add(self, keys: Sequence[str]) -> None:
        """Takes in more keys.

        Raises:
            ValueError: If one of them came before.
        """
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        new = np.frombuffer(digests, np.uint64)
        # Two sorted runs: a stable sort merges them in one pass.
        known = np.sort(np.concatenate([self._known, np.sort(new)]), kind="stable")
        twice = known[1:][known[1:] == known[:-1]]
        if len(twice):
            key = keys[int(np.flatnonzero(np.isin(new, twice))[0])]
            raise ValueError(
                f"the key {key!r} comes twice; choose a key that names each record once"
            )
        self._known = known


class _Progress:
    """Counts records over all threads, and shows a bar on a terminal unless somebody else does."""

    def __init__(
        self, records: Iterable[Record], progress: Callable[[int, int | None], None] | None
    ) -> None:
        self._total = len(records) if isinstance(records, Sequence) else None
        self._progress, self._count = progress, 0
        self._lock = threading.Lock()
        # `disable=None` shows the bar on a terminal only.
        hidden = None if progress is None else True
        self._bar = tqdm(None, "packing", self._total, unit=" samples", disable=hidden)

    def add(self, records: int) -> None:
        """More records are done."""
        with self._lock:
            self._count += records
            self._bar.update(records)
            if self._progress is not None:
                self._progress(self._count, self._total)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _plan(
    records: Iterable[Record], rules: Rules, samples_per_shard: int, shuffle_seed: int | None
) -> dict[str, Any] | None:
    """All that the bytes of the shards depend on; None for records that have no identity."""
    identity = getattr(records, "identity", None)
    if identity is None or not isinstance(records, Sequence):
        return None
    return {
        "recipe": _RECIPE,
        "source": identity,
        "records": len(records),
        "samples_per_shard": samples_per_shard,
        "shuffle_seed": shuffle_seed,
        "limits": asdict(rules.limits),
        "recoding": asdict(rules.recoding),
        "rows": rules.rows,
        "pillow": PIL.__version__,
    }


def _batches(
    records: Iterable[Record], size: int, shuffle_seed: int | None
) -> Iterator[Iterable[Record]]:
    """The records of each shard; those of a sequence are not read yet."""
    if shuffle_seed is not None and not isinstance(records, Sequence):
        records = list(records)
    if not isinstance(records, Sequence):
        left = iter(records)
        for first in left:
            batch = chain([first], islice(left, size - 1))
            yield batch
        return
    order = np.arange(len(records))
    if shuffle_seed is not None:
        order = np.argsort(hash64(shuffle_seed, order), kind="stable")
    for start in range(0, len(order), size):
        yield map(records.__getitem__, order[start : start + size].tolist())


def _explained(error: OSError, out: Path, finished: int) -> OSError:
    """A full disk said in one line; any other error as it is."""
    if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
        return error
    kept = f"{finished} finished shards stay; make room and give the same command again"
    return OSError(error.errno, f"{os.strerror(error.errno)}; {kept}", str(out))
