"""Work on rows that processes share: whole batches each, and what they found, in order.

Batches are the same ones for any number of processes, and so is what is computed from them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from align.folders import damage
from pipelines.config import ConfigError, RunError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process's share of work on rows.

    Attributes:
        rank: which of the processes this is.
        ranks: how many there are.
        device: where rows are exchanged.
    """

    rank: int = 0
    ranks: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Share":
        """That of a process that trains with others."""
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.device)

    @property
    def alone(self) -> bool:
        """Whether this process has all of the work."""
        return self.ranks == 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that computes figures and writes."""
        return self.rank == 0

    def rows(self, total: int, *, batch_size: int) -> range:
        """The rows of this process: whole batches that follow each other.

        Args:
            total: rows in all.
            batch_size: rows of a batch; the last one of all may have fewer.
        """
        batches = -(-total // batch_size)
        ends = (batches * (self.rank + more) // self.ranks for more in (0, 1))
        start, stop = (min(total, end * batch_size) for end in ends)
        return range(start, stop)

    def told(self, value: T) -> list[T]:
        """What every process says, by rank; on all of them. It goes through pickle."""
        if self.alone:
            return [value]
        said: list[T] = [value] * self.ranks
        dist.all_gather_object(said, value)
        return said

    def refuse_different_data(self, prints: Mapping[str, str]) -> None:
        """All processes must have the same samples, or some would be seen twice and others never.

        Args:
            prints: this process's fingerprints of data sets, by their place.

        Raises:
            ConfigError: they differ, such as by a quarantine list in the cache of one machine.
        """
        said = self.told(list(prints.values()))
        for place, found in zip(prints, zip(*said, strict=True), strict=True):
            if len(set(found)) > 1:
                raise ConfigError(
                    f"{place}: the processes see different samples (fingerprints "
                    f"{', '.join(sorted({one[:12] for one in found}))}); have the same shards and "
                    "the same quarantine.json on every machine"
                )

    def gathered(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "total dim"]:
        """All processes' rows by rank, on the CPU of every one.

        Each receives `(ranks - 1) * (rows of the largest share) * dim * 4` bytes.
        """
        if self.alone:
            return rows
        sizes = self.told(len(rows))
        padded = torch.zeros(max(sizes), rows.shape[1], device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size].cpu() for part, size in zip(parts, sizes, strict=True)])

    def all_or_none(self, work: Callable[[], T]) -> T:
        """What this process's part of the work returns, where no process fails at its own.

        Raises:
            ConfigError: one finds data or configuration at fault, on all of them.
            RunError: another process fails otherwise; that one raises what it met.
        """
        if self.alone:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # whatever it is, the others would wait for it
            failure = error
        is_fault = isinstance(failure, ValueError | OSError)
        if failure is None:
            said = None
        elif is_fault:
            said = str(failure)
        else:
            said = f"process {self.rank} stops: {type(failure).__name__}: {damage(failure)}"
        told = self.told(None if said is None else (is_fault, said))
        failed = [one for one in told if one is not None]
        if failure is not None and not is_fault:
            raise failure
        if failed:
            kind = ConfigError if failed[0][0] else RunError
            raise kind(failed[0][1]) from failure
        return result  # pyright: ignore[reportReturnType] - nothing failed

    def equalise_buffers(self, module: nn.Module) -> None:
        """Have the main process's running statistics everywhere: each process keeps its own."""
        if self.alone:
            return
        with torch.no_grad():
            for buffer in module.buffers():
                whole = buffer.contiguous()
                dist.broadcast(whole, src=0)
                buffer.copy_(whole)


ALONE = Share()
"""All of the work."""
