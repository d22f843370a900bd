"""The state of training on disk: whole checkpoints, and how to go on from one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.folders import UNFINISHED, whole_folder


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
    try:
        module.load_state_dict(load_file(folder / "objective.safetensors"))
        if average is not None:
            average.load_state_dict(load_file(folder / "average.safetensors"))
        tensors = load_file(folder / "optimizer.safetensors")
        progress = json.loads((folder / "progress.json").read_text())
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} is no checkpoint of this model: {first}") from error
    names = dict(module.named_parameters())
    for key, tensor in tensors.items():
        slot, name = key.split("/", 1)
        parameter = names[name]
        moved = tensor if slot == "step" else tensor.to(parameter.device)
        optimizer.state[parameter][slot] = moved
    return progress


def checkpoints(folder: Path | str) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    found = Path(folder).glob("checkpoints/step_*/progress.json")
    return sorted(path.parent for path in found if not path.parent.name.endswith(UNFINISHED))


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{slot}/{name}": torch.as_tensor(value).contiguous()
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
        for slot, value in optimizer.state[parameter].items()
    }


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
