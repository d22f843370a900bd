"""Augmentation: a function of seed, epoch and sample alone; ink on white paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.augment import Augment

STILL = {
    **dict.fromkeys(["aspect", "rotate", "shear", "shift", "gamma", "hue", "saturation"], 0.0),
    **dict.fromkeys(["gain", "sharpen", "flip", "gray", "posterize", "page", "erase"], 0.0),
    "scale": (1.0, 1.0),
}
GEOMETRY = {"aspect": 0.3, "rotate": 40.0, "shear": 0.3, "shift": 0.4, "scale": (0.5, 1.5)}
OPERATIONS = {
    "scale": (0.6, 0.6),
    "aspect": 0.3,
    "rotate": 30.0,
    "shear": 0.3,
    "shift": 0.4,
    "flip": 1.0,
    "gamma": 0.8,
    "hue": 0.3,
    "saturation": 0.8,
    "gain": 0.5,
    "gray": 1.0,
    "sharpen": 1.0,
    "posterize": 1.0,
    "page": 1.0,
    "erase": 1.0,
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def pictures(rows: int, side: int = 24, *, seed: int = 0) -> torch.Tensor:
    """Blots of colour on white paper, different in each picture."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((rows, 3, side, side), 255, dtype=torch.uint8)
    for image in images:
        for _ in range(4):
            top, left = torch.randint(2, side - 8, (2,), generator=generator).tolist()
            colour = torch.randint(0, 230, (3, 1, 1), generator=generator, dtype=torch.uint8)
            image[:, top : top + 6, left : left + 5] = colour
    return images


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@settings(max_examples=20, deadline=None)
@given(
    order=st.permutations(range(6)),
    count=st.integers(1, 6),
    seed=st.integers(-(2**40), 2**40),
    first=st.integers(0, 2**40),
    size=st.sampled_from([12, 24]),
)
def test_a_picture_depends_on_nothing_but_seed_epoch_and_id(order, count, seed, first, size):
    images, ids = pictures(6), torch.arange(6) * 7 + first
    epochs = numbers(0, 1, 2, 0, 5, 1)
    augment = Augment(seed=seed)
    together = augment(images, ids, epochs, size=size)
    chosen = torch.tensor(order[:count])
    part = Augment(seed=seed)(images[chosen], ids[chosen], epochs[chosen], size=size)
    # To the bit but for sums that a batch of another size adds up in another order.
    assert (part.int() - together[chosen].int()).abs().max() <= 1
    again = augment(images, ids, epochs, size=size)
    assert torch.equal(again, together)


def test_epochs_seeds_and_ids_make_a_difference():
    image = pictures(1).expand(40, -1, -1, -1)
    ids, epochs = torch.arange(40), torch.arange(40)
    zeros = torch.zeros(40, dtype=torch.int64)
    runs = {
        "by id": Augment()(image, ids, zeros, size=24),
        "by epoch": Augment()(image, zeros, epochs, size=24),
    }
    for name, run in runs.items():
        distinct = {picture.numpy().tobytes() for picture in run}
        assert len(distinct) == 40, name
    other = Augment(seed=1)(image, ids, zeros, size=24)
    same = (other == runs["by id"]).flatten(1).all(dim=1)
    assert not same.any()
    crossed = (runs["by id"][1:] == runs["by epoch"][1:]).flatten(1).all(dim=1)
    assert not crossed.any(), "id and epoch do not stand in for each other"


def test_nothing_asked_is_nothing_done():
    images = torch.randint(0, 256, (9, 3, 20, 20), dtype=torch.uint8)
    found = Augment(**STILL)(images, torch.arange(9), torch.zeros(9, dtype=torch.int64), size=20)
    assert (found.int() - images.int()).abs().max() <= 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), decoded=st.sampled_from([16, 20, 24, 32, 48]))
def test_white_paper_stays_white_under_all_but_a_coloured_page(seed, decoded):
    """What moves in from outside, too: there is no edge of the paper to be seen."""
    white = torch.full((8, 3, decoded, decoded), 255, dtype=torch.uint8)
    ids, epochs = torch.arange(8), torch.full((8,), seed)
    # Posterizing would round a veil away.
    everything = {**OPERATIONS, "scale": (0.5, 1.5), "page": 0.0, "posterize": 0.0}
    for options in ({**STILL, **GEOMETRY}, everything):
        assert (Augment(seed=seed, **options)(white, ids, epochs, size=16) == 255).all()


@pytest.mark.parametrize("decoded", [8, 16, 19, 24, 33, 64])
def test_out_comes_uint8_of_the_size_asked_for(decoded):
    images = pictures(3, decoded if decoded > 10 else 12)
    found = Augment()(images, torch.arange(3), numbers(0, 0, 0), size=16)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 3, 16, 16)


def test_smaller_pictures_keep_their_mean_and_do_not_alias():
    """Stripes one pixel wide must become gray, whatever the ratio, and not a moiré."""
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    found = Augment(**STILL)(stripes, numbers(0), numbers(0), size=32).float()
    assert found[..., 2:-2, 2:-2].sub(127.5).abs().max() < 2


@every_operation
def test_each_operation_alone_changes_pictures_without_losing_them(name):
    images = pictures(16) if name != "erase" else pictures(16) // 2  # white on white is no hole
    options = {**STILL, name: OPERATIONS[name]}
    found = Augment(**options)(
        images, torch.arange(16), torch.zeros(16, dtype=torch.int64), size=24
    )
    difference = (found.int() - images.int()).abs().flatten(1).max(dim=1).values
    assert (difference > 2).float().mean() > 0.7
    assert (found < 200).flatten(1).any(dim=1).float().mean() > 0.8, "there is ink left"


def test_a_flip_is_a_mirror():
    images = pictures(5)
    found = Augment(**{**STILL, "flip": 1.0})(
        images, torch.arange(5), torch.zeros(5, dtype=torch.int64), size=24
    )
    assert (found.int() - images.flip(-1).int()).abs().max() <= 1


def test_gray_has_no_colour():
    found = Augment(**{**STILL, "gray": 1.0})(
        pictures(5), torch.arange(5), torch.zeros(5, dtype=torch.int64), size=24
    ).int()
    assert (found.amax(dim=1) - found.amin(dim=1)).max() <= 1


def test_posterized_pictures_have_few_levels():
    found = Augment(**{**STILL, "posterize": 1.0})(
        torch.randint(0, 256, (8, 3, 20, 20), dtype=torch.uint8),
        torch.arange(8),
        torch.zeros(8, dtype=torch.int64),
        size=20,
    )
    assert all(3 <= len(one.unique()) <= 8 for one in found)


def test_a_hole_is_a_white_rectangle_of_the_size_stated():
    black = torch.zeros(200, 3, 40, 40, dtype=torch.uint8)
    found = Augment(**{**STILL, "erase": 1.0})(
        black, torch.arange(200), torch.zeros(200, dtype=torch.int64), size=40
    )
    assert ((found <= 1) | (found == 255)).all()
    sides = []
    for hole in (found == 255).all(dim=1):
        rows, columns = hole.any(dim=1).sum(), hole.any(dim=0).sum()
        assert hole.sum() == rows * columns, "a rectangle"
        sides += [rows.item(), columns.item()]
    assert max(sides) <= 19
    assert max(sides) >= 16


@pytest.mark.parametrize("chance", ["flip", "gray", "posterize", "page", "erase"])
def test_a_chance_is_met_as_often_as_it_says(chance):
    images = (pictures(1) if chance != "erase" else pictures(1) // 2).expand(400, -1, -1, -1)
    found = Augment(**{**STILL, chance: 0.3})(
        images, torch.arange(400), torch.zeros(400, dtype=torch.int64), size=24
    )
    changed = (found.int() - images.int()).abs().flatten(1).max(dim=1).values > 1
    assert 0.2 < changed.float().mean() < 0.4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *(({name: -0.1}, name) for name in STILL if name != "scale"),
        *(({name: float("nan")}, name) for name in STILL if name != "scale"),
        *(({name: 1.1}, name) for name in ("flip", "gray", "posterize", "page", "erase")),
        *(({name: float("inf")}, name) for name in ("rotate", "gamma", "sharpen")),
        ({"scale": (1.2, 0.7)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (1.0,)}, "scale"),
        ({"scale": (float("nan"), 1.0)}, "scale"),
        ({"scale": (0.5, float("inf"))}, "scale"),
    ],
)
def test_senseless_options_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=f"augment: {named}=") as caught:
        Augment(**options)
    assert "\n" not in str(caught.value)


def test_what_is_switched_off_leaves_the_draws_of_the_rest_as_they_were():
    images, ids, epochs = pictures(8), numbers(*range(8)), numbers(*[1] * 8)
    assert torch.equal(Augment(**STILL)(images, ids, epochs, size=24), images)
    for name in ("gray", "posterize", "page", "erase"):
        alone = Augment(**{**STILL, name: 1.0})(images, ids, epochs, size=24)
        weak = {"rotate": 1e-9, "hue": 1e-9, "gain": 1e-9}  # not off, yet too little to be seen
        beside = Augment(**{**STILL, name: 1.0, **weak})(images, ids, epochs, size=24)
        assert not torch.equal(alone, images)
        assert (alone.int() - beside.int()).abs().max() <= 1
