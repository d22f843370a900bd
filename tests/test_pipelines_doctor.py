"""The check-up before a run: each defect it promises to find is found, and nothing is touched."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from http_server import serving
from pairs_corpus import TINY_VIT, encoded, picture, tiny_pretrain, write_pairs
from shards_corpus import write_tar

from pipelines import cli, doctor, pretrain, telemetry
from pipelines.checkup import fit, speed
from pipelines.checkup.data import look, sampled
from pipelines.checkup.forecast import Machine, pace_of
from pipelines.checkup.memory import Amount, Weights
from pipelines.checkup.report import duration, percent, rate, several, size
from pipelines.checkup.speed import Rates, Stage
from pipelines.config import build, to_yaml
from pipelines.schemas import DoctorConfig, PretrainConfig
from shards.captions import CaptionRule
from shards.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"seconds": 0.1}


def rates(**changes: Any) -> Rates:
    usual = Rates(0.001, 0.003, 0.004, 0.001, (STAGE,), batch=16, activations=0, finite=True)
    return replace(usual, **changes)


STAGE = Stage(32, 0, 10, augment_s=0.001, compute_s=0.006)


@pytest.fixture
def examine(capsys, monkeypatch) -> Callable[..., SimpleNamespace]:
    """Runs the doctor and gives its code, its findings by what they are about, and its numbers.

    The clock is only asked where a test says so.
    """
    measure = doctor.measure
    monkeypatch.setattr(doctor, "measure", lambda *_, **__: rates())
    # However busy the machine is, there is time to look at all samples that are drawn.
    whole = doctor.look
    monkeypatch.setattr(
        doctor, "look", lambda *given, **options: whole(*given, **{**options, "seconds": 60.0})
    )

    def run(
        where: Path, out: Path, /, *, timed: bool = False, processes: int = 1, **changes: Any
    ) -> SimpleNamespace:
        if timed:
            monkeypatch.setattr(doctor, "measure", measure)
        values = {**tiny_pretrain(where, out, **changes), **QUICK, "processes": processes}
        config = build(DoctorConfig, {**values, "output": "json"}, origin="test")
        capsys.readouterr()
        code = doctor.run(config)
        told = json.loads(capsys.readouterr().out)
        found: dict[str, list[dict[str, str]]] = {}
        for finding in told["findings"]:
            assert "\n" not in finding["found"]
            found.setdefault(finding["what"], []).append(finding)
        problems = [one for one in told["findings"] if one["mark"] == "problem"]
        assert code == (doctor.WOULD_FAIL if problems else 0)
        assert told["problems"] == len(problems)
        return SimpleNamespace(code=code, found=found, problems=problems, numbers=told["numbers"])

    return run


def only(result: SimpleNamespace, what: str) -> dict[str, str]:
    [finding] = result.found[what]
    return finding


def everything_in(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- a healthy run ---


def test_a_healthy_run_has_no_problem_and_nothing_is_written(data, tmp_path, examine):
    before = everything_in(data)
    result = examine(data, tmp_path / "run", timed=True)
    assert result.code == 0
    assert everything_in(data) == before
    assert not list(tmp_path.iterdir())
    for what in ("out", "data", "samples", "captions", "tokens", "pictures", "model", "disk"):
        assert only(result, what)["mark"] == "ok"
    assert "48 samples in 4 shards" in only(result, "data")["found"]
    assert result.numbers["forecast_s"]["training"] > 0
    rates = result.numbers["rates"]
    assert min(rates["read_s"], rates["decode_s"], rates["ahead_s"], rates["tokenise_s"]) > 0
    assert [stage["steps"] for stage in rates["stages"]] == [12]
    assert 2 <= rates["batch"] <= 16


def test_it_prints_plain_lines_and_takes_the_configuration_of_a_run(data, tmp_path, capsys):
    values = tiny_pretrain(data, tmp_path / "run", workers=1)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(build(PretrainConfig, values, origin="test")))
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", str(written), "seconds=0.1"])
    captured = capsys.readouterr()
    assert left.value.code == 0
    assert captured.err == ""
    assert "\x1b" not in captured.out
    assert "\r" not in captured.out
    lines = captured.out.splitlines()
    assert lines[-1].startswith("nothing here would fail: ")
    assert [line for line in lines if line and line[0] != " "][:-1] == [
        *("run", "data", "model", "speed", "memory and disk"),
    ]
    assert any(line.startswith("  both, by 1 worker ") for line in lines)


def test_the_positional_values_are_those_of_pretrain(data, tmp_path):
    parsed = cli.parse("doctor", [str(data), str(tmp_path / "run"), "model.dim=8"])
    same = cli.parse("pretrain", [str(data), str(tmp_path / "run"), "model.dim=8"])
    assert isinstance(parsed, DoctorConfig)
    assert parsed.run == same


def test_several_weighted_sources_and_stages(data, tmp_path, examine):
    other = tmp_path / "other"
    write_pairs(other, hand="two", shards=1)
    result = examine(
        data,
        tmp_path / "run",
        timed=True,
        data=[{"data": str(data), "weight": 3}, {"data": str(other), "weight": 1}],
        stages=[{"until": 0.5, "image_size": 16}],
    )
    assert result.code == 0
    assert "96 samples in 5 shards" in only(result, "data")["found"]
    stages = result.numbers["rates"]["stages"]
    assert [(one["image_size"], one["first_step"], one["steps"]) for one in stages] == [
        (16, 0, 6),
        (32, 6, 6),
    ]
    assert "16 px" in only(result, "forecast")["found"]


def test_a_mistake_in_the_configuration_is_found_before_torch_is_there():
    script = (
        "import sys; from pipelines.cli import main\n"
        "sys.argv = ['align', 'doctor', 'batch_sise=3', 'lanes=0']\n"
        "try: main()\n"
        "except SystemExit as left: print(left.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == ["2", "False"]
    assert "batch_sise" in done.stderr
    assert "lanes" in done.stderr


def test_ctrl_c_is_one_line(data, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "measure", interrupted)
    written = tmp_path / "c.yaml"
    written.write_text(yaml.safe_dump(tiny_pretrain(data, tmp_path / "run")))
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", str(written)])
    assert left.value.code == 130
    assert capsys.readouterr().err == "align doctor: interrupted\n"


# --- data ---


def copy_of(data: Path, folder: Path) -> list[Path]:
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return sorted(folder.glob("*.tar"))


RING = encoded(picture("red", "ring"))


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_tar(path, [member for sample in samples for member in sample.items()])


def pair(key: str, caption: str | None = "red ring", **fields: str) -> dict[str, bytes]:
    sample = {f"{key}.png": RING}
    if caption is not None:
        sample[f"{key}.txt"] = caption.encode()
    if fields:
        sample[f"{key}.json"] = json.dumps(fields).encode()
    return sample


def test_a_shard_cut_in_the_middle_is_found(data, tmp_path, examine):
    shards = copy_of(data, tmp_path / "broken")
    shards[2].write_bytes(shards[2].read_bytes()[:8000])
    result = examine(tmp_path / "broken", tmp_path / "run")
    samples = only(result, "samples")
    assert samples["mark"] == "problem"
    assert "truncated" in samples["found"]
    assert shards[2].name in samples["found"]
    assert "max_bad_fraction" in samples["advice"]
    assert 0 < result.numbers["bad_share"] <= 0.25
    tolerant = examine(tmp_path / "broken", tmp_path / "run", max_bad_fraction=0.5)
    assert only(tolerant, "samples")["mark"] == "note"
    strict = examine(tmp_path / "broken", tmp_path / "run", max_bad_fraction=0.5, strict=True)
    assert only(strict, "samples")["mark"] == "problem"


def test_a_shard_that_is_gone_is_named(data, tmp_path, examine):
    shards = copy_of(data, tmp_path / "gone")
    shards[1].unlink()
    result = examine(tmp_path / "gone", tmp_path / "run", max_bad_fraction=0.3)
    assert only(result, "shards")["found"] == f"1 of 4 gave no sample: {shards[1].name}"
    assert result.numbers["bad_share"] == pytest.approx(0.25)


def test_shards_that_are_all_broken_give_lines(data, tmp_path, examine):
    shards = copy_of(data, tmp_path / "all")
    for shard in shards:
        shard.write_bytes(bytes(3) + shard.read_bytes()[3:1000])
    result = examine(tmp_path / "all", tmp_path / "run")
    assert "48 x truncated" in only(result, "samples")["found"]
    assert "4 of 4" in only(result, "shards")["found"]
    (tmp_path / "all" / "manifest.json").unlink()
    unread = examine(tmp_path / "all", tmp_path / "run")
    assert "no sample in 4 tar files" in only(unread, "data")["found"]
    assert only(unread, "out")["mark"] == "ok"


def test_a_data_set_behind_a_url(data, tmp_path, examine, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(data.parent) as site:
        place = f"{site.url}/data/{{000000..000003}}.tar"
        good = examine(data, tmp_path / "run", data=place, timed=True)
        assert only(good, "samples")["found"] == "48 samples of 4 shards read and decoded, all good"
        site.break_down("404", paths="000002.tar")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        gone = examine(data, tmp_path / "run", data=place)
        assert "000002.tar" in gone.problems[0]["found"]
    assert not (tmp_path / "run").exists()


def test_missing_captions_are_counted(tmp_path, examine):
    samples = [pair(f"s{number}", None if number % 4 else "red ring") for number in range(32)]
    write_shard(tmp_path / "data" / "0.tar", samples)
    result = examine(tmp_path / "data", tmp_path / "run")
    assert "24 x no caption, about 75% of all" in only(result, "samples")["found"]
    assert only(result, "samples")["mark"] == "problem"


def test_samples_left_out_by_the_manifest_are_told_by_reason(tmp_path, examine):
    samples = [pair(f"s{number}", f"red ring {number}") for number in range(24)]
    write_shard(tmp_path / "data" / "0.tar", [*samples, pair("s1")])
    cut = (tmp_path / "data" / "0.tar").read_bytes()
    (tmp_path / "data" / "0.tar").write_bytes(cut.rstrip(b"\0"))
    left_out = only(examine(tmp_path / "data", tmp_path / "run"), "left out")
    assert "duplicate key" in left_out["found"]
    assert "truncated" in left_out["found"]


@pytest.mark.parametrize("merged", [True, False])
def test_keys_that_look_merged(merged, tmp_path, examine):
    names = ("png", "v1.0001.png", "v1.0002.png") if merged else ("v1.png",)
    text = "txt" if merged else "v1.txt"
    samples = [
        {**{f"img{number}.{name}": RING for name in names}, f"img{number}.{text}": b"a ring"}
        for number in range(16)
    ]
    write_shard(tmp_path / "data" / "0.tar", samples)
    keys = only(examine(tmp_path / "data", tmp_path / "run"), "keys")
    assert keys["mark"] == "note"
    wanted = "16 samples with several pictures" if merged else "100% of the keys have dots"
    assert wanted in keys["found"]


def test_captions_that_are_cut_off(data, tmp_path, examine):
    tokens = only(examine(data, tmp_path / "run", model__context_length=3), "tokens")
    assert tokens["mark"] == "note"
    assert "100% of the captions are cut off" in tokens["found"]
    assert tokens["advice"].startswith("model.context_length=4 ")


def test_captions_are_shown_as_the_templates_write_them(data, tmp_path, examine):
    result = examine(data, tmp_path / "run", captions=["{caption} by {hand}"])
    assert " by one'" in only(result, "captions")["found"]
    wrong = examine(data, tmp_path / "run", captions=["{caption} by {artist}"])
    assert "{artist}" in only(wrong, "captions")["found"]
    assert only(wrong, "captions")["mark"] == "problem"


def test_captions_that_are_all_the_same(tmp_path, examine):
    write_shard(tmp_path / "data" / "0.tar", [pair(f"s{number}") for number in range(20)])
    captions = only(examine(tmp_path / "data", tmp_path / "run"), "captions")
    assert captions["mark"] == "note"
    assert "100% are 'red ring'" in captions["found"]


def test_a_missing_field_of_positives(tmp_path, examine):
    samples = [
        pair(f"s{number}", f"ring {number}", **({"name": "x"} if number % 2 else {"other": "y"}))
        for number in range(20)
    ]
    write_shard(tmp_path / "data" / "0.tar", samples)
    positives = only(
        examine(tmp_path / "data", tmp_path / "run", loss__positives="name"), "positives"
    )
    assert positives["mark"] == "problem"
    assert "50% of the samples have no field 'name'" in positives["found"]
    assert "caption, other" in positives["found"]


def test_a_field_in_which_all_agree_tells_nothing(data, tmp_path, examine):
    result = examine(data, tmp_path / "run", loss__positives="hand")
    assert only(result, "positives")["mark"] == "note"
    assert only(examine(data, tmp_path / "run", loss__positives="colour"), "positives")["mark"] == (
        "ok"
    )


def test_pictures_smaller_than_wanted(data, tmp_path, examine):
    pictures = only(
        examine(data, tmp_path / "run", augment__decode_size=64, model__image_size=64), "pictures"
    )
    assert pictures["mark"] == "note"
    assert "100% of them are enlarged" in pictures["found"]


def test_validation_that_would_stop_the_run(data, tmp_path, examine):
    good = examine(data, tmp_path / "run", validation__data=str(data), validation__every=64)
    assert [one["mark"] for one in good.found["validation"]] == ["note", "ok"]
    none = examine(
        data,
        tmp_path / "run",
        validation={"data": str(data), "where": {"colour": "pink"}, "every": 64},
    )
    assert none.found["validation"][-1]["mark"] == "problem"
    gone = examine(data, tmp_path / "run", validation__data=str(tmp_path / "nowhere"))
    assert only(gone, "validation")["mark"] == "problem"
    assert "nowhere" in only(gone, "validation")["found"]


# --- fit ---


def test_lanes_that_do_not_fit_the_processes(data, tmp_path, examine):
    lanes = only(examine(data, tmp_path / "run", processes=3), "lanes")
    assert lanes["mark"] == "problem"
    assert "by 1, 2, 4" in lanes["found"]
    assert lanes["advice"].startswith("lanes=6 ")
    assert only(examine(data, tmp_path / "run", processes=2), "lanes")["mark"] == "ok"


def test_lengths_that_are_odd(data, tmp_path, examine):
    few = examine(data, tmp_path / "run", samples=32)
    assert "not every sample is seen" in only(few, "length")["found"]
    many = examine(data, tmp_path / "run", samples=48 * 200)
    assert only(many, "length")["mark"] == "note"
    large = examine(data, tmp_path / "run", batch_size=64)
    assert "more than the 48 samples" in only(large, "batch")["found"]


def test_sizes_and_options_that_are_refused(data, tmp_path, examine):
    stages = examine(
        data,
        tmp_path / "run",
        model__image={"name": "timm:vit_tiny_patch16_224", "options": dict(TINY_VIT)},
        stages=[{"until": 0.5, "image_size": 24}],
    )
    assert only(stages, "model")["mark"] == "problem"
    assert "24 px" in only(stages, "model")["found"]
    both = examine(
        data,
        tmp_path / "run",
        augment={"options": {"spin": 3}},
        optimizer={"name": "adamw", "options": {"beta": 0.9}},
    )
    assert {one["what"] for one in both.problems} == {"augment", "model"}


@pytest.mark.parametrize(
    ("changes", "what", "says"),
    [
        ({"trackers": ["wandb"]}, "trackers", "wandb needs a package"),
        ({"shard_weights": True, "optimizer": {"name": "muon"}}, "shares", "muon does not work"),
        ({"shard_weights": True, "precision": "fp16"}, "shares", "fp16 does not go with it"),
        ({"optimizer": {"warmup": "99 epochs"}}, "schedule", r"warmup 297 steps are more"),
        ({"validation": {"best": "top9"}}, "validation", "no figure 'top9' is measured"),
        ({"bundle": "{file}/bundle"}, "bundle", "file cannot be written to"),
        ({"bundle": "{file}"}, "bundle", "file is there and is no bundle"),
    ],
)
def test_what_a_run_refuses_at_once_would_fail(
    changes, what, says, data, tmp_path, examine, monkeypatch
):
    monkeypatch.setattr(telemetry, "find_spec", lambda _: None)
    (tmp_path / "file").write_text("mine")
    if "bundle" in changes:
        changes = {"bundle": changes["bundle"].format(file=tmp_path / "file")}
    result = examine(data, tmp_path / "run", processes=2, **changes)
    assert result.code == doctor.WOULD_FAIL
    assert says in result.problems[0]["found"]
    assert [one["what"] for one in result.problems] == [what]


def test_one_process_shares_nothing(data, tmp_path, examine):
    result = examine(data, tmp_path / "run", shard_weights=True, optimizer={"name": "muon"})
    assert result.code == 0, result.problems


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory) -> Path:
    """A run that got as far as two checkpoints."""
    out = tmp_path_factory.mktemp("begun") / "run"
    pretrain.run(build(PretrainConfig, tiny_pretrain(data, out), origin="test"))
    return out


def test_a_folder_that_holds_this_run(begun, data, examine):
    before = everything_in(begun)
    held = only(examine(data, begun), "out")
    assert held["mark"] == "note"
    assert "--resume" in held["advice"]
    resumed = examine(data, begun, timed=True, resume=True)
    assert only(resumed, "out")["mark"] == "ok"
    assert only(resumed, "forecast")["found"] == "nothing is left to do"
    assert everything_in(begun) == before


def test_a_folder_that_holds_another_run(begun, data, tmp_path, examine):
    for resume in (False, True):
        changed = only(examine(data, begun, batch_size=8, resume=resume), "out")
        assert changed["mark"] == "problem"
        assert "batch_size: 16 -> 8" in changed["found"]
    write_pairs(tmp_path / "two", hand="two")
    values = yaml.safe_load((begun / "config.yaml").read_text())
    assert values["data"] == str(data)
    moved = tmp_path / "moved"
    data_before = everything_in(data)
    moved.mkdir()
    for path, content in everything_in(begun).items():
        (moved / path).parent.mkdir(parents=True, exist_ok=True)
        (moved / path).write_bytes(content)
    (moved / "config.yaml").write_text(
        yaml.safe_dump({**values, "data": str(tmp_path / "two"), "out": str(moved)})
    )
    other = examine(tmp_path / "two", moved, resume=True)
    assert "not the data this run was started with" in only(other, "model")["found"]
    assert everything_in(data) == data_before


def test_folders_that_cannot_be_used(data, tmp_path, examine):
    (tmp_path / "file").write_text("")
    assert only(examine(data, tmp_path / "file"), "out")["mark"] == "problem"
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        held = only(examine(data, tmp_path / "run"), "out")
        assert "another run is at work" in held["found"]
    assert only(examine(data, tmp_path / "run"), "out")["mark"] == "ok"


def test_a_disk_that_would_be_full(data, tmp_path, examine, monkeypatch):
    usual = only(examine(data, tmp_path / "run"), "disk")
    assert usual["mark"] == "ok"
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    full = only(examine(data, tmp_path / "run"), "disk")
    assert full["mark"] == "problem"
    assert "1.0 MB that are free" in full["found"]
    one = only(examine(data, tmp_path / "run", keep=10**6), "disk")
    assert "1,000,001" in one["found"].replace("1000001", "1,000,001")


def test_the_size_of_a_checkpoint_is_that_of_a_real_one(begun, data, tmp_path, examine):
    written = max(
        sum(path.stat().st_size for path in folder.iterdir())
        for folder in (begun / "checkpoints").iterdir()
    )
    disk = only(examine(data, tmp_path / "run", timed=True), "disk")
    told = float(disk["found"].partition("a checkpoint has ")[2].partition(" MB")[0]) * 1e6
    assert told == pytest.approx(written, rel=0.1)


def test_memory_that_is_not_there(data, tmp_path, examine, monkeypatch):
    monkeypatch.setattr("pipelines.checkup.memory.free_memory", lambda _: 100_000_000)
    memory = only(examine(data, tmp_path / "run"), "memory")
    assert memory["mark"] == "problem"
    assert "of the 100 MB" in memory["found"]


def test_a_step_is_tried_in_pieces_as_the_run_takes_it(data, tmp_path, examine, monkeypatch):
    sizes: list[tuple[int, int]] = []

    def seen(training, batch):
        sizes.append((len(batch), training.pieces))
        return pretrain.step(training, batch)

    monkeypatch.setattr(speed, "step", seen)
    result = examine(data, tmp_path / "run", timed=True, processes=2, micro_batch_size=2)
    assert result.code == 0, result.problems
    # Eight rows each: four pieces of two, and no fewer than two where a small batch is tried.
    assert sizes[0] == (4, 2)
    assert all(pieces == size // 2 for size, pieces in sizes)
    sizes.clear()
    examine(data, tmp_path / "run", timed=True, processes=2, micro_batch_size=8)
    assert {pieces for _, pieces in sizes} == {1}


def test_activations_are_those_of_a_piece(data, tmp_path, examine, monkeypatch):
    """Only what a forward pass keeps is counted here: a fixed number of bytes a row."""
    monkeypatch.setattr(speed._Steps, "_held", lambda _self, _stage, size: 1000 * size)
    monkeypatch.setattr(speed, "peak_of", lambda _: nullcontext(Amount()))
    monkeypatch.setattr(speed, "_GROWTH", 1)  # no batch but the smallest is tried

    def found(**changes: Any) -> int:
        result = examine(data, tmp_path / "run", timed=True, **changes)
        return result.numbers["rates"]["activations"]

    assert found() == 1000 * (16 - 2)
    assert found(micro_batch_size=8) == 1000 * (8 - 2)
    assert found(micro_batch_size=8, processes=2) == 1000 * (8 - 2)


def test_pieces_that_do_not_fit_the_processes(data, tmp_path, examine):
    result = examine(data, tmp_path / "run", processes=4, micro_batch_size=8)
    assert only(result, "pieces")["mark"] == "problem"
    assert "8 on 4 processes does not divide batch_size 16" in only(result, "pieces")["found"]
    assert "pieces" not in examine(data, tmp_path / "run", processes=2, micro_batch_size=8).found


def test_batch_normalisation_in_pieces_is_told(data, tmp_path, examine):
    note = only(examine(data, tmp_path / "run", processes=2, micro_batch_size=4), "pieces")
    assert note["mark"] == "note"
    assert "batch normalisation" in note["found"]
    assert "each piece of 4 rows" in note["found"]
    assert "gradient_checkpointing" in note["advice"]


def test_shares_of_the_weights_are_counted_as_such(data, tmp_path, examine, monkeypatch):
    held: list[Weights] = []
    monkeypatch.setattr(doctor, "check_memory", lambda _, memory, **__: held.append(memory.weights))
    examine(data, tmp_path / "run", processes=2)
    examine(data, tmp_path / "run", processes=2, shard_weights=True)
    examine(data, tmp_path / "run", processes=2, shard_weights=True, micro_batch_size=4)
    whole, shared, pieces = held
    assert shared.parameters == -(-whole.parameters // 2)
    assert shared.gradients == -(-whole.gradients // 2)
    assert pieces.gradients == whole.gradients, "whole ones, until they are exchanged"


def test_a_step_without_finite_gradients(data, tmp_path, examine, monkeypatch):
    def without(training, batch):
        return {**pretrain.step(training, batch), "finite": 0.0}

    monkeypatch.setattr(speed, "step", without)
    result = examine(data, tmp_path / "run", timed=True)
    assert "no finite gradient" in only(result, "step")["found"]


@pytest.mark.parametrize(
    ("scale", "loss", "code"), [(4.0, 1.0, 0), (4.0, np.nan, 3), (1.0, 1.0, 3)]
)
def test_a_scale_of_fp16_that_can_fall_is_no_problem(
    scale, loss, code, data, tmp_path, examine, monkeypatch
):
    def overflows(training, batch):
        measured = {**pretrain.step(training, batch), "finite": 0.0, "loss": loss}
        monkeypatch.setattr(training.scaler, "get_scale", lambda: scale)
        return measured

    monkeypatch.setattr(speed, "step", overflows)
    result = examine(data, tmp_path / "run", timed=True, precision="fp16")
    assert result.code == code, result.problems


def test_a_step_that_fails_is_a_line(data, tmp_path, examine, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr(speed, "step", fails)
    result = examine(data, tmp_path / "run", timed=True)
    assert only(result, "step")["found"] == "OutOfMemoryError: out of memory"


# --- speed ---


LONE = Machine(cores=8, threads=1, processes=1, on_cpu=True, load=0.0)


def test_without_workers_loading_and_the_step_take_turns():
    pace = pace_of(STAGE, rates(), LONE, workers=0)
    assert pace.whole_s == pytest.approx(0.012)
    assert pace.waits == pytest.approx(1 / 3)
    assert pace.bound == "the step"


def test_with_workers_the_slower_one_bounds():
    quick = pace_of(STAGE, rates(ahead_s=0.002), LONE, workers=2)
    assert (quick.bound, quick.waits) == ("the step", 0.0)
    assert quick.whole_s == pytest.approx(0.008)
    starved = pace_of(STAGE, rates(ahead_s=0.016), LONE, workers=1)
    assert (starved.bound, starved.whole_s) == ("loading", 0.016)
    assert starved.waits == pytest.approx(0.5)


def test_cores_are_shared():
    crowded = replace(LONE, cores=2, threads=2)
    pace = pace_of(STAGE, rates(), crowded, workers=1)
    assert pace.bound == "the cores"
    assert pace.whole_s == pytest.approx((0.004 + 2 * 0.008) / 2)
    many = pace_of(STAGE, rates(), replace(LONE, cores=4, processes=8), workers=1)
    assert many.whole_s == pytest.approx((0.004 + 0.008) / 0.5)
    on_gpu = pace_of(STAGE, rates(), replace(crowded, threads=1, on_cpu=False), workers=1)
    assert on_gpu.bound == "the step"


def test_what_bounds_is_told_with_what_to_do(data, tmp_path, examine, monkeypatch):
    slow = Stage(32, 0, 12, augment_s=0.0, compute_s=0.0001)
    monkeypatch.setattr(doctor, "measure", lambda *_, **__: rates(stages=(slow,)))
    alone = Machine(cores=8, threads=1, processes=1, on_cpu=True, load=0.0)
    monkeypatch.setattr(doctor, "machine_of", lambda **_: alone)
    bound = only(examine(data, tmp_path / "run", workers=1, augment__decode_size=8), "bound")
    assert bound["mark"] == "note"
    assert bound["found"].startswith("loading: 250 samples/s")
    assert "workers=4" in bound["advice"]
    assert "resize=10" in bound["advice"]
    crowded = replace(alone, cores=2, threads=2)
    monkeypatch.setattr(doctor, "machine_of", lambda **_: crowded)
    cores = only(examine(data, tmp_path / "run", workers=1), "cores")
    assert cores["mark"] == "note"
    assert cores["advice"].startswith("OMP_NUM_THREADS=1: ")


def test_a_machine_that_is_busy_is_told(data, tmp_path, examine, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0, 0.0, 0.0))
    assert "100.0 of" in only(examine(data, tmp_path / "run"), "busy")["found"]


def test_measuring_reads_no_sample_that_damage_would_stop(data, tmp_path, examine):
    shards = copy_of(data, tmp_path / "broken")
    shards[0].unlink()
    result = examine(tmp_path / "broken", tmp_path / "run", timed=True, strict=True)
    assert only(result, "samples")["mark"] == "problem"
    assert result.numbers["rates"]["decode_s"] > 0


def test_threads_that_get_in_each_others_way_are_told(data, tmp_path, examine, monkeypatch):
    monkeypatch.setattr(doctor, "measure", lambda *_, **__: rates(one_thread=25.0))
    threads = only(examine(data, tmp_path / "run"), "threads")
    assert (threads["mark"], threads["advice"]) == ("note", "OMP_NUM_THREADS=1")
    assert "25.0 times as fast" in threads["found"]


def test_one_thread_is_tried_and_the_others_are_given_back(data, tmp_path, examine, monkeypatch):
    counts: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    result = examine(data, tmp_path / "run", timed=True)
    assert counts == [1, 2]
    assert result.numbers["rates"]["one_thread"] != 1.0


# --- parts ---


def test_every_shard_is_looked_into_first_and_last(data):
    manifest = Manifest.open(data)
    found = look(manifest, CaptionRule(), shards=3, seconds=60.0)
    assert found.shards == [0, 2, 3]
    rows = [one.row for one in found.seen]
    assert len(rows) == len({*rows}) == 36
    assert rows[:6] == [0, 24, 36, 11, 35, 47]
    assert {one.side for one in found.seen} == {32}
    cut_short = look(manifest, CaptionRule(), shards=4, seconds=0.0)
    assert cut_short.count == 1


def test_a_shard_of_one_sample(tmp_path):
    for number in range(3):
        write_shard(tmp_path / "data" / f"{number}.tar", [pair(f"s{number}")])
    found = look(Manifest.open(tmp_path / "data"), CaptionRule(), shards=9, seconds=60.0)
    assert [one.key for one in found.seen] == ["s0", "s1", "s2"]


def test_a_vocabulary_is_trained_on_runs_of_samples(data, monkeypatch):
    manifest = Manifest.open(data)
    assert sampled(manifest) is manifest
    monkeypatch.setattr("pipelines.checkup.data._VOCABULARY_SAMPLES", 12)
    few = sampled(manifest)
    assert len(few) == 12
    assert np.bincount(few.shard_numbers).tolist() == [3, 3, 3, 3]


def test_a_vocabulary_of_a_part_is_said_to_be_one(data, tmp_path, examine, monkeypatch):
    monkeypatch.setattr("pipelines.checkup.data._VOCABULARY_SAMPLES", 12)
    vocabulary = only(examine(data, tmp_path / "run"), "vocabulary")
    assert vocabulary["found"].startswith("trained on 12 samples")


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (size(999), "999 bytes"),
        (size(1_500_000), "1.5 MB"),
        (size(123e9), "123 GB"),
        (size(5e15), "5000 TB"),
        (duration(0.5), "0.5 s"),
        (duration(119), "119 s"),
        (duration(600), "10 min"),
        (duration(10_000), "2.8 h"),
        (duration(1e6), "12 days"),
        (percent(0), "0%"),
        (percent(0.001), "0.1%"),
        (percent(0.5), "50%"),
        (rate(0.001), "1,000"),
        (rate(2), "0.5"),
        (several(1, "process"), "1 process"),
        (several(2000, "process"), "2,000 processes"),
    ],
)
def test_numbers_are_written_for_people(shown, wanted):
    assert shown == wanted
