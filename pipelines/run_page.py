"""`report.html` of a run folder: how a run goes, in one page that can be opened while it does."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.report import Number, Page, Tile
from eval.results import Figure
from pipelines import run_folder
from pipelines.checkup.report import one_line
from pipelines.progress import duration
from pipelines.run_figures import Columns, grouped, in_words, is_rank
from pipelines.schemas import PretrainConfig

EVERY_S = 10.0
"""The page is written at most so often."""
_TIMES_ITS_COST = 200
"""And after so many times what writing it took: it costs less than a hundredth of a run."""
RENEW_S = 15
"""How often a reader's browser loads the page anew while the run goes."""

_BUDGET = {
    "data_ms": "waiting for data",
    "forward_backward_ms": "towers",
    "loss_ms": "loss",
    "optimizer_ms": "optimiser",
    "other_ms": "the rest",
}
_PARTS = {"image": "image", "text": "text", "head": "rest"}


@dataclass(frozen=True)
class RunFacts:
    """What a run's page says of it beside its lines.

    Attributes:
        config: its configuration.
        steps: its length.
        samples: in an epoch.
        parameters: of model and loss.
        processes: that train together.
        device: they train on.
    """

    config: PretrainConfig
    steps: int
    samples: int
    parameters: int
    processes: int
    device: str


class RunPage:
    """Follows a run's lines and writes its page: at most every ten seconds, and at the end.

    Writing it again waits two hundred times what it took, if that is longer, so that it costs less
    than a hundredth of a run of any length. What keeps it from being written is told once, and
    never ends a run.

    Args:
        facts: what does not change.
        metrics: lines of the run before it was resumed are read from it.
        path: of the page.
    """

    def __init__(self, facts: RunFacts, metrics: Path, path: Path) -> None:
        self.path = path
        self._facts = facts
        self._steps = Columns()
        self._looks = Columns()
        self._last: dict[str, Any] = {}
        self._next = 0.0
        self._told = False
        self._failure = ""
        for line in run_folder.read_metrics(metrics):
            self._take(line)

    def line(self, line: dict[str, Any]) -> None:
        """Take in a line; write the page where it is time to."""
        self._take(line)
        if time.monotonic() >= self._next:
            self._write(ended=False)

    def end(self, error: BaseException | None = None) -> None:
        """Write the page as it stays, with what ended the run where that was an error."""
        if isinstance(error, Exception):  # no Ctrl+C
            self._failure = one_line(error)
        self._write(ended=True)

    def _take(self, line: dict[str, Any]) -> None:
        if "samples" not in line:
            return
        if "loss" in line:
            self._steps.add(line)
            self._last = line
        else:
            self._looks.add(line)

    def _write(self, *, ended: bool) -> None:
        started = time.monotonic()
        try:
            self.page(ended=ended).write(self.path)
        except (OSError, ValueError) as error:
            if not self._told:
                print(f"{self.path}: not written ({error}); the run goes on", flush=True)
            self._told = True
        now = time.monotonic()
        self._next = now + max(EVERY_S, _TIMES_ITS_COST * (now - started))

    def page(self, *, ended: bool) -> Page:
        """The page as it is now."""
        facts, config = self._facts, self._facts.config
        going = not ended and self._step < facts.steps
        page = Page(
            f"Training {config.out.name}",
            f"{config.model.image.name} and {config.model.text.name}, "
            f"{facts.parameters / 1e6:.1f} M parameters, on {facts.device}. {self._state(going)}",
            renew_s=RENEW_S if going else None,
        )
        page.headline(self._tiles(going))
        self._learning(page)
        self._validation(page)
        self._norms(page)
        self._speed(page)
        self._made(page)
        return page

    @property
    def _step(self) -> int:
        return self._last.get("step", 0)

    def _state(self, going: bool) -> str:
        written = f"{datetime.now(UTC):%Y‑%m‑%d %H:%M:%S} UTC"
        if going:
            return f"It was running at {written}; this page renews itself."
        if self._failure:
            return (
                f"It failed after step {self._step:,} of {self._facts.steps:,}, at {written}: "
                f"{self._failure}"
            )
        if self._step < self._facts.steps:
            return f"It stopped at step {self._step:,} of {self._facts.steps:,}, at {written}."
        return f"It ended at {written}."

    def _tiles(self, going: bool) -> list[Tile | Number]:
        facts, last, steps = self._facts, self._last, self._steps
        done, total = last.get("samples", 0), facts.steps * facts.config.batch_size
        so_far = f"{short(done)} of {short(total)} samples, {100 * done / total:.1f} %"
        rate, mfu = steps.recent("samples_per_second"), steps.recent("mfu")
        tiles: list[Tile | Number] = []
        if going and rate:
            tiles.append(Number("Time left", *_split(duration((total - done) / rate)), so_far))
        else:
            tiles.append(Number("Samples", short(done), note=so_far))
        if rate:
            note = f"{100 * mfu:.3g} % of the peak" if mfu else ""
            tiles.append(Number("Speed", short(rate), "samples/s", note))
        if last.get("loss") is not None:
            accuracy = last.get("batch_accuracy")
            note = "" if accuracy is None else f"{100 * accuracy:.1f} % right within the batch"
            tiles.append(Number("Loss", f"{last['loss']:.4g}", note=note))
        return [*tiles, *self._best()]

    def _best(self) -> list[Tile]:
        """The best value so far of the figure by which the best checkpoint is chosen, or recall."""
        names = self._looks.names()
        wanted = self._facts.config.validation.best
        candidates = [name for name in names if name.endswith("recall@1")] + names
        name = wanted if wanted in names else next(iter(candidates), None)
        if name is None:
            return []
        samples, values = self._looks.column(name)
        lower = is_rank(name)
        value, at = min(zip(values, samples, strict=True), key=lambda one: one[0] * (lower or -1))
        edges = [dict(zip(*self._looks.column(f"{name}_{edge}"), strict=True)).get(at, value)
                 for edge in ("low", "high")]  # fmt: skip
        unit = "rank" if lower else "fraction"
        figure = Figure(name, value, *edges, count=1, unit=unit, higher_is_better=not lower)
        return [Tile(f"Best {in_words(name)}", figure, f"after {short(at)} samples")]

    def _learning(self, page: Page) -> None:
        steps = self._steps
        charts = [
            steps.chart("Loss", {"loss": "loss"}),
            steps.chart("Accuracy within the batch", {"batch_accuracy": "pictures"}, "fraction"),
            steps.chart("Temperature", {"temperature": "temperature"}),
            steps.chart("Bias", {"bias": "bias"}),
            steps.chart(
                "Learning rate",
                {f"{part}_learning_rate": name for part, name in _PARTS.items()}
                if steps.has("image_learning_rate") or steps.has("text_learning_rate")
                else {"learning_rate": "learning rate"},
            ),
        ]
        if drawn := [chart for chart in charts if chart]:
            page.section("Training", "Means between the lines of metrics.jsonl.").charts(drawn)

    def _validation(self, page: Page) -> None:
        drawn = [
            chart
            for (title, unit), names in grouped(self._looks.names()).items()
            if (chart := self._looks.chart(title, names, unit, banded=True))
        ]
        if drawn:
            page.section(
                "Validation", "On what is held out; bands are 95 % bootstrap intervals."
            ).charts(drawn)

    def _norms(self, page: Page) -> None:
        drawn = []
        for kind, said in (
            ("gradient_norm", "Gradient"),
            ("update_norm", "Update of a step"),
            ("parameter_norm", "Weights"),
        ):
            names = {f"{part}_{kind}": name for part, name in _PARTS.items()}
            drawn.append(self._steps.chart(said, names, log=kind != "parameter_norm"))
        if drawn := [chart for chart in drawn if chart]:
            lead = (
                "Euclidean norms of the towers and of the rest (projections, loss); gradients "
                "before they are cut."
            )
            page.section("Norms", lead).charts(drawn)

    def _speed(self, page: Page) -> None:
        steps = self._steps
        charts = [
            steps.chart("Samples a second", {"samples_per_second": "samples/s"}),
            steps.chart("Model FLOP utilisation", {"mfu": "of the peak"}, "fraction"),
            steps.chart("Peak memory of the device", {"memory_peak_mb": "MB"}, "MB"),
        ]
        if not (drawn := [chart for chart in charts if chart]):
            return
        section = page.section(
            "Speed",
            "The peak is what a product of matrices reaches on this device in the precision of the "
            "towers, measured as the run began.",
        ).charts(drawn)
        budget = {said: steps.recent(name) for name, said in _BUDGET.items()}
        known = {said: value for said, value in budget.items() if value is not None}
        if sum(known.values()) > 0:
            section.subtitle(
                "How a step is spent",
                "Mean of the latest lines. The rest is tokens, changes to pictures, and measuring.",
            ).shares(known, unit="ms")

    def _made(self, page: Page) -> None:
        facts, config, last = self._facts, self._facts.config, self._last
        section = page.section("How it is made")
        if config.stages:
            ends = [*(stage.until for stage in config.stages), 1.0]
            sizes = [
                *((one.image_size, one.context_length) for one in config.stages),
                (None, None),
            ]
            section.table(
                ["Stage", "until", "pictures", "texts"],
                [
                    [
                        str(number),
                        f"{short(end * facts.steps * config.batch_size)} samples",
                        f"{size or config.model.image_size} px",
                        f"{length or config.model.context_length} tokens",
                    ]
                    for number, (end, (size, length)) in enumerate(
                        zip(ends, sizes, strict=True), start=1
                    )
                ],
            )
        data = config.data if isinstance(config.data, str) else [one.data for one in config.data]
        section.facts(
            {
                "Went wrong": {
                    "spikes of the loss": last.get("spikes", 0),
                    "steps skipped": last.get("skipped_steps", 0),
                    "bad samples": last.get("bad_samples", 0),
                    "captions cut": last.get("cut_captions", 0),
                },
                "Model": {
                    "image tower": config.model.image.name,
                    "text tower": config.model.text.name,
                    "parameters": facts.parameters,
                    "space": f"{config.model.dim} dimensions",
                    "loss": config.loss.name,
                    **({"goes on from": config.start_from} if config.start_from else {}),
                },
                "Data": {
                    "shards": data,
                    "samples": facts.samples,
                    "epochs": facts.steps * config.batch_size / facts.samples,
                },
                "Training": {
                    "batch": config.batch_size,
                    "rows at a time": config.micro_batch_size,
                    "optimiser": config.optimizer.name,
                    "learning rate": config.optimizer.learning_rate,
                    "schedule": config.optimizer.schedule,
                    "precision": config.precision,
                    "processes": facts.processes,
                    "device": facts.device,
                    "seed": config.seed,
                },
            }
        )


def short(count: int | float) -> str:
    """A count in few characters.

    >>> [short(one) for one in (0, 640, 12_800, 1_280_000, 12_800_000_000)]
    ['0', '640', '12.8 k', '1.28 M', '12.8 G']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{count:.4g}" if count < 100 else f"{count:.0f}"


def _split(said: str) -> tuple[str, str]:
    number, _, unit = said.partition(" ")
    return number, unit
