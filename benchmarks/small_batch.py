"""Small batches: the global contrastive loss beside InfoNCE, at equal samples.

    python -m benchmarks.small_batch

The demo's model, optimiser and augmentation on its built-in emoji, at a small batch; `--small` has
narrower towers, smaller pictures and AdamW in fp32, which is many times quicker where bf16 and the
demo's optimiser are slow. Both losses train with the same seeds, and so from the same weights on
the same batches; what is measured is recall@1 on the artist that is held out (no skin tones), from
pictures to texts, from texts to pictures, and the mean of both. Intervals are Student's over the
seeds, at 95 %; the difference is taken seed by seed. The last line is JSON.

| figure | what it is |
|---|---|
| `infonce`, `global_contrastive` | mean over the seeds of the mean recall@1 |
| `difference` | global contrastive less InfoNCE |
| `difference_low`, `difference_high` | its interval |
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from pipelines import pretrain, run_folder
from pipelines.cli import shipped
from pipelines.config import build, override, parse_value, read_yaml, value_for
from pipelines.schemas import PretrainConfig
from shards import demo
from shards.packing import pack

LOSSES = ("infonce", "global_contrastive")
OPTIONS: dict[str, Any] = {"gamma": 0.8, "gamma_visits": 1, "rho": 6.5, "eps": 1e-14}
"""Of the global contrastive loss: the authors', gamma as they have it for few epochs; not tuned."""
SMALL = (
    "precision=fp32",
    *("optimizer.name=adamw", "optimizer.learning_rate=0.002", "optimizer.weight_decay=0.1"),
    "optimizer.options={betas: [0.9, 0.95]}",
    "model.image.options={mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25], "
    "channels: [32, 64, 128, 192]}",
    *("model.text.options.hidden_size=128", "model.text.options.intermediate_size=256"),
    *("model.image_size=32", "augment.decode_size=40", "stages=[]"),
)
"""Narrower towers on pictures of 32 pixels, in fp32 with AdamW: for a machine without AMX."""
FIGURES = ("image_to_text_recall@1", "text_to_image_recall@1")


def configuration(folder: Path, loss: str, seed: int, chosen: argparse.Namespace) -> PretrainConfig:
    """The demo's training, with another loss, batch, length and seed."""
    values = dict(read_yaml(shipped("demo"))["pretrain"])
    options = {"options": chosen.options} if loss == "global_contrastive" else {}
    values |= {
        "data": str(folder / "train"),
        "out": str(folder / f"{loss}-{seed}"),
        "loss": {"name": loss, "temperature": 0.07, "min_temperature": 0.02, **options},
        "batch_size": chosen.batch_size,
        "samples": chosen.samples // chosen.batch_size * chosen.batch_size,
        "save_every": chosen.samples,
        "seed": seed,
    }
    values["validation"] |= {"data": str(folder / "vendor"), "every": chosen.samples}
    for key, _, value in (one.partition("=") for one in chosen.set):
        override(values, key, value_for(PretrainConfig, key, value))
    return build(PretrainConfig, values, origin="benchmarks.small_batch")


def measured(config: PretrainConfig) -> dict[str, float]:
    """What a run of its own reaches."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    said = config.out.parent / f"{config.out.name}.txt"
    with said.open("w") as sink, contextlib.redirect_stdout(sink):
        pretrain.run(config)
    lines = run_folder.read_metrics(config.out / "metrics.jsonl")
    last = [line for line in lines if FIGURES[0] in line][-1]
    recalls = {name: float(last[name]) for name in FIGURES}
    temperature = [line["temperature"] for line in lines if "temperature" in line][-1]
    seconds = time.perf_counter() - started
    mean = float(np.mean(list(recalls.values())))
    return {**recalls, "mean": mean, "temperature": temperature, "seconds": seconds}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and ends of Student's interval at 95 %; without width where there is one value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, mean, mean
    error = float(np.std(values, ddof=1)) / count**0.5
    reach = float(student.ppf(0.975, count - 1)) * error
    return mean, mean - reach, mean + reach


def compare(folder: Path, chosen: argparse.Namespace) -> dict[tuple[str, int], dict[str, float]]:
    """What every run reached, by loss and seed."""
    for split in ("train", "vendor"):
        pack(demo.SPLITS[split].records(), folder / split, samples_per_shard=1000, shuffle_seed=0)
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
    tasks = [(loss, seed) for seed in seeds for loss in chosen.losses]
    found = {}
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.processes, mp_context=context) as pool:
        runs = {pool.submit(measured, configuration(folder, *task, chosen)): task for task in tasks}
        for run in as_completed(runs):
            task = loss, seed = runs[run]
            one = found[task] = run.result()
            print(
                f"{loss:<20} seed {seed:<4} {one['mean']:.4f}  temperature "
                f"{one['temperature']:.4f}  {one['seconds']:.0f} s",
                flush=True,
            )
    return found


def row(name: str, values: Iterable[float]) -> str:
    """A line of the table, in percent."""
    mean, low, high = interval(list(values))
    return f"{name:<44} {100 * mean:7.2f} {100 * low:7.2f} {100 * high:7.2f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64, help="a multiple of 64")
    parser.add_argument("--samples", type=int, default=25_600, help="that a run trains on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="runs side by side")
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument(
        *("--options", "-o"),
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help=f"of the global contrastive loss; {OPTIONS} unless stated",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of the training of both, such as optimizer.name=adamw",
    )
    parser.add_argument("--small", action="store_true", help="narrower towers, small pictures")
    chosen = parser.parse_args()
    chosen.set = [*(SMALL if chosen.small else ()), *chosen.set]
    given = (one.partition("=") for one in chosen.options)
    chosen.options = OPTIONS | {key: parse_value(value) for key, _, value in given}
    return chosen


def main() -> None:
    chosen = arguments()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), chosen)
    print(
        f"\nbatch {chosen.batch_size}, {chosen.samples:,} samples, {chosen.seeds} seeds from "
        f"{chosen.first_seed}; global_contrastive with {chosen.options}"
        + (f"; both with {' '.join(chosen.set)}" if chosen.set else "")
    )
    print(f"{'recall@1, %':<44} {'mean':>7} {'low':>7} {'high':>7}")
    figures: dict[str, Any] = {}
    for name in (*FIGURES, "mean"):
        by_loss = {
            loss: [one[name] for (which, _), one in sorted(found.items()) if which == loss]
            for loss in chosen.losses
        }
        for loss, values in by_loss.items():
            print(row(f"{name}, {loss}", values))
            if name == "mean":
                figures[loss] = interval(values)[0]
        if len(by_loss) == 2:
            pairs = zip(by_loss["global_contrastive"], by_loss["infonce"], strict=True)
            differences = [ours - theirs for ours, theirs in pairs]
            print(row(f"{name}, difference", differences))
            if name == "mean":
                keys = ("difference", "difference_low", "difference_high")
                figures |= dict(zip(keys, interval(differences), strict=True))
    rounded = {name: round(value, 5) for name, value in figures.items()}
    told = {
        name: getattr(chosen, name) for name in ("batch_size", "samples", "seeds", "options", "set")
    }
    machine = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    print(json.dumps({**rounded, **told, **machine}))


if __name__ == "__main__":
    main()
