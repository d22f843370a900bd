"""The collectives of the objective: every rank sees every row, and gradients come home."""

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

    Each rank receives `(ranks - 1) * batch * dim * 4` bytes forwards in fp32, and as many
    backwards.
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
        return _sum_at_owners(gradient.contiguous())


def _sum_at_owners(parts: Float[Tensor, "total dim"]) -> Float[Tensor, "batch dim"]:
    """The sum over ranks of their tensors, of which each rank gets its own rows only."""
    ranks = world_size()
    if dist.get_backend() == "nccl":
        mine = torch.empty_like(parts[: len(parts) // ranks])
        dist.reduce_scatter_tensor(mine, parts)
        return mine
    # gloo gives the whole sum to all of them; sending each its part to add up moves half of that.
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return received.unflatten(0, (ranks, -1)).sum(dim=0)


def logsumexp_over_ranks(logarithms: Float[Tensor, " total"]) -> Float[Tensor, " total"]:
    """The logarithm of the sum over ranks of the numbers whose logarithms these are; no gradient.

    Two reductions of `total * 4` bytes in fp32, each of which passes every rank twice.
    """
    if world_size() == 1:
        return logarithms
    greatest = logarithms.clone()
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    total = (logarithms - greatest).exp_()
    dist.all_reduce(total)
    return total.log_().add_(greatest)


def gather_labels(labels: Int[Tensor, " batch"]) -> Int[Tensor, " total"]:
    """All ranks' labels in rank order; no gradient."""
    if world_size() == 1:
        return labels
    parts = [torch.empty_like(labels) for _ in range(world_size())]
    dist.all_gather(parts, labels.contiguous())
    return torch.cat(parts)
