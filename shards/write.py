"""Packing: records into tar shards and a manifest, with equal bytes for equal input."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm
from webdataset.writer import TarWriter

from shards.atomic import replacing
from shards.damage import BadSample, Problem, Reason, TooMuchDamageError
from shards.decode import Limits, decode_caption, decode_image, sniff_extension
from shards.manifest import CAPTION_FIELD, JSON_FIELD, MANIFEST_FILE, SAMPLES_FILE, Manifest
from shards.order import hash64
from shards.sources import Record
from shards.tar import TarContent, read_tar

MARKER_FILE = ".packing"
"""Lies in the folder from the first shard to the manifest; with it, a pack is unfinished."""


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
    `problems`. Time stamps, owners and the order of members are fixed, so the same records give the
    same bytes. Each shard appears whole; the manifest appears last. A folder in which an earlier
    pack was cut off is packed anew.

    Args:
        records: From `shards.sources`, or any others.
        out: The folder to write; new, empty, or left by an unfinished pack.
        samples_per_shard: Samples in each shard but the last.
        shuffle_seed: Mixes the records. A lazy sequence (a folder) is mixed by its index; any other
            iterable is held in memory for it.
        strict: Stop at the first bad record instead of leaving it out.
        overwrite: Replace a finished data set in `out`.
        limits: What a record may ask for.
        progress: Called with the records done and their number, if known, after each of them;
            without it a bar is shown on a terminal.

    Returns:
        The manifest of the new data set.

    Raises:
        ValueError: If `out` holds something else, keys repeat, or no record can be used.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    out = Path(out)
    _prepare(out, overwrite=overwrite)
    records = records if shuffle_seed is None else _shuffled(records, shuffle_seed)
    check = _Check(limits=limits or Limits(), strict=strict)
    good = check.good(_watched(records, progress))
    contents: list[TarContent] = []
    hashes: list[str] = []
    while chunk := list(islice(good, samples_per_shard)):
        path = out / f"{len(contents):06d}.tar"
        hashes.append(_write_shard(path, chunk))
        contents.append(read_tar(path))
    if not contents:
        first = f"; the first: {check.problems[0]}" if check.problems else ""
        raise ValueError(f"no usable record for {out}: {len(check.problems)} are bad{first}")
    manifest = Manifest.from_contents(out, contents, hashes=hashes, problems=check.problems)
    manifest.save()
    (out / MARKER_FILE).unlink()
    return manifest


@dataclass
class _Check:
    """Lets good records through and notes the others."""

    limits: Limits
    strict: bool
    problems: list[Problem] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    def good(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            if record.key in self.keys:
                raise ValueError(
                    f"the key {record.key!r} comes twice; choose a key that names each record once"
                )
            self.keys.add(record.key)
            try:
                decode_image(record.image, limits=self.limits)
                if record.caption is None:
                    raise BadSample(Reason.NO_CAPTION)
                decode_caption(record.caption.encode(), limits=self.limits)
            except BadSample as bad:
                problem = Problem(record.origin, record.key, bad.reason, bad.detail)
                if self.strict:
                    raise TooMuchDamageError(f"{problem}; strict packing stops here") from None
                self.problems.append(problem)
            else:
                yield record


def _prepare(out: Path, *, overwrite: bool) -> None:
    """Makes `out` an empty folder with a marker, or says why it cannot be one."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder to pack into")
    out.mkdir(parents=True, exist_ok=True)
    marker = out / MARKER_FILE
    present = sorted(path.name for path in out.iterdir())
    ours = [name for name in present if _is_ours(name)]
    finished = MANIFEST_FILE in present and not marker.exists()
    if foreign := [name for name in present if name not in ours]:
        raise ValueError(f"{out} holds {foreign[0]!r}; pack into a new or empty folder")
    if finished and not overwrite:
        raise ValueError(f"{out} holds a data set; choose another folder, or ask to overwrite it")
    if present and not finished and not marker.exists():
        raise ValueError(f"{out} holds {present[0]!r}; pack into a new or empty folder")
    marker.touch()
    for name in ours:
        if name != MARKER_FILE:
            (out / name).unlink()


def _is_ours(name: str) -> bool:
    if name.endswith(".partial") and name.startswith("."):
        return True
    digits = name.removesuffix(".tar")
    return name in (MARKER_FILE, MANIFEST_FILE, SAMPLES_FILE) or (
        name.endswith(".tar") and digits.isdecimal()
    )


def _shuffled(records: Iterable[Record], seed: int) -> Iterator[Record]:
    kept = records if isinstance(records, Sequence) else list(records)
    for number in np.argsort(hash64(seed, np.arange(len(kept))), kind="stable").tolist():
        yield kept[number]


def _watched(
    records: Iterable[Record], progress: Callable[[int, int | None], None] | None
) -> Iterator[Record]:
    total = len(records) if isinstance(records, Sequence) else None
    if progress is None:
        # `disable=None` shows the bar on a terminal only.
        yield from tqdm(records, "packing", total, unit=" samples", disable=None)
        return
    for number, record in enumerate(records, 1):
        yield record
        progress(number, total)


def _write_shard(path: Path, records: Sequence[Record]) -> str:
    """Writes one shard, whole or not at all; returns its SHA-256."""
    with (
        replacing(path) as stream,
        TarWriter(stream, encoder=False, mtime=0, user="", group="") as tar,
    ):
        for record in records:
            tar.write(_members(record))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _members(record: Record) -> dict[str, str | bytes]:
    members: dict[str, str | bytes] = {
        "__key__": record.key,
        sniff_extension(record.image) or record.extension: record.image,
        CAPTION_FIELD: (record.caption or "").encode(),
    }
    if record.fields:
        text = json.dumps(record.fields, ensure_ascii=False, sort_keys=True, default=str)
        members[JSON_FIELD] = text.encode()
    return members
