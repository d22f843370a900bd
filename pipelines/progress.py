"""What a long run shows and keeps of itself: a bar or plain lines, `metrics.jsonl`, signals."""

import json
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm


class StopOnSignal:
    """Turns the first SIGINT or SIGTERM into a wish to stop; the second one acts as ever.

    Example:
        >>> with StopOnSignal() as stop:
        ...     while not stop.asked:
        ...         step()
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.asked = True
        signal.signal(number, self._previous[number])

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class TrainingLog:
    """Collects what steps report and writes a line now and then.

    A line holds the mean since the last one of everything measured, samples per second, and how
    the time of a step was spent, in milliseconds.

    Args:
        path: the metrics file, one JSON object a line; None on processes that do not write.
        steps: length of the run.
        done: steps already taken by the run this one goes on from.
        batch_size: samples in a step, of all processes.
        every: steps between lines.
    """

    def __init__(
        self, path: Path | None, *, steps: int, done: int, batch_size: int, every: int
    ) -> None:
        self.path = path
        self.steps = steps
        self._steps = 0
        self.every = every
        self.batch_size = batch_size
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0
        self._since = time.perf_counter()
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

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, step: int, measured: dict[str, float]) -> dict[str, Any] | None:
        """Take in a step; returns the line where one is due, for the caller to complete."""
        self._count += 1
        self._steps += 1
        if self._steps == _ENOUGH_TO_TELL and self._bar.disable:
            seconds = (time.perf_counter() - self._since) / _ENOUGH_TO_TELL
            left = seconds * (self.steps - step)
            self.say(f"about {_duration(left)} to go at {self.batch_size / seconds:.0f} samples/s")
        for name, value in measured.items():
            self._sums[name] += value
        self._bar.update(self.batch_size)
        if step % self.every:
            return None
        now = time.perf_counter()
        line: dict[str, Any] = {"step": step, "samples": step * self.batch_size}
        line |= {name: total / self._count for name, total in self._sums.items()}
        line["samples_per_second"] = self._count * self.batch_size / (now - self._since)
        self._sums.clear()
        self._count, self._since = 0, now
        return line

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to the metrics and show it."""
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        shown = {
            key: f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            for key, value in line.items()
            if key in _SHOWN
        }
        if self._bar.disable:
            self.say("  ".join(f"{key} {value}" for key, value in shown.items()))
        else:
            self._bar.set_postfix({k: v for k, v in shown.items() if k != "samples"})

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out of the next rate what is not training: saving, validation."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.path is not None:
            tqdm.write(text)


_ENOUGH_TO_TELL = 3
"""Steps after which the time that is left can be told."""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


_SHOWN = (
    *("samples", "loss", "batch_accuracy", "temperature", "samples_per_second"),
    *("image_to_text_recall@1", "text_to_image_recall@1"),
)
