"""What a data set holds: shards, samples, and where the bytes of each sample lie.

A data set is a folder of `.tar` files and two more: `manifest.json` (shards, sizes, hashes, known
problems) and `samples.parquet` (one row per sample, in shard order). The row number is the sample's
stable id. Folders that others made get both files from one walk over the headers.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.atomic import replacing
from shards.damage import Problem, Reason
from shards.tar import TarContent, read_tar

MANIFEST_FILE = "manifest.json"
SAMPLES_FILE = "samples.parquet"
IMAGE_FIELDS = ("webp", "jpg", "jpeg", "png", "gif", "bmp")
"""Fields that hold a picture; a sample with several uses the first of them."""
CAPTION_FIELD = "txt"
JSON_FIELD = "json"

_VERSION = 1
_MAX_FIELDS = 256


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        name: File name inside the data set's folder.
        samples: Number of samples.
        bytes: Size of the file.
        headers: SHA-256 of its tar headers.
        sha256: SHA-256 of the whole file; empty where only the headers were read.
    """

    name: str
    samples: int
    bytes: int
    headers: str
    sha256: str = ""


class Manifest:
    """A data set: its shards, and one row per sample.

    Get one with `Manifest.open` (load or, where there is none, scan), `Manifest.load`,
    `Manifest.scan`, or from `shards.write.pack`.

    Attributes:
        folder: Where the shards lie.
        shards: In order; sample ids run through them one after the other.
        samples: The table, one row per sample: `shard`, `key`, `<field>.offset`, `<field>.size`.
        problems: What was found bad while packing or scanning and is therefore not a sample.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        samples: pa.Table,
        problems: Sequence[Problem] = (),
    ) -> None:
        self.folder = folder
        self.shards = tuple(shards)
        self.samples = samples
        self.problems = tuple(problems)
        assert sum(shard.samples for shard in shards) == len(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"Manifest({str(self.folder)!r}, {len(self)} samples in {len(self.shards)} shards)"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that occur, such as `("jpg", "json", "txt")`."""
        names = self.samples.column_names
        return tuple(name.removesuffix(".size") for name in names if name.endswith(".size"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' names and hashes: the data set's identity, for records."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(
                f"{shard.name}\0{shard.bytes}\0{shard.sha256 or shard.headers}\n".encode()
            )
        return digest.hexdigest()

    @property
    def is_packed(self) -> bool:
        """Whether the hashes of whole shards are known, so that a change on disk is damage."""
        return all(shard.sha256 for shard in self.shards)

    @cached_property
    def keys(self) -> pa.LargeStringArray:
        """The key of each sample; `manifest.keys[i].as_py()` is one of them."""
        return pa.concat_arrays(self.samples["key"].cast(pa.large_string()).iterchunks())

    @cached_property
    def shard_numbers(self) -> np.ndarray:
        """The number of each sample's shard (int32)."""
        return self.samples["shard"].to_numpy()

    @cached_property
    def spans(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Offsets and sizes (int64) of each field for every sample; -1 where it is missing."""

        def column(name: str) -> np.ndarray:
            return self.samples[name].fill_null(-1).to_numpy()

        return {name: (column(f"{name}.offset"), column(f"{name}.size")) for name in self.fields}

    @cached_property
    def image_fields(self) -> tuple[str, ...]:
        """Those of `IMAGE_FIELDS` that occur, in that order."""
        return tuple(name for name in IMAGE_FIELDS if name in self.spans)

    @cached_property
    def image_choice(self) -> np.ndarray:
        """For every sample which of `image_fields` holds its picture (int8); -1 for none."""
        choice = np.full(len(self), -1, np.int8)
        for number, name in reversed(list(enumerate(self.image_fields))):
            choice[self.spans[name][0] >= 0] = number
        return choice

    def problem(self, sample: int, reason: Reason, detail: str = "") -> Problem:
        """A problem with one sample, with its shard and key filled in."""
        shard = self.shards[int(self.shard_numbers[sample])].name
        return Problem(shard, self.keys[sample].as_py(), reason, detail)

    @classmethod
    def open(cls, folder: Path | str) -> "Manifest":
        """Loads the manifest of a folder, or scans the folder where there is none.

        A manifest that came from a scan is made anew when the tar files changed since.

        Args:
            folder: The data set.

        Raises:
            FileNotFoundError: If there is no such folder or no `.tar` file in it.
            ValueError: If the manifest is damaged.
        """
        folder = Path(folder)
        for place in (folder, cache_folder(folder)):
            if (place / MANIFEST_FILE).is_file():
                manifest = cls.load(folder, place=place)
                if manifest.is_packed or manifest._is_current:
                    return manifest
        return cls.scan(folder)

    @classmethod
    def load(cls, folder: Path | str, *, place: Path | None = None) -> "Manifest":
        """Loads the manifest of a data set.

        Args:
            folder: The data set.
            place: Where the manifest lies, if not beside the shards.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged or of another version.
        """
        folder = Path(folder)
        path = (place or folder) / MANIFEST_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {MANIFEST_FILE}; it is no packed data set")
        try:
            content = json.loads(path.read_bytes())
            version = content["version"]
            if version != _VERSION:
                raise ValueError(f"version {version}; this program reads version {_VERSION}")
            shards = [Shard(**shard) for shard in content["shards"]]
            problems = [
                Problem(**{**problem, "reason": Reason(problem["reason"])})
                for problem in content["problems"]
            ]
            table = (place or folder) / SAMPLES_FILE
            whole = hashlib.sha256(table.read_bytes()).hexdigest() == content["samples_sha256"]
            samples = pq.read_table(table) if whole else pa.table({})
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"{path} is unreadable ({error}); remove it to scan the shards"
            ) from None
        if not whole or not _fits(samples, shards):
            raise ValueError(f"{table} does not belong to {path}; remove both to scan the shards")
        return cls(folder, shards, samples, problems)

    @classmethod
    def scan(cls, folder: Path | str) -> "Manifest":
        """Makes a manifest by one walk over the headers of all `.tar` files in a folder.

        It is kept beside the shards, or in the user's cache where that folder is read-only.

        Args:
            folder: The data set; its tar files are taken in the order of their names.

        Raises:
            FileNotFoundError: If there is no such folder or no `.tar` file in it.
            ValueError: If no sample is found.
        """
        folder = Path(folder)
        manifest = cls.from_contents(folder, map(read_tar, _tar_files(folder)))
        if not len(manifest):
            first = f"; first problem: {manifest.problems[0]}" if manifest.problems else ""
            raise ValueError(f"{folder}: no sample in {len(manifest.shards)} tar files{first}")
        try:
            manifest.save()
        except OSError:
            place = cache_folder(folder)
            place.mkdir(parents=True, exist_ok=True)
            manifest.save(place)
        return manifest

    @classmethod
    def from_contents(
        cls,
        folder: Path,
        contents: Iterable[TarContent],
    ) -> "Manifest":
        """Makes a manifest from walks over the shards.

        Args:
            folder: Where the shards lie.
            contents: One per shard, in order; taken one at a time, as they are large in memory.

        Raises:
            ValueError: If the members are of so many kinds that they cannot be samples.
        """
        shards: list[Shard] = []
        tables: list[pa.Table] = []
        problems: list[Problem] = []
        for number, content in enumerate(contents):
            size = len(content.samples)
            shards.append(Shard(content.name, size, content.bytes, content.headers, content.sha256))
            tables.append(_sample_table(folder, number, content))
            problems.extend(content.problems)
        if not tables:
            tables.append(_sample_table(folder, 0, TarContent("")))
        samples = pa.concat_tables(tables, promote_options="default")
        fields = sorted(name for name in samples.column_names if "." in name)
        return cls(folder, shards, samples.select(["shard", "key", *fields]), problems)

    def save(self, place: Path | None = None) -> None:
        """Writes both files, the manifest last, each whole or not at all.

        Args:
            place: Where to, if not beside the shards.
        """
        place = place or self.folder
        sink = pa.BufferOutputStream()
        pq.write_table(self.samples, sink, compression="zstd")
        table = sink.getvalue().to_pybytes()
        with replacing(place / SAMPLES_FILE) as stream:
            stream.write(table)
        content = {
            "version": _VERSION,
            "total": len(self),
            "fields": self.fields,
            "fingerprint": self.fingerprint,
            "samples_sha256": hashlib.sha256(table).hexdigest(),
            "shards": [asdict(shard) for shard in self.shards],
            "problems": [problem.as_dict() for problem in self.problems],
        }
        with replacing(place / MANIFEST_FILE) as stream:
            stream.write(json.dumps(content, indent=1).encode())

    @property
    def _is_current(self) -> bool:
        """Whether the tar files are still those of the scan, as far as names and sizes tell."""
        known = [(shard.name, shard.bytes) for shard in self.shards]
        return known == [(path.name, path.stat().st_size) for path in _tar_files(self.folder)]


def _fits(samples: pa.Table, shards: Sequence[Shard]) -> bool:
    """Whether the rows are those of the shards, in order, and the shards lie in the folder."""
    if any(Path(shard.name).name != shard.name for shard in shards):
        return False
    numbers = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])
    return np.array_equal(samples["shard"].to_numpy(), numbers)


def cache_folder(folder: Path) -> Path:
    """Where the manifest of a read-only data set is kept (below `$XDG_CACHE_HOME`)."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return root / "clip-align" / "manifests" / name


def _tar_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name the folder that holds the shards")
    paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        packed = next((path.name for path in sorted(folder.glob("*.tar.*"))), None)
        hint = f" ({packed} is compressed: unpack it first)" if packed else ""
        raise FileNotFoundError(f"{folder} holds no .tar file{hint}")
    return paths


def _sample_table(folder: Path, number: int, content: TarContent) -> pa.Table:
    """The rows of one shard."""
    samples = content.samples
    fields = {name for sample in samples for name in sample.spans}
    if len(fields) > _MAX_FIELDS:
        raise ValueError(f"{folder}: {len(fields)} kinds of members; these are not pairs of files")
    columns: dict[str, Any] = {
        "shard": pa.array(np.full(len(samples), number, np.int32)),
        "key": pa.array([sample.key for sample in samples], pa.string()),
    }
    for name in fields:
        spans = [sample.spans.get(name, (None, None)) for sample in samples]
        columns[f"{name}.offset"] = pa.array([span[0] for span in spans], pa.int64())
        columns[f"{name}.size"] = pa.array([span[1] for span in spans], pa.int64())
    return pa.table(columns)
