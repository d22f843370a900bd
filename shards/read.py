"""The bytes of a sample, by the offsets of the manifest."""

from collections.abc import Sequence

from jaxtyping import Int64
from numpy import ndarray

from shards.damage import BadSample, Reason
from shards.manifest import Manifest

# Members further apart than this are read one by one instead of in one sweep.
_SWEEP_GAP = 1 << 16


class ShardReader:
    """Reads members of samples; safe to share between threads.

    Args:
        manifest: The data set.
        max_bytes: Size of a member above which it is not read.
    """

    def __init__(self, manifest: Manifest, *, max_bytes: int = 64 << 20) -> None:
        self.manifest = manifest
        self._max_bytes = max_bytes

    def read(self, sample: int, fields: Sequence[str]) -> dict[str, bytes]:
        """The bytes of some fields of a sample; those it does not have are left out.

        Args:
            sample: Sample id.
            fields: Names of fields.

        Raises:
            BadSample: If a member is too large, or the shard is gone, too short or unreadable.
        """
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

    def ahead(self, samples: Int64[ndarray, " n"]) -> None:
        """Tells the storage that these samples will be read soon; returns at once."""

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        for storage in self.manifest.storages:
            storage.close()
