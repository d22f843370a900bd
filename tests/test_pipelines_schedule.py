"""How long a run is and how fast it learns, in any unit; stages of smaller pictures or texts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from pairs_corpus import TINY_VIT, tiny_pretrain

from align.tokenizer import Tokenizer
from pipelines import pretrain, run_folder, step
from pipelines.config import ConfigError, build, to_yaml
from pipelines.schemas import PretrainConfig
from pipelines.schemas.values import samples_of, steps_of
from pipelines.step import learning_rate, refuse_long_schedule
from pipelines.training import Training, make_model
from pipelines.training import build as build_training

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCH = 48


def config(values: dict[str, Any]) -> PretrainConfig:
    return build(PretrainConfig, values, origin="test")


def given_as(**changes: Any) -> PretrainConfig:
    return config(tiny_pretrain(Path("data"), Path("run"), **changes))


class Plan(Training):
    """A run of which nothing is there but its plan."""

    def __init__(self, config: PretrainConfig, at: int = 0) -> None:
        self.config, self.step = config, at
        self.loader = SimpleNamespace(num_samples=EPOCH)  # pyright: ignore


def rates(config: PretrainConfig, start: int = 0) -> list[float]:
    steps = Plan(config).steps
    return [learning_rate(Plan(config, at)) for at in range(start, steps)]


# --- spans ---


@pytest.mark.parametrize(
    ("given_", "means", "steps"),
    [
        (960, 960, 60),
        ("960", 960, 60),
        ("960 samples", 960, 60),
        ("1_000", 1000, 62),
        ("1e3", 1000, 62),
        ("1e+3 samples", 1000, 62),
        ("60 steps", "60 steps", 60),
        ("1 step", "1 steps", 1),
        ("60steps", "60 steps", 60),
        ("20 epochs", "20 epochs", 60),
        ("0.5 epochs", "0.5 epochs", 1),
        ("1 epoch", "1 epochs", 3),
    ],
)
def test_a_length_has_one_meaning_and_survives_its_file(given_, means, steps):
    wanted = given_as(samples=given_)
    assert wanted.samples == means
    assert type(wanted.samples) is type(means)
    assert Plan(wanted).steps == steps
    assert config(yaml.safe_load(to_yaml(wanted))) == wanted


@pytest.mark.parametrize("given_", ["30 minutes", "0.5 minutes", "1 minute"])
def test_a_cadence_may_be_in_minutes_and_a_length_may_not(given_):
    number = float(given_.split()[0])
    wanted = given_as(save_every=given_, validation__every=given_)
    assert wanted.save_every == f"{number:g} minutes" == wanted.validation.every
    assert config(yaml.safe_load(to_yaml(wanted))) == wanted
    with pytest.raises(ConfigError, match=r"samples: .*a unit \(samples, steps, epochs\)"):
        given_as(samples=given_)


@pytest.mark.parametrize(
    "bad", ["", "many", "-3", "0", 0, -1, "3 hours", "1.5 steps", 2.5, "steps", "1e30", "nan", None]
)
@pytest.mark.parametrize("key", ["samples", "save_every"])
def test_what_is_no_span_is_one_line_that_names_the_key(key, bad):
    with pytest.raises(ConfigError, match=rf"{key}: .*(is no span|come whole)") as caught:
        given_as(**{key: bad})
    assert len(str(caught.value).splitlines()) == 2  # of which one counts the errors


@given(number=st.integers(1, 10**6), batch=st.integers(1, 512), epoch=st.integers(1, 10**6))
def test_the_units_of_a_span_agree(number, batch, epoch):
    size = {"batch_size": batch, "epoch": epoch}
    assert steps_of(f"{number} steps", **size) == number == steps_of(number * batch, **size)
    assert samples_of(f"{number} epochs", **size) == number * epoch
    assert steps_of(f"{number} epochs", **size) == steps_of(number * epoch, **size)
    assert steps_of(1, **size) == 1


# --- schedules ---

SAME = [
    {"samples": 960, "optimizer__warmup": 96, "optimizer__cooldown": 240},
    {"samples": "60 steps", "optimizer__warmup": "6 steps", "optimizer__cooldown": "15 steps"},
    {"samples": "20 epochs", "optimizer__warmup": "2 epochs", "optimizer__cooldown": "5 epochs"},
    {"samples": "20 epochs", "optimizer__warmup": 0.1, "optimizer__cooldown": 0.25},
]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_schedule_is_the_same_in_samples_steps_epochs_and_shares(schedule):
    first, *others = [rates(given_as(**one, optimizer__schedule=schedule)) for one in SAME]
    assert len(first) == 60
    assert all(other == first for other in others)
    assert first[:6] == pytest.approx([2e-3 * (at + 1) / 6 for at in range(6)])
    assert max(first) == first[6] == 2e-3
    behind = first[6:]
    assert behind == sorted(behind, reverse=True)
    assert (behind[:40] == [2e-3] * 40) == (schedule == "constant")
    assert first[-1] == pytest.approx(2e-3 / 15) if schedule == "constant" else first[-1] < 1e-5


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_resumed_run_goes_on_with_the_rate_it_would_have_had(schedule):
    wanted = given_as(**SAME[1], optimizer__schedule=schedule, optimizer__floor=0.1)
    assert rates(wanted)[23:] == rates(wanted, start=23)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"warmup": "61 steps"}, "optimizer.warmup: warmup 61 steps are more than the run has (60"),
        ({"warmup": 9600}, "warmup 600 steps"),
        (
            {"schedule": "constant", "warmup": 0.5, "cooldown": "31 steps"},
            "optimizer.cooldown: warmup 30 and cooldown 31",
        ),
        (
            {"schedule": "constant", "warmup": "40 steps", "cooldown": "21 steps"},
            "optimizer.warmup: warmup 40 and cooldown 21",
        ),
    ],
)
def test_a_warm_up_and_cool_down_longer_than_the_run_are_refused(changes, says):
    wanted = given_as(samples=960, **{f"optimizer__{key}": value for key, value in changes.items()})
    with pytest.raises(ConfigError) as caught:
        refuse_long_schedule(Plan(wanted))
    assert says in str(caught.value)
    fits = {**changes, "schedule": "cosine", "warmup": 1.0 - 1e-9}  # it has no cool-down
    wanted = given_as(samples=960, **{f"optimizer__{key}": value for key, value in fits.items()})
    refuse_long_schedule(Plan(wanted))


def test_a_run_whose_warm_up_is_too_long_never_begins(data, tmp_path):
    values = tiny_pretrain(data, tmp_path / "run", optimizer__warmup="5 epochs")
    with pytest.raises(ConfigError, match=r"warmup 15 steps are more than the run has \(12\)"):
        pretrain.run(config(values))
    assert not (tmp_path / "run" / "config.yaml").exists()


# --- stages ---


def test_texts_are_cut_shorter_and_keep_their_end():
    tokenizer = Tokenizer.clip(context_length=12)
    texts = ["a dog", "a b c d e f g h i j", "a b c d e f g h i j k", "a " * 60]
    whole, short = tokenizer(texts), tokenizer(texts, context_length=5)
    assert (whole.ids.shape[1], short.ids.shape[1]) == (12, 5)
    assert torch.equal(short.ids[:, :4], whole.ids[:, :4])
    for batch in (whole, short):
        ends = batch.mask.sum(dim=1) - 1
        assert (batch.ids.gather(1, ends[:, None]) == tokenizer.end_id).all()
        assert batch.truncated == 2, "what the model's own context cuts, and nothing else"
    for length in (2, 13):
        with pytest.raises(ValueError, match=rf"at most 12 tokens .* not to {length}"):
            tokenizer(texts, context_length=length)


def test_a_stage_is_small_pictures_short_texts_or_both(data, tmp_path, monkeypatch):
    seen: list[tuple[int, int]] = []
    original = step.tokenised

    def tokenised(training, batch):
        pairs, cut = original(training, batch)
        seen.append((pairs.images.shape[-1], pairs.ids.shape[1]))
        return pairs, cut

    monkeypatch.setattr(step, "tokenised", tokenised)
    stages: list[dict[str, Any]] = [
        {"until": 0.25, "image_size": 16, "context_length": 3},
        {"until": 0.5, "context_length": 3},
        {"until": 0.75, "image_size": 16},
    ]
    values = tiny_pretrain(
        data, tmp_path / "run", samples=128, captions=["a {caption}"], stages=stages
    )
    assert pretrain.run(config(values)) == 0
    assert [size for size, _ in seen] == [16, 16, 32, 32, 16, 16, 32, 32]
    assert [length == 3 for _, length in seen] == [True] * 4 + [False] * 4
    lines = run_folder.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["cut_captions"] == 0, "a stage cuts on purpose"
    again = config(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert again == config(values)


def test_a_stage_that_cannot_be_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"stages\.0: a stage needs an image_size or a context"):
        given_as(stages=[{"until": 0.5}])
    for end in (0, 1):
        with pytest.raises(ConfigError, match=r"stages\.0\.until"):
            given_as(stages=[{"until": end, "image_size": 16}])
    for length in (2, 17):
        wanted = config(
            tiny_pretrain(data, tmp_path / "run", stages=[{"until": 0.5, "context_length": length}])
        )
        with pytest.raises(ConfigError, match=rf"stages\.0\.context_length: {length} .*from 3"):
            build_training(wanted, Accelerator(cpu=True))


PATCHES = {
    "timm": ("timm:vit_tiny_patch16_224", {**TINY_VIT, "patch_size": 8}, "patch_drop_rate"),
    "open_clip": (
        "open_clip:ViT-B-32",
        {"layers": 1, "width": 64, "patch_size": 8},
        "patch_dropout",
    ),
}


@pytest.mark.parametrize("library", PATCHES)
def test_patches_are_left_out_in_training_alone(library):
    name, options, key = PATCHES[library]
    wanted = given_as(
        model__image={"name": name, "options": {**options, key: 0.5}}, model__image_size=32
    )
    texts = ["a dot", "a ring"]
    tokenizer = Tokenizer.train(texts, vocabulary_size=50, context_length=16)
    model = make_model(wanted.model, tokenizer)
    counts: list[int] = []
    for block in model.image.blocks():
        block.register_forward_hook(lambda *call: counts.append(call[2].shape[1]))
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        model.eval().image(pixels)
        model.train().image(pixels)
    whole, some = counts
    assert (whole, some) == (17, 9), "a class token, and 16 patches or half of them"
