"""Samples into batches: what a batch is, how its pictures are made, where bad ones leave gaps."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy import ndarray
from torch import Tensor

from shards.captions import CaptionRule
from shards.crop import BoxFinder, RandomCrop, central_square
from shards.damage import BadSample, Problem, Reason
from shards.decode import Limits, decode_square
from shards.manifest import CAPTION_FIELD, JSON_FIELD, Manifest
from shards.read import ShardReader


@dataclass(frozen=True)
class Batch:
    """Samples that are used together.

    Attributes:
        images: Pictures, RGB, transparent ones on white.
        captions: One per picture, drawn where a sample has several.
        all_captions: All that each sample has.
        ids: Sample ids, that is, rows of the manifest.
        keys: The samples' names.
        fields: The JSON member of each sample; empty where there is none.
        epochs: The epoch each sample belongs to.
        consumed: Where the stream stands after this batch, in samples over all ranks.
    """

    images: UInt8[Tensor, "b 3 s s"]
    captions: list[str]
    all_captions: list[list[str]]
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
        crop: Draws the part of each picture that is used, or finds it from height and width.
        fidelity: Whether large JPEG may be read at a reduced size; see `decode_square`.
        limits: What a sample may ask for.
    """

    size: int
    crop: RandomCrop | BoxFinder = central_square
    fidelity: Literal["exact", "fast"] = "exact"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"image_size={self.size} must be at least 1 pixel")


@dataclass(frozen=True)
class _Sample:
    """One decoded sample."""

    image: UInt8[Tensor, "3 s s"]
    captions: list[str]
    fields: dict[str, Any]


class Decoder:
    """Sample ids in, decoded samples out; safe to share between threads.

    Args:
        manifest: The data set.
        picture: How pictures shall leave.
        captions: Where captions stand.
    """

    def __init__(
        self, manifest: Manifest, picture: Picture, captions: CaptionRule | None = None
    ) -> None:
        self.manifest = manifest
        self.picture = picture
        self.captions = captions or CaptionRule()
        self.reader = ShardReader(manifest, max_bytes=picture.limits.image_bytes)

    def sample(self, sample: int, crop: BoxFinder = central_square) -> _Sample:
        """Reads and decodes one sample.

        Args:
            sample: Sample id.
            crop: Finds the part of its picture that is used, from height and width.

        Raises:
            BadSample: If any part of it cannot be used.
        """
        choice = int(self.manifest.image_choice[sample])
        if choice < 0:
            raise BadSample(Reason.NO_IMAGE, "none of its members is a picture")
        name = self.manifest.image_fields[choice]
        members = self.reader.read(sample, (name, CAPTION_FIELD, JSON_FIELD))
        limits = self.picture.limits
        captions, fields = self.captions.read(members, limits)
        image = decode_square(
            members[name],
            self.picture.size,
            crop=crop,
            fidelity=self.picture.fidelity,
            limits=limits,
        )
        return _Sample(image, captions, fields)


class Draft:
    """A batch in the making: decoded samples, with gaps where they are bad.

    Args:
        ids: Sample ids, one per slot.
        epochs: The epoch that each slot is in.
        decoder: Decodes them.

    Attributes:
        problems: What is wrong with the bad ones among `ids`, in the order of the slots.
    """

    def __init__(
        self, ids: Int64[ndarray, " n"], epochs: Int64[ndarray, " n"], decoder: Decoder
    ) -> None:
        self.ids = ids.copy()
        self.epochs = epochs
        self.decoder = decoder
        side = decoder.picture.size
        self._stack = torch.empty(len(ids), 3, side, side, dtype=torch.uint8)
        self._texts: list[tuple[list[str], dict[str, Any]] | None] = [None] * len(ids)
        found = self._fill(np.arange(len(ids)))
        self.problems = [found[slot] for slot in sorted(found)]

    @property
    def is_bad(self) -> ndarray:
        """Which slots have no sample (bool)."""
        return np.array([texts is None for texts in self._texts], bool)

    @property
    def bad_slots(self) -> ndarray:
        """The slots that have no sample."""
        return np.flatnonzero(self.is_bad)

    def redraw(self, slots: ndarray, ids: Int64[ndarray, " n"]) -> None:
        """Puts other samples into some slots; if those are bad too, the slots stay empty."""
        self.ids[slots] = ids
        self._fill(slots)

    def batch(self, slots: ndarray, consumed: int) -> Batch:
        """The batch of the samples in some slots, none of which is bad."""
        texts = [found for slot in slots if (found := self._texts[slot]) is not None]
        assert len(texts) == len(slots)
        whole = len(slots) == len(self.ids)
        ids, epochs = self.ids[slots], self.epochs[slots]
        captions = [several for several, _ in texts]
        return Batch(
            images=self._stack if whole else self._stack[torch.from_numpy(slots)],
            captions=self.decoder.captions.draw(captions, ids, epochs),
            all_captions=captions,
            ids=torch.from_numpy(ids),
            keys=self.decoder.manifest.keys.take(ids).to_pylist(),
            fields=[fields for _, fields in texts],
            epochs=torch.from_numpy(epochs),
            consumed=consumed,
        )

    def _fill(self, slots: ndarray) -> dict[int, Problem]:
        """Decodes the samples of some slots, in the order in which they lie on disk."""
        found: dict[int, Problem] = {}
        slots = slots[np.argsort(self.ids[slots], kind="stable")]
        for slot, crop in zip(slots.tolist(), self._crops(slots), strict=True):
            number = int(self.ids[slot])
            try:
                sample = self.decoder.sample(number, crop)
            except BadSample as bad:
                found[slot] = self.decoder.manifest.problem(number, bad.reason, bad.detail)
                continue
            self._stack[slot] = sample.image
            self._texts[slot] = sample.captions, sample.fields
        return found

    def _crops(self, slots: ndarray) -> list[BoxFinder]:
        crop = self.decoder.picture.crop
        if not isinstance(crop, RandomCrop):
            return [crop] * len(slots)
        rows = crop.draws(self.ids[slots], self.epochs[slots])
        return [partial(crop.box, row) for row in rows]
