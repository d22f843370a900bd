"""Many processes, many pieces: the loss and every gradient of one process with one graph."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss
from pairs_corpus import TINY_BERT, TINY_RESNET, TINY_VIT, tiny_model
from ranks import run_ranks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from align.losses import build_loss
from align.objective import ContrastiveObjective, derive
from benchmarks import parity

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 1e-12
"""What is promised is 1e-6; anything but rounding in float64 is a mistake."""
VARIANTS = ("patch dropout", "locked", "batch norm")


def variant(name: str) -> ContrastiveObjective:
    """A model with something that pieces, or processes, could spoil."""
    text = {**TINY_BERT, "hidden_dropout_prob": 0.5}
    if name == "batch norm":
        image = {"image": "timm:resnet10t", "image_options": TINY_RESNET}
    else:
        options = {**TINY_VIT, "patch_size": 8, "patch_drop_rate": 0.5}
        image = {"image": "timm:vit_tiny_patch16_224", "image_options": options}
    model = tiny_model(**image, text_options=text)
    if name == "locked":
        for part in (model.image, model.image_projection):
            part.requires_grad_(False)
    return ContrastiveObjective(model, build_loss("infonce")).double().train()


def pairs_of(objective: ContrastiveObjective, *, several: bool = True) -> parity.Pairs:
    return parity.make_pairs(objective.model, several=several)


def ranks_of_all(rank: int, world: int, folder: str) -> None:
    """The table, and on two processes what is not in it."""
    parity.on_rank(rank, world, folder)
    if world == 2:
        for name in VARIANTS:
            objective = variant(name)
            found = parity.spread(objective, pairs_of(objective), 4)
            torch.save(found, f"{folder}/{name}_{rank}.pt")
        exchanged = Path(folder, f"exchanged_{rank}.json")
        exchanged.write_text(json.dumps([counted(world, pieces) for pieces in (1, 4)]))


def counted(world: int, pieces: int) -> dict[str, int]:
    """How many numbers of gradients were exchanged in a step, and how many parameters have."""
    objective, seen = parity.make_objective("infonce", 0.5), [0]
    wrapped = DistributedDataParallel(objective)

    def hook(group, bucket):
        seen[0] += bucket.buffer().numel()
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(dist.group.WORLD, hook)
    pairs = pairs_of(objective)
    numbers = [dist.get_rank() + world * piece for piece in range(pieces)]
    mine = [pairs.piece(number, world * pieces) for number in numbers]
    derive(objective, mine, seeds=numbers, wrapped=wrapped, silence=wrapped.no_sync)
    return {"exchanged": seen[0], "values": sum(one.numel() for one in objective.parameters())}


@pytest.fixture(scope="module")
def left_by(tmp_path_factory) -> Callable[[int], str]:
    """What so many processes left, in a folder."""

    @cache
    def folder_of(world: int) -> str:
        folder = str(tmp_path_factory.mktemp(f"ranks{world}"))
        if world == 1:
            parity.on_rank(0, 1, folder)
        else:
            run_ranks(ranks_of_all, world, folder, seconds=240)
        return folder

    return folder_of


@pytest.mark.slow
@pytest.mark.parametrize("world", parity.RANKS)
def test_loss_and_every_gradient_are_those_of_one_process(left_by, world):
    rows = parity.compared(world, left_by(world))
    assert len(rows) == 4 * 2 * 2
    for row in rows:
        assert row.loss_error < ROUNDING, row
        assert row.gradient_error < ROUNDING, row


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_so_are_those_of_models_with(left_by, name):
    objective = variant(name)
    pairs = pairs_of(objective)
    expected = parity.reference(objective, [pairs.piece(one, 8) for one in range(8)])
    assert any(key.startswith("model.image") for key in expected) is (name != "locked")
    for rank in range(2):
        found = torch.load(f"{left_by(2)}/{name}_{rank}.pt")
        assert max(parity.errors(found, expected)) < ROUNDING


@pytest.mark.slow
def test_gradients_are_exchanged_once_in_a_step(left_by):
    for rank in range(2):
        for count in json.loads(Path(left_by(2), f"exchanged_{rank}.json").read_text()):
            assert count["exchanged"] == count["values"]


@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_of_one_process_too_and_statistics_see_each_of_them_once(name):
    ours, plain = variant(name), variant(name)
    pairs = pairs_of(ours)
    found = parity.spread(ours, pairs, 4)
    expected = parity.reference(plain, [pairs.piece(one, 4) for one in range(4)])
    assert max(parity.errors(found, expected)) < ROUNDING
    counts = 0
    for (key, mine), (_, other) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14, msg=key)
        if key.endswith("num_batches_tracked"):
            assert mine == 4
            counts += 1
    assert bool(counts) is (name == "batch norm")


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_and_those_that_the_loss_of_openclip_has(loss, pieces):
    def theirs(own, image, text, _labels):
        if loss == "infonce":
            return ClipLoss()(image, text, own.logit_scale.exp())
        return SigLipLoss()(image, text, own.logit_scale.exp(), own.logit_bias)

    ours, other = (parity.make_objective(loss, 0.5) for _ in range(2))
    pairs = pairs_of(ours, several=False)
    found = parity.spread(ours, pairs, pieces)
    expected = parity.reference(
        other, [pairs.piece(one, pieces) for one in range(pieces)], of=theirs
    )
    assert max(parity.errors(found, expected)) < ROUNDING


def test_the_comparison_sees_another_draw_and_a_lost_share():
    """What would be wrong, is: dropout drawn anew, one piece too few, a temperature of 1 / 4."""
    objective = parity.make_objective("infonce", 0.5)
    pairs = pairs_of(objective)
    expected = parity.reference(objective, [pairs.piece(one, 4) for one in range(4)])
    again = parity.make_objective("infonce", 0.5)
    pieces = [pairs.piece(one, 4) for one in range(4)]
    derive(again, pieces, seeds=[0, 1, 2, 9])
    found = {"": expected[""], **parity.gradients(again)}
    assert parity.errors(found, expected)[1] > 1e-2
    quarter = {**expected, "loss.logit_scale": expected["loss.logit_scale"] / 4}
    assert parity.errors(quarter, expected)[1] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="other parameters"):
        parity.errors({"": expected[""]}, expected)


def test_running_statistics_are_put_back_where_a_piece_fails():
    objective = variant("batch norm")
    pieces = [pairs_of(objective).piece(one, 2) for one in range(2)]
    before = {name: one.clone() for name, one in objective.model.named_buffers()}
    pieces[1] = replace(pieces[1], ids=pieces[1].ids.fill_(10**6))  # no such token
    with pytest.raises(IndexError):
        derive(objective, pieces, seeds=[0, 1])
    assert any("running_mean" in name for name in before)
    for name, one in objective.model.named_buffers():
        assert torch.equal(one, before[name]), name
