"""What an optimiser keeps, by the names of parameters: tensors, and plain numbers."""

from typing import Any

import torch
from torch import Tensor, nn

GROUP = "group_"
"""Some optimisers count their steps in the group: LAMB in a tensor, Adan in a number."""
_STATE = "state"
"""Key of plain numbers of parameters among those of the first group."""


def tensors_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors: `SLOT/PARAMETER`, or `group_NUMBER/NAME` for those of groups.

    Raises:
        ValueError: the optimiser keeps something that is neither a tensor nor a plain number.
    """
    found = {}
    for name, parameter in module.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{slot}/{name}"] = value
            elif not _is_plain(value):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {slot} of "
                    f"{name}, which cannot be saved; choose another optimizer.name"
                )
    return found | {
        f"{GROUP}{number}/{name}": value
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if isinstance(value, Tensor)
    }


def numbers_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The numbers of each group, such as a count of steps; with the first, those of parameters.

    Numbers of parameters are `{"state": {PARAMETER: {SLOT: VALUE}}}`, truth values and None too.
    """
    groups: list[dict[str, Any]] = [
        {
            name: value
            for name, value in group.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for group in optimizer.param_groups
    ]
    own = {
        name: {slot: value for slot, value in kept.items() if _is_plain(value)}
        for name, parameter in module.named_parameters()
        if (kept := optimizer.state.get(parameter))
    }
    groups[0][_STATE] = {name: kept for name, kept in own.items() if kept}
    return groups


def put_numbers(
    module: nn.Module, optimizer: torch.optim.Optimizer, numbers: list[dict[str, Any]]
) -> None:
    """Put back what `numbers_of` gave, each as the type it was.

    Raises:
        KeyError: there is no such parameter.
        ValueError: there are more groups, or fewer, or what is given is nothing of the kind.
    """
    if not all(isinstance(values, dict) for values in numbers):
        raise ValueError("the numbers of an optimiser's groups are not by name")
    names = dict(module.named_parameters())
    for group, values in zip(optimizer.param_groups, numbers, strict=True):
        for name, kept in dict(values.get(_STATE, {})).items():
            optimizer.state[names[name]].update(kept)
        group.update({name: value for name, value in values.items() if name != _STATE})


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float)
