"""Training over processes: pieces, shares of the weights, and gradients that one of them lost."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from pairs_corpus import TINY_BERT, TINY_VIT, tiny_model, tiny_pretrain
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

import align
from align.checkpoint import checkpoints
from align.losses import InfoNCE
from align.objective import ContrastiveObjective
from pipelines import guard, pretrain, run_folder, training
from pipelines.config import ConfigError, RunError, build, to_yaml
from pipelines.parallel import clip_gradients, spread, stopping_with_others, wants_shares
from pipelines.schemas import PretrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
TOWERS: dict[str, Any] = {
    "model__image": {"name": "timm:vit_tiny_patch16_224", "options": {**TINY_VIT, "depth": 2}},
    "model__text__options": {**TINY_BERT, "num_hidden_layers": 2, "hidden_dropout_prob": 0.3},
}
"""Towers that draw something, and whose rows do not know of each other."""


def config(values: dict[str, Any], **changes: Any) -> PretrainConfig:
    return build(PretrainConfig, {**values, **changes}, origin="test")


def in_pieces(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run whose batch is worked through in four pieces, on one process or two."""
    given: dict[str, Any] = {"samples": 16 * STEPS, "micro_batch_size": 4, **TOWERS, **changes}
    return tiny_pretrain(data, out, **given)


def metrics(out: Path) -> list[dict[str, float]]:
    return [line for line in run_folder.read_metrics(out / "metrics.jsonl") if "loss" in line]


def same_losses(found: Path, expected: Path) -> None:
    lines, others = metrics(found), metrics(expected)
    assert len(lines) == len(others) == STEPS
    for line, other in zip(lines, others, strict=True):
        for name in ("loss", "gradient_norm", "temperature"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), name


def same_weights(found: Path, expected: Path) -> None:
    weights, others = (align.load(out / "bundle").state_dict() for out in (found, expected))
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


# --- the same run on one process and on two ---


def ranks_train(rank: int, world: int, folder: str, runs: dict[str, dict[str, Any]]) -> None:
    """Several runs on the same processes, of which one has a gradient broken on rank 1."""
    for name, value in {
        **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world},
        **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1},
    }.items():
        os.environ[name] = str(value)
    Accelerator.end_training = stay  # the next run needs the other process too
    original = pretrain.step
    for name, values in runs.items():
        kept: list[dict[str, Any]] = []

        def step(training, batch, *, name=name, kept=kept):
            broken = name == "broken" and training.step == 2
            if broken and rank == 1:
                break_next_gradient(training.objective.model.text_projection.weight)
            before = weights_of(training.objective)
            measured = original(training, batch)
            after = weights_of(training.objective)
            kept.append(
                {
                    "moved": any(not torch.equal(after[key], before[key]) for key in before),
                    "finite": measured["finite"],
                    "elements": sum(value.numel() for value in before.values()),
                }
            )
            return measured

        pretrain.step = step
        assert pretrain.run(config(values)) == 0
        Path(folder, f"{name}_{rank}.json").write_text(json.dumps(kept))
    pretrain.step = original


def stay(self: Accelerator) -> None:
    del self


def weights_of(objective: nn.Module) -> dict[str, torch.Tensor]:
    """What this process keeps of the weights."""
    return {
        name: (one.to_local() if isinstance(one, DTensor) else one).detach().clone()
        for name, one in objective.named_parameters()
    }


def break_next_gradient(parameter: nn.Parameter) -> None:
    def broken(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return gradient * float("nan")

    handle = parameter.register_hook(broken)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A run alone and those of two processes, with what they noted of each step."""
    folder = tmp_path_factory.mktemp("ranks")
    looks = {"data": str(data), "every": "3 steps"}
    names = {
        "copies": {},
        "shares": {"shard_weights": True, "validation": looks},
        "checkpointed": {"shard_weights": True, "gradient_checkpointing": True},
        "broken": {"optimizer__average": 0.0, "save_every": "100 steps"},
    }
    runs = {name: in_pieces(data, folder / name, **given) for name, given in names.items()}
    assert pretrain.run(config(in_pieces(data, folder / "alone", validation=looks))) == 0
    run_ranks(ranks_train, 2, str(folder), runs, seconds=200)
    return folder


def noted(folder: Path, name: str) -> list[list[dict[str, Any]]]:
    """What each of the two processes noted."""
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copies", "shares", "checkpointed"])
def test_two_processes_with_two_pieces_are_one_with_four(trained, name):
    same_losses(trained / name, trained / "alone")
    same_weights(trained / name, trained / "alone")


@pytest.mark.slow
def test_each_process_keeps_half_of_the_weights(trained):
    whole = noted(trained, "copies")[0][0]["elements"]
    shares = [steps[0]["elements"] for steps in noted(trained, "shares")]
    scalars = 1  # of which both have all
    assert sum(shares) == whole + scalars
    assert max(shares) < 0.6 * whole


@pytest.mark.slow
def test_shares_are_evaluated_as_the_whole_is(trained):
    found, expected = (
        run_folder.read_metrics(trained / name / "metrics.jsonl") for name in ("shares", "alone")
    )
    looks = [
        [line["text_to_image_recall@5"] for line in lines if "text_to_image_recall@5" in line]
        for lines in (found, expected)
    ]
    assert len(looks[0]) == 2
    assert looks[0] == pytest.approx(looks[1], abs=0.05)


@pytest.mark.slow
def test_a_gradient_that_one_process_lost_is_skipped_by_both(trained):
    for steps in noted(trained, "broken"):
        assert [step["finite"] for step in steps] == [1, 1, 0, 1, 1, 1]
        assert [step["moved"] for step in steps] == [True, True, False, True, True, True]


# --- a process that dies, or hangs ---

_RANK = """
import os, sys, time
from pipelines import pretrain
from pipelines.cli import main
original = pretrain.step
def step(training, batch):
    if os.environ["RANK"] == "1" and training.step == 2:
        {fate}
    return original(training, batch)
pretrain.step = step
main(["pretrain", sys.argv[1]])
"""
FATES = {"dies": "os._exit(9)", "hangs": "time.sleep(600)"}


@pytest.mark.slow
@pytest.mark.parametrize("fate", FATES)
def test_a_process_that_is_lost_ends_the_other_with_a_line(data, tmp_path, fate):
    limit = 8 if fate == "hangs" else 600
    values = in_pieces(data, tmp_path / "run", samples=16 * 50, rank_timeout_s=limit)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config(values)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = _RANK.format(fate=FATES[fate])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        out, said = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == 1, said
    finally:
        for one in ranks:
            one.kill()
            one.communicate()
    assert "Traceback" not in said
    assert f"rank_timeout_s ({limit} s)" in said.splitlines()[-1]
    assert "samples 32" in out, "it trained until then"
    lines = [
        line for line in said.splitlines() if line.startswith("align pretrain: process 0 of 2")
    ]
    assert len(lines) == 1


def test_any_other_error_stays_what_it_is(tmp_path):
    two = Mock(spec=Accelerator, num_processes=2, process_index=1)
    given = config({"data": str(tmp_path), "out": str(tmp_path / "run")})
    with pytest.raises(RuntimeError, match="shapes"), stopping_with_others(given, two):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RunError, match="process 1 of 2 stops"), stopping_with_others(given, two):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


# --- the length of a gradient ---


def test_a_gradient_is_cut_as_pytorch_cuts_it():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    one(torch.randn(6, 5)).square().sum().backward()
    for most in (1e-3, 1e3):
        ours, theirs = copy.deepcopy(one), copy.deepcopy(one)
        for mine, other, from_ in zip(
            ours.parameters(), theirs.parameters(), one.parameters(), strict=True
        ):
            assert from_.grad is not None
            mine.grad, other.grad = from_.grad.clone(), from_.grad.clone()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), most)
        assert clip_gradients(ours.parameters(), most) == norm.item()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            assert torch.equal(mine.grad, other.grad)


# --- what pieces change ---


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, False),
        ({"micro_batch_size": 16}, False),
        ({"micro_batch_size": 4}, True),
        ({"micro_batch_size": 4, "model__image__trainable": 0}, False),  # fixed statistics
        ({"micro_batch_size": 4, **TOWERS}, False),
    ],
)
def test_a_run_tells_of_batch_normalisation_in_pieces(data, tmp_path, changes, told):
    given = config(tiny_pretrain(data, tmp_path / "run", **changes))
    said = pretrain.introduction(training.build(given, Accelerator(cpu=True)))
    assert any("each piece of 4 rows" in line for line in said) is told


# --- what does not go with shares ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"name": "muon"}}, "optimizer.name muon .* known: adamw"),
        ({"precision": "fp16"}, "precision fp16 .* bf16 or fp32"),
    ],
)
def test_what_does_not_go_with_shares_is_refused(tmp_path, changes, message):
    given = config(
        {"data": str(tmp_path), "out": str(tmp_path / "run"), "shard_weights": True}, **changes
    )
    two = Mock(spec=Accelerator, num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(ConfigError, match=f"shard_weights: {message}"):
        spread(ContrastiveObjective(tiny_model(), InfoNCE()), None, given, two)


@pytest.mark.parametrize(
    ("asked", "kind", "processes", "expected"),
    [
        (True, DistributedType.MULTI_GPU, 2, True),
        (False, DistributedType.MULTI_GPU, 2, False),
        (False, DistributedType.FSDP, 2, True),
        (True, DistributedType.NO, 1, False),
    ],
)
def test_shares_are_kept_where_asked_for(tmp_path, monkeypatch, asked, kind, processes, expected):
    given = config({"data": str(tmp_path), "out": str(tmp_path / "run"), "shard_weights": asked})
    accelerator = Mock(spec=Accelerator, num_processes=processes, distributed_type=kind)
    assert wants_shares(given, accelerator) is expected
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what the launcher says
    assert wants_shares(given, accelerator) is (processes > 1)


# --- gradients that are not finite ---


def test_a_broken_gradient_moves_nothing_and_the_run_goes_on(data, tmp_path, monkeypatch):
    original = pretrain.step
    kept: list[bool] = []

    def step(training, batch):
        if training.step == 2:
            break_next_gradient(training.objective.model.text_projection.weight)
        before = copy.deepcopy(training.objective.state_dict())
        moments = [copy.deepcopy(one) for one in training.optimizer.state.values()]
        averaged = copy.deepcopy(training.average.state_dict())
        measured = original(training, batch)
        if training.step == 3:
            now = training.average.state_dict()
            kept.append(all(torch.equal(now[name], averaged[name]) for name in averaged))
            after = training.objective.state_dict()
            kept.append(all(torch.equal(after[name], before[name]) for name in before))
            kept.extend(
                torch.equal(one["exp_avg"], was["exp_avg"]) and one["step"] == was["step"]
                for one, was in zip(training.optimizer.state.values(), moments, strict=True)
            )
        return measured

    monkeypatch.setattr(pretrain, "step", step)
    values = tiny_pretrain(data, tmp_path / "run", samples=16 * STEPS)  # with running statistics
    assert pretrain.run(config(values)) == 0
    assert len(kept) > 1
    assert all(kept)
    lines = metrics(tmp_path / "run")
    assert [line["finite"] for line in lines] == [1, 1, 0, 1, 1, 1]
    assert lines[-1]["skipped_steps"] == 1


def test_fp16_finds_its_scale_and_keeps_it(data, tmp_path, monkeypatch):
    """A scale that is far too large costs steps, more of them than a run may lose else."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**26)
    monkeypatch.setattr(training.torch.amp, "GradScaler", scaler)
    values = in_pieces(
        data, tmp_path / "run", precision="fp16", samples=16 * 18, save_every="9 steps"
    )
    assert pretrain.run(config(values)) == 0
    lines = metrics(tmp_path / "run")
    finite = [line["finite"] for line in lines]
    lost = finite.count(0)
    assert guard.BAD_STEPS_IN_A_ROW < lost < 18
    assert finite == [0] * lost + [1] * (18 - lost)
    assert lines[-1]["skipped_steps"] == lost
    progress = [
        run_folder.read_json(one / "progress.json") for one in checkpoints(tmp_path / "run")
    ]
    assert [one["scaler"]["scale"] for one in progress] == [2.0 ** (26 - 9), 2.0 ** (26 - lost)]

    shutil.rmtree(checkpoints(tmp_path / "run")[-1])  # as if it had been killed before
    assert pretrain.run(config(values, resume=True)) == 0
    again = metrics(tmp_path / "run")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


def test_fp16_with_gradients_that_no_scale_mends_stops(data, tmp_path, monkeypatch):
    scaler = partial(torch.amp.GradScaler, init_scale=4.0)
    monkeypatch.setattr(training.torch.amp, "GradScaler", scaler)
    original = pretrain.step

    def step(run, batch):
        break_next_gradient(run.objective.model.text_projection.weight)
        return original(run, batch)

    monkeypatch.setattr(pretrain, "step", step)
    values = in_pieces(data, tmp_path / "run", precision="fp16", samples=16 * 18)
    with pytest.raises(ValueError, match="no finite gradient in 5 steps up to step 6"):
        pretrain.run(config(values))
