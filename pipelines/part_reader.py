"""Reading the samples of a table's parts: batches that begin where parts do, decoded ahead."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.batch import Batch, Decoder, Draft, Picture
from shards.captions import CaptionRule
from shards.crop import BoxFinder
from shards.damage import BadSample, Problem, Reason
from shards.decode import Limits, decode_fields
from shards.manifest import JSON_FIELD, Manifest
from shards.prefetch import ordered_map

_ANNOUNCED = 8
"""Batches whose bytes are asked for before their turn comes."""


@dataclass(frozen=True)
class Piece:
    """What became of some consecutive samples of one part.

    Attributes:
        part: number of the part.
        samples: how many they are, good and bad.
        batch: the good ones; None where there is none.
        problems: the bad ones.
        last: whether the part ends with them.
    """

    part: int
    samples: int
    batch: Batch | None
    problems: list[Problem]
    last: bool


class PartReader:
    """Reads parts one after the other; threads decode ahead, over the borders of parts.

    Args:
        manifest: the data set; part `p` is its samples from `p * rows_per_part` on.
        rows_per_part: samples of a part.
        batch_size: samples of a batch; the last one of a part may have fewer.
        image_size: side of the pictures in pixels.
        crop: finds the part of each picture that is used.
        captions: where captions stand.
        workers: threads that decode.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        rows_per_part: int,
        batch_size: int,
        image_size: int,
        crop: BoxFinder,
        captions: CaptionRule,
        workers: int,
    ) -> None:
        self.manifest = manifest
        self.rows_per_part = rows_per_part
        self.batch_size = batch_size
        self.workers = workers
        self._decoder = Decoder(manifest, Picture(image_size, crop), captions)

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-len(self.manifest) // self.rows_per_part)

    def samples(self, part: int) -> range:
        """The samples of a part."""
        start = part * self.rows_per_part
        return range(start, min(start + self.rows_per_part, len(self.manifest)))

    @contextmanager
    def pieces(self, parts: Sequence[int]) -> Iterator[Generator[Piece]]:
        """The pieces of some parts, in order; at the end of the block the threads have ended."""
        counts = [-(-len(self.samples(part)) // self.batch_size) for part in parts]
        ends = np.cumsum(counts, dtype=np.int64)
        total = int(ends[-1]) if parts else 0

        def span(number: int) -> tuple[int, range]:
            at = int(np.searchsorted(ends, number, side="right"))
            samples = self.samples(parts[at])
            start = samples.start + (number - int(ends[at]) + counts[at]) * self.batch_size
            return parts[at], range(start, min(start + self.batch_size, samples.stop))

        def announce(number: int) -> None:
            if number < total:
                _, coming = span(number)
                reader.ahead(np.arange(coming.start, coming.stop, dtype=np.int64))

        def build(number: int) -> Piece:
            announce(number + _ANNOUNCED)
            return self._piece(*span(number))

        reader = self._decoder.reader
        for number in range(1, _ANNOUNCED):
            announce(number)
        workers = min(self.workers, total)
        stream = ordered_map(build, range(total), workers=workers, ahead=workers + 1)
        try:
            yield stream
        finally:
            reader.stop()
            stream.close()
            reader.close()

    def _piece(self, part: int, span: range) -> Piece:
        ids = np.arange(span.start, span.stop, dtype=np.int64)
        draft = Draft(ids, np.zeros_like(ids), self._decoder)
        good = np.flatnonzero(~draft.is_bad)
        batch = draft.batch(good, span.stop) if len(good) else None
        return Piece(part, len(span), batch, draft.problems, span.stop == self.samples(part).stop)


class OptionalCaption(CaptionRule):
    """A rule by which a sample may do without a caption; it is an empty one then."""

    def read(
        self, members: Mapping[str, bytes], limits: Limits
    ) -> tuple[list[str], dict[str, Any]]:
        """See `CaptionRule.read`."""
        try:
            return super().read(members, limits)
        except BadSample as bad:
            if bad.reason not in (Reason.NO_CAPTION, Reason.EMPTY_CAPTION):
                raise
        data = members.get(JSON_FIELD)
        return [""], decode_fields(data, limits=limits) if data is not None else {}
