"""What a data set holds: shards, samples, and where the bytes of each sample lie.

A data set is a folder of shards and two more files: `manifest.json` (shards, sizes, hashes, known
problems) and `samples.parquet` (one row per sample, in shard order). Folders that others made get
both files from one walk over the headers. A third file, `quarantine.json`, names samples that were
found bad later. A sample's id is its row among those that are left, so it means the same sample as
long as the fingerprint is the same.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.catalog import MANIFEST_FILE, Shard, TornError, read_files, write_files
from shards.damage import BadSample, Problem, Reason
from shards.quarantine import find_lists, read_lists, write_lists
from shards.scan import sample_table, walks
from shards.storage import LocalStorage, Storage, cache_folder, storage_of
from shards.tar import TarContent

IMAGE_FIELDS = ("webp", "jpg", "jpeg", "png", "gif", "bmp")
"""Fields that hold a picture; a sample with several uses the first of them."""
CAPTION_FIELD = "txt"
JSON_FIELD = "json"


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
        write_files(place, self.shards, self.samples, self.problems, self.fingerprint)

    def set_aside(self, bad: Mapping[int, Problem]) -> Path | None:
        """Writes the quarantine list: `open` leaves these samples out from now on.

        It lies beside the shards, or in the user's cache where they are remote or read-only. What
        earlier lists say of these shards is replaced; removing the file undoes it.

        Args:
            bad: What is wrong with each bad sample, by its row in a manifest that was opened with
                `quarantine=False`.

        Returns:
            The file; None where nothing is set aside any more.

        Raises:
            OSError: If it can be written in neither place.
        """
        return write_lists(self.storages[0], bad, self.shards)

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
        lists = find_lists(storage)
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
            except TornError:
                continue  # a scan was cut off between its two files
            if manifest is not None and (manifest.is_packed or manifest._is_current(home)):
                return manifest
        return None

    @classmethod
    def _load(cls, storage: Storage, home: Storage) -> "Manifest | None":
        found = read_files(home)
        return None if found is None else cls(storage, *found)._of_names(storage)

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
