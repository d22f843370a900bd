"""The one collective of the objective: every rank sees every row, and gradients come home."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.nn import functional as collectives


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "total dim"]:
    """All ranks' rows in rank order, with gradient.

    The backward pass sums over ranks what each of them derived with respect to these rows, so the
    loss may be split over ranks in any way. Every rank must hold the same number of rows.

    Moves `(ranks - 1) * batch * dim * 4` bytes to each rank forwards, and the same backwards.
    """
    if world_size() == 1:
        return rows
    return torch.cat(collectives.all_gather(rows.contiguous()))


def gather_labels(labels: Int[Tensor, " batch"]) -> Int[Tensor, " total"]:
    """All ranks' labels in rank order; no gradient."""
    if world_size() == 1:
        return labels
    parts = [torch.empty_like(labels) for _ in range(world_size())]
    dist.all_gather(parts, labels.contiguous())
    return torch.cat(parts)
