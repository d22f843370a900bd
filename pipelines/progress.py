"""What a long run shows and keeps of itself: a bar or plain lines, `metrics.jsonl`, signals."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm


class StopOnSignal:
    """Turns the first SIGINT or SIGTERM into a wish to stop; the second one acts as ever.

    A launcher passes on what the terminal or the scheduler has sent to its processes too, so what
    follows within two seconds is the first one still.

    Attributes:
        terminated: whether SIGTERM came, as from a scheduler that wants the machine back.
        interrupted: whether SIGINT came, as from Ctrl-C.

    Args:
        together: whether other processes would wait for this one, so that it never leaves alone.

    Example:
        >>> with StopOnSignal() as stop:
        ...     while not stop.asked:
        ...         step()
    """

    def __init__(self, *, together: bool = False) -> None:
        self.terminated = self.interrupted = False
        self._together = together
        self._at_once = False
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.terminated or self.interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it nothing is lost: a process that is alone ends with the first signal.

        After SIGTERM it does with code 0, by `SystemExit`.
        """
        self._at_once = not self._together
        try:
            if self._at_once and self.asked:
                self._leave()
            yield
        finally:
            self._at_once = False

    def _leave(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        os.write(1, b"stopped; there was nothing to save\n")  # a handler may not print
        raise SystemExit(0)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self.asked:
            if now - self._first > _SAME_SIGNAL_S:
                signal.signal(number, self._previous[number])
                signal.raise_signal(number)
            return
        self._first = now
        self.terminated, self.interrupted = number == signal.SIGTERM, number == signal.SIGINT
        if self._at_once:
            self._leave()

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


_SAME_SIGNAL_S = 2.0


@dataclass
class Ledger:
    r"""What a run remembers of its steps between two lines, and of its latest losses.

    It goes into checkpoints, so that a run that goes on writes the lines of one never stopped.
    Clocks are not in it: they tell of a process, not of the training.

    A loss is a spike where it is above the median of the (up to 100) before it by six times their
    spread, $1.4826 \cdot \mathrm{median} |x - \mathrm{median}(x)|$ (the standard deviation, of a
    normal distribution), and by a fifth of the median at least. Steps in a row are one spike.

    Attributes:
        sums: total and number of values since the last line, by name.
        recent: the latest finite losses, newest last.
        spikes: how many there were.
        spiking: whether the last step was part of one.
    """

    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    recent: list[float] = field(default_factory=list)
    spikes: int = 0
    spiking: bool = False

    def add(self, values: dict[str, float]) -> None:
        """Take in what a step measured; what is not finite counts as not measured."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            if math.isfinite(value):
                total, count = total + value, count + 1
            self.sums[name] = (total, count)

    def means(self) -> dict[str, float | None]:
        """Of everything since the last time, which is forgotten; None where nothing was finite."""
        found = {
            name: total / count if count else None for name, (total, count) in self.sums.items()
        }
        self.sums.clear()
        return found

    def judge(self, loss: float) -> float | None:
        """Take in a step's loss; the median before it where a spike begins, else None."""
        if not math.isfinite(loss):
            return None
        before, was_spiking = self.recent, self.spiking
        self.spiking, middle = False, 0.0
        if len(before) >= _FEW:
            middle = median(before)
            spread = 1.4826 * median(abs(value - middle) for value in before)
            self.spiking = loss > middle + max(6 * spread, 0.2 * abs(middle))
        self.recent = [*before[1 - _MANY :], loss]
        begins = self.spiking and not was_spiking
        self.spikes += begins
        return middle if begins else None

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "sums": {name: list(pair) for name, pair in self.sums.items()},
            "recent": list(self.recent),
            "spikes": self.spikes,
            "spiking": self.spiking,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self.recent = list(state["recent"])
        self.spikes, self.spiking = state["spikes"], state["spiking"]


_FEW, _MANY = 20, 100
"""Losses before one that it takes to call it a spike, and how many of them are looked at."""


@runtime_checkable
class Observer(Protocol):
    """Something that follows a run's lines: a page, a tracker."""

    def line(self, line: dict[str, Any]) -> None:
        """A line was written."""

    def end(self, error: BaseException | None = None) -> None:
        """No line follows; an error is what ended the run."""


class TrainingLog:
    """Collects what steps report and writes a line now and then.

    A line holds the mean since the last one of everything measured, samples per second, and how
    the time of a step was spent, in milliseconds: what a step measures as `*_ms` is averaged over
    the steps that did, and `other_ms` is what remains of a step. What is measured of some steps
    only, such as norms, is that of the step of the line.

    Args:
        path: the metrics file, one JSON object a line; None on processes that do not write.
        ledger: what was remembered before; it is kept up to date.
        steps: length of the run.
        done: steps already taken by the run this one goes on from.
        batch_size: samples in a step, of all processes.
        every: steps between lines; the last step has one in any case.
        observers: told of every line.
        best: the figure by which the best checkpoint is chosen; it is shown whatever task it is of.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        ledger: Ledger,
        steps: int,
        done: int,
        batch_size: int,
        every: int,
        observers: Sequence[Observer] = (),
        best: str | None = None,
    ) -> None:
        self.path = path
        self.ledger = ledger
        self.steps = steps
        self.every = every
        self.batch_size = batch_size
        self.observers = observers
        self.best = best
        self._steps = 0
        self._count = 0
        self._clocks = Ledger()
        self._since = self._first_ended = time.perf_counter()
        self._bar = tqdm(
            total=steps * batch_size,
            initial=done * batch_size,
            unit="samples",
            unit_scale=True,
            disable=None if path is not None else True,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._bar.close()
        for observer in self.observers:
            observer.end(error)

    def step(self, step: int, measured: dict[str, float]) -> dict[str, Any] | None:
        """Take in a step; returns the line where one is due, for the caller to complete."""
        self._count += 1
        self._steps += 1
        if self._steps == 1:  # it is slow: everything is used for the first time
            self._first_ended = time.perf_counter()
        if self._steps == _ENOUGH_TO_TELL and self._bar.disable:
            seconds = (time.perf_counter() - self._first_ended) / (_ENOUGH_TO_TELL - 1)
            left = seconds * (self.steps - step)
            self.say(f"about {duration(left)} to go at {self.batch_size / seconds:.0f} samples/s")
        self._clocks.add({name: one for name, one in measured.items() if name.endswith("_ms")})
        self.ledger.add({name: one for name, one in measured.items() if not name.endswith("_ms")})
        usual = self.ledger.judge(measured["loss"])
        if usual is not None:
            self.say(
                f"step {step:,}: a loss of {measured['loss']:.4g}, far above the {usual:.4g} of "
                "the steps before"
            )
        self._bar.update(self.batch_size)
        if not is_logged(step, every=self.every, steps=self.steps):
            return None
        now = time.perf_counter()
        line: dict[str, Any] = {"step": step, "samples": step * self.batch_size}
        line |= {**self.ledger.means(), "spikes": self.ledger.spikes}
        line["samples_per_second"] = self._count * self.batch_size / (now - self._since)
        line |= _budget(1000 * (now - self._since) / self._count, self._clocks.means())
        self._count, self._since = 0, now
        return line

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to the metrics and show it."""
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        names = {*_SHOWN, *_of_tasks(line), self.best}
        shown = {key: _short(value) for key, value in line.items() if key in names}
        if self._bar.disable:
            self.say("  ".join(f"{key} {value}" for key, value in shown.items()))
        else:
            self._bar.set_postfix({k: v for k, v in shown.items() if k != "samples"})
        for observer in self.observers:
            observer.line(line)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out of the next rate what is not training: saving, validation."""
        started = time.perf_counter()
        yield
        paused = time.perf_counter() - started
        self._since += paused
        self._first_ended += paused

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.path is not None:
            tqdm.write(text)


def is_logged(step: int, *, every: int, steps: int) -> bool:
    """Whether a line is due after so many steps."""
    return step % every == 0 or step == steps


def _budget(step_ms: float, clocks: dict[str, float | None]) -> dict[str, float]:
    """How a step was spent, and what share of the peak it reached, from the means of clocks.

    `loss_ms` is measured within `forward_backward_ms` of some steps, and is taken out of it in the
    proportion that it had there; `ideal_ms` is how long the step's arithmetic would take at the
    peak, and `mfu` its share of the whole step.
    """
    known = {name: value for name, value in clocks.items() if value is not None}
    ideal, around = known.pop("ideal_ms", None), known.pop("around_loss_ms", None)
    if "loss_ms" in known and around:
        share = min(1.0, known["loss_ms"] / around)
        both = known["forward_backward_ms"]
        known |= {"forward_backward_ms": (1 - share) * both, "loss_ms": share * both}
    known["other_ms"] = max(0.0, step_ms - sum(known.values()))
    return known if ideal is None else {**known, "mfu": ideal / step_ms}


_ENOUGH_TO_TELL = 3
"""Steps after which the time that is left can be told."""


def duration(seconds: float) -> str:
    """A time in words, to the second, minute or hour.

    >>> duration(90.0), duration(5400.0), duration(90_000.0)
    ('90 s', '90 min', '25 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _of_tasks(line: dict[str, Any]) -> list[str]:
    """The first figure of every task, of those that are called TITLE/FIGURE in a line."""
    first: dict[str, str] = {}
    for name in line:
        title, slash, _ = name.rpartition("/")
        if slash and f"{name}_low" in line:
            first.setdefault(title, name)
    return list(first.values())


def _short(value: int | float | None) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "unknown" if value is None else f"{value:.4g}"


_SHOWN = (
    *("samples", "loss", "batch_accuracy", "temperature", "samples_per_second"),
    *("image_to_text_recall@1", "text_to_image_recall@1"),
)
