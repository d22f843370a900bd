"""Files beside shards that other tools look for: counts, indexes, statistics.

| name | file | who reads it |
|---|---|---|
| `sizes` | `sizes.json`: samples by shard | OpenCLIP |
| `nshards` | `nshards.txt`: number of shards | CLIP_benchmark |
| `wids` | `shardindex.json` | `wids.ShardListDataset` of webdataset |
| `energon` | `000000.tar.idx`: where samples start | Megatron-Energon |
| `img2dataset` | `000000.parquet`, `000000_stats.json` | what builds on img2dataset's output |
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.tar import TarContent

_BLOCK = 512

_COLUMNS = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class PackedShard:
    """What sidecars tell of a shard.

    Attributes:
        name: Its file name.
        bytes: Its size.
        md5: MD5 of the file.
        starts: Where the first header of each sample lies.
        end: Where the end marker begins.
        rows: Gives one row for each record, packed or bad, with the columns of img2dataset.
    """

    name: str
    bytes: int
    md5: str
    starts: np.ndarray
    end: int
    rows: Callable[[], list[dict[str, Any]]] = field(default=list)

    @classmethod
    def of(
        cls, content: TarContent, *, md5: str, rows: Callable[[], list[dict[str, Any]]]
    ) -> "PackedShard":
        """Finds starts and end in a walk over a tar that was written here.

        Args:
            content: The walk; every member has one header of one block.
            md5: MD5 of the file.
            rows: See `PackedShard`.
        """
        starts = [min(at for at, _ in one.spans.values()) - _BLOCK for one in content.samples]
        last = max(
            (at + size for one in content.samples for at, size in one.spans.values()), default=0
        )
        end = -(-last // _BLOCK) * _BLOCK
        return cls(content.name, content.bytes, md5, np.array(starts, np.uint64), end, rows)


Sidecar = Callable[[Sequence[PackedShard]], Iterator[tuple[str, bytes]]]


def _sizes(shards: Sequence[PackedShard]) -> Iterator[tuple[str, bytes]]:
    """OpenCLIP's `sizes.json`: the number of samples by the name of the shard."""
    yield "sizes.json", _json({shard.name: len(shard.starts) for shard in shards})


def _nshards(shards: Sequence[PackedShard]) -> Iterator[tuple[str, bytes]]:
    """CLIP_benchmark's `nshards.txt`."""
    yield "nshards.txt", f"{len(shards)}\n".encode()


def _wids(shards: Sequence[PackedShard]) -> Iterator[tuple[str, bytes]]:
    """The index of `wids`, version 1, as `wids-index create` writes it."""
    shard_list = [
        {
            "url": shard.name,
            "md5sum": shard.md5,
            "nsamples": len(shard.starts),
            "filesize": shard.bytes,
        }
        for shard in shards
    ]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shard_list}
    yield "shardindex.json", _json(index)


def _energon(shards: Sequence[PackedShard]) -> Iterator[tuple[str, bytes]]:
    """Energon's tar index: 64-bit offsets of the first header of each sample, then of the end."""
    for shard in shards:
        offsets = np.append(shard.starts, np.uint64(shard.end))
        yield f"{shard.name}.idx", offsets.astype("<u8").tobytes()


def _img2dataset(shards: Sequence[PackedShard]) -> Iterator[tuple[str, bytes]]:
    """img2dataset's table and statistics of each shard; times are 0, so that bytes repeat."""
    for shard in shards:
        rows, stem = shard.rows(), Path(shard.name).stem
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, _COLUMNS), sink)
        yield f"{stem}.parquet", sink.getvalue().to_pybytes()
        reasons: dict[str, int] = {}
        for row in rows:
            status = row["error_message"] or "success"
            reasons[status] = reasons.get(status, 0) + 1
        successes = reasons.get("success", 0)
        stats = {
            "count": len(rows),
            "successes": successes,
            "failed_to_download": 0,
            "failed_to_resize": len(rows) - successes,
            "duration": 0.0,
            "start_time": 0.0,
            "end_time": 0.0,
            "status_dict": reasons,
        }
        yield f"{stem}_stats.json", _json(stats)


SIDECARS: dict[str, Sidecar] = {
    "sizes": _sizes,
    "nshards": _nshards,
    "wids": _wids,
    "energon": _energon,
    "img2dataset": _img2dataset,
}
"""The sidecars by name; each makes names and contents of files."""


def check_names(names: Sequence[str]) -> None:
    """Checks that all names are known.

    Raises:
        ValueError: Naming the first that is not, and those that are.
    """
    for name in names:
        if name not in SIDECARS:
            raise ValueError(f"unknown sidecar {name!r}; known: {', '.join(SIDECARS)}")


def possible_names(shard_names: Sequence[str]) -> list[str]:
    """Every file that could lie beside these shards as a sidecar."""
    nothing = np.zeros(0, np.uint64)
    shards = [PackedShard(name, 0, "", nothing, 0) for name in shard_names]
    return [name for sidecar in SIDECARS.values() for name, _ in sidecar(shards)]


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
