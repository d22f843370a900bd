"""Random changes to training pictures that make one artist's hand look like another's.

What is drawn for a sample depends on (seed, epoch, sample id) alone, so a run that is resumed, or
spread over other ranks and workers, sees the same pictures. Everything acts on a whole batch.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from shards.order import hash64

_DRAW = 0x61756720  # keeps these draws apart from others over the same counters
_SLOTS = 40


class Augment:
    """Geometry, tone, colour, sharpness, page and holes, all at random strengths.

    Pictures are treated as ink on white paper: what moves in from outside is white.

    Args:
        seed: of the draws.
        scale: smallest and largest magnification; log-uniform.
        aspect: largest log ratio of the two axes' magnification.
        rotate: largest rotation, in degrees.
        shear: largest shear.
        shift: largest shift, as a share of half the side.
        flip: chance of mirroring left and right; off by default, since left and right are words.
        gamma: largest log exponent on the ink.
        hue: largest rotation of the hue, as a share of the circle.
        saturation: largest log factor on the saturation.
        gain: largest log factor on each channel.
        gray: chance of losing all colour.
        sharpen: largest weight of unsharp masking, as well as of blurring.
        posterize: chance of keeping 3 to 8 levels of each channel.
        page: chance of a random colour where there is no ink.
        erase: chance of a white hole.

    Raises:
        ValueError: a chance outside [0, 1], a negative strength, or a senseless range.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        scale: Sequence[float] = (0.7, 1.2),
        aspect: float = 0.15,
        rotate: float = 12.0,
        shear: float = 0.12,
        shift: float = 0.12,
        flip: float = 0.0,
        gamma: float = 0.5,
        hue: float = 0.08,
        saturation: float = 0.6,
        gain: float = 0.25,
        gray: float = 0.1,
        sharpen: float = 1.0,
        posterize: float = 0.1,
        page: float = 0.1,
        erase: float = 0.25,
    ) -> None:
        self.seed = seed
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"augment: scale={tuple(scale)} must be two numbers, 0 < low <= high")
        self.scale = (float(scale[0]), float(scale[1]))
        self.strengths = {
            "aspect": aspect, "rotate": rotate, "shear": shear, "shift": shift, "gamma": gamma,
            "hue": hue, "saturation": saturation, "gain": gain, "sharpen": sharpen,
        }  # fmt: skip
        self.chances = {
            "flip": flip, "gray": gray, "posterize": posterize, "page": page, "erase": erase,
        }  # fmt: skip
        for name, value in self.strengths.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"augment: {name}={value} must not be negative")
        for name, value in self.chances.items():
            if not 0 <= value <= 1:
                raise ValueError(f"augment: {name}={value} is a chance, from 0 to 1")

        self._moves = self.scale != (1, 1) or self._has(
            "aspect", "rotate", "shear", "shift", "flip"
        )
        self._recolours = self._has("hue", "saturation", "gain", "gray")
        self._changes_nothing = not self._moves and not self._has(*self.strengths, *self.chances)

    def _has(self, *names: str) -> bool:
        """Whether any of these does anything."""
        return any({**self.strengths, **self.chances}[name] for name in names)

    def __call__(
        self,
        images: UInt8[Tensor, "b 3 height height"],
        ids: Int64[Tensor, " b"],
        epochs: Int64[Tensor, " b"],
        *,
        size: int,
    ) -> UInt8[Tensor, "b 3 {size} {size}"]:
        """The changed pictures.

        Args:
            images: a batch, on any device.
            ids: stable sample ids.
            epochs: which pass over the data each sample belongs to.
            size: side of the square that comes out, in pixels.
        """
        if self._changes_nothing and size == images.shape[-1]:
            return images
        draw = _Draws(self.seed, ids, epochs, images.device)
        ink = 1 - images.float() / 255
        ink = self._move(ink, draw, size)
        if self.strengths["gamma"]:
            ink = ink.clamp(0, 1) ** _per_image(draw.log_uniform(self.strengths["gamma"]))
        ink = self._recolour(ink, draw)
        ink = self._sharpen(ink, draw)
        ink = self._posterize(ink, draw).clamp(0, 1)
        ink = self._paint_page(ink, draw)
        ink = self._erase(ink, draw)
        return ((1 - ink) * 255).round().to(torch.uint8)

    def _move(
        self, ink: Float[Tensor, "b 3 h h"], draw: "_Draws", size: int
    ) -> Float[Tensor, "b 3 s s"]:
        """One affine map: magnify, stretch, shear, turn, shift; bilinear, white from outside."""
        strength, rows = self.strengths, len(ink)
        low, high = (math.log(bound) for bound in self.scale)
        magnify = torch.exp(draw.uniform(low, high))
        stretch = draw.log_uniform(strength["aspect"])
        angle = draw.uniform(-1.0, 1.0) * math.radians(strength["rotate"])
        shear = draw.uniform(-1.0, 1.0) * strength["shear"]
        mirror = 1 - 2 * draw.chance(self.chances["flip"])
        across, down = mirror / (magnify * stretch), stretch / magnify
        cos, sin = torch.cos(angle), torch.sin(angle)
        shift = [draw.uniform(-1.0, 1.0) * strength["shift"] / magnify for _ in range(2)]
        if not self._moves and size == ink.shape[-1]:
            return ink
        affine = torch.stack(
            [
                torch.stack([across * cos, across * (shear * cos - sin), shift[0]], dim=1),
                torch.stack([down * sin, down * (shear * sin + cos), shift[1]], dim=1),
            ],
            dim=1,
        )
        grid = F.affine_grid(affine, [rows, 3, size, size], align_corners=False)
        ratio = ink.shape[-1] / size
        if ratio >= 2:
            ink = F.avg_pool2d(ink, int(ratio))
        elif ratio > 1.2:  # a light blur against aliasing, the stronger the more is lost
            ink = F.avg_pool2d(ink, 3, 1, 1) * (ratio - 1) + ink * (2 - ratio)
        return F.grid_sample(ink, grid, padding_mode="zeros", align_corners=False)

    def _recolour(self, ink: Float[Tensor, "b 3 s s"], draw: "_Draws") -> Float[Tensor, "b 3 s s"]:
        """One matrix on the three channels: gains x saturation x rotation about the gray axis."""
        turn = self.strengths["hue"] * 2 * math.pi * draw.uniform(-1.0, 1.0)
        saturation = draw.log_uniform(self.strengths["saturation"])
        saturation = saturation * (1 - draw.chance(self.chances["gray"]))
        gains = torch.stack([draw.log_uniform(self.strengths["gain"]) for _ in range(3)], dim=1)
        if not self._recolours:
            return ink
        identity = torch.eye(3, device=ink.device)
        mean = torch.full_like(identity, 1 / 3)
        root = 1 / math.sqrt(3)
        cross = torch.tensor(
            [[0.0, -root, root], [root, 0.0, -root], [-root, root, 0.0]], device=ink.device
        )
        cos, sin, keep = (x.view(-1, 1, 1) for x in (torch.cos(turn), torch.sin(turn), saturation))
        rotation = cos * identity + (1 - cos) * mean + sin * cross
        matrix = torch.diag_embed(gains) @ (keep * identity + (1 - keep) * mean) @ rotation
        return torch.bmm(matrix, ink.flatten(2)).view_as(ink)

    def _sharpen(self, ink: Float[Tensor, "b 3 s s"], draw: "_Draws") -> Float[Tensor, "b 3 s s"]:
        """X + a (x - blurred x): a > 0 sharpens, a < 0 blurs."""
        weight = draw.uniform(-1.0, 1.0) * self.strengths["sharpen"]
        if not self.strengths["sharpen"]:
            return ink
        blurred = F.avg_pool2d(ink, 3, 1, 1, count_include_pad=False)
        return ink + _per_image(weight) * (ink - blurred)

    def _posterize(self, ink: Float[Tensor, "b 3 s s"], draw: "_Draws") -> Float[Tensor, "b 3 s s"]:
        levels = _per_image(torch.floor(draw.uniform(2.0, 8.0)))
        chosen = _per_image(draw.chance(self.chances["posterize"])) > 0
        if not self.chances["posterize"]:
            return ink
        return torch.where(chosen, torch.round(ink * levels) / levels, ink)

    def _paint_page(
        self, ink: Float[Tensor, "b 3 s s"], draw: "_Draws"
    ) -> Float[Tensor, "b 3 s s"]:
        """A random colour, fading out where there is ink."""
        colour = torch.stack([draw.uniform(0.0, 1.0) for _ in range(3)], dim=1)[:, :, None, None]
        chosen = _per_image(draw.chance(self.chances["page"]))
        if not self.chances["page"]:
            return ink
        empty = (1 - 6 * ink.amax(dim=1, keepdim=True)).clamp(0, 1)
        return ink + chosen * empty * colour * (1 - ink)

    def _erase(self, ink: Float[Tensor, "b 3 s s"], draw: "_Draws") -> Float[Tensor, "b 3 s s"]:
        """One white rectangle of 15 to 45 % of each side."""
        size = ink.shape[-1]
        place = (torch.arange(size, device=ink.device) + 0.5) / size
        inside = []
        for _ in range(2):
            length, centre = draw.uniform(0.15, 0.45), draw.uniform(0.0, 1.0)
            inside.append((place[None] - centre[:, None]).abs() < length[:, None] / 2)
        chosen = _per_image(draw.chance(self.chances["erase"])) > 0
        if not self.chances["erase"]:
            return ink
        hole = inside[0][:, None, None, :] & inside[1][:, None, :, None] & chosen
        return ink.masked_fill(hole, 0)


def _per_image(values: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    return values.view(-1, 1, 1, 1)


class _Draws:
    """Numbers for each sample of a batch, one slot after the other."""

    def __init__(
        self,
        seed: int,
        ids: Int64[Tensor, " b"],
        epochs: Int64[Tensor, " b"],
        device: torch.device,
    ) -> None:
        slots = np.arange(_SLOTS)[None]
        bits = hash64(seed, _DRAW, epochs.numpy()[:, None], ids.numpy()[:, None], slots)
        uniform = (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
        self._table = torch.from_numpy(uniform).to(device)
        self._slot = 0

    def uniform(self, low: float, high: float) -> Float[Tensor, " b"]:
        """Between two bounds."""
        column = self._table[:, self._slot]
        self._slot += 1
        return column * (high - low) + low

    def log_uniform(self, bound: float) -> Float[Tensor, " b"]:
        """E to a power between -bound and bound: as often above one as below."""
        return torch.exp(self.uniform(-bound, bound))

    def chance(self, probability: float) -> Float[Tensor, " b"]:
        """One with this probability, else zero."""
        return (self.uniform(0.0, 1.0) < probability).float()
