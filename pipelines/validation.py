"""Evaluation while training: at its own cadence, by all processes, on what is held out."""

from dataclasses import replace
from typing import Any

import numpy as np

from align.model import DualEncoder
from eval.results import Figure, Report
from eval.tasks import DIRECTIONS
from pipelines.cadence import Cadence
from pipelines.config import ConfigError
from pipelines.evaluate import class_prompts, rows_of, run_task
from pipelines.pairs import EmbeddedPairs, chosen, embed_pairs, encode_shared
from pipelines.schemas import PretrainConfig, TaskConfig
from pipelines.together import Share
from pipelines.training import Training
from shards.captions import CaptionRule
from shards.damage import BadSample
from shards.decode import Limits
from shards.manifest import CAPTION_FIELD, JSON_FIELD, Manifest
from shards.read import ShardReader

PLAIN = "validation"
"""Title of the retrieval on `validation.data`; its figures go by their names alone."""
_BATCH = 256
_LOOKED_AT = 2000


class Validation:
    """Measures the weights that would be saved: retrieval on held-out pairs, and any tasks.

    Every process embeds its share of the pictures and texts, the main process computes; the figures
    do not depend on how many there are. Nothing of the training changes: not its weights, running
    statistics or random numbers.

    Args:
        training: the run.

    Attributes:
        wanted: whether there is anything to measure.
        last: the newest reports; on the main process.
        figures: their figures by name, `TITLE/NAME` for those of tasks; on every process.
        measured_at: the step they are of.

    Raises:
        ConfigError: a task cannot be run on its data, or nothing measures `validation.best`.
        ValueError: there is no such data.
    """

    def __init__(self, training: Training) -> None:
        config = training.config
        self.cadence = Cadence(
            config.validation.every,
            batch_size=config.batch_size,
            epoch=training.loader.num_samples,
        )
        self.last: list[Report] = []
        self.figures: dict[str, Figure] = {}
        self.measured_at: int | None = None
        self._training = training
        self._share = Share.of(training.accelerator)
        self._tasks = tasks_of(config)
        self.wanted = bool(self._tasks)
        refuse_unknown_best(config)
        with training.accelerator.main_process_first():  # a scan is made once
            self._manifests = opened(self._tasks)
        prints = {str(place): one.fingerprint for place, one in self._manifests.items()}
        self._share.refuse_different_data(prints)
        self._share.all_or_none(self._check)

    def _check(self) -> None:
        if self._share.is_main:
            for title, task in self._tasks.items():
                check_task(title, task, self._manifests[task.data])

    def run(self) -> dict[str, Any]:
        """Measure; returns every figure with the ends of its interval (`NAME_low`, `NAME_high`)."""
        training = self._training
        self.last = self._measure()
        figures = {
            figure.name if report.title == PLAIN else f"{report.title}/{figure.name}": figure
            for report in self.last
            for figure in report.figures
        }
        self.figures = self._share.told(figures)[0]
        self.measured_at = training.step
        self.cadence.done()
        line: dict[str, Any] = {"samples": training.step * training.config.batch_size}
        for name, figure in self.figures.items():
            line |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        return line

    @property
    def best(self) -> Figure | None:
        """The figure by which the best checkpoint is kept, as it was measured last."""
        name = self._training.config.validation.best
        if name is None or name not in self.figures:
            return None
        return replace(self.figures[name], name=name)

    @property
    def best_of(self) -> dict[str, Any] | None:
        """The data that figure is of: fingerprint and `where`."""
        name = self._training.config.validation.best
        if name is None:
            return None
        task = self._tasks[name.rpartition("/")[0] or PLAIN]
        return {"data": self._manifests[task.data].fingerprint, "where": task.where}

    def _measure(self) -> list[Report]:
        training, share = self._training, self._share
        config, model = training.config, training.chosen_model
        share.equalise_buffers(model)
        embedded: dict[str, EmbeddedPairs] = {}
        reports: list[Report] = []
        for title, task in self._tasks.items():
            place = rows_of(task)
            if place not in embedded:
                embedded[place] = embed_pairs(
                    model,
                    self._manifests[task.data],
                    where=task.where,
                    batch_size=_BATCH,
                    image_size=training.image_size,
                    context_length=training.context_length,
                    caption_fields=task.caption_fields,
                    max_bad_fraction=config.max_bad_fraction,
                    strict=config.strict,
                    share=share,
                )
            reports += self._report(model, embedded[place], task, title)
        return reports

    def _report(
        self, model: DualEncoder, pairs: EmbeddedPairs, task: TaskConfig, title: str
    ) -> list[Report]:
        """The report of a task; none on other processes than the main one."""
        share = self._share
        prompts = list(dict.fromkeys(class_prompts(pairs, task)))
        length = self._training.context_length
        rows = encode_shared(model, prompts, batch_size=_BATCH, context_length=length, share=share)
        place = {prompt: row for row, prompt in enumerate(prompts)}

        def embedded(texts: list[str]) -> np.ndarray:
            return rows[[place[text] for text in texts]]

        def compute() -> list[Report]:
            return [run_task(model, pairs, task, title=title, encode=embedded)]

        return share.all_or_none(compute if share.is_main else list)


def tasks_of(config: PretrainConfig) -> dict[str, TaskConfig]:
    """Everything that a run measures while it trains, by title."""
    wanted = config.validation
    if wanted.data is None:
        return wanted.tasks
    plain = TaskConfig(
        task="retrieval",
        data=wanted.data,
        where=wanted.where,
        caption_fields=config.caption_fields,
    )
    return {PLAIN: plain, **wanted.tasks}


def opened(tasks: dict[str, TaskConfig]) -> dict[str, Manifest]:
    """The data sets of tasks by their place, each opened once."""
    return {place: Manifest.open(place) for place in {task.data: None for task in tasks.values()}}


FIGURES = {
    "retrieval": [
        f"{direction}_{what}"
        for direction in DIRECTIONS
        for what in ("recall@1", "recall@5", "recall@10", "median_rank")
    ],
    "zero_shot": ["top1", "top5", "mean_per_class_recall"],
}
"""What each task measures."""


def refuse_unknown_best(config: PretrainConfig) -> None:
    """The figure that tells the best checkpoint must be one that is measured.

    Raises:
        ConfigError: it is not; those that are are listed.
    """
    best = config.validation.best
    known = [
        name if title == PLAIN else f"{title}/{name}"
        for title, task in tasks_of(config).items()
        for name in FIGURES[task.task]
    ]
    if best is not None and best not in known:
        told = f"known: {', '.join(known)}" if known else "nothing is: give validation.data"
        raise ConfigError(f"validation.best: no figure {best!r} is measured; {told}")


def check_task(title: str, task: TaskConfig, manifest: Manifest) -> None:
    """See before the first step whether a task can be run: some of its samples are read.

    Raises:
        ConfigError: no sample is wanted, one lacks its label, or all are of one class.
    """
    key = PLAIN if title == PLAIN else f"validation.tasks.{title}"
    rule = CaptionRule(tuple(task.caption_fields))
    wanted_fields = [name for name in (CAPTION_FIELD, JSON_FIELD) if name in manifest.fields]
    total = len(manifest)
    first = np.unique(np.linspace(0, total - 1, min(total, _LOOKED_AT)).round().astype(int))
    rest = np.setdiff1d(np.arange(total), first)
    labels: set[str] = set()
    reader = ShardReader(manifest)
    try:
        for looked, row in enumerate([*first.tolist(), *rest.tolist()]):
            if looked >= len(first) and labels:
                break
            try:
                captions, fields = rule.read(reader.read(row, wanted_fields), Limits())
            except BadSample:
                continue  # counted and named when it is embedded
            if not chosen(fields, task.where):
                continue
            if task.label != "caption" and task.label not in fields:
                known = ", ".join(["caption", *sorted(fields)])
                raise ConfigError(
                    f"{key}.label: a sample in {manifest.place} has no field {task.label!r}; it "
                    f"has {known}"
                )
            labels.add(captions[0] if task.label == "caption" else str(fields[task.label]))
    finally:
        reader.close()
    if not labels:
        raise ConfigError(f"{key}: where={task.where} leaves no sample of {manifest.place}")
    if task.task == "zero_shot" and len(labels) < 2 and total <= _LOOKED_AT:
        raise ConfigError(
            f"{key}: all samples have one {task.label}; zero_shot needs two classes at least"
        )
    if task.task == "zero_shot" and (bad := [x for x in task.templates if not _has_place(x)]):
        raise ConfigError(f"{key}.templates: {bad[0]!r} has no place for the name: write {{}}")


def _has_place(template: str) -> bool:
    return "{}" in template or "{c}" in template
