"""Where a data set grows until it is whole, and from where it moves into place in one act."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.atomic import replacing, sync_folder
from shards.catalog import MANIFEST_FILE, SAMPLES_FILE
from shards.manifest import Manifest
from shards.packing.sidecars import possible_names
from shards.quarantine import QUARANTINE_FILE

WORK_FOLDER = ".packing"
"""Where a pack grows inside its folder; what a pack that was cut off leaves behind."""

_PLAN = "plan.json"
_MOVE = "move.json"


class WorkFolder:
    """The hidden folder in which a pack grows, and its way out of it.

    It holds the plan of what is packed, and for each finished shard its tar and a note of what is
    in it. The move is written down before it begins, so one that was cut off is ended, not begun
    anew.

    Args:
        out: The folder of the data set.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder = out / WORK_FOLDER

    @classmethod
    @contextmanager
    def of(cls, out: Path) -> Iterator["WorkFolder"]:
        """Makes a folder, and holds a lock on it that ends with the process, however that ends.

        Raises:
            ValueError: If it is a file, or another process packs into it.
        """
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; name a folder to pack into")
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is packing into {out}; wait for it") from None
            yield cls(out)
        finally:
            os.close(descriptor)

    def end_move(self, plan: Mapping[str, Any] | None, sidecars: Sequence[str]) -> bool:
        """Ends a move that was cut off; returns whether all that is asked for is there by now."""
        if not (self.folder / _MOVE).is_file():
            return False
        journal = json.loads((self.folder / _MOVE).read_bytes())
        same = plan is not None and self._plan() == dict(plan)
        same = same and set(sidecars) <= set(journal["sidecars"])
        self._move()
        return same

    def replaceable(self, *, overwrite: bool) -> list[str]:
        """The files of the data set that may be replaced; none for an empty folder.

        Raises:
            ValueError: If there is anything else, or overwriting was not asked for.
        """
        present = sorted(path.name for path in self._out.iterdir() if path.name != WORK_FOLDER)
        if not present:
            return []
        if MANIFEST_FILE not in present:
            raise ValueError(f"{self._out} holds {present[0]!r}; pack into a new or empty folder")
        old = Manifest.load(self._out)
        if not old.is_packed:
            raise ValueError(
                f"{self._out} holds shards that were not packed here; choose another folder"
            )
        if not overwrite:
            raise ValueError(
                f"{self._out} holds a data set; choose another folder, or set overwrite"
            )
        shards = [shard.name for shard in old.shards]
        own = {MANIFEST_FILE, SAMPLES_FILE, QUARANTINE_FILE, *shards, *possible_names(shards)}
        return sorted(own & set(present))

    def begin(self, plan: Mapping[str, Any] | None) -> int | None:
        """Goes on with what was begun under the same plan, or starts anew.

        Args:
            plan: All that the bytes of the shards depend on; None if that cannot be told.

        Returns:
            How many finished shards are there; None if what was there belonged to another plan and
            is gone.
        """
        kept = 0
        other = self.folder.exists()
        if plan is not None and other and self._plan() == dict(plan):
            for path in self.folder.glob(".*.partial"):
                path.unlink()
            return self.done()
        if other:
            kept = None if self.done() else 0
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        if plan is not None:
            self.write(_PLAN, _json(dict(plan)))
        return kept

    def done(self) -> int:
        """How many finished shards there are."""
        return sum(1 for _ in self.folder.glob("[0-9]*.json"))

    def shard(self, number: int) -> Path:
        """Where a shard is written."""
        return self.folder / f"{number:06d}.tar"

    def finish(self, number: int, note: Mapping[str, Any]) -> None:
        """Notes that a shard is whole, and what is in it."""
        self.write(f"{number:06d}.json", _json(dict(note)))

    def finished(self, number: int) -> dict[str, Any] | None:
        """The note of a shard that is whole; None if it is to be written."""
        try:
            note = json.loads((self.folder / f"{number:06d}.json").read_bytes())
            whole = self.shard(number).stat().st_size == note["bytes"]
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return note if whole else None

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file, whole or not at all."""
        with replacing(self.folder / name) as stream:
            stream.write(data)

    def move_in(
        self, moves: Mapping[str, str], remove: Sequence[str], sidecars: Sequence[str]
    ) -> None:
        """Puts all files into place, the manifest last, and ends the work folder.

        Args:
            moves: From names here to names there.
            remove: What of an earlier data set goes.
            sidecars: The names of those among the files.
        """
        journal = {"moves": dict(moves), "remove": list(remove), "sidecars": list(sidecars)}
        self.write(_MOVE, _json(journal))
        self._move()

    def clear(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _plan(self) -> Any:
        try:
            return json.loads((self.folder / _PLAN).read_bytes())
        except (OSError, ValueError):
            return None

    def _move(self) -> None:
        """Does what was written down; each step may have been done before."""
        journal = json.loads((self.folder / _MOVE).read_bytes())
        moves = journal["moves"]
        if (self.folder / MANIFEST_FILE).exists():
            # Without its manifest the folder is no data set until the new one arrives.
            (self._out / MANIFEST_FILE).unlink(missing_ok=True)
            sync_folder(self._out)
            for name in set(journal["remove"]) - set(moves.values()):
                (self._out / name).unlink(missing_ok=True)
        for here, there in sorted(moves.items(), key=lambda move: move[1] == MANIFEST_FILE):
            if there == MANIFEST_FILE:
                sync_folder(self._out)
            if (self.folder / here).exists():
                (self.folder / here).replace(self._out / there)
        sync_folder(self._out)
        # The order to move goes last, so that a kill between here and there is noticed.
        for path in self.folder.iterdir():
            if path.name not in {_MOVE, _PLAN}:
                path.unlink()
        (self.folder / _MOVE).unlink()
        (self.folder / _PLAN).unlink(missing_ok=True)
        self.folder.rmdir()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode("utf-8", "surrogateescape")
