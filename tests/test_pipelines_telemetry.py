"""What a logged step measures, held to a calculation by hand; and what follows the lines."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from pairs_corpus import TINY_BERT, TINY_VIT, tiny_model, tiny_pretrain
from torch import nn

from align.objective import Pairs
from pipelines import pretrain, telemetry
from pipelines.config import ConfigError
from pipelines.config import build as build_config
from pipelines.schemas import PretrainConfig
from pipelines.telemetry import (
    FlopMeter,
    count_flops,
    flat,
    learning_share,
    norm_of,
    part_of,
    peak_flops,
    refuse_missing_trackers,
)
from pipelines.training import Training, build

pytestmark = pytest.mark.usefixtures("one_thread")


def config(values: dict[str, Any]) -> PretrainConfig:
    return build_config(PretrainConfig, values, origin="test")


def training(data: Path, out: Path, **changes: Any) -> Training:
    values = tiny_pretrain(data, out, **changes)
    return build(config(values), Accelerator(cpu=True))


def by_hand(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float((one.double() ** 2).sum()) for one in tensors))


# --- norms ---


def test_norms_are_those_of_the_step_by_hand(data, tmp_path, monkeypatch):
    """Gradients before they are cut, updates, and weights after: of each tower and of the rest."""
    run = training(data, tmp_path / "run", optimizer__max_grad_norm=0.5)
    named = dict(run.objective.named_parameters())
    gradients: dict[str, torch.Tensor] = {}
    clip = telemetry.Probe.before_update

    def cut(self, norm):
        shrunk = min(1.0, 0.5 / (norm + 1e-6))
        for name, one in named.items():
            assert one.grad is not None
            gradients[name] = one.grad / shrunk
        clip(self, norm)

    monkeypatch.setattr(telemetry.Probe, "before_update", cut)
    before = {name: one.detach().clone() for name, one in named.items()}
    with run.loader:
        measured = pretrain.step(run, next(iter(run.loader)))
    assert measured["gradient_norm"] > 1, "else nothing was cut"
    for part in ("image", "text", "head"):
        names = [name for name in named if part_of(name) == part]
        expected = {
            "gradient": [gradients[name] for name in names],
            "update": [named[name].detach() - before[name] for name in names],
            "parameter": [named[name].detach() for name in names],
        }
        for kind, tensors in expected.items():
            assert measured[f"{part}_{kind}_norm"] == pytest.approx(by_hand(tensors), rel=1e-4)
    parts = [measured[f"{part}_gradient_norm"] for part in ("image", "text", "head")]
    assert math.hypot(*parts) == pytest.approx(measured["gradient_norm"], rel=1e-4)


def test_parts_are_the_towers_and_the_rest(data, tmp_path):
    run = training(data, tmp_path / "run")
    parts = {part_of(name) for name, _ in run.objective.model.image.named_parameters("model.image")}
    assert parts == {"image"}
    assert part_of("model.image_projection.weight") == "head"
    assert part_of("model.text.embeddings.weight") == "text"
    assert part_of("loss.logit_scale") == "head"


def test_a_locked_tower_has_weights_and_no_more(data, tmp_path):
    values = tiny_pretrain(data, tmp_path / "run")
    values["model"]["image"]["trainable"] = 0
    run = build(config(values), Accelerator(cpu=True))
    with run.loader:
        measured = pretrain.step(run, next(iter(run.loader)))
    found = {name for name in measured if name.startswith("image_")}
    assert found == {"image_parameter_norm"}
    assert measured["text_update_norm"] > 0


def test_a_step_that_is_not_logged_measures_nothing_expensive(data, tmp_path):
    run = training(data, tmp_path / "run", log_every=3)
    measured: list[dict[str, float]] = []
    with run.loader:
        batches = iter(run.loader)
        measured += [pretrain.step(run, next(batches)) for _ in range(3)]
    usual = {"loss", "temperature", "gradient_norm", "finite"}
    usual |= {"forward_backward_ms", "optimizer_ms"}
    assert set(measured[0]) == set(measured[1]) == usual
    assert set(measured[2]) > usual | {"batch_accuracy", "loss_ms", "ideal_ms", "image_update_norm"}


def test_rates_of_parts_are_told_where_they_differ(data, tmp_path):
    rules = [{"match": "text.*", "rate": 0.1}, {"match": "*", "weight_decay": 0.0}]
    for given, expected in (([], {"learning_rate"}), (rules, None)):
        run = training(data, tmp_path / "run", optimizer__rules=given)
        rates = telemetry.learning_rates(run.objective, run.optimizer)
        if expected is not None:
            assert set(rates) == expected
            continue
        assert rates["learning_rate"] == rates["image_learning_rate"] == pytest.approx(2e-3)
        assert rates["text_learning_rate"] == pytest.approx(2e-4)


def test_the_bias_of_a_loss_is_told(data, tmp_path):
    run = training(data, tmp_path / "run", loss__name="sigmoid", loss__temperature=0.1)
    with run.loader:
        measured = pretrain.step(run, next(iter(run.loader)))
    assert measured["bias"] == pytest.approx(-10, abs=0.1)


def test_the_norm_of_nothing_is_zero():
    assert norm_of([]) == 0.0
    assert norm_of([torch.tensor([3.0]), torch.tensor([[4.0]])]) == pytest.approx(5)


# --- the time of the loss ---


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("way", ["forwards", "backwards"])
def test_the_time_of_the_loss_is_that_of_both_its_ways(pieces, way, data, tmp_path, monkeypatch):
    """A clock that only stands forward within the loss."""
    run = training(data, tmp_path / "run", micro_batch_size=16 // pieces)
    clock, inside = [0.0], type(run.objective.loss).forward
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: clock[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, rows):
            clock[0] += 3.0 if way == "forwards" else 0.0
            return rows.clone()

        @staticmethod
        def backward(_ctx, gradient):  # pyright: ignore
            clock[0] += 5.0 if way == "backwards" else 0.0
            return gradient

    def forward(self, image, *given):
        return inside(self, Slow.apply(image), *given)

    monkeypatch.setattr(type(run.objective.loss), "forward", forward)
    # The clock stands still otherwise: the peak would be measured for ever.
    monkeypatch.setattr(FlopMeter, "ideal_ms", lambda *_, **__: 1.0)
    with run.loader:
        measured = pretrain.step(run, next(iter(run.loader)))
    assert measured["loss_ms"] == (3000 if way == "forwards" else 5000)
    assert measured["around_loss_ms"] == measured["loss_ms"]


# --- arithmetic ---


def vit_flops(rows: int, *, side: int) -> float:
    """Two for a multiplication and its addition, of a ViT of `TINY_VIT`'s measures."""
    width, patch, tokens = TINY_VIT["embed_dim"], TINY_VIT["patch_size"], (side // 16) ** 2 + 1
    embed = 2 * (tokens - 1) * 3 * patch**2 * width
    block = 2 * tokens * width * 3 * width + 2 * 2 * tokens**2 * width + 2 * tokens * width**2
    block += 2 * 2 * tokens * width * 4 * width
    return rows * (embed + TINY_VIT["depth"] * block)


def bert_flops(rows: int, *, tokens: int) -> float:
    width, inner = TINY_BERT["hidden_size"], TINY_BERT["intermediate_size"]
    block = 2 * tokens * 4 * width**2 + 2 * 2 * tokens**2 * width + 2 * 2 * tokens * width * inner
    return rows * block


@pytest.mark.parametrize(
    ("locked", "factor"), [((), (3, 3)), (("image",), (1, 3)), (("image", "text"), (1, 1))]
)
def test_the_flops_of_a_step_are_those_on_paper(locked, factor):
    model = tiny_model(image="timm:vit_tiny_patch16_224", image_options=TINY_VIT)
    for part in locked:
        model.get_submodule(part).requires_grad_(False)
    rows, tokens = 6, 10
    pairs = Pairs(
        torch.zeros(rows, 3, 32, 32, dtype=torch.uint8),
        torch.ones(rows, tokens, dtype=torch.long),
        torch.ones(rows, tokens, dtype=torch.bool),
        torch.arange(rows),
        torch.arange(rows),
    )
    projections = 3 * rows * 2 * 16 * (TINY_VIT["embed_dim"] + TINY_BERT["hidden_size"])
    expected = factor[0] * vit_flops(rows, side=32) + factor[1] * bert_flops(rows, tokens=tokens)
    assert count_flops(model.train(), pairs) == pytest.approx(expected + projections, rel=0.02)


def test_counting_changes_nothing_of_the_model():
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = Pairs(
        torch.full((4, 3, 32, 32), 200, dtype=torch.uint8),
        torch.ones(4, 5, dtype=torch.long),
        torch.ones(4, 5, dtype=torch.bool),
        *(torch.arange(4),) * 2,
    )
    count_flops(model, pairs)
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert model.training


def test_a_size_is_counted_once_and_smaller_pictures_take_less(data, tmp_path, monkeypatch):
    stages = [{"until": 0.5, "image_size": 16}]
    counts: list[float] = []
    original = telemetry.count_flops
    monkeypatch.setattr(
        telemetry, "count_flops", lambda *given: counts.append(original(*given)) or counts[-1]
    )
    values = tiny_pretrain(data, tmp_path / "run", samples=96, stages=stages)
    assert pretrain.run(config(values)) == 0
    assert len(counts) == 2
    assert counts[0] < counts[1]


def test_the_ideal_time_is_that_of_all_rows_of_the_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(telemetry, "count_flops", lambda _, pairs: 5e6 * len(pairs.labels))
    for micro in (16, 4):
        run = training(data, tmp_path / "run", micro_batch_size=micro)
        with run.loader:
            measured = pretrain.step(run, next(iter(run.loader)))
        assert measured["ideal_ms"] == pytest.approx(80)


def test_the_peak_is_one_a_processor_may_have():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14


def test_the_peak_is_the_quickest_of_several_products(monkeypatch):
    """A clock that a product alone moves: by 20 ms at first, 4 ms the second time, then 8 ms."""
    clock, took, product = [7.0], [0.020, 0.004], torch.mm

    def mm(one, other, *, out):
        clock[0] += took.pop(0) if took else 0.008
        assert one.shape == other.shape == (512, 512)
        return product(one, other, out=out)

    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", mm)
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak == pytest.approx(2 * 512**3 / 0.004, rel=1e-9)


def test_the_share_that_learns_is_by_numbers():
    module = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1, bias=False))
    module[0].requires_grad_(False)
    assert learning_share(module) == 0.25
    assert learning_share(nn.Identity()) == 0.0


# --- trackers ---


class Remembers(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "remembers"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self) -> None:
        super().__init__(_blank=True)
        self.config: dict[str, Any] = {}
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    @property
    def tracker(self) -> "Remembers":
        return self

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_trackers_hear_every_line(data, tmp_path, monkeypatch):
    heard = Remembers()
    asked: list[list[str]] = []
    monkeypatch.setattr(telemetry, "find_spec", lambda _: True)
    monkeypatch.setattr(
        telemetry, "filter_trackers", lambda names, _: asked.append(names) or [heard]
    )
    checks = {"data": str(data), "every": 32}
    values = tiny_pretrain(
        *(data, tmp_path / "run"), samples=64, trackers=["wandb"], validation=checks
    )
    assert pretrain.run(config(values)) == 0
    assert asked == [["wandb"]]
    assert [step for step, _ in heard.lines] == [1, 2, 2, 3, 4, 4]
    numbers = heard.lines[0][1]
    assert {"loss", "learning_rate", "image_gradient_norm", "samples_per_second"} <= set(numbers)
    assert "text_to_image_recall@1" in heard.lines[2][1]
    assert heard.config["model.dim"] == 16
    assert heard.finished == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_one_line_before_anything_is_made(
    name, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(telemetry, "find_spec", lambda _: None)
    wanted = config(tiny_pretrain(data, tmp_path / "run", trackers=[name]))
    with pytest.raises(ConfigError, match=f"^trackers: {name} needs .*: pip install {name}$"):
        pretrain.run(wanted)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(telemetry, "find_spec", lambda _: True)
    refuse_missing_trackers(wanted)


def test_tensorboard_has_the_figures(data, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    values = tiny_pretrain(data, tmp_path / "run", samples=64, trackers=["tensorboard"])
    assert pretrain.run(config(values)) == 0
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard" / "align")).Reload()
    assert [one.step for one in found.Scalars("loss")] == [1, 2, 3, 4]


def test_a_configuration_is_told_flat():
    values = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None, "f": "x", "g": True}
    assert flat(values) == {"a.b": 1, "a.c.d": "[1, 2]", "e": "None", "f": "x", "g": True}
