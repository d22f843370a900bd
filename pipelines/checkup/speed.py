"""How fast each stage of a run is on its own data and model, and what that means for the whole."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from statistics import median

import numpy as np
import torch

from pipelines.checkup.memory import held_for_backward, peak_of
from pipelines.step import precision, step, tokenised
from pipelines.training import Training, make_loader, training_pictures
from shards.damage import BadSample
from shards.loader import Batch, ShardLoader, Source
from shards.manifest import CAPTION_FIELD, JSON_FIELD
from shards.read import ShardReader

# Shares of the time there is for measuring.
_READ, _DECODE, _AHEAD, _PICTURES, _GROW, _STEP = 0.05, 0.1, 0.15, 0.1, 0.3, 0.3
_BATCH = 32
_PROBE, _GROWTH = 2, 4
_POOL = 512
_MEMORY = 0.6


@dataclass(frozen=True)
class Stage:
    """A part of the run at one size of pictures; times are seconds per sample of a process.

    Attributes:
        image_size: Side of the pictures.
        first_step: Where it begins.
        steps: How long it is.
        augment_s: What changes the pictures, or resizes them.
        compute_s: Forward, backward, optimiser.
    """

    image_size: int
    first_step: int
    steps: int
    augment_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Seconds per sample, each stage alone in one process.

    Attributes:
        read_s: Bytes from where the shards lie.
        decode_s: Bytes into pictures and captions.
        ahead_s: Both, by the workers of the run while nothing else is done; the same as
            `read_s + decode_s` without workers.
        tokenise_s: Captions into tokens and labels.
        stages: The rest, stage by stage.
        batch: Samples of the step that was measured.
        activations: Bytes that a step of the run's batch holds at the largest pictures.
        finite: Whether gradients were numbers, or a lower scale of the loss (fp16) may mend them.
        one_thread: How many times as fast a step is with one thread instead of all.
    """

    read_s: float
    decode_s: float
    ahead_s: float
    tokenise_s: float
    stages: tuple[Stage, ...]
    batch: int
    activations: int
    finite: bool
    one_thread: float = 1.0


def stages_of(training: Training) -> list[Stage]:
    """The parts of what is left of a run, by the size of their pictures."""
    config, total = training.config, training.steps
    ends = [ceil(stage.until * total) for stage in config.stages] + [total]
    whole = config.model.image_size
    sizes = [*(stage.image_size or whole for stage in config.stages), whole]
    bounds = [training.step, *(max(training.step, end) for end in ends)]
    return [
        Stage(image_size, first, last - first)
        for image_size, (first, last) in zip(sizes, pairwise(bounds), strict=True)
        if last > first
    ]


def measure(
    training: Training, sources: list[Source], *, local_batch: int, free: int, seconds: float
) -> Rates:
    """Measure every stage of a run; its weights are changed by that.

    Args:
        training: The run.
        sources: Its data.
        local_batch: Samples that each process gets of a batch.
        free: Bytes of memory that can be had where the model is.
        seconds: About how long it may take.
    """
    config, began = training.config, training.step
    timing = _Loading(training, sources)
    read_s = timing.read(seconds * _READ)
    batches, decode_s = timing.decode(seconds * _DECODE)
    ahead_s = timing.ahead(seconds * _AHEAD) if config.workers else read_s + decode_s
    timing.close()
    some = _of_size(_longest_first(batches), min(local_batch, _BATCH))
    tokenise_s = _seconds(lambda: tokenised(training, some), seconds * _PICTURES / 2) / len(some)

    steps = _Steps(training, batches, local_batch=local_batch)
    last = Stage(config.model.image_size, training.steps - 1, 0)
    stages = sorted(stages_of(training) or [last], key=lambda stage: -stage.image_size)
    steps.grow(stages[0], free=free, seconds=seconds * _GROW)
    measured: list[Stage] = []
    for stage in stages:
        share = seconds / len(stages)
        training.step = stage.first_step
        augment_s = _seconds(lambda: _augment(training, some), share * _PICTURES / 2) / len(some)
        whole_s = steps.time(stage, share * _STEP)
        compute_s = max(whole_s - augment_s - tokenise_s, 0.0)
        measured.append(
            Stage(stage.image_size, stage.first_step, stage.steps, augment_s, compute_s)
        )
    one_thread = steps.one_thread(stages[-1])
    training.step = began
    return Rates(
        read_s=read_s,
        decode_s=decode_s,
        ahead_s=ahead_s,
        tokenise_s=tokenise_s,
        stages=tuple(sorted(measured, key=lambda stage: stage.first_step)),
        batch=steps.size,
        activations=steps.activations,
        finite=steps.finite,
        one_thread=one_thread,
    )


class _Loading:
    """Times what comes before the model, on the samples that the run would use next."""

    def __init__(self, training: Training, sources: list[Source]) -> None:
        self._training = training
        self._sources = sources
        self._start = training.step * training.config.batch_size
        self._loader = self._make(workers=0)
        self._rows: list[int] = []

    def _make(self, *, workers: int) -> ShardLoader:
        # Damage was looked at before; here it only shall not stop the clock.
        config = self._training.config.model_copy(
            update={
                "workers": workers,
                "batch_size": _BATCH,
                "max_bad_fraction": 1.0,
                "strict": False,
            }
        )
        return make_loader(config, self._sources, self._training.accelerator)

    def read(self, seconds: float) -> float:
        """Seconds per sample for its bytes, the first time they are asked for."""
        order = self._loader.order
        until, taken = time.perf_counter() + seconds, 0.0
        reader = ShardReader(self._loader.manifest)
        while time.perf_counter() < until or not self._rows:
            first = self._start + len(self._rows)
            rows = order.ids(np.arange(first, first + _BATCH, dtype=np.int64)).tolist()
            taken += self._read(reader, rows)
            self._rows += rows
        reader.close()
        return taken / len(self._rows)

    def decode(self, seconds: float) -> tuple[list[Batch], float]:
        """Batches, and seconds per sample to make them of bytes that were read just before."""
        self._loader.load_state_dict({"consumed": self._start})
        batches: list[Batch] = []
        times: list[float] = []
        until = time.perf_counter() + seconds
        # The first one opens files and looks at codecs.
        while len(times) < 2 or (time.perf_counter() < until):
            began = time.perf_counter()
            batch = next(self._loader)
            times.append(time.perf_counter() - began)
            if len(batches) * _BATCH < _POOL:
                batches.append(batch)
        reader = ShardReader(self._loader.manifest)
        again = self._rows[: len(times) * _BATCH]
        warm = self._read(reader, again) / len(again)
        reader.close()
        return batches, max(median(times[1:]) / _BATCH - warm, 1e-9)

    def ahead(self, seconds: float) -> float:
        """Seconds per sample of a loader with the run's workers."""
        with self._make(workers=self._training.config.workers) as loader:
            loader.load_state_dict({"consumed": self._start + len(self._rows)})
            for _ in range(self._training.config.workers):
                next(loader)
            count, began = 0, time.perf_counter()
            while count < _BATCH or time.perf_counter() < began + seconds:
                count += len(next(loader))
            return (time.perf_counter() - began) / count

    def close(self) -> None:
        self._loader.close()

    def _read(self, reader: ShardReader, rows: Sequence[int]) -> float:
        manifest = reader.manifest
        began = time.perf_counter()
        for row in sorted(rows):
            name = manifest.image_fields[int(manifest.image_choice[row])]
            try:
                reader.read(row, (name, CAPTION_FIELD, JSON_FIELD))
            except BadSample:
                continue
        return time.perf_counter() - began


@dataclass(frozen=True)
class _Timed:
    """One step: its samples, seconds with and without the optimiser, and the peak of memory."""

    size: int
    seconds: float
    derived_s: float
    peak: int


class _Steps:
    """Times steps at a few sizes of the batch; what does not grow with it is told apart.

    The optimiser takes the same time for any batch, and so do some other parts: from small ones
    alone, a large batch would seem far slower than it is. So the time is that of the optimiser and
    a line, `fixed_s + size * slope`. Memory is the peak that was met, and what the larger batch
    would hold more for its backward pass.
    """

    def __init__(self, training: Training, batches: Sequence[Batch], *, local_batch: int) -> None:
        self._training = training
        self._pool = _longest_first(batches)
        self._most = local_batch
        self._micro = min(training.config.micro_batch_size or local_batch, local_batch)
        self._several = 1 if self._micro == local_batch else 2
        self._warm = 0  # the size of pictures that the last step was at
        self._fixed_s = 0.0
        self._optimizer_s: list[float] = []
        self.size = 0
        self.activations = 0
        self.finite = True

    def grow(self, stage: Stage, *, free: int, seconds: float) -> None:
        """Enlarge the batch from a small one as far as time and memory allow."""
        until = time.perf_counter() + seconds
        # The first step makes the optimiser's moments; it counts where there is no time for more.
        small = self._step(stage, min(_PROBE * self._several, self._most))
        if small.seconds < seconds:
            small = self._step(stage, small.size)
        more = self._held(stage, 2 * small.size) - self._held(stage, small.size)
        each = max(1, more // small.size)
        large = small
        while large.size < self._most:
            room = (_MEMORY * free - large.peak) / each + large.size
            # Of the small one alone too little can be told, so one larger one is always tried.
            left = until - time.perf_counter() - (large.seconds - large.derived_s)
            left = max(left, seconds / 2 if large is small else 0.0)
            fits = left / large.derived_s * large.size
            size = int(min(_GROWTH * large.size, self._most, room, fits))
            if size < 2 * large.size and size < self._most:
                break
            large = self._step(stage, size)
            slope = (large.derived_s - small.derived_s) / (large.size - small.size)
            self._fixed_s = min(max(0.0, small.derived_s - slope * small.size), small.derived_s)
        trained = (one for one in self._training.objective.parameters() if one.requires_grad)
        gradients = sum(one.numel() * one.element_size() for one in trained)
        self.size = large.size
        met = ceil(large.size / self._pieces(large.size))
        self.activations = max(0, large.peak - gradients) + each * max(0, self._micro - met)

    def time(self, stage: Stage, seconds: float) -> float:
        """Seconds per sample of a whole step of the run's batch."""
        until = time.perf_counter() + seconds
        steps: list[_Timed] = []
        if self._warm != stage.image_size:
            # Counts where there is no time for another.
            first = self._step(stage, self.size)
            steps += [first] if time.perf_counter() + first.seconds > until else []
        while not steps or time.perf_counter() + steps[-1].seconds < until:
            steps.append(self._step(stage, self.size))
        derived_s = median(one.derived_s for one in steps)
        self._optimizer_s += [one.seconds - one.derived_s for one in steps]
        whole_s = self._fixed_s + median(self._optimizer_s)
        return max(0.0, derived_s - self._fixed_s) / self.size + whole_s / self._most

    def one_thread(self, stage: Stage) -> float:
        """How many times as fast a step is with one thread: on busy cores, many times."""
        threads = torch.get_num_threads()
        if self._training.accelerator.device.type != "cpu" or threads == 1:
            return 1.0
        together = self._step(stage, self.size).seconds
        torch.set_num_threads(1)
        try:
            return together / self._step(stage, self.size).seconds
        finally:
            torch.set_num_threads(threads)

    def _pieces(self, size: int) -> int:
        """Of a batch of that size; two at least where the run's has several: they cost more."""
        return max(min(self._several, size // _PROBE), ceil(size / self._micro), 1)

    @contextmanager
    def _in_pieces(self, size: int) -> Iterator[None]:
        config = self._training.config
        micro = ceil(config.batch_size / self._pieces(size))
        # The rows of a piece as the training understands them, whose own batch is larger.
        self._training.config = config.model_copy(update={"micro_batch_size": micro})
        try:
            yield
        finally:
            self._training.config = config

    def _step(self, stage: Stage, size: int) -> _Timed:
        training, batch = self._training, _of_size(self._pool, size)
        training.step = stage.first_step
        self._warm = stage.image_size
        with self._in_pieces(size), peak_of(training.accelerator.device) as peak:
            began = time.perf_counter()
            measured = step(training, batch)
            if training.accelerator.device.type == "cuda":
                torch.cuda.synchronize(training.accelerator.device)
            taken = time.perf_counter() - began
        mended = training.scale_can_fall and math.isfinite(measured["loss"])
        self.finite = self.finite and (bool(measured["finite"]) or mended)
        return _Timed(size, taken, taken - measured["optimizer_ms"] / 1000, peak.bytes)

    def _held(self, stage: Stage, size: int) -> int:
        """Bytes that a forward pass holds for the backward pass."""
        training, batch = self._training, _of_size(self._pool, size)
        training.step = stage.first_step
        pairs, _ = tokenised(training, batch)
        with held_for_backward() as held, precision(training):
            training.wrapped(pairs)
        return held.bytes


def _longest_first(batches: Sequence[Batch]) -> Batch:
    """The samples of several batches as one; every part then is as wide in tokens as the whole."""
    captions = [caption for batch in batches for caption in batch.captions]
    longest = max(range(len(captions)), key=lambda row: len(captions[row]))
    rows = [longest, *(row for row in range(len(captions)) if row != longest)]
    whole = Batch(
        images=torch.cat([batch.images for batch in batches]),
        captions=captions,
        all_captions=[one for batch in batches for one in batch.all_captions],
        ids=torch.cat([batch.ids for batch in batches]),
        keys=[key for batch in batches for key in batch.keys],
        fields=[fields for batch in batches for fields in batch.fields],
        epochs=torch.cat([batch.epochs for batch in batches]),
        consumed=batches[-1].consumed,
    )
    return _chosen(whole, rows)


def _of_size(pool: Batch, size: int) -> Batch:
    """A batch of any size: samples come again where there are too few."""
    return _chosen(pool, [row % len(pool) for row in range(size)])


def _chosen(batch: Batch, rows: list[int]) -> Batch:
    return Batch(
        images=batch.images[rows],
        captions=[batch.captions[row] for row in rows],
        all_captions=[batch.all_captions[row] for row in rows],
        ids=batch.ids[rows],
        keys=[batch.keys[row] for row in rows],
        fields=[batch.fields[row] for row in rows],
        epochs=batch.epochs[rows],
        consumed=batch.consumed,
    )


def _augment(training: Training, batch: Batch) -> None:
    training_pictures(training, batch)
    if training.accelerator.device.type == "cuda":
        torch.cuda.synchronize(training.accelerator.device)


def _seconds(action: Callable[[], object], budget: float) -> float:
    """Median time of an action, after one that warms up."""
    action()
    times: list[float] = []
    until = time.perf_counter() + budget
    while not times or time.perf_counter() < until:
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return median(times)
