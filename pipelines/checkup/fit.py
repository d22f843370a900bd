"""Whether a run fits its data and its machine: order, folder, weights, disk."""

import fcntl
import math
import os
import shutil
from pathlib import Path

import torch

from align.bundle import refuse_place
from align.checkpoint import checkpoints
from pipelines.checkup.memory import Weights
from pipelines.checkup.report import CheckUp, several, size
from pipelines.config import ConfigError
from pipelines.pretrain import bundle_of, refuse_to_mix
from pipelines.schemas import PretrainConfig
from pipelines.schemas.values import samples_of, steps_of
from pipelines.training import Training

_MANY_EPOCHS = 100
_FEW_LANES = 8
_ROOMY = 0.8


def check_order(
    check: CheckUp, config: PretrainConfig, *, samples: int, shards: int, processes: int
) -> None:
    """Batch size, lanes and processes against the data, and how often it comes round."""
    possible = [count for count in range(1, config.lanes + 1) if config.lanes % count == 0]
    if config.lanes % processes:
        check.problem(
            "lanes",
            f"{config.lanes} lanes cannot be shared by {processes} processes, but by "
            f"{', '.join(map(str, possible))}",
            f"lanes={-(-config.lanes // processes) * processes} and a batch_size that it divides, "
            "or another number of processes",
        )
    else:
        check.judge(
            config.lanes >= _FEW_LANES or shards <= config.lanes,
            "lanes",
            f"{config.lanes}, for {', '.join(map(str, possible))} processes with any number of "
            f"workers; {several(shards, 'shard')}",
            f"a batch draws from only {config.lanes} places of the data: more lanes mix better",
        )
    micro = config.micro_batch_size
    if micro is not None and config.batch_size % (micro * processes):
        check.problem(
            "pieces",
            f"micro_batch_size {micro} on {several(processes, 'process')} does not divide "
            f"batch_size {config.batch_size}",
            "another micro_batch_size",
        )
    if config.batch_size > samples:
        check.note(
            "batch",
            f"{config.batch_size:,} is more than the {samples:,} samples there are: each batch "
            "holds some of them twice",
            "lower batch_size",
        )
    steps = steps_of(config.samples, batch_size=config.batch_size, epoch=samples)
    epochs = steps * config.batch_size / samples
    text = f"{steps:,} steps of {config.batch_size:,} are {epochs:.1f} epochs"
    if epochs < 1:
        check.note("length", f"{text}: not every sample is seen", "raise samples")
    elif epochs > _MANY_EPOCHS:
        check.note("length", f"{text}, which is many for so few samples", "lower samples")
    else:
        check.ok("length", text)
    every = samples_of(config.save_every, batch_size=config.batch_size, epoch=samples)
    if math.inf > every > steps * config.batch_size:
        check.note("saving", "no checkpoint before the end", "lower save_every")


def check_out(check: CheckUp, config: PretrainConfig) -> None:
    """Whether the run folder is free, or holds this run; nothing is written into it."""
    out = config.out
    if out.exists() and not out.is_dir():
        check.problem("out", f"{out} is a file", "choose another folder for the run")
        return
    if _is_held(out / ".lock"):
        check.problem("out", f"{out}: another run is at work here", "choose another out, or wait")
        return
    parent = _existing(out)
    if not os.access(parent, os.W_OK | os.X_OK):
        check.problem("out", f"{parent} cannot be written to", "choose another out")
        return
    with check.trying("bundle"):
        refuse_place(bundle_of(config))
        above = _there(bundle_of(config).absolute().parent)
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            check.problem("bundle", f"{above} cannot be written to", "choose another bundle")
    found = checkpoints(out)
    if not found:
        check.ok("out", f"{out} is free")
        return
    try:
        refuse_to_mix(config.model_copy(update={"resume": True}))
    except ConfigError as error:
        check.problem("out", str(error), "choose another out, or the configuration it had")
        return
    text = f"{out} holds this run up to {found[-1].name}"
    check.judge(config.resume, "out", text, "add --resume to go on with it, or choose another out")


def _there(path: Path) -> Path:
    """The nearest above that is there, a folder or not."""
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock file; it is neither made nor kept."""
    try:
        with lock.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def check_weights(check: CheckUp, training: Training) -> None:
    """Whether the weights that the run begins with are numbers."""
    named = {**dict(training.objective.named_parameters())}
    bad = [name for name, one in named.items() if not bool(torch.isfinite(one).all())]
    count = sum(one.numel() for one in named.values())
    if bad:
        check.problem(
            "weights", f"{bad[0]} is not finite", "choose other weights or an earlier checkpoint"
        )
    else:
        sizes = sorted({training.image_size, training.config.model.image_size})
        check.ok(
            "model",
            f"{count / 1e6:.1f} M parameters, all finite; pictures of "
            f"{', '.join(map(str, sizes))} px; optimizer {training.config.optimizer.name}",
        )


def check_disk(check: CheckUp, config: PretrainConfig, weights: Weights) -> None:
    """Whether the checkpoints fit: those that are kept, and one more while it is written."""
    there = sum(path.stat().st_size for path in config.out.glob("checkpoints/**/*.safetensors"))
    places = {
        config.out: max(0, weights.checkpoint * (config.keep + 1) - there),
        bundle_of(config): weights.parameters,
    }
    devices: dict[int, tuple[Path, int]] = {}
    for place, needed in places.items():
        parent = _existing(place)
        device = parent.stat().st_dev
        devices[device] = (parent, devices.get(device, (parent, 0))[1] + needed)
    for parent, needed in devices.values():
        free = shutil.disk_usage(parent).free
        text = (
            f"{size(needed)} of the {size(free)} that are free in {parent}; a checkpoint has "
            f"{size(weights.checkpoint)}, and {config.keep + 1} are there at a time"
        )
        if needed > free:
            check.problem("disk", text, "free some space, lower keep, or choose another out")
        else:
            check.judge(needed < _ROOMY * free, "disk", text, "it is nearly full: free some space")
