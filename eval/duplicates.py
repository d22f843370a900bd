"""Pictures that are the same, or look the same: within one set, and between two.

A picture is known by two small things: a 64-bit perceptual hash, by which candidates are found
among millions, and a thumbnail of 16 x 16, by which candidates are confirmed. A hash alone does not
do: it tells signs of frequencies and nothing of colour, so a red heart and a blue one share it.
A copy in gray of a picture in colour is therefore not found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import faiss
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8, UInt64
from numpy import ndarray
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SKETCH_SIDE = 32
"""Side of the small picture that a hash is taken of."""
THUMBNAIL_SIDE = 16
"""Side of the thumbnail by which two pictures are compared."""
DISTANCE = 12
"""Bits of 64 in which the hashes of copies may differ."""
LIKENESS = 0.94
"""Likeness of two thumbnails from which on two pictures count as copies."""
FLAT = 4.0
"""Spread of a thumbnail's values (of 255) below which a picture shows too little to be compared."""

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's gray
_LOW = 8
_TILE = 4096
_CROPS = (0.03, 0.06, 0.1)
_WORTH_ALIGNING = 0.5


def perceptual_hash(sketches: UInt8[ndarray, "n 32 32 3"]) -> UInt64[ndarray, " n"]:
    r"""The DCT hash of pictures, 64 bits each; copies differ in few of them.

    `C = DCT2(gray)`; bit `8 u + v` is set where `C[u, v] > median(C[:8, :8])`, for the 8 x 8 lowest
    frequencies `u, v` of the gray picture of 32 x 32.

    Source: Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010,
    section 3.2.1; in the form of the ImageHash library, which keeps the lowest row and column.

    Resizing, compression and changes of brightness and contrast leave most bits alone; cropping by
    a twentieth changes about six, mirroring and turning change half. A flat picture has no
    frequencies to speak of, so its bits are those of its noise: two flat pictures are as likely to
    agree as any, and one picture and its own copy may not. Leave them out (`Prints.flat`).

    Args:
        sketches: The pictures as RGB of 32 x 32, whatever shape they had.
    """
    gray = sketches.astype(np.float64) @ _LUMA
    waves = np.asarray(dctn(gray, axes=(1, 2), norm="ortho"))
    low = waves[:, :_LOW, :_LOW].reshape(len(gray), _LOW * _LOW)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0].astype(np.uint64)


def thumbnail(sketches: UInt8[ndarray, "n 32 32 3"]) -> UInt8[ndarray, "n 16 16 3"]:
    """Sketches at half their side, each pixel the mean of four."""
    side, step = THUMBNAIL_SIDE, SKETCH_SIDE // THUMBNAIL_SIDE
    blocks = sketches.reshape(len(sketches), side, step, side, step, 3)
    return blocks.mean((2, 4)).round().astype(np.uint8)


@dataclass(frozen=True)
class Prints:
    """What the pictures of a set are known by, a row each.

    Attributes:
        hashes: Perceptual hashes.
        thumbnails: RGB of 16 x 16; may be a memory-mapped file.
        flat: Pictures that show too little to be compared, or that could not be read.
    """

    hashes: UInt64[ndarray, " n"]
    thumbnails: UInt8[ndarray, "n 16 16 3"]
    flat: Bool[ndarray, " n"]

    @classmethod
    def of(cls, sketches: UInt8[ndarray, "n 32 32 3"]) -> "Prints":
        """The prints of pictures."""
        small = thumbnail(sketches)
        return cls(perceptual_hash(sketches), small, spread(small) < FLAT)

    def __len__(self) -> int:
        return len(self.hashes)

    @cached_property
    def rows(self) -> Int64[ndarray, " m"]:
        """The pictures that can be compared."""
        return np.flatnonzero(~self.flat)


def spread(thumbnails: UInt8[ndarray, "n 16 16 3"]) -> Float[ndarray, " n"]:
    """How much each thumbnail varies: the deviation of its values from its mean colour."""
    return thumbnails.astype(np.float32).std(axis=(1, 2)).mean(axis=1).astype(np.float64)


def likeness(
    one: UInt8[ndarray, "n 16 16 3"], other: UInt8[ndarray, "n 16 16 3"], *, enough: float = 1.0
) -> Float[ndarray, " n"]:
    """How alike thumbnails are, pair by pair: 1 for copies, around 0 for strangers.

    The correlation of the values, each colour channel about its own mean: brightness and contrast
    cancel out, other colours count. Pairs below `enough` are also compared with one of the two cut
    by 3, 6 or 10 % at any of its sides, and the best counts: so a cropped copy is found.

    Args:
        one: Thumbnails.
        other: As many.
        enough: Likeness from which on no crop is tried.
    """
    best = _correlation(_about_mean(one), _about_mean(other))
    near = np.flatnonzero((best < enough) & (best > _WORTH_ALIGNING))
    for rows in np.array_split(near, -(-len(near) // _TILE)) if len(near) else []:
        for left, right in ((one[rows], other[rows]), (other[rows], one[rows])):
            whole, cut = _about_mean(right), left.astype(np.float32)
            for down, across in _CUTS:
                part = np.einsum("yi,nijc,xj->nyxc", down, cut, across, optimize=True)
                best[rows] = np.maximum(best[rows], _correlation(_about_mean(part), whole))
    return best


def hash_pairs(
    queries: UInt64[ndarray, " q"],
    base: UInt64[ndarray, " b"] | None = None,
    *,
    distance: int = DISTANCE,
) -> Iterator[tuple[Int64[ndarray, " p"], Int64[ndarray, " p"]]]:
    """All pairs of hashes that differ in at most `distance` bits, tile by tile.

    Exact and in bounded memory: every hash is compared with every other by FAISS, a billion
    comparisons in a second on one core (a million pictures among themselves: 8 minutes there). At
    this distance, tables over parts of the hash are no faster.

    Args:
        queries: Hashes to look for.
        base: Hashes to look among; without them `queries` themselves, each pair once.
        distance: Bits that may differ, 0 to 63.

    Yields:
        Rows of `queries` and rows of `base`, side by side; the first the larger if they are one.

    Raises:
        ValueError: The distance is out of its range.
    """
    if not 0 <= distance < 64:
        raise ValueError(f"distance is {distance}; two hashes of 64 bits differ in 0 to 63")
    index = faiss.IndexBinaryFlat(64)
    if base is not None and len(base):
        index.add(_bytes(base))  # pyright: ignore[reportCallIssue]
    for start in range(0, len(queries), _TILE):
        tile = _bytes(queries[start : start + _TILE])
        if base is None:
            index.add(tile)  # pyright: ignore[reportCallIssue]
        # FAISS searches below a radius, not up to it.
        limits, _, found = index.range_search(tile, distance + 1)  # pyright: ignore[reportCallIssue]
        left = start + np.repeat(np.arange(len(tile)), np.diff(limits.astype(np.int64)))
        right = found.astype(np.int64)
        once = left > right if base is None else slice(None)
        yield left[once], right[once]


def alike(
    prints: Prints,
    *,
    distance: int = DISTANCE,
    least: float = LIKENESS,
    same: Int64[ndarray, " n"] | None = None,
) -> Int64[ndarray, " n"]:
    """A group for every picture: those with equal numbers are copies of one another.

    Being alike is passed on: if b is like a and c like b, all three are one group.

    Args:
        prints: The pictures.
        distance: Bits in which hashes may differ.
        least: Likeness that thumbnails must have.
        same: Groups that are known already (equal files, say); they stay together.

    Returns:
        The smallest row of each picture's group; its own row for a picture that stands alone.
    """
    known = np.arange(len(prints)) if same is None else same
    leaders, followers = _lead_by_hash(prints, least)
    left, right = [followers[:, 0]], [followers[:, 1]]
    hashes = prints.hashes[leaders]
    for i, j in hash_pairs(hashes, distance=distance):
        a, b = leaders[i], leaders[j]
        good = _confirmed(prints, prints, a, b, least)
        left.append(a[good])
        right.append(b[good])
    return joined(known, np.concatenate(left), np.concatenate(right))


def copies_between(
    prints: Prints, other: Prints, *, distance: int = DISTANCE, least: float = LIKENESS
) -> Int64[ndarray, "p 2"]:
    """Pairs of pictures, one from each of two sets, that are copies of one another.

    Of pictures with equal hashes in `other` the first one that fits stands for all.

    Args:
        prints: The one set.
        other: The other.
        distance: Bits in which hashes may differ.
        least: Likeness that thumbnails must have.

    Returns:
        Rows of `prints` and of `other`, sorted.
    """
    leaders, _ = _lead_by_hash(other, least)
    found = [np.empty((0, 2), np.int64)]
    for i, j in hash_pairs(prints.hashes[prints.rows], other.hashes[leaders], distance=distance):
        a, b = prints.rows[i], leaders[j]
        good = _confirmed(prints, other, a, b, least)
        found.append(np.stack([a[good], b[good]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def equal(digests: UInt64[ndarray, " n"], known: Bool[ndarray, " n"]) -> Int64[ndarray, " n"]:
    """A group for every row: rows with equal digests get the smallest of their rows.

    Args:
        digests: 64 bits of a hash of what is compared.
        known: Rows that have a digest; the others stand alone.
    """
    groups = np.arange(len(digests))
    rows = np.flatnonzero(known)
    _, first, inverse = np.unique(digests[rows], return_index=True, return_inverse=True)
    groups[rows] = rows[first][inverse]
    return groups


def joined(
    groups: Int64[ndarray, " n"], left: Int64[ndarray, " p"], right: Int64[ndarray, " p"]
) -> Int64[ndarray, " n"]:
    """Groups after some pairs turned out to belong together; the smallest row names a group."""
    count = len(groups)
    rows, columns = np.concatenate([np.arange(count), left]), np.concatenate([groups, right])
    links = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    _, labels = connected_components(links, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def equal_between(
    digests: UInt64[ndarray, " n"], other: UInt64[ndarray, " m"]
) -> Int64[ndarray, "p 2"]:
    """Rows of one set whose digest the other has, each with the first row there that has it."""
    values, first = np.unique(other, return_index=True)
    place = np.minimum(np.searchsorted(values, digests), max(len(values) - 1, 0))
    rows = np.flatnonzero(values[place] == digests) if len(values) else np.arange(0)
    return np.stack([rows, first[place[rows]]], axis=1).astype(np.int64)


def members(groups: Int64[ndarray, " n"]) -> list[Int64[ndarray, " _"]]:
    """The rows of each group of two and more, the largest group first."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    several = [rows for rows in np.split(order, starts) if len(rows) > 1]
    return sorted(several, key=lambda rows: (-len(rows), rows[0]))


def _lead_by_hash(
    prints: Prints, least: float
) -> tuple[Int64[ndarray, " k"], Int64[ndarray, "f 2"]]:
    """One picture for all with the same hash that are alike, and who follows whom.

    So a picture that a set holds 100,000 times costs 100,000 comparisons, not their square.
    """
    rows = prints.rows[np.argsort(prints.hashes[prints.rows], kind="stable")]
    hashes = prints.hashes[rows]
    starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]]) if len(rows) else rows
    leaders: list[int] = []
    followers: list[ndarray] = [np.empty((0, 2), np.int64)]
    for run in np.split(rows, starts[1:]) if len(rows) else []:
        rest: ndarray = run
        while len(rest):
            leader, rest = rest[0], rest[1:]
            leaders.append(int(leader))
            if not len(rest):
                break
            good = _confirmed(prints, prints, np.full(len(rest), leader), rest, least)
            followers.append(np.stack([np.full(good.sum(), leader), rest[good]], axis=1))
            rest = rest[~good]
    return np.array(leaders, np.int64), np.concatenate(followers)


def _confirmed(
    prints: Prints,
    other: Prints,
    left: Int64[ndarray, " p"],
    right: Int64[ndarray, " p"],
    least: float,
) -> Bool[ndarray, " p"]:
    """Which candidates look alike."""
    good = np.zeros(len(left), bool)
    for start in range(0, len(left), _TILE):
        tile = slice(start, start + _TILE)
        one, two = prints.thumbnails[left[tile]], other.thumbnails[right[tile]]
        good[tile] = likeness(one, two, enough=least) >= least
    return good


def _about_mean(thumbnails: ndarray) -> Float[ndarray, "n 768"]:
    """Values about the mean of their channel, scaled to unit length."""
    values = thumbnails.astype(np.float32)
    values = (values - values.mean(axis=(1, 2), keepdims=True)).reshape(len(values), -1)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.maximum(length, 1e-6)


def _correlation(one: Float[ndarray, "n d"], other: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
    return np.einsum("nd,nd->n", one, other).astype(np.float64)


def _stretch(low: float, high: float) -> Float[ndarray, "16 16"]:
    """The matrix that stretches the part from `low` to `high` over the whole (linear)."""
    side = THUMBNAIL_SIDE
    places = (low + (np.arange(side) + 0.5) / side * (high - low)) * side - 0.5
    places = places.clip(0, side - 1)
    before = np.floor(places).astype(np.int64).clip(0, side - 2)
    matrix = np.zeros((side, side), np.float32)
    matrix[np.arange(side), before] = 1 - (places - before)
    matrix[np.arange(side), before + 1] = places - before
    return matrix


def _cuts(shares: Sequence[float]) -> list[tuple[ndarray, ndarray]]:
    """Down and across: each share cut off at the one side, at the other, or half at both."""
    ways = [[(0.0, 1 - c), (c, 1.0), (c / 2, 1 - c / 2)] for c in shares]
    return [(_stretch(*down), _stretch(*across)) for way in ways for down in way for across in way]


_CUTS = _cuts(_CROPS)


def _bytes(hashes: UInt64[ndarray, " n"]) -> UInt8[ndarray, "n 8"]:
    return np.ascontiguousarray(hashes.astype("<u8")).view(np.uint8).reshape(-1, 8)
