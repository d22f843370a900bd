"""Batch normalisation under gradient checkpointing: a pass that is repeated counts once."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle


def count_once(module: nn.Module) -> list[RemovableHandle]:
    """Let running statistics be moved by a forward pass, and not by its repetition on the way back.

    Without it, gradient checkpointing moves them twice a step.

    Args:
        module: has batch normalisation inside, or has none.

    Returns:
        Handles; `remove()` undoes it.
    """
    return [
        handle
        for part in module.modules()
        if isinstance(part, _BatchNorm)
        for handle in (
            part.register_forward_pre_hook(_hold),
            part.register_forward_hook(_release, always_call=True),
        )
    ]


def _hold(norm: _BatchNorm, _: Any) -> None:
    # A task of autograd is under way in the backward pass alone. A compiler repeats no updates.
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    if again and norm.training:
        norm.__dict__["held"] = norm.momentum, norm.num_batches_tracked
        norm.momentum, norm.num_batches_tracked = 0.0, None


def _release(norm: _BatchNorm, *_: Any) -> None:
    if held := norm.__dict__.pop("held", None):
        norm.momentum, norm.num_batches_tracked = held
