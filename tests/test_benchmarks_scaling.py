"""The model of what scaling takes: counts against formulas, and a page that never goes stale."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import scaling, scaling_counts
from benchmarks.scaling import GPUS, Run, exchanged, fitted, memory, step
from benchmarks.scaling_counts import between, count

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
ON_THE_PAGE = [("vit-b-32", "a100"), ("siglip-b-16", "h100")]
B32 = 151_277_312


def transformer(tokens: int, width: int, layers: int) -> float:
    """Operations of a transformer's blocks: four maps of attention, two of 4 x width; attention."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize(("preset", "gpu"), ON_THE_PAGE)
def test_the_page_has_the_tables_of_today(preset, gpu):
    assert f"python -m benchmarks.scaling --preset {preset} --gpu {gpu}" in PAGE
    for title, lines in scaling.report(preset, gpu):
        assert "\n".join(lines) in PAGE, f"{title}: print the page's tables again, {preset} {gpu}"


def test_the_page_has_no_other_tables():
    printed = {
        line for which in ON_THE_PAGE for _, lines in scaling.report(*which) for line in lines
    }
    assert set(re.findall(r"(?m)^\|.*$", PAGE)) == printed


def test_the_page_says_first_that_nothing_was_run():
    title, first, *_ = PAGE.split("\n\n")
    assert title.startswith("# ")
    assert "none of it was run" in first


def test_operations_are_those_of_the_formula():
    counts = count("vit-b-32")
    assert counts.parameters == B32
    patches = 2 * 49 * 3 * 32**2 * 768
    assert counts.image_flops == pytest.approx(transformer(50, 768, 12) + patches, rel=1e-3)
    for tokens in (10, 14, 77):
        found = between(counts.text_flops, tokens)
        assert found == pytest.approx(transformer(tokens, 512, 12), rel=1e-3), tokens


def test_a_tower_that_attends_to_padding_computes_all_of_it():
    assert count("siglip-b-16").tokens(4) == 64
    padded = count("vit-b-32").tokens(1)
    assert padded == 77
    assert 12 < count("vit-b-32").tokens(4) < 16


def test_what_is_kept_is_what_autograd_saves():
    weight = torch.ones(3, 5, requires_grad=True)

    def forward(rows: int) -> Tensor:
        # exp keeps its result of 5 numbers in fp32, the product its 3 in bf16
        return (torch.ones(rows, 3) @ weight).float().exp()

    assert scaling_counts._held(forward) == 5 * 4 + 3 * 2


def test_what_open_clip_published_is_where_the_model_begins():
    """850 samples/s on an A100, captions at 77 tokens: 12 % of the peak."""
    counts, gpu = count("vit-b-32"), GPUS["a100"]
    whole = replace(counts, fixed_length=77)
    run = Run(1, 512, micro=512)
    assert 512 / step(whole, gpu, run, 0.12).towers == pytest.approx(850, rel=0.02)


def test_bytes_are_those_of_the_loss_and_of_a_ring():
    """`align.losses.InfoNCE` states them for 8 processes with 2048 rows of 512."""
    moved = exchanged(count("vit-b-32"), Run(8, 8 * 2048, micro=2048))
    assert moved["texts"] == moved["their gradients"] == 4 * 7 * 2048 * 512
    assert moved["gradients"] == 2 * 7 / 8 * 4 * B32
    assert moved["labels and sums"] == pytest.approx(0.3e6, rel=0.2)
    assert moved["weights"] == 0
    assert sum(exchanged(count("vit-b-32"), Run(1, 4096, micro=64)).values()) == 0


def test_pieces_take_memory_and_give_time():
    counts, gpu = count("vit-b-32"), GPUS["a100"]
    whole, pieces = Run(8, 16384, micro=2048), Run(8, 16384, micro=512)
    assert memory(counts, whole)["activations"] == 4 * memory(counts, pieces)["activations"]
    assert exchanged(counts, whole) == exchanged(counts, pieces)
    slow, quick = (step(counts, gpu, run, 0.2).towers for run in (pieces, whole))
    assert slow == pytest.approx(quick * 4 / 3)


def test_checkpointing_keeps_less_and_computes_more():
    counts, gpu = count("vit-b-32"), GPUS["a100"]
    plain = Run(8, 16384, micro=2048)
    kept = replace(plain, checkpointing=True)
    assert memory(counts, kept)["activations"] < memory(counts, plain)["activations"] / 3
    slow, quick = (step(counts, gpu, run, 0.2).towers for run in (kept, plain))
    assert slow == pytest.approx(quick * 4 / 3)


def test_shares_take_an_eighth_and_move_weights():
    counts = count("vit-b-32")
    plain = Run(8, 16384, micro=2048)
    shared = replace(plain, sharded=True)
    assert memory(counts, shared)["AdamW"] == memory(counts, plain)["AdamW"] / 8 == B32
    assert memory(counts, shared)["gradients"] == B32 / 2
    assert exchanged(counts, shared)["weights"] > exchanged(counts, plain)["gradients"]
    # a gathered tower of text goes once through each chunk
    fewer = exchanged(counts, replace(shared, text_chunks=1))["weights"]
    assert fewer == 7 / 8 * 4 * B32 * 2


@pytest.mark.parametrize("name", list(GPUS))
def test_pieces_are_the_largest_that_fit(name):
    counts, gpu = count("siglip-b-16"), GPUS[name]
    run = fitted(counts, gpu, Run(8, 16384))
    room = scaling.ROOM * gpu.memory
    assert sum(memory(counts, run).values()) <= room
    assert sum(memory(counts, replace(run, micro=2 * run.micro)).values()) > room


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.012"), (9.96, "10"), (99.4, "99"), (123, "120"), (98765, "99,000")],
)
def test_figures_have_two_digits(value, text):
    assert scaling.two(value) == text


def test_the_command_prints_tables_and_a_line_of_json(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "--batch", "32768"])
    scaling.main()
    *tables, last = capsys.readouterr().out.strip().splitlines()
    figures = json.loads(last)["gpus"]
    assert set(figures) == {"1", "8", "64", "512"}
    slow, quick = figures["64"]["samples_per_second"]
    assert 0 < slow < quick
    assert any("32,768" in line for line in tables)


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "--batch", "1000"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "multiple of 512" in capsys.readouterr().err
