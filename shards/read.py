"""The bytes of samples, by the offsets of the manifest."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from shards.damage import BadSample, Reason
from shards.manifest import Manifest

# Members further apart than this are read one by one instead of in one sweep.
_SWEEP_GAP = 1 << 16


class ShardReader:
    """Reads members of samples; safe to share between threads.

    Readers of one manifest share its storages: stopping or closing one ends the reads of the others
    that are under way, too.

    Args:
        manifest: The data set.
        max_bytes: Size of a member above which it is not read.
    """

    def __init__(self, manifest: Manifest, *, max_bytes: int = 64 << 20) -> None:
        self.manifest = manifest
        self._max_bytes = max_bytes
        self._is_stopped = False
        for number, storage in enumerate(manifest.storages):
            shards = (shard for shard in manifest.shards if shard.source == number)
            storage.expect({shard.name: (shard.bytes, shard.sha256) for shard in shards})

    def read(self, sample: int, fields: Sequence[str]) -> dict[str, bytes]:
        """The bytes of some fields of a sample; those it does not have are left out.

        Args:
            sample: Sample id.
            fields: Names of fields.

        Raises:
            BadSample: If a member is too large, or the shard is gone, too short or unreadable.
        """
        if self._is_stopped:
            raise BadSample(Reason.UNREADABLE, "reading was stopped")
        spans: dict[str, tuple[int, int]] = {}
        for name in fields:
            if name in self.manifest.spans:
                offsets, sizes = self.manifest.spans[name]
                if sizes[sample] > self._max_bytes:
                    raise BadSample(Reason.TOO_MANY_BYTES, f"{name} has {sizes[sample]} bytes")
                if offsets[sample] >= 0:
                    spans[name] = (int(offsets[sample]), int(sizes[sample]))
        if not spans:
            return {}
        shard = self.manifest.shards[int(self.manifest.shard_numbers[sample])]
        storage = self.manifest.storages[shard.source]
        first = min(offset for offset, _ in spans.values())
        last = max(offset + size for offset, size in spans.values())
        if last - first <= sum(size for _, size in spans.values()) + _SWEEP_GAP:
            sweep = storage.read(shard.name, first, last - first)
            return {
                name: sweep[offset - first : offset - first + size]
                for name, (offset, size) in spans.items()
            }
        return {name: storage.read(shard.name, *span) for name, span in spans.items()}

    def ahead(self, samples: Int64[ndarray, " n"], fields: Sequence[str] = ()) -> None:
        """Tells the storages that these samples will be read soon; returns at once.

        Args:
            samples: Sample ids, in any order.
            fields: Names of the fields that will be read; all of them unless stated.
        """
        if self._is_stopped:
            return
        ids = np.sort(samples)
        first = np.full(len(ids), np.iinfo(np.int64).max)
        last = np.full(len(ids), -1, np.int64)
        for name in fields or self.manifest.fields:
            if name in self.manifest.spans:
                offsets, sizes = (column[ids] for column in self.manifest.spans[name])
                here = (offsets >= 0) & (sizes <= self._max_bytes)
                first[here] = np.minimum(first[here], offsets[here])
                last[here] = np.maximum(last[here], (offsets + sizes)[here])
        read = last >= 0
        numbers, first, last = self.manifest.shard_numbers[ids][read], first[read], last[read]
        if not len(numbers):
            return
        # Spans that touch, or nearly, are one: a new run starts where the shard or a gap does.
        by_place = np.lexsort((first, numbers))
        numbers, first, last = numbers[by_place], first[by_place], last[by_place]
        leap = (np.diff(numbers) != 0) | (first[1:] - last[:-1] > _SWEEP_GAP)
        starts = np.flatnonzero(np.concatenate([[True], leap]))
        ends = np.maximum.reduceat(last, starts)
        for number, start, end in zip(numbers[starts], first[starts], ends, strict=True):
            shard = self.manifest.shards[int(number)]
            storage = self.manifest.storages[shard.source]
            storage.ahead(shard.name, int(start), int(end - start))

    def stop(self) -> None:
        """Makes reads under way and all later ones fail at once, until `close`.

        For who wants to end threads that read, and not wait for a server that does not answer.
        """
        self._is_stopped = True
        for storage in self.manifest.storages:
            storage.close()

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        self._is_stopped = False
        for storage in self.manifest.storages:
            storage.close()
