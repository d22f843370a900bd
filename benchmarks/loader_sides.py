"""The two pipelines that `benchmarks.loader` compares, each in a process of its own.

A side reads what to do as JSON from its first argument. It then goes once through its data for
every line on standard input, and answers each time with one line of JSON: images, seconds of CPU
and of wall time, and the memory it holds.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

BATCH_SIZE = 64
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def ours(folder: str, size: int, samples: int, finish: str) -> Callable[[], Iterator[Tensor]]:
    """Our loader with OpenCLIP's crops; `finish` is "uint8" or "float" (normalised on the CPU)."""
    from shards.crop import RandomCrop
    from shards.loader import ShardLoader

    mean = 255 * torch.tensor(_MEAN).view(1, 3, 1, 1)
    scale = 1 / (255 * torch.tensor(_STD).view(1, 3, 1, 1))
    loader = ShardLoader(folder, batch_size=BATCH_SIZE, image_size=size, crop=RandomCrop(0))

    def epoch() -> Iterator[Tensor]:
        for _ in range(samples // BATCH_SIZE):
            images = next(loader).images
            yield images if finish == "uint8" else (images - mean).mul_(scale)

    return epoch


def peer(folder: str, size: int, samples: int) -> Callable[[], Iterator[Tensor]]:
    """OpenCLIP's training pipeline with its own transform; captions stay texts, as in ours."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    options = argparse.Namespace(
        train_data=f"{folder}/00000.tar", train_num_samples=samples, dataset_resampled=False,
        train_data_upsampling_factors=None, seed=0, batch_size=BATCH_SIZE, workers=0, world_size=1,
    )  # fmt: skip
    transform = open_clip.image_transform(size, is_train=True)
    found = get_wds_dataset(
        options, transform, is_train=True, floor=True, tokenizer=lambda text: [text]
    )
    passes = iter(range(sys.maxsize))

    def epoch() -> Iterator[Tensor]:
        found.set_epoch(next(passes))
        for images, _ in found.dataloader:
            yield images

    return epoch


def resume(folder: str, consumed: int) -> None:
    """Prints how long it takes until the first batch after `consumed` samples."""
    from shards.loader import ShardLoader
    from shards.manifest import Manifest

    started = time.perf_counter()
    with ShardLoader(Manifest.open(folder), batch_size=BATCH_SIZE, image_size=64) as loader:
        loader.load_state_dict({"consumed": consumed})
        batch = next(loader)
        seconds = time.perf_counter() - started
    assert len(batch) == BATCH_SIZE
    assert batch.consumed == consumed + BATCH_SIZE
    print(json.dumps({"resume_s": seconds}), flush=True)


def resident_mib() -> float:
    """Memory this process holds; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 2**20


def _answer(epoch: Callable[[], Iterator[Tensor]]) -> None:
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        images = sum(len(batch) for batch in epoch())
        answer = {
            "images": images,
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - wall,
            "resident_mib": resident_mib(),
        }
        print(json.dumps(answer), flush=True)


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # one core each, whatever a library may start
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sides = {"ours": ours, "peer": peer}
    side = task.pop("side")
    if side == "resume":
        resume(**task)
    else:
        _answer(sides[side](**task))


if __name__ == "__main__":
    main()
