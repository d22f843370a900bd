"""Two trainers on one model, as `benchmarks.train` runs them: processes that take turns.

Every trainer is started once, and stopped (SIGSTOP, with its loader's processes) wherever it is not
its turn. What it has done is read from its own log: the metrics of `align pretrain`, and the file
that `open_clip_train` writes beside its checkpoints.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import yaml

TINY: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
"""A model small enough that all parts of a step count, not the towers alone."""

_ENDLESS = 10**8
_PATIENCE_S = 600.0
_LOOK_EVERY_S = 0.002


@dataclass(frozen=True)
class Task:
    """What both trainers do.

    Attributes:
        model: a folder in OpenCLIP's format, with a configuration and no weights.
        data: a folder of shards, named 00000.tar and so on.
        batch_size: samples in a step.
        precision: fp32 or bf16.
        threads: of a process's own computations.
        workers: threads of ours and processes of OpenCLIP's that decode pictures.
        log_every: steps between log lines.
        device: cpu or cuda.
        augment: whether our pictures are changed at random beyond the crop, as no OpenCLIP's are.
    """

    model: Path
    data: Path
    batch_size: int
    precision: str
    threads: int
    workers: int
    log_every: int
    device: str
    augment: bool = False

    def with_precision(self, precision: str) -> "Task":
        """The same in another precision."""
        return replace(self, precision=precision)


def write_model(name: str, folder: Path) -> Path:
    """A folder that both trainers build a model from: `tiny`, or one of OpenCLIP's.

    Raises:
        SystemExit: OpenCLIP has no such model.
    """
    config = TINY if name == "tiny" else open_clip.get_model_config(name)
    if config is None:
        raise SystemExit(f"{name}: neither tiny nor one of open_clip.list_models()")
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    whole = {"model_cfg": config, "preprocess_cfg": {}}
    (place / "open_clip_config.json").write_text(json.dumps(whole), encoding="utf-8")
    return place


def our_config(task: Task, out: Path) -> dict[str, Any]:
    """The configuration of `align pretrain`: a random crop is all that is done to pictures.

    Optimiser, crop and schedule are those of `peer_arguments`; gradients are cut and steps without
    a finite one are left out, as always with ours and never unless asked with OpenCLIP.
    """
    model = json.loads((task.model / "open_clip_config.json").read_text())["model_cfg"]
    tower = {"name": f"open_clip:local-dir:{task.model}"}
    return {
        "data": str(task.data),
        "out": str(out),
        "model": {
            "image": dict(tower),
            "text": dict(tower),
            "dim": model["embed_dim"],
            "image_size": model["vision_cfg"]["image_size"],
            "context_length": model["text_cfg"]["context_length"],
        },
        "tokenizer": {"name": "clip"},
        "augment": {
            "crop": {"scale": [0.9, 1.0]},
            "options": {} if task.augment else dict(_AS_THEY_ARE),
        },
        "optimizer": {
            "learning_rate": 5e-4,
            "weight_decay": 0.2,
            "options": {"betas": [0.9, 0.98], "eps": 1e-6},
        },
        "precision": task.precision,
        "batch_size": task.batch_size,
        "lanes": math.gcd(task.batch_size, 64),
        "samples": _ENDLESS,
        "workers": task.workers,
        "log_every": task.log_every,
    }


_AS_THEY_ARE: dict[str, Any] = {
    "scale": [1.0, 1.0],
    **dict.fromkeys(("aspect", "rotate", "shear", "shift", "gamma", "hue", "saturation"), 0.0),
    **dict.fromkeys(("gain", "gray", "sharpen", "posterize", "page", "erase"), 0.0),
}


def peer_arguments(task: Task, logs: Path) -> list[str]:
    """The arguments of `open_clip_train.main`."""
    shards = sorted(task.data.glob("*.tar"))
    given: dict[str, Any] = {
        "model": f"local-dir:{task.model}",
        "device": task.device,
        "dataset-type": "webdataset",
        "train-data": f"{task.data}/{{{shards[0].stem}..{shards[-1].stem}}}.tar",
        "train-num-samples": _ENDLESS,
        "batch-size": task.batch_size,
        "workers": task.workers,
        "epochs": 1,
        "warmup": round(0.05 * _ENDLESS / task.batch_size),
        "lr": 5e-4,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "wd": 0.2,
        "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[task.precision],
        "log-every-n-steps": task.log_every,
        "save-frequency": 0,
        "logs": logs.parent,
        "name": logs.name,
    }
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


_PEER_LINE = re.compile(rb"Train Epoch: \d+ \[\s*(\d+)/")


def samples_in_metrics(tail: bytes) -> int:
    """Samples trained on by the last whole line of our metrics that tells; 0 = none does."""
    for line in reversed(tail.split(b"\n")[:-1]):
        try:
            return int(json.loads(line)["samples"])
        except (ValueError, KeyError):
            continue  # another kind of line, or the head of it was cut off
    return 0


def samples_in_log(tail: bytes) -> int:
    """Likewise, of OpenCLIP's log."""
    whole = tail[: tail.rfind(b"\n") + 1]
    found = _PEER_LINE.findall(whole)
    return int(found[-1]) if found else 0


class Trainer:
    """A trainer in a process of its own, which runs in turns.

    Args:
        side: `ours` or `peer`.
        task: what it does.
        out: an empty folder for all that it writes.
        packages: a folder in front on the path of OpenCLIP's.
    """

    def __init__(self, side: str, task: Task, out: Path, packages: Path) -> None:
        out.mkdir(parents=True)
        self._batch_size = task.batch_size
        self._console = out / "console.log"
        path = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        if side == "ours":
            config = out / "wanted.yaml"
            config.write_text(yaml.safe_dump(our_config(task, out / "run")), encoding="utf-8")
            command = ["pipelines.pretrain", str(config)]
            self._log, self._samples_in = out / "run" / "metrics.jsonl", samples_in_metrics
        else:
            path = [str(packages), *path]
            command = ["open_clip_train.main", *peer_arguments(task, out / "run")]
            self._log, self._samples_in = out / "run" / "out.log", samples_in_log
        environment = os.environ | {
            "OMP_NUM_THREADS": str(task.threads),
            "PYTHONPATH": os.pathsep.join(path),
            **({"CUDA_VISIBLE_DEVICES": ""} if task.device == "cpu" else {}),
        }
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=environment,
                start_new_session=True,
            )
        self._samples = 0

    def warm_up(self, steps: int) -> None:
        """Let it go until its log tells of so many steps, then stop it."""
        self._until(steps * self._batch_size)
        self._send(signal.SIGSTOP)

    def turn(self, steps: int) -> float:
        """Let it go on for so many steps, rounded up to its next log line; samples a second."""
        before = self._samples
        started = time.perf_counter()
        self._send(signal.SIGCONT)
        self._until(before + steps * self._batch_size)
        seconds = time.perf_counter() - started
        self._send(signal.SIGSTOP)
        return (self._samples - before) / seconds

    def _until(self, samples: int) -> None:
        """Wait until its log tells of so many samples.

        Raises:
            SystemExit: it ended, or its log told of nothing new for long.
        """
        patience = time.monotonic() + _PATIENCE_S
        seen = -1
        while self._samples < samples:
            if self._process.poll() is not None or time.monotonic() > patience:
                told = self._console.read_text(encoding="utf-8", errors="replace")
                raise SystemExit(f"{told[-3000:]}\na trainer ended or hangs: {self._process.args}")
            size = self._log.stat().st_size if self._log.exists() else 0
            if size != seen:
                seen = size
                self._samples = self._samples_in(_tail(self._log) if size else b"")
                patience = time.monotonic() + _PATIENCE_S
            time.sleep(_LOOK_EVERY_S)

    def _send(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):  # it may have ended by itself
            self._send(signal.SIGKILL)
        self._process.wait()


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read()


_TAIL_BYTES = 65536
