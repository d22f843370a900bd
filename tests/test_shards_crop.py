import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from shards.crop import Box, RandomCrop, central_square

WIDE = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}


def boxes(crop, height, width, *, ids=None, epoch=0):
    ids = np.arange(3000) if ids is None else np.asarray(ids)
    rows = crop.draws(ids, np.full(len(ids), epoch))
    return [crop.box(row, height, width) for row in rows]


def as_array(found):
    return np.array([(box.top, box.left, box.height, box.width) for box in found], float)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (40, 300), (300, 50)])
@pytest.mark.parametrize("options", [{}, WIDE, {"scale": (0.5, 0.5), "ratio": (1.0, 2.0)}])
def test_boxes_follow_the_law_of_random_resized_crop(height, width, options):
    torch.manual_seed(0)
    options = {"scale": (0.9, 1.0), "ratio": (3 / 4, 4 / 3)} | options
    picture = torch.empty(1, height, width)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(picture, list(options["scale"]), list(options["ratio"]))
            for _ in range(3000)
        ],
        float,
    )
    ours = as_array(boxes(RandomCrop(0, **options), height, width))
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + 3 * b[:, 1],
    ):
        assert np.asarray(ks_2samp(measure(ours), measure(theirs)))[1] > 1e-3


def test_a_box_depends_on_seed_epoch_and_sample_alone():
    crop = RandomCrop(7, **WIDE)
    whole = boxes(crop, 90, 120, epoch=2)
    chosen = [2500, 3, 77]
    assert boxes(RandomCrop(7, **WIDE), 90, 120, ids=chosen, epoch=2) == [whole[i] for i in chosen]
    for other in (boxes(crop, 90, 120, epoch=3), boxes(RandomCrop(8, **WIDE), 90, 120, epoch=2)):
        assert np.mean([a == b for a, b in zip(whole, other, strict=True)]) < 0.01


def test_the_numbers_of_a_box_are_independent():
    rows = RandomCrop(0).draws(np.arange(20_000), np.zeros(20_000, int))
    assert ((rows >= 0) & (rows < 1)).all()
    correlation = np.corrcoef(rows.T) - np.eye(rows.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(len(rows))
    assert np.abs(rows.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / len(rows))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)).map(sorted),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=22, max_size=22),
)
def test_a_box_never_leaves_its_picture(height, width, scale, ratio, row):
    box = RandomCrop(0, scale=scale, ratio=ratio).box(np.array(row), height, width)
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 1000, Box(0, 493, 10, 13)),  # nothing of 90 % of the area has a ratio up to 4/3
        (1000, 10, Box(493, 0, 13, 10)),
        (1, 1, Box(0, 0, 1, 1)),
    ],
)
def test_where_no_try_fits_the_middle_is_taken(height, width, box):
    assert set(boxes(RandomCrop(0), height, width)) == {box}


def test_without_a_crop_the_central_square_is_used():
    assert central_square(5, 10) == Box(0, 2, 5, 5)
    assert central_square(10, 5) == Box(2, 0, 5, 5)
    assert central_square(7, 7) == Box(0, 0, 7, 7)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.9, 0.5)},
        {"scale": (0.5, 1.1)},
        {"scale": (0.5,)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"ratio": (1.0, float("inf"))},
        {"ratio": (1.0, float("nan"))},
    ],
)
def test_senseless_ranges_are_refused(options):
    with pytest.raises(ValueError, match=f"crop: {next(iter(options))}="):
        RandomCrop(0, **options)
