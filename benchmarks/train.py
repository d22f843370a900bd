"""Our trainer beside OpenCLIP's own, on the same model and the same data.

    python -m benchmarks.train                                     # the tiny model
    python -m benchmarks.train --model ViT-B-32 --batch-size 32 --turn 1 --rounds 5
    python -m benchmarks.train --overhead --turn 10 --rounds 20    # ours alone

Both are the real thing in processes of their own, with loader, logging and guards: `align pretrain`
(`pipelines.pretrain`) and `open_clip_train.main` of the installed OpenCLIP, which needs an older
webdataset and pandas in front on its path; pip puts them into a folder of the cache, the first time
or where `--peer` names. They take turns of a few steps, one running while the others are stopped,
in fp32 and in bf16; the precision that is clearly slower for a trainer is dropped after its first
turn. Rates are those of the turns, from the trainers' own logs, after steps to warm up; a ratio is
that of our better precision over their better one, the median over the rounds.

The model is OpenCLIP's for both, built from one configuration (`tiny`: pictures of 64 pixels in
patches of 16, width 192, 4 layers; texts of 32 tokens, width 128, 4 layers). Pictures are the
demo's emoji for models of up to 64 pixels, else synthetic photos of 500 x 375 pixels; both sides
crop them at random (90 to 100 % of the area) and do nothing else to them. Captions are composed of
names and keywords so that lengths spread as captions do: 12 tokens on the average, one in forty at
the limit; `benchmarks.train_data` says how. Optimiser, batch, threads and loader workers are equal.
The last line is JSON.

| figure | what it is |
|---|---|
| `tiny_ratio` | our samples per second over OpenCLIP's, the tiny model; `b32_ratio`: ViT-B-32 |
| `tiny_fp32_ratio`, `tiny_bf16_ratio` | the same in one precision, where both sides ran it |
| `overhead` | see `benchmarks.train_overhead` |
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer

from benchmarks import train_data
from benchmarks.encode import machine
from benchmarks.loader import peer_packages
from benchmarks.train_overhead import overhead
from benchmarks.train_sides import Task, Trainer, write_model

SLOWER = 0.8
"""A precision below this share of the same trainer's other one is dropped."""

_SHORT = {"ViT-B-32": "b32"}
_SMALL_PIXELS = 64
_PHOTOS = 512


def compare(
    tasks: Mapping[str, Task], packages: Path, *, rounds: int, turn: int, warm_up: int, out: Path
) -> dict[str, list[float]]:
    """Samples per second of each side and precision, round by round; see `dropped`.

    Args:
        tasks: by precision.
        packages: what OpenCLIP's trainer needs.
        rounds: turns of each, after a first one that chooses.
        turn: steps of a turn.
        warm_up: steps of each before the first turn.
        out: an empty folder.
    """
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        trainers: dict[str, Trainer] = {}
        for precision, task in tasks.items():
            for side in ("ours", "peer"):
                name = f"{side}_{precision}"
                made = Trainer(side, task, out / name, packages)
                trainers[name] = stack.enter_context(made)
                made.warm_up(warm_up)
        for name, trainer in trainers.items():
            found[name] = [trainer.turn(turn)]
            print(f"first turn of {name}: {found[name][0]:.2f} samples/s", flush=True)
        left = [name for name in trainers if name not in dropped(found)]
        for number in range(rounds):
            for name in left if number % 2 else reversed(left):
                found[name].append(trainers[name].turn(turn))
    return {name: rates[1:] if name in left and rounds else rates for name, rates in found.items()}


def dropped(first: Mapping[str, Sequence[float]]) -> set[str]:
    """The sides that are clearly slower than the same trainer in the other precision."""
    best = {
        side: max(rates[0] for name, rates in first.items() if name.startswith(side))
        for side in ("ours", "peer")
    }
    return {name for name, rates in first.items() if rates[0] < SLOWER * best[name.split("_")[0]]}


def ratios(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Ours over theirs: each trainer's best precision (`ratio`), and each precision by itself."""
    best = {
        side: max((name for name in found if name.startswith(side)), key=lambda n: _rate(found[n]))
        for side in ("ours", "peer")
    }
    pairs = {"ratio": (best["ours"], best["peer"])}
    for name in found:
        side, precision = name.split("_")
        if side == "ours" and f"peer_{precision}" in found:
            pairs[f"{precision}_ratio"] = (name, f"peer_{precision}")
    return {key: _ratio(found[ours], found[peer]) for key, (ours, peer) in pairs.items()}


def _rate(rates: Sequence[float]) -> float:
    return statistics.median(rates)


def _ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    if len(ours) == len(peer):
        return statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    return _rate(ours) / _rate(peer)  # one of them was dropped after its first turn


def caption_tokens(context: int) -> float:
    """Mean length of the captions, in tokens of a model's context."""
    tokenizer = SimpleTokenizer()
    texts = train_data.emoji_pairs()[1][:_PHOTOS]
    return statistics.fmean(min(context, len(tokenizer.encode(text)) + 2) for text in texts)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = torch.cuda.is_available()
    cache = Path(tempfile.gettempdir()) / "align-benchmarks"
    parser.add_argument("--model", default="tiny", help="tiny, or one of OpenCLIP's")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], help="fp32, bf16")
    parser.add_argument("--batch-size", type=int, default=1024 if cuda else 64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=8 if cuda else 1)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side that count")
    parser.add_argument("--turn", type=int, default=20, metavar="STEPS", help="steps of a turn")
    parser.add_argument("--log-every", type=int, help="steps between log lines; 10 or a turn")
    parser.add_argument("--augment", action="store_true", help="ours with all its augmentation")
    parser.add_argument("--overhead", action="store_true", help="ours beside its own bare step")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="where pip put its packages")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=cache, help=str(cache))
    chosen = parser.parse_args()
    if unknown := set(chosen.precision) - {"fp32", "bf16"}:
        parser.error(f"--precision {unknown.pop()}: fp32 or bf16")
    return chosen


def main() -> None:
    chosen = options()
    # Else trainers that are stopped would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(chosen.model, Path(scratch))
        wanted = json.loads((model / "open_clip_config.json").read_text())["model_cfg"]
        small = wanted["vision_cfg"]["image_size"] <= _SMALL_PIXELS
        data = (
            train_data.emoji(chosen.cache)
            if small
            else train_data.photos(chosen.cache, count=_PHOTOS)
        )
        log_every = chosen.log_every or min(10, chosen.turn)
        task = Task(
            model=model,
            data=data,
            batch_size=chosen.batch_size,
            precision=chosen.precision[0],
            threads=chosen.threads,
            workers=chosen.workers,
            log_every=log_every,
            device=chosen.device,
            augment=chosen.augment,
        )
        figures: dict[str, Any] = {"model": chosen.model, "batch_size": chosen.batch_size}
        figures["caption_tokens"] = caption_tokens(wanted["text_cfg"]["context_length"])
        if chosen.overhead:
            figures |= overhead(task, Path(scratch), rounds=chosen.rounds, steps=chosen.turn)
        else:
            found = compare(
                {name: task.with_precision(name) for name in chosen.precision},
                chosen.peer or peer_packages(chosen.cache),
                rounds=chosen.rounds,
                turn=chosen.turn,
                warm_up=log_every,
                out=Path(scratch) / "runs",
            )
            print(f"{'samples per second':<24} {'median':>9} {'min':>9} {'max':>9} {'turns':>6}")
            for name, rates in found.items():
                line = f"{name:<24} {_rate(rates):9.2f} {min(rates):9.2f} {max(rates):9.2f}"
                print(f"{line} {len(rates):6}")
                figures[f"{name}_samples_per_s"] = _rate(rates)
            short = _SHORT.get(chosen.model, chosen.model)
            figures |= {f"{short}_{key}": value for key, value in ratios(found).items()}
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name:<34} {value:9.4g}")
            figures[name] = float(f"{value:.4g}")
    told = {**machine(torch.device(chosen.device)), "threads": chosen.threads}
    print(json.dumps({**figures, "workers": chosen.workers, **told}))


if __name__ == "__main__":
    main()
