"""The state of training on disk: whole checkpoints, and how to go on from one."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from align.checksums import CHECKSUMS, checksum
from align.folders import UNFINISHED, damage, flush, json_object, whole_folder
from align.gather import world_size
from align.moments import GROUP, numbers_of, put_numbers, tensors_of


def save_state(
    folder: Path | str,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
    progress: dict[str, Any],
) -> None:
    """Write what training needs to go on as if it had never stopped; all processes must call it.

    Weights, optimiser moments and the averaged weights go to safetensors, the rest to JSON: nothing
    is pickled. No random state is kept, since randomness is a function of the step. A checksum of
    each file goes to `checksums.json`, see `align.checksums.altered`.

    Where the module's weights are shared out over processes (FSDP2), each of them writes its rows
    to files of its own, `objective-00001-of-00004.safetensors` and so on, and nothing is gathered;
    any number of processes, and one without shares, reads them back. Else the first process writes
    `objective.safetensors`, and the others wait.

    Args:
        folder: written whole or not at all; where there are shares, one that all processes see.
        module: the objective: model, temperature and all.
        optimizer: its per-parameter tensors and numbers are named after the parameters.
        average: the averaged weights, if any.
        progress: JSON values; those of the first process count.

    Raises:
        OSError: it could not be written, on every process, whichever of them failed.
        ValueError: the optimiser keeps what is neither a tensor nor a plain number.
    """
    folder = Path(folder)
    is_first = world_size() == 1 or dist.get_rank() == 0
    tensors = {
        "objective": module.state_dict(),
        "optimizer": tensors_of(module, optimizer),
        **({} if average is None else {"average": average.state_dict()}),
    }
    shared_out = any(_is_split(tensor) for tensor in tensors["objective"].values())
    sums: dict[str, int] = {}
    beside = folder.with_name(folder.name + UNFINISHED)

    with ExitStack() as stack:

        def begin() -> None:
            if is_first:
                stack.enter_context(whole_folder(folder))

        def write() -> None:
            if not beside.is_dir():
                raise FileNotFoundError(
                    f"{beside} is not to be seen here: processes that share the weights out need "
                    "one folder that all of them see"
                )
            for kind, state in tensors.items():
                if shared_out:
                    path = _write_share(beside, kind, state)
                    sums[path.name] = checksum(path)
                elif is_first:
                    save_file(_contiguous(state), beside / f"{kind}.safetensors")
            if is_first:
                numbers = json.dumps(numbers_of(module, optimizer))
                (beside / "optimizer.json").write_text(numbers + "\n")
                (beside / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
                own = [path for path in beside.iterdir() if not _SHARE.fullmatch(path.name)]
                sums.update({path.name: checksum(path) for path in own})

        def conclude() -> None:
            if is_first:
                (beside / CHECKSUMS).write_text(json.dumps(everywhere, indent=2) + "\n")

        _together(begin)
        _together(write)
        everywhere = _united(sums)
        _together(conclude)
        _together(stack.close)


def load_state(
    folder: Path | str,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
) -> dict[str, Any]:
    """Put back what `save_state` wrote, in place; returns `progress`.

    The number of processes that wrote it does not matter; each reads the rows that it keeps.

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
        _fill(module.state_dict(), _Stored(folder, "objective"))
        if average is not None:
            _fill(average.state_dict(), _Stored(folder, "average"))
        moments = _Stored(folder, "optimizer")
        numbers = json.loads((folder / "optimizer.json").read_text())
        progress = json_object(folder, "progress.json")
        optimizer.state.clear()
        for key in moments.shapes:
            slot, name = key.split("/", 1)
            if slot.startswith(GROUP):
                value = moments.read(key)
                optimizer.param_groups[int(slot.removeprefix(GROUP))][name] = value
                continue
            parameter = names[name]
            if moments.shapes[key] == list(parameter.shape):
                # Fused optimisers walk through memory: moments must lie as their parameter does.
                value = torch.empty_like(parameter, dtype=moments.dtype(key), requires_grad=False)
                _fill_one(key, value, moments)
            else:
                value = moments.read(key)
            if slot != "step" or parameter in fused:
                value = value.to(parameter.device)
            optimizer.state[parameter][slot] = value
        put_numbers(module, optimizer, numbers)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is no checkpoint of this model: {damage(error)}") from error
    return progress


def checkpoints(folder: Path | str) -> list[Path]:
    """The checkpoints of a run folder, oldest first; a disk may have damaged them, see `fault`."""
    found = Path(folder).glob("checkpoints/step_*/progress.json")
    return sorted(path.parent for path in found if path.parent.suffix == "")


def fault(folder: Path | str, *, averaged: bool) -> str | None:
    """Why a checkpoint is not whole, in a line: a file is missing, cut off or no JSON; else None.

    Looks at sizes and heads of files, and not at the numbers in them: that is for
    `align.checksums.altered`, which reads every byte.

    Args:
        folder: the checkpoint.
        averaged: whether it has averaged weights.
    """
    folder = Path(folder)
    try:
        for kind in ("objective", "optimizer", *(("average",) if averaged else ())):
            _Stored(folder, kind)
        json_object(folder, "progress.json")
        if not isinstance(json.loads((folder / "optimizer.json").read_text()), list):
            raise ValueError("its optimizer.json holds no list")
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if error.filename else str(error)
    except (OSError, ValueError, SafetensorError) as error:
        return damage(error)
    return None


class _Stored:
    """The tensors of one kind in a checkpoint, whoever wrote which rows of them.

    Attributes:
        shapes: of the whole tensors, by name.

    Raises:
        OSError: a file is missing.
        ValueError: some rows are.
        SafetensorError: a file is cut off.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.shapes: dict[str, list[int]] = {}
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # start, stop, file
        totals: dict[str, int] = {}
        for path in _files(folder, kind):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path.name}: {damage(error)}") from error
            rows = json.loads((file.metadata() or {}).get(_ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                shape = file.get_slice(name).get_shape()
                count = shape[0] if shape else 1
                start, totals[name] = rows.get(name, (0, count))
                self._pieces.setdefault(name, []).append((start, start + count, file))
                self.shapes[name] = [totals[name], *shape[1:]] if shape else []
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            ends = [0, *(stop for _, stop, _ in pieces)]
            if [start for start, _, _ in pieces] != ends[:-1] or ends[-1] != totals[name]:
                raise ValueError(f"rows of {name} are missing")

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor's numbers."""
        _, _, file = self._pieces[name][0]
        return file.get_slice(name)[:0].dtype if self.shapes[name] else self.read(name).dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, from its files alone that hold them."""
        pieces = self._pieces[name]
        if not self.shapes[name]:
            return pieces[0][2].get_tensor(name)
        stop = self.shapes[name][0] if stop is None else stop
        found = [
            file.get_slice(name)[max(start, first) - first : min(stop, last) - first]
            for first, last, file in pieces
            if max(start, first) < min(stop, last)
        ]
        return torch.cat(found) if found else pieces[0][2].get_slice(name)[:0]


_ROWS = "rows"
"""Key in the head of a file with shares: of each tensor, its first row and how many there are."""


def _files(folder: Path, kind: str) -> list[Path]:
    """The files of one kind.

    Raises:
        FileNotFoundError: there are none, or some are missing.
    """
    shares = [(path, _SHARE.fullmatch(path.name)) for path in folder.glob(f"{kind}-*.safetensors")]
    counts = {int(match["of"]) for _, match in shares if match}
    if not counts:
        path = folder / f"{kind}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path.name} is missing")
        return [path]
    paths = [_share(folder, kind, number, max(counts)) for number in range(max(counts))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is missing")
    return paths


_SHARE = re.compile(r"[a-z]+-\d+-of-(?P<of>\d+)\.safetensors")


def _share(folder: Path, kind: str, number: int, of: int) -> Path:
    return folder / f"{kind}-{number + 1:05d}-of-{of:05d}.safetensors"


def _write_share(folder: Path, kind: str, tensors: dict[str, Tensor]) -> Path:
    """What this process has to write: its rows of what is split; the first one, all else too."""
    rank = dist.get_rank()
    mine: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        local, start, is_writer = _rows_here(tensor)
        if not is_writer:
            continue
        if _is_split(tensor):
            if not len(local):  # fewer rows than processes
                continue
            rows[name] = (start, len(tensor))
        mine[name] = local
    path = _share(folder, kind, rank, world_size())
    save_file(_contiguous(mine), path, metadata={_ROWS: json.dumps(rows)})
    flush(path)  # by whoever wrote it: on a network's file system nobody else can
    return path


def _is_split(tensor: Any) -> bool:
    """Whether this process has some rows of a tensor only, as FSDP2 leaves it."""
    return any(not placement.is_replicate() for placement in getattr(tensor, "placements", ()))


def _rows_here(tensor: Any) -> tuple[Tensor, int, bool]:
    """What this process has of a tensor, which row is its first, and whether to write it is ours.

    Raises:
        ValueError: it is cut otherwise than into contiguous rows.
    """
    if not hasattr(tensor, "placements"):
        return tensor, 0, world_size() == 1 or dist.get_rank() == 0
    mesh, start, splits, is_writer = tensor.device_mesh, 0, 0, True
    for dim, placement in enumerate(tensor.placements):
        number = mesh.get_local_rank(dim)
        if placement.is_replicate():
            is_writer &= number == 0
        elif placement.is_shard(0) and not splits:
            splits += 1
            start = min(number * -(-len(tensor) // mesh.size(dim)), len(tensor))
        else:
            raise ValueError(f"a tensor is spread as {tensor.placements}; only rows can be saved")
    return tensor.to_local(), start, is_writer


def _fill(state: dict[str, Tensor], stored: _Stored) -> None:
    """Copy stored tensors into those of a module, which they must match.

    Raises:
        ValueError: they do not.
    """
    for name in [*(state.keys() - stored.shapes), *(stored.shapes.keys() - state)]:
        place = "here" if name in state else "in the checkpoint"
        raise ValueError(f"{name} is {place} only")
    for name, tensor in state.items():
        _fill_one(name, tensor, stored)


@torch.no_grad()
def _fill_one(name: str, tensor: Tensor, stored: _Stored) -> None:
    if stored.shapes[name] != list(tensor.shape):
        raise ValueError(f"{name} is {list(tensor.shape)} here and {stored.shapes[name]} there")
    local, start, _ = _rows_here(tensor)
    local.copy_(stored.read(name, start, start + len(local)) if local.ndim else stored.read(name))


def _together(action: Callable[[], None]) -> None:
    """Do something on all processes; where it fails on one of them, all of them fail.

    Else the others would wait for it, as long as it takes them to give up.
    """
    error: Exception | None = None
    try:
        action()
    except SafetensorError as caught:  # its name for a full disk, among others
        error = OSError(damage(caught))
    except Exception as caught:
        error = caught
    if world_size() > 1:
        said: list[str | None] = [None] * world_size()
        dist.all_gather_object(said, None if error is None else damage(error))
        failed = [f"process {rank}: {one}" for rank, one in enumerate(said) if one is not None]
        if failed and error is None:
            raise OSError(failed[0])
    if error is not None:
        raise error


def _united(sums: dict[str, int]) -> dict[str, int]:
    """What all processes know of their files, on every one of them."""
    ranks = [sums] * world_size()
    if world_size() > 1:
        dist.all_gather_object(ranks, sums)
    return {name: one for known in ranks for name, one in known.items()}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
