"""Rules by name: what learns, how fast, with what decay; towers locked but for their end."""

import copy
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_corpus import TINY_BERT, TINY_RESNET, TINY_VIT, tiny_model
from torch import nn

from align.losses import InfoNCE
from align.objective import ContrastiveObjective
from align.optim import parameter_groups
from align.parameters import Learning, Rule, falling, freeze, how_it_learns, locked, named

DEEP_BERT = {**TINY_BERT, "num_hidden_layers": 3, "hidden_dropout_prob": 0.1}
DEEP_VIT = {**TINY_VIT, "depth": 3, "proj_drop_rate": 0.1}
OPEN_CLIP_TEXT = {"layers": 2, "width": 32, "heads": 2, "context_length": 16}
MODELS = {
    "resnet and bert": {"text_options": DEEP_BERT},
    "vit and roberta": {
        "image": "timm:vit_tiny_patch16_224",
        "image_options": DEEP_VIT,
        "text": "hf:roberta",
        "text_options": DEEP_BERT,
    },
    "open_clip": {
        "image": "open_clip:ViT-B-32",
        "image_options": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text": "open_clip:ViT-B-32",
        "text_options": OPEN_CLIP_TEXT,
    },
}


@pytest.fixture(scope="module", params=MODELS)
def objective(request) -> ContrastiveObjective:
    return ContrastiveObjective(tiny_model(**MODELS[request.param]), InfoNCE())


class Small(nn.Module):
    """Ten parameters in a tree of names, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
        self.second = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.first[0].weight  # pyright: ignore
        self.scale = nn.Parameter(torch.zeros(()))


# --- rules ---


def test_without_rules_matrices_and_tables_decay_and_all_learn_at_one_rate():
    found = how_it_learns(Small(), weight_decay=0.3)
    assert found == {
        "scale": Learning(1.0, 0.0, "gain"),
        "first.0.weight": Learning(1.0, 0.3, "table"),
        "first.1.weight": Learning(1.0, 0.3, "matrix"),
        "first.1.bias": Learning(1.0, 0.0, "gain"),
        "first.2.weight": Learning(1.0, 0.0, "gain"),
        "first.2.bias": Learning(1.0, 0.0, "gain"),
        "second.a.weight": Learning(1.0, 0.3, "matrix"),
        "second.a.bias": Learning(1.0, 0.0, "gain"),
        "second.b.weight": Learning(1.0, 0.3, "matrix"),
        "second.b.bias": Learning(1.0, 0.0, "gain"),
    }


PATTERNS = st.sampled_from(
    ["*", "first.*", "*.bias", "*.weight", "second.?.bias", "scale", "first.[12].*", "*e*"]
)
NUMBERS = st.none() | st.sampled_from([0.0, 0.1, 0.5, 2.0])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(PATTERNS, NUMBERS, NUMBERS).filter(lambda one: one[1:] != (None, None)),
        max_size=5,
    )
)
def test_each_rule_sets_what_it_says_where_it_matches_and_the_last_wins(given_rules):
    module = Small()
    before = how_it_learns(module, weight_decay=0.3)
    found = how_it_learns(module, [Rule(*one) for one in given_rules], weight_decay=0.3)
    assert found.keys() == before.keys()
    for name, learning in found.items():
        matching = [one for one in given_rules if fnmatchcase(name, one[0])]
        rates = [rate for _, rate, _ in matching if rate is not None]
        decays = [decay for _, _, decay in matching if decay is not None]
        assert learning.rate == (rates[-1] if rates else 1.0)
        assert learning.weight_decay == (decays[-1] if decays else before[name].weight_decay)
        assert learning.kind == before[name].kind


def test_a_parameter_used_twice_is_known_by_both_names_and_listed_once():
    found = how_it_learns(Small(), [Rule("out.*", rate=0.25)], weight_decay=0.0)
    assert found["first.0.weight"].rate == 0.25
    assert "out.weight" not in found
    assert sum(learning.rate == 0.25 for learning in found.values()) == 1


def test_names_are_those_inside_the_model(objective):
    names = named(objective)
    assert list(names.values()) == list(objective.parameters())
    inside = dict(objective.model.named_parameters())
    assert names.keys() - inside.keys() == {"loss.logit_scale"}
    assert all(names[name] is inside[name] for name in inside)


def test_what_a_module_holds_fixed_stays_fixed_whatever_the_rules_say():
    module = Small()
    module.first[1].bias.requires_grad_(False)
    rules = [Rule("*", rate=0.5)]
    found = how_it_learns(module, rules, weight_decay=0.1)
    assert found["first.1.bias"].rate == 0
    assert {one.rate for name, one in found.items() if name != "first.1.bias"} == {0.5}
    freeze(module, found)
    grouped = {id(p) for group in parameter_groups(module, rules=rules, weight_decay=0.1)
               for p in group["params"]}  # fmt: skip
    assert grouped == {id(p) for p in module.parameters() if p.requires_grad}
    assert id(module.first[1].bias) not in grouped


def test_what_an_architecture_exempts_does_not_decay():
    model = tiny_model(**MODELS["vit and roberta"])
    found = how_it_learns(model, weight_decay=0.3)
    for name in ("image.backbone.pos_embed", "image.backbone.cls_token"):
        assert found[name] == Learning(1.0, 0.0, "table")
    assert found["image.backbone.patch_embed.proj.weight"].weight_decay == 0.3
    wanted = how_it_learns(model, [Rule("*.pos_embed", weight_decay=0.2)], weight_decay=0.3)
    assert wanted["image.backbone.pos_embed"].weight_decay == 0.2
    found = how_it_learns(tiny_model(**MODELS["open_clip"]), weight_decay=0.3)
    for name in ("image.visual.positional_embedding", "text.text.positional_embedding"):
        assert found[name] == Learning(1.0, 0.0, "table")


class Plugin(nn.Module):
    """A tower of no library, with all that may be a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(5, 4))
        self.grid = nn.Parameter(torch.zeros(1, 3, 3, 4))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.experts = nn.Parameter(torch.zeros(3, 4, 5))
        self.temperatures = nn.Parameter(torch.zeros(3, 1, 1))
        self.level = nn.Parameter(torch.zeros(4))
        self.map_weight = nn.Parameter(torch.zeros(4, 4))


def test_positions_and_tokens_are_known_by_being_no_layers_weight():
    table, matrix = Learning(1.0, 0.0, "table"), Learning(1.0, 0.3, "matrix")
    assert how_it_learns(Plugin(), weight_decay=0.3) == {
        "places": table,
        "grid": table,
        "token": table,
        "experts": matrix,
        "temperatures": table,
        "level": Learning(1.0, 0.0, "gain"),
        "map_weight": matrix,
    }


SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


@pytest.mark.parametrize(
    ("image", "options", "names"),
    [
        ("hf:vit", SIGLIP, ["embeddings.cls_token", "embeddings.position_embeddings"]),
        ("hf:siglip_vision_model", SIGLIP, ["head.probe"]),
        ("timm:vit_base_patch16_siglip_224", TINY_VIT, ["attn_pool.latent", "pos_embed"]),
        (
            "open_clip:ViT-B-32",
            {"layers": 1, "width": 64, "patch_size": 16, "attentional_pool": True},
            ["attn_pool.query", "positional_embedding"],
        ),
        ("open_clip:RN50", {"layers": [1] * 4, "width": 8}, ["attnpool.positional_embedding"]),
    ],
)
def test_muon_and_decay_leave_positions_tokens_and_queries_alone(image, options, names):
    model = tiny_model(image=image, image_options=options)
    groups = parameter_groups(model, weight_decay=0.3)
    for name in names:
        wanted = [one for key, one in named(model).items() if key.endswith(name)]
        assert wanted, name
        for group in groups:
            if {id(one) for one in wanted} & {id(one) for one in group["params"]}:
                assert (group["use_fallback"], group["weight_decay"]) == (True, 0.0), name


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("text.transfomer.embeddings.*", "near: text.transformer.embeddings."),
        ("txet.*", "names begin with image, text, image_projection, text_projection, loss"),
        ("model.image.*", "rule 'model.image.*' matches no parameter"),
        ("image", "matches no parameter"),
    ],
)
def test_a_rule_that_matches_nothing_is_one_line_with_near_names(pattern, says):
    module = ContrastiveObjective(tiny_model(), InfoNCE())
    with pytest.raises(ValueError, match="matches no parameter") as caught:
        how_it_learns(module, [Rule("text.*", rate=0.5), Rule(pattern, rate=0.1)], weight_decay=0.1)
    assert says in str(caught.value)
    assert repr(pattern) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "rule 'text.*' says neither rate nor weight_decay"),
        ({"rate": -0.1}, "rule 'text.*': rate -0.1 must be 0 or more"),
        ({"rate": float("nan")}, "rate nan"),
        ({"weight_decay": float("inf")}, "weight_decay inf"),
    ],
)
def test_a_senseless_rule_is_refused(values, says):
    with pytest.raises(ValueError, match="rule") as caught:
        Rule("text.*", **values)
    assert says in str(caught.value)


# --- towers ---


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_locked_tower_learns_in_its_last_groups_alone(objective, side):
    tower = getattr(objective.model, side)
    groups = tower.layer_groups()
    assert len(groups) > 2
    for trainable in range(len(groups) + 1):
        rules = locked(side, tower, trainable=trainable)
        found = how_it_learns(objective, rules, weight_decay=0.1)
        still = {name for name, learning in found.items() if learning.rate == 0}
        first = groups[: len(groups) - trainable]
        assert still == {f"{side}.{name}" for group in first for name in group}


@pytest.mark.parametrize("side", ["image", "text"])
def test_rates_fall_by_a_factor_from_group_to_group(objective, side):
    tower = getattr(objective.model, side)
    groups = tower.layer_groups()
    rules = falling(side, tower, factor=0.5)
    found = how_it_learns(objective, rules, weight_decay=0.1)
    for distance, group in enumerate(reversed(groups)):
        assert {found[f"{side}.{name}"].rate for name in group} == {0.5**distance}
    outside = {one.rate for name, one in found.items() if not name.startswith(f"{side}.")}
    assert outside == {1.0}
    assert len(rules) < len(list(tower.parameters())), "parts are named, not each parameter"


def test_more_groups_than_there_are_cannot_be_trainable():
    tower = tiny_model().image
    count = len(tower.layer_groups())
    message = f"timm:resnet10t has {count} groups of layers; {count + 1} of them cannot be"
    with pytest.raises(ValueError, match=message):
        locked("image", tower, trainable=count + 1)


# --- what is frozen ---


def batch(model):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    return images, model.tokenize(["red dot", "a blue ring and a bar", "green", "black cross"])


def test_a_frozen_tower_makes_no_graph(objective):
    objective = copy.deepcopy(objective).train()
    images, tokens = batch(objective.model)
    assert objective.model.image(images).pooled.requires_grad
    for side, tower in (("image", objective.model.image), ("text", objective.model.text)):
        rules = locked(side, tower, trainable=0)
        freeze(objective, how_it_learns(objective, rules, weight_decay=0.1))
    assert not objective.model.image(images).pooled.requires_grad
    assert not objective.model.text.pool(tokens.ids, tokens.mask).requires_grad
    assert objective.model(images, tokens.ids, tokens.mask)[0].requires_grad, "its projection"


def test_frozen_blocks_drop_nothing_and_those_that_learn_do():
    model = tiny_model(**MODELS["vit and roberta"])
    for side in ("image", "text"):
        tower = getattr(model, side)
        rules = locked(side, tower, trainable=2)
        freeze(model, how_it_learns(model, rules, weight_decay=0.1))
    model.train()
    image: Any = model.image.body
    text: Any = model.text.body
    assert not image.cls_token.requires_grad
    for blocks in (image.blocks, text.encoder.layer):
        modes = []
        for block in blocks:
            learns = any(parameter.requires_grad for parameter in block.parameters())
            drops = [one.training for one in block.modules() if isinstance(one, nn.Dropout)]
            assert drops
            assert set(drops) == {learns}
            modes.append(learns)
        assert modes == sorted(modes)
        assert set(modes) == {True, False}
    assert image.training, "a frozen class token does not stop what lies beside it"
    model.eval()
    assert not any(part.training for part in model.modules())


def test_frozen_batch_statistics_stand_still_and_others_move():
    model = tiny_model(image_options=TINY_RESNET)
    tower = model.image
    freeze(model, how_it_learns(model, locked("image", tower, trainable=1), weight_decay=0.1))
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    model.train()
    tower(batch(model)[0])
    moved = {
        name.rpartition(".")[0]
        for name, buffer in tower.named_buffers()
        if not torch.equal(buffer, before[name])
    }
    learns = {name.rpartition(".")[0] for name in tower.layer_groups()[-1]}
    assert moved
    assert moved <= learns
