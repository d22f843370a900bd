"""What a run needs of memory, and what there is."""

import ctypes
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines.checkup.report import CheckUp, several, size
from pipelines.training import Training

_ROOMY = 0.8
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Weights:
    """Bytes of what a run keeps of its model.

    Attributes:
        parameters: The weights, with the statistics of normalisation.
        gradients: One for each parameter that is trained.
        optimizer: Its moments.
        average: The averaged weights.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int

    @property
    def checkpoint(self) -> int:
        """Of one checkpoint."""
        return self.parameters + self.optimizer + self.average

    def shared_by(self, processes: int, *, whole_gradients: bool) -> "Weights":
        """What each process keeps under `shard_weights`; in pieces, gradients stay whole."""
        return Weights(
            parameters=ceil(self.parameters / processes),
            gradients=self.gradients if whole_gradients else ceil(self.gradients / processes),
            optimizer=ceil(self.optimizer / processes),
            average=ceil(self.average / processes),
        )


def weigh(training: Training) -> Weights:
    """Measure them; the optimiser has its moments after its first step."""
    trained = [one for one in training.objective.parameters() if one.requires_grad]
    moments = [
        value
        for state in training.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return Weights(
        parameters=_bytes(_held(training.objective)),
        gradients=_bytes(trained),
        optimizer=_bytes(moments),
        average=_bytes(_held(training.average)) if training.average is not None else 0,
    )


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


@dataclass(frozen=True)
class Memory:
    """Bytes that one process of a run needs.

    Attributes:
        weights: What is kept of the model.
        activations: What a step holds for its backward pass, at the largest pictures.
        waiting: Batches that are decoded ahead.
        program: Libraries and the list of samples, before there is a model.
    """

    weights: Weights
    activations: int
    waiting: int
    program: int

    @property
    def on_device(self) -> int:
        """What lies where the model is."""
        return self.weights.checkpoint + self.weights.gradients + self.activations

    @property
    def on_host(self) -> int:
        """What the process holds besides."""
        return self.program + self.waiting


def check_memory(
    check: CheckUp, memory: Memory, *, device: torch.device, processes: int, batch: int
) -> None:
    """What the run will need against what the machine has left."""
    held = memory.weights
    check.table(
        [
            ("one process holds" if processes == 1 else f"each of {processes} processes holds", ""),
            ("weights", size(held.parameters)),
            ("gradients", size(held.gradients)),
            ("moments of the optimizer", size(held.optimizer)),
            ("average of the weights", size(held.average)),
            (f"activations of {several(batch, 'sample')}", size(memory.activations)),
            ("batches waiting", size(memory.waiting)),
            ("program and list of samples", size(memory.program)),
        ],
    )
    on_host = memory.on_host * processes
    if device.type == "cuda":
        _judge(check, "GPU memory", memory.on_device, free_memory(device))
    else:
        on_host += memory.on_device * processes
    _judge(check, "memory", on_host, free_memory(torch.device("cpu")))


def _judge(check: CheckUp, what: str, needed: int, there: int) -> None:
    check.numbers[what.replace(" ", "_").lower()] = {"needed": needed, "available": there}
    text = f"about {size(needed)} of the {size(there)} that can be had"
    advice = "lower micro_batch_size or batch_size, take smaller pictures, or fewer workers"
    if needed > there:
        check.problem(what, text, advice)
    else:
        check.judge(needed < _ROOMY * there, what, text, advice)


def free_memory(device: torch.device) -> int:
    """Bytes that a run could have there if this process ended, within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    lines = Path("/proc/meminfo").read_text().splitlines()
    there = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        folder = group if (group / limit).exists() else group / "memory"
        try:
            held = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
        there = min(there, most - now + int(held.get(cached, 0)))
    return there + resident()


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return _status("VmRSS")


@dataclass
class Amount:
    """Bytes that were found."""

    bytes: int = 0


@contextmanager
def held_for_backward() -> Iterator[Amount]:
    """Count what a forward pass keeps for its backward pass; weights count too."""
    amount, storages = Amount(), dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield amount
    amount.bytes = sum(storages.values())


@contextmanager
def peak_of(device: torch.device) -> Iterator[Amount]:
    """Measure the most that is held within, on the device or by this process, beyond before."""
    peak = Amount()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with suppress(AttributeError):  # memory that was freed before would hide what is taken now
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # without it only what exceeds all before is seen
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before = resident()
    yield peak
    peak.bytes = max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """A figure of this process, in bytes; where the system does not tell, its peak so far."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
