"""Our loader beside OpenCLIP's training pipeline, and what resuming costs.

    python -m benchmarks.loader

Both sides read the same tar from a warm page cache with one torch thread on one core, in turns, and
decode in the process itself: ours with `RandomCrop`, OpenCLIP's (`open_clip_train.data`) with its
own `RandomResizedCrop`. A rate is images per second of CPU time, up to what the training loop is
handed: normalised float32 from OpenCLIP, uint8 from ours; `photos_ratio_float` adds the same
normalisation on the CPU to ours. Ratios are medians over the rounds. The last line is JSON.

| figure | what it is |
|---|---|
| `photos_ratio` | our rate over OpenCLIP's on photos, to 224 pixels |
| `photos_psnr_db` | our crops against those of Pillow and torchvision, with the same boxes |
| `small_ratio` | our rate over OpenCLIP's on WebP of 64 pixels |
| `resume_s` | seconds from opening 2,000,000 samples to the first batch after half of them |
| `memory_growth` | growth of our memory from the end of the first epoch to the fifth, as a share |
"""

import argparse
import importlib.metadata
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resized_crop

from benchmarks import loader_data
from benchmarks.loader_sides import BATCH_SIZE
from shards.crop import RandomCrop
from shards.decode import decode_square
from shards.manifest import Manifest
from shards.native import NATIVE
from shards.read import ShardReader

PEER_PACKAGES = ("webdataset==0.2.86", "pandas", "python-dateutil", "six")
"""What `open_clip_train` needs in front of what is installed: it fails with a newer webdataset."""

PHOTO_PIXELS, EMOJI_PIXELS = 224, 64


class Side:
    """A pipeline in a process of its own; see `benchmarks.loader_sides`."""

    def __init__(self, peer: Path | None = None, **task: Any) -> None:
        path = [str(peer)] if peer else []
        path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.loader_sides", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def answer(self) -> dict[str, float]:
        """One pass over its data."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmarks.loader: a pipeline failed: {self.process.args}")
        return json.loads(line)

    def rate(self) -> float:
        """Images per second of CPU time, over one pass."""
        found = self.answer()
        return found["images"] / found["cpu_s"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def rates(folder: Path, size: int, peer: Path, *, rounds: int) -> dict[str, list[float]]:
    """Rates of OpenCLIP's pipeline, ours, and ours with normalised floats, round by round."""
    samples = len(Manifest.open(folder)) // BATCH_SIZE * BATCH_SIZE
    if not samples:
        raise SystemExit(f"{folder} holds fewer pictures than a batch of {BATCH_SIZE}")
    task = {"folder": str(folder), "size": size, "samples": samples}
    with (
        Side(peer, side="peer", **task) as theirs,
        Side(side="ours", finish="uint8", **task) as ours,
        Side(side="ours", finish="float", **task) as ours_float,
    ):
        sides = {"peer": theirs, "ours": ours, "ours_float": ours_float}
        for side in sides.values():  # a first pass to warm up
            side.answer()
        found: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                found[name].append(side.rate())
    return found


def ratio(found: dict[str, list[float]], name: str) -> float:
    """How often a side's rate is the peer's, as the median over the rounds."""
    pairs = zip(found[name], found["peer"], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def memory_growth(folder: Path) -> float:
    """Growth of what our process holds from the end of the first epoch to that of the fifth."""
    samples = len(Manifest.open(folder)) // BATCH_SIZE * BATCH_SIZE
    task = {"folder": str(folder), "size": PHOTO_PIXELS, "samples": samples, "finish": "uint8"}
    with Side(side="ours", **task) as side:
        held = [side.answer()["resident_mib"] for _ in range(5)]
    return held[-1] / held[0] - 1


def resume_seconds(folder: Path, samples: int, *, runs: int) -> float:
    """Seconds until the first batch after half of the samples, in fresh processes; the median."""
    Manifest.open(folder)  # scans the shards, once and for all
    seconds = []
    for _ in range(runs):
        with Side(side="resume", folder=str(folder), consumed=samples // 2) as side:
            seconds.append(side.answer()["resume_s"])
    return statistics.median(seconds)


def psnr(folder: Path, *, most: int) -> float:
    """How near our crops, as training reads them, are to those of Pillow and torchvision, in dB.

    It is that of the mean squared error over all pictures, so that equal ones make up for none.
    """
    manifest = Manifest.open(folder)
    reader, crop = ShardReader(manifest), RandomCrop(0)
    ids = np.arange(min(most, len(manifest)))
    rows = crop.draws(ids, np.zeros_like(ids))
    errors = []
    for number, row in zip(ids.tolist(), rows, strict=True):
        data = next(iter(reader.read(number, manifest.image_fields).values()))
        ours = decode_square(
            data,
            PHOTO_PIXELS,
            crop=lambda h, w, row=row: crop.box(row, h, w),
            fidelity="fast",
        )
        photo = Image.open(io.BytesIO(data)).convert("RGB")
        box = crop.box(row, photo.height, photo.width)
        theirs = resized_crop(
            photo,  # pyright: ignore[reportArgumentType]
            box.top, box.left, box.height, box.width,
            [PHOTO_PIXELS, PHOTO_PIXELS], InterpolationMode.BICUBIC,
        )  # fmt: skip
        expected = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
        errors.append((ours.double() - expected).square().mean().item())
    reader.close()
    error = statistics.fmean(errors)
    return 10 * math.log10(255**2 / error) if error else math.inf


def peer_packages(cache: Path) -> Path:
    """A folder with `PEER_PACKAGES`, installed by pip where it is not there yet."""
    folder = cache / "peer"
    if not (folder / "webdataset").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--target", str(folder), *PEER_PACKAGES]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"pip failed; name a folder with {', '.join(PEER_PACKAGES)} by --peer")
    return folder


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    packages = ("torch", "torchvision", "pillow", "open_clip_torch")
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cache = Path(tempfile.gettempdir()) / "align-benchmarks"
    parser.add_argument("--photos", type=Path, metavar="TAR", help="photos; synthetic unless given")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="where pip put its packages")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=cache, help=str(cache))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="little data, one round: a smoke test")
    chosen = parser.parse_args()
    if chosen.photos is not None and not chosen.photos.is_file():
        parser.error(f"--photos {chosen.photos}: no such file")
    return chosen


def main() -> None:
    chosen = options()
    rounds, count, tiny = (1, 128, 1000) if chosen.quick else (chosen.rounds, 512, 100_000)
    peer = chosen.peer or peer_packages(chosen.cache)
    photos = loader_data.photos(chosen.cache, count=count, tar=chosen.photos)
    emoji = loader_data.emoji(chosen.cache)
    many = loader_data.tiny(chosen.cache, shards=20, samples=tiny)

    on_photos = rates(photos, PHOTO_PIXELS, peer, rounds=rounds)
    on_emoji = rates(emoji, EMOJI_PIXELS, peer, rounds=rounds)
    print(f"{'images per CPU second':<34} {'median':>9} {'min':>9} {'max':>9} {'ratio':>7}")
    for data, found in (("photos", on_photos), ("emoji", on_emoji)):
        for name, values in found.items():
            line = f"{data}, {name}".ljust(34) + f" {statistics.median(values):9.0f}"
            print(f"{line} {min(values):9.0f} {max(values):9.0f} {ratio(found, name):7.2f}")
    figures = {
        "photos_ratio": ratio(on_photos, "ours"),
        "photos_ratio_float": ratio(on_photos, "ours_float"),
        "photos_psnr_db": psnr(photos, most=count),
        "small_ratio": ratio(on_emoji, "ours"),
        "small_ratio_float": ratio(on_emoji, "ours_float"),
        "resume_s": resume_seconds(many, 20 * tiny, runs=rounds),
        "memory_growth": memory_growth(photos),
    }
    for name, value in figures.items():
        print(f"{name:<34} {value:9.3f}")
    figures = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({**figures, "decoders": NATIVE.states, **machine()}))


if __name__ == "__main__":
    main()
