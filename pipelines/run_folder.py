"""A run folder: one run at a time, and everything it takes to understand the run later."""

import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.config import Config, ConfigError, to_yaml

_LIBRARIES = (
    *("clip-align", "torch", "torchvision", "timm", "transformers", "accelerate"),
    *("webdataset", "faiss-cpu", "numpy", "pyarrow", "pillow"),
)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Make a folder and hold it alone; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another run holds the folder.
    """
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder}: is a file; choose another folder for the run") from error
    with _held(lock, folder):
        try:
            yield folder
        finally:
            if [path.name for path in folder.iterdir()] == [lock.name]:  # nothing came of it
                lock.unlink()
                folder.rmdir()


@contextmanager
def locked_beside(folder: Path) -> Iterator[Path]:
    """Hold a folder alone that its writer makes or replaces as a whole; the lock lies beside it.

    Raises:
        ConfigError: another run holds the folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _held(folder.with_name(f".{folder.name}.lock"), folder):
        yield folder


@contextmanager
def _held(lock: Path, folder: Path) -> Iterator[None]:
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another run is at work here; wait for it, or choose another folder"
            ) from error
        yield


def record(folder: Path, config: Config, **facts: Any) -> None:
    """Write the resolved configuration and the environment beside the results."""
    write_text(folder / "config.yaml", to_yaml(config))
    environment = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "commit": _commit(),
        **facts,
    }
    write_json(folder / "environment.json", environment)


def _commit() -> str | None:
    """The commit of the source tree, where there is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def keep_metrics(path: Path, *, up_to_step: int) -> None:
    """Forget what was logged after the checkpoint a run goes on from."""
    kept: Iterable[dict[str, Any]] = (
        line for line in read_metrics(path) if line["step"] <= up_to_step
    )
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
