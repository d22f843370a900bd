"""Training: the same run twice, stopped and gone on with, spread over processes; and bad input."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pairs_corpus import (
    COLOURS,
    TINY_BERT,
    TINY_VIT,
    encoded,
    picture,
    tiny_pretrain,
    write_pairs,
)
from ranks import run_ranks
from shards_corpus import write_tar

import align
from align.checkpoint import checkpoints
from pipelines import pretrain, run_folder, training
from pipelines.config import ConfigError, build
from pipelines.schemas import PretrainConfig
from shards.damage import Reason, TooMuchDamageError
from shards.manifest import Manifest
from shards.quarantine import QUARANTINE_FILE, written_list
from shards.sources import Record
from shards.storage import cache_folder

pytestmark = pytest.mark.usefixtures("one_thread")

CLOCKS = {
    *("data_ms", "forward_backward_ms", "loss_ms", "optimizer_ms", "other_ms"),
    *("samples_per_second", "mfu"),
}
STEPS = 12


def config(values: dict[str, Any], **changes: Any) -> PretrainConfig:
    return build(PretrainConfig, {**values, **changes}, origin="test")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain.run(config(tiny_pretrain(data, out))) == 0
    return out


def metrics(out: Path) -> list[dict[str, float]]:
    lines = run_folder.read_metrics(out / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def weights(out: Path) -> dict[str, bytes]:
    """The parts of the bundle that are not told where it was made."""
    names = ("model.safetensors", "tokenizer/tokenizer.json")
    found = {name: (out / "bundle" / name).read_bytes() for name in names}
    found["model"] = json.dumps(
        json.loads((out / "bundle" / "config.json").read_text())["model"]
    ).encode()
    return found


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what a run leaves ---


def test_a_run_leaves_all_it_takes_to_understand_it(straight, data):
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in lines] == [16 * step for step in range(1, STEPS + 1)]
    assert all(line["finite"] == 1 and line["bad_samples"] == 0 for line in lines)
    environment = run_folder.read_json(straight / "environment.json")
    assert environment["data"]["samples"] == 48
    assert environment["libraries"]["torch"] == torch.__version__.split("+")[0]
    assert [path.name for path in checkpoints(straight)] == ["step_000000008", "step_000000012"]
    report = run_folder.read_json(straight / "data_report.json")
    assert report["data"] == str(data)
    again = config(yaml.safe_load((straight / "config.yaml").read_text()))
    assert again == config(tiny_pretrain(data, straight))
    assert not [path for path in straight.rglob("*") if path.name.endswith((".writing", ".pt"))]


def test_the_schedule_is_the_one_asked_for(straight):
    rates = [line["learning_rate"] for line in metrics(straight)]
    assert rates[0] == pytest.approx(2e-3)  # a twentieth of twelve steps warms up: one
    assert rates == sorted(rates, reverse=True)


def test_training_learns(data, tmp_path):
    values = tiny_pretrain(
        data,
        tmp_path / "run",
        samples=48 * 30,
        batch_size=48,
        save_every=48 * 30,
        optimizer__average=0.0,
        augment__enabled=False,
        log_every=30,
        optimizer__learning_rate=5e-3,
    )
    assert pretrain.run(config(values)) == 0
    model = align.load(tmp_path / "run" / "bundle")
    from pairs_corpus import SHAPES

    names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    images = model.encode_image([picture(*name) for name in names])
    texts = model.encode_text([" ".join(name) for name in names])
    right = (images @ texts.T).argmax(dim=1) == torch.arange(48)
    assert right.float().mean() > 0.5, "chance is one in 48"


def test_the_same_configuration_gives_the_same_bundle_to_the_bit(straight, data, tmp_path):
    assert pretrain.run(config(tiny_pretrain(data, tmp_path / "run", workers=2))) == 0
    assert weights(tmp_path / "run") == weights(straight)
    assert metrics(tmp_path / "run") == metrics(straight)


def test_dropout_is_drawn_anew_in_every_step(data, tmp_path, monkeypatch):
    seeds = []
    original = training.ContrastiveObjective.forward

    def forward(self, *args, **kwargs):
        seeds.append(torch.initial_seed())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training.ContrastiveObjective, "forward", forward)
    assert pretrain.run(config(tiny_pretrain(data, tmp_path / "run", samples=64))) == 0
    assert len(seeds) == len(set(seeds)) == 4


def test_another_seed_gives_another_bundle(straight, data, tmp_path):
    assert pretrain.run(config(tiny_pretrain(data, tmp_path / "run", seed=1))) == 0
    assert weights(tmp_path / "run")["model.safetensors"] != weights(straight)["model.safetensors"]


def test_the_averaged_weights_are_what_is_saved(straight):
    from safetensors.torch import load_file

    last = checkpoints(straight)[-1]
    average = load_file(last / "average.safetensors")
    trained = load_file(last / "objective.safetensors")
    bundle = load_file(straight / "bundle" / "model.safetensors")
    assert torch.equal(bundle.pop("logit_scale"), average["module.loss.logit_scale"])
    for name, value in bundle.items():
        assert torch.equal(value, average[f"module.model.{name}"])
    assert not torch.equal(
        trained["model.image_projection.weight"], bundle["image_projection.weight"]
    )


# --- stopped and gone on with ---

_STOPPED = """
import signal, sys, time
from pipelines import pretrain
{patch}
from pipelines.cli import main
main(["pretrain", sys.argv[1]])
"""
_WAIT_IN_STEP = """
original, came = pretrain.step, []
class StopOnSignal(pretrain.StopOnSignal):
    def _ask(self, number, frame):
        super()._ask(number, frame)
        came.append(number)
def step(training, batch):
    measured = original(training, batch)
    for _ in range(600):  # at step 5, until the signal came; the loop itself is the product's
        if training.step != 5 or came:
            break
        time.sleep(0.05)
    return measured
pretrain.step, pretrain.StopOnSignal = step, StopOnSignal
"""
_WAIT_IN_SAVE = """
import align.checkpoint
original, count = align.checkpoint.save_file, []
def save_file(tensors, path):
    original(tensors, path)
    count.append(path)
    if len(count) == 5:  # the second file of the second checkpoint
        time.sleep(60)
align.checkpoint.save_file = save_file
"""


def stopped(data: Path, folder: Path, patch: str, *, number: int, lines: int) -> tuple[int, str]:
    """Train in a process of its own, and send it a signal once so many lines are logged."""
    values = tiny_pretrain(data, folder / "run")
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", _STOPPED.format(patch=patch), str(folder / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            until = time.monotonic() + 100
            while len(run_folder.read_metrics(folder / "run" / "metrics.jsonl")) < lines:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < until
                time.sleep(0.05)
            if number == signal.SIGKILL:
                unfinished = folder / "run" / "checkpoints" / "step_000000008.writing"
                while not (unfinished / "optimizer.safetensors").exists():
                    assert time.monotonic() < until
                    time.sleep(0.05)
            process.send_signal(number)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, said


def go_on(data: Path, out: Path, **changes: Any) -> None:
    assert pretrain.run(config(tiny_pretrain(data, out, resume=True, **changes))) == 0


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on_bit_for_bit(
    straight, data, tmp_path
):
    code, said = stopped(data, tmp_path, _WAIT_IN_STEP, number=signal.SIGINT, lines=4)
    out = tmp_path / "run"
    assert code == 130, said
    assert "stopped at step 5 of 12 with a checkpoint" in said
    assert "Traceback" not in said
    assert checkpoints(out)[-1].name == "step_000000005"
    assert not (out / "bundle").exists()
    go_on(data, out)
    assert weights(out) == weights(straight)
    assert metrics(out) == metrics(straight)


@pytest.mark.slow
def test_a_kill_while_saving_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    straight, data, tmp_path
):
    code, _ = stopped(data, tmp_path, _WAIT_IN_SAVE, number=signal.SIGKILL, lines=8)
    out = tmp_path / "run"
    assert code == -signal.SIGKILL
    assert [path.name for path in checkpoints(out)] == ["step_000000004"]
    assert len(metrics(out)) == 8
    with (out / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 9, "lo')  # a line cut off
    go_on(data, out)
    assert weights(out) == weights(straight)
    assert metrics(out) == metrics(straight)
    assert not list(out.glob("checkpoints/*.writing"))


def test_going_on_with_what_is_done_changes_nothing(straight, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    values = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**values, "out": str(out)}))
    go_on(data, out)
    assert weights(out) == weights(straight)
    assert metrics(out) == metrics(straight)


def test_a_run_that_was_killed_before_its_first_checkpoint_leaves_no_lines_behind(
    straight, data, tmp_path
):
    """Neither a fresh start nor one with --resume may mix the old lines with its own."""
    for resume in (False, True):
        out = tmp_path / str(resume)
        out.mkdir()
        shutil.copy(straight / "config.yaml", out)
        (out / "metrics.jsonl").write_text('{"step": 1, "loss": 99.0}\n{"step": 2, "lo')
        assert pretrain.run(config(tiny_pretrain(data, out, resume=resume))) == 0
        assert metrics(out) == metrics(straight)


def test_what_may_change_on_going_on_may_change(straight, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    values = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**values, "out": str(out)}))
    shutil.rmtree(checkpoints(out)[-1])
    go_on(data, out, workers=1, keep=1, save_every=10_000)
    assert weights(out) == weights(straight)
    assert len(checkpoints(out)) == 1


# --- refused ---


@pytest.fixture
def finished(straight, tmp_path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    values = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**values, "out": str(out)}))
    return out


def test_a_second_run_in_a_finished_folder_is_refused(finished, data, cli_call):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    code, err = cli_call(tiny_pretrain(data, finished))
    assert code == 2
    assert "already holds a run; add --resume to go on with it" in err
    assert len(err.splitlines()) == 1
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert after == before


def test_a_second_run_while_one_runs_is_refused(data, tmp_path, cli_call):
    with run_folder.locked(tmp_path / "run"):
        code, err = cli_call(tiny_pretrain(data, tmp_path / "run"))
        left = [path.name for path in (tmp_path / "run").iterdir()]
    assert code == 2
    assert "another run is at work here" in err
    assert len(err.splitlines()) == 1
    assert left == [".lock"]


@pytest.fixture
def cli_call(capsys, tmp_path):
    """The run as a command: its code and what it says."""
    from pipelines.cli import main

    def call(values: dict[str, Any], *arguments: str) -> tuple[int, str]:
        path = tmp_path / "given.yaml"
        path.write_text(yaml.safe_dump(values))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(["pretrain", str(path), *arguments])
        assert isinstance(left.value.code, int)
        return left.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"batch_size": 8}, "batch_size: 16 -> 8"),
        ({"samples": 384}, "samples: 192 -> 384"),
        ({"lanes": 8}, "lanes: 4 -> 8"),
        ({"captions": ["a {caption}"]}, "captions: ['{caption}'] -> ['a {caption}']"),
        (
            {"model__dim": 32, "optimizer__learning_rate": 0.1, "keep": 9},
            "model.dim: 16 -> 32; optimizer.learning_rate: 0.002 -> 0.1",
        ),
        (
            {"optimizer__options": {"betas": [0.9, 0.98], "eps": 1e-6}},
            "optimizer.options.eps: not given -> 1e-06",
        ),
    ],
)
def test_going_on_with_another_configuration_is_refused_by_key(changes, told, finished, data):
    with pytest.raises(ConfigError) as caught:
        pretrain.run(config(tiny_pretrain(data, finished, resume=True, **changes)))
    assert one_line(caught) == f"{finished}: the run was started otherwise: {told}"


def test_how_many_rows_go_at_a_time_may_change(finished, data):
    pretrain.refuse_to_mix(config(tiny_pretrain(data, finished, resume=True, micro_batch_size=4)))


@pytest.mark.parametrize("place", ["file/bundle", "gone/bundle", "file/deeper/bundle"])
def test_a_place_that_takes_no_bundle_is_told_before_the_first_step(place, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    values = tiny_pretrain(data, tmp_path / "run", bundle=str(tmp_path / place))
    with pytest.raises(ValueError, match="no bundle can be written there") as caught:
        pretrain.run(config(values))
    assert place in one_line(caught)
    assert not (tmp_path / "run").exists()


def test_a_bundle_that_could_not_be_written_is_written_elsewhere(
    finished, data, tmp_path, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere/model.safetensors")

    values = tiny_pretrain(data, finished, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_bundle", full)
        with pytest.raises(OSError, match="No space left on device; the model lies in ") as caught:
            pretrain.run(config(values))
    said = one_line(caught)
    assert f"{checkpoints(finished)[-1]}: " in said
    assert "--resume bundle=ELSEWHERE" in said
    assert pretrain.run(config(values, bundle=str(tmp_path / "elsewhere"))) == 0
    same = [
        (one / "model.safetensors").read_bytes()
        for one in (finished / "bundle", tmp_path / "elsewhere")
    ]
    assert same[0] == same[1]


def test_going_on_with_other_data_is_refused(finished, tmp_path):
    write_pairs(tmp_path / "other", hand="two")
    path = finished / "config.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "data": str(tmp_path / "other")}))
    with pytest.raises(ConfigError, match="not the data this run was started with") as caught:
        pretrain.run(config(tiny_pretrain(tmp_path / "other", finished, resume=True)))
    one_line(caught)
    assert len(metrics(finished)) == STEPS


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_data_that_is_not_there_is_one_line(kind, tmp_path, cli_call):
    place = tmp_path / "data"
    if kind == "empty":
        place.mkdir()
    if kind == "file":
        place.write_text("x")
    code, err = cli_call(tiny_pretrain(place, tmp_path / "run"))
    assert code == 2
    assert str(place) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"augment__options": {"rotat": 3.0}}, "rotat"),
        ({"augment__options": {"rotate": -3.0}}, "rotate=-3.0"),
        ({"optimizer__options": {"beta": 3}}, "beta"),
        ({"optimizer__name": "adamm"}, "unknown optimizer 'adamm'"),
        ({"model__image__options": {"chanels": 3}}, "chanels"),
        ({"model__image__name": "timm:resnet10"}, "timm has no model 'resnet10'"),
        ({"model__text__options": {"hiden_size": 3}}, "no option 'hiden_size'"),
        ({"model__context_length": 64}, "context_length 64"),
        ({"captions": ["{name}"]}, "template '{name}' does not fit the data"),
        ({"loss__positives": "name"}, "has no field 'name'"),
        ({"tokenizer__name": "/no/such/tokenizer"}, "no tokenizer /no/such/tokenizer"),
        ({"loss__options": {"label_smoothing": 2.0}}, "loss.options.label_smoothing"),
        ({"out": "/dev/null/run"}, "/dev/null/run"),
    ],
    ids=lambda one: "" if isinstance(one, str) else "-".join(one),
)
def test_a_mistake_in_the_configuration_is_one_line_and_no_run(
    changes, says, data, tmp_path, cli_call, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    values = tiny_pretrain(data, tmp_path / "run", **changes)
    code, err = cli_call(values)
    assert code == 2, err
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- steps without a finite gradient ---


def poisoned(monkeypatch, steps: set[int]) -> None:
    """Make the loss of some steps (from 0) NaN."""
    original = training.ContrastiveObjective.forward
    count = [0]

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        bad = count[0] in steps
        count[0] += 1
        loss: Any = output.loss
        return replace(output, loss=loss * float("nan")) if bad else output

    monkeypatch.setattr(training.ContrastiveObjective, "forward", forward)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(data, tmp_path, monkeypatch):
    poisoned(monkeypatch, {2, 5, 6, 7, 8})
    out = tmp_path / "run"
    assert pretrain.run(config(tiny_pretrain(data, out))) == 0
    assert [line["finite"] for line in metrics(out)] == [1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    progress = run_folder.read_json(checkpoints(out)[-1] / "progress.json")
    assert progress["skipped"] == 5
    model = align.load(out / "bundle")
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_skipped_step_leaves_running_statistics_alone(data, tmp_path, monkeypatch):
    original = training.ContrastiveObjective.forward
    seen: list[int] = []

    def forward(self, *args, **kwargs):
        seen.append(len(seen))
        handle = None
        if len(seen) == 3:  # NaN inside the tower, where batch normalisation meets it
            stem = next(part for part in self.model.image.modules() if hasattr(part, "stride"))
            handle = stem.register_forward_hook(lambda *call: call[2] * float("nan"))
        try:
            return original(self, *args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(training.ContrastiveObjective, "forward", forward)
    out = tmp_path / "run"
    assert pretrain.run(config(tiny_pretrain(data, out))) == 0
    assert [line["finite"] for line in metrics(out)][:4] == [1, 1, 0, 1]
    state = align.load(out / "bundle").state_dict()
    assert any("running_mean" in name for name in state)
    assert all(value.isfinite().all() for value in state.values())


def test_five_in_a_row_end_the_run_with_the_last_checkpoint_whole(data, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(5, 12)))
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no finite gradient in 5 steps up to step 10") as caught:
        pretrain.run(config(tiny_pretrain(data, out)))
    assert str(out) in one_line(caught)
    assert "It failed after step 10 of " in (out / "report.html").read_text()
    assert checkpoints(out)
    assert not (out / "bundle").exists()
    from safetensors.torch import load_file

    for path in checkpoints(out):
        tensors = load_file(path / "objective.safetensors")
        assert all(value.isfinite().all() for value in tensors.values())


# --- several processes ---

NO_CROSS_TALK = {
    "image": {"name": "timm:vit_tiny_patch16_224", "options": TINY_VIT},
    "text": {"name": "hf:bert", "options": TINY_BERT},
}
"""Towers without batch statistics and without dropout: rows do not know their process."""


def logged_run(out: str, values: dict[str, Any]) -> None:
    """Train, and note the ids of every batch of this process."""
    seen: list[list[int]] = []
    original = pretrain.step

    def step(run, batch):
        seen.append(batch.ids.tolist())
        return original(run, batch)

    pretrain.step = step
    try:
        assert pretrain.run(config(values)) == 0
    finally:
        pretrain.step = original
    Path(out).write_text(json.dumps(seen))


def rank_environment(rank: int, world: int) -> None:
    """What `accelerate launch` tells a process."""
    for name, value in {
        **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world},
        **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1},
    }.items():
        os.environ[name] = str(value)


def rank_run(rank: int, world: int, folder: str, values: dict[str, Any]) -> None:
    rank_environment(rank, world)
    logged_run(f"{folder}/{rank}.json", values)


@pytest.mark.slow
def test_two_processes_take_the_same_batches_and_reach_the_same_losses(data, tmp_path):
    def values(name: str) -> dict[str, Any]:
        given = tiny_pretrain(data, tmp_path / name, samples=96)
        given["model"] |= NO_CROSS_TALK
        return given

    logged_run(str(tmp_path / "alone.json"), values("alone"))
    run_ranks(rank_run, 2, str(tmp_path), values("both"))
    alone, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", 0, 1)
    )
    assert len(alone) == len(first) == len(second) == 6
    for batch, one, other in zip(alone, first, second, strict=True):
        assert (batch[0::2], batch[1::2]) == (one, other)
    expected, found = metrics(tmp_path / "alone"), metrics(tmp_path / "both")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(expected, found, strict=True):
        for name in ("loss", "gradient_norm", "temperature", "learning_rate"):
            assert other[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), name
    one, two = (align.load(tmp_path / name / "bundle").state_dict() for name in ("alone", "both"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def damaged(data, tmp_path_factory) -> Path:
    """The same pairs with two pictures broken."""
    folder = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(data, folder)
    path = folder / "000001.tar"
    content = bytearray(path.read_bytes())
    for number in (0, 5):
        start = Manifest.load(folder).spans["png"][0][12 + number]
        content[start : start + 8] = b"no image"
    path.write_bytes(content)
    return folder


COUNTS = ("seen", "bad", "repeats", "reasons", "left_out", "fingerprint")


@pytest.mark.slow
def test_the_data_report_is_that_of_the_whole_run_over_processes_and_stops(damaged, tmp_path):
    values = tiny_pretrain(damaged, tmp_path / "run", samples=96, max_bad_fraction=0.5)
    values["model"] |= NO_CROSS_TALK
    assert pretrain.run(config(values)) == 0
    whole = run_folder.read_json(tmp_path / "run" / "data_report.json")
    assert whole["seen"] == 96
    assert whole["reasons"] == {"undecodable image": 4}  # two epochs
    assert len(whole["listed"]) == 2
    assert metrics(tmp_path / "run")[-1]["bad_samples"] == 4

    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    assert pretrain.run(config({**values, "resume": True})) == 0
    resumed = run_folder.read_json(tmp_path / "run" / "data_report.json")
    assert {name: resumed[name] for name in COUNTS} == {name: whole[name] for name in COUNTS}
    assert metrics(tmp_path / "run")[-1]["bad_samples"] == 4

    run_ranks(rank_run, 2, str(tmp_path), {**values, "out": str(tmp_path / "both")})
    both = run_folder.read_json(tmp_path / "both" / "data_report.json")
    assert {name: both[name] for name in COUNTS} == {name: whole[name] for name in COUNTS}
    assert sorted(p["key"] for p in both["listed"]) == sorted(p["key"] for p in whole["listed"])
    assert metrics(tmp_path / "both")[-1]["bad_samples"] == 4


def rank_of_another_machine(rank: int, world: int, folder: str, values: dict[str, Any]) -> None:
    """One process has set a sample aside in its own cache; the other knows nothing of it."""
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache{rank}"
    manifest = Manifest.open(values["data"], quarantine=False)
    if rank == 0:
        problem = manifest.problem(3, Reason.UNDECODABLE)
        home = cache_folder(manifest.storages[0], whole=True)
        home.mkdir(parents=True)
        content = written_list({3: problem}, manifest.shards, before=None)
        assert content is not None
        (home / QUARANTINE_FILE).write_bytes(content)
    rank_environment(rank, world)
    with pytest.raises(ConfigError, match="the processes see different samples"):
        pretrain.run(config(values))


@pytest.mark.slow
def test_processes_with_different_samples_are_refused(data, tmp_path):
    values = tiny_pretrain(data, tmp_path / "run", samples=96)
    run_ranks(rank_of_another_machine, 2, str(tmp_path), values)


def test_validation_reads_captions_where_training_does(tmp_path):
    """What the check-up and the run read of held-out data must be the same."""
    records = [
        Record(f"{n}", encoded(picture(colour, "dot")), None, {"alt": f"a {colour} dot"})
        for n, colour in enumerate(COLOURS)
    ]
    for number, record in enumerate(records):
        members = {
            f"{number}.png": record.image,
            f"{number}.json": json.dumps(dict(record.fields)).encode(),
        }
        (tmp_path / "data").mkdir(exist_ok=True)
        write_tar(tmp_path / "data" / f"{number}.tar", members)
    values = tiny_pretrain(
        tmp_path / "data",
        tmp_path / "run",
        samples=16,
        caption_fields=["json.alt"],
        validation={"data": str(tmp_path / "data"), "every": 16},
    )
    assert pretrain.run(config(values)) == 0
    assert "image_to_text_recall@1" in metrics(tmp_path / "run")[-1]


def test_a_run_that_stops_for_damage_goes_on_where_it_stopped(damaged, tmp_path):
    # Two of 48 are bad: above this share once both were met, in the first of two epochs.
    values = tiny_pretrain(damaged, tmp_path / "run", samples=96, max_bad_fraction=0.021)
    with pytest.raises(TooMuchDamageError, match="--resume with a higher max_bad_fraction"):
        pretrain.run(config(values))
    (saved,) = checkpoints(tmp_path / "run")
    assert 0 < int(saved.name.removeprefix("step_")) < 4
    again = {**values, "resume": True, "max_bad_fraction": 0.5}
    assert pretrain.run(config(again)) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] == 6


def test_two_data_sets_are_mixed_by_weight_and_counted(data, damaged, tmp_path):
    values = tiny_pretrain(data, tmp_path / "run", samples=96, max_bad_fraction=0.5)
    values["data"] = [{"data": str(data), "weight": 3}, {"data": str(damaged), "weight": 1.0}]
    assert pretrain.run(config(values)) == 0
    report = run_folder.read_json(tmp_path / "run" / "data_report.json")
    first, second = report["sources"]
    assert (first["share"], second["share"]) == (0.75, 0.25)
    assert first["consumed"] + second["consumed"] == 96
    assert second["consumed"] < 48 < first["consumed"]
    assert first["data"] == str(data)
    again = config(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert again == config(values)


def test_validation_and_stages_are_part_of_a_run(data, tmp_path):
    values = tiny_pretrain(
        data,
        tmp_path / "run",
        stages=[{"until": 0.5, "image_size": 24}],
        validation={"data": str(data), "where": {"colour": ["red", "blue"]}, "every": 48},
    )
    sizes = []
    original = training.training_pictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipelines.step.training_pictures",
            lambda *given: [images := original(*given), sizes.append(images.shape[-1])][0],
        )
        assert pretrain.run(config(values)) == 0
    assert sizes == [24] * 6 + [32] * 6
    checks = [line for line in metrics(tmp_path / "run") if "image_to_text_recall@1" in line]
    assert [line["samples"] for line in checks] == [48, 96, 144, 192]
    assert all(0 <= line["text_to_image_recall@5"] <= 1 for line in checks)
