"""What every fusion head takes, gives and promises."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

Family = Literal[
    "early",
    "intermediate",
    "late",
    "low-rank",
    "alignment",
    "attention",
    "progressive",
    "adaptive",
]


@dataclass(frozen=True)
class Modality:
    """One modality of a batch.

    Attributes:
        pooled: in the aligned space, unit length.
        tokens: what the tower pooled, in its own width, before projection.
        mask: `True` where a token is real.
        present: `True` where the row has this modality at all; the only truth about absence. What
            stands elsewhere in an absent row is never read. None = all rows have it.
    """

    pooled: Float[Tensor, "batch dim"]
    tokens: Float[Tensor, "batch tokens width"] | None = None
    mask: Bool[Tensor, "batch tokens"] | None = None
    present: Bool[Tensor, " batch"] | None = None

    def cleaned(self) -> "Modality":
        """The same with zeros wherever nothing is to be read, and `present` filled in."""
        present = self.present
        if present is None:
            present = torch.ones(len(self.pooled), dtype=torch.bool, device=self.pooled.device)
        pooled = self.pooled.masked_fill(~present[:, None], 0).float()
        if self.tokens is None:
            return replace(self, pooled=pooled, present=present)
        mask = self.mask
        if mask is None:
            mask = torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)
        mask = mask & present[:, None]
        tokens = self.tokens.masked_fill(~mask[..., None], 0)
        return Modality(pooled, tokens, mask, present)


@dataclass(frozen=True)
class Fused:
    """What a head gives.

    Attributes:
        embedding: in the aligned space, unit length, fp32: it searches the same index and meets
            the same class prompts as a plain embedding.
        weights: how much each modality counts (image, text), where the head knows.
    """

    embedding: Float[Tensor, "batch dim"]
    weights: Float[Tensor, "batch 2"] | None = None


class FusionHead(nn.Module, ABC):
    """Base of all heads: absence, padding and the unit sphere are handled here, once.

    A subclass gives `mix`. It must treat rows independently, start at the mean of the two
    embeddings (learn the rest), and ignore masked tokens.

    Args:
        dim: width of the aligned space.
        image_width: width of the image tower's tokens.
        text_width: width of the text tower's tokens.

    Class attributes:
        family: which of the eight families.
        needs: `pooled`, or `tokens` where the tokens are read too.
    """

    family: ClassVar[Family]
    needs: ClassVar[Literal["pooled", "tokens"]]

    def __init__(self, *, dim: int, image_width: int, text_width: int) -> None:
        super().__init__()
        self.dim = dim
        self.image_width = image_width
        self.text_width = text_width

    @abstractmethod
    def mix(self, image: Modality, text: Modality) -> Fused:
        """Fuse rows that have both; the length of `embedding` does not matter yet.

        Args:
            image: cleaned: zeros where nothing is to be read.
            text: likewise.
        """

    def forward(self, image: Modality, text: Modality) -> Fused:
        """Fuse; a row with one modality returns that modality's embedding unchanged.

        Raises:
            ValueError: a row has neither modality, or tokens are needed and missing.
        """
        if self.needs == "tokens" and (image.tokens is None or text.tokens is None):
            raise ValueError(f"{type(self).__name__} needs the tokens of both modalities")
        image, text = image.cleaned(), text.cleaned()
        assert image.present is not None
        assert text.present is not None
        nothing = ~(image.present | text.present)
        if nothing.any():
            raise ValueError(f"row {int(nothing.nonzero()[0])} has neither image nor text")
        with torch.autocast(image.pooled.device.type, enabled=False):
            fused = self.mix(image, text)
            both = (image.present & text.present)[:, None]
            alone = image.pooled + text.pooled  # the absent one is zero
            embedding = F.normalize(torch.where(both, fused.embedding.float(), alone), dim=-1)
        return replace(fused, embedding=embedding)


def mean_of(image: Modality, text: Modality) -> Float[Tensor, "batch dim"]:
    """The mean of the two embeddings: where every trainable head starts."""
    return (image.pooled + text.pooled) / 2


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts by saying nothing, so that what it corrects starts unchanged."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
