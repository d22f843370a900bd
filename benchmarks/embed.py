"""`align embed` beside clip-retrieval's own inference, on the same model and the same shards.

    python -m benchmarks.embed --peer PYTHON              # PYTHON: an interpreter that has it
    python -m benchmarks.embed --model ViT-B-16 --count 128 --rounds 5 --peer PYTHON
    python -m benchmarks.embed                            # ours alone

Both are the real thing in processes of their own: `python -m pipelines.embed`, and the worker that
`clip-retrieval inference` starts, which reads the model as `open_clip:NAME/FILE`. The model is one
of OpenCLIP's with random weights, saved once; the shards are those of `benchmarks.train`: synthetic
photos of 500 x 375 pixels with captions whose lengths spread as captions do (12 tokens on the
average, one in forty at the limit). Batch, threads and loader workers are equal, both embed
pictures and texts into float16 and write vectors and metadata. They take turns, one process after
the other. Rates are from their own logs, without imports and loading of the model: ours from the
first read to the last file, the peer's the sum over its batches, without its last write.

On a CPU the peer computes in fp32 whatever one asks for, so fp32 is what both are timed in there;
on CUDA it is bf16 for both. The last line is JSON.

| figure | what it is |
|---|---|
| `embed_ratio` | our samples per second over the peer's, the median over the rounds |
| `image_cosine`, `text_cosine` | the least between our row and the peer's of the same sample |
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from benchmarks import train_data
from benchmarks.encode import machine
from benchmarks.train_sides import write_model
from eval.table import EmbeddingTable, unit_rows

INSTALL = """to compare, an environment of its own with Python 3.11:
    python3.11 -m venv PEER && PEER/bin/pip install clip-retrieval==2.45.0 "numpy<2" "pyarrow<16"
    python -m benchmarks.embed --peer PEER/bin/python"""
_PEER = """
import json, sys
from clip_retrieval.clip_inference.worker import worker
worker(tasks=[0], output_partition_count=1, input_format="webdataset", use_jit=False,
       **json.loads(sys.argv[1]))
"""


@dataclass(frozen=True)
class Task:
    """What both sides do.

    Attributes:
        name: of OpenCLIP's model.
        model: its folder, weights and all.
        data: a folder of shards.
        samples: how many there are.
        batch_size: samples at a time.
        precision: fp32 or bf16.
        threads: of a process's own computations.
        workers: threads of ours and processes of the peer's that decode pictures.
    """

    name: str
    model: Path
    data: Path
    samples: int
    batch_size: int
    precision: str
    threads: int
    workers: int

    @property
    def environment(self) -> dict[str, str]:
        """Of either process."""
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        return {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def saved_model(name: str, folder: Path) -> Path:
    """A folder in OpenCLIP's format, with random weights."""
    place = write_model(name, folder)
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, place / "open_clip_model.safetensors")
    return place


def ours(task: Task, out: Path) -> float:
    """Embed with ours; samples per second."""
    command = [sys.executable, "-m", "pipelines.embed", task.model, task.data, out]
    command += [f"batch_size={task.batch_size}", f"workers={task.workers}"]
    command += [f"precision={task.precision}"]
    said = _run([str(part) for part in command], task)
    print(said.strip().splitlines()[-1], flush=True)
    found = re.search(r", ([0-9.]+) samples/s", said)
    assert found, said
    return float(found[1])


def peer(task: Task, out: Path, python: Path) -> float:
    """Embed with clip-retrieval; samples per second."""
    given = {
        "input_dataset": sorted(str(path) for path in task.data.glob("*.tar")),
        "output_folder": str(out),
        "batch_size": task.batch_size,
        "num_prepro_workers": task.workers,
        "enable_metadata": False,
        "clip_model": f"open_clip:{task.name}/{task.model / 'open_clip_model.safetensors'}",
    }
    _run([str(python), "-c", _PEER, json.dumps(given)], task)
    said = json.loads((out / "stats" / "0.json").read_text())
    if said["sample_count"] != task.samples:
        raise SystemExit(f"clip-retrieval embedded {said['sample_count']} of {task.samples}")
    return said["sample_count"] / said["total_duration"]


def _run(command: list[str], task: Task) -> str:
    done = subprocess.run(
        command, env=task.environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ...\n{done.stdout}\n{done.stderr}")
    return done.stdout


def agreement(table: Path, theirs: Path) -> dict[str, float]:
    """The least cosine between the two sides' rows of one sample, by kind."""
    mine = EmbeddingTable(table)
    paths = sorted((theirs / "metadata").glob("*.parquet"))
    said = pa.concat_tables([parquet.read_table(path) for path in paths])
    # Keys begin anew in every shard, and the peer does not say which shard a row is from.
    place = {name: row for row, name in enumerate(_names(said, "image_path"))}
    rows = [place[name] for name in _names(mine.metadata(), "key")]
    found = {}
    for kind, folder in {"image": "img_emb", "text": "text_emb"}.items():
        parts = [np.load(path) for path in sorted((theirs / folder).glob("*.npy"))]
        their_rows = unit_rows(np.concatenate(parts))[rows]
        found[f"{kind}_cosine"] = float((mine.vectors(kind) * their_rows).sum(axis=1).min())
    return found


def _names(metadata: pa.Table, key: str) -> list[tuple[str, str]]:
    return list(zip(metadata[key].to_pylist(), metadata["caption"].to_pylist(), strict=True))


def compare(task: Task, python: Path | None, *, rounds: int, out: Path) -> dict[str, Any]:
    """Samples per second of both, in turns; the figures."""
    rates: dict[str, list[float]] = {"ours": []} if python is None else {"ours": [], "peer": []}
    for number in range(rounds):
        for side in rates if number % 2 == 0 else reversed(rates):
            place = out / f"{side}-{number}"
            if side == "peer" and python is not None:
                rates[side].append(peer(task, place, python))
            else:
                rates[side].append(ours(task, place))
            print(f"round {number}, {side}: {rates[side][-1]:.2f} samples/s", flush=True)
    figures: dict[str, Any] = {
        f"{side}_samples_per_s": statistics.median(found) for side, found in rates.items()
    }
    if python is not None:
        pairs = zip(rates["ours"], rates["peer"], strict=True)
        figures["embed_ratio"] = statistics.median(mine / other for mine, other in pairs)
        figures |= agreement(out / "ours-0", out / "peer-0")
    return figures


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = torch.cuda.is_available()
    cache = Path(tempfile.gettempdir()) / "align-benchmarks"
    parser.add_argument("--model", default="ViT-B-32", help="one of OpenCLIP's")
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="one that has clip-retrieval")
    parser.add_argument("--count", type=int, default=16384 if cuda else 256, help="samples")
    parser.add_argument("--batch-size", type=int, default=256 if cuda else 64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if cuda else "fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=cache, help=str(cache))
    chosen = parser.parse_args()
    if chosen.precision == "bf16" and not cuda and chosen.peer:
        parser.error("--precision bf16: clip-retrieval computes in fp32 on a CPU")
    return chosen


def told(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Print the figures, rounded."""
    for name, value in figures.items():
        print(f"{name:<24} {value:9.4g}")
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def main() -> None:
    chosen = options()
    with tempfile.TemporaryDirectory() as scratch:
        task = Task(
            name=chosen.model,
            model=saved_model(chosen.model, Path(scratch)),
            data=train_data.photos(chosen.cache, count=chosen.count),
            samples=chosen.count,
            batch_size=chosen.batch_size,
            precision=chosen.precision,
            threads=chosen.threads,
            workers=chosen.workers,
        )
        found = compare(task, chosen.peer, rounds=chosen.rounds, out=Path(scratch) / "runs")
    if chosen.peer is None:
        print(INSTALL)
    figures = told(found)
    asked = {key: getattr(chosen, key) for key in ("model", "count", "batch_size", "precision")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rest = {**machine(device), "threads": chosen.threads, "workers": chosen.workers}
    print(json.dumps({**asked, **figures, **rest}))


if __name__ == "__main__":
    main()
