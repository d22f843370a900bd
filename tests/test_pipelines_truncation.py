"""Captions that are longer than the context: counted over the whole run, told at its end."""

import io
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairs_corpus import COLOURS, SHAPES, tiny_pretrain
from ranks import run_ranks

import align
from align.checkpoint import checkpoints
from align.tokenizer import Tokenizer
from pipelines import pretrain, run_folder
from pipelines.checkup.data import check_tokens
from pipelines.checkup.report import CheckUp, percent
from pipelines.config import build
from pipelines.schemas import PretrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 2
CAPTIONS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def config(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """Two epochs with a context that half of the captions exceed."""
    values = tiny_pretrain(
        data,
        out,
        samples=EPOCHS * len(CAPTIONS),
        log_every=2,
        **{"model__context_length": 6, "tokenizer__vocabulary_size": 70, **changes},
    )
    return build(PretrainConfig, values, origin="test")


def expected_cut(bundle: Path, context: int = 6) -> int:
    """By looking at every caption, uncut."""
    whole = Tokenizer.load(bundle / "tokenizer", context_length=100).ids(CAPTIONS)
    return EPOCHS * sum(len(ids) > context for ids in whole)


def logged(out: Path) -> list[int]:
    return [line["cut_captions"] for line in run_folder.read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, str]:
    """A run, and the last thing it said."""
    out, said = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with redirect_stdout(said):
        assert pretrain.run(config(data, out)) == 0
    return out, said.getvalue().splitlines()[-1]


def test_what_is_cut_is_counted_logged_and_told_once(finished):
    out, said = finished
    cut = expected_cut(out / "bundle")
    assert 0 < cut < EPOCHS * len(CAPTIONS)
    counts = logged(out)
    assert counts == sorted(counts), "a running count"
    assert counts[0] < counts[-1] == cut
    assert run_folder.read_json(out / "data_report.json")["cut_captions"] == cut
    share = percent(cut / (EPOCHS * len(CAPTIONS)))
    assert said == f"{share} of the captions were longer than context_length 6 tokens and were cut"


def test_a_run_that_goes_on_counts_what_was_cut_before(finished, data, capsys):
    out, said = finished
    counts, report = logged(out), run_folder.read_json(out / "data_report.json")
    shutil.rmtree(checkpoints(out)[-1])
    assert pretrain.run(config(data, out, resume=True)) == 0
    assert logged(out) == counts
    assert run_folder.read_json(out / "data_report.json") == report
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_where_nothing_is_cut_nothing_is_said(data, tmp_path, capsys):
    assert pretrain.run(config(data, tmp_path / "run", model__context_length=16)) == 0
    assert "were cut" not in capsys.readouterr().out
    assert set(logged(tmp_path / "run")) == {0}
    assert run_folder.read_json(tmp_path / "run" / "data_report.json")["cut_captions"] == 0


def rank_run(rank: int, world: int, data: str, out: str) -> None:
    for name, value in {
        **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world},
        **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1},
    }.items():
        os.environ[name] = str(value)
    # Both agree, whoever of them met the long captions.
    counts: list[int] = []
    step: Callable[..., Any] = pretrain.step

    def counted(training: Any, batch: Any) -> Any:
        measured = step(training, batch)
        counts.append(training.cut_captions)
        return measured

    pretrain.step = counted
    assert pretrain.run(config(Path(data), Path(out))) == 0
    Path(f"{out}.{rank}").write_text(str(counts))


@pytest.mark.slow
def test_the_count_is_that_of_all_processes(finished, data, tmp_path):
    out, _ = finished
    run_ranks(rank_run, 2, str(data), str(tmp_path / "both"))
    assert logged(tmp_path / "both") == logged(out)
    report = run_folder.read_json(tmp_path / "both" / "data_report.json")
    assert report["cut_captions"] == expected_cut(out / "bundle")
    assert (tmp_path / "both.0").read_text() == (tmp_path / "both.1").read_text()


def test_the_check_up_tells_the_same_share(finished, data):
    out, _ = finished
    tokenizer = Tokenizer.load(out / "bundle" / "tokenizer", context_length=6)
    check = CheckUp(quiet=True)
    check.begin("model")
    check_tokens(check, config(data, out), tokenizer, CAPTIONS)
    found = check.numbers["truncated_share"]
    assert found == pytest.approx(expected_cut(out / "bundle") / (EPOCHS * len(CAPTIONS)))


def test_the_check_up_looks_at_texts_as_they_are_cleaned(data, tmp_path):
    texts = ["red &amp;amp; circle !!! ???"]
    raw = Tokenizer.train(texts, vocabulary_size=60, context_length=6)
    clean = Tokenizer(raw.backend, context_length=6, clean="canonicalize")
    shares = []
    for tokenizer in (raw, clean):
        check = CheckUp(quiet=True)
        check.begin("model")
        check_tokens(check, config(data, tmp_path), tokenizer, texts)
        shares.append(check.numbers["truncated_share"])
        assert shares[-1] == tokenizer(texts).truncated
    assert shares == [1.0, 0.0]


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0, "0%"),
        (1e-6, "less than 0.1%"),
        (0.0006, "0.1%"),
        (0.031, "3.1%"),
        (0.31, "31%"),
        (1, "100%"),
    ],
)
def test_what_is_there_is_never_called_nothing(share, said):
    assert percent(share) == said


def test_the_library_says_how_many_texts_are_cut(finished):
    model = align.load(finished[0] / "bundle")
    texts = ["red circle, and whatever else there is to say about it", ""]
    assert model.tokenize(texts).truncated == 1
    assert np.isfinite(model.encode_text(texts).numpy()).all()
