import json
import math
import sys

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from benchmarks import train, train_data, train_overhead, train_sides
from pipelines.config import build
from pipelines.schemas import PretrainConfig
from shards.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def pairs():
    return train_data.emoji_pairs()


@pytest.fixture(scope="module")
def task(place, pairs):
    """The tiny model on a hundred emoji."""
    data = place / "data"
    data.mkdir()
    samples = [("webp", *pair) for pair in zip(*pairs, strict=True)][:100]
    train_data.write_shards(data, samples)
    return train_sides.Task(
        model=train_sides.write_model("tiny", place),
        data=data,
        batch_size=8,
        precision="fp32",
        threads=1,
        workers=0,
        log_every=2,
        device="cpu",
    )


def test_captions_are_as_long_as_captions_are(pairs):
    tokenizer = SimpleTokenizer()
    lengths = [len(tokenizer.encode(text)) + 2 for text in pairs[1]]
    assert 11 < sum(lengths) / len(lengths) < 13
    cut = sum(length >= train_data.CONTEXT for length in lengths) / len(lengths)
    assert cut == pytest.approx(1 / 40, abs=0.005)
    assert min(lengths) < 8


def test_a_caption_names_its_picture_first_and_then_what_follows():
    names, keywords = ["red fox", "owl"], [["wild beast"], ["bird"]]
    long = train_data.captions(names * 40, keywords * 40, len)
    assert all(
        text.startswith(name.split()[0]) for text, name in zip(long, names * 40, strict=True)
    )
    longest = max(long, key=len)
    assert "red fox wild beast owl red fox" in longest or "owl bird red fox owl" in longest


def test_shards_hold_every_pair_once(task, pairs):
    manifest = Manifest.open(task.data)
    assert len(manifest) == 100
    assert len(manifest.shards) == train_data.SHARDS


def test_both_trainers_are_told_the_same(task, place, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["open_clip_train"])
    from open_clip_train.params import parse_args

    theirs = parse_args(train_sides.peer_arguments(task, place / "logs" / "name"))
    wanted = train_sides.our_config(task, place / "out")
    ours = build(PretrainConfig, wanted, origin="the test")
    assert theirs.batch_size == ours.batch_size
    assert theirs.workers == ours.workers
    assert theirs.log_every_n_steps == ours.log_every
    assert (theirs.lr, theirs.wd) == (ours.optimizer.learning_rate, ours.optimizer.weight_decay)
    assert [theirs.beta1, theirs.beta2] == ours.optimizer.options["betas"]
    assert theirs.eps == ours.optimizer.options["eps"]
    assert theirs.precision == ours.precision
    assert theirs.model == ours.model.image.name.removeprefix("open_clip:")
    bf16 = task.with_precision("bf16")
    assert parse_args(train_sides.peer_arguments(bf16, place)).precision == "amp_bf16"


def test_the_model_is_openclips(place):
    folder = train_sides.write_model("ViT-B-32", place)
    told = json.loads((folder / "open_clip_config.json").read_text())
    assert told["model_cfg"] == open_clip.get_model_config("ViT-B-32")
    with pytest.raises(SystemExit, match="neither tiny nor one of"):
        train_sides.write_model("no such", place)


def test_what_was_done_is_read_from_both_logs():
    ours = b'ples": 3}\n{"step": 10, "samples": 640}\n{"step": 10, "recall": 1}\n{"step": 20, "sa'
    assert train_sides.samples_in_metrics(ours) == 640
    assert train_sides.samples_in_metrics(b"") == 0
    theirs = (
        b"2026-01-01 | INFO | Train Epoch: 0 [      64/99999 (0%)] Data (t): 0.1\n"
        b"2026-01-01 | INFO | Train Epoch: 0 [     704/99999 (0%)] Data (t): 0.1\n"
        b"2026-01-01 | INFO | Train Epoch: 0 [    1344/99"
    )
    assert train_sides.samples_in_log(theirs) == 704
    assert train_sides.samples_in_log(b"Start epoch 0\n") == 0


def test_the_better_precision_of_each_side_counts():
    found = {
        "ours_fp32": [4.0, 6.0, 9.0],
        "peer_fp32": [2.0, 3.0, 3.0],
        "ours_bf16": [1.0],
        "peer_bf16": [2.0, 4.0, 4.0],
    }
    ratios = train.ratios(found)
    assert ratios["ratio"] == 2.0  # ours in fp32 over theirs in bf16, round by round
    assert ratios["fp32_ratio"] == 2.0
    assert ratios["bf16_ratio"] == 1 / 4
    assert train.dropped({name: [rates[-1]] for name, rates in found.items()}) == {
        "ours_bf16",
        "peer_fp32",
    }


def test_our_loop_is_timed_beside_its_bare_step(task, place, capsys):
    found = train_overhead.overhead(task, place / "overhead", rounds=2, steps=2)
    assert capsys.readouterr().out.count("loss") >= 3  # a line for each block of the loop
    assert found["bare_samples_per_s"] > 0
    assert found["save_s"] > 0
    assert -0.9 < found["loop_overhead"] < 9
    assert torch.get_num_threads() == 1


def test_overhead_is_that_of_the_loop_and_of_checkpoints_at_their_cadence():
    found = train_overhead.figures(
        [1.0, 3.0, 1.0, 1.0], [2.2, 3.0, 1.2], [3.0, 2.0, 9.0], samples=500
    )
    assert found["loop_overhead"] == pytest.approx(0.2)
    assert found["bare_samples_per_s"] == 500
    between = PretrainConfig.model_fields["save_every"].default / 500  # seconds
    assert found["save_overhead"] == pytest.approx(3 / between)
    assert math.isclose(found["overhead"], found["loop_overhead"] + found["save_overhead"])
