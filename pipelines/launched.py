"""Work that `accelerate launch` spreads over processes, without training: who there is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from pipelines.config import RunError
from pipelines.parallel import is_of_an_exchange
from pipelines.together import Share

_PATIENCE = timedelta(days=30)
"""Shares of work differ in length; of a process that died, the others are told at once."""


def processes() -> Accelerator:
    """What brings the device and the other processes; a process alone needs no launcher."""
    waiting = InitProcessGroupKwargs(timeout=_PATIENCE)
    on_cpu = not torch.accelerator.is_available()
    return Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[waiting])


def cores_each() -> int:
    """Cores for each of the processes that were launched on this machine, at least one."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // max(1, here))


@contextmanager
def ending_with_others(share: Share) -> Iterator[None]:
    """Turns the death of another process into one line.

    Raises:
        RunError: an exchange between processes failed.
    """
    try:
        yield
    except RuntimeError as error:
        if share.alone or not is_of_an_exchange(error):
            raise
        raise RunError(
            f"process {share.rank} of {share.ranks} stops, since another one died; look there for "
            "the reason; the same command goes on"
        ) from error
