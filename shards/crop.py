"""Which part of a picture is used: its central square, all of it, or a random box.

Boxes are in pixels of the upright picture. They are found before it is decoded, from the size in
its header, so that only what is wanted gets resized.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from shards.order import hash64

_DRAW = 0x63726F70  # keeps these draws apart from others over the same counters
_TRIES = 10
# Each try takes an area and a ratio; the one that fits takes a place.
_SLOTS = 2 * _TRIES + 2


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a picture, in whole pixels from its upper left corner."""

    top: int
    left: int
    height: int
    width: int


def central_square(height: int, width: int) -> Box:
    """The largest square in the middle of a picture: what is used unless told otherwise."""
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def whole_picture(height: int, width: int) -> Box:
    """All of a picture, which is then squeezed into the square."""
    return Box(0, 0, height, width)


BoxFinder = Callable[[int, int], Box]
"""From the height and width of an upright picture to the part of it that is used."""
FITS: dict[str, BoxFinder] = {"crop": central_square, "squash": whole_picture}
"""How a picture becomes square, where nothing is random."""


class RandomCrop:
    """A box of random size, shape and place for every sample of every epoch.

    The law is that of torchvision's `RandomResizedCrop` (Szegedy et al., "Going deeper with
    convolutions", 2014): up to ten times draw a share of the area, uniform in `scale`, and a ratio
    of width to height, log-uniform in `ratio`; the first box that fits lies anywhere with equal
    chance. If none fits, the box is the largest in the middle whose ratio lies within `ratio`.

    All of it depends on (seed, epoch, sample id) alone, so that a resumed run sees the same boxes.

        crop = RandomCrop(seed=1)
        rows = crop.draws(ids, epochs)  # once per batch
        crop.box(rows[0], height, width)

    Args:
        seed: of the draws.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width over height.

    Raises:
        ValueError: A senseless range.
    """

    def __init__(
        self,
        seed: int,
        *,
        scale: Sequence[float] = (0.9, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"crop: scale={tuple(scale)} must be two numbers, 0 < low <= high <= 1"
            )
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < math.inf:
            raise ValueError(f"crop: ratio={tuple(ratio)} must be two numbers, 0 < low <= high")
        self.seed = seed
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))

    def draws(
        self, ids: Int64[ndarray, " n"], epochs: Int64[ndarray, " n"]
    ) -> Float64[ndarray, "n slots"]:
        """What `box` needs for each sample of a batch: numbers in [0, 1).

        Args:
            ids: Stable sample ids.
            epochs: Which pass over the data each sample belongs to.
        """
        slots = np.arange(_SLOTS)[None]
        bits = hash64(self.seed, _DRAW, epochs[:, None], ids[:, None], slots)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def box(self, row: Float64[ndarray, " slots"], height: int, width: int) -> Box:
        """The box of one sample.

        Args:
            row: Its row of `draws`.
            height: Of its picture, turned upright.
            width: Of its picture, turned upright.
        """
        numbers = row.tolist()
        (least, most), (narrow, wide) = self.scale, self.ratio
        low, high = math.log(narrow), math.log(wide)
        for try_ in range(_TRIES):
            area = height * width * (least + numbers[2 * try_] * (most - least))
            ratio = math.exp(low + numbers[2 * try_ + 1] * (high - low))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                top = int(numbers[-2] * (height - down + 1))
                left = int(numbers[-1] * (width - across + 1))
                return Box(top, left, down, across)
        down = height if width >= narrow * height else max(1, round(width / narrow))
        across = width if width <= wide * height else max(1, round(height * wide))
        return Box((height - down) // 2, (width - across) // 2, down, across)
