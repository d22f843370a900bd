"""Run a plain function on several processes that share a gloo group, with a time limit."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def _rank(rank: int, function: Callable, world: int, meeting: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        function(rank, world, *arguments)
    finally:
        if dist.is_initialized():  # Accelerate's end_training takes it down itself
            dist.destroy_process_group()


def run_ranks(function: Callable, world: int, *arguments: object, seconds: float = 120) -> None:
    """Call `function(rank, world, *arguments)` on `world` processes; any failure is raised here.

    They meet in a file, so no port is taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        context = start_processes(
            _rank,
            args=(function, world, meeting, arguments),
            nprocs=world,
            join=False,
            start_method="spawn",
        )
        assert context is not None
        until = time.monotonic() + seconds
        try:
            while not context.join(timeout=1):
                if time.monotonic() > until:
                    raise TimeoutError(f"{function.__name__}: not done in {seconds} s")
        finally:
            for process in context.processes:
                if process is not None:
                    process.kill()
