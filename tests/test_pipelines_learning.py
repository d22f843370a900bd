"""A run in which parts are locked or learn slowly; compiled, checkpointed, cut into chunks."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from pairs_corpus import (
    COLOURS,
    SHAPES,
    TINY_BERT,
    TINY_RESNET,
    TINY_VIT,
    encoded,
    picture,
    tiny_model,
    tiny_pretrain,
    tiny_tokenizer,
)
from ranks import run_ranks
from safetensors.torch import load_file
from test_pipelines_pretrain import metrics, rank_environment, weights

import align
from align.checkpoint import checkpoints
from align.encoders import build_image_tower, tower
from align.losses import InfoNCE
from align.objective import ContrastiveObjective
from align.parameters import how_it_learns
from pipelines import pretrain, run_folder, training
from pipelines.config import ConfigError, build
from pipelines.learning import Row, format_rows, learning_rules, summary
from pipelines.schemas import PretrainConfig
from shards.packing import pack
from shards.sources import Record

pytestmark = pytest.mark.usefixtures("one_thread")

VIT: dict[str, Any] = {
    "name": "timm:vit_tiny_patch16_224",
    "options": {**TINY_VIT, "depth": 3},
}
BERT: dict[str, Any] = {"name": "hf:bert", "options": {**TINY_BERT, "num_hidden_layers": 2}}


def config(values: dict[str, Any], **changes: Any) -> PretrainConfig:
    return build(PretrainConfig, {**values, **changes}, origin="test")


def built(values: dict[str, Any]) -> training.Training:
    return training.build(config(values), Accelerator(cpu=True))


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- what learns ---


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_locked_tower_stays_to_the_bit_and_all_else_learns(side, data, tmp_path, monkeypatch):
    values = tiny_pretrain(data, tmp_path / "run", optimizer__learning_rate=1e-2)
    values["model"][side]["trainable"] = 0
    run = built(values)
    before, seen = copied(run.objective), {}
    take = run.optimizer.step

    def look(*given: Any) -> Any:
        for name, parameter in run.objective.named_parameters():
            seen[name] = parameter.grad is not None and bool(parameter.grad.any())
        return take(*given)

    monkeypatch.setattr(run.optimizer, "step", look)
    with run.loader:
        batches = iter(run.loader)
        for _ in range(2):
            assert pretrain.step(run, next(batches))["finite"]
    still = f"model.{side}."
    after = run.objective.state_dict()
    assert any("running_mean" in name for name in after)
    for name, value in after.items():
        same = torch.equal(value, before[name])
        parameter = name in seen
        if name.startswith(still):
            assert same, name
        elif parameter or "running" in name:
            assert not same, name
    assert {name for name, moved in seen.items() if not moved} == {
        name for name in seen if name.startswith(still)
    }
    assert run.average is not None
    for name, value in run.average.module.state_dict().items():
        assert torch.equal(value, before[name]) == torch.equal(after[name], before[name]), name


def layered(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Falling rates, locked groups and rules of one's own, all at once."""
    return tiny_pretrain(
        data,
        out,
        model__image={**VIT, "layer_decay": 0.5, "trainable": 2},
        model__text={**BERT, "layer_decay": 0.8},
        optimizer__rules=[
            {"match": "image.backbone.cls_token", "rate": 0.125},
            {"match": "*.bias", "weight_decay": 0.01},
        ],
        **changes,
    )


def test_falling_rates_then_locks_then_the_users_own_rules(data, tmp_path):
    wanted = config(layered(data, tmp_path / "run"))
    model = training.make_model(wanted.model, tiny_tokenizer())
    rules = learning_rules(wanted, model)
    found = how_it_learns(model, rules, weight_decay=0.1)
    assert found["image.backbone.cls_token"].rate == 0.125, "though its group is locked"
    assert found["image.backbone.pos_embed"].rate == 0
    assert found["image.backbone.blocks.0.mlp.fc1.weight"].rate == 0
    assert found["image.backbone.blocks.1.mlp.fc1.weight"].rate == 0.5
    assert found["image.backbone.blocks.2.mlp.fc1.weight"].rate == 1
    assert found["image.backbone.blocks.2.mlp.fc1.bias"].weight_decay == 0.01
    assert found["image.backbone.norm.weight"].rate == 1
    groups = len(model.text.layer_groups())
    embedding = found["text.transformer.embeddings.word_embeddings.weight"].rate
    assert embedding == pytest.approx(0.8 ** (groups - 1))
    assert found["text_projection.weight"].rate == found["image_projection.weight"].rate == 1


def test_a_run_with_rules_goes_on_bit_for_bit_and_says_what_learns(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert pretrain.run(config(layered(data, out, samples=96, save_every=32))) == 0
    printed = capsys.readouterr().out
    expected, figures = weights(out), metrics(out)
    assert "image.backbone.blocks.{1..2}.*" in printed
    assert "frozen" in printed
    rows = run_folder.read_json(out / "environment.json")["learning"]
    values = sum(row["values"] for row in rows)
    assert values == run_folder.read_json(out / "environment.json")["parameters"]

    shutil.rmtree(checkpoints(out)[-1])
    shutil.rmtree(out / "bundle")
    again = layered(data, out, samples=96, save_every=32, resume=True)
    assert pretrain.run(config(again)) == 0
    assert weights(out) == expected
    assert metrics(out) == figures


@pytest.fixture(scope="module")
def told_at_length(tmp_path_factory) -> Path:
    """384 pictures whose captions have from one word to more than a text holds."""
    folder = tmp_path_factory.mktemp("long") / "data"
    records = [
        Record(
            key=str(at),
            image=encoded(picture([*COLOURS][at % 6], SHAPES[at // 6 % 8])),
            caption=" ".join([[*COLOURS][at % 6], *[SHAPES[at // 6 % 8]] * (at * at % 19)]),
            fields={},
        )
        for at in range(384)
    ]
    pack(records, folder, samples_per_shard=96, shuffle_seed=0)
    return folder


@pytest.mark.slow
def test_a_run_with_locks_and_dropout_and_many_chunks_goes_on_bit_for_bit(
    told_at_length, tmp_path, monkeypatch
):
    plans, plan = [], tower.plan_chunks

    def noted(lengths, count):
        chunks = plan(lengths, count)
        if len(lengths) > 1:  # the model that a run ends with is tried on a single text
            plans.append(chunks)
        return chunks

    monkeypatch.setattr(tower, "plan_chunks", noted)
    out = tmp_path / "run"
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    values = tiny_pretrain(
        told_at_length,
        out,
        model__image={**VIT, "trainable": 2},
        model__text={**BERT, "options": {**BERT["options"], **dropout}, "trainable": 2},
        **{"batch_size": 192, "samples": 768, "save_every": 192, "text_chunks": 3},
    )
    assert pretrain.run(config(values)) == 0
    expected, figures = weights(out), metrics(out)
    assert all(len(chunks) == 3 for chunks in plans)
    assert all(len({chunk.length for chunk in chunks}) == 3 for chunks in plans)
    assert len(figures) == 4
    for path in checkpoints(out)[1:]:
        shutil.rmtree(path)
    shutil.rmtree(out / "bundle")
    steps = len(plans)
    assert pretrain.run(config({**values, "resume": True})) == 0
    assert 0 < len(plans) - steps < steps
    assert weights(out) == expected
    assert metrics(out) == figures


def rank_locked(rank: int, world: int, values: dict[str, Any]) -> None:
    rank_environment(rank, world)
    assert pretrain.run(config(values)) == 0


@pytest.mark.slow
def test_two_processes_with_a_locked_tower_learn_what_one_learns(data, tmp_path):
    def values(name: str) -> dict[str, Any]:
        given = tiny_pretrain(data, tmp_path / name, samples=64)
        given["model"] |= {"image": {**VIT, "trainable": 0}, "text": {**BERT, "trainable": 1}}
        return given

    assert pretrain.run(config(values("alone"))) == 0
    run_ranks(rank_locked, 2, values("both"))
    for line, other in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "both"), strict=True):
        for name in ("loss", "gradient_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), name
    one, two = (align.load(tmp_path / name / "bundle").state_dict() for name in ("alone", "both"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
        if name.startswith("image."):
            assert torch.equal(one[name], two[name])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__image__trainable": 99}, r"model.image.trainable: timm:resnet10t has \d+ groups"),
        ({"model__text__trainable": 99}, r"model.text.trainable: hf:bert has \d+ groups"),
        ({"optimizer__rules": [{"match": "imgae.*", "rate": 0}]}, r"'imgae.\*' matches no param"),
        ({"optimizer__rules": [{"match": "*", "rate": 0}]}, "every parameter is frozen"),
        (
            {"gradient_checkpointing": True, "model__image": {"name": "open_clip:RN50"}},
            "gradient_checkpointing: open_clip:RN50 has no gradient checkpointing",
        ),
        ({"model__image__layer_decay": 0}, "model.image.layer_decay: .* greater than 0"),
        ({"model__text__layer_decay": 1.1}, "model.text.layer_decay: .* less than or equal to 1"),
        ({"model__text__trainable": -1}, "model.text.trainable"),
        ({"optimizer__rules": [{"match": "*"}]}, r"optimizer.rules.0: '\*' needs a rate or a"),
        ({"optimizer__rules": [{"match": "*", "rate": -1}]}, "optimizer.rules.0.rate"),
        ({"text_chunks": 0}, "text_chunks: .* greater than 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(changes, says, data, tmp_path):
    with pytest.raises(ValueError, match=says) as caught:
        pretrain.run(config(tiny_pretrain(data, tmp_path / "run", **changes)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + ("1 error in" in lines[0])
    assert not (tmp_path / "run").exists()


# --- the table ---


def rows_of(values: dict[str, Any]) -> tuple[list[Row], ContrastiveObjective]:
    wanted = config({"data": "d", "out": "o", **values})
    with torch.device("meta"):
        model = training.make_model(
            wanted.model, tiny_tokenizer(context_length=wanted.model.context_length)
        )
    objective = ContrastiveObjective(model, InfoNCE())
    found = how_it_learns(objective, learning_rules(wanted, model), weight_decay=0.1)
    rows = summary(objective, found)
    assert sum(row.tensors for row in rows) == len(found)
    assert sum(row.values for row in rows) == sum(p.numel() for p in objective.parameters())
    frozen = {name for name, one in found.items() if one.rate == 0}
    still = sum(p.numel() for n, p in objective.named_parameters() if n.removeprefix("model.") in
                frozen)  # fmt: skip
    assert sum(row.frozen for row in rows) == still
    return rows, objective


BASE = {"model": {"image": {"name": "timm:resnet50"}, "text": {"name": "hf:bert"}}}


def test_towers_that_learn_alike_are_a_line_each():
    rows, _ = rows_of(BASE)
    assert [row.names for row in rows] == [
        *("image.*", "text.*", "image_projection.*", "text_projection.*", "loss.*")
    ]
    lines = format_rows(rows, learning_rate=5e-4).splitlines()
    assert lines[0].split("  ")[0] == "parameters"
    assert lines[1].split() == ["image.*", "159", "23.5", "M", "0.0005", "0.1", "on", "23.5", "M"]
    assert lines[-1].split() == ["loss.*", "1", "1", "0.0005", "-"]
    assert len({line.index("0.0005") for line in lines[1:]}) == 1, "columns"


def test_rates_that_fall_layer_by_layer_are_a_line_for_each_run_of_blocks():
    model = {
        "image": {"name": "timm:resnet50", "layer_decay": 0.8, "trainable": 4},
        "text": {"name": "hf:bert", "layer_decay": 0.5},
    }
    rows, _ = rows_of({"model": model})
    text = format_rows(rows, learning_rate=1e-3)
    assert len(rows) <= 12
    found = {row.names: row for row in rows}
    last = found["image.backbone.layer4.{0..2}.*"]
    assert last.rates == (pytest.approx(0.64), 1.0)
    assert last.frozen == 0
    assert found["image.backbone.{conv1,bn1,layer1,layer2}.*"].rates == (0, 0)
    assert found["text.transformer.encoder.layer.{0..11}.*"].rates == (0.5**11, 1.0)
    assert "0.00064 to 0.001 " in text
    assert " frozen " in text


def test_the_table_stays_short_where_frozen_and_learning_parts_alternate():
    rules = [{"match": "text.*.weight", "rate": 0}, {"match": "image.*.[13].*", "rate": 0.5}]
    rows, _ = rows_of({**BASE, "optimizer": {"rules": rules}})
    assert len(rows) <= 12
    mixed = next(row for row in rows if 0 < row.frozen < row.values)
    (line,) = (
        line
        for line in format_rows(rows, learning_rate=1e-3).splitlines()
        if line.startswith(mixed.names)
    )
    assert " M frozen" in line
    assert "0.001, " in line
    assert mixed.decaying == 0, "what is left of them are biases"


# --- how a step is computed ---

TOWERS = {
    "resnet": ("timm:resnet10t", TINY_RESNET),
    "vit": ("timm:vit_tiny_patch16_224", {**TINY_VIT, "depth": 2, "proj_drop_rate": 0.1}),
    "open_clip": (
        "open_clip:ViT-B-32",
        {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_gradient_checkpointing_keeps_less_and_changes_nothing(name):
    spec, options = TOWERS[name]
    model = tiny_model(image=spec, image_options=options).train()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)

    def tried(enabled: bool) -> tuple[int, dict[str, Any]]:
        tower = copy.deepcopy(model.image)
        tower.set_gradient_checkpointing(True)
        tower.set_gradient_checkpointing(enabled)
        kept: set[int] = set()
        weights = {one.untyped_storage().data_ptr() for one in tower.parameters()}

        def pack(one: torch.Tensor) -> torch.Tensor:
            kept.add(one.untyped_storage().data_ptr())
            return one

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
            pooled = tower(images).pooled
        held = len(kept - weights)
        (pooled * torch.linspace(-1, 1, pooled.shape[1])).pow(2).mean().backward()
        found = {f"gradient of {key}": one.grad for key, one in tower.named_parameters()}
        return held, {**found, "pooled": pooled.detach(), **copied(tower)}

    (before, plain), (after, saving) = tried(False), tried(True)
    assert after < before
    assert plain.keys() == saving.keys()
    for key, value in plain.items():
        assert torch.equal(value, saving[key]), key


def test_a_run_with_gradient_checkpointing_is_the_same_to_the_bit(data, tmp_path):
    for name in ("plain", "saving"):
        values = tiny_pretrain(
            data, tmp_path / name, samples=64, gradient_checkpointing=name == "saving"
        )
        values["model"]["text"]["options"]["num_hidden_layers"] = 2
        assert pretrain.run(config(values)) == 0
    assert metrics(tmp_path / "saving") == metrics(tmp_path / "plain")
    assert weights(tmp_path / "saving") == weights(tmp_path / "plain")


def test_chunks_of_captions_change_rounding_alone_and_may_change_on_going_on(data, tmp_path):
    given = {"model__text": BERT, "optimizer__average": 0.0, "samples": 96}
    for chunks in (1, 3):
        values = tiny_pretrain(data, tmp_path / str(chunks), text_chunks=chunks, **given)
        assert pretrain.run(config(values)) == 0
    one, three = metrics(tmp_path / "1"), metrics(tmp_path / "3")
    for line, other in zip(one, three, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
    assert built({**values, "out": str(tmp_path / "new")}).objective.model.text.chunks == 3
    shutil.rmtree(checkpoints(tmp_path / "3")[-1])
    again = config({**values, "text_chunks": 1, "gradient_checkpointing": True, "resume": True})
    assert pretrain.run(again) == 0
    assert metrics(tmp_path / "3")[-1]["loss"] == pytest.approx(three[-1]["loss"], rel=1e-4)
    changed = {**values["optimizer"], "rules": [{"match": "*", "rate": 0.5}]}
    with pytest.raises(ConfigError, match="the run was started otherwise: optimizer"):
        pretrain.run(config({**values, "optimizer": changed, "resume": True}))


@pytest.fixture
def without_inductor(monkeypatch):
    """Compiled graphs that run the operators they were made of."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *given, **more: compiled(*given, backend="aot_eager", **more)
    )
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_gives_the_bundle_of_one_that_is_not(data, tmp_path, without_inductor):
    for name in ("plain", "compiled"):
        values = tiny_pretrain(
            data, tmp_path / name, samples=64, compile=name == "compiled", text_chunks=2
        )
        values["model"]["image"] = {**VIT, "options": {**TINY_VIT, "depth": 2}}
        values["model"]["text"]["options"]["hidden_dropout_prob"] = 0.0
        assert pretrain.run(config(values)) == 0
    for line, other in zip(
        metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True
    ):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
    one, two = (load_file(tmp_path / name / "bundle" / "model.safetensors")
                for name in ("plain", "compiled"))  # fmt: skip
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    model = align.load(tmp_path / "compiled" / "bundle")
    assert model.encode_text(["red dot"]).shape == (1, 16)
    assert yaml.safe_load((tmp_path / "compiled" / "config.yaml").read_text())["compile"] is True


def test_a_copy_of_a_compiled_tower_computes_with_its_own_weights(without_inductor):
    spec, options = TOWERS["vit"]
    tower = build_image_tower(spec, **options).eval()
    names = list(tower.state_dict())
    tower.compile()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    other = copy.deepcopy(tower)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(images).pooled.any()
        assert tower(images).pooled.any()
    assert list(tower.state_dict()) == list(other.state_dict()) == names


MANY_LENGTHS = """
import copy

import torch
from pairs_corpus import tiny_model

model = tiny_model(context_length=24)
plain = copy.deepcopy(model.text)
model.text.compile(backend="eager")
first = 0
for length in range(2, 20):
    texts = [" ".join(["red blue dot"] * (length // 3 + row)) for row in range(3)]
    tokens = model.tokenize([*texts, "red"])
    found, expected = (tower.pool(tokens.ids, tokens.mask) for tower in (model.text, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    first = first or graphs
print(first, graphs)
"""


@pytest.mark.slow
def test_texts_of_many_lengths_are_compiled_a_few_times_and_computed_right():
    """In a process of its own: the shapes that a test run checks break graphs in pieces."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", MANY_LENGTHS],
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, last = map(int, done.stdout.split())
    assert 1 <= first <= last <= 4
