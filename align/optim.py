"""Parameter groups, optimisers by name, and the learning-rate schedule."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from torch import nn

from align.parameters import Learning, Rule, how_it_learns, named


def parameter_groups(
    module: nn.Module, *, weight_decay: float, rules: Iterable[Rule] = ()
) -> list[dict[str, Any]]:
    """Groups of parameters that learn alike; what is frozen is in none.

    A group has its `weight_decay`, its `rate` (which `set_learning_rate` multiplies by) and
    `use_fallback`: it tells optimisers that orthogonalise matrices, such as Muon, to leave tables,
    gains and biases to AdamW: a row of a table is an entry, not a direction of a map. Without rules
    there are four: matrices and kernels; embedding tables; gains and biases; the numbers of the
    loss, which are scalars: of them no process keeps a share, and no optimiser takes shares and
    whole tensors at once.

    Args:
        module: an objective, a model or a part.
        weight_decay: of what decays; see `align.parameters.how_it_learns`.
        rules: in order.

    Raises:
        ValueError: a rule matches nothing.
    """
    learning = how_it_learns(module, rules, weight_decay=weight_decay)
    groups: dict[tuple[Learning, bool], list[nn.Parameter]] = {}
    for name, parameter in named(module).items():
        if learning[name].rate:
            groups.setdefault((learning[name], not parameter.ndim), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": one.weight_decay,
            "use_fallback": kind != "matrix",
            "rate": one.rate,
        }
        for kind in ("matrix", "table", "gain")
        for (one, _), parameters in groups.items()
        if one.kind == kind
    ]


def build_optimizer(
    name: str, groups: list[dict[str, Any]], *, learning_rate: float, **options: Any
) -> torch.optim.Optimizer:
    """An optimiser by name: PyTorch's fused AdamW, or any of timm's.

    Args:
        name: `adamw`, or a name of `timm.optim.list_optimizers()`, such as `muon`; but `kron` and
            its variants, and `adahessian`.
        groups: from `parameter_groups`.
        learning_rate: of groups of rate 1.
        options: keyword arguments of the optimiser.

    Raises:
        ValueError: an unknown name or option, one that cannot be used, or nothing to optimise.
    """
    if not groups:
        raise ValueError("every parameter is frozen: there is nothing to optimise")
    optimizer = _build(name, groups, learning_rate, options)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def _build(
    name: str, groups: list[dict[str, Any]], learning_rate: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    try:
        if name == "adamw":
            return torch.optim.AdamW(groups, lr=learning_rate, fused=True, **options)
        if name in _REFUSED:
            raise ValueError(f"optimizer {name} {_REFUSED[name]}; choose another optimizer.name")
        known = [str(one) for one in list_optimizers() if one not in _REFUSED]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f" (near: {', '.join(near)})" if near else ""
            raise ValueError(f"unknown optimizer {name!r}{hint}; known: adamw, {', '.join(known)}")
        return create_optimizer_v2(groups, opt=name, lr=learning_rate, **options)
    except TypeError as error:
        raise ValueError(f"optimizer {name} does not take these options: {error}") from error


_REFUSED = {
    **dict.fromkeys(
        ("kron", "kronc", "kronw"),
        "draws from a generator that no checkpoint holds, so that no run could go on exactly",
    ),
    "adahessian": "needs gradients of gradients, which a step does not have",
}
"""Optimisers that timm has and training cannot use."""


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


def constant_factor(
    step: int, *, warmup: int, steps: int, cooldown: int, floor: float = 0.0
) -> float:
    r"""Likewise, constant between a linear warm-up and a linear cool-down over the last steps.

    $f + (1 - f) \tfrac{S - s}{c}$ for $s > S - c$ (Zhai et al. 2022, arXiv 2106.04560, section 3.5;
    Haegele et al. 2024, arXiv 2405.18392). Until the cool-down it does not depend on the length of
    the run. (A run of `align pretrain` keeps the length that it began with all the same.)
    """
    if step < warmup:
        return (step + 1) / warmup
    left = min(1.0, max(0, steps - step) / cooldown) if cooldown else 1.0
    return floor + (1 - floor) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The learning rate of this step: each group takes the share of it that is its `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate", 1.0)
