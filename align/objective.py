"""Model and loss in one module, so that what is wrapped for distribution holds the temperature."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from align.losses import InfoNCE
from align.model import DualEncoder


@dataclass(frozen=True)
class StepOutput:
    """One step: the loss to derive, and numbers for the log (of this process's rows)."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]]


class ContrastiveObjective(nn.Module):
    """A batch of pairs in, `StepOutput` out.

    Args:
        model: the dual encoder.
        loss: of (image rows, text rows, labels).
    """

    def __init__(self, model: DualEncoder, loss: InfoNCE) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        labels: Int[Tensor, " batch"],
    ) -> StepOutput:
        """The loss of the batch, its accuracy and temperature.

        Args:
            images: pictures.
            ids: token ids of their captions.
            mask: `True` on real tokens.
            labels: rows of equal label are right for each other.
        """
        image, text = self.model(images, ids, mask)
        loss = self.loss(image, text, labels)
        with torch.no_grad():
            nearest = (image @ text.T).argmax(dim=1)
            accuracy = (labels[nearest] == labels).float().mean()
            metrics = {
                "loss": loss.detach(),
                "batch_accuracy": accuracy,
                "temperature": 1 / self.loss.scale().detach(),
            }
        return StepOutput(loss, metrics)
