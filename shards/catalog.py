"""The two files of a manifest: what stands in them, written whole, and read with every check."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.atomic import replacing
from shards.damage import Problem, Reason
from shards.storage import Storage

MANIFEST_FILE = "manifest.json"
SAMPLES_FILE = "samples.parquet"

_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        name: File name inside its storage.
        samples: Number of samples.
        bytes: Size of the file.
        headers: SHA-256 of its tar headers.
        sha256: SHA-256 of the whole file; empty where only the headers were read.
        source: Which of the manifest's storages it lies in.
        version: What `Storage.version` said when it was scanned; empty where it was packed here.
    """

    name: str
    samples: int
    bytes: int
    headers: str
    sha256: str = ""
    source: int = 0
    version: str = ""

    @property
    def identity(self) -> str:
        """Changes when the shard does: the hash of all of it, or of its headers."""
        return self.sha256 or self.headers


class TornError(ValueError):
    """The two files of a scan do not belong together; another scan mends it."""


def write_files(
    place: Path,
    shards: Sequence[Shard],
    samples: pa.Table,
    problems: Sequence[Problem],
    fingerprint: str,
) -> None:
    """Writes both files, the manifest last, each whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(samples, sink, compression="zstd")
    table = sink.getvalue().to_pybytes()
    with replacing(place / SAMPLES_FILE) as stream:
        stream.write(table)
    listed = [asdict(shard) for shard in shards]
    for shard in listed:
        del shard["source"]
    content = {
        "version": _VERSION,
        "total": len(samples),
        "fields": sorted(
            name.removesuffix(".size") for name in samples.column_names if name.endswith(".size")
        ),
        "fingerprint": fingerprint,
        "samples_sha256": hashlib.sha256(table).hexdigest(),
        "shards": listed,
        "problems": [problem.as_dict() for problem in problems],
    }
    with replacing(place / MANIFEST_FILE) as stream:
        stream.write(json.dumps(content, indent=1).encode())


def read_files(home: Storage) -> tuple[list[Shard], pa.Table, list[Problem]] | None:
    """Shards, samples and problems as the files in a place have them; None where there are none.

    Raises:
        TornError: If the files of a scan do not belong together.
        ValueError: If they are damaged otherwise, or of another version.
    """
    data = home.small_file(MANIFEST_FILE)
    if data is None:
        return None
    path, table = f"{home.url}/{MANIFEST_FILE}", f"{home.url}/{SAMPLES_FILE}"
    try:
        content = json.loads(data)
        version = content["version"]
        if version != _VERSION:
            raise ValueError(f"version {version}; this program reads version {_VERSION}")
        shards = [Shard(**shard) for shard in content["shards"]]
        problems = [_problem(problem) for problem in content["problems"]]
        rows = home.small_file(SAMPLES_FILE) or b""
        whole = hashlib.sha256(rows).hexdigest() == content["samples_sha256"]
        samples = pq.read_table(pa.BufferReader(rows)) if whole else pa.table({})
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is unreadable ({error}); remove it to scan the shards") from None
    if not whole or not _fits(samples, shards):
        kind = ValueError if all(shard.sha256 for shard in shards) else TornError
        raise kind(f"{table} does not belong to {path}; remove both to scan the shards")
    return shards, samples, problems


def _problem(entry: dict[str, str]) -> Problem:
    return Problem(**{**entry, "reason": Reason(entry["reason"])})


def _fits(samples: pa.Table, shards: Sequence[Shard]) -> bool:
    """Whether the rows are those of the shards, in order, and the shards lie in the folder."""
    if any(Path(shard.name).name != shard.name for shard in shards):
        return False
    numbers = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])
    return np.array_equal(samples["shard"].to_numpy(), numbers)
