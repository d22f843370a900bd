"""Samples into batches: what a batch is, how its pictures are made, where bad ones leave gaps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from shards.captions import CaptionRule
from shards.damage import BadSample, Problem, Reason
from shards.decode import Limits, decode_image, fit_square, resize
from shards.manifest import CAPTION_FIELD, JSON_FIELD, Manifest
from shards.read import ShardReader

Augment = Callable[
    [UInt8[Tensor, "b c h w"], Int64[Tensor, " b"], Int64[Tensor, " b"]],
    UInt8[Tensor, "b c s s"] | Float[Tensor, "b c s s"],
]
"""`augment(images, ids, epochs)`; what it draws must come from a seed, `ids` and `epochs` alone."""


@dataclass(frozen=True)
class Batch:
    """Samples that are used together.

    Attributes:
        images: Pictures; uint8 unless an augmentation made them something else.
        captions: One per picture, drawn where a sample has several.
        all_captions: All that each sample has.
        ids: Sample ids, that is, rows of the manifest.
        keys: The samples' names.
        fields: The JSON member of each sample; empty where there is none.
        epochs: The epoch each sample belongs to.
        consumed: Where the stream stands after this batch, in samples over all ranks.
    """

    images: UInt8[Tensor, "b c s s"] | Float[Tensor, "b c s s"]
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


@dataclass(frozen=True)
class _Sample:
    """One decoded sample; the picture is `[height, width, channels]`."""

    image: UInt8[ndarray, "h w c"]
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

    def sample(self, sample: int) -> _Sample:
        """Reads and decodes one sample.

        Args:
            sample: Sample id.

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
        image = decode_image(members[name], channels=self.picture.channels, limits=limits)
        size = self.picture.stack_size or self.picture.size
        return _Sample(fit_square(image, size), captions, fields)


class Draft:
    """A batch in the making: decoded samples, with gaps where they are bad.

    Args:
        ids: Sample ids, one per slot.
        decoder: Decodes them.

    Attributes:
        problems: What is wrong with the bad ones among `ids`, in the order of the slots.
    """

    def __init__(self, ids: Int64[ndarray, " n"], decoder: Decoder) -> None:
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
        captions = [sample.captions for sample in samples]
        ids, epoch = torch.from_numpy(self.ids[slots]), torch.from_numpy(epochs[slots])
        return Batch(
            images=self.decoder.picture.finish(stack, ids, epoch),
            captions=self.decoder.captions.draw(captions, self.ids[slots], epochs[slots]),
            all_captions=captions,
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
