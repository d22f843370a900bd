"""Runs that are killed, stopped, damaged or out of disk go on as if nothing had happened."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forks import Forks
from pairs_corpus import tiny_pretrain
from ranks import run_ranks
from test_pipelines_pretrain import NO_CROSS_TALK, config, metrics, rank_environment, weights
from torch.multiprocessing.spawn import ProcessExitedException

import align
import align.checkpoint
from align.checkpoint import checkpoints
from benchmarks.kill import being_written
from eval.results import Figure
from pipelines import pretrain, progress, run_folder, saving
from pipelines import step as step_module
from pipelines.cadence import Cadence
from pipelines.config import ConfigError
from pipelines.progress import StopOnSignal
from pipelines.training import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as warm:
        yield warm


def until(true: Callable[[], Any], *, seconds: float = 60, pause: float = 0.0005) -> Any:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)
    return found


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def names(out: Path) -> list[str]:
    return [path.name for path in checkpoints(out)]


def assert_same(out: Path, other: Path) -> None:
    """Two runs: every logged number and every weight, to the bit."""
    assert metrics(out) == metrics(other)
    assert weights(out) == weights(other)


# --- kill -9 ---

KILLS, IN_WRITING = 20, 5


def killed_run(data: Path, out: Path) -> dict[str, Any]:
    """Sixty steps with all that a run has: workers, dropout, an average, validation, the best."""
    return tiny_pretrain(
        data,
        out,
        samples=60 * 16,
        save_every="3 steps",
        workers=2,
        resume=True,
        validation={
            "data": str(data),
            "where": {"colour": ["red", "blue"]},
            "every": "10 steps",
            "best": "text_to_image_recall@1",
        },
    )


@pytest.mark.slow
def test_killed_twenty_times_a_run_ends_as_one_that_was_never_killed(data, tmp_path, forks):
    straight, out = tmp_path / "straight", tmp_path / "killed"
    forks.start(killed_run(data, straight))
    assert forks.code() == 0, forks.said

    chance, kills, in_writing = random.Random(20), 0, 0
    while kills < KILLS or in_writing < IN_WRITING:
        assert kills < 3 * KILLS
        left, logged = being_written(out), lines(out)
        pid = forks.start(killed_run(data, out))
        if kills % 2:  # while a checkpoint is written
            until(lambda left=left: being_written(out) - left)
            time.sleep(chance.uniform(0, 0.004))
        else:  # anywhere: while loading, in a step, in an evaluation, between two checkpoints
            steps = chance.randrange(5)
            until(lambda more=steps, logged=logged: lines(out) != logged or not more)
            first = lines(out)
            until(lambda more=steps, first=first: lines(out) >= first + more - 1)
            time.sleep(chance.uniform(0, 0.03 if steps else 0.3))
        os.kill(pid, signal.SIGKILL)
        assert forks.code() == -signal.SIGKILL, forks.said
        kills += 1
        in_writing += bool(being_written(out) - left)
    forks.start(killed_run(data, out))
    assert forks.code() == 0, forks.said
    assert_same(out, straight)
    assert names(out) == names(straight)
    best = [run_folder.read_json(one / "checkpoints" / "best.json") for one in (out, straight)]
    assert best[0] == best[1]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {*names(out), "best.json"}


# --- signals ---


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain.run(config(tiny_pretrain(data, out, log_every=5))) == 0
    return out


def signalling(number: int, *, step: int, times: int = 1, rank: int = 0) -> Callable:
    """The step, with a signal to this very process at the end of one of them."""
    original = pretrain.step

    def stepped(training, batch):
        measured = original(training, batch)
        if training.step == step and training.accelerator.process_index == rank:
            for _ in range(times):
                signal.raise_signal(number)
        return measured

    return stepped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [1, 7])
def test_a_signal_saves_within_a_step(
    number, code, step, straight, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    values = tiny_pretrain(data, out, log_every=5)
    # Twice: what a launcher passes on again is no second wish.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "step", signalling(number, step=step, times=2))
        assert pretrain.run(config(values)) == code
    assert names(out)[-1] == f"step_{step:09d}"
    assert f"stopped at step {step} of 12 with a checkpoint in {out}" in capsys.readouterr().out
    assert not (out / "bundle").exists()
    assert pretrain.run(config({**values, "resume": True})) == 0
    assert_same(out, straight)


def test_the_second_signal_ends_it_at_once(monkeypatch):
    monkeypatch.setattr(progress, "_SAME_SIGNAL_S", -1.0)
    # Whoever runs the tests may have told this process to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopOnSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_came_before_ends_what_is_not_worth_waiting_for(capfd):
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as left, stop.at_once():
            pytest.fail("it went on")
    assert left.value.code == 0
    assert "nothing to save" in capfd.readouterr().out


def test_several_processes_never_leave_alone():
    with StopOnSignal(together=True) as stop, stop.at_once():
        signal.raise_signal(signal.SIGTERM)
        assert stop.terminated


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_loading_ends_it_at_once_and_leaves_nothing(
    number, code, data, tmp_path, forks
):
    patch = (
        "import signal\nfrom pipelines import training\n"
        f"def late(*_): signal.raise_signal({int(number)})\n"
        "training.make_tokenizer = late\n"
    )
    forks.start(tiny_pretrain(data, tmp_path / "run"), patch=patch)
    assert forks.code() == code, forks.said
    assert "Traceback" not in forks.said
    assert not (tmp_path / "run").exists()


def test_sigterm_of_another_process_is_obeyed(straight, data, tmp_path, forks):
    """A real signal from outside, at whatever moment of a step it comes."""
    out = tmp_path / "run"
    values = tiny_pretrain(data, out, log_every=5, save_every="100 steps")
    patch = (
        "import time\nfrom pipelines import pretrain\noriginal = pretrain.step\n"
        "def slow(*given):\n    time.sleep(0.1)\n    return original(*given)\n"
        "pretrain.step = slow\n"
    )
    pid = forks.start(values, patch=patch)
    until(lambda: lines(out))
    os.kill(pid, signal.SIGTERM)
    assert forks.code() == 0, forks.said
    (saved,) = names(out)
    assert f"stopped at step {int(saved.removeprefix('step_'))} of 12" in forks.said
    forks.start({**values, "resume": True})
    assert forks.code() == 0, forks.said
    assert_same(out, straight)


# --- several processes ---


def spread_run(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Twelve steps whose numbers depend on rounding alone, however they are spread."""
    values = tiny_pretrain(data, out, **changes)
    values["model"] |= NO_CROSS_TALK
    return values


class Killed(BaseException):
    """As `kill -9`, as far as what is on disk is concerned: nothing is written after it."""


def ending(*, step: int, end: Callable[[], Any]) -> Callable:
    """The step, and an end of it all in place of one."""
    original = pretrain.step

    def stepped(training, batch):
        if training.step == step:
            end()
        return original(training, batch)

    return stepped


def kill() -> None:
    raise Killed


def noted(seen: list[list[int]]) -> Callable:
    """The step, with the samples of every batch noted."""
    original = pretrain.step

    def stepped(training, batch):
        seen.append(batch.ids.tolist())
        return original(training, batch)

    return stepped


def rank_of_stops(rank: int, world: int, folder: str, data: str) -> None:
    """One after the other, in one pair of processes; each leaves a run folder to look at."""
    rank_environment(rank, world)
    place = Path(folder)

    def stay(self) -> None:  # the next run needs the processes still
        pass

    Accelerator.end_training = stay

    def run(name: str, steps: Callable | None = None, **changes: Any) -> int:
        given = spread_run(Path(data), place / name, resume=True, **changes)
        with pytest.MonkeyPatch.context() as patch:
            if steps is not None:
                patch.setattr(pretrain, "step", steps)
            return pretrain.run(config(given))

    # Begun by one process, killed, and gone on with by two.
    seen: list[list[int]] = []
    assert run("one_then_two", noted(seen)) == 0
    (place / f"one_then_two.{rank}.json").write_text(json.dumps(seen))

    # Only the second process is sent a signal.
    assert run("signal", signalling(signal.SIGTERM, step=7, rank=1)) == 0
    assert names(place / "signal")[-1] == "step_000000007"

    # Shares of the weights: stopped, and gone on with by as many; or by one, see below.
    assert run("shares", signalling(signal.SIGINT, step=6, rank=1), shard_weights=True) == 130
    if rank == 0:
        shutil.copytree(place / "shares", place / "shares_then_one")
    assert run("shares", shard_weights=True) == 0
    # A copy on each goes on from one checkpoint in shares, and the other way round.
    with pytest.raises(Killed):
        run("copies_then_shares", ending(step=6, end=kill))
    assert run("copies_then_shares", shard_weights=True) == 0

    # One process cannot write its share: none goes on, nothing half is left.
    def refused(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(align.checkpoint, "_write_share", refused)
        with pytest.raises(OSError, match="No space") as caught:
            run("full", shard_weights=True)
    assert "step_000000004" in str(caught.value)

    # One process does not see what the other does.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(saving, "newest_whole", lambda *_, **__: (None, []))
        with pytest.raises(ConfigError) as unseen:
            run("signal")
    assert "process 0 finds step_000000007 there, process 1 no checkpoint" in str(unseen.value)

    # Killed in earnest, both of them; one process goes on.
    run("two_then_one", ending(step=6, end=lambda: os.kill(os.getpid(), signal.SIGKILL)))


def assert_close(out: Path, other: Path) -> None:
    """Two runs: the losses of every step and the temperature, to 1e-5."""
    found, expected = metrics(out), metrics(other)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for name in ("loss", "temperature", "learning_rate"):
            assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), (line, name)
        assert line["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-3)
        # Of 16 rows, one may fall to the other side of a tie.
        assert line["batch_accuracy"] == pytest.approx(wanted["batch_accuracy"], abs=1.1 / 16)


@pytest.mark.slow
def test_the_number_of_processes_may_change_and_one_signal_stops_all(data, tmp_path):
    alone: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "step", noted(alone))
        assert pretrain.run(config(spread_run(data, tmp_path / "alone"))) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "step", ending(step=6, end=kill))
        with pytest.raises(Killed):
            pretrain.run(config(spread_run(data, tmp_path / "one_then_two")))
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(rank_of_stops, 2, str(tmp_path), str(data), seconds=280)

    # From one to two: the same global batches, row by row, from the checkpoint of step 4.
    ranks = [json.loads((tmp_path / f"one_then_two.{rank}.json").read_text()) for rank in (0, 1)]
    assert [(batch[0::2], batch[1::2]) for batch in alone[4:]] == list(zip(*ranks, strict=True))
    assert_close(tmp_path / "one_then_two", tmp_path / "alone")

    # From two to one.
    assert names(tmp_path / "two_then_one") == ["step_000000004"]
    seen: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "step", noted(seen))
        values = spread_run(data, tmp_path / "two_then_one", resume=True)
        assert pretrain.run(config(values)) == 0
    assert seen == alone[4:]
    assert_close(tmp_path / "two_then_one", tmp_path / "alone")

    assert not list((tmp_path / "full" / "checkpoints").glob("*"))

    # Shares of the weights, and back from them.
    assert names(tmp_path / "shares_then_one")[-1] == "step_000000006"
    place = tmp_path / "shares_then_one" / "checkpoints" / "step_000000006"
    assert len(list(place.glob("objective-*-of-00002.safetensors"))) == 2
    assert pretrain.run(config(spread_run(data, tmp_path / "shares_then_one", resume=True))) == 0
    for name in ("shares", "shares_then_one", "copies_then_shares"):
        assert_close(tmp_path / name, tmp_path / "alone")
        found, expected = (
            align.load(tmp_path / one / "bundle").state_dict() for one in (name, "alone")
        )
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


# --- full disks ---


def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_to_do(
    straight, data, tmp_path, monkeypatch, capsys
):
    from pipelines.cli import main

    out = tmp_path / "run"
    values = tiny_pretrain(data, out, log_every=5)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values))
    original, count = align.checkpoint.save_file, []

    def save_file(tensors, path, **options):
        count.append(path)
        if len(count) == 5:  # the second file of the second checkpoint
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align.checkpoint, "save_file", save_file)
        with pytest.raises(SystemExit) as left:
            main(["pretrain", str(path)])
    said = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert len(said) == 1, said
    place = out / "checkpoints" / "step_000000008"
    assert f"{place}: No space left on device" in said[0]
    assert "step_000000004 is whole: make room, then --resume goes on" in said[0]
    assert [one.name for one in (out / "checkpoints").iterdir()] == ["step_000000004"]
    assert pretrain.run(config({**values, "resume": True})) == 0
    assert_same(out, straight)


def test_files_that_the_system_refuses_end_the_run_likewise(straight, data, tmp_path, forks):
    """A real refusal of the operating system, in the middle of a file that Rust writes."""
    out = tmp_path / "run"
    values = tiny_pretrain(data, out, log_every=5)
    patch = (
        "import resource\nfrom pipelines import pretrain\noriginal = pretrain.step\n"
        "def step(training, batch):\n"
        "    if training.step == 5:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "    return original(training, batch)\n"
        "pretrain.step = step\n"
    )
    forks.start(values, patch=patch)
    assert forks.code() == 2, forks.said
    assert "File too large" in forks.said.splitlines()[-1]
    assert "step_000000004 is whole" in forks.said.splitlines()[-1]
    assert "Traceback" not in forks.said
    assert [one.name for one in (out / "checkpoints").iterdir()] == ["step_000000004"]
    forks.start({**values, "resume": True})
    assert forks.code() == 0, forks.said
    assert_same(out, straight)


def test_a_full_disk_is_told_by_the_run_folder_whatever_was_being_written(
    data, tmp_path, monkeypatch
):
    def write(self, line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(progress.TrainingLog, "write", write)
    with pytest.raises(OSError, match="No space left on device; make room") as caught:
        pretrain.run(config(tiny_pretrain(data, tmp_path / "run")))
    assert str(caught.value).startswith(f"{tmp_path / 'run'}: ")
    assert str(caught.value).endswith("begin anew: there is no checkpoint yet")


def test_a_disk_full_at_the_first_checkpoint_promises_no_resume(saver, monkeypatch):
    def save_state(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving, "save_state", save_state)
    with pytest.raises(
        OSError, match="there is no checkpoint yet: make room, then begin anew"
    ) as c:
        at(saver, 4)
    assert "--resume" not in str(c.value)


# --- damage ---


@pytest.fixture
def finished(straight, tmp_path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    text = (out / "config.yaml").read_text().replace(str(straight), str(out))
    (out / "config.yaml").write_text(text)
    return out


DAMAGES = {
    "objective.safetensors": "objective.safetensors: ",
    "average.safetensors": "average.safetensors: ",
    "optimizer.safetensors": "optimizer.safetensors: ",
    "optimizer.json": "",
    "progress.json": "its progress.json is no JSON",
}


@pytest.mark.parametrize("keep", [0.7, None], ids=["cut", "missing"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_told(name, keep, finished):
    place = checkpoints(finished)[-1]
    assert align.checkpoint.fault(place, averaged=True) is None
    content = (place / name).read_bytes()
    (place / name).unlink()
    if keep is not None:
        (place / name).write_bytes(content[: int(keep * len(content))])
    wrong = align.checkpoint.fault(place, averaged=True)
    assert wrong is not None
    assert "\n" not in wrong
    assert DAMAGES[name] in wrong if keep else wrong == f"{name} is missing"


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_line(finished, straight, data, capsys):
    newest, before = checkpoints(finished)[-1], checkpoints(finished)[-2]
    path = newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    shutil.rmtree(finished / "bundle")
    capsys.readouterr()
    # As many are kept as there are: the damaged one must not push out a whole one.
    values = tiny_pretrain(data, finished, log_every=5, resume=True, keep=1)
    assert pretrain.run(config(values)) == 0
    said = capsys.readouterr().out
    assert f"{newest} is damaged (optimizer.safetensors: " in said
    assert f"going on from {before.name}" in said
    assert_same(finished, straight)
    assert names(finished) == ["step_000000012"]


def test_a_flipped_bit_is_noticed_and_the_checkpoint_passed_over(finished, data):
    name = "average.safetensors"
    newest, before = checkpoints(finished)[-1], checkpoints(finished)[-2]
    content = bytearray((newest / name).read_bytes())
    content[-3] ^= 1
    (newest / name).write_bytes(content)
    values = tiny_pretrain(data, finished, log_every=5, resume=True)
    training = build(config(values), Accelerator(cpu=True))
    saving.resume(training)
    (line,) = training.notes
    assert line.startswith(f"{newest} is damaged ({name}: its bytes have changed since")
    assert line.endswith(f"; going on from {before.name}")
    assert f"step_{training.step:09d}" == before.name


def test_a_checkpoint_of_before_there_were_checksums_is_resumed(finished, data):
    for place in checkpoints(finished):
        (place / "checksums.json").unlink()
    training = build(
        config(tiny_pretrain(data, finished, log_every=5, resume=True)), Accelerator(cpu=True)
    )
    saving.resume(training)
    assert f"step_{training.step:09d}" == names(finished)[-1]
    assert training.notes == []


def test_where_no_checkpoint_is_whole_that_is_said(finished, data):
    for place in checkpoints(finished):
        (place / "objective.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="and so is every other checkpoint there") as caught:
        pretrain.run(config(tiny_pretrain(data, finished, log_every=5, resume=True)))
    assert str(checkpoints(finished)[-1]) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- when, and which are kept ---


def figure(value: float, *, name: str = "recall", higher: bool = True) -> Figure:
    return Figure(name, value, value, value, 10, higher_is_better=higher)


@pytest.fixture
def saver(data, tmp_path) -> saving.Saver:
    values = tiny_pretrain(data, tmp_path / "run", keep=2)
    training = build(config(values), Accelerator(cpu=True))
    return saving.Saver(training)


def at(saver: saving.Saver, step: int, found: Figure | None = None, *, save: bool = True) -> None:
    saver._training.step = step
    if save:
        saver.save()
    saver.judge(found)
    saver.is_good()


def kept(saver: saving.Saver) -> list[int]:
    return [int(name.removeprefix("step_")) for name in names(saver._training.config.out)]


def test_the_best_is_kept_beyond_the_newest(saver):
    at(saver, 1, figure(0.5))
    at(saver, 2, figure(0.7))
    at(saver, 3, figure(0.7))
    at(saver, 4)
    assert kept(saver) == [2, 3, 4]
    at(saver, 5, figure(float("nan")))
    assert kept(saver) == [2, 4, 5]
    best = run_folder.read_json(saver._folder / "best.json")
    assert (best["checkpoint"], best["name"], best["value"]) == ("step_000000002", "recall", 0.7)

    saver = saving.Saver(saver._training)  # after a resume
    at(saver, 6, figure(0.6))
    at(saver, 7, figure(0.71), save=False)
    assert kept(saver) == [6, 7]
    at(saver, 8, figure(5.0, name="rank", higher=False))  # another figure was chosen
    at(saver, 9, figure(6.0, name="rank", higher=False))
    at(saver, 10)
    assert kept(saver) == [8, 9, 10]
    at(saver, 11, figure(4.0, name="rank", higher=False))
    at(saver, 12)
    at(saver, 13)
    assert kept(saver) == [11, 12, 13]


def test_figures_of_other_validation_data_are_not_compared(saver):
    one, other = ({"data": "abc", "where": {"colour": colour}} for colour in ("red", "blue"))
    saver._training.step = 1
    saver.judge(figure(0.9), one)
    saver = saving.Saver(saver._training)
    for step, value, of in ((2, 0.3, one), (3, 0.2, other), (4, 0.1, other)):
        saver._training.step = step
        saver.judge(figure(value), of)
    best = run_folder.read_json(saver._folder / "best.json")
    assert (best["checkpoint"], best["value"], best["of"]) == ("step_000000003", 0.2, other)


# --- what is no longer finite ---


def poisoned(monkeypatch, *, after: int) -> None:
    """Steps behind so many throw the weights away, where they stay finite at first."""
    original = step_module.learning_rate
    monkeypatch.setattr(
        step_module,
        "learning_rate",
        lambda training: 1e30 if training.step >= after else original(training),
    )


@pytest.mark.parametrize(("lost", "look"), [(4, False), (1, False), (1, True)])
def test_a_run_that_goes_wrong_at_its_end_keeps_what_was_good(
    lost, look, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    last = 12 - lost
    values = tiny_pretrain(data, out, keep=1, save_every="1 steps")
    if look:
        values["validation"] = {"data": str(data), "every": "12 steps"}
    poisoned(monkeypatch, after=last)
    good = f"step_{last:09d} is the last good checkpoint, --resume goes on from it"
    with pytest.raises(ValueError, match=good) as caught:
        pretrain.run(config(values))
    assert "\n" not in str(caught.value)
    assert names(out) == [f"step_{last:09d}"]
    assert not (out / "bundle").exists()
    monkeypatch.undo()
    assert pretrain.run(config({**values, "resume": True})) == 0
    assert names(out) == ["step_000000012"]
    assert (out / "bundle").exists()


def test_weights_that_are_no_numbers_are_not_saved(saver):
    at(saver, 1)
    at(saver, 2)
    saver._training.step = 3
    with torch.no_grad():
        next(iter(saver._training.average.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="weights are not finite at step 3; step_000000002 is the"):
        saver.save()
    assert kept(saver) == [1, 2]


def without_gradients(monkeypatch, *, steps: set[int]) -> None:
    """Steps in which no gradient is finite, by no fault of the weights."""
    original = step_module.clip_gradients
    count = iter(range(1, 99))

    def clip(parameters, length):
        norm = original(parameters, length)
        return float("nan") if next(count) in steps else norm

    monkeypatch.setattr(step_module, "clip_gradients", clip)


def test_a_signal_in_a_streak_stops_the_run_without_a_checkpoint_of_it(
    straight, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    values = tiny_pretrain(data, out, log_every=5)
    without_gradients(monkeypatch, steps={6, 7, 8})
    monkeypatch.setattr(pretrain, "step", signalling(signal.SIGTERM, step=7))
    assert pretrain.run(config(values)) == 0
    assert names(out) == ["step_000000004"]
    assert "without a checkpoint of it" in capsys.readouterr().out
    monkeypatch.undo()
    assert pretrain.run(config({**values, "resume": True})) == 0
    assert_same(out, straight)


def test_a_checkpoint_due_in_a_streak_is_written_behind_it(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    without_gradients(monkeypatch, steps={4, 5})
    monkeypatch.setattr(pretrain, "step", signalling(signal.SIGTERM, step=7))
    assert pretrain.run(config(tiny_pretrain(data, out))) == 0
    assert names(out) == ["step_000000006", "step_000000007"]
    progress = run_folder.read_json(checkpoints(out)[-1] / "progress.json")
    assert (progress["bad_in_a_row"], progress["skipped"]) == (0, 2)


@pytest.mark.parametrize("before", [0, 3, None])
def test_a_streak_is_gone_on_with(before, saver, data):
    at(saver, 4)
    path = checkpoints(saver._training.config.out)[-1] / "progress.json"
    found = {**run_folder.read_json(path), "bad_in_a_row": before}
    path.write_text(json.dumps({key: one for key, one in found.items() if one is not None}))
    (path.parent / "checksums.json").unlink()  # as it was written otherwise
    training = saver._training
    training.bad_in_a_row = 9 if before is not None else 0
    saving.resume(training)
    assert training.bad_in_a_row == (before or 0)


def test_what_lies_ahead_of_a_resume_is_set_aside(saver):
    for step in (1, 2):
        at(saver, step, figure(float(step)))
    (saver._folder / "step_000000003.writing").mkdir()
    (saver._folder / "step_000000001.removing").mkdir()
    saver._training.step = 1
    saver = saving.Saver(saver._training)
    assert kept(saver) == [1]
    at(saver, 2, figure(0.1))
    found = {path.name for path in saver._folder.iterdir()}
    assert found == {"step_000000001", "step_000000002", "step_000000002.damaged", "best.json"}
    assert run_folder.read_json(saver._folder / "best.json")["value"] == 0.1


def test_one_step_is_saved_once(saver, monkeypatch):
    at(saver, 1)
    monkeypatch.setattr(saving, "save_state", None)
    at(saver, 1)


@pytest.mark.parametrize(
    ("span", "due"),
    [
        ("3 steps", [3, 6, 9, 12]),
        (48, [3, 6, 9, 12]),
        (40, [3, 5, 8, 10]),
        ("0.5 epochs", [2, 3, 5, 6, 8, 9, 11, 12]),
        ("1 epochs", [3, 6, 9, 12]),
        (1, list(range(1, 13))),
        ("60 minutes", []),
    ],
)
def test_a_cadence_is_a_function_of_the_step(span, due):
    cadence = Cadence(span, batch_size=16, epoch=48)
    assert [step for step in range(1, 13) if cadence.due(step)] == due


def test_minutes_are_counted_from_when_it_was_done(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pipelines.cadence.time.monotonic", lambda: now[0])
    cadence = Cadence("2 minutes", batch_size=16, epoch=48)
    now[0] = 119.0
    assert not cadence.elapsed()
    now[0] = 120.0
    assert cadence.elapsed()
    cadence.done()
    assert not cadence.elapsed()
    now[0] = 240.0
    assert cadence.elapsed()
    assert not Cadence("2 steps", batch_size=16, epoch=48).elapsed()
