"""How the objective is spread over processes: a copy on each, or a share of the weights on each.

Both give the loss and the gradients of one process with the whole batch. `spread` is called before
the optimiser is made, since that has to be made of the shares.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from align.model import DualEncoder
from align.objective import ContrastiveObjective
from pipelines.config import ConfigError, RunError
from pipelines.schemas import PretrainConfig

SHARDED_OPTIMIZERS = ("adamw",)
"""Those whose step is the same on a share of a tensor as on all of it."""


@runtime_checkable
class Spread(Protocol):
    """An objective, spread.

    Attributes:
        wrapped: the objective as it is called.
    """

    wrapped: Any

    def silence(self) -> AbstractContextManager[Any]:
        """Within it, gradients are not exchanged."""
        ...

    def whole(self, model: DualEncoder) -> DualEncoder:
        """The model, or the averaged one, with all of its weights on this process.

        All processes must call it.
        """
        ...


class Copies:
    """Every process has all weights; gradients are averaged (`DistributedDataParallel`).

    Each step moves about twice the bytes of the gradients to and from each process.
    """

    def __init__(self, objective: ContrastiveObjective, accelerator: Accelerator) -> None:
        self.wrapped = accelerator.prepare_model(objective)
        self._accelerator = accelerator

    def silence(self) -> AbstractContextManager[Any]:
        """Within it, gradients are not exchanged."""
        return self._accelerator.no_sync(self.wrapped)

    def whole(self, model: DualEncoder) -> DualEncoder:
        """The model itself."""
        return model


class Shares:
    """Every process keeps its share of weights, gradients and optimiser state (FSDP2).

    Each block of a tower is gathered when it is needed and forgotten again (Rajbhandari et al.
    2020, arXiv 1910.02054, stage 3; Zhao et al. 2023, arXiv 2304.11277). Each step moves about
    three times the bytes of the weights to each process, and those of one forward pass more where
    the batch is worked through in pieces. The numbers of the loss (temperature, bias) are scalars,
    of which there are no shares: each process has them whole.

    Args:
        objective: sharded in place, on the device it is to stay on.
        average: its running average, made before; sharded likewise.
        device: kind of the device.
    """

    def __init__(
        self, objective: ContrastiveObjective, average: AveragedModel | None, device: str
    ) -> None:
        self.wrapped = objective
        self._skeleton = _without_weights(objective.model)
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        averaged = [] if average is None else [cast(Any, average.module).model]
        for model in (objective.model, *averaged):
            _shard(model, mesh)
        self._root = cast(FSDPModule, objective.model)
        for parameter in objective.parameters():
            if not isinstance(parameter, DTensor) and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_average_gradient)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Within it, gradients are not exchanged, and each process keeps whole ones."""
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    @torch.no_grad()
    def whole(self, model: DualEncoder) -> DualEncoder:
        """A copy of a sharded model with all of its weights; all processes must call it."""
        found = copy.deepcopy(self._skeleton)
        state = {
            name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
            for name, value in model.state_dict().items()
        }
        found.load_state_dict(state, assign=True)
        return found.train(model.training)


def spread(
    objective: ContrastiveObjective,
    average: AveragedModel | None,
    config: PretrainConfig,
    accelerator: Accelerator,
) -> Spread:
    """Spread an objective over the processes there are, compiled where that is asked for.

    Raises:
        ConfigError: what was asked for does not go with shares of the weights.
    """
    model = objective.model
    if not wants_shares(config, accelerator):
        if config.compile:  # behind the copy that is averaged, which is only evaluated
            for tower in (model.image, model.text):
                tower.compile()
        return Copies(objective, accelerator)
    refuse_unfit_for_shares(config)
    if config.compile:  # each block by itself, since weights are gathered between them
        for block in model.image.blocks():
            block.compile()
        for block in model.text.blocks():
            block.compile(dynamic=True)
    return Shares(objective, average, accelerator.device.type)


def refuse_unfit_for_shares(config: PretrainConfig) -> None:
    """See whether all that was asked for goes with shares of the weights.

    Raises:
        ConfigError: it does not.
    """
    if config.optimizer.name not in SHARDED_OPTIMIZERS:
        raise ConfigError(
            f"shard_weights: optimizer.name {config.optimizer.name} does not work on shares of "
            f"the weights; known: {', '.join(SHARDED_OPTIMIZERS)}"
        )
    if config.precision == "fp16":
        raise ConfigError("shard_weights: precision fp16 does not go with it; take bf16 or fp32")


def running_average(
    objective: ContrastiveObjective, config: PretrainConfig, accelerator: Accelerator
) -> AveragedModel | None:
    """The running average of the weights, where one is wanted; made before they are spread."""
    decay = config.optimizer.average
    if not decay:
        return None
    # No one call takes both shares and whole tensors.
    how: dict[str, Any] = (
        {"avg_fn": get_ema_avg_fn(decay)}
        if wants_shares(config, accelerator)
        else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    )
    average = AveragedModel(objective, use_buffers=True, **how)
    cast(ContrastiveObjective, average.module).loss.forget_samples()
    return average


def wants_shares(config: PretrainConfig, accelerator: Accelerator) -> bool:
    """Whether each process keeps its share: by `shard_weights`, or a launch configured for FSDP.

    One process has nothing to share.
    """
    # On CPUs, Accelerate does not say of itself that it was launched so.
    launched = accelerator.distributed_type == DistributedType.FSDP or parse_flag_from_env(
        "ACCELERATE_USE_FSDP"
    )
    return (config.shard_weights or launched) and accelerator.num_processes > 1


def _shard(model: DualEncoder, mesh: Any) -> None:
    for part in (*model.parameters(), *model.buffers()):
        part.data = part.data.contiguous()
        dist.broadcast(part.data, 0)
    scalars = {parameter for parameter in model.parameters() if not parameter.ndim}
    for tower in (model.image, model.text):
        for block in tower.blocks():
            fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars)


def _without_weights(model: DualEncoder) -> DualEncoder:
    """A copy without memory for weights; a sharded module can no longer be copied."""
    memo = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad)
        for one in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def accelerator_of(config: PretrainConfig) -> Accelerator:
    """What brings the device and the other processes, which wait no longer than they are told.

    The precision of the towers is ours to set. Without a GPU, Accelerate has to be told so, or
    processes that a launcher started would each train alone.
    """
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=config.rank_timeout_s))
    # Running statistics are read by evaluation alone, which sees to them itself; and what a loss
    # keeps of every sample is the same everywhere, and large.
    copies = DistributedDataParallelKwargs(broadcast_buffers=False)
    on_cpu = not torch.accelerator.is_available()
    return Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[waiting, copies])


@contextmanager
def stopping_with_others(config: PretrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """Turns the failure of an exchange between processes into one line.

    Gloo tells at once of a process that died, and after `rank_timeout_s` of one that hangs. NCCL
    tells of both after that time, and by itself ends the process then, with lines of its own.

    Raises:
        RunError: an exchange failed.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not is_of_an_exchange(error):
            raise
        raise RunError(
            f"process {accelerator.process_index} of {accelerator.num_processes} stops, since "
            f"another one died or did not answer within rank_timeout_s "
            f"({config.rank_timeout_s:g} s); look there for the reason; the same command with "
            "--resume goes on from the newest checkpoint"
        ) from error


def is_of_an_exchange(error: RuntimeError) -> bool:
    """Whether an error says that processes could not exchange something."""
    marks = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(mark in str(error) for mark in marks)


def share_statistics(
    objective: ContrastiveObjective, accelerator: Accelerator
) -> ContrastiveObjective:
    """Let batch normalisation see the whole batch of all processes, where it can.

    PyTorch shares the statistics on GPUs only; elsewhere a line says what that means.
    """
    has = any(isinstance(part, _BatchNorm) for part in objective.modules())
    if accelerator.num_processes == 1 or not has:
        return objective
    if accelerator.device.type == "cuda":
        convert_sync_batchnorm(objective.model)  # in place, below the model
        return objective
    accelerator.print(
        "note: the towers have batch normalisation, whose statistics are those of each process's "
        "own rows on this device: results depend a little on the number of processes"
    )
    return objective


def statistics_of_pieces(
    objective: ContrastiveObjective, config: PretrainConfig, *, processes: int
) -> str:
    """A line where batch normalisation that learns sees only pieces of the batch, else nothing."""
    micro, local = config.micro_batch_size, config.batch_size // processes
    objective.train()  # what is frozen stays in evaluation, where statistics are fixed
    has = any(isinstance(part, _BatchNorm) and part.training for part in objective.modules())
    if micro is None or micro >= local or not has:
        return ""
    return (
        "note: the towers have batch normalisation, whose statistics are those of each piece of "
        f"{micro} rows: micro_batch_size changes what is learnt; gradient_checkpointing saves "
        "memory without that"
    )


def over_ranks(accelerator: Accelerator, metrics: dict[str, Tensor]) -> dict[str, float]:
    """Means over processes: the numbers of the global batch."""
    values = torch.stack([value.float() for value in metrics.values()])
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="mean")
    return dict(zip(metrics, values.tolist(), strict=True))  # pyright: ignore


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Cut the gradient of all processes to a length; returns the length that it had.

    Whole gradients are the same on all processes; of sharded ones each process gives its part.
    """
    learning = [one for one in parameters if one.grad is not None]
    parts = [[one for one in learning if isinstance(one, DTensor) is of] for of in (False, True)]
    parts = [part for part in parts if part]  # no one call takes both kinds
    norms = []
    for part in parts:
        norm = get_total_norm([one.grad for one in part if one.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    length = norm.item()
    if not length < max_norm - _LEAST_CUT:  # else all of them would be multiplied by 1
        for part in parts:
            clip_grads_with_norm_(part, max_norm, norm)
    return length


_LEAST_CUT = 1e-6
"""What PyTorch adds to a length before it divides by it."""
