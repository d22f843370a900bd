"""Evaluation in training: by all processes, checked at the start, without a trace in the run."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs_corpus import tiny_model, tiny_pretrain, write_pairs
from ranks import run_ranks
from safetensors.torch import load_file

import align
from align.checkpoint import checkpoints
from pipelines import pretrain, run_folder, validation
from pipelines.config import ConfigError, RunError, build
from pipelines.evaluate import evaluate
from pipelines.pairs import EmbeddedPairs, embed_pairs, encode_shared
from pipelines.schemas import EvaluateConfig, PretrainConfig
from pipelines.together import ALONE, Share
from shards.damage import TooMuchDamageError
from shards.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_thread")


def config(values: dict[str, Any]) -> PretrainConfig:
    return build(PretrainConfig, values, origin="test")


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Path:
    """Held-out pairs, larger pictures of the same things."""
    folder = tmp_path_factory.mktemp("held") / "pairs"
    write_pairs(folder, shards=5, hand="two")
    return folder


def tasks(held: Path) -> dict[str, Any]:
    return {
        "shapes": {
            "task": "zero_shot",
            "data": str(held),
            "label": "shape",
            "templates": ["a {}", "{c}"],
        },
        "red or blue": {
            "task": "retrieval",
            "data": str(held),
            "where": {"colour": ["red", "blue"]},
        },
    }


def with_validation(data: Path, out: Path, held: Path, **changes: Any) -> dict[str, Any]:
    given = {"data": str(held), "tasks": tasks(held), "every": 48}
    return tiny_pretrain(data, out, samples=96, validation=given, **changes)


def looks(out: Path) -> list[dict[str, Any]]:
    lines = run_folder.read_metrics(out / "metrics.jsonl")
    return [line for line in lines if "image_to_text_recall@1" in line]


@pytest.fixture(scope="module")
def run(data, held, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert pretrain.run(config(with_validation(data, out, held))) == 0
    return out


def evaluated(bundle: Path, held: Path) -> dict[str, tuple[float, float, float]]:
    """All figures by a pass of its own over the saved model."""
    asked = {"validation": {"task": "retrieval", "data": str(held)}, **tasks(held)}
    values = {"model": str(bundle), "tasks": asked}
    found = evaluate(align.load(bundle), build(EvaluateConfig, values, origin="test"))
    return {
        figure.name if title == "validation" else f"{title}/{figure.name}": (
            figure.value,
            figure.low,
            figure.high,
        )
        for title, one in found.items()
        for figure in one.report.figures
    }


def logged(line: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    names = [name.removesuffix("_low") for name in line if name.endswith("_low")]
    return {name: (line[name], line[f"{name}_low"], line[f"{name}_high"]) for name in names}


# --- what is measured ---


def test_every_figure_is_that_of_the_saved_model_with_its_interval(run, held, tmp_path):
    shutil.copytree(run / "bundle", tmp_path / "bundle")
    first, last = looks(run)
    assert (first["step"], last["step"]) == (3, 6)
    assert (first["samples"], last["samples"]) == (48, 96)
    found = logged(last)
    assert found == evaluated(tmp_path / "bundle", held)
    assert logged(first) != found
    assert {"shapes/top1", "red or blue/image_to_text_median_rank"} < set(found)
    assert all(low <= value <= high for value, low, high in found.values())


def test_all_reports_are_kept_with_the_bundle(run):
    rows = run_folder.read_json(run / "bundle" / "results.json")["results"]
    assert {row["task"] for row in rows} == {"validation", "shapes", "red or blue"}
    by_name = {(row["task"], row["figure"]): row for row in rows}
    assert by_name["shapes", "top1"]["value"] == looks(run)[-1]["shapes/top1"]
    assert by_name["red or blue", "image_to_text_recall@1"]["count"] == 16


def test_the_names_that_are_known_at_the_start_are_those_that_come(run):
    known = {
        *validation.FIGURES["retrieval"],
        *(f"shapes/{name}" for name in validation.FIGURES["zero_shot"]),
        *(f"red or blue/{name}" for name in validation.FIGURES["retrieval"]),
    }
    assert set(logged(looks(run)[-1])) == known


def test_training_does_not_notice_that_it_is_watched(run, data, tmp_path):
    values = tiny_pretrain(data, tmp_path / "run", samples=96)  # with dropout and batch statistics
    assert pretrain.run(config(values)) == 0
    ours, theirs = (
        [
            (line["loss"], line["gradient_norm"])
            for line in run_folder.read_metrics(out / "metrics.jsonl")
            if "loss" in line
        ]
        for out in (run, tmp_path / "run")
    )
    assert ours == theirs
    for name in ("objective", "average"):
        one, other = (
            load_file(checkpoints(out)[-1] / f"{name}.safetensors")
            for out in (run, tmp_path / "run")
        )
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_tasks_on_the_same_rows_share_their_embeddings_at_the_sizes_of_the_stage(
    data, held, tmp_path, monkeypatch
):
    calls: list[tuple[Any, ...]] = []

    def embed(model: Any, manifest: Any, **options: Any) -> EmbeddedPairs:
        sizes = (options["image_size"], options["context_length"])
        calls.append((*sizes, sorted(options["where"])))
        return embed_pairs(model, manifest, **options)

    monkeypatch.setattr(validation, "embed_pairs", embed)
    values = with_validation(
        data,
        tmp_path / "run",
        held,
        stages=[{"until": 0.6, "image_size": 16, "context_length": 3}],
        validation__every="0.000001 minutes",  # over after every step
    )
    values["samples"] = 32
    assert pretrain.run(config(values)) == 0
    assert calls == [(16, 3, []), (16, 3, ["colour"]), (32, 16, []), (32, 16, ["colour"])]
    assert [line["step"] for line in looks(tmp_path / "run")] == [1, 2]


def test_a_step_is_saved_before_it_is_measured(data, held, tmp_path, monkeypatch):
    def dies(_self: validation.Validation) -> None:
        raise ArithmeticError("the evaluation died")

    monkeypatch.setattr(validation.Validation, "run", dies)
    values = tiny_pretrain(data, tmp_path / "run", samples=96, save_every="100 steps")
    values["validation"] = {"data": str(held), "every": "2 steps"}
    with pytest.raises(ArithmeticError, match="the evaluation died"):
        pretrain.run(config(values))
    assert [one.name for one in checkpoints(tmp_path / "run")] == ["step_000000002"]


# --- what cannot be measured ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"best": "top1"},
            r"no figure 'top1' is measured; known: image_to_text_recall@1, .*shapes/",
        ),
        ({"data": None, "tasks": {}, "best": "top1"}, "nothing is: give validation.data"),
        ({"tasks": {"x": {"label": "size"}}}, r"tasks\.x\.label: .* no field 'size'; it has capti"),
        (
            {"tasks": {"x": {"where": {"colour": "grey"}}}},
            r"tasks\.x: where=.* leaves no sample of",
        ),
        ({"tasks": {"x": {"templates": ["a"]}}}, r"tasks\.x\.templates: 'a' has no place"),
        ({"tasks": {"x": {"where": {"colour": "red"}, "label": "colour"}}}, "needs two classes"),
        ({"tasks": {"x": {"data": "/no/such/data"}}}, "/no/such/data"),
        ({"data": "/no/such/data"}, "/no/such/data"),
        ({"where": {"colour": "grey"}}, r"validation: where=.* leaves no sample"),
        ({"tasks": {"validation": {}}}, "validation is the title of that on validation.data"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_first_step(changes, says, data, held, tmp_path):
    values = with_validation(data, tmp_path / "run", held)
    plain = {"task": "zero_shot", "data": str(held), "label": "shape"}
    if "tasks" in changes:
        changes = {**changes, "tasks": {k: {**plain, **one} for k, one in changes["tasks"].items()}}
    values["validation"] |= changes
    with pytest.raises((ValueError, OSError), match=says) as caught:
        pretrain.run(config(values))
    assert len(str(caught.value).splitlines()) <= 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "config.yaml").exists()


# --- several processes ---


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 50])
def test_shares_are_whole_batches_that_follow_each_other(ranks, total):
    shares = [Share(rank, ranks).rows(total, batch_size=4) for rank in range(ranks)]
    assert [row for share in shares for row in share] == list(range(total))
    assert all(share.start % 4 == 0 for share in shares if share)
    batches = [-(-len(share) // 4) for share in shares]
    assert max(batches) - min(batches) <= 1


def same(one: EmbeddedPairs, other: EmbeddedPairs) -> bool:
    arrays = ("images", "texts", "ids")
    rest = ("captions", "fields", "keys", "fingerprint", "bad")
    return all(np.array_equal(getattr(one, x), getattr(other, x)) for x in arrays) and all(
        getattr(one, x) == getattr(other, x) for x in rest
    )


def in_rank(
    rank: int, world: int, data: str, held: str, damaged: str, out: str, values: dict[str, Any]
) -> None:
    for name, value in {
        **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world},
        **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1},
    }.items():
        os.environ[name] = str(value)
    share, model = Share(rank, world), tiny_model()
    whole = embed_pairs(model, held, batch_size=8)
    for where in ({}, {"colour": "red"}, {"hand": "two", "shape": ["dot", "bar"]}):
        one = embed_pairs(model, held, batch_size=8, where=where)
        assert same(embed_pairs(model, held, batch_size=8, where=where, share=share), one)
    other = embed_pairs(model, held, batch_size=20, share=share)
    np.testing.assert_allclose(other.images, whole.images, atol=1e-6)
    texts = [f"{number} dots" for number in range(11)]
    alone = encode_shared(model, texts, batch_size=2)
    assert np.array_equal(encode_shared(model, texts, batch_size=2, share=share), alone)
    assert encode_shared(model, [], share=share).shape == (0, 16)

    # What some cannot do, none does.
    with pytest.raises(ConfigError, match="leaves no sample"):
        embed_pairs(model, held, where={"colour": "grey"}, share=share)
    with pytest.raises(TooMuchDamageError, match=r"2 of \d+ samples are bad"):
        embed_pairs(model, damaged, max_bad_fraction=0.02, share=share)
    bad = embed_pairs(model, damaged, batch_size=8, max_bad_fraction=0.5)
    assert same(embed_pairs(model, damaged, batch_size=8, max_bad_fraction=0.5, share=share), bad)
    assert bad.bad == 2
    with pytest.raises(ConfigError, match="one broke"):
        share.all_or_none(lambda: int("one broke") if rank else 3)
    kind, said = (KeyError, "colour") if rank else (RunError, "process 1 stops: KeyError: 'colour'")
    with pytest.raises(kind, match=said):
        share.all_or_none(lambda: {}["colour"] if rank else 3)

    # Running statistics of the other processes are their own, and not those that are measured.
    statistics = torch.nn.BatchNorm1d(3)
    statistics.running_mean = torch.full((3,), float(rank))
    share.equalise_buffers(statistics)
    assert statistics.running_mean.tolist() == [0.0] * 3

    assert pretrain.run(config(values)) == 0


def write_damaged(data: Path, folder: Path) -> None:
    """The pairs with two pictures broken, both in one shard."""
    shutil.copytree(data, folder)
    content = bytearray((folder / "000001.tar").read_bytes())
    for number in (0, 5):
        start = Manifest.load(folder).spans["png"][0][12 + number]
        content[start : start + 8] = b"no image"
    (folder / "000001.tar").write_bytes(content)


@pytest.mark.slow
def test_several_processes_measure_what_one_does(data, held, tmp_path):
    write_damaged(data, tmp_path / "damaged")
    out = tmp_path / "run"
    values = with_validation(data, out, held, validation__best="shapes/top1")
    places = (str(data), str(held), str(tmp_path / "damaged"), str(out))
    run_ranks(in_rank, 2, *places, values, seconds=240)
    shutil.copytree(out / "bundle", tmp_path / "bundle")
    assert logged(looks(out)[-1]) == evaluated(tmp_path / "bundle", held)
    assert len(looks(out)) == 2


def test_alone_nothing_is_exchanged():
    rows = torch.ones(2, 3)
    assert ALONE.gathered(rows) is rows
    assert ALONE.told("x") == ["x"]
    with pytest.raises(ValueError, match="as it is"):
        ALONE.all_or_none(lambda: int("as it is"))


class Two(Share):
    """One process of two; keeps what it says, and is told the same with changes by the other."""

    said: Any = None
    answer: Callable[[Any], Any] = staticmethod(lambda _: None)

    def told(self, value: Any) -> list[Any]:
        type(self).said = value
        return [value, self.answer(value)]


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory\nmore"), KeyError("colour"), ArithmeticError()]
)
def test_whatever_a_process_meets_the_others_are_told_in_a_line(error):
    def work() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        Two(0, 2).all_or_none(work)
    assert caught.value is error
    is_fault, said = Two.said
    assert not is_fault
    assert said.startswith(f"process 0 stops: {type(error).__name__}")
    assert "\n" not in said


def test_what_another_process_met_is_told_and_ends_this_one(monkeypatch):
    for is_fault, kind in ((True, ConfigError), (False, RunError)):
        monkeypatch.setattr(Two, "answer", staticmethod(lambda _, one=is_fault: (one, "a line")))
        with pytest.raises(kind, match=r"^a line$"):
            Two(0, 2).all_or_none(lambda: 3)


def test_processes_that_see_different_samples_are_told_of_which_data(monkeypatch):
    prints = {"here": "0" * 64, "there": "1" * 64}
    monkeypatch.setattr(Two, "answer", staticmethod(list))
    Two(0, 2).refuse_different_data(prints)
    monkeypatch.setattr(Two, "answer", staticmethod(lambda own: [own[0], "2" * 64]))
    with pytest.raises(ConfigError, match=r"^there: the processes see .*1{12}, 2{12}\); have"):
        Two(0, 2).refuse_different_data(prints)
