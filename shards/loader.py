"""Batches: an endless, resumable stream for training, and one pass in order for everything else."""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from shards.damage import BadSample, DamageTally, Problem, Reason
from shards.decode import (
    Limits,
    decode_caption,
    decode_fields,
    decode_image,
    fit_square,
    resize,
)
from shards.manifest import CAPTION_FIELD, JSON_FIELD, Manifest
from shards.order import Order
from shards.prefetch import ordered_map
from shards.read import ShardReader

Augment = Callable[
    [UInt8[Tensor, "b c h w"], Int64[Tensor, " b"], Int64[Tensor, " b"]],
    UInt8[Tensor, "b c s s"] | Float[Tensor, "b c s s"],
]
"""`augment(images, ids, epochs)`; what it draws must come from a seed, `ids` and `epochs` alone."""

# Far more than bad luck needs: at half of all samples bad, one place in 10^19 is left empty.
_SUBSTITUTE_ATTEMPTS = 64


@dataclass(frozen=True)
class Batch:
    """Samples that are used together.

    Attributes:
        images: Pictures; uint8 unless an augmentation made them something else.
        captions: One per picture.
        ids: Sample ids, that is, rows of the manifest.
        keys: The samples' names.
        fields: The JSON member of each sample; empty where there is none.
        epochs: The epoch each sample belongs to.
        consumed: Where the stream stands after this batch, in samples over all ranks.
    """

    images: UInt8[Tensor, "b c s s"] | Float[Tensor, "b c s s"]
    captions: list[str]
    ids: Int64[Tensor, " b"]
    keys: list[str]
    fields: list[dict[str, Any]]
    epochs: Int64[Tensor, " b"]
    consumed: int

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Picture:
    """How pictures leave the loader.

    Attributes:
        size: Side of the square that comes out, in pixels.
        channels: 3: RGB, transparent pictures on white; 4: RGB and alpha.
        stack_size: Side of the stack an augmentation is given; `size` unless stated.
        augment: Makes the pictures that come out of that stack; without it they are resized.
        limits: What a sample may ask for.
    """

    size: int
    channels: int = 3
    stack_size: int | None = None
    augment: Augment | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.size < 1 or (self.stack_size is not None and self.stack_size < 1):
            raise ValueError(
                f"image_size={self.size}, decode_size={self.stack_size}: at least 1 pixel"
            )
        if self.channels not in (3, 4):
            raise ValueError(f"channels is {self.channels}; choose 3 (RGB) or 4 (RGB and alpha)")

    def finish(
        self,
        stack: UInt8[Tensor, "b c h h"],
        ids: Int64[Tensor, " b"],
        epochs: Int64[Tensor, " b"],
    ) -> Tensor:
        """The pictures that come out, made of a stack of decoded ones."""
        if self.augment is not None:
            images = self.augment(stack, ids, epochs)
            if images.shape[-2:] != (self.size, self.size) or len(images) != len(stack):
                raise ValueError(
                    f"augment returned {tuple(images.shape)}; image_size={self.size} asks for "
                    f"({len(stack)}, channels, {self.size}, {self.size})"
                )
            return images
        return stack if stack.shape[-1] == self.size else resize(stack, self.size)


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
        self._decoder = _Decoder(self.manifest, picture)
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
        draft = _Draft(self.order.ids(positions), self._decoder)
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
    decoder = _Decoder(manifest, Picture(image_size, channels, limits=limits or Limits()))
    tally = tally if tally is not None else DamageTally(total=len(manifest))
    return _pass(decoder, range(start, stop, batch_size), stop, workers, tally)


def _pass(
    decoder: "_Decoder", starts: range, stop: int, workers: int, tally: DamageTally
) -> Iterator[Batch]:
    def build(start: int) -> tuple[Batch | None, list[Problem]]:
        after = min(start + starts.step, stop)
        draft = _Draft(np.arange(start, after, dtype=np.int64), decoder)
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


@dataclass(frozen=True)
class _Sample:
    """One decoded sample; the picture is `[height, width, channels]`."""

    image: UInt8[ndarray, "h w c"]
    caption: str
    fields: dict[str, Any]


class _Decoder:
    """Sample ids in, decoded samples out."""

    def __init__(self, manifest: Manifest, picture: Picture) -> None:
        self.manifest = manifest
        self.picture = picture
        self.reader = ShardReader(manifest, max_bytes=picture.limits.image_bytes)

    def sample(self, sample: int) -> _Sample:
        """Reads and decodes one sample, or raises BadSample."""
        choice = int(self.manifest.image_choice[sample])
        if choice < 0:
            raise BadSample(Reason.NO_IMAGE, "none of its members is a picture")
        name = self.manifest.image_fields[choice]
        members = self.reader.read(sample, (name, CAPTION_FIELD, JSON_FIELD))
        if CAPTION_FIELD not in members:
            raise BadSample(Reason.NO_CAPTION, f"it has no .{CAPTION_FIELD} member")
        limits = self.picture.limits
        caption = decode_caption(members[CAPTION_FIELD], limits=limits)
        json_bytes = members.get(JSON_FIELD)
        fields = decode_fields(json_bytes, limits=limits) if json_bytes is not None else {}
        image = decode_image(members[name], channels=self.picture.channels, limits=limits)
        size = self.picture.stack_size or self.picture.size
        return _Sample(fit_square(image, size), caption, fields)


class _Draft:
    """A batch in the making: decoded samples, with gaps where they are bad."""

    def __init__(self, ids: Int64[ndarray, " n"], decoder: _Decoder) -> None:
        self.ids = ids.copy()
        self.decoder = decoder
        self.samples: list[_Sample | None] = [None] * len(ids)
        found = self._fill(np.arange(len(ids)))
        self.problems = [found[slot] for slot in sorted(found)]

    @property
    def is_bad(self) -> ndarray:
        """Which slots have no sample (bool)."""
        return np.array([sample is None for sample in self.samples], bool)

    @property
    def bad_slots(self) -> ndarray:
        """The slots that have no sample."""
        return np.flatnonzero(self.is_bad)

    def redraw(self, slots: ndarray, ids: Int64[ndarray, " n"]) -> None:
        """Puts other samples into some slots; if those are bad too, the slots stay empty."""
        self.ids[slots] = ids
        self._fill(slots)

    def batch(self, slots: ndarray, epochs: Int64[ndarray, " n"], consumed: int) -> Batch:
        """The batch of the samples in some slots, none of which is bad."""
        samples = [sample for slot in slots if (sample := self.samples[slot]) is not None]
        assert len(samples) == len(slots)
        stack = torch.from_numpy(np.stack([sample.image for sample in samples]))
        stack = stack.permute(0, 3, 1, 2).contiguous()
        ids, epoch = torch.from_numpy(self.ids[slots]), torch.from_numpy(epochs[slots])
        return Batch(
            images=self.decoder.picture.finish(stack, ids, epoch),
            captions=[sample.caption for sample in samples],
            ids=ids,
            keys=self.decoder.manifest.keys.take(self.ids[slots]).to_pylist(),
            fields=[sample.fields for sample in samples],
            epochs=epoch,
            consumed=consumed,
        )

    def _fill(self, slots: ndarray) -> dict[int, Problem]:
        """Decodes the samples of some slots, in the order in which they lie on disk."""
        found: dict[int, Problem] = {}
        for slot in slots[np.argsort(self.ids[slots], kind="stable")].tolist():
            sample = int(self.ids[slot])
            try:
                self.samples[slot] = self.decoder.sample(sample)
            except BadSample as bad:
                problem = self.decoder.manifest.problem(sample, bad.reason, bad.detail)
                found[slot] = problem
        return found
