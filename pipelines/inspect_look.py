"""A data set looked at: its samples as numbers, its copies, what it shares with another."""

import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray
from tqdm import tqdm

from eval.duplicates import (
    THUMBNAIL_SIDE,
    Prints,
    alike,
    copies_between,
    equal,
    equal_between,
    joined,
    members,
)
from shards.audit.examine import Prospect, examine
from shards.captions import CaptionRule
from shards.manifest import Manifest

KINDS = ("same file", "same pixels", "looks alike")
"""How two pictures can be copies, the strictest first."""


@dataclass(frozen=True)
class Seen:
    """A data set whose samples, or some of them, were looked at.

    Attributes:
        manifest: The data set.
        prospect: What was seen; its rows are those of `prints`.
        prints: What the pictures are known by.
        texts: Captions of the samples whose texts were asked for.
    """

    manifest: Manifest
    prospect: Prospect
    prints: Prints
    texts: list[str]

    @property
    def whole(self) -> bool:
        """Whether all samples were looked at."""
        return self.prospect.seen == len(self.manifest)

    def name(self, row: int) -> dict[str, Any]:
        """Shard, key and sample id of a row."""
        sample = int(self.prospect.ids[row])
        shard = self.manifest.shards[int(self.manifest.shard_numbers[sample])].name
        return {"shard": shard, "key": self.manifest.keys[sample].as_py(), "sample": sample}


def look(
    manifest: Manifest,
    samples: Int64[ndarray, " n"],
    *,
    texts_of: Int64[ndarray, " m"],
    scratch: Path,
    workers: int = 0,
    captions: CaptionRule | None = None,
) -> Seen:
    """Decodes samples and keeps what little is needed of each; shows a bar on a terminal.

    Args:
        manifest: The data set.
        samples: Sample ids, at least one.
        texts_of: Samples whose captions are kept in words.
        scratch: A folder for thumbnails, 768 bytes a sample, gone with the process.
        workers: Decoding threads.
        captions: Where captions stand.
    """
    count = len(samples)
    wanted = set(texts_of.tolist())
    prospect, texts = Prospect(count), []
    hashes, flat = np.zeros(count, np.uint64), np.ones(count, bool)
    with tempfile.TemporaryFile(dir=scratch) as file:
        shape = (count, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
        # A mapped page that finds no room ends the process; room that was taken does not.
        os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        thumbnails = np.memmap(file, np.uint8, "w+", shape=shape)
    chunks = examine(manifest, samples, workers=workers, captions=captions)
    with tqdm(desc="reading", total=count, unit=" samples", disable=None) as bar:
        for chunk in chunks:
            first = prospect.seen
            for sample, sight in chunk:
                prospect.add(sample, sight)
                texts += sight.captions if sample in wanted else ()
            sketches = [sight.sketch for _, sight in chunk if sight.sketch is not None]
            if sketches:
                rows = first + np.flatnonzero(prospect.has_picture[first : prospect.seen])
                prints = Prints.of(np.stack(sketches))
                hashes[rows], flat[rows] = prints.hashes, prints.flat
                thumbnails[rows] = prints.thumbnails
            bar.update(len(chunk))
    return Seen(manifest, prospect, Prints(hashes, thumbnails, flat), texts)


@dataclass(frozen=True)
class Copies:
    """Pictures that a data set holds more than once.

    Attributes:
        looked_at: Pictures that were compared.
        flat: Pictures of nearly one colour, which are compared byte for byte only.
        superfluous: By kind, how many pictures could go without losing one that differs; each kind
            includes the stricter ones.
        groups: Kind and rows of each group, the largest first.
    """

    looked_at: int
    flat: int
    superfluous: Mapping[str, int]
    groups: Sequence[tuple[str, Int64[ndarray, " _"]]]

    def summary(self) -> dict[str, Any]:
        """The counts, for JSON."""
        return {
            "looked_at": self.looked_at,
            "flat": self.flat,
            "superfluous": dict(self.superfluous),
            "groups": len(self.groups),
            "groups_by_kind": dict(Counter(kind for kind, _ in self.groups)),
        }


def find_copies(seen: Seen, *, distance: int, likeness: float) -> Copies:
    """Groups of pictures that are copies of one another.

    Args:
        seen: The data set.
        distance: Bits in which perceptual hashes may differ.
        likeness: Correlation that thumbnails must have.
    """
    prospect = seen.prospect
    there = prospect.has_picture
    files = equal(prospect.file_digests, there)
    pixels = equal(prospect.pixel_digests, there)
    everything = np.arange(len(pixels))
    pixels = joined(files, everything, pixels)
    near = alike(seen.prints, distance=distance, least=likeness, same=pixels)
    by_kind = dict(zip(KINDS, (files, pixels, near), strict=True))
    groups: list[tuple[str, ndarray]] = []
    for rows in members(near):
        strictest = next(k for k in KINDS if len(np.unique(by_kind[k][rows])) == 1)
        groups.append((strictest, rows))
    return Copies(
        looked_at=int(there.sum()),
        flat=int((there & seen.prints.flat).sum()),
        superfluous={k: len(rows) - len(np.unique(rows)) for k, rows in by_kind.items()},
        groups=groups,
    )


@dataclass(frozen=True)
class Overlap:
    """What two data sets share.

    Attributes:
        pictures: Pictures of the first that were compared.
        pairs: Kind, row of the first, row of the second; one for each picture of the first that has
            a copy, of the strictest kind.
        captions: Rows of the first one of whose captions the second has too, case and white space
            apart.
        captioned: Rows of the first that have a caption.
    """

    pictures: int
    pairs: Sequence[tuple[str, int, int]]
    captions: Int64[ndarray, " c"]
    captioned: int

    def summary(self) -> dict[str, Any]:
        """The counts and shares, for JSON."""
        copied = {row for _, row, _ in self.pairs}
        both = copied.intersection(self.captions.tolist())
        return {
            "pictures": self.pictures,
            "copied": len(copied),
            "share": len(copied) / max(self.pictures, 1),
            "by_kind": {k: sum(kind == k for kind, _, _ in self.pairs) for k in KINDS},
            "captioned": self.captioned,
            "same_caption": len(self.captions),
            "same_caption_share": len(self.captions) / max(self.captioned, 1),
            "copied_with_the_caption": len(both),
        }


def find_overlap(seen: Seen, other: Seen, *, distance: int, likeness: float) -> Overlap:
    """Pictures and captions of one data set that another holds too.

    Args:
        seen: The one, such as a test set.
        other: The other, such as what was trained on.
        distance: Bits in which perceptual hashes may differ.
        likeness: Correlation that thumbnails must have.
    """
    mine = np.flatnonzero(seen.prospect.has_picture)
    theirs = np.flatnonzero(other.prospect.has_picture)

    def same(name: str) -> ndarray:
        one, two = getattr(seen.prospect, name)[mine], getattr(other.prospect, name)[theirs]
        pairs = equal_between(one, two)
        return np.stack([mine[pairs[:, 0]], theirs[pairs[:, 1]]], axis=1)

    near = copies_between(seen.prints, other.prints, distance=distance, least=likeness)
    found: dict[int, tuple[str, int, int]] = {}
    kinds = zip(KINDS, (same("file_digests"), same("pixel_digests"), near), strict=True)
    for kind, pairs in kinds:
        for row, copy in pairs.tolist():
            found.setdefault(row, (kind, row, copy))
    digests = seen.prospect.caption_digests
    shared = equal_between(digests, other.prospect.caption_digests)[:, 0]
    rows = seen.prospect.caption_rows
    return Overlap(
        pictures=len(mine),
        pairs=[found[row] for row in sorted(found)],
        captions=np.unique(rows[shared]),
        captioned=len(np.unique(rows)),
    )
