"""Batches: an endless, resumable stream for training, and one pass in order for everything else."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shards.batch import Batch, Decoder, Draft, Picture
from shards.captions import CaptionRule
from shards.crop import BoxFinder, RandomCrop, central_square
from shards.damage import DamageTally, Problem
from shards.decode import Limits
from shards.manifest import Manifest
from shards.native import NATIVE
from shards.order import Mixture, Order
from shards.prefetch import ordered_map

# Far more than bad luck needs: at half of all samples bad, one place in 10^19 is left empty.
_SUBSTITUTE_ATTEMPTS = 64
# Batches whose bytes are asked for before their turn comes.
_BATCHES_AHEAD = 8


@dataclass(frozen=True)
class Source:
    """One of several data sets that a stream mixes.

    Attributes:
        data: A manifest, or the place of a data set as `Manifest.open` takes it.
        weight: Its share of the stream, in any unit; None takes its number of samples, so that all
            sources come round equally often.
    """

    data: Manifest | Path | str
    weight: float | None = None


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
        data: A manifest, the place of a data set (see `Manifest.open`), or several weighted ones,
            which are mixed as `Mixture` says.
        batch_size: Samples of a batch over all ranks; a multiple of `world_size`.
        image_size: Side of the pictures in pixels.
        seed: Names the order.
        lanes: See `Order`; fixed for a run, and a multiple of every `world_size` it may have.
        window: See `Order`.
        rank: Which share of each batch this process gets.
        world_size: Number of processes that share each batch.
        workers: Background threads that decode; 0 decodes when a batch is asked for.
        captions: Where captions stand; of several, one is drawn from (seed, epoch, sample).
        crop: Draws the part of each picture that is used, from (seed, epoch, sample), or finds it
            from height and width, as those of `shards.crop.FITS` do.
        limits: What a sample may ask for.
        max_bad_fraction: Share of bad samples above which the run stops.
        strict: Stop at the first bad sample.

    Raises:
        ValueError: If options contradict each other, or the data set is empty or damaged.
        FileNotFoundError: If there is no such data set.
    """

    def __init__(
        self,
        data: Manifest | Path | str | Sequence[Source],
        *,
        batch_size: int,
        image_size: int,
        seed: int = 0,
        lanes: int = 64,
        window: int = 4096,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        captions: Sequence[str] = (),
        crop: RandomCrop | BoxFinder = central_square,
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
        sources = [Source(data)] if isinstance(data, Manifest | Path | str) else data
        manifests = [_manifest(source.data) for source in sources]
        self.manifest = Manifest.joined(manifests)
        self.order = _order(sources, manifests, seed=seed, lanes=lanes, window=window)
        self.batch_size = batch_size
        self.consumed = 0
        self._manifests = manifests
        self._rank, self._world_size, self._workers = rank, world_size, workers
        picture = Picture(image_size, crop, "fast", limits or Limits())
        rule = CaptionRule(tuple(captions), seed=seed)
        self._decoder = Decoder(self.manifest, picture, rule)
        self._tally = DamageTally(
            total=len(self.manifest), max_fraction=max_bad_fraction, strict=strict
        )
        for manifest in manifests:
            _judge(self._tally, manifest)
        self._stream: Generator[tuple[Batch, list[Problem]]] | None = None

    @property
    def num_samples(self) -> int:
        """Samples in the data set; over all sources, where there are several."""
        return self.order.total

    @property
    def bad(self) -> int:
        """Bad samples that this rank met since it started."""
        return self._tally.bad

    def __iter__(self) -> "ShardLoader":
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            starts = count(self.consumed, self.batch_size)
            ahead = 2 * self._workers
            self._stream = ordered_map(self._build, starts, workers=self._workers, ahead=ahead)
            for coming in range(1, _BATCHES_AHEAD):
                self._announce(self.consumed + coming * self.batch_size)
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

        `"left_out"` lists what the manifest already knew to be bad and never counted as a sample;
        `"sources"`, of a mixture, how much of each all ranks have consumed in the whole run.
        """
        report = {
            "data": self.manifest.place,
            "fingerprint": self.manifest.fingerprint,
            **self._tally.report(),
            "left_out": [problem.as_dict() for problem in self.manifest.problems],
            "decoders": dict(NATIVE.states),
        }
        if isinstance(self.order, Mixture):
            given = self.order.consumed(self.consumed)
            report["sources"] = [
                {
                    "data": manifest.place,
                    "fingerprint": manifest.fingerprint,
                    "samples": len(manifest),
                    "share": int(share) / int(self.order.counts.sum()),
                    "consumed": consumed,
                    "epochs": consumed / len(manifest),
                }
                for manifest, share, consumed in zip(
                    self._manifests, self.order.counts, given, strict=True
                )
            ]
        return report

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
            _end(stream, self._decoder)

    def _build(self, consumed: int) -> tuple[Batch, list[Problem]]:
        """This rank's share of the global batch that follows `consumed` samples."""
        self._announce(consumed + _BATCHES_AHEAD * self.batch_size)
        positions = self._positions(consumed)
        draft = Draft(self.order.ids(positions), self.order.epochs(positions), self._decoder)
        after = consumed + self.batch_size
        first_problems = draft.problems
        for attempt in range(_SUBSTITUTE_ATTEMPTS):
            bad = draft.bad_slots
            if not len(bad):
                return draft.batch(np.arange(len(positions)), after), first_problems
            draft.redraw(bad, self.order.substitutes(positions[bad], attempt))
        raise ValueError(
            f"no readable sample in {_SUBSTITUTE_ATTEMPTS} tries; the data set looks damaged "
            f"throughout: {first_problems[0]}"
        )

    def _positions(self, consumed: int) -> np.ndarray:
        """This rank's positions in the global batch that follows `consumed` samples."""
        positions = np.arange(consumed, consumed + self.batch_size, dtype=np.int64)
        return positions[positions % self._world_size == self._rank]

    def _announce(self, consumed: int) -> None:
        """Tells the storage which samples a later batch will need."""
        self._decoder.reader.ahead(self.order.ids(self._positions(consumed)))


def _manifest(data: Manifest | Path | str) -> Manifest:
    return data if isinstance(data, Manifest) else Manifest.open(data)


def _judge(tally: DamageTally, manifest: Manifest) -> None:
    tally.judge_scan(manifest.damage, {shard.name: shard.samples for shard in manifest.shards})


def _order(
    sources: Sequence[Source], manifests: Sequence[Manifest], *, seed: int, lanes: int, window: int
) -> Order | Mixture:
    if not sources:
        raise ValueError("no data set was named")
    orders = [
        # A seed of its own, so that equal sources are not in step; the first keeps the plain one.
        Order(
            [shard.samples for shard in manifest.shards],
            seed=(seed + number * 0x9E3779B97F4A7C15) % 2**63,
            lanes=lanes,
            window=window,
        )
        for number, manifest in enumerate(manifests)
    ]
    if len(orders) == 1:
        return orders[0]
    weights = [
        float(order.total) if source.weight is None else source.weight
        for source, order in zip(sources, orders, strict=True)
    ]
    given = {source.weight is None for source in sources}
    if len(given) > 1:
        raise ValueError("give every source a weight, or none of them")
    return Mixture(orders, weights, seed=seed)


def iterate(
    data: Manifest | Path | str,
    *,
    batch_size: int,
    image_size: int,
    start: int = 0,
    stop: int | None = None,
    workers: int = 0,
    captions: Sequence[str] = (),
    crop: BoxFinder = central_square,
    limits: Limits | None = None,
    tally: DamageTally | None = None,
) -> Iterator[Batch]:
    """One pass in the order of the manifest: every good sample once.

    The batch that begins at sample `i` holds the good ones of `i ... i + batch_size - 1`, so it is
    smaller where some are bad, and an empty one is left out.

    Args:
        data: A manifest, or the place of a data set.
        batch_size: Samples of a batch.
        image_size: Side of the pictures in pixels.
        start: First sample.
        stop: The sample after the last one; the number of samples unless stated.
        workers: Background threads that decode; 0 decodes when a batch is asked for.
        captions: Where captions stand; `Batch.captions` holds the first of each sample.
        crop: Finds the part of each picture that is used, from height and width.
        limits: What a sample may ask for.
        tally: Counts and lists the bad samples, and may stop the pass; read it afterwards.

    Yields:
        Batches whose `consumed` is the sample to go on with.

    Raises:
        ValueError: If the range or an option is wrong, or the tally stops the pass.
        FileNotFoundError: If there is no such data set.
    """
    manifest = _manifest(data)
    stop = len(manifest) if stop is None else stop
    if batch_size < 1 or workers < 0:
        raise ValueError(
            f"batch_size={batch_size} must be positive, workers={workers} not negative"
        )
    if not 0 <= start <= stop <= len(manifest):
        raise ValueError(f"samples {start} ... {stop} do not lie in 0 ... {len(manifest)}")
    picture = Picture(image_size, crop, limits=limits or Limits())
    decoder = Decoder(manifest, picture, CaptionRule(tuple(captions)))
    tally = tally if tally is not None else DamageTally(total=len(manifest))
    _judge(tally, manifest)
    return _pass(decoder, range(start, stop, batch_size), stop, workers, tally)


def _pass(
    decoder: "Decoder", starts: range, stop: int, workers: int, tally: DamageTally
) -> Iterator[Batch]:
    def build(start: int) -> tuple[Batch | None, list[Problem]]:
        coming = start + starts.step * _BATCHES_AHEAD
        decoder.reader.ahead(np.arange(coming, min(coming + starts.step, stop), dtype=np.int64))
        after = min(start + starts.step, stop)
        ids = np.arange(start, after, dtype=np.int64)
        draft = Draft(ids, np.zeros_like(ids), decoder)
        slots = np.flatnonzero(~draft.is_bad)
        if not len(slots):
            return None, draft.problems
        return draft.batch(slots, after), draft.problems

    stream = ordered_map(build, starts, workers=workers, ahead=2 * workers)
    try:
        for batch, problems in stream:
            tally.add(len(problems) + (len(batch) if batch else 0), problems)
            if batch is not None:
                yield batch
    finally:
        _end(stream, decoder)


def _end(stream: Generator[Any], decoder: Decoder) -> None:
    """Ends the threads behind a stream, also those that wait for a silent server."""
    decoder.reader.stop()
    stream.close()
    decoder.reader.close()
