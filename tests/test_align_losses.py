"""The losses against a slow transcription, OpenCLIP's own, and themselves on several processes."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_corpus import SHAPES, TINY_BERT, TINY_VIT, tiny_model
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from align.gather import world_size
from align.losses import LOSSES, InfoNCE, Sigmoid, build_loss, tiles
from align.losses.loss import ContrastiveLoss
from align.model import DualEncoder
from align.objective import ContrastiveObjective, Pairs
from pipelines.config import ConfigError
from pipelines.losses import make_loss
from pipelines.schemas.optimizer import LossConfig


def slow_info_nce(image, text, labels, *, scale: float, smoothing: float) -> float:
    """The formula of the docstring, one number at a time, in float64."""
    n = len(image)
    similarity = [[scale * float(np.dot(x, y)) for y in text] for x in image]
    total = 0.0
    for rows in (similarity, [list(column) for column in zip(*similarity, strict=True)]):
        for i in range(n):
            log_sum = math.log(sum(math.exp(s - max(rows[i])) for s in rows[i])) + max(rows[i])
            right = [j for j in range(n) if labels[j] == labels[i]]
            for j in range(n):
                share = (1 - smoothing) * (j in right) / len(right) + smoothing / n
                total += share * (log_sum - rows[i][j])
    return total / (2 * n)


def unit_rows(rows: int, dim: int, *, seed: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=dtype), dim=-1)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    kinds=st.integers(1, 9),
    smoothing=st.sampled_from([0.0, 0.1]),
    temperature=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_equals_the_slow_transcription(rows, kinds, smoothing, temperature, seed):
    image, text = unit_rows(rows, 5, seed=seed), unit_rows(rows, 5, seed=seed + 100)
    labels = torch.randint(kinds, (rows,), generator=torch.Generator().manual_seed(seed))
    loss = InfoNCE(temperature=temperature, label_smoothing=smoothing)
    expected = slow_info_nce(
        image.double().numpy(),
        text.double().numpy(),
        labels.tolist(),
        scale=1 / temperature,
        smoothing=smoothing,
    )
    assert loss(image, text, labels).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_equals_openclip_where_each_row_has_one_positive():
    import open_clip

    image, text = unit_rows(16, 8, seed=0), unit_rows(16, 8, seed=1)
    ours = InfoNCE(temperature=0.05)
    theirs = open_clip.ClipLoss()(image, text, logit_scale=torch.tensor(20.0))
    assert ours(image, text).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_labels_that_all_differ_are_no_labels():
    image, text = unit_rows(6, 4, seed=0), unit_rows(6, 4, seed=1)
    loss = InfoNCE()
    labels = torch.tensor([7, -3, 2**62, 0, 5, 1])
    assert torch.equal(loss(image, text, labels), loss(image, text))


def test_a_shared_caption_is_not_its_own_negative():
    text = unit_rows(1, 4, seed=1).expand(3, 4)
    loss = InfoNCE(temperature=0.01)
    right = loss(text, text, torch.zeros(3, dtype=torch.long))
    # The target's own entropy, to the rounding of similarities of 100.
    assert right.item() == pytest.approx(math.log(3), abs=3e-5)


def test_temperature_stays_within_its_bound():
    loss = InfoNCE(temperature=0.05, min_temperature=0.02)
    with torch.no_grad():
        loss.logit_scale.fill_(100.0)
    assert loss.scale().item() == pytest.approx(50.0)
    image, text = unit_rows(4, 4, seed=0), unit_rows(4, 4, seed=1)
    assert math.isfinite(loss(image, text).item())


def test_temperature_comes_back_from_its_bound():
    """Rows that are all alike want a high temperature, wherever an optimiser overshot to."""
    rows = unit_rows(1, 4, seed=0).expand(8, 4)
    other = unit_rows(8, 4, seed=1)
    loss = InfoNCE(temperature=0.05, min_temperature=0.02)
    with torch.no_grad():
        loss.logit_scale.fill_(100.0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    loss(rows, other).backward()
    optimizer.step()
    assert loss.scale().item() < 50


def test_half_precision_rows_are_computed_in_fp32():
    image, text = unit_rows(64, 32, seed=0).bfloat16(), unit_rows(64, 32, seed=1).bfloat16()
    loss = InfoNCE(temperature=0.01)
    expected = loss(image.float(), text.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(image, text), expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": 0.0}, "min_temperature"),
        ({"temperature": 0.01, "min_temperature": 0.1}, "min_temperature"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_senseless_options_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        InfoNCE(**options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("infonse", "unknown loss 'infonse'; known: infonce, "),
        ("foo.bar:Baz", "'foo.bar:Baz': module foo.bar cannot be imported: No module named 'foo'"),
        ("os.path:Baz", "'os.path:Baz': module os.path has no Baz"),
        ("os:path", "must be a subclass of align.losses.loss.ContrastiveLoss"),
        ("torch.nn:MSELoss", "must be a subclass of align.losses.loss.ContrastiveLoss"),
    ],
)
def test_what_is_no_loss_is_told(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_loss(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sigmoid",
            {"bias": "abc"},
            "loss.options.bias: bias of loss sigmoid must be a number",
        ),
        ("sigmoid", {"bias": True}, "loss.options.bias: bias of loss sigmoid must be a number"),
        ("sigmoid", {"gamma": 1.0}, "loss.options.gamma: loss sigmoid has no option 'gamma'"),
        ("infonce", {"label_smoothing": 1}, "loss.options.label_smoothing: InfoNCE needs 0 <= "),
        (
            "global_contrastive",
            {"gamma_visits": 1.5},
            "loss.options.gamma_visits: gamma_visits",
        ),
        ("torch.nn:MSELoss", {}, "loss.name: loss 'torch.nn:MSELoss' must be a subclass of "),
    ],
)
def test_a_mistake_in_a_loss_names_its_key(name, options, message):
    with pytest.raises(ConfigError) as caught:
        make_loss(LossConfig(name=name, options=options), samples=8)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_numbers():
    loss = make_loss(LossConfig(name="sigmoid", options={"bias": -3}), samples=8)
    assert loss.logit_bias is not None
    assert loss.logit_bias.item() == -3.0


class TwoTowers(nn.Module):
    """The least model that has weights on both sides and a temperature."""

    def __init__(self, loss: ContrastiveLoss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.loss = loss
        self.double()

    def forward(self, images, texts, labels):
        image = F.normalize(self.image(images), dim=-1)
        text = F.normalize(self.text(texts), dim=-1)
        return self.loss(image, text, labels)


def models() -> dict[str, TwoTowers]:
    """Losses that ranks share; the last one has a tower that learns nothing."""
    losses = {
        "infonce": InfoNCE(temperature=0.1),
        "smoothed": InfoNCE(temperature=0.1, label_smoothing=0.2),
        "far": InfoNCE(temperature=0.0004, min_temperature=0.0004),
        "sigmoid": Sigmoid(temperature=0.1, bias=-2.0),
        "locked": Sigmoid(temperature=0.1, bias=-2.0),
    }
    found = {name: TwoTowers(loss) for name, loss in losses.items()}
    found["locked"].image.requires_grad_(False)
    return found


def whole_batch(*, labelled: bool):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    texts = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return images, texts, torch.tensor([0, 1, 2, 0, 3, 1, 4, 0]) if labelled else None


def gradients_of_rank(rank: int, world: int, folder: str) -> None:
    tiles._EDGE["cpu"] = 3
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    found = {}
    for name, model in models().items():
        for labelled in (False, True):
            images, texts, labels = whole_batch(labelled=labelled)
            wrapped = DistributedDataParallel(model)
            own = None if labels is None else labels[mine]
            loss = wrapped(images[mine], texts[mine], own)
            model.zero_grad()
            loss.backward()
            value = loss.detach().clone()
            dist.all_reduce(value)
            gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
            found[name, labelled] = {"loss": value / world, **copy.deepcopy(gradients)}
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_give_the_gradient_of_the_whole_batch(tmp_path, world):
    run_ranks(gradients_of_rank, world, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, alone in models().items():
        for labelled in (False, True):
            loss = alone(*whole_batch(labelled=labelled))
            alone.zero_grad()
            loss.backward()
            learning = {key: p.grad for key, p in alone.named_parameters() if p.requires_grad}
            for found in (rank[name, labelled] for rank in ranks):
                assert found.pop("loss").item() == pytest.approx(loss.item(), rel=1e-12)
                assert found.keys() == learning.keys()
                for key, gradient in learning.items():
                    assert gradient is not None
                    near = 1e-13 * alone.loss.scale().item()
                    torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=near)


class Counted:
    """What the collectives of one step bring to this rank, in bytes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.all_gather, self.all_to_all, self.all_reduce = 0, 0, 0
        gather, exchange, reduce = dist.all_gather, dist.all_to_all_single, dist.all_reduce

        def counting_gather(parts, mine, *args, **kwargs):
            self.all_gather += (len(parts) - 1) * mine.nbytes
            return gather(parts, mine, *args, **kwargs)

        def counting_exchange(received, parts, *args, **kwargs):
            self.all_to_all += received.nbytes * (world_size() - 1) // world_size()
            return exchange(received, parts, *args, **kwargs)

        def counting_reduce(tensor, *args, **kwargs):
            self.all_reduce += tensor.nbytes
            return reduce(tensor, *args, **kwargs)

        patch.setattr(dist, "all_gather", counting_gather)
        patch.setattr(dist, "all_to_all_single", counting_exchange)
        patch.setattr(dist, "all_reduce", counting_reduce)


def bytes_of_rank(rank: int, world: int, folder: str) -> None:
    image, text = (unit_rows(6, 16, seed=rank + 10 * side).requires_grad_() for side in (0, 1))
    found = {}
    for loss in (InfoNCE(), Sigmoid()):
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            loss(image, text).backward()
        found[type(loss).__name__] = vars(counted)
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_only_texts_their_gradients_and_sums_over_columns_travel(tmp_path):
    run_ranks(bytes_of_rank, 2, str(tmp_path))
    for rank in range(2):
        rows = 6 * 16 * 4  # those of the other rank
        sums = 2 * 12 * 4  # of two reductions, each of which passes a rank twice
        expected = {"all_gather": rows, "all_to_all": rows, "all_reduce": sums}
        assert torch.load(tmp_path / f"{rank}.pt") == {
            "InfoNCE": expected,
            "Sigmoid": {**expected, "all_reduce": 0},
        }


def uneven_pairs(model: DualEncoder):
    """384 pictures and texts of 1 to 16 tokens; those of the first half are the short ones."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (384, 3, 32, 32), generator=generator, dtype=torch.uint8)
    texts = [" ".join([SHAPES[at % 8]] * (at % 3 if at < 192 else at % 17)) for at in range(384)]
    return images, model.tokenize(texts), torch.randint(0, 300, (384,), generator=generator)


def real_objective() -> ContrastiveObjective:
    deep = {**TINY_BERT, "num_hidden_layers": 2}
    model = tiny_model(image="timm:vit_tiny_patch16_224", image_options=TINY_VIT, text_options=deep)
    return ContrastiveObjective(model, InfoNCE(temperature=0.1)).train()


def gradients_of_real_towers(rank: int, world: int, folder: str, chunks: int) -> None:
    objective = real_objective()
    objective.model.text.chunks = chunks
    images, tokens, labels = uneven_pairs(objective.model)
    rows = 384 // world
    mine = slice(rank * rows, (rank + 1) * rows)
    width = int(tokens.mask[mine].sum(dim=1).max())  # as a loader of its own would pad them
    given_ = images[mine], tokens.ids[mine, :width], tokens.mask[mine, :width], labels[mine]
    model = DistributedDataParallel(objective)  # which has to live until all is derived
    model(Pairs(*given_, labels[mine])).loss.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save(gradients, Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_with_texts_of_other_lengths_give_the_gradient_of_one(tmp_path):
    alone = real_objective()
    alone.model.text.chunks = 1
    images, tokens, labels = uneven_pairs(alone.model)
    loss = alone(Pairs(images, tokens.ids, tokens.mask, labels, labels)).loss
    assert loss is not None
    loss.backward()
    run_ranks(gradients_of_real_towers, 2, str(tmp_path), 3)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-4 or name.endswith("key.bias"), name
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_rows_that_do_not_belong_together_are_refused(name):
    loss = build_loss(name, samples=8)
    with pytest.raises(ValueError, match=r"as many images as texts.*\[8, 4\] and \[6, 4\]"):
        loss.refuse_uneven(torch.zeros(8, 4), torch.zeros(6, 4), None)
    with pytest.raises(ValueError, match=r"a label for each of 8 rows; got \[5\]"):
        loss.refuse_uneven(torch.zeros(8, 4), torch.zeros(8, 4), torch.zeros(5))
