"""Copies are found, strangers are not, and clever searches find what slow ones do."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from eval import duplicates
from eval.duplicates import (
    LIKENESS,
    Prints,
    alike,
    copies_between,
    equal,
    equal_between,
    hash_pairs,
    joined,
    likeness,
    members,
    perceptual_hash,
    spread,
    thumbnail,
)


def scenes(count: int, *, seed: int = 0, side: int = 192) -> list[Image.Image]:
    """Pictures that vary as photographs do: 1/f noise in three channels."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1.0
    pictures = []
    for _ in range(count):
        noise = rng.standard_normal((3, side, side)) + 1j * rng.standard_normal((3, side, side))
        waves = np.fft.ifft2(noise / frequency**1.2).real
        mixed = waves + 1.5 * waves.mean(0)
        low, high = mixed.min(), mixed.max()
        values = 30 + 190 * (mixed - low) / (high - low)
        pictures.append(Image.fromarray(values.astype(np.uint8).transpose(1, 2, 0)))
    return pictures


def sketches(pictures: list[Image.Image]) -> np.ndarray:
    small = [picture.resize((32, 32), Image.Resampling.BOX) for picture in pictures]
    return np.stack([np.asarray(picture) for picture in small])


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    import io

    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=quality)
    return Image.open(sink).convert("RGB")


def trimmed(picture: Image.Image, share: float) -> Image.Image:
    edge = round(picture.width * share / 2)
    return picture.crop((edge, edge, picture.width - edge, picture.height - edge))


CHANGES = {
    "half the size": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.BICUBIC),
    "another shape": lambda p: p.resize((p.width * 2, p.height), Image.Resampling.BILINEAR),
    "JPEG quality 50": lambda p: jpeg(p, 50),
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.15),
    "less contrast": lambda p: ImageEnhance.Contrast(p).enhance(0.8),
    "cropped by 3 %": lambda p: trimmed(p, 0.03),
    "all at once": lambda p: jpeg(ImageEnhance.Brightness(trimmed(p, 0.02)).enhance(1.1), 50),
}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return scenes(60)


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found_and_strangers_are_not(pictures, change):
    originals = Prints.of(sketches(pictures))
    copies = Prints.of(sketches([CHANGES[change](picture) for picture in pictures]))
    pairs = copies_between(copies, originals)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert len(pairs) >= 0.95 * len(pictures)
    assert not len(copies_between(Prints.of(sketches(scenes(60, seed=1))), originals))


def test_groups_hold_every_copy(pictures):
    made = [pictures[0], *pictures, CHANGES["JPEG quality 50"](pictures[0]), pictures[7]]
    groups = alike(Prints.of(sketches(made)))
    assert [rows.tolist() for rows in members(groups)] == [[0, 1, 61], [8, 62]]


def test_same_shape_in_another_colour_is_no_copy():
    shape = np.full((2, 32, 32, 3), 255, np.uint8)
    shape[0, 8:20, 4:28] = 200, 30, 30
    shape[1, 8:20, 4:28] = 30, 60, 200
    prints = Prints.of(shape)
    assert np.bitwise_count(prints.hashes[0] ^ prints.hashes[1]) <= 4
    assert alike(prints).tolist() == [0, 1]


def test_flat_pictures_are_not_taken_for_one_another():
    rng = np.random.default_rng(3)
    levels = rng.integers(0, 250, (200, 1, 1, 1))
    nearly_flat = (levels + rng.integers(0, 4, (200, 32, 32, 3))).astype(np.uint8)
    prints = Prints.of(np.concatenate([nearly_flat, np.full((5, 32, 32, 3), 255, np.uint8)]))
    assert prints.flat.all()
    assert (alike(prints) == np.arange(205)).all()
    assert not len(copies_between(prints, prints))
    # A dot on white paper is something to see, and where it is makes the difference.
    paper = np.full((8, 32, 32, 3), 255, np.uint8)
    for row in range(8):
        paper[row, 4 * row : 4 * row + 3, 28 - 3 * row : 31 - 3 * row] = 0
    prints = Prints.of(paper)
    assert not prints.flat.any()
    assert (alike(prints) == np.arange(8)).all()


def test_pictures_with_one_hash_are_told_apart_by_their_thumbnails(pictures, monkeypatch):
    monkeypatch.setattr(
        duplicates, "perceptual_hash", lambda sketches: np.zeros(len(sketches), np.uint64)
    )
    prints = Prints.of(sketches([*pictures[:5], *pictures[:5], pictures[0]]))
    assert alike(prints).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def slow_hash(sketch: np.ndarray) -> int:
    """The formula in plain loops and float64."""
    gray = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in sketch.tolist()]
    wave = [[np.cos(np.pi * (2 * x + 1) * u / 64) for x in range(32)] for u in range(8)]
    scale = [np.sqrt(1 / 32)] + [np.sqrt(2 / 32)] * 7
    low = [
        scale[u]
        * scale[v]
        * sum(gray[y][x] * wave[u][y] * wave[v][x] for y in range(32) for x in range(32))
        for u in range(8)
        for v in range(8)
    ]
    middle = float(np.median(low))
    return sum(1 << place for place, value in enumerate(low) if value > middle)


def test_the_hash_is_its_formula(pictures):
    made = sketches(pictures[:4])
    assert perceptual_hash(made).tolist() == [slow_hash(sketch) for sketch in made]


def test_thumbnails_and_spread_are_their_formulas():
    made = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    small = thumbnail(made)
    assert small[1, 2, 3, 0] == round(float(made[1, 4:6, 6:8, 0].mean()))
    values = small[2].astype(float)
    deviation = np.mean([values[..., c].std() for c in range(3)])
    assert spread(small)[2] == pytest.approx(deviation, rel=1e-5)


def test_likeness_is_a_correlation_that_sees_through_brightness_and_crops(pictures):
    made = thumbnail(sketches(pictures[:6]))
    flat = made.astype(float).reshape(6, 256, 3)
    centred = (flat - flat.mean(1, keepdims=True)).reshape(6, -1)
    expected = np.corrcoef(centred)[0, 1:]
    assert likeness(np.repeat(made[:1], 5, 0), made[1:], enough=-1.0) == pytest.approx(
        expected, abs=1e-5
    )
    darker = (made * 0.7 + 20).astype(np.uint8)
    assert (likeness(made, darker) > 0.99).all()
    cut = thumbnail(sketches([p.crop((0, 0, 173, 180)) for p in pictures[:6]]))
    plain, aligned = likeness(made, cut, enough=-1.0), likeness(made, cut)
    assert (aligned >= plain).all()
    assert aligned.mean() > plain.mean() + 0.02
    assert (aligned[:5] > likeness(made[:5], cut[1:])).all()
    assert likeness(made, cut) == pytest.approx(likeness(cut, made), abs=1e-6)


def as_set(pairs) -> set[tuple[int, int]]:
    return {pair for i, j in pairs for pair in zip(i.tolist(), j.tolist(), strict=True)}


@pytest.mark.parametrize("distance", [0, 3, 11, 12, 15])
def test_hash_search_finds_what_a_full_comparison_finds(monkeypatch, distance):
    monkeypatch.setattr(duplicates, "_TILE", 100)
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**63, 700, dtype=np.uint64)
    near = base[rng.integers(0, 700, 350)]
    for _ in range(14):
        near = near ^ (np.uint64(1) << rng.integers(0, 64, 350, dtype=np.uint64))
    near[:50] = base[:50]
    differ = np.bitwise_count(near[:, None] ^ base[None])
    expected = set(map(tuple, np.argwhere(differ <= distance).tolist()))
    assert as_set(hash_pairs(near, base, distance=distance)) == expected
    assert len(expected) >= 50
    both = np.concatenate([near, base])
    differ = np.bitwise_count(both[:, None] ^ both[None])
    expected = {(i, j) for i, j in np.argwhere(differ <= distance).tolist() if i > j}
    assert as_set(hash_pairs(both, distance=distance)) == expected


def test_nothing_to_compare_is_no_error():
    none = Prints.of(np.empty((0, 32, 32, 3), np.uint8))
    one = Prints.of(sketches(scenes(1)))
    assert alike(none).tolist() == []
    assert alike(one).tolist() == [0]
    assert copies_between(none, one).shape == copies_between(one, none).shape == (0, 2)
    assert members(alike(one)) == []
    with pytest.raises(ValueError, match="distance is 64"):
        next(hash_pairs(one.hashes, one.hashes, distance=64))


def test_equal_digests_and_pairs_make_groups():
    digests = np.array([7, 5, 7, 9, 5, 7], np.uint64)
    known = np.array([True, True, True, True, True, False])
    groups = equal(digests, known)
    assert groups.tolist() == [0, 1, 0, 3, 1, 5]
    linked = joined(groups, np.array([4]), np.array([5]))
    assert linked.tolist() == [0, 1, 0, 3, 1, 1]
    assert joined(linked, np.array([5, 3]), np.array([2, 2])).tolist() == [0] * 6


def test_equal_digests_between_sets_name_the_first():
    one, other = np.array([4, 9, 4, 1], np.uint64), np.array([7, 4, 1, 4], np.uint64)
    assert equal_between(one, other).tolist() == [[0, 1], [2, 1], [3, 2]]
    assert equal_between(one, other[:0]).shape == equal_between(other[:0], one).shape == (0, 2)


def test_known_groups_stay_together(pictures):
    prints = Prints.of(sketches(pictures[:4]))
    assert alike(prints, same=np.array([0, 1, 0, 3])).tolist() == [0, 1, 0, 3]


def test_the_threshold_is_a_threshold(pictures):
    prints = Prints.of(sketches([pictures[0], CHANGES["all at once"](pictures[0])]))
    assert alike(prints, least=LIKENESS).tolist() == [0, 0]
    assert alike(prints, least=0.99999).tolist() == [0, 1]
