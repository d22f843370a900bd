"""Parameter groups, optimisers by name, and the schedule."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs_corpus import TINY_VIT, tiny_model
from torch import nn

from align.losses import InfoNCE
from align.objective import ContrastiveObjective
from align.optim import (
    build_optimizer,
    constant_factor,
    cosine_factor,
    parameter_groups,
    set_learning_rate,
)
from align.parameters import Rule, how_it_learns, named

MODELS = {
    "resnet and bert": {},
    "vit and roberta": {
        "image": "timm:vit_tiny_patch16_224",
        "image_options": TINY_VIT,
        "text": "hf:roberta",
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_groups_partition_the_trainable_parameters(name):
    objective = ContrastiveObjective(tiny_model(**MODELS[name]), InfoNCE())
    frozen = objective.model.image_projection.weight.requires_grad_(False)
    groups = parameter_groups(objective, weight_decay=0.3)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in objective.parameters() if p.requires_grad}
    assert id(frozen) not in listed


@pytest.mark.parametrize("name", MODELS)
def test_matrices_and_tables_decay_gains_biases_and_temperature_do_not(name):
    objective = ContrastiveObjective(tiny_model(**MODELS[name]), InfoNCE())
    groups = parameter_groups(objective, weight_decay=0.3)
    group_of = {id(p): group for group in groups for p in group["params"]}
    tables = {
        id(p)
        for part in objective.modules()
        if isinstance(part, nn.Embedding)
        for p in part.parameters(recurse=False)
    }
    assert tables
    exempt = {"model.image.backbone.cls_token", "model.image.backbone.pos_embed"}  # as timm says
    assert name == "resnet and bert" or exempt < dict(objective.named_parameters()).keys()
    for key, parameter in objective.named_parameters():
        group = group_of[id(parameter)]
        decays = parameter.ndim >= 2 and key not in exempt
        assert group["weight_decay"] == (0.3 if decays else 0.0), key
        muon = decays and id(parameter) not in tables
        assert group["use_fallback"] == (not muon), key
    assert group_of[id(objective.loss.logit_scale)]["weight_decay"] == 0


def test_groups_of_a_rule_learn_at_their_share_of_the_rate():
    objective = ContrastiveObjective(tiny_model(), InfoNCE())
    rules = [
        Rule("text.*", rate=0.1),
        Rule("image.*", rate=0.0),
        Rule("*.bias", weight_decay=0.7),
        Rule("text_projection.*", rate=2.0, weight_decay=0.0),
    ]
    learning = how_it_learns(objective, rules, weight_decay=0.3)
    groups = parameter_groups(objective, rules=rules, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in named(objective).items()}
    listed = [(names[id(one)], group) for group in groups for one in group["params"]]
    assert {name for name, _ in listed} == {name for name, one in learning.items() if one.rate}
    assert len(listed) == len({name for name, _ in listed})
    assert not any(name.startswith("image.") for name, _ in listed)
    for name, group in listed:
        one = learning[name]
        assert (group["rate"], group["weight_decay"]) == (one.rate, one.weight_decay)
        assert group["use_fallback"] == (one.kind != "matrix")
    optimizer = build_optimizer("adamw", groups, learning_rate=0.2)
    assert {group["rate"]: group["lr"] for group in optimizer.param_groups} == {
        rate: pytest.approx(0.2 * rate) for rate in (0.1, 1.0, 2.0)
    }
    set_learning_rate(optimizer, 0.05)
    set_learning_rate(optimizer, 0.05)
    assert {group["rate"]: group["lr"] for group in optimizer.param_groups} == {
        rate: pytest.approx(0.05 * rate) for rate in (0.1, 1.0, 2.0)
    }


def test_a_step_of_sgd_goes_as_far_as_the_rate_says():
    module = nn.Linear(3, 3)
    groups = parameter_groups(module, rules=[Rule("bias", rate=0.25)], weight_decay=0.0)
    optimizer = build_optimizer("sgd", groups, learning_rate=1.0, momentum=0.0, nesterov=False)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    module(torch.eye(3)).sum().backward()
    optimizer.step()
    for name, share in (("weight", 1.0), ("bias", 0.25)):
        parameter = module.get_parameter(name)
        assert parameter.grad is not None
        torch.testing.assert_close(before[name] - parameter.detach(), share * parameter.grad)


def test_nothing_to_optimise_is_said():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizer("adamw", [], learning_rate=0.1)


def test_empty_groups_are_left_out():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)) == 1
    assert parameter_groups(nn.Identity(), weight_decay=0.1) == []


def test_a_table_shared_by_two_modules_is_listed_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.out.weight = self.table.weight

    (group,) = parameter_groups(Tied(), weight_decay=0.1)
    assert len(group["params"]) == 1
    assert group["use_fallback"]


@given(
    steps=st.integers(1, 300),
    share=st.floats(0, 0.99),
    floor=st.floats(0, 0.99),
)
def test_the_schedule_rises_to_its_peak_then_falls_to_its_floor(steps, share, floor):
    warmup = int(share * steps)
    factors = [
        cosine_factor(step, warmup=warmup, steps=steps, floor=floor) for step in range(steps + 1)
    ]
    assert all(0 < factor <= 1 for factor in factors[:-1])
    assert factors[warmup] == pytest.approx(1)
    rising, falling = factors[: warmup + 1], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(factor >= floor for factor in falling)
    assert factors[steps] == pytest.approx(floor if warmup < steps else 1)
    assert cosine_factor(10 * steps + 5, warmup=warmup, steps=steps, floor=floor) == pytest.approx(
        floor
    )


@given(steps=st.integers(2, 200), warmup=st.integers(1, 50))
def test_warm_up_is_linear_and_never_zero(steps, warmup):
    for step in range(min(warmup, steps)):
        assert cosine_factor(step, warmup=warmup, steps=steps) == pytest.approx((step + 1) / warmup)


@given(half=st.integers(1, 100), floor=st.floats(0, 0.9))
def test_half_way_down_is_half_way(half, floor):
    factor = cosine_factor(10 + half, warmup=10, steps=10 + 2 * half, floor=floor)
    assert factor == pytest.approx((1 + floor) / 2)


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb", "sgd"])
def test_optimisers_by_name_move_every_weight_and_set_the_rate(name):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    before = [parameter.clone() for parameter in module.parameters()]
    optimizer = build_optimizer(name, parameter_groups(module, weight_decay=0.1), learning_rate=0.1)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    set_learning_rate(optimizer, 0.05)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}
    module(torch.arange(5)).pow(3).sum().backward()
    optimizer.step()
    assert not any(
        torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True)
    )


def test_muon_orthogonalises_matrices_and_leaves_tables_to_adamw():
    torch.manual_seed(0)
    embedding, linear = nn.Embedding(5, 8), nn.Linear(8, 8, bias=False)
    module = nn.Sequential(embedding, linear)
    groups = parameter_groups(module, weight_decay=0.0)
    optimizer = build_optimizer("muon", groups, learning_rate=0.1, ns_steps=8)
    table, matrix = embedding.weight, linear.weight
    before = matrix.detach().clone()
    module(torch.arange(5)).pow(2).sum().backward()
    optimizer.step()
    moved = torch.linalg.svdvals(matrix.detach() - before)[:5]  # the gradient has rank five
    assert (moved.max() / moved.min()).item() < 2
    assert "exp_avg_sq" in optimizer.state[table]
    assert "exp_avg_sq" not in optimizer.state[matrix]


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("adam_w", {}, ["unknown optimizer 'adam_w'", "near: adamw", "known: adamw"]),
        ("adamw", {"momentum": 0.9}, ["optimizer adamw does not take", "momentum"]),
        ("muon", {"no_such": 1}, ["optimizer muon does not take", "no_such"]),
        ("adamw", {"betas": [2.0, 0.9]}, ["beta"]),
    ],
)
def test_mistakes_are_one_line(name, options, parts):
    groups = parameter_groups(nn.Linear(2, 2), weight_decay=0.0)
    with pytest.raises(ValueError, match=r".") as caught:
        build_optimizer(name, groups, learning_rate=0.1, **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# --- constant, with a cool-down ---


@given(
    steps=st.integers(2, 200),
    shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    floor=st.floats(0, 0.9),
)
def test_a_constant_rate_rises_stays_and_falls_in_straight_lines(steps, shares, floor):
    warmup, cooldown = (int(share * steps) for share in shares)
    factors = [
        constant_factor(step, warmup=warmup, steps=steps, cooldown=cooldown, floor=floor)
        for step in range(steps + 1)
    ]
    assert all(0 < factor <= 1 for factor in factors[:-1])
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert factors[warmup : steps - cooldown] == [1.0] * (steps - cooldown - warmup)
    if cooldown:
        assert factors[steps] == pytest.approx(floor)
        falling = factors[steps - cooldown :]
        differences = [one - other for one, other in pairwise(falling)]
        assert differences == pytest.approx([(1 - floor) / cooldown] * cooldown)


@given(steps=st.integers(1, 100), more=st.integers(0, 100), cooldown=st.integers(0, 50))
def test_a_longer_run_takes_the_same_steps_up_to_the_cool_down(steps, more, cooldown):
    cooldown = min(cooldown, steps)
    for step in range(steps - cooldown + 1):
        one, other = (
            constant_factor(step, warmup=5, steps=length, cooldown=cooldown)
            for length in (steps, steps + more)
        )
        assert one == other


def test_a_rate_goes_no_lower_behind_the_end():
    assert constant_factor(99, warmup=0, steps=10, cooldown=4, floor=0.25) == 0.25
    assert constant_factor(99, warmup=0, steps=10, cooldown=0, floor=0.25) == 1.0
