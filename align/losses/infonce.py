"""InfoNCE: the contrastive loss of CLIP, with any number of positives a row."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from align.gather import gather_labels, gather_rows, world_size
from align.losses.loss import ContrastiveLoss


class InfoNCE(ContrastiveLoss):
    r"""Symmetric InfoNCE with a learnable temperature and any number of positives a row.

    With similarities $s_{ij} = e^{t}\, x_i \cdot y_j$ over all pairs of the global batch of $N$,
    and $P(i)$ the columns that are right for row $i$,

    $$L = \frac{1}{2N} \sum_i \Big[ \frac{-1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{e^{s_{ip}}}{\sum_j e^{s_{ij}}} \Big] + \text{the same over columns}.$$

    With one positive a row this is CLIP's loss (Radford et al. 2021, arXiv 2103.00020, figure 3);
    with several it is the supervised form (Khosla et al. 2020, arXiv 2004.11362, equation 2;
    UniCL, Yang et al. 2022, arXiv 2204.03610): two captions of one concept are not each other's
    negatives.

    Every process gives its own rows and returns its share of the loss times the number of
    processes, so that averaging gradients over processes, as data-parallel training does, gives
    the gradient of the loss of the whole batch: weights and temperature alike.

    Args:
        temperature: initial $e^{-t}$.
        min_temperature: the learned temperature never falls below.
        label_smoothing: share of each row's target spread evenly over all columns.

    Example:
        >>> loss = InfoNCE()(images, texts)                      # row i belongs to row i
        >>> loss = InfoNCE()(images, texts, labels)              # equal label = right
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        min_temperature: float = 0.01,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(temperature=temperature, min_temperature=min_temperature)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"InfoNCE needs 0 <= label_smoothing < 1, got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"] | None = None,
        samples: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of the global batch, in nats; see `ContrastiveLoss.forward`."""
        del samples
        with torch.autocast(image.device.type, enabled=False):
            exact = torch.promote_types(image.dtype, torch.float32)
            image, text = image.to(exact), text.to(exact)
            all_image, all_text = gather_rows(image), gather_rows(text)
            positives = self._positives(image, len(all_image), labels)
            scale = self.scale()
            rows = self._cross_entropy(scale * image @ all_text.T, positives)
            columns = self._cross_entropy(scale * text @ all_image.T, positives)
            return (rows + columns).mean() / 2

    def _positives(
        self, rows: Float[Tensor, "batch dim"], total: int, labels: Tensor | None
    ) -> Float[Tensor, "batch total"]:
        """The share of each row's target that each column carries."""
        batch, device = len(rows), rows.device
        if labels is None:
            rank = dist.get_rank() if world_size() > 1 else 0
            labels = torch.arange(batch, device=device) + rank * batch
            columns = torch.arange(total, device=device)
        else:
            columns = gather_labels(labels)
        right = (labels[:, None] == columns[None, :]).to(rows.dtype)
        target = right / right.sum(dim=1, keepdim=True)
        return target * (1 - self.label_smoothing) + self.label_smoothing / total

    @staticmethod
    def _cross_entropy(
        similarity: Float[Tensor, "batch total"], target: Float[Tensor, "batch total"]
    ) -> Float[Tensor, " batch"]:
        return similarity.logsumexp(dim=1) - (similarity * target).sum(dim=1)
