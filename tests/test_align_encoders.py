"""Laws of every kind of tower: width, independence, gradients, groups, recipe, memory, mistakes."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from pairs_corpus import TINY_BERT, TINY_RESNET, TINY_VIT, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel
from transformers.pytorch_utils import Conv1D

from align import bundle
from align.encoders import (
    IMAGE_LIBRARIES,
    TEXT_LIBRARIES,
    build_image_tower,
    build_text_tower,
)
from align.encoders.chunks import plan_chunks
from align.encoders.pooling import IMAGE_POOLERS, NATIVE, POOLERS, AttentionPool
from align.encoders.tower import ImageTower, TextTower, TowerModule, Vocabulary
from align.parameters import how_it_learns

SIDE = 32
ROWS = 4


@dataclass(frozen=True)
class Member:
    """A tower under the laws.

    Attributes:
        spec: its prefixed name; `{folder}` stands for the folder that `write` fills.
        options: of the library.
        blocks: how many there are; the layer groups are these, a stem, and maybe what follows.
        side: of its pictures.
        write: makes a folder, for towers that lie in one.
        checkpoints: whether it can compute activations again.
        drop: options that drop something in training.
    """

    spec: str
    options: dict[str, Any] = field(default_factory=dict)
    blocks: int = 2
    side: int = SIDE
    write: Callable[[Path], None] | None = None
    checkpoints: bool = True
    drop: dict[str, Any] = field(default_factory=dict)


def write_bundle(folder: Path) -> None:
    bundle.save(tiny_model(image="timm:vit_tiny_patch16_224", image_options=TINY_VIT), folder)


def write_timm(folder: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=7, **TINY_RESNET)
    timm.models.save_for_hf(model, str(folder), model_args=TINY_RESNET, safe_serialization=True)


def write_hf_image(folder: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**HF_VIT)).save_pretrained(folder)


def write_hf_text(folder: Path) -> None:
    BertModel(BertConfig(vocab_size=64, **TINY_BERT)).save_pretrained(folder)


def write_open_clip(folder: Path) -> None:
    folder.mkdir()
    config = {"embed_dim": 16, "vision_cfg": {**OC_VIT, "width": 64}, "text_cfg": OC_TEXT}
    torch.manual_seed(3)
    model = open_clip.CLIP(**deepcopy(config))
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}})
    )
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )


HF_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
}
HF_STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
OC_VIT: dict[str, Any] = {"image_size": SIDE, "layers": 2, "width": 128, "patch_size": 16}
OC_RESNET: dict[str, Any] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
OC_TEXT: dict[str, Any] = {
    "context_length": 16,
    "vocab_size": 64,
    "width": 32,
    "heads": 2,
    "layers": 2,
}
SWIN = {"img_size": SIDE, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
CONVNEXT: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
VIT: dict[str, Any] = {**TINY_VIT, "depth": 2}
EVA = {"img_size": SIDE, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}

COATNET: dict[str, Any] = {
    "img_size": 64,
    "depths": [1, 1, 1, 1],
    "embed_dim": [32, 32, 32, 32],
    "stem_width": 16,
}
NAFLEX = {key: value for key, value in VIT.items() if key != "img_size"}
DINO = {key: value for key, value in HF_VIT.items() if key != "intermediate_size"}
HF_SWIN = {"image_size" if key == "img_size" else key: value for key, value in SWIN.items()}
HF_RESNET: dict[str, Any] = {**HF_STAGES, "embedding_size": 8}

IMAGE_MEMBERS: dict[str, Member] = {
    "timm resnet": Member("timm:resnet10t", TINY_RESNET, 4, side=64, drop={"drop_path_rate": 0.5}),
    **{
        f"timm resnet, {pooling}": Member(
            "timm:resnet10t", {**TINY_RESNET, "pooling": pooling}, 4, side=64
        )
        for pooling in ("mean", "max", "attention")
    },
    "timm vit": Member("timm:vit_tiny_patch16_224", VIT, drop={"patch_drop_rate": 0.5}),
    **{
        f"timm vit, {pooling}": Member("timm:vit_tiny_patch16_224", {**VIT, "pooling": pooling})
        for pooling in IMAGE_POOLERS
    },
    "timm vit, its own mean": Member("timm:vit_tiny_patch16_224", {**VIT, "global_pool": "avg"}),
    "timm siglip": Member("timm:vit_base_patch16_siglip_224", VIT),
    "timm siglip, mean": Member("timm:vit_base_patch16_siglip_224", {**VIT, "pooling": "mean"}),
    "timm naflex": Member("timm:naflexvit_base_patch16_gap", NAFLEX),
    "timm eva": Member("timm:eva02_tiny_patch14_224", EVA),
    "timm eva, cls": Member("timm:eva02_tiny_patch14_224", {**EVA, "pooling": "cls"}),
    "timm beit": Member("timm:beit_base_patch16_224", EVA),
    "timm convnext": Member(
        "timm:convnext_atto", CONVNEXT, 4, side=64, drop={"drop_path_rate": 0.5}
    ),
    "timm convnext, mean": Member(
        "timm:convnext_atto", {**CONVNEXT, "pooling": "mean"}, 4, side=64
    ),
    "timm swin": Member("timm:swin_tiny_patch4_window7_224", SWIN),
    "timm swin, max": Member("timm:swin_tiny_patch4_window7_224", {**SWIN, "pooling": "max"}),
    "timm mobilenet": Member("timm:mobilenetv3_small_050", {}, 12, side=64),
    "timm mobilenet, mean": Member("timm:mobilenetv3_small_050", {"pooling": "mean"}, 12, side=64),
    "timm hybrid": Member("timm:coatnet_pico_rw_224", COATNET, 4, side=64),
    "hf clip": Member("hf:clip_vision_model", HF_VIT, drop={"attention_dropout": 0.5}),
    "hf siglip": Member("hf:siglip_vision_model", HF_VIT),
    "hf siglip, mean": Member("hf:siglip_vision_model", {**HF_VIT, "pooling": "mean"}),
    "hf vit": Member("hf:vit", HF_VIT, drop={"hidden_dropout_prob": 0.5}),
    "hf vit, step by step": Member("hf:vit", {**HF_VIT, "attention": "eager", "pooling": "mean"}),
    "hf vit, cls": Member("hf:vit", {**HF_VIT, "pooling": "cls"}),
    "hf dinov2": Member("hf:dinov2", DINO),
    "hf dinov2, attention": Member("hf:dinov2", {**DINO, "pooling": "attention"}),
    "hf convnext": Member("hf:convnext", HF_STAGES, 4, side=64, checkpoints=False),
    "hf resnet": Member("hf:resnet", HF_RESNET, 4, side=64, checkpoints=False),
    "hf resnet, max": Member(
        "hf:resnet", {**HF_RESNET, "pooling": "max"}, 4, side=64, checkpoints=False
    ),
    "hf swin": Member("hf:swin", HF_SWIN),
    "hf swin, mean": Member("hf:swin", {**HF_SWIN, "pooling": "mean"}),
    "open_clip vit": Member("open_clip:ViT-B-32", OC_VIT, drop={"patch_dropout": 0.5}),
    "open_clip vit, its own mean": Member("open_clip:ViT-B-32", {**OC_VIT, "pool_type": "avg"}),
    "open_clip vit, norm after the mean": Member(
        "open_clip:ViT-B-32",
        {**OC_VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    ),
    "open_clip vit, attentional pool": Member(
        "open_clip:ViT-B-32", {**OC_VIT, "attentional_pool": True, "attn_pooler_queries": 5}
    ),
    "open_clip vit, fixed positions": Member(
        "open_clip:ViT-B-32", {**OC_VIT, "pos_embed_type": "sin_cos_2d"}
    ),
    "open_clip resnet": Member("open_clip:RN50", OC_RESNET, 5, side=64, checkpoints=False),
    "open_clip timm": Member(
        "open_clip:convnext_base", {"timm_model_name": "test_resnet"}, 4, side=64
    ),
    "open_clip timm, attention": Member(
        "open_clip:convnext_base",
        {"timm_model_name": "resnet10t", "timm_pool": "rot_attn", "timm_proj": None},
        4,
        side=64,
    ),
    "open_clip timm, no map": Member(
        "open_clip:convnext_base",
        {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "none"},
        4,
        side=64,
    ),
    "bundle": Member("local:{folder}", {}, 1, write=write_bundle),
    "timm folder": Member("local:{folder}", {}, 4, side=64, write=write_timm),
    "hf folder": Member("local:{folder}", write=write_hf_image),
    "open_clip folder": Member("local:{folder}", write=write_open_clip),
}

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTILBERT: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 48,
    "max_position_embeddings": 24,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 24,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pooler": "last",
}
MODERNBERT = {
    **SMALL,
    **{f"{kind}_token_id": at for at, kind in enumerate(("pad", "bos", "eos", "cls", "sep"))},
}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}
CLIP = {**SMALL, **ENDS, "pad_token_id": 0}
SIGLIP = {**SMALL, **ENDS, "pad_token_id": 1}
LLAMA = {**SMALL, **ENDS, "num_key_value_heads": 2, "pooler": "last"}
QWEN = {**SMALL, "num_key_value_heads": 1, "pooler": "last"}
ALBERT = {**BERT, "embedding_size": 16}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

TEXT_MEMBERS: dict[str, Member] = {
    **{
        f"hf bert, {pooler}": Member(
            "hf:bert", {**BERT, "pooler": pooler}, drop={"hidden_dropout_prob": 0.5}
        )
        for pooler in (*POOLERS, NATIVE)
    },
    "hf bert, step by step": Member("hf:bert", {**BERT, "attention": "eager"}),
    "hf roberta": Member("hf:roberta", {**BERT, "pooler": "max"}),
    "hf roberta, native": Member("hf:roberta", {**BERT, "pooler": NATIVE}),
    "hf xlm-roberta": Member("hf:xlm-roberta", BERT),
    "hf distilbert": Member("hf:distilbert", DISTILBERT),
    "hf modernbert": Member("hf:modernbert", MODERNBERT),
    "hf t5": Member("hf:t5", T5, drop={"dropout_rate": 0.5}),
    "hf mpnet": Member("hf:mpnet", BERT, checkpoints=False),
    "hf electra": Member("hf:electra", {**BERT, "embedding_size": 16}),
    "hf deberta-v2": Member("hf:deberta-v2", DEBERTA),
    "hf albert": Member("hf:albert", ALBERT, 1, checkpoints=False),
    "hf albert, native": Member("hf:albert", {**ALBERT, "pooler": NATIVE}, 1, checkpoints=False),
    "hf clip": Member(
        "hf:clip_text_model", {**CLIP, "pooler": NATIVE}, drop={"attention_dropout": 0.5}
    ),
    "hf clip, the greatest id ends": Member(
        "hf:clip_text_model", {**CLIP, "eos_token_id": 2, "pooler": NATIVE}
    ),
    "hf clip, last": Member("hf:clip_text_model", {**CLIP, "pooler": "last"}),
    "hf siglip": Member("hf:siglip_text_model", {**SIGLIP, "pooler": NATIVE}),
    "hf siglip, mean": Member("hf:siglip_text_model", SIGLIP),
    "hf gpt2": Member("hf:gpt2", GPT2),
    "hf llama": Member("hf:llama", LLAMA),
    "hf qwen2": Member("hf:qwen2", QWEN),
    "open_clip": Member("open_clip:ViT-B-32", OC_TEXT),
    "open_clip, end by id": Member(
        "open_clip:ViT-B-32", {**OC_TEXT, "pool_type": "eos", "eos_id": 3}
    ),
    "open_clip, the last place": Member("open_clip:ViT-B-32", {**OC_TEXT, "pool_type": "last"}),
    "open_clip siglip": Member("open_clip:ViT-B-16-SigLIP", OC_TEXT),
    "open_clip with a class token": Member(
        "open_clip:ViT-B-32", {**OC_TEXT, "embed_cls": True, "pad_id": 1}
    ),
    "bundle": Member("local:{folder}", {}, 1, write=write_bundle),
    "hf folder": Member("local:{folder}", {}, 1, write=write_hf_text),
    "open_clip folder": Member("local:{folder}", write=write_open_clip),
}


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Callable[[str, str], Any]:
    """Towers by side and name, each built once, stirred, in evaluation; their folders are gone.

    Nothing in them is zero or alike: layers that start at zero would hide what comes before them.
    """
    built: dict[tuple[str, str], TowerModule] = {}

    def get(side: str, name: str) -> TowerModule:
        member = member_of(side, name)
        if (side, name) not in built:
            folder = tmp_path_factory.mktemp("folders") / "tower"
            torch.manual_seed(0)
            if member.write is not None:
                member.write(folder)
            build = build_image_tower if side == "image" else build_text_tower
            made = build(member.spec.format(folder=folder), **member.options)
            built[side, name] = stirred(made)
            shutil.rmtree(folder.parent)
        return built[side, name]

    return get


def stirred(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def pictures(member: Member, rows: int = ROWS, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 3, member.side, member.side)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


LENGTHS = (10, 3, 6, 7, 2, 3, 10, 5)


def texts(tower: TextTower, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts of several lengths, each with its end."""
    generator = torch.Generator().manual_seed(seed)
    end = 3 if tower.end_id is None else tower.end_id
    highest = min(tower.vocabulary_size, 60) - 1
    shape = (len(LENGTHS), max(LENGTHS))
    ids = torch.randint(4, highest, shape, generator=generator)
    lengths = torch.tensor(LENGTHS)
    ids[torch.arange(len(LENGTHS)), lengths - 1] = end
    mask = torch.arange(max(LENGTHS)) < lengths[:, None]
    return ids.masked_fill(~mask, 1 if tower.pad_id is None else tower.pad_id), mask


def batch_of(side: str, member: Member, tower: Any) -> tuple[Tensor, ...]:
    return (pictures(member),) if side == "image" else texts(tower)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


every_image_tower = pytest.mark.parametrize("name", IMAGE_MEMBERS)
every_text_tower = pytest.mark.parametrize("name", TEXT_MEMBERS)
every_tower = pytest.mark.parametrize(
    ("side", "name"),
    [("image", name) for name in IMAGE_MEMBERS] + [("text", name) for name in TEXT_MEMBERS],
)


def member_of(side: str, name: str) -> Member:
    return (IMAGE_MEMBERS if side == "image" else TEXT_MEMBERS)[name]


# --- laws of all towers ---


@pytest.mark.parametrize(
    ("libraries", "members"),
    [(IMAGE_LIBRARIES, IMAGE_MEMBERS), (TEXT_LIBRARIES, TEXT_MEMBERS)],
    ids=["image", "text"],
)
def test_every_library_is_under_the_laws(libraries, members):
    assert {member.spec.partition(":")[0] for member in members.values()} == set(libraries)


@every_tower
def test_a_tower_has_the_widths_it_declares(tower, side, name):
    made = tower(side, name)
    batch = batch_of(side, member_of(side, name), made)
    features = made(*batch)
    rows = len(batch[0])
    assert isinstance(made, ImageTower if side == "image" else TextTower)
    assert features.pooled.shape == (rows, made.width)
    assert features.tokens.shape[0] == rows
    assert features.tokens.shape[2] == made.token_width
    assert features.mask.shape == features.tokens.shape[:2]
    assert features.pooled.isfinite().all()
    assert features.pooled.std(dim=0).any(), "rows that are alike would hide mistakes"


@every_tower
def test_evaluation_is_deterministic(tower, side, name):
    made = tower(side, name)
    batch = batch_of(side, member_of(side, name), made)
    assert torch.equal(made(*batch).pooled, made(*batch).pooled)


@every_tower
def test_a_recipe_in_json_rebuilds_the_tower_offline(tower, side, name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    made = tower(side, name)
    batch = batch_of(side, member_of(side, name), made)
    recipe = json.loads(json.dumps(made.recipe()))
    build: Any = build_image_tower if side == "image" else build_text_tower
    other = build(made.name, **recipe).eval()
    assert not torch.equal(other(*batch).pooled, made(*batch).pooled), "weights are no recipe"
    save_file(made.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(*batch).pooled, made(*batch).pooled)
    assert other.recipe() == recipe
    assert other.name == made.name


@every_tower
def test_gradients_reach_every_trainable_weight_and_no_frozen_one(tower, side, name):
    made = deepcopy(tower(side, name)).train()
    made(*batch_of(side, member_of(side, name), made)).pooled.square().sum().backward()
    for key, parameter in made.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key
        else:
            assert parameter.grad is None, key


@every_tower
def test_layer_groups_hold_every_weight_once_from_input_to_output(tower, side, name):
    member, made = member_of(side, name), deepcopy(tower(side, name))
    groups = made.layer_groups()
    flat = [key for group in groups for key in group]
    assert sorted(flat) == sorted(key for key, _ in made.named_parameters())
    assert all(groups)
    assert len(groups) in {member.blocks + 1, member.blocks + 2}, [len(group) for group in groups]
    order = order_of_use(made, batch_of(side, member, made))
    used = [[order[key] for key in group if key in order] for group in groups]
    for before, after in pairwise(group for group in used if group):
        assert max(before) < min(after)


def order_of_use(made: TowerModule, batch: tuple[Tensor, ...]) -> dict[str, int]:
    """When each weight comes into play: the first call of the layer that holds it."""
    order: dict[str, int] = {}

    def hook(name: str, layer: nn.Module) -> None:
        def note(*_: object) -> None:
            for key, _parameter in layer.named_parameters(recurse=False):
                order.setdefault(f"{name}.{key}", len(order))

        layer.register_forward_pre_hook(note)

    for name, layer in made.named_modules():
        if not any(True for _ in layer.children()):
            hook(name, layer)
    with torch.no_grad():
        made(*batch)
    assert len(order) > len(list(made.parameters())) / 2
    return order


@every_tower
def test_gradient_checkpointing_changes_memory_alone(tower, side, name):
    member, made = member_of(side, name), deepcopy(tower(side, name)).train()
    batch = batch_of(side, member, made)
    if not member.checkpoints:
        with pytest.raises(ValueError, match=f"{made.name} has no gradient checkpointing"):
            made.set_gradient_checkpointing(True)
        return
    plain, kept = step(made, batch)
    made.set_gradient_checkpointing(True)
    again, fewer = step(made, batch)
    made.set_gradient_checkpointing(False)
    last, as_before = step(made, batch)
    assert fewer < kept == as_before
    for found in (again, last):
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


def step(made: TowerModule, batch: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], int]:
    """The loss and gradients of one step, and how many values were kept for the way back."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(1)
    made.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = made(*batch).pooled.square().mean()
    at_rest = kept
    loss.backward()
    grads = {key: p.grad.clone() for key, p in made.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}, at_rest


@every_tower
def test_half_precision_stays_finite_and_near(tower, side, name):
    made = tower(side, name)
    batch = batch_of(side, member_of(side, name), made)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = made(*batch).pooled.float()
    assert half.isfinite().all()
    assert torch.cosine_similarity(half, made(*batch).pooled).min() > 0.97


@pytest.mark.parametrize(
    ("side", "name"),
    [("image", name) for name, member in IMAGE_MEMBERS.items() if member.drop]
    + [("text", name) for name, member in TEXT_MEMBERS.items() if member.drop],
)
def test_what_drops_in_training_drops_there_alone(side, name):
    member = member_of(side, name)
    build: Any = build_image_tower if side == "image" else build_text_tower
    torch.manual_seed(0)
    made = stirred(build(member.spec, **{**member.options, **member.drop}))
    for again in (made, stirred(build(made.name, **made.recipe()))):
        batch = batch_of(side, member, again)
        assert torch.equal(again(*batch).pooled, again(*batch).pooled)
        again.train()
        dropped = again(*batch).pooled
        assert dropped.isfinite().all()
        assert not torch.equal(dropped, again(*batch).pooled)
        dropped.sum().backward()


LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, Conv1D)


@every_tower
def test_layers_map_and_positions_tokens_and_queries_are_tables_that_do_not_decay(
    tower, side, name
):
    made = tower(side, name)
    learning = how_it_learns(made, weight_decay=0.3)
    parts = dict(made.named_modules(remove_duplicate=False))
    mapped = 0
    for key, parameter in made.named_parameters():
        part, found = parts[key.rpartition(".")[0]], learning[key]
        if isinstance(part, LAYERS) and parameter.ndim > 1:
            mapped += 1
            assert (found.kind, found.weight_decay) == ("matrix", 0.3), key
        elif isinstance(part, nn.Embedding):
            assert found.kind == "table", key
        elif parameter.ndim > 1:
            assert (found.kind, found.weight_decay) == ("table", 0.0), key
        else:
            assert (found.kind, found.weight_decay) == ("gain", 0.0), key
    assert mapped >= 2


# --- pictures ---


@every_image_tower
def test_a_picture_depends_on_itself_alone(tower, name):
    made = tower("image", name)
    batch = pictures(IMAGE_MEMBERS[name])
    pixels = ((batch.float() - made.pixel_mean) / made.pixel_std).requires_grad_()
    features = made.encode(pixels)
    torch.testing.assert_close(features.pooled, made(batch).pooled)
    assert features.mask.all()
    weights = torch.randn(made.width, generator=torch.Generator().manual_seed(0))
    (features.pooled[1] @ weights).backward()
    assert pixels.grad is not None
    assert pixels.grad[1].any()
    assert not pixels.grad[[0, 2, 3]].any()
    close(made(batch[2:3]).pooled[0], features.pooled[2])


@every_image_tower
def test_a_picture_has_many_tokens(tower, name):
    made = tower("image", name)
    tokens = made(pictures(IMAGE_MEMBERS[name])).tokens
    assert tokens.shape[1] > 1, "one place would hide mistakes in their order"
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])


MAPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "timm resnet": lambda made, pixels: made.backbone.forward_features(pixels),
    "timm resnet, mean": lambda made, pixels: made.backbone.forward_features(pixels),
    "timm swin": lambda made, pixels: made.backbone.forward_features(pixels).permute(0, 3, 1, 2),
    "hf resnet": lambda made, pixels: made.vision(pixels).last_hidden_state,
    "hf resnet, max": lambda made, pixels: made.vision(pixels).last_hidden_state,
    "hf convnext": lambda made, pixels: made.vision(pixels).last_hidden_state,
    "open_clip timm": lambda made, pixels: made.visual.trunk.forward_features(pixels),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_tokens_of_a_map_are_its_places_row_by_row(tower, name):
    made = tower("image", name)
    pixels = torch.randn(2, 3, made.picture_size or 96, made.picture_size or 64)
    features, grid = made.encode(pixels), MAPS[name](made, pixels)
    rows, columns = grid.shape[2:]
    assert min(rows, columns) > 1
    for row in range(rows):
        for column in range(columns):
            close(features.tokens[:, row * columns + column], grid[:, :, row, column])


def test_pooling_a_map_reads_all_its_places_in_each_channel(tower):
    for name, pooled in (("hf resnet", "mean"), ("hf resnet, max", "amax")):
        made = tower("image", name)
        features = made(pictures(IMAGE_MEMBERS[name]))
        close(features.pooled, getattr(features.tokens, pooled)(dim=1))


# --- texts ---


@pytest.mark.parametrize("name", [name for name, one in TEXT_MEMBERS.items() if not one.write])
def test_a_tower_from_scratch_takes_over_the_vocabulary_of_its_tokenizer(name):
    member = TEXT_MEMBERS[name]
    left_to_it = {
        key: value
        for key, value in member.options.items()
        if key != "vocab_size" and not key.endswith(("_token_id", "eos_id", "pad_id"))
    }
    vocabulary = Vocabulary(size=60, pad_id=1, end_id=3)
    made = build_text_tower(member.spec, vocabulary=vocabulary, **left_to_it)
    assert made.vocabulary_size == 60
    assert made.pad_id in {1, None}
    assert made.end_id in {3, None}
    assert made(*texts(made)).pooled.isfinite().all()
    for key, value in made.recipe()["config"].items():
        assert not key.endswith("_token_id") or value is None or value < 60, key


@every_text_tower
def test_a_text_depends_on_itself_alone(tower, name):
    made = tower("text", name)
    ids, mask = texts(made)
    before = made(ids, mask).pooled
    others, _ = texts(made, seed=1)
    others[4] = ids[4]
    after = made(others, mask).pooled
    assert torch.equal(after[4], before[4])
    assert not torch.isclose(after, before).all(dim=1)[[0, 1, 2, 3, 6, 7]].any()
    alone = made(ids[4:5, : LENGTHS[4]], mask[4:5, : LENGTHS[4]]).pooled
    close(alone[0], before[4])


@every_text_tower
def test_a_text_is_the_same_however_it_is_padded(tower, name):
    made = tower("text", name)
    ids, mask = texts(made)
    before = made(ids, mask).pooled
    anything = torch.randint_like(ids, made.vocabulary_size)
    if made.pad_id is not None:
        assert torch.equal(made(torch.where(mask, ids, anything), mask).pooled, before)
    else:
        close(made(torch.where(mask, ids, anything), mask).pooled, before)
    wider = nn.functional.pad(ids, (0, 4), value=5)
    close(made(wider, nn.functional.pad(mask, (0, 4))).pooled, before)


@every_text_tower
def test_the_number_of_chunks_changes_rounding_alone(tower, name, monkeypatch):
    made = tower("text", name)
    ids, mask = texts(made)
    in_chunks(monkeypatch, 1)
    whole = made(ids, mask)
    assert torch.equal(made.pool(ids, mask), whole.pooled)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    for count in (2, 4, 7):
        in_chunks(monkeypatch, count)
        cut = made(ids, mask)
        close(cut.pooled, whole.pooled)
        close(cut.tokens[mask], whole.tokens[mask])
        assert torch.equal(cut.mask, mask)
        assert torch.equal(made.pool(ids, mask), cut.pooled)
        close(made.pool(ids[order], mask[order]), whole.pooled[order])


def in_chunks(monkeypatch, count: int) -> None:
    monkeypatch.setattr(
        "align.encoders.tower.plan_chunks", lambda lengths, _: plan_chunks(lengths, count)
    )


@pytest.mark.parametrize("name", ["hf bert, mean", "hf t5", "hf gpt2", "open_clip", "hf siglip"])
def test_gradients_do_not_depend_on_the_number_of_chunks(tower, name, monkeypatch):
    made = deepcopy(tower("text", name)).train()
    ids, mask = texts(made)
    weights = torch.randn(len(ids), made.width, generator=torch.Generator().manual_seed(0))
    found = []
    for count in (1, 4):
        in_chunks(monkeypatch, count)
        made.zero_grad()
        (made.pool(ids, mask) * weights).sum().backward()
        found.append({key: p.grad.clone() for key, p in made.named_parameters()})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_distinct_poolers_say_distinct_things(tower):
    towers = [tower("text", f"hf bert, {pooler}") for pooler in POOLERS]
    for other in towers[1:]:
        if other.pooler is not None and not isinstance(other.pooler, nn.Module):
            other.transformer.load_state_dict(towers[0].transformer.state_dict())
    pooled = [made(*texts(made)).pooled for made in towers]
    for one, other in combinations(pooled, 2):
        assert not torch.allclose(one, other)


def test_a_class_token_is_no_place_to_pool(tower):
    made = tower("image", "timm vit, mean")
    features = made(pictures(IMAGE_MEMBERS["timm vit, mean"]))
    close(features.pooled, features.tokens[:, 1:].mean(dim=1))


# --- pooling by attention ---


@pytest.mark.parametrize(("width", "heads"), [(16, 8), (24, 8), (12, 6), (15, 5), (22, 2), (7, 7)])
def test_attention_pooling_equals_a_slow_transcription(width, heads):
    """The heads are not in a recipe: with other ones, saved queries would mean something else."""
    assert AttentionPool.MOST_HEADS == 8
    pool = AttentionPool(width)
    assert [key for key, _ in pool.named_parameters()] == ["query"]
    assert pool.query.shape == (width,)
    assert not pool.query.any(), "at first it is the mean"
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        pool.query.copy_(2 * torch.randn(width, generator=generator))
    tokens = torch.randn(3, 6, width, generator=generator)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0]], dtype=torch.bool
    )
    found = pool(tokens.masked_fill(~mask[..., None], torch.nan), mask)
    expected = slow_attention_pool(tokens, mask, pool.query.detach(), heads=heads)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def slow_attention_pool(tokens: Tensor, mask: Tensor, query: Tensor, *, heads: int) -> np.ndarray:
    """Softmax over the real tokens, row by row and head by head, in float64."""
    values, real = tokens.double().numpy(), mask.numpy()
    share = values.shape[2] // heads
    pooled = np.zeros((values.shape[0], values.shape[2]))
    for row in range(values.shape[0]):
        for head in range(heads):
            part = slice(head * share, (head + 1) * share)
            look = query.double().numpy()[part]
            kept = [values[row, at, part] for at in range(values.shape[1]) if real[row, at]]
            weights = np.exp([look @ one / np.sqrt(share) for one in kept])
            pooled[row, part] = weights @ np.stack(kept) / weights.sum()
    return pooled
