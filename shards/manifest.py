"""What a data set holds: shards, samples, and where the bytes of each sample lie.

A data set is a folder of shards and two more files: `manifest.json` (shards, sizes, hashes, known
problems) and `samples.parquet` (one row per sample, in shard order). The row number is the sample's
stable id. Folders that others made get both files from one walk over the headers. A third file,
`quarantine.json`, names samples that were found bad later; they are left out, and the ids of the
others close up.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.atomic import replacing
from shards.damage import BadSample, Problem, Reason
from shards.quarantine import QUARANTINE_FILE, read_lists, written_list
from shards.scan import sample_table, walks
from shards.storage import LocalStorage, Storage, storage_of
from shards.tar import TarContent

MANIFEST_FILE = "manifest.json"
SAMPLES_FILE = "samples.parquet"
IMAGE_FIELDS = ("webp", "jpg", "jpeg", "png", "gif", "bmp")
"""Fields that hold a picture; a sample with several uses the first of them."""
CAPTION_FIELD = "txt"
JSON_FIELD = "json"

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


class Manifest:
    """A data set: its shards, and one row per sample.

    Get one with `Manifest.open` (load or, where there is none, scan), `Manifest.load`,
    `Manifest.scan`, `Manifest.joined`, or from `shards.packing.pack`.

    Attributes:
        storages: Where the shards lie: one place, or several for a joined manifest.
        shards: In order; sample ids run through them one after the other.
        samples: The table, one row per sample: `shard`, `key`, `<field>.offset`, `<field>.size`.
        problems: What is known to be bad and is therefore not a sample: found while packing or
            scanning, or set aside.
        damage: Those of them that a scan found and nobody has dealt with.
    """

    def __init__(
        self,
        storages: Storage | Sequence[Storage],
        shards: Sequence[Shard],
        samples: pa.Table,
        problems: Sequence[Problem] = (),
        *,
        fingerprint: str = "",
        damage: Sequence[Problem] | None = None,
    ) -> None:
        self.storages = (storages,) if isinstance(storages, Storage) else tuple(storages)
        self.shards = tuple(shards)
        self.samples = samples
        self.problems = tuple(problems)
        self._fingerprint = fingerprint
        self.damage = tuple((() if self.is_packed else problems) if damage is None else damage)
        assert sum(shard.samples for shard in shards) == len(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"Manifest({self.place!r}, {len(self)} samples in {len(self.shards)} shards)"

    @property
    def place(self) -> str:
        """Where the data set lies, for people."""
        return " + ".join(storage.url for storage in self.storages)

    @property
    def folder(self) -> Path:
        """The local folder of the shards.

        Raises:
            ValueError: If they do not lie in one.
        """
        folder = self.storages[0].folder
        if len(self.storages) != 1 or folder is None:
            raise ValueError(f"{self.place} is no local folder")
        return folder

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that occur, such as `("jpg", "json", "txt")`."""
        names = self.samples.column_names
        return tuple(name.removesuffix(".size") for name in names if name.endswith(".size"))

    @cached_property
    def fingerprint(self) -> str:
        """The data set's identity, for records: SHA-256 over the shards' names and hashes.

        What was set aside and what was joined is part of it.
        """
        if self._fingerprint:
            return self._fingerprint
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.name}\0{shard.bytes}\0{shard.identity}\n".encode())
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
        shard = self.shards[int(self.shard_numbers[sample])]
        name = shard.name
        if len(self.storages) > 1:
            name = f"{self.storages[shard.source].url}/{name}"
        return Problem(name, self.keys[sample].as_py(), reason, detail)

    @classmethod
    def open(cls, place: Path | str, *, quarantine: bool = True) -> "Manifest":
        """Loads the manifest of a data set, or makes it where there is none.

        A manifest that came from a scan is made anew when the tar files changed since.

        Args:
            place: A folder, one shard, or a pattern such as `pairs/{00000..00031}.tar`; a path or
                an fsspec URL.
            quarantine: Leave out what was set aside (see `set_aside`).

        Raises:
            FileNotFoundError: If there is no such place or no shard in it.
            ValueError: If the manifest is damaged, the place malformed, or no sample left.
        """
        storage = storage_of(place)
        manifest = cls._known(storage) or cls._scan(storage)
        return manifest._without_quarantine() if quarantine else manifest

    @classmethod
    def load(cls, folder: Path | str) -> "Manifest":
        """Loads the manifest that lies beside the shards, whatever was set aside.

        Args:
            folder: The data set.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged or of another version.
        """
        storage = storage_of(folder)
        manifest = cls._load(storage, storage)
        if manifest is None:
            raise FileNotFoundError(f"{folder} holds no {MANIFEST_FILE}; it is no packed data set")
        return manifest

    @classmethod
    def scan(cls, place: Path | str) -> "Manifest":
        """Makes a manifest by one walk over the headers of all shards, whatever was set aside.

        It is kept beside the shards, or in the user's cache where they are remote or read-only.

        Args:
            place: See `open`; shards are taken in the order of their names.

        Raises:
            FileNotFoundError: If there is no such place or no shard in it.
            ValueError: If no sample is found.
        """
        return cls._scan(storage_of(place))

    @classmethod
    def joined(cls, manifests: Sequence["Manifest"]) -> "Manifest":
        """Several data sets as one: their shards and samples one after the other.

        Args:
            manifests: One or more.
        """
        if len(manifests) == 1:
            return manifests[0]
        storages: list[Storage] = []
        shards: list[Shard] = []
        tables: list[pa.Table] = []
        for manifest in manifests:
            number = pa.array(manifest.shard_numbers + np.int32(len(shards)))
            place = manifest.samples.column_names.index("shard")
            tables.append(manifest.samples.set_column(place, "shard", number))
            first = len(storages)
            shards += [replace(shard, source=first + shard.source) for shard in manifest.shards]
            storages += manifest.storages
        parts = "".join(manifest.fingerprint for manifest in manifests)
        return cls(
            storages,
            shards,
            pa.concat_tables(tables, promote_options="default"),
            [problem for manifest in manifests for problem in manifest.problems],
            damage=[problem for manifest in manifests for problem in manifest.damage],
            fingerprint=hashlib.sha256(parts.encode()).hexdigest(),
        )

    @classmethod
    def from_contents(
        cls,
        storage: Storage | Path,
        contents: Iterable[TarContent],
    ) -> "Manifest":
        """Makes a manifest from walks over the shards.

        Args:
            storage: Where the shards lie.
            contents: One per shard, in order; taken one at a time, as they are large in memory.

        Raises:
            ValueError: If the members are of so many kinds that they cannot be samples.
        """
        storage = storage if isinstance(storage, Storage) else storage_of(storage)
        shards: list[Shard] = []
        tables: list[pa.Table] = []
        problems: list[Problem] = []
        for number, content in enumerate(contents):
            size = len(content.samples)
            shards.append(
                Shard(
                    content.name,
                    size,
                    content.bytes,
                    content.headers,
                    content.sha256,
                    version=content.version,
                )
            )
            tables.append(sample_table(storage.url, number, content))
            problems.extend(content.problems)
        if not tables:
            tables.append(sample_table(storage.url, 0, TarContent("")))
        samples = pa.concat_tables(tables, promote_options="default")
        fields = sorted(name for name in samples.column_names if "." in name)
        return cls(storage, shards, samples.select(["shard", "key", *fields]), problems)

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
        shards = [asdict(shard) for shard in self.shards]
        for shard in shards:
            del shard["source"]
        content = {
            "version": _VERSION,
            "total": len(self),
            "fields": self.fields,
            "fingerprint": self.fingerprint,
            "samples_sha256": hashlib.sha256(table).hexdigest(),
            "shards": shards,
            "problems": [problem.as_dict() for problem in self.problems],
        }
        with replacing(place / MANIFEST_FILE) as stream:
            stream.write(json.dumps(content, indent=1).encode())

    def set_aside(self, bad: Mapping[int, Problem]) -> Path | None:
        """Writes the quarantine list: `open` leaves these samples out from now on.

        It lies beside the shards, or in the user's cache where they are remote or read-only. What
        earlier lists say of these shards is replaced; removing the file undoes it.

        Args:
            bad: What is wrong with each bad sample, by its row in a manifest that was opened with
                `quarantine=False`.

        Returns:
            The file; None where nothing is set aside any more.
        """
        beside, cached = _quarantine_files(self.storages[0])
        if beside is not None and _set_aside(beside, bad, self.shards):
            _set_aside(cached, {}, self.shards)
            return beside if beside.is_file() else None
        # What lies beside them cannot be changed; the list in the cache has the last word.
        overrules = self.storages[0].small_file(QUARANTINE_FILE) is not None
        if not _set_aside(cached, bad, self.shards, overrules=overrules):
            raise OSError(f"{cached} cannot be written")
        return cached if bad else None

    def kept(self, rows: np.ndarray, *, problems: Sequence[Problem], note: str) -> "Manifest":
        """The data set without some of its samples.

        Args:
            rows: Which samples to keep (bool).
            problems: What is wrong with the others.
            note: Goes into the fingerprint beside what the samples were.
        """
        sizes = np.bincount(self.shard_numbers[rows], minlength=len(self.shards)).tolist()
        shards = [
            replace(shard, samples=size) for shard, size in zip(self.shards, sizes, strict=True)
        ]
        identity = f"{self.fingerprint} {note}".encode()
        return Manifest(
            self.storages,
            shards,
            self.samples.filter(pa.array(rows)),
            (*self.problems, *problems),
            fingerprint=hashlib.sha256(identity).hexdigest(),
            damage=self.damage,
        )

    def _without_quarantine(self) -> "Manifest":
        storage = self.storages[0]
        _, cached = _quarantine_files(storage)
        lists: dict[str, bytes] = {}
        if (data := storage.small_file(QUARANTINE_FILE)) is not None:
            lists[f"{storage.url}/{QUARANTINE_FILE}"] = data
        if cached.is_file():
            lists[str(cached)] = cached.read_bytes()
        bad, problems = read_lists(lists, self.shards)
        if not len(bad):
            return self
        keep = np.ones(len(self), bool)
        keep[bad] = False
        if not keep.any():
            raise ValueError(f"{' and '.join(lists)}: every sample of {storage.url} is set aside")
        return self.kept(keep, problems=problems, note=hashlib.sha256(keep.tobytes()).hexdigest())

    @classmethod
    def _known(cls, storage: Storage) -> "Manifest | None":
        """The manifest that lies beside the shards or in the cache, if it is still true."""
        for home in (storage, LocalStorage(cache_folder(storage))):
            try:
                manifest = cls._load(storage, home)
            except _TornError:
                continue  # a scan was cut off between its two files
            if manifest is not None and (manifest.is_packed or manifest._is_current(home)):
                return manifest
        return None

    @classmethod
    def _load(cls, storage: Storage, home: Storage) -> "Manifest | None":
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
            raise ValueError(
                f"{path} is unreadable ({error}); remove it to scan the shards"
            ) from None
        if not whole or not _fits(samples, shards):
            kind = ValueError if all(shard.sha256 for shard in shards) else _TornError
            raise kind(f"{table} does not belong to {path}; remove both to scan the shards")
        return cls(storage, shards, samples, problems)._of_names(storage)

    def _of_names(self, storage: Storage) -> "Manifest":
        """The shards that the storage was asked for, of all that the manifest knows."""
        if storage.names is None:
            return self
        known = {shard.name: number for number, shard in enumerate(self.shards)}
        if missing := sorted(set(storage.names) - set(known)):
            raise FileNotFoundError(f"{storage.url} holds no {missing[0]}, says its manifest")
        numbers = [known[name] for name in storage.names]
        renumbered = np.full(len(self.shards), -1, np.int32)
        renumbered[numbers] = np.arange(len(numbers), dtype=np.int32)
        keep = np.isin(self.shard_numbers, numbers)
        samples = self.samples.filter(pa.array(keep))
        column = pa.array(renumbered[samples["shard"].to_numpy()])
        samples = samples.set_column(samples.column_names.index("shard"), "shard", column)
        shards = [self.shards[number] for number in numbers]
        problems = [problem for problem in self.problems if problem.shard in storage.names]
        return Manifest(storage, shards, samples, problems)

    @classmethod
    def _scan(cls, storage: Storage) -> "Manifest":
        manifest = cls.from_contents(storage, walks(storage))
        if not len(manifest):
            first = f"; first problem: {manifest.problems[0]}" if manifest.problems else ""
            raise ValueError(f"{storage.url}: no sample in {len(manifest.shards)} tar files{first}")
        try:
            # A manifest beside the shards speaks for all of them.
            if storage.folder is None or storage.names is not None:
                raise PermissionError
            manifest.save()
        except OSError:
            place = cache_folder(storage)
            place.mkdir(parents=True, exist_ok=True)
            manifest.save(place)
        return manifest

    def _is_current(self, home: Storage) -> bool:
        """Whether the shards are still those of the scan, as far as sizes, times and tags tell."""
        storage = self.storages[0]
        if [(shard.name, shard.bytes) for shard in self.shards] != storage.tars():
            return False
        if home.folder is None:
            return True  # it was put beside remote shards, whose tags it cannot know
        try:
            return all(shard.version == storage.version(shard.name) for shard in self.shards)
        except BadSample:
            return False


class _TornError(ValueError):
    """The two files of a scan do not belong together; another scan mends it."""


def cache_folder(storage: Storage, *, whole: bool = False) -> Path:
    """Where the files of a remote or read-only data set are kept (below `$XDG_CACHE_HOME`).

    Args:
        storage: Where its shards lie.
        whole: For all shards of the place, whichever of them were named.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    url = storage.url if storage.folder is None else str(storage.folder.resolve())
    identity = "\0".join([url, *(() if whole else storage.names or ())])
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return root / "clip-align" / "manifests" / name


def _quarantine_files(storage: Storage) -> tuple[Path | None, Path]:
    """Where the list of a place lies: beside the shards, if they are local, and in the cache."""
    beside = None if storage.folder is None else storage.folder / QUARANTINE_FILE
    return beside, cache_folder(storage, whole=True) / QUARANTINE_FILE


def _set_aside(
    path: Path, bad: Mapping[int, Problem], shards: Sequence[Shard], *, overrules: bool = False
) -> bool:
    """Writes a list, or removes one that says nothing any more; False where that cannot be done."""
    before = path.read_bytes() if path.is_file() else None
    content = written_list(bad, shards, before=before, overrules=overrules)
    try:
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                stream.write(content)
    except OSError:
        return False
    return True


def _problem(entry: dict[str, str]) -> Problem:
    return Problem(**{**entry, "reason": Reason(entry["reason"])})


def _fits(samples: pa.Table, shards: Sequence[Shard]) -> bool:
    """Whether the rows are those of the shards, in order, and the shards lie in the folder."""
    if any(Path(shard.name).name != shard.name for shard in shards):
        return False
    numbers = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])
    return np.array_equal(samples["shard"].to_numpy(), numbers)
