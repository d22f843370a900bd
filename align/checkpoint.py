"""The state of training on disk: whole checkpoints, and how to go on from one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.folders import damage, whole_folder


def save_state(
    folder: Path | str,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
    progress: dict[str, Any],
) -> None:
    """Write what training needs to go on as if it had never stopped.

    Weights, optimiser moments and the averaged weights go to safetensors, `progress` to JSON; no
    random state is kept, since randomness is a function of the step.

    Args:
        folder: written whole or not at all.
        module: the objective: model, temperature and all.
        optimizer: its per-parameter tensors are named after the parameters.
        average: the averaged weights, if any.
        progress: JSON values.
    """
    with whole_folder(folder) as beside:
        save_file(_contiguous(module.state_dict()), beside / "objective.safetensors")
        save_file(_optimizer_tensors(module, optimizer), beside / "optimizer.safetensors")
        if average is not None:
            save_file(_contiguous(average.state_dict()), beside / "average.safetensors")
        (beside / "optimizer.json").write_text(json.dumps(_optimizer_numbers(optimizer)) + "\n")
        (beside / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")


def load_state(
    folder: Path | str,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
) -> dict[str, Any]:
    """Put back what `save_state` wrote, in place; returns `progress`.

    Raises:
        ValueError: the folder is no whole checkpoint, or one of another model.
    """
    folder = Path(folder)
    names = dict(module.named_parameters())
    fused = {  # those whose optimiser wants even the count of steps on the device
        parameter
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    try:
        module.load_state_dict(load_file(folder / "objective.safetensors"))
        if average is not None:
            average.load_state_dict(load_file(folder / "average.safetensors"))
        tensors = load_file(folder / "optimizer.safetensors")
        numbers = json.loads((folder / "optimizer.json").read_text())
        progress = json.loads((folder / "progress.json").read_text())
        for key, tensor in tensors.items():
            slot, name = key.split("/", 1)
            if slot.startswith(_GROUP):
                optimizer.param_groups[int(slot.removeprefix(_GROUP))][name] = tensor
                continue
            parameter = names[name]
            if slot != "step" or parameter in fused:
                tensor = tensor.to(parameter.device)
            if tensor.shape == parameter.shape:
                # Fused optimisers walk through memory: moments must lie as their parameter does.
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            optimizer.state[parameter][slot] = tensor
        for group, values in zip(optimizer.param_groups, numbers, strict=True):
            group.update(values)
    except (KeyError, OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is no checkpoint of this model: {damage(error)}") from error
    return progress


def checkpoints(folder: Path | str) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    found = Path(folder).glob("checkpoints/step_*/progress.json")
    return sorted(path.parent for path in found if path.parent.suffix == "")


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{slot}/{name}": torch.as_tensor(value).contiguous()
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
        for slot, value in optimizer.state[parameter].items()
    } | {
        f"{_GROUP}{number}/{name}": value
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if isinstance(value, Tensor)
    }


_GROUP = "group_"
"""Some optimisers count their steps in the group: LAMB in a tensor, Adan in a number."""


def _optimizer_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """The numbers of each group, such as a count of steps."""
    return [
        {
            name: value
            for name, value in group.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for group in optimizer.param_groups
    ]


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
