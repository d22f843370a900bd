"""Tiled losses against a NumPy transcription, OpenCLIP's own, and what they may not allocate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align.losses import InfoNCE, Sigmoid, tiles
from align.losses.infonce import log_sums
from align.losses.loss import ContrastiveLoss

LOSSES = [InfoNCE, Sigmoid]


def unit_rows(rows: int, dim: int, *, seed: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype)


def oracle(loss: ContrastiveLoss, image, text, labels) -> dict[str, np.ndarray]:
    """Loss and gradients in float64 with every matrix written out."""
    x, y = (one.detach().double().numpy() for one in (image, text))
    n, scale = len(x), math.exp(loss.logit_scale.item())
    right = np.eye(n) if labels is None else np.equal.outer(labels.numpy(), labels.numpy())
    cosines = x @ y.T
    if isinstance(loss, InfoNCE):
        s = scale * cosines
        target = right / right.sum(axis=1, keepdims=True)
        target = (1 - loss.label_smoothing) * target + loss.label_smoothing / n
        by_row, by_column = (
            np.log(np.exp(s - s.max(axis, keepdims=True)).sum(axis, keepdims=True))
            + s.max(axis, keepdims=True)
            for axis in (1, 0)
        )
        value = (target * (by_row - s) + target * (by_column - s)).sum() / (2 * n)
        weights = (np.exp(s - by_row) + np.exp(s - by_column) - 2 * target) / (2 * n)
    else:
        assert loss.logit_bias is not None
        s = scale * cosines + loss.logit_bias.item()
        z = 2.0 * right - 1
        value = np.logaddexp(0, -z * s).sum() / n
        weights = -z / (1 + np.exp(z * s)) / n
    found = {
        "loss": value,
        "image": scale * weights @ y,
        "text": scale * weights.T @ x,
        "logit_scale": scale * (weights * cosines).sum(),
    }
    return found if isinstance(loss, InfoNCE) else {**found, "logit_bias": weights.sum()}


def derived(loss: ContrastiveLoss, image, text, labels=None) -> dict[str, np.ndarray]:
    rows = image.clone().requires_grad_(), text.clone().requires_grad_()
    value = loss(*rows, labels)
    named = dict(loss.named_parameters())
    gradients = torch.autograd.grad(value, [*rows, *named.values()])
    found = dict(zip(["image", "text", *named], gradients, strict=True), loss=value)
    return {name: one.detach().double().numpy() for name, one in found.items()}


def assert_equal(found: dict, expected: dict, *, rel: float, near: float) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        np.testing.assert_allclose(found[name], one, rtol=rel, atol=near, err_msg=name)


def build(kind: type, **options) -> ContrastiveLoss:
    return kind(min_temperature=1e-4, **options).double()


@pytest.fixture
def edge(monkeypatch):
    """Tiles of 4 x 4, so that a few rows make many."""
    monkeypatch.setitem(tiles._EDGE, "cpu", 4)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(LOSSES),
    rows=st.integers(1, 14),
    size=st.integers(1, 5),
    classes=st.none() | st.integers(1, 14),
    smoothing=st.sampled_from([0.0, 0.3]),
    temperature=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_equal_the_transcription(
    kind, rows, size, classes, smoothing, temperature, seed
):
    image, text = unit_rows(rows, 5, seed=seed), unit_rows(rows, 5, seed=seed + 100)
    labels = None
    if classes is not None:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(-classes, classes, (rows,), generator=generator)
    own = {"label_smoothing": smoothing} if kind is InfoNCE else {"bias": -3.0}
    loss = build(kind, temperature=temperature, **own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles._EDGE, "cpu", size)
        found = derived(loss, image, text, labels)
    assert_equal(found, oracle(loss, image, text, labels), rel=1e-9, near=1e-11)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("classes", [None, 400])
def test_tiles_of_the_real_size_in_fp32(kind, classes):
    """1030 rows are two tiles and a rest of 6."""
    image, text = (unit_rows(1030, 16, seed=seed, dtype=torch.float32) for seed in (0, 1))
    labels = None
    if classes:
        labels = torch.randint(classes, (1030,), generator=torch.Generator().manual_seed(2))
    loss = kind(temperature=0.05)
    found, expected = derived(loss, image, text, labels), oracle(loss, image, text, labels)
    assert_equal(found, expected, rel=1e-4, near=1e-6)
    for side in ("image", "text"):
        apart = np.linalg.norm(found[side] - expected[side]) / np.linalg.norm(expected[side])
        assert apart < 3e-6


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_gradients_equal_openclips(temperature):
    import open_clip

    image, text = (unit_rows(600, 24, seed=seed, dtype=torch.float32) for seed in (0, 1))
    theirs = {InfoNCE: open_clip.loss.ClipLoss(), Sigmoid: open_clip.loss.SigLipLoss()}
    for kind, other in theirs.items():
        loss = kind(temperature=temperature)
        found = derived(loss, image, text)
        rows = [one.clone().requires_grad_() for one in (image, text)]
        own = [] if loss.logit_bias is None else [loss.logit_bias]
        value = other(*rows, loss.scale(), *own)
        gradients = torch.autograd.grad(value, [*rows, loss.logit_scale, *own])
        names = ["image", "text", "logit_scale", "logit_bias"][: len(gradients)]
        expected = {
            name: one.double().numpy() for name, one in zip(names, gradients, strict=True)
        } | {"loss": value.item()}
        assert_equal(found, expected, rel=2e-4, near=3e-6)


def far_rows(dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Eleven pairs that point away from each other, and one whose text is near its image.

    All images lie close together and all texts opposite, but for the last text.
    """
    axis = unit_rows(1, 6, seed=0)
    image = F.normalize(axis + 0.1 * unit_rows(12, 6, seed=1), dim=-1)
    text = F.normalize(-axis + 0.1 * unit_rows(12, 6, seed=2), dim=-1)
    return image.to(dtype), torch.cat([text[:-1], image[-1:]]).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "scale", "rel", "near"),
    [(torch.float32, 100, 1e-4, 1e-4), (torch.float64, 2000, 1e-9, 1e-9)],
)
def test_nothing_overflows_or_vanishes_where_rows_are_far(edge, dtype, scale, rel, near):
    """Similarities of a row and of a column span twice the scale, far beyond a float's reach."""
    image, text = far_rows(dtype)
    loss = build(InfoNCE, temperature=1 / scale).to(dtype)
    turned = tiles.Tiles(image, text, loss.scale().detach())
    assert log_sums(turned).shift is None
    assert_equal(
        derived(loss, image, text), oracle(loss, image, text, None), rel=rel, near=near * scale
    )


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_one_exponential_serves_rows_and_columns_alike(edge, scale):
    """All in all 7 images against 11 texts, some of which are the images themselves."""
    image = unit_rows(7, 8, seed=0, dtype=torch.float32)
    text = torch.cat([image[:4], unit_rows(7, 8, seed=1, dtype=torch.float32)])
    found = log_sums(tiles.Tiles(image, text, torch.tensor(scale)))
    assert found.shift is not None
    similarity = scale * image.double() @ text.double().T
    for one, dim in ((found.of_rows, 1), (found.of_columns, 0)):
        torch.testing.assert_close(one.double(), similarity.logsumexp(dim), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_bad_number_is_seen_and_nothing_hangs(edge, kind):
    image, text = unit_rows(9, 4, seed=0), unit_rows(9, 4, seed=1)
    image[3, 2] = math.nan
    assert math.isnan(build(kind, temperature=0.1)(image, text).item())


def test_bf16_rows_at_scale_100_are_far_nearer_to_float64_than_openclips():
    import open_clip

    image = unit_rows(512, 64, seed=0)
    text = F.normalize(image + unit_rows(512, 64, seed=1) * 3, dim=-1)
    rows = [one.bfloat16() for one in (image, text)]
    loss = InfoNCE(temperature=0.01)
    exact = oracle(loss, rows[0], rows[1], None)["image"]

    def error(function) -> float:
        mine = [one.clone().requires_grad_() for one in rows]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (gradient,) = torch.autograd.grad(function(*mine), mine[:1])
        assert gradient.dtype == torch.bfloat16  # 1.7e-3 of the error is this rounding alone
        apart = np.linalg.norm(gradient.double().numpy() - exact) / np.linalg.norm(exact)
        return float(apart)

    theirs = open_clip.loss.ClipLoss()
    assert error(loss) < 2.5e-3
    assert error(lambda *mine: theirs(*mine, torch.tensor(100.0))) > 3 * error(loss)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(edge, kind, labelled):
    image, text = (unit_rows(6, 3, seed=seed).requires_grad_() for seed in (0, 1))
    labels = torch.tensor([0, 1, 0, 2, 3, 0]) if labelled else None
    loss = build(kind, temperature=0.5)

    def value(image, text, *_parameters):
        return loss(image, text, labels)

    assert torch.autograd.gradcheck(value, (image, text, *loss.parameters()))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [one.numel() for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return found


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_no_matrix_of_all_pairs_exists(edge, kind, labelled):
    image, text = (unit_rows(64, 3, seed=seed).requires_grad_() for seed in (0, 1))
    labels = torch.arange(64) // 2 if labelled else None
    loss = build(kind, temperature=0.1)
    with Largest() as largest:
        loss(image, text, labels).backward()
    assert image.grad is not None
    assert largest.numbers == 64 * 3


def test_the_far_rows_path_has_no_matrix_of_all_pairs_either(edge):
    image, text = (one.repeat(4, 1).requires_grad_() for one in far_rows(torch.float32))
    with Largest() as largest:
        InfoNCE(temperature=0.01)(image, text).backward()
    assert largest.numbers == 48 * 6


@pytest.mark.parametrize("wanted", ["image", "text", "neither"])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_frozen_tower_leaves_the_other_gradients_alone(edge, kind, wanted):
    image, text = unit_rows(9, 4, seed=0), unit_rows(9, 4, seed=1)
    loss = build(kind, temperature=0.1)
    expected = oracle(loss, image, text, None)
    rows = {"image": image, "text": text}
    if wanted != "neither":
        rows[wanted].requires_grad_()
    loss(image, text).backward()
    found = {name: one.grad for name, one in {**rows, **dict(loss.named_parameters())}.items()}
    for name, one in found.items():
        if name in rows and name != wanted:
            assert one is None
        else:
            assert one is not None
            np.testing.assert_allclose(one, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_fixed_temperature_takes_no_gradient(edge, kind):
    image, text = unit_rows(9, 4, seed=0).requires_grad_(), unit_rows(9, 4, seed=1)
    loss = build(kind, temperature=0.1).requires_grad_(False)
    loss(image, text).backward()
    expected = oracle(loss, image, text, None)["image"]
    assert image.grad is not None
    np.testing.assert_allclose(image.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_without_gradients_the_loss_is_the_same(edge, kind):
    image, text = unit_rows(9, 4, seed=0).requires_grad_(), unit_rows(9, 4, seed=1)
    loss = build(kind, temperature=0.1)
    with torch.no_grad():
        quiet = loss(image, text)
    assert not quiet.requires_grad
    assert quiet.item() == pytest.approx(loss(image, text).item(), rel=1e-14)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_graph_that_is_kept_is_derived_again_to_the_same(edge, kind):
    image, text = unit_rows(9, 4, seed=0).requires_grad_(), unit_rows(9, 4, seed=1)
    value = build(kind, temperature=0.1)(image, text)
    (first,) = torch.autograd.grad(value, [image], retain_graph=True)
    (again,) = torch.autograd.grad(3 * value, [image])
    torch.testing.assert_close(again, 3 * first, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_second_derivative_is_refused(kind):
    image, text = unit_rows(4, 4, seed=0).requires_grad_(), unit_rows(4, 4, seed=1)
    value = kind()(image, text)
    with pytest.raises(RuntimeError, match="cannot be derived again: leave out create_graph"):
        torch.autograd.grad(value, [image], create_graph=True)


def test_one_pair_costs_nothing_by_infonce_and_little_by_sigmoid():
    row = unit_rows(1, 4, seed=0, dtype=torch.float32)
    assert InfoNCE()(row, row).item() == pytest.approx(0, abs=1e-5)
    assert Sigmoid(bias=2.0)(row, row).item() == pytest.approx(math.log1p(math.exp(-12)), abs=1e-6)


def test_sigmoid_begins_as_siglip_does():
    loss = Sigmoid()
    assert loss.scale().item() == pytest.approx(10)
    assert loss.logit_bias is not None
    assert loss.logit_bias.item() == -10
    with pytest.raises(ValueError, match="Sigmoid needs 0 < min_temperature"):
        Sigmoid(temperature=0.0)
