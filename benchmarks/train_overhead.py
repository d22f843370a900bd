"""What logging, guards and checkpoints cost our trainer, as a share of its bare step.

    python -m benchmarks.train --overhead

The bare step is the objective derived, gradients cut, the optimiser's step, on batches of the same
loader. The loop is `pipelines.pretrain.train` as it is. Both train the same model in one process,
in blocks of a few steps that take turns: whenever the loop asks for the first batch of a block,
a bare block is run before it gets one, and every block of the loop writes one log line.

| figure | what it is |
|---|---|
| `loop_overhead` | seconds of a block of the loop over those of the bare ones around it, less 1 |
| `save_s` | seconds that a checkpoint takes, flushed to disk; the median |
| `save_overhead` | that over the seconds between checkpoints as the trainer has them by default |
| `overhead` | the sum of both |
"""

import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.train_sides import Task, our_config
from pipelines import pretrain
from pipelines.config import build
from pipelines.parallel import clip_gradients
from pipelines.progress import StopOnSignal
from pipelines.saving import Saver
from pipelines.schemas import PretrainConfig
from pipelines.step import derived_from, tokenised
from pipelines.training import Training
from pipelines.training import build as build_training
from pipelines.validation import Validation
from shards.loader import Batch, ShardLoader

SAVES = 5


class Turns:
    """The batches of a loader, with a bare block before each block of the loop that asks for them.

    Attributes:
        bare: seconds of each bare block.
        loop: seconds of the loop's block that followed it.
    """

    def __init__(self, training: Training, steps: int) -> None:
        self.bare: list[float] = []
        self.loop: list[float] = []
        self._training, self._steps = training, steps
        self._loader: ShardLoader = training.loader
        self._asked = 0
        self._since = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._asked % self._steps == 0:
            if self._asked:
                self.loop.append(_now() - self._since)
            started = _now()
            for _ in range(self._steps):
                bare_step(self._training, next(self._loader))
            self._since = _now()
            self.bare.append(self._since - started)
        self._asked += 1
        return next(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def bare_step(training: Training, batch: Batch) -> None:
    """The weights moved once, and nothing looked at."""
    pairs, _ = tokenised(training, batch)
    derived_from(training, pairs)
    clip_gradients(training.objective.parameters(), training.config.optimizer.max_grad_norm)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)


def overhead(task: Task, scratch: Path, *, rounds: int, steps: int) -> dict[str, float]:
    """Train in turns; see the head of this module.

    Args:
        task: what is trained.
        scratch: an empty folder's place is made in it.
        rounds: blocks that count; a first one warms up.
        steps: of a block, and between log lines.
    """
    torch.set_num_threads(task.threads)
    wanted = our_config(task, scratch / "run")
    # One step more than the blocks have: the end of the last is seen when the next is asked for.
    length = (rounds + 1) * steps + 1
    wanted |= {"samples": f"{length} steps", "log_every": steps}
    config = build(PretrainConfig, wanted, origin="the benchmark")
    accelerator = Accelerator(mixed_precision="no", cpu=task.device == "cpu")
    training = build_training(config, accelerator)
    config.out.mkdir(parents=True)
    with training.loader:
        turns = Turns(training, steps)
        training.loader = turns  # pyright: ignore[reportAttributeAccessIssue]
        saver = Saver(training)
        pretrain.train(training, saver, Validation(training), StopOnSignal())
        saves = []
        for _ in range(SAVES):
            training.step += 1  # or there would be a checkpoint already
            started = time.perf_counter()
            saver.save()
            saves.append(time.perf_counter() - started)
    return figures(turns.bare[1:], turns.loop[1:], saves, samples=steps * task.batch_size)


def figures(
    bare: list[float], loop: list[float], saves: list[float], *, samples: int
) -> dict[str, float]:
    """What the seconds of blocks and of checkpoints come to; `samples` are those of a block.

    Each block of the loop is compared to the mean of the bare ones before and behind it.
    """
    between = int(PretrainConfig.model_fields["save_every"].default)
    save = statistics.median(saves)
    around = [(before + after) / 2 for before, after in pairwise(bare)]
    pairs = zip(around, loop, strict=True)
    found = {
        "bare_samples_per_s": samples / statistics.median(bare),
        "loop_overhead": statistics.median(with_it / without for without, with_it in pairs) - 1,
        "save_s": save,
        "save_overhead": save * samples / statistics.median(bare) / between,
    }
    return {**found, "overhead": found["loop_overhead"] + found["save_overhead"]}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
