"""The model card: true of the model, its code runs, and only its table is ever renewed."""

import json
import math
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from pairs_corpus import tiny_model

from align import bundle
from align.bundle import fingerprint, load, record_results, save
from align.card import BEGIN, END, Result, merged, model_card, results_block, with_results

PROVENANCE: dict[str, Any] = {
    "data": "f00d" * 16,
    "sources": ["train", "https://example.org/pairs/{0..9}.tar"],
    "samples": 12800,
    "steps": 100,
    "config": {"model": {"dim": 16}, "text": "a\nb", "list": [1, {"a": None}], "name": "x"},
}
TOP1 = Result(
    task="names",
    figure="top1",
    value=0.325,
    low=0.303,
    high=0.346,
    count=1731,
    chance=0.000578,
    protocol={"data": "abc", "label": "name", "templates": ["a {}", "b {}"], "where": {}},
)
RANK = Result("names", "median_rank", 4.0, 3.0, 6.0, 1731, unit="rank", higher_is_better=False)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def original(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "bundle"
    save(model, folder, provenance=PROVENANCE)
    return folder


@pytest.fixture
def saved(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "bundle")
    return tmp_path / "bundle"


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def kept(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["results"]


def table(text: str) -> list[list[str]]:
    """The cells of the lines between the two comments."""
    block = text[text.index(BEGIN) : text.index(END)]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


# --- what it says ---


def test_the_hub_reads_its_header(saved):
    data: Any = ModelCard.load(saved / "README.md").data
    assert data.library_name == "clip-align"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert "clip" in (data.tags or [])
    assert data.license is None, "which is for the owner to say"


def test_it_tells_what_the_model_is(model, saved):
    text = card(saved)
    count = sum(parameter.numel() for parameter in model.parameters())
    for fact in (
        *("`timm:resnet10t`", "`hf:bert`", f"| parameters | {count:,} |", "32 x 32 px"),
        *("| width of the space | 16 |", "| longest text | 16 tokens |", "0.485, 0.456, 0.406"),
        *(f"{len(model.tokenizer)} entries", "| temperature | 0.07 ", "projection linear"),
    ):
        assert fact in text
    assert "logit bias" not in text


def test_it_tells_of_temperature_bias_and_cleaning_where_there_are_any(model):
    other = load_copy(model)
    other.logit_scale.fill_(math.log(20))
    other.logit_bias.fill_(-7.5)
    other.tokenizer.clean = "lower"
    text = model_card(other, {})
    assert "| temperature | 0.05 " in text
    assert "| logit bias | -7.5 |" in text
    assert "cleaned by `lower`" in text
    assert ".sigmoid()" in text
    assert ".softmax" not in text


def load_copy(model):
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    return other


def test_it_tells_what_it_was_trained_on(saved):
    text = card(saved)
    for fact in ("f00d" * 16, "| 12,800 |", "| steps | 100 |", *PROVENANCE["sources"]):
        assert fact in text
    for line in ("model.dim: 16", 'text: "a\\nb"', 'list: [1, {"a": null}]', "name: x"):
        assert f"\n{line}\n" in text, "a configuration by its paths, a line each"


def test_without_a_history_it_tells_of_none(model):
    text = model_card(model, {})
    assert "trained on" not in text
    assert "<details>" not in text


@pytest.mark.slow
def test_its_code_runs_in_a_process_of_its_own(saved):
    (code,) = re.findall(r"```python\n(.*?)```", card(saved), re.DOTALL)
    assert len(code.strip().splitlines()) <= 9
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=saved, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = eval(done.stdout)
    assert set(said) == {"a red square", "a blue circle"}
    assert sum(said.values()) == pytest.approx(1)


# --- results ---


def test_results_stand_in_a_table_with_interval_direction_and_count(saved):
    assert "Nothing was measured yet." in card(saved)
    record_results(saved, [TOP1, RANK])
    text = card(saved)
    assert "Nothing was measured yet." not in text
    heads, _, first, second = [[cell.strip() for cell in row] for row in table(text)]
    assert heads == ["task", "figure", "value", "95 % interval", "better", "chance", "items"]
    assert first == [
        *("names", "top1", "**32.5 %**", "30.3 % to 34.6 %", "higher", "0.0578 %", "1,731"),
    ]
    assert second == [
        *("names", "median_rank", "**4.0 rank**", "3.0 rank to 6.0 rank", "lower", "-", "1,731"),
    ]
    assert '- names: data abc; label name; templates ["a {}", "b {}"]' in text
    assert kept(saved) == [TOP1.to_json(), RANK.to_json()]


def test_the_fingerprint_and_the_model_stay_what_they_were(model, saved):
    before = fingerprint(saved)
    record_results(saved, [TOP1])
    assert fingerprint(saved) == before
    assert torch.equal(load(saved).encode_text(["a"]), model.encode_text(["a"]))


def test_a_figure_measured_again_takes_the_place_of_the_old_one(saved):
    record_results(saved, [TOP1, RANK])
    again = Result("names", "top1", 0.4, protocol=TOP1.protocol)
    other = Result("names", "top1", 0.9, protocol={"data": "another"})
    record_results(saved, [other, again])
    assert [row["value"] for row in kept(saved)] == [0.4, 4.0, 0.9]
    assert [row[2].strip() for row in table(card(saved))[2:]] == [
        *("**40.0 %**", "**4.0 rank**", "**90.0 %**"),
    ]


def test_the_order_of_keys_in_a_protocol_is_none_of_its_own():
    old = Result("t", "f", 1.0, protocol={"a": 1, "b": (2,)}).to_json()
    new = Result("t", "f", 2.0, protocol={"b": [2], "a": 1}).to_json()
    assert merged([old], [new]) == [new]


def test_results_of_other_weights_are_forgotten(saved):
    record_results(saved, [TOP1])
    shutil.copy(saved / "results.json", saved.parent / "old.json")
    save(tiny_model(seed=1), saved)
    assert not (saved / "results.json").exists()
    shutil.copy(saved.parent / "old.json", saved / "results.json")
    record_results(saved, [RANK])
    assert kept(saved) == [RANK.to_json()]


def test_saving_the_same_model_again_keeps_card_and_results(model, saved):
    record_results(saved, [TOP1])
    (saved / "README.md").write_text("# Mine\n" + card(saved), encoding="utf-8")
    before = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    save(model, saved, provenance=PROVENANCE)
    assert {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()} == before
    save(model, saved, provenance=PROVENANCE, card="# New\n")
    assert card(saved) == "# New\n"
    assert not (saved / "results.json").exists()


def test_what_is_no_finite_number_is_said_to_be_missing(saved):
    record_results(saved, [Result("t", "f", 0.5, math.nan, math.inf, 3)])
    text = (saved / "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [cell.strip() for cell in table(card(saved))[2]][3] == "-"


# --- the rest of the card is the owner's ---


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_what_people_write_around_the_table_stays_to_the_byte(saved, ending):
    text = card(saved).replace("\n", ending).encode().replace(b"# resnet", b"# \xff\xe9 My r")
    before, rest = text.split(BEGIN.encode())
    after = rest.split(END.encode())[1] + b"\nThanks to all.  "
    (saved / "README.md").write_bytes(before + BEGIN.encode() + rest.split(END.encode())[0]
                                      + END.encode() + after)  # fmt: skip
    record_results(saved, [TOP1])
    record_results(saved, [RANK])
    now = (saved / "README.md").read_bytes()
    assert now.startswith(before + BEGIN.encode())
    assert now.endswith(END.encode() + after)
    assert now.count(BEGIN.encode()) == now.count(END.encode()) == 1
    assert b"**32.5 %**" in now
    assert b"**4.0 rank**" in now


@pytest.mark.parametrize(
    "text", [b"", b"# Mine\n", b"# Mine", BEGIN.encode(), END.encode() + b"\n" + BEGIN.encode()]
)
def test_a_card_without_a_place_for_the_table_gets_one_at_its_end(text):
    once = with_results(text, [TOP1.to_json()])
    assert once.startswith(text)
    assert once.endswith(results_block([TOP1.to_json()]).encode())
    assert b"\n## Measured results\n" in b"\n" + once


def test_renewing_twice_changes_nothing(saved):
    rows = [TOP1.to_json(), RANK.to_json()]
    once = with_results((saved / "README.md").read_bytes(), rows)
    assert with_results(once, rows) == once


def test_a_bundle_without_a_card_gets_one_with_the_table(saved):
    (saved / "README.md").unlink()
    record_results(saved, [TOP1])
    assert "**32.5 %**" in card(saved)


@pytest.mark.parametrize(
    "title", ["a | b", "line\nbreak", f"<b>{END}</b>", "`code`", "\\|", "<script>x</script>"]
)
def test_a_title_breaks_neither_the_table_nor_the_comments(saved, title):
    record_results(saved, [Result(title, "f", 0.5, protocol={"where": {title: [title]}}), RANK])
    text = card(saved)
    assert text.count(BEGIN) == text.count(END) == 1
    assert "<b>" not in text
    assert "<script>" not in text
    assert {len(row) for row in table(text)} == {7}
    record_results(saved, [TOP1])
    assert card(saved).count(END) == 1
    assert len(table(card(saved))) == 2 + 3


def test_long_protocols_are_told_by_their_length():
    long = Result("t", "f", 0.5, protocol={"templates": [f"a photo of {i}" for i in range(80)]})
    assert "templates 80 of them" in results_block([long.to_json()])


# --- whole or not at all ---


def test_results_of_two_runs_at_once_are_all_kept(saved):
    def run(number: int) -> None:
        for figure in range(3):
            record_results(saved, [Result(f"task {number}", f"figure {figure}", 0.5)])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept(saved)) == 12
    assert len(table(card(saved))) == 2 + 12


def test_a_full_disk_leaves_results_and_card_as_they_were(saved, monkeypatch):
    record_results(saved, [TOP1])
    before = {path: path.read_bytes() for path in saved.iterdir() if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        record_results(saved, [RANK])
    assert {path: path.read_bytes() for path in saved.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"bundle": 1}', "\x00", "null"])
def test_results_that_cannot_be_read_are_not_written_over(saved, content):
    (saved / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json cannot be read") as caught:
        record_results(saved, [TOP1])
    assert "\n" not in str(caught.value)
    assert (saved / "results.json").read_text() == content
    assert "Nothing was measured yet." in card(saved)


def test_results_are_kept_with_bundles_alone(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="is no bundle"):
            record_results(folder, [TOP1])
    assert not list(tmp_path.iterdir())
