"""Parameter groups and the learning-rate schedule."""

import math

import torch
from torch import nn


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels decay; gains, biases and the temperature do not.

    Decay pulls weights towards zero, which is no sensible default for a gain or a temperature
    (Loshchilov and Hutter 2019; OpenCLIP and timm do the same).
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {
            "params": [parameter for parameter in trainable if parameter.ndim >= 2],
            "weight_decay": weight_decay,
        },
        {
            "params": [parameter for parameter in trainable if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]


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
