"""What a run remembers between its lines, what a line says, and what is no spike."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pairs_corpus import tiny_pretrain

from align.checkpoint import checkpoints
from pipelines import pretrain, run_folder
from pipelines.config import build
from pipelines.progress import Ledger, TrainingLog
from pipelines.schemas import PretrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = [2.0 + 0.05 * (step * 7 % 10) for step in range(60)]


def spikes(losses: list[float], ledger: Ledger | None = None) -> list[int]:
    ledger = Ledger() if ledger is None else ledger
    return [number for number, loss in enumerate(losses) if ledger.judge(loss) is not None]


def test_a_spike_is_far_above_what_is_usual_and_counts_once():
    ledger = Ledger()
    assert spikes([*QUIET, 9.0, 8.0, *QUIET[:10], 9.0, 2.0], ledger) == [60, 72]
    assert ledger.spikes == 2
    assert not ledger.spiking


@pytest.mark.parametrize(
    "losses",
    [
        [10.0 * 0.95**step for step in range(200)],  # falls
        [2.0] * 50 + [2.39] * 50,  # less than a fifth above, though nothing varies
        [1.0 + 0.1 * (step * 7 % 10) for step in range(100)] + [2.9] * 3,  # within the spread
        [1.0] * 10 + [50.0],  # too little is known
        [*QUIET, float("nan"), float("inf"), 2.0],
        [-3.0 + 0.01 * (step % 5) for step in range(60)] + [-2.5],
    ],
    ids=["falling", "a little", "noisy", "early", "not finite", "below zero"],
)
def test_what_is_no_spike(losses):
    assert spikes(losses) == []


def test_a_loss_below_zero_may_spike():
    assert spikes([-3.0] * 30 + [-2.0]) == [30]


def test_a_new_level_becomes_the_usual_one():
    assert spikes(QUIET + [9.0] * 120 + [9.1, 2.0, 9.0]) == [60]


def test_the_ledger_goes_on_from_its_state_as_json():
    values = [*QUIET, 9.0, 9.0, *QUIET[:5], 9.0]
    for cut in (3, 25, 61, 62, 66):
        first, whole = Ledger(), Ledger()
        for one in values[:cut]:
            first.judge(one)
            first.add({"loss": one})
        second = Ledger()
        second.restore(json.loads(json.dumps(first.state())))
        for one in values[cut:]:
            second.judge(one)
            second.add({"loss": one})
        for one in values:
            whole.judge(one)
            whole.add({"loss": one})
        assert second.state() == whole.state()
        assert second.means() == whole.means()


class Heard:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.ended = 0
        self.error: BaseException | None = None

    def line(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def end(self, error: BaseException | None = None) -> None:
        self.ended += 1
        self.error = error


def logged(path: Path, steps: list[dict[str, float]], *, every: int) -> tuple[Heard, Ledger]:
    heard, ledger = Heard(), Ledger()
    with TrainingLog(
        *(path,),
        ledger=ledger,
        steps=len(steps),
        done=0,
        batch_size=10,
        every=every,
        observers=[heard],
    ) as log:
        for number, measured in enumerate(steps):
            if line := log.step(number + 1, measured):
                log.write(line)
    return heard, ledger


def test_a_line_is_the_mean_since_the_last_one_and_the_last_step_has_one(tmp_path):
    steps = [{"loss": float(number), "finite": 1.0} for number in range(1, 8)]
    steps[2]["loss"], steps[2]["finite"] = float("nan"), 0.0
    steps[3]["norm"] = 5.0
    heard, _ = logged(tmp_path / "metrics.jsonl", steps, every=3)
    lines = run_folder.read_metrics(tmp_path / "metrics.jsonl")
    assert lines == heard.lines
    assert heard.ended == 1
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["samples"] for line in lines] == [30, 60, 70]
    assert [line["loss"] for line in lines] == [1.5, 5.0, 7.0], "what is not finite is left out"
    assert [line["finite"] for line in lines] == [2 / 3, 1, 1]
    assert [line.get("norm") for line in lines] == [None, 5.0, None]


def test_a_line_without_a_finite_loss_is_still_json(tmp_path, capsys):
    logged(tmp_path / "metrics.jsonl", [{"loss": float("inf")}] * 2, every=2)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert "loss unknown" in capsys.readouterr().out


def test_a_spike_is_said_once_and_counted(tmp_path, capsys):
    steps = [{"loss": loss} for loss in [*QUIET, 9.0, 9.0, 2.0]]
    heard, _ = logged(tmp_path / "metrics.jsonl", steps, every=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "far above" in line]
    assert len(said) == 1
    assert said[0].startswith("step 61: a loss of 9, far above the 2.2")
    assert [line["spikes"] for line in heard.lines][-5:] == [0, 0, 1, 1, 1]


def test_the_budget_of_a_step_adds_up_to_the_step(tmp_path, monkeypatch):
    clock = iter([0.0, *[0.1] * 20])
    monkeypatch.setattr("pipelines.progress.time.perf_counter", lambda: next(clock))
    usual = {"loss": 1.0, "data_ms": 4.0, "forward_backward_ms": 30.0, "optimizer_ms": 5.0}
    last = {**usual, "loss_ms": 8.0, "around_loss_ms": 40.0, "ideal_ms": 10.0}
    heard, _ = logged(tmp_path / "metrics.jsonl", [usual, last], every=2)
    (line,) = heard.lines
    assert line["samples_per_second"] == pytest.approx(200)
    parts = {name: line[name] for name in line if name.endswith("_ms")}
    assert parts == pytest.approx(
        {
            "data_ms": 4,
            "forward_backward_ms": 24,  # a fifth was the loss in the step looked at
            "loss_ms": 6,
            "optimizer_ms": 5,
            "other_ms": 11,
        }
    )
    assert sum(parts.values()) == pytest.approx(50)
    assert line["mfu"] == pytest.approx(0.2)


@pytest.mark.parametrize("every", [1, 20])
def test_the_time_that_is_left_is_told_of_steps_behind_the_first(
    every, tmp_path, monkeypatch, capsys
):
    now = [0.0]
    monkeypatch.setattr("pipelines.progress.time.perf_counter", lambda: now[0])
    with TrainingLog(
        tmp_path / "metrics.jsonl", ledger=Ledger(), steps=33, done=0, batch_size=10, every=every
    ) as log:
        for number, seconds in enumerate([60.0, 2.0, 4.0]):
            now[0] += seconds
            if line := log.step(number + 1, {"loss": 1.0}):
                log.write(line)
            with log.pause():
                now[0] += 100.0  # a checkpoint
    assert "about 90 s to go at 3 samples/s" in capsys.readouterr().out


def test_the_first_figure_of_every_task_and_the_best_are_shown(tmp_path, capsys):
    names = [*("recall", "things/top1", "things/top5", "birds/of prey/top1", "birds/of prey/top5")]
    line = {f"{name}{end}": 0.5 for name in names for end in ("", "_low", "_high")}
    with TrainingLog(
        *(tmp_path / "metrics.jsonl",),
        ledger=Ledger(),
        steps=9,
        done=0,
        batch_size=10,
        every=1,
        best="birds/of prey/top5",
    ) as log:
        log.write({"step": 3, "samples": 30, **line, "norm/image": 2.0})
    (said,) = capsys.readouterr().out.splitlines()
    assert said == ("samples 30  things/top1 0.5  birds/of prey/top1 0.5  birds/of prey/top5 0.5")


CLOCKS = {"samples_per_second", "mfu"}


def lines(out: Path) -> list[dict[str, Any]]:
    return [
        {name: line[name] for name in line if name not in CLOCKS and not name.endswith("_ms")}
        for line in run_folder.read_metrics(out / "metrics.jsonl")
    ]


def test_lines_of_several_steps_go_on_as_if_never_stopped(data, tmp_path):
    """Checkpoints at steps 4, 8 and 12; lines after 5, 10 and 12."""
    values = tiny_pretrain(data, tmp_path / "run", log_every=5, keep=9)
    assert pretrain.run(build(PretrainConfig, values, origin="test")) == 0
    straight = lines(tmp_path / "run")
    assert [line["step"] for line in straight] == [5, 10, 12]
    for kept in (2, 1):
        for folder in checkpoints(tmp_path / "run")[kept:]:
            shutil.rmtree(folder)
        again = {**values, "resume": True}
        assert pretrain.run(build(PretrainConfig, again, origin="test")) == 0
        assert lines(tmp_path / "run") == straight
