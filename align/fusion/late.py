"""Late fusion: each modality decides alone; only the decisions are weighed."""

import torch
from torch import nn

from align.fusion.head import Fused, FusionHead, Modality


class Late(FusionHead):
    r"""$w_1 x + w_2 y$ with $w = \text{softmax}(\theta)$, two learned numbers for all rows.

    The weighted sum of decisions: since similarity to a candidate is linear in the query,
    weighing embeddings weighs the two scores of every candidate (UniIR's score fusion, Wei et al.
    2023, arXiv 2311.17136, with learned weights). Starts at the mean.

    Args:
        dim: width of the aligned space.
        image_width: width of the image tower's tokens (not read).
        text_width: width of the text tower's tokens (not read).
    """

    family = "late"
    needs = "pooled"

    def __init__(self, *, dim: int, image_width: int, text_width: int) -> None:
        super().__init__(dim=dim, image_width=image_width, text_width=text_width)
        self.logits = nn.Parameter(torch.zeros(2))

    def mix(self, image: Modality, text: Modality) -> Fused:
        """See the class."""
        weights = self.logits.softmax(dim=0)
        embedding = weights[0] * image.pooled + weights[1] * text.pooled
        return Fused(embedding, weights.expand(len(embedding), 2))
