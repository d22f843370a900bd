"""What is measured of the steps that are logged, and where the figures go beside the run folder.

Other steps are left alone: what is expensive to know (accuracy, norms, exact times on a GPU) is
asked for where a line is due, and nowhere else.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils.flop_counter import FlopCounterMode

from align.model import DualEncoder
from align.objective import ContrastiveObjective, Pairs
from pipelines.config import ConfigError
from pipelines.progress import is_logged
from pipelines.schemas import PretrainConfig

if TYPE_CHECKING:
    from pipelines.training import Training

PARTS = {"model.image.": "image", "model.text.": "text"}
"""What stands in figures' names for the towers; all else (projections, loss) is the head."""


class Probe:
    r"""Measures one step, where it is logged; else it costs nothing.

    Norms are Euclidean, over all numbers of a part: `image` and `text` are the towers, `head` is
    projections and loss. A gradient's norm is that before it was cut; an update's is
    $|\theta_{new} - \theta_{old}|$. A part in which nothing learns has neither.

    Args:
        training: the run, before the step.
    """

    def __init__(self, training: "Training") -> None:
        config = training.config
        self.on = is_logged(training.step + 1, every=config.log_every, steps=training.steps)
        self._training = training
        self._device = training.accelerator.device
        self._figures: dict[str, float] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._loss_seconds = 0.0

    def now(self) -> float:
        """The time, in seconds; once all work that was asked for is done, where that matters."""
        if self.on and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def ideal(self, pairs: Pairs, *, dtype: torch.dtype) -> dict[str, float]:
        """How long the step's arithmetic would take at the peak of the device; see `FlopMeter`."""
        if not self.on:
            return {}
        return {"ideal_ms": self._training.meter.ideal_ms(self._training, pairs, dtype=dtype)}

    @contextmanager
    def watch_loss(self) -> Iterator[None]:
        """Within it, the time that the loss takes is noted: forwards and backwards."""
        if not self.on:
            yield
            return
        loss, began, home = self._training.objective.loss, [0.0], [0.0]

        def enter(_module: nn.Module, rows: tuple[Any, ...]) -> None:
            for one in rows[:2]:
                if one.requires_grad:
                    one.register_hook(lambda _gradient: home.append(self.now()))
            began[0] = self.now()

        def leave(_module: nn.Module, _rows: tuple[Any, ...], value: Tensor) -> None:
            self._loss_seconds += self.now() - began[0]
            if value.requires_grad:
                value.register_hook(lambda _gradient: began.append(self.now()))

        handles = [loss.register_forward_pre_hook(enter), loss.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if len(began) > 1 and len(home) > 1:
            self._loss_seconds += home[-1] - began[-1]

    def before_update(self, norm: float) -> None:
        """Look at the gradients, cut or not, and keep the weights.

        Args:
            norm: of the whole gradient before it was cut.
        """
        if not self.on:
            return
        most = self._training.config.optimizer.max_grad_norm
        cut = min(1.0, most / (norm + 1e-6))  # as torch.nn.utils.clip_grads_with_norm_ has it
        for part, parameters in self._learning().items():
            gradients = [one.grad for one in parameters if one.grad is not None]
            self._figures[f"{part}_gradient_norm"] = norm_of(gradients) / cut if cut else norm
            self._before[part] = [one.detach().clone() for one in parameters]

    def after_update(self) -> dict[str, float]:
        """What is known of the step now: norms, learning rates, memory, the time of the loss."""
        if not self.on:
            return {}
        training, figures = self._training, self._figures
        for part, parameters in self._learning().items():
            before = self._before.pop(part)
            for old, new in zip(before, parameters, strict=True):
                old.sub_(new.detach())
            figures[f"{part}_update_norm"] = norm_of(before)
        for part, parameters in by_part(training.objective).items():
            figures[f"{part}_parameter_norm"] = norm_of([one.detach() for one in parameters])
        figures |= learning_rates(training.objective, training.optimizer)
        if (bias := training.objective.loss.logit_bias) is not None:
            figures["bias"] = bias.detach().item()
        if self._device.type == "cuda":
            figures["memory_peak_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return figures

    def clocks(
        self, started: float, derived: float, updating: float, updated: float
    ) -> dict[str, float]:
        """Milliseconds of the parts of a step; on a GPU, which works behind, where it is logged."""
        if not self.on and self._device.type != "cpu":
            return {}
        around = {"forward_backward_ms": derived - started, "optimizer_ms": updated - updating}
        if self.on:
            around |= {"around_loss_ms": derived - started, "loss_ms": self._loss_seconds}
        return {name: 1000 * seconds for name, seconds in around.items()}

    def _learning(self) -> dict[str, list[nn.Parameter]]:
        return by_part(self._training.objective, learning=True)


def part_of(name: str) -> str:
    """The part that a parameter of an objective belongs to, in figures' names."""
    return next((part for start, part in PARTS.items() if name.startswith(start)), "head")


def by_part(
    objective: ContrastiveObjective, *, learning: bool = False
) -> dict[str, list[nn.Parameter]]:
    """The parameters, or those that learn, by part; parts without any are left out."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad or not learning:
            found.setdefault(part_of(name), []).append(parameter)
    return found


def norm_of(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all numbers of some tensors; where they are shares, of the whole.

    All processes must call it then.
    """
    tensors, squares = list(tensors), 0.0
    for spread in (False, True):
        alike = [one for one in tensors if isinstance(one, DTensor) is spread]
        if alike:
            norm = get_total_norm(alike)
            squares += (norm.full_tensor() if isinstance(norm, DTensor) else norm).item() ** 2
    return squares**0.5


def learning_rates(
    objective: ContrastiveObjective, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """The highest learning rate of all groups; and of each part, where they differ."""
    part = {id(one): part_of(name) for name, one in objective.named_parameters()}
    highest: dict[str, float] = {}
    for group in optimizer.param_groups:
        for one in group["params"]:
            name = part[id(one)]
            highest[name] = max(highest.get(name, 0.0), float(group["lr"]))
    parts = {f"{name}_learning_rate": rate for name, rate in highest.items()}
    return {
        "learning_rate": max(highest.values()),
        **(parts if len(set(highest.values())) > 1 else {}),
    }


# --- arithmetic ---


class FlopMeter:
    """How long the arithmetic of a step would take at the peak of this device.

    A step's floating-point operations are counted by `torch.utils.flop_counter`, in a forward pass
    of the first rows that come at a new size (of pictures and texts), and once for all: matrix
    products, convolutions and attention, two for a multiplication and its addition. The backward
    pass is twice the forward pass where all of a tower learns, nothing where it is locked, and in
    between it goes by the share of its weights that learn. What is computed a second time, to save
    memory, does not count, and neither does the loss (model FLOPs: Chowdhery et al. 2022, arXiv
    2204.02311, appendix B). Captions of other batches are a little longer or shorter.

    The peak is $2 n^3 / t$ of a product of two square matrices in the precision of the towers, the
    quickest of several; $n$ is 4096 on a GPU and 512 on a CPU, with the threads that training has.
    """

    def __init__(self) -> None:
        self._peak: float | None = None
        self._of_size: dict[tuple[int, int], float] = {}

    def ideal_ms(self, training: "Training", pairs: Pairs, *, dtype: torch.dtype) -> float:
        """Milliseconds for the FLOPs of a step of this process at the peak.

        Counts and measures at the first call; all processes must make it with the same sizes.

        Args:
            training: the run.
            pairs: this process's rows of the step.
            dtype: what the towers compute in.
        """
        device = training.accelerator.device
        if self._peak is None:
            self._peak = peak_flops(device, dtype)
        size = (pairs.images.shape[-1], training.context_length)
        if size not in self._of_size:
            piece = pairs.piece(0, training.pieces)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                count = count_flops(training.objective.model, piece)
            self._of_size[size] = count / len(piece.labels)
        return 1000 * self._of_size[size] * len(pairs.labels) / self._peak


class _NoModules(nullcontext[None]):
    """In place of the counter's account by module, which trips over views made without a graph."""

    parents = ("Global",)


def count_flops(model: DualEncoder, pairs: Pairs) -> float:
    """Model FLOPs of a step on some pairs, forwards and backwards, as `FlopMeter` says.

    Nothing of the model is changed.
    """
    forward = {"image": 0.0, "image_projection": 0.0, "text_projection": 0.0}
    counter, handles = FlopCounterMode(display=False), []
    counter.mod_tracker = _NoModules()  # pyright: ignore[reportAttributeAccessIssue]
    for name in forward:

        def enter(*_: Any, name: str = name) -> None:
            forward[name] -= counter.get_total_flops()

        def leave(*_: Any, name: str = name) -> None:
            forward[name] += counter.get_total_flops()

        part = model.get_submodule(name)
        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
            model(pairs.images, pairs.ids, pairs.mask)
    finally:
        for handle in handles:
            handle.remove()
        for buffer, was in zip(model.buffers(), before, strict=True):
            buffer.copy_(was)
    forward["text"] = counter.get_total_flops() - sum(forward.values())
    return sum(
        count * (1 + 2 * learning_share(model.get_submodule(name)))
        for name, count in forward.items()
    )


def learning_share(module: nn.Module) -> float:
    """Share of a module's weights that learn, by number; of one without any, none."""
    sizes = [(one.numel(), one.requires_grad) for one in module.parameters()]
    return sum(size for size, learns in sizes if learns) / max(1, sum(size for size, _ in sizes))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product, as `FlopMeter` says; in 0.1 s."""
    side, at_once = (4096, 10) if device.type == "cuda" else (512, 1)
    values = torch.arange(side * side, device=device).remainder(251).div(251)
    matrix = values.reshape(side, side).to(dtype)
    product = torch.empty_like(matrix)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    quickest, until = float("inf"), 0.0
    while not until or time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(at_once):
            torch.mm(matrix, matrix, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        quickest = min(quickest, time.perf_counter() - started)
        until = until or time.perf_counter() + 0.1  # the first one warms up
    return 2.0 * side**3 * at_once / quickest


# --- trackers ---


def refuse_missing_trackers(config: PretrainConfig) -> None:
    """See before a run begins whether the packages of its trackers are there.

    Raises:
        ConfigError: one is not.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"trackers: {name} needs a package: pip install {name}")


class Trackers:
    """Sends every line to the trackers of a run, through Accelerate.

    TensorBoard's files go to `tensorboard` in the run folder, W&B's to `wandb`; whether W&B uses
    the network is for its own settings to say (`WANDB_MODE=offline` does not). A run that goes on
    takes over its TensorBoard folder from the step it goes on at; to W&B it is another run.

    Args:
        accelerator: its trackers are set up here.
        config: of the run; it is kept beside the figures.
        step: at which the run goes on; what a tracker knows beyond it is forgotten, if it can.
    """

    def __init__(self, accelerator: Accelerator, config: PretrainConfig, *, step: int) -> None:
        self._accelerator = accelerator
        accelerator.log_with = filter_trackers(list(config.trackers), config.out)
        options = {
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"dir": str(config.out), "name": config.out.name},
        }
        accelerator.project_configuration.logging_dir = str(config.out / "tensorboard")
        accelerator.init_trackers(
            "align",
            config=flat(config.model_dump(mode="json")),
            init_kwargs={name: options[name] for name in config.trackers},
        )

    def line(self, line: dict[str, Any]) -> None:
        """Send the numbers of a line."""
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=line["step"])

    def end(self, error: BaseException | None = None) -> None:
        """Nothing: `Accelerator.end_training` closes trackers."""


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by dotted path; what is no number, text or truth value becomes a text.

    >>> flat({"model": {"dim": 16, "image": {"options": {}}}, "keep": None})
    {'model.dim': 16, 'keep': 'None'}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{key}.")
        else:
            simple = isinstance(value, int | float | str)
            found[f"{above}{key}"] = value if simple else str(value)
    return found
