"""What every contrastive loss has: a learnable temperature, and its share of a global loss."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class ContrastiveLoss(nn.Module, ABC):
    r"""A loss of the global batch, of which every process gives its own rows.

    It returns this process's share of the loss times the number of processes, so that averaging
    gradients over processes, as data-parallel training does, gives the gradient of the loss of the
    whole batch: weights, temperature and bias alike.

    Attributes:
        logit_scale: learnable logarithm of the inverse temperature, a scalar.
        logit_bias: learnable number that is added to all similarities, a scalar; None = none.
        keeps_samples: whether the constructor takes `samples`, the size of the data set, and
            `forward` needs the samples' ids.

    Args:
        temperature: initial $e^{-t}$.
        min_temperature: the learned temperature never falls below.
    """

    keeps_samples: ClassVar[bool] = False

    def __init__(self, *, temperature: float, min_temperature: float) -> None:
        super().__init__()
        if not 0 < min_temperature <= temperature:
            raise ValueError(
                f"{type(self).__name__} needs 0 < min_temperature <= temperature, got "
                f"{min_temperature} and {temperature}"
            )
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.logit_bias: nn.Parameter | None = None
        self.max_logit_scale = -math.log(min_temperature)

    def scale(self) -> Float[Tensor, ""]:
        """What similarities are multiplied by: the inverse temperature.

        An optimiser may overshoot the bound; the parameter is set back to it, not merely clamped,
        since beyond it there would be no gradient to come back by.
        """
        with torch.no_grad():
            self.logit_scale.clamp_(max=self.max_logit_scale)
        return self.logit_scale.exp()

    def refuse_uneven(self, image: Tensor, text: Tensor, labels: Tensor | None) -> None:
        """See that there are as many images as texts and labels.

        Raises:
            ValueError: there are not, or their widths differ.
        """
        if image.ndim != 2 or image.shape != text.shape:
            raise ValueError(
                f"{type(self).__name__} needs as many images as texts, of one width; got "
                f"{list(image.shape)} and {list(text.shape)}"
            )
        if labels is not None and labels.shape != image.shape[:1]:
            raise ValueError(
                f"{type(self).__name__} needs a label for each of {len(image)} rows; got "
                f"{list(labels.shape)}"
            )

    @abstractmethod
    def forward(
        self,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"] | None = None,
        samples: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of the global batch; in fp32 or better, whatever the autocast.

        Args:
            image: unit-length rows of this process.
            text: unit-length rows of this process.
            labels: rows of equal label are right for each other; None = row i for row i alone.
            samples: ids of the samples, for a loss that keeps something of each.

        Raises:
            ValueError: their numbers of rows differ.
        """

    def commit(self) -> None:
        """Keep what the last `forward` learnt about its samples; called once a step was taken.

        A step that is skipped is not committed, and leaves no trace.
        """

    def forget_samples(self) -> None:
        """Drop what is kept of every sample: for a copy that never trains."""
