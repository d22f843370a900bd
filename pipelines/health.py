"""Whether what a run has learnt is still made of numbers."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipelines.cadence import agreed
from pipelines.training import Training


@torch.no_grad()
def weights_are_finite(training: Training) -> bool:
    """Whether all parameters are, trained and averaged, and all of the towers' buffers are numbers.

    A buffer may be infinite, as masks of attention are. All processes must ask, and hear the same.
    """
    told = [one.isfinite().all() for one in _local(_parameters(training))]
    told += [~one.isnan().any() for one in _local(training.objective.model.buffers())]
    told += [~one.isnan().any() for one in _local(training.chosen.model.buffers())]
    good = bool(torch.stack([one.to(told[0].device) for one in told]).all())
    return not agreed(training.accelerator, [not good])[0]


@torch.no_grad()
def embeds(training: Training) -> bool:
    """Whether the model that would be saved embeds a grey picture and a text as finite rows.

    Weights that the last step has thrown far away may be finite still, and what they compute not.
    All processes must ask, and hear the same.
    """
    model = training.chosen_model
    size = model.config.image_size
    grey = torch.full((1, 3, size, size), 128, dtype=torch.uint8)
    with torch.compiler.set_stance("force_eager"):
        rows = [model.encode_image(grey), model.encode_text(["a"])]
    good = all(bool(one.isfinite().all()) for one in rows)
    return not agreed(training.accelerator, [not good])[0]


def _parameters(training: Training) -> Iterator[Tensor]:
    yield from training.objective.parameters()
    if training.average is not None:
        yield from training.chosen.parameters()


def _local(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    """This process's part of each that has values."""
    for one in tensors:
        part = one.to_local() if isinstance(one, DTensor) else one
        if part.is_floating_point() and part.numel():
            yield part
