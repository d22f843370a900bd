"""The page of a run: what it shows of the lines, when it is written, and that it ends no run."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from pairs_corpus import tiny_pretrain

from eval.report import Chart, Series
from eval.report_charts import line_chart
from eval.report_shares import shares_bar
from pipelines import pretrain, run_page
from pipelines.config import build
from pipelines.progress import Ledger, TrainingLog
from pipelines.run_figures import in_words
from pipelines.run_page import RunFacts, RunPage, short
from pipelines.schemas import PretrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 100


def facts(out: Path, **changes: Any) -> RunFacts:
    values = tiny_pretrain(Path("/data"), out, samples=16 * STEPS, **changes)
    return RunFacts(
        build(PretrainConfig, values, origin="test"),
        steps=STEPS,
        samples=48,
        parameters=90_413,
        processes=1,
        device="cpu",
    )


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "samples": 16 * step,
        "loss": 4.0 - 0.02 * step,
        "batch_accuracy": 0.25,
        "temperature": 0.07,
        "learning_rate": 1e-3,
        **{f"{part}_gradient_norm": 1.0 + step for part in ("image", "text", "head")},
        **{f"{part}_update_norm": 0.1 for part in ("image", "text", "head")},
        **{f"{part}_parameter_norm": 30.0 for part in ("image", "text", "head")},
        "samples_per_second": 80.0,
        **{"data_ms": 20.0, "forward_backward_ms": 100.0, "loss_ms": 30.0},
        **{"optimizer_ms": 10.0, "other_ms": 40.0, "mfu": 0.125},
        **{"spikes": 3, "skipped_steps": 2, "bad_samples": 7, "cut_captions": 0},
        **changes,
    }


def look_line(step: int, recall: float) -> dict[str, Any]:
    figures = {"image_to_text_recall@1": recall, "image_to_text_median_rank": 3.0}
    figures |= {"unseen/top1": 0.5}
    ends = {
        f"{name}_{edge}": value + shift
        for name, value in figures.items()
        for edge, shift in (("low", -0.1), ("high", 0.1))
    }
    return {"step": step, "samples": 16 * step, **figures, **ends}


def page(out: Path, lines: list[dict[str, Any]], *, ended: bool = False, **changes: Any) -> str:
    one = RunPage(facts(out, **changes), out / "metrics.jsonl", out / "report.html")
    for line in lines:
        one._take(line)
    return one.page(ended=ended).html()


def words(html: str) -> str:
    """What a reader sees, tags and styles aside."""
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", html, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_a_running_page_says_how_far_it_is_and_renews_itself(tmp_path):
    html = page(tmp_path / "emoji", [step_line(step) for step in (10, 20, 40)])
    said = words(html)
    assert "Training emoji" in said
    assert "Time left 12 s 640 of 1600 samples, 40.0 %" in said  # 960 samples at 80 a second
    assert "Speed 80 samples/s 12.5 % of the peak" in said
    assert "Loss 3.2 25.0 % right within the batch" in said
    assert "It was running at" in said
    assert '<meta http-equiv="refresh" content="15">' in html


def test_a_page_of_a_run_that_ended_or_stopped_stays_as_it_is(tmp_path):
    for steps, state in (((50, 100), "It ended at"), ((50,), "It stopped at step 50 of 100")):
        html = page(tmp_path / "run", [step_line(step) for step in steps], ended=True)
        assert state in words(html)
        assert "refresh" not in html
        assert "Time left" not in html


@pytest.mark.parametrize("steps", [(50,), (50, 100)])
def test_a_page_says_what_error_ended_the_run(steps, tmp_path):
    one = RunPage(facts(tmp_path), tmp_path / "metrics.jsonl", tmp_path / "report.html")
    ledger = Ledger()
    log = TrainingLog(
        *(tmp_path / "metrics.jsonl",),
        **{"ledger": ledger, "steps": STEPS, "done": 0, "batch_size": 16, "every": 1},
        observers=[one],
    )

    def run() -> None:
        with log:
            for step in steps:
                one.line(step_line(step))
            raise ValueError("no finite gradient in <5> steps\nmore")

    with pytest.raises(ValueError, match="no finite"):
        run()
    said = words(one.path.read_text())
    assert f"It failed after step {steps[-1]} of 100, at " in said
    assert "no finite gradient in &lt;5&gt; steps" in said
    assert "It ended" not in said


def test_a_run_that_was_interrupted_has_not_failed(tmp_path):
    one = RunPage(facts(tmp_path), tmp_path / "metrics.jsonl", tmp_path / "report.html")
    one.line(step_line(50))
    one.end(KeyboardInterrupt())
    assert "It stopped at step 50 of 100" in words(one.path.read_text())


def test_every_figure_has_its_curve(tmp_path):
    lines = [step_line(10, bias=-10.0, memory_peak_mb=900.0), look_line(10, 0.2), step_line(20)]
    html = page(tmp_path / "run", lines)
    titles = re.findall(r"<figcaption>([^<]+)", html)
    assert titles == [
        *("Loss", "Accuracy within the batch", "Temperature", "Bias", "Learning rate"),
        *("Image to text recall", "Median rank", "Unseen: accuracy"),
        *("Gradient", "Update of a step", "Weights"),
        *("Samples a second", "Model FLOP utilisation", "Peak memory of the device"),
    ]
    assert html.count('class="band') == 3, "figures with intervals"
    labels = re.findall(r'aria-label="(Gradient[^"]*)"', html)
    assert labels == ["Gradient against samples seen: image ends at 21; text ends at 21; "
                      "rest ends at 21"]  # fmt: skip


def test_the_budget_is_a_bar_of_all_its_parts(tmp_path):
    said = words(page(tmp_path / "run", [step_line(10), step_line(20)]))
    assert (
        "waiting for data 20 ms 10\u202f% towers 100 ms 50\u202f% loss 30 ms 15\u202f% "
        "optimiser 10 ms 5\u202f% the rest 40 ms 20\u202f%"
    ).replace("\u202f", " ") in said.replace("\u202f", " ")


def test_what_went_wrong_and_how_it_is_made_stands_on_it(tmp_path):
    stages = [{"until": 0.5, "image_size": 24}]
    said = words(page(tmp_path / "run", [step_line(10)], stages=stages))
    for one in ("spikes of the loss 3", "steps skipped 2", "bad samples 7", "captions cut 0"):
        assert one in said
    assert "1 800 samples 24 px 16 tokens 2 1600 samples 32 px 16 tokens" in said
    assert "image tower timm:resnet10t" in said
    assert "batch 16" in said
    assert "precision fp32" in said


def test_the_best_is_the_highest_recall_or_the_lowest_rank(tmp_path):
    looks = [look_line(10, 0.2), look_line(20, 0.6), look_line(30, 0.4)]
    looks[0]["image_to_text_median_rank"] = 2.0
    said = words(page(tmp_path / "run", [step_line(30), *looks]))
    assert "Best image to text recall@1 60.0" in said
    assert "after 320 samples" in said
    best = {"best": "image_to_text_median_rank", "data": "/data"}
    said = words(page(tmp_path / "run", [step_line(30), *looks], validation=best))
    assert "Best image to text median rank 2.0" in said
    assert "after 160 samples" in said


def test_lines_before_a_resume_are_on_the_page(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(step_line(step)) + "\n" for step in (10, 20)))
    resumed = RunPage(facts(tmp_path), path, tmp_path / "report.html")
    resumed.line(step_line(30))
    straight = page(tmp_path / "straight", [step_line(step) for step in (10, 20, 30)])
    written = (tmp_path / "report.html").read_text()
    assert re.findall(r"<path[^>]*>", written) == re.findall(r"<path[^>]*>", straight)


@pytest.mark.parametrize("gap", ["none", "zero"])
def test_lines_without_a_finite_loss_or_an_update_are_gaps(gap, tmp_path):
    odd = step_line(20, loss=None) if gap == "none" else step_line(20, image_update_norm=0.0)
    html = page(tmp_path / "run", [step_line(10), odd, step_line(30)])
    assert "Update of a step" in html


def test_it_is_written_at_most_every_ten_seconds_or_after_200_times_its_cost(tmp_path, monkeypatch):
    clock, written = [100.0], []
    monkeypatch.setattr(run_page.time, "monotonic", lambda: clock[0])

    class Slow:
        def write(self, _: Path) -> None:
            clock[0] += 0.2
            written.append(clock[0])

    one = RunPage(facts(tmp_path), tmp_path / "metrics.jsonl", tmp_path / "report.html")
    monkeypatch.setattr(one, "page", lambda **_: Slow())
    for step in range(1, 101):
        one.line(step_line(step))
        clock[0] += 1
    assert [round(at) for at in written] == [100, 141, 182]
    one.end()
    assert len(written) == 4


def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, capsys):
    one = RunPage(facts(tmp_path), tmp_path / "metrics.jsonl", tmp_path / "away" / "report.html")
    one.line(step_line(1))
    one.end()
    (said,) = capsys.readouterr().out.splitlines()
    assert "report.html: not written" in said
    assert "the run goes on" in said


def test_writing_the_page_of_a_long_run_is_quick(tmp_path):
    """By what is done, not by the clock: curves are drawn of 120 points however many lines."""
    one = RunPage(facts(tmp_path), tmp_path / "metrics.jsonl", tmp_path / "report.html")
    for step in range(1, 3001):
        one._take(step_line(step))
    assert len(one.page(ended=True).html()) < 200_000


def test_a_run_leaves_its_page(data, tmp_path):
    out = tmp_path / "run"
    values = tiny_pretrain(data, out, samples=64, validation={"data": str(data), "every": 32})
    before = time.time()
    assert pretrain.run(build(PretrainConfig, values, origin="test")) == 0
    html = (out / "report.html").read_text()
    assert (out / "report.html").stat().st_mtime >= before - 1
    said = words(html)
    assert "It ended at" in said
    assert "Best image to text recall@1" in said
    assert "samples 48" in said
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", html), "nothing is fetched"


def test_a_curve_that_hardly_moves_is_drawn():
    values = [0.07, math.nextafter(0.07, 1), 0.07]
    drawn = line_chart(Chart("Temperature", [Series("temperature", [1, 2, 3], values)]))
    assert "ends at 0.07" in str(drawn[1].get("aria-label"))


def test_numbers_and_names_for_readers():
    assert [short(one) for one in (0, 640, 12_800, 1_280_000, 3e9)] == [
        *("0", "640", "12.8 k", "1.28 M", "3 G")
    ]
    assert in_words("unseen/image_to_text_recall@5") == "unseen: image to text recall@5"


@pytest.mark.parametrize("parts", [{}, {"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": float("nan")}])
def test_a_bar_of_no_whole_is_refused(parts):
    with pytest.raises(ValueError, match="takes 1 to 6 numbers"):
        shares_bar(parts)
