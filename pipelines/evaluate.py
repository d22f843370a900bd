"""`align evaluate`: zero-shot classification and retrieval, every figure with its interval."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.bundle import is_bundle, load, record_results
from align.card import Result
from align.model import DualEncoder
from eval.prompts import class_prototypes, fill
from eval.results import Report, format_table
from eval.tasks import retrieval, zero_shot
from pipelines import run_folder
from pipelines.models import model_fingerprint
from pipelines.pairs import EmbeddedPairs, embed_pairs, left_out
from pipelines.schemas import EvaluateConfig, TaskConfig
from shards.manifest import Manifest


@dataclass(frozen=True)
class Evaluation:
    """A report and the embeddings behind it."""

    report: Report
    pairs: EmbeddedPairs


def run(config: EvaluateConfig) -> int:
    """Evaluate, print the table, keep the figures."""
    evaluations = evaluate(load(config.model), config)
    print(format_table(one.report for one in evaluations.values()))
    if config.out is not None:
        print(f"figures: {config.out / 'results.json'}")
    return 0


def evaluate(model: DualEncoder, config: EvaluateConfig) -> dict[str, Evaluation]:
    """Run every task; tasks on the same data share its embeddings."""
    started = time.perf_counter()
    embedded: dict[str, EmbeddedPairs] = {}
    evaluations: dict[str, Evaluation] = {}
    tasks = config.tasks
    if not tasks and config.data is not None:
        tasks = {
            "retrieval": TaskConfig(
                task="retrieval", data=config.data, caption_fields=config.caption_fields
            )
        }
    for title, task in tasks.items():
        place = rows_of(task)
        if place not in embedded:
            manifest = Manifest.open(task.data)
            if manifest.damage:
                print(f"{task.data}{left_out(manifest)}")
            embedded[place] = embed_pairs(
                model,
                manifest,
                where=task.where,
                batch_size=config.batch_size,
                caption_fields=task.caption_fields,
                max_bad_fraction=config.max_bad_fraction,
                strict=config.strict,
            )
        report = run_task(model, embedded[place], task, title=title)
        evaluations[title] = Evaluation(report, embedded[place])
    if config.out is not None:
        with run_folder.locked(config.out):
            run_folder.record(config.out, config)
            results = {
                "model": {
                    "path": config.model,
                    "fingerprint": model_fingerprint(model, config.model),
                },
                "seconds": round(time.perf_counter() - started, 2),
                "reports": [one.report.to_json() for one in evaluations.values()],
            }
            run_folder.write_json(config.out / "results.json", results)
    record_reports(config.model, [one.report for one in evaluations.values()])
    return evaluations


def record_reports(bundle: Path | str, reports: Iterable[Report]) -> None:
    """Keep figures with the bundle they are of, where it lies in a folder here.

    One that cannot be written to is left as it is, with a note: the figures are told elsewhere.
    """
    folder = Path(bundle)
    if not is_bundle(folder) or folder.resolve().parent.name == "snapshots":  # the hub's own cache
        return
    results = [
        Result(
            task=report.title or report.task,
            figure=figure.name,
            value=figure.value,
            low=figure.low,
            high=figure.high,
            count=figure.count,
            unit=figure.unit,
            higher_is_better=figure.higher_is_better,
            chance=figure.chance,
            protocol=report.protocol,
        )
        for report in reports
        for figure in report.figures
    ]
    try:
        record_results(folder, results)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        print(f"note: {folder}: the figures are not kept with the bundle ({reason})", flush=True)


def rows_of(task: TaskConfig) -> str:
    """What names the rows of a task: tasks of which it is equal share their embeddings."""
    return f"{task.data} {sorted(task.where.items())} {task.caption_fields}"


def run_task(
    model: DualEncoder,
    pairs: EmbeddedPairs,
    task: TaskConfig,
    *,
    title: str,
    encode: Callable[[list[str]], np.ndarray] | None = None,
) -> Report:
    """One task over embedded pairs.

    Args:
        model: what embedded them.
        pairs: the task's rows.
        task: what to do.
        title: of the report.
        encode: texts to rows, where `class_prompts` are embedded already; None = by the model.
    """
    protocol: dict[str, Any] = {
        "data": pairs.fingerprint,
        "where": task.where,
        "label": task.label,
        "bad_samples_left_out": pairs.bad,
    }
    if task.task == "retrieval":
        return retrieval_report(pairs, label=task.label, title=title, protocol=protocol)
    names, labels = numbered(pairs.values(task.label))
    classes = class_prototypes(
        encode or (lambda texts: model.encode_text(texts).numpy()),
        _written(names, task),
        task.templates,
    )
    protocol["templates"] = task.templates
    return zero_shot(pairs.images, classes, labels, names, title=title, protocol=protocol)


def class_prompts(pairs: EmbeddedPairs, task: TaskConfig) -> list[str]:
    """Every text that `run_task` embeds: a task's class names in its templates, if it has any."""
    if task.task == "retrieval":
        return []
    names, _ = numbered(pairs.values(task.label))
    return [fill(template, name) for name in _written(names, task) for template in task.templates]


def _written(names: list[str], task: TaskConfig) -> list[str]:
    """Class names as one would write them; captions stay as they are."""
    if task.label == "caption":
        return names
    return [name.replace("-", " ").replace("_", " ") for name in names]


def retrieval_report(
    pairs: EmbeddedPairs,
    *,
    label: str = "caption",
    title: str = "",
    protocol: dict[str, Any] | None = None,
) -> Report:
    """Retrieval both ways between the pictures and the distinct captions of a data set.

    A caption that several pictures of one label share is one candidate, and right for each of them.
    """
    _, labels = numbered(pairs.values(label))
    candidates = sorted(
        {(caption, number): row for row, (caption, number)
         in reversed(list(enumerate(zip(pairs.captions, labels.tolist(), strict=True))))}.values()
    )  # fmt: skip
    return retrieval(
        pairs.images,
        pairs.texts[candidates],
        image_labels=labels,
        text_labels=labels[candidates],
        title=title,
        protocol=protocol,
    )


def numbered(values: list[str]) -> tuple[list[str], np.ndarray]:
    """Distinct values in sorted order, and the number of each item's value."""
    names, labels = np.unique(np.array(values), return_inverse=True)
    return names.tolist(), labels.astype(np.int64)


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("evaluate")
