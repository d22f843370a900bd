"""What kill -9 costs a training run: `python -m benchmarks.kill --kills 20`.

Trains once undisturbed, then again as `align pretrain --resume` that is killed over and over, half
of the times while a checkpoint is being written and half at random moments: while loading, in a
step, between two. Says whether the two runs are equal to the bit, in every logged number and every
weight, and what a kill cost in seconds. The last line is JSON; the exit code is 1 where the runs
differ, or where fewer kills came than were asked for.

The run: the emoji of the demo at 64 x 64 pixels, a small ResNet and a two-layer BERT with dropout,
an average of the weights, two loader workers, one compute thread.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines import run_folder
from shards import demo
from shards.packing import pack

BATCH, EVERY, SAMPLES = 64, 5, 2048
CLOCKS = {"samples_per_second", "mfu"}
MODEL: dict[str, Any] = {
    "image": {
        "name": "timm:resnet10t",
        "options": {"channels": [32, 64, 96, 128], "layers": [1, 1, 1, 1]},
    },
    "text": {
        "name": "hf:bert",
        "options": {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "hidden_dropout_prob": 0.1,
        },
    },
    "dim": 64,
    "image_size": 64,
    "context_length": 32,
}


@dataclass
class Lives:
    """What the lives of the killed run came to."""

    seconds: list[float] = field(default_factory=list)
    to_first_step: list[float] = field(default_factory=list)
    redone: int = 0  # steps that were taken again
    in_writing: int = 0


def configuration(folder: Path, out: Path, *, steps: int) -> Path:
    """The run as a file."""
    values = {
        "data": str(folder / "data"),
        "out": str(out),
        "model": MODEL,
        "tokenizer": {"vocabulary_size": 2000},
        "optimizer": {"average": 0.9},
        "batch_size": BATCH,
        "lanes": 8,
        "samples": f"{steps} steps",
        "precision": "fp32",
        "workers": 2,
        "log_every": 1,
        "save_every": f"{EVERY} steps",
        "resume": True,
    }
    path = folder / f"{out.name}.json.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def started(config: Path) -> subprocess.Popen[bytes]:
    """The command, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with config.with_suffix(".said").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "pretrain", str(config)],
            stdout=said,
            stderr=said,
            env=environment,
        )


def logged(out: Path) -> int:
    """The last step in the log."""
    lines = run_folder.read_metrics(out / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def being_written(out: Path) -> set[tuple[str, int]]:
    """Checkpoints under way, or left by a kill."""
    found = set()
    for path in out.glob("checkpoints/*.writing"):
        try:
            found.add((path.name, path.stat().st_ctime_ns if any(path.iterdir()) else 0))
        except FileNotFoundError:
            continue
    return found


def wait(process: subprocess.Popen[bytes], happens: Callable[[], bool]) -> bool:
    """Until something happens, or the process ends."""
    while process.poll() is None:
        if happens():
            return True
        time.sleep(0.0005)
    return False


def killed(config: Path, out: Path, lives: Lives, chance: random.Random, life: float) -> bool:
    """One life; returns whether it was killed, and not over before."""
    left, before, at = being_written(out), logged(out), time.monotonic()
    saved = newest(out)
    process = started(config)
    if len(lives.seconds) % 2:
        wait(process, lambda: bool(being_written(out) - left))
        time.sleep(chance.uniform(0, 0.02))
    else:
        until = at + chance.uniform(0, life)
        path = out / "metrics.jsonl"
        size = path.stat().st_mtime_ns if path.exists() else 0
        fresh = wait(
            process,
            lambda: (
                time.monotonic() > until
                or (path.exists() and path.stat().st_mtime_ns != size and logged(out) > saved)
            ),
        )
        if fresh and time.monotonic() < until:
            lives.to_first_step.append(time.monotonic() - at)
            wait(process, lambda: time.monotonic() > until)
    process.send_signal(signal.SIGKILL)
    was_killed = process.wait() == -signal.SIGKILL
    lives.seconds.append(time.monotonic() - at)
    lives.in_writing += was_killed and bool(being_written(out) - left)
    lives.redone += max(0, max(before, logged(out)) - newest(out)) if was_killed else 0
    return was_killed


def newest(out: Path) -> int:
    """The step of the newest checkpoint."""
    steps = [
        int(path.name.removeprefix("step_"))
        for path in out.glob("checkpoints/step_*")
        if not path.suffix
    ]
    return max(steps, default=0)


def equal(out: Path, other: Path) -> bool:
    """Whether two runs logged the same numbers and ended with the same weights, to the bit."""
    lines = [
        [
            {key: one for key, one in line.items() if not (key in CLOCKS or key.endswith("_ms"))}
            for line in run_folder.read_metrics(run / "metrics.jsonl")
        ]
        for run in (out, other)
    ]
    weights = [(run / "bundle" / "model.safetensors").read_bytes() for run in (out, other)]
    return lines[0] == lines[1] and weights[0] == weights[1]


def measured(folder: Path, *, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """All of it."""
    pack(
        islice(demo.SPLITS["train"].records(), SAMPLES),
        folder / "data",
        samples_per_shard=256,
        shuffle_seed=0,
    )
    straight, out = folder / "straight", folder / "killed"
    at = time.monotonic()
    if started(configuration(folder, straight, steps=steps)).wait():
        raise RuntimeError((folder / "straight.json.said").read_text())
    undisturbed = time.monotonic() - at
    print(f"undisturbed: {steps} steps of {BATCH} in {undisturbed:.1f} s", flush=True)

    config, lives, chance = configuration(folder, out, steps=steps), Lives(), random.Random(seed)
    while len(lives.seconds) < kills:
        # So that all of them fit into the run: half of the lives get beyond a checkpoint or two.
        if not killed(config, out, lives, chance, life=undisturbed / 3):
            break
        step, number = newest(out), len(lives.seconds)
        print(f"kill {number:3d} after {lives.seconds[-1]:5.1f} s, saved: step {step}", flush=True)
    done, at = len(lives.seconds), time.monotonic()
    if started(config).wait():
        raise RuntimeError((folder / "killed.json.said").read_text())
    total = sum(lives.seconds) + time.monotonic() - at
    starts = sorted(lives.to_first_step)
    return {
        "kills": done,
        "kills_in_writing": lives.in_writing,
        "bit_equal": equal(out, straight),
        "steps": steps,
        "steps_taken_again": lives.redone,
        "undisturbed_s": round(undisturbed, 1),
        "lost_s_per_kill": round((total - undisturbed) / max(1, done), 2),
        "to_first_step_s": round(starts[len(starts) // 2], 2) if starts else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), kills=given.kills, steps=given.steps, seed=given.seed)
    equality = "equal to the bit" if found["bit_equal"] else "NOT EQUAL"
    print(
        f"{found['kills']} kills, {found['kills_in_writing']} of them in a checkpoint half "
        f"written: log and weights {equality}; {found['steps_taken_again']} steps taken again; "
        f"{found['lost_s_per_kill']} s lost per kill (median time to the first step: "
        f"{found['to_first_step_s']} s)"
    )
    print(json.dumps(found))
    if not found["bit_equal"] or found["kills"] < given.kills:
        sys.exit(1)


if __name__ == "__main__":
    main()
