"""Parameter groups, optimisers by name, and the learning-rate schedule."""

import difflib
import math
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from torch import nn


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Three groups: matrices and kernels; embedding tables; gains, biases and the temperature.

    The last do not decay: it pulls weights towards zero, which is no sensible default for a gain
    or a temperature (Loshchilov and Hutter 2019; OpenCLIP and timm do the same). `use_fallback`
    tells optimisers that orthogonalise matrices, such as Muon, to leave the last two to AdamW: a
    row of a table is an entry, not a direction of a map.
    """
    tables = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
    }
    matrices: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    gains: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            kind = gains if parameter.ndim < 2 else matrices
            (embeddings if id(parameter) in tables else kind).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "use_fallback": False},
        {"params": embeddings, "weight_decay": weight_decay, "use_fallback": True},
        {"params": gains, "weight_decay": 0.0, "use_fallback": True},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, groups: list[dict[str, Any]], *, learning_rate: float, **options: Any
) -> torch.optim.Optimizer:
    """An optimiser by name: PyTorch's fused AdamW, or any of timm's.

    Args:
        name: `adamw`, or a name of `timm.optim.list_optimizers()`, such as `muon`.
        groups: from `parameter_groups`.
        learning_rate: of all groups.
        options: keyword arguments of the optimiser.

    Raises:
        ValueError: an unknown name or option.
    """
    try:
        if name == "adamw":
            return torch.optim.AdamW(groups, lr=learning_rate, fused=True, **options)
        known = [str(one) for one in list_optimizers()]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f" (near: {', '.join(near)})" if near else ""
            raise ValueError(f"unknown optimizer {name!r}{hint}; known: adamw, {', '.join(known)}")
        return create_optimizer_v2(groups, opt=name, lr=learning_rate, **options)
    except TypeError as error:
        raise ValueError(f"optimizer {name} does not take these options: {error}") from error


def cosine_factor(step: int, *, warmup: int, steps: int, floor: float = 0.0) -> float:
    r"""The learning rate of step `step` (from 0) as a share of its peak.

    Linear warm-up, $(s + 1) / w$ for $s < w$; then half a cosine to `floor`
    (Loshchilov and Hutter 2017, arXiv 1608.03983):
    $f + (1 - f) \tfrac12 (1 + \cos \pi \tfrac{s - w}{S - w})$.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
