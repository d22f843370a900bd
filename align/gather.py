"""The one collective of the objective: every rank sees every row, and gradients come home."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "total dim"]:
    """All ranks' rows in rank order, with gradient.

    The backward pass sums over ranks what each of them derived with respect to these rows, so the
    loss may be split over ranks in any way. Every rank must hold the same number of rows.

    Moves `(ranks - 1) * batch * dim * 4` bytes to each rank forwards; backwards the same on NCCL,
    about twice that on gloo.
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows)  # pyright: ignore


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        mine = torch.empty_like(gradient[: len(gradient) // world_size()])
        if dist.get_backend() == "nccl":
            dist.reduce_scatter_tensor(mine, gradient.contiguous())
            return mine
        # gloo scatters nothing it has reduced: every rank gets the whole sum and keeps its part.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[dist.get_rank()]


def gather_labels(labels: Int[Tensor, " batch"]) -> Int[Tensor, " total"]:
    """All ranks' labels in rank order; no gradient."""
    if world_size() == 1:
        return labels
    parts = [torch.empty_like(labels) for _ in range(world_size())]
    dist.all_gather(parts, labels.contiguous())
    return torch.cat(parts)
