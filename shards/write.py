"""Packing: records into tar shards and a manifest, with equal bytes for equal input."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm
from webdataset.writer import TarWriter

from shards.atomic import replacing, sync_folder
from shards.damage import BadSample, Problem, Reason, TooMuchDamageError
from shards.decode import Limits, decode_caption, decode_fields, decode_image, sniff_extension
from shards.manifest import CAPTION_FIELD, JSON_FIELD, MANIFEST_FILE, SAMPLES_FILE, Manifest
from shards.order import hash64
from shards.sources import MAX_KEY, Record
from shards.tar import TarContent, read_tar

WORK_FOLDER = ".packing"
"""Where a pack grows inside its folder; what a pack that was cut off leaves behind."""

_FIT_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY}}}")
_Members = dict[str, str | bytes]


def pack(
    records: Iterable[Record],
    out: Path | str,
    *,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    limits: Limits | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Manifest:
    """Writes records as WebDataset shards with a manifest.

    Every picture is decoded once, and what cannot be used is left out and told in the manifest's
    `problems`. Time stamps, owners and the order of members are fixed, so equal records give equal
    bytes. The shards appear in `out` when all of them are whole, and the manifest last; what a pack
    that was cut off left there is cleared away.

    Args:
        records: From `shards.sources`, or any others.
        out: The folder to write; new, empty, or left by a pack that was cut off.
        samples_per_shard: Samples in each shard but the last.
        shuffle_seed: Mixes the records. A lazy sequence (a folder) is mixed by its index; any other
            iterable is held in memory for it.
        strict: Stop at the first bad record instead of leaving it out.
        overwrite: Replace a packed data set in `out`, once the new one is whole.
        limits: What a record may ask for.
        progress: Called with the records done and their number, if known, after each of them;
            without it a bar is shown on a terminal.

    Returns:
        The manifest of the new data set.

    Raises:
        ValueError: If `out` holds something else, a key repeats or is unfit, or no record is good.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder to pack into")
    out.mkdir(parents=True, exist_ok=True)
    with _sole_writer(out):
        old = _replaceable(out, overwrite=overwrite)
        work = out / WORK_FOLDER
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        total = len(records) if isinstance(records, Sequence) else None
        mixed = records if shuffle_seed is None else _shuffled(records, shuffle_seed)
        check = _Check(limits or Limits(), strict=strict)
        good = check.good(_watched(mixed, total, progress))
        manifest = Manifest.from_contents(out, _write_shards(work, good, samples_per_shard))
        if not len(manifest):
            shutil.rmtree(work)
            raise ValueError(f"no usable record for {out}{check.summary()}")
        manifest.problems = (*check.problems, *manifest.problems)
        _move_in(manifest, work, old)
    return manifest


@dataclass
class _Check:
    """Turns good records into members of a tar, and notes the others."""

    limits: Limits
    strict: bool
    problems: list[Problem] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    def good(self, records: Iterable[Record]) -> Iterator[_Members]:
        for record in records:
            if not _FIT_KEY.fullmatch(record.key):
                raise ValueError(
                    f"the key {record.key!r} is unfit: at most {MAX_KEY} letters, digits, _ and -"
                )
            if record.key in self.keys:
                raise ValueError(
                    f"the key {record.key!r} comes twice; choose a key that names each record once"
                )
            self.keys.add(record.key)
            try:
                yield self._members(record)
            except BadSample as bad:
                problem = Problem(record.origin, record.key, bad.reason, bad.detail)
                if self.strict:
                    raise TooMuchDamageError(f"{problem}; strict packing stops here") from None
                self.problems.append(problem)

    def summary(self) -> str:
        """How many records are bad, and the first of them."""
        if not self.problems:
            return ": there is none at all"
        return f": all {len(self.problems)} are bad; the first: {self.problems[0]}"

    def _members(self, record: Record) -> _Members:
        """What goes into the tar, after everything that the loader will do to it succeeded."""
        if record.fault is not None:
            raise record.fault
        decode_image(record.image, limits=self.limits)
        if record.caption is None:
            raise BadSample(Reason.NO_CAPTION, "none was given")
        caption = record.caption.encode("utf-8", "surrogateescape")
        decode_caption(caption, limits=self.limits)
        extension = sniff_extension(record.image)
        assert extension is not None, "every format that is decoded is known by its first bytes"
        members: _Members = {
            "__key__": record.key,
            extension: record.image,
            CAPTION_FIELD: caption,
        }
        if record.fields:
            text = json.dumps(record.fields, ensure_ascii=False, sort_keys=True, default=str)
            fields = text.encode("utf-8", "surrogateescape")
            decode_fields(fields, limits=self.limits)
            members[JSON_FIELD] = fields
        return members


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Holds a lock on a folder, which ends with the process, however that ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is packing into {out}; wait for it") from None
        yield
    finally:
        os.close(descriptor)


def _replaceable(out: Path, *, overwrite: bool) -> Manifest | None:
    """The packed data set that may be replaced, or None for an empty folder."""
    present = sorted(path.name for path in out.iterdir() if path.name != WORK_FOLDER)
    if not present:
        return None
    if MANIFEST_FILE not in present:
        raise ValueError(f"{out} holds {present[0]!r}; pack into a new or empty folder")
    old = Manifest.load(out)
    if not old.is_packed:
        raise ValueError(f"{out} holds shards that were not packed here; choose another folder")
    if not overwrite:
        raise ValueError(f"{out} holds a data set; choose another folder, or set overwrite")
    return old


def _move_in(manifest: Manifest, work: Path, old: Manifest | None) -> None:
    """Puts finished shards into place; from the first line on, the old data set is gone."""
    out = manifest.folder
    if old is not None:
        for name in (MANIFEST_FILE, SAMPLES_FILE, *(shard.name for shard in old.shards)):
            (out / name).unlink(missing_ok=True)
    for shard in manifest.shards:
        (work / shard.name).replace(out / shard.name)
    sync_folder(out)
    manifest.save()
    work.rmdir()


def _shuffled(records: Iterable[Record], seed: int) -> Iterator[Record]:
    kept = records if isinstance(records, Sequence) else list(records)
    for number in np.argsort(hash64(seed, np.arange(len(kept))), kind="stable").tolist():
        yield kept[number]


def _watched(
    records: Iterable[Record],
    total: int | None,
    progress: Callable[[int, int | None], None] | None,
) -> Iterator[Record]:
    if progress is None:
        # `disable=None` shows the bar on a terminal only.
        yield from tqdm(records, "packing", total, unit=" samples", disable=None)
        return
    for number, record in enumerate(records, 1):
        yield record
        progress(number, total)


def _write_shards(
    folder: Path, samples: Iterator[_Members], samples_per_shard: int
) -> Iterator[TarContent]:
    """Writes shard after shard, each whole or not at all, and yields what is in it."""
    numbers = count()
    while chunk := list(islice(samples, samples_per_shard)):
        path = folder / f"{next(numbers):06d}.tar"
        with (
            replacing(path) as stream,
            TarWriter(stream, encoder=False, mtime=0, user="", group="") as tar,
        ):
            for members in chunk:
                tar.write(members)
        content = read_tar(path)
        with path.open("rb") as stream:
            content.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        yield content
