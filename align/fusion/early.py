"""Early fusion: standardise, concatenate, one network over both."""

import torch
from torch import nn

from align.fusion.head import Fused, FusionHead, Modality, mean_of, zero_linear


class Early(FusionHead):
    r"""$\text{mean}(x, y) + \text{MLP}([\text{LN}(x); \text{LN}(y)])$.

    Concatenation (Baltrusaitis et al. 2019, section 6.1: joint representation of raw features);
    the normalisation before it is worth more than the choice of network, and the last layer starts
    at zero.

    Args:
        dim: width of the aligned space.
        image_width: width of the image tower's tokens (not read).
        text_width: width of the text tower's tokens (not read).
        hidden: width of the network, as a multiple of `dim`.
        dropout: share of hidden units dropped in training.
    """

    family = "early"
    needs = "pooled"

    def __init__(
        self,
        *,
        dim: int,
        image_width: int,
        text_width: int,
        hidden: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim=dim, image_width=image_width, text_width=text_width)
        self.image_norm = nn.LayerNorm(dim)
        self.text_norm = nn.LayerNorm(dim)
        width = round(hidden * dim)
        self.network = nn.Sequential(
            nn.Linear(2 * dim, width), nn.GELU(), nn.Dropout(dropout), zero_linear(width, dim)
        )

    def mix(self, image: Modality, text: Modality) -> Fused:
        """See the class."""
        both = torch.cat([self.image_norm(image.pooled), self.text_norm(text.pooled)], dim=-1)
        return Fused(mean_of(image, text) + self.network(both))
