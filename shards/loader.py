"""Batches: an endless, resumable stream for training, and one pass in order for everything else."""

from collections.abc import Generator, Iterator, Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shards.batch import Augment, Batch, Decoder, Draft, Picture
from shards.damage import DamageTally, Problem
from shards.decode import Limits
from shards.manifest import Manifest
from shards.order import Order
from shards.prefetch import ordered_map

# Far more than bad luck needs: at half of all samples bad, one place in 10^19 is left empty.
_SUBSTITUTE_ATTEMPTS = 64


class ShardLoader:
    """An endless iterator of training batches whose whole state is one integer.

    Global batch `k` holds the samples at positions `k * batch_size ... (k + 1) * batch_size - 1` of
    `Order`, whatever the number of ranks and workers; a rank gets those with
    `position % world_size == rank`. Each epoch holds every sample once; the last batch of an epoch
    is filled up from the next one. Bad samples are counted, listed, and replaced by others that
    depend on the position alone.

        with ShardLoader("pairs/", batch_size=256, image_size=224, workers=2) as loader:
            loader.load_state_dict({"consumed": 51200})  # go on where another run stopped
            for batch in loader:
                ...

    Args:
        data: A manifest, or the folder of a data set.
        batch_size: Samples of a batch over all ranks; a multiple of `world_size`.
        image_size: Side of the pictures in pixels.
        seed: Names the order.
        lanes: See `Order`; fixed for a run, and a multiple of every `world_size` it may have.
        window: See `Order`.
        rank: Which share of each batch this process gets.
        world_size: Number of processes that share each batch.
        workers: Background threads that decode; 0 decodes when a batch is asked for.
        augment: Makes the pictures of a batch from the decoded ones.
        decode_size: Side of the pictures handed to `augment`; `image_size` unless stated.
        channels: 3 lays transparent pictures onto white; 4 keeps their alpha channel.
        limits: What a sample may ask for.
        max_bad_fraction: Share of bad samples above which the run stops.
        strict: Stop at the first bad sample.

    Raises:
        ValueError: If options contradict each other, or the data set is empty or damaged.
        FileNotFoundError: If there is no such data set.
    """

    def __init__(
        self,
        data: Manifest | Path | str,
        *,
        batch_size: int,
        image_size: int,
        seed: int = 0,
        lanes: int = 64,
        window: int = 4096,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        augment: Augment | None = None,
        decode_size: int | None = None,
        channels: int = 3,
        limits: Limits | None = None,
        max_bad_fraction: float = 0.05,
        strict: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie in 0 ... world_size - 1 = {world_size - 1}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} is not a multiple of {world_size} ranks")
        if lanes % world_size:
            raise ValueError(
                f"lanes={lanes} is not a multiple of {world_size} ranks; choose one that is, such "
                f"as {-(-lanes // world_size) * world_size}, and keep it for the whole run"
            )
        if workers < 0:
            raise ValueError(f"workers={workers} must not be negative")
        self.manifest = data if isinstance(data, Manifest) else Manifest.open(data)
        sizes = [shard.samples for shard in self.manifest.shards]
        self.order = Order(sizes, seed=seed, lanes=lanes, window=window)
        self.batch_size = batch_size
        self.consumed = 0
        self._rank, self._world_size, self._workers = rank, world_size, workers
        picture = Picture(image_size, channels, decode_size, augment, limits or Limits())
        self._decoder = Decoder(self.manifest, picture)
        self._tally = DamageTally(
            total=len(self.manifest), max_fraction=max_bad_fraction, strict=strict
        )
        self._stream: Generator[tuple[Batch, list[Problem]]] | None = None

    @property
    def num_samples(self) -> int:
        """Samples in the data set, that is, positions per epoch."""
        return self.order.total

    def __iter__(self) -> "ShardLoader":
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            starts = count(self.consumed, self.batch_size)
            ahead = 2 * self._workers
            self._stream = ordered_map(self._build, starts, workers=self._workers, ahead=ahead)
        try:
            batch, problems = next(self._stream)
            self._tally.add(len(batch), problems, replaced=True)
        except BaseException:
            self._stop()
            raise
        self.consumed = batch.consumed
        return batch

    def state_dict(self) -> dict[str, int]:
        """The state: samples consumed so far, over all ranks."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after `state["consumed"]` samples; costs a seek, not a replay.

        Args:
            state: What `state_dict` returned, here or in a run with other ranks or workers.

        Raises:
            ValueError: If it is not such a state.
        """
        consumed = state.get("consumed")
        if not isinstance(consumed, int) or consumed < 0:
            raise ValueError(f"the loader's state is {state!r}; it must hold 'consumed', from 0 on")
        self._stop()
        self.consumed = consumed

    def report(self) -> dict[str, Any]:
        """What this rank met since it started: samples seen, bad ones by reason and by name.

        `"left_out"` lists what the manifest already knew to be bad and never counted as a sample.
        """
        left_out = [problem.as_dict() for problem in self.manifest.problems]
        return {
            "data": str(self.manifest.folder),
            "fingerprint": self.manifest.fingerprint,
            **self._tally.report(),
            "left_out": left_out,
        }

    def close(self) -> None:
        """Ends the background threads and closes the shards; iterating again starts them anew."""
        self._stop()
        self._decoder.reader.close()

    def __enter__(self) -> "ShardLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _build(self, consumed: int) -> tuple[Batch, list[Problem]]:
        """This rank's share of the global batch that follows `consumed` samples."""
        after = consumed + self.batch_size
        positions = np.arange(consumed, after, dtype=np.int64)
        positions = positions[positions % self._world_size == self._rank]
        epochs = self.order.epochs(positions)
        draft = Draft(self.order.ids(positions), self._decoder)
        first_problems = draft.problems
        for attempt in range(_SUBSTITUTE_ATTEMPTS):
            bad = draft.bad_slots
            if not len(bad):
                return draft.batch(np.arange(len(positions)), epochs, after), first_problems
            draft.redraw(bad, self.order.substitutes(positions[bad], attempt))
        raise ValueError(
            f"no readable sample in {_SUBSTITUTE_ATTEMPTS} tries; the data set looks damaged "
            f"throughout: {first_problems[0]}"
        )


def iterate(
    data: Manifest | Path | str,
    *,
    batch_size: int,
    image_size: int,
    start: int = 0,
    stop: int | None = None,
    workers: int = 0,
    channels: int = 3,
    limits: Limits | None = None,
    tally: DamageTally | None = None,
) -> Iterator[Batch]:
    """One pass in the order of the manifest: every good sample once.

    The batch that begins at sample `i` holds the good ones of `i ... i + batch_size - 1`, so it is
    smaller where some are bad, and an empty one is left out.

    Args:
        data: A manifest, or the folder of a data set.
        batch_size: Samples of a batch.
        image_size: Side of the pictures in pixels.
        start: First sample.
        stop: The sample after the last one; the number of samples unless stated.
        workers: Background threads that decode; 0 decodes when a batch is asked for.
        channels: 3 lays transparent pictures onto white; 4 keeps their alpha channel.
        limits: What a sample may ask for.
        tally: Counts and lists the bad samples, and may stop the pass; read it afterwards.

    Yields:
        Batches whose `consumed` is the sample to go on with.

    Raises:
        ValueError: If the range or an option is wrong, or the tally stops the pass.
        FileNotFoundError: If there is no such data set.
    """
    manifest = data if isinstance(data, Manifest) else Manifest.open(data)
    stop = len(manifest) if stop is None else stop
    if batch_size < 1 or workers < 0:
        raise ValueError(
            f"batch_size={batch_size} must be positive, workers={workers} not negative"
        )
    if not 0 <= start <= stop <= len(manifest):
        raise ValueError(f"samples {start} ... {stop} do not lie in 0 ... {len(manifest)}")
    decoder = Decoder(manifest, Picture(image_size, channels, limits=limits or Limits()))
    tally = tally if tally is not None else DamageTally(total=len(manifest))
    return _pass(decoder, range(start, stop, batch_size), stop, workers, tally)


def _pass(
    decoder: "Decoder", starts: range, stop: int, workers: int, tally: DamageTally
) -> Iterator[Batch]:
    def build(start: int) -> tuple[Batch | None, list[Problem]]:
        after = min(start + starts.step, stop)
        draft = Draft(np.arange(start, after, dtype=np.int64), decoder)
        slots = np.flatnonzero(~draft.is_bad)
        if not len(slots):
            return None, draft.problems
        return draft.batch(slots, np.zeros(len(draft.ids), np.int64), after), draft.problems

    stream = ordered_map(build, starts, workers=workers, ahead=2 * workers)
    try:
        for batch, problems in stream:
            tally.add(len(problems) + (len(batch) if batch else 0), problems)
            if batch is not None:
                yield batch
    finally:
        stream.close()
        decoder.reader.close()
