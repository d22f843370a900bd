"""Checkpoints of a run: when, which are kept, and how a run goes on from the newest whole one."""

import errno
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from align.checkpoint import checkpoints, fault, load_state, save_state
from align.checksums import altered
from align.folders import UNFINISHED, flush
from eval.results import Figure
from pipelines import run_folder
from pipelines.cadence import Cadence
from pipelines.config import ConfigError
from pipelines.health import weights_are_finite
from pipelines.training import Training

_BEST = "best.json"
_REMOVING = ".removing"
_DAMAGED = ".damaged"


class Saver:
    """Writes checkpoints at their cadence; keeps the newest and the best, forgets the others.

    All processes make one, and call what it has alike. `checkpoints/best.json` says which is the
    best, by what figure, of what data.

    Finite weights may be useless all the same, thrown far away by a step. A checkpoint is known to
    be good once a later step had a finite gradient (`is_good`); the newest of those is kept beyond
    the others until then.

    Args:
        training: the run, gone on with where that was asked for.
    """

    def __init__(self, training: Training) -> None:
        config = training.config
        self.cadence = Cadence(
            config.save_every, batch_size=config.batch_size, epoch=training.loader.num_samples
        )
        self._training = training
        self._saved = training.step or None  # the step of the newest checkpoint
        self._folder = config.out / "checkpoints"
        if training.accelerator.is_main_process:
            self._tidy()
        self._best, self._good = broadcast_object_list([self._known_best(), self._second()])

    def save(self) -> None:
        """Write a whole checkpoint of this step, unless there is one, then forget old ones.

        Raises:
            ValueError: weights are not finite any more.
            OSError: it could not be written, with what can be done about it.
        """
        training, config = self._training, self._training.config
        if self._saved == training.step:
            return
        if not weights_are_finite(training):
            raise self.useless(f"weights are not finite at step {training.step}")
        report = training.data_report()
        place = self._folder / _name(training.step)
        try:
            if training.accelerator.is_main_process:
                _flush_if_there(config.out / "metrics.jsonl")  # its lines are never behind
            save_state(
                place,
                module=training.objective,
                optimizer=training.optimizer,
                average=training.average,
                progress={
                    "step": training.step,
                    "skipped": training.skipped,
                    "bad_in_a_row": training.bad_in_a_row,
                    "scaler": training.scaler.state_dict(),
                    "loader": {"consumed": training.step * config.batch_size},
                    "log": training.ledger.state(),
                    "data": training.fingerprint,
                    "data_report": report,
                },
            )
            self._saved = training.step
            if training.accelerator.is_main_process:
                flush(config.out)  # the first one made the folder
                self._forget()
                run_folder.write_json(config.out / "data_report.json", report)
        except OSError as error:
            raise OSError(self._in_vain(place, error)) from error
        self.cadence.done()

    def is_good(self) -> None:
        """The newest checkpoint has been shown to be of use: what it was kept beside may go."""
        if self._saved is None or self._good == _name(self._saved):
            return
        self._good = _name(self._saved)
        if self._training.accelerator.is_main_process:
            self._forget()

    def useless(self, why: str) -> ValueError:
        """What to raise where nothing good follows; says what there is to go on from.

        A newest checkpoint that may be the first of what went wrong is set aside.
        """
        training, known = self._training, self._good
        out, suspect = training.config.out, None if self._saved is None else _name(self._saved)
        if known is not None and suspect != known:
            place = self._folder / str(suspect)
            if training.accelerator.is_main_process and place.exists():
                _set_aside(place)
        then = "there is no checkpoint: begin"
        if place := known or suspect:
            what = "last good" if known else "only"
            then = f"{place} is the {what} checkpoint, --resume goes on from it; or begin"
        return ValueError(f"{out}: {why}; {then} another run with a lower optimizer.learning_rate")

    def judge(self, figure: Figure | None, of: Mapping[str, Any] | None = None) -> None:
        """Keep the checkpoint of this step as the best one, where it is; all processes alike.

        Args:
            figure: by which the best is chosen, as it is now; None = there is none to choose by.
            of: the data that it is of, as JSON values: figures of other data are not compared.
        """
        if figure is None or not self._is_better(figure, of):
            return
        self.save()
        step = self._training.step
        self._best = {"checkpoint": _name(step), "step": step, **asdict(figure), "of": of}
        if self._training.accelerator.is_main_process:
            run_folder.write_json(self._folder / _BEST, self._best)
            self._forget()

    def _is_better(self, figure: Figure, of: Mapping[str, Any] | None) -> bool:
        best = self._best
        if best is None or best["name"] != figure.name or best.get("of") != of:
            return not math.isnan(figure.value)
        gain = figure.value - best["value"]
        return gain > 0 if figure.higher_is_better else gain < 0

    def _forget(self) -> None:
        """Remove what is neither new nor the best, nor the newest that is known to be good.

        Under another name, or a kill would leave half of it under this one.
        """
        found = checkpoints(self._training.config.out)
        best = None if self._best is None else self._best["checkpoint"]
        for old in found[: -self._training.config.keep]:
            if old.name not in (best, self._good):
                shutil.rmtree(old.rename(old.with_name(old.name + _REMOVING)), ignore_errors=True)

    def _tidy(self) -> None:
        """Clear away what a kill left, and what lies ahead of where the run goes on from."""
        for ending in (UNFINISHED, _REMOVING):
            for left in self._folder.glob(f"step_*{ending}"):
                shutil.rmtree(left, ignore_errors=True)
        for place in checkpoints(self._training.config.out):
            if int(place.name.removeprefix("step_")) > self._training.step:
                _set_aside(place)

    def _second(self) -> str | None:
        """The newest checkpoint but one: it is known to be good, as steps followed it."""
        return next((place.name for place in checkpoints(self._training.config.out)[-2:-1]), None)

    def _known_best(self) -> dict[str, Any] | None:
        """What is known of the best checkpoint, on the main process."""
        try:
            best = run_folder.read_json(self._folder / _BEST)
            known = {place.name for place in checkpoints(self._training.config.out)}
            return best if best["checkpoint"] in known else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _in_vain(self, place: Path, error: OSError) -> str:
        before = [one.name for one in checkpoints(self._training.config.out)]
        said = error.strerror or str(error)
        if not before:
            return f"{place}: {said}; there is no checkpoint yet: make room, then begin anew"
        if self._saved == self._training.step:
            return f"{place}: {said}; make room, then --resume goes on"
        return (
            f"{place}: {said}; no checkpoint was written, {before[-1]} is whole: make room, then "
            "--resume goes on from it"
        )


def resume(training: Training) -> None:
    """Go on from the newest whole checkpoint, where there is one; nothing is written.

    Raises:
        ConfigError: none is whole, the processes see different ones, or the data has changed.
        ValueError: it is one of another model.
    """
    place, skipped = _agreed_place(training)
    if place is None:
        return
    training.notes += [f"{line}; going on from {place.name}" for line in skipped]
    progress = load_state(
        place,
        module=training.objective,
        optimizer=training.optimizer,
        average=training.average,
    )
    if progress["data"] != training.fingerprint:
        raise ConfigError(
            f"{training.loader.manifest.place}: not the data this run was started with "
            f"(fingerprint {training.fingerprint[:12]}, before {progress['data'][:12]})"
        )
    training.step, training.skipped = progress["step"], progress["skipped"]
    training.bad_in_a_row = progress.get("bad_in_a_row", 0)
    training.scaler.load_state_dict(progress["scaler"])
    training.loader.load_state_dict(progress["loader"])
    training.earlier_report = progress["data_report"]
    training.ledger.restore(progress["log"])
    training.cut_captions = progress["data_report"]["cut_captions"]


def _agreed_place(training: Training) -> tuple[Path | None, list[str]]:
    """As `newest_whole`, of which all bytes were read, and the same on all processes.

    Raises:
        ConfigError: none is whole, or the processes see different ones.
    """
    config, accelerator = training.config, training.accelerator
    changed: dict[Path, str] = {}
    while True:
        place, lines = newest_whole(
            config.out, averaged=training.average is not None, changed=changed
        )
        ranks = gather_object([place.name if place else "no checkpoint"])
        if len(set(ranks)) > 1:
            other = next(rank for rank, name in enumerate(ranks) if name != ranks[0])
            raise ConfigError(
                f"{config.out}: process 0 finds {ranks[0]} there, process {other} {ranks[other]}; "
                "--resume needs a folder that all processes see"
            )
        if place is None:
            return None, lines
        part, parts = accelerator.process_index, accelerator.num_processes
        wrong = [one for one in gather_object([altered(place, part=part, parts=parts)]) if one]
        if not wrong:
            return place, lines
        changed[place] = wrong[0]


def newest_whole(
    out: Path, *, averaged: bool, changed: Mapping[Path, str] | None = None
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a line on each newer one that is damaged.

    Args:
        out: the run folder.
        averaged: whether its checkpoints have averaged weights.
        changed: what is known to be wrong with some, besides what `fault` finds.

    Raises:
        ConfigError: there are some, and none is whole.
    """
    lines = []
    for place in reversed(checkpoints(out)):
        wrong = (changed or {}).get(place) or fault(place, averaged=averaged)
        if wrong is None:
            return place, lines
        lines.append(f"{place} is damaged ({wrong})")
    if lines:
        raise ConfigError(
            f"{lines[0]}, and so is every other checkpoint there; move {out} away to begin anew"
        )
    return None, lines


@contextmanager
def telling_full_disks(out: Path) -> Iterator[None]:
    """Have an error of a full disk name the run folder: Python says only that there is no space.

    Raises:
        OSError: there was one.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        then = (
            "make room, then --resume goes on from the newest checkpoint"
            if checkpoints(out)
            else "make room, then begin anew: there is no checkpoint yet"
        )
        raise OSError(f"{out}: {error.strerror}; {then}") from error


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _name(step: int) -> str:
    return f"step_{step:09d}"


def _set_aside(place: Path) -> None:
    aside = place.with_name(place.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    place.rename(aside)


def _flush_if_there(path: Path) -> None:
    if path.exists():
        flush(path)
