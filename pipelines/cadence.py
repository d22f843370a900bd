"""What falls due after a step, the same on every process."""

import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from pipelines.schemas.values import unit_of


class Cadence:
    """Every so many samples, steps, epochs or minutes.

    All but minutes are functions of the step alone, so that a resumed run keeps time. Minutes are
    counted from when something was last done, or from the start; see `agreed`.

    Args:
        span: as `pipelines.schemas.values.Cadence` has it.
        batch_size: samples in a step.
        epoch: samples in an epoch.
    """

    def __init__(self, span: int | str, *, batch_size: int, epoch: int) -> None:
        number, unit = unit_of(span)
        self._batch_size = batch_size
        self._seconds = 60 * number if unit == "minutes" else None
        self._samples = {"steps": number * batch_size, "epochs": number * epoch}.get(unit, number)
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it falls due with the step just taken, by what was trained on."""
        if self._seconds is not None:
            return False
        done = step * self._batch_size
        return done // self._samples > (done - self._batch_size) // self._samples

    def elapsed(self) -> bool:
        """Whether it falls due by this process's clock; see `agreed`."""
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds

    def done(self) -> None:
        """Starts the clock anew."""
        self._since = time.monotonic()


def agreed(accelerator: Accelerator, wishes: Sequence[bool]) -> list[bool]:
    """Which of several wishes any process has: all act alike, or they would wait for ever.

    One exchange of a few bytes.
    """
    if accelerator.num_processes == 1:
        return list(wishes)
    flags = torch.tensor(list(wishes), dtype=torch.float32, device=accelerator.device)
    return (accelerator.reduce(flags) > 0).tolist()  # pyright: ignore
