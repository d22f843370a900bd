"""One vector out of many tokens; padding is never read."""

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Pooler = Callable[[Tensor, Tensor], Tensor]


def mean_pool(
    tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    """The mean of the real tokens."""
    kept = tokens.masked_fill(~mask[..., None], 0)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def max_pool(
    tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    """The greatest value of each channel over the real tokens."""
    return tokens.masked_fill(~mask[..., None], torch.finfo(tokens.dtype).min).amax(dim=1)


def first_token(
    tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    """The first token, which BERT and its kin give the meaning of the whole."""
    del mask
    return tokens[:, 0]


def last_token(
    tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    """The last real token: in a causal tower the only one that has seen all others."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    return tokens[torch.arange(tokens.shape[0], device=tokens.device), last]


class AttentionPool(nn.Module):
    r"""A learned query that looks at the real tokens (Lee et al. 2019, arXiv 1810.00825, PMA).

    $\sum_i a_i x_i$ with $a = \mathrm{softmax}_i(q_h \cdot x_i / \sqrt{d_h})$ in each of the heads
    over its own share of the channels. There are as many heads as the largest divisor of `width`
    that is no more than `MOST_HEADS`. The query starts at zero, which is the mean; queries, keys
    and values are not mapped first, so that it adds no more than `width` weights.

    Args:
        width: of the tokens.
    """

    MOST_HEADS: ClassVar[int] = 8
    """What no recipe says: another number would read saved weights in another way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        most = self.MOST_HEADS
        self.heads = next(count for count in range(most, 0, -1) if width % count == 0)
        self.query = nn.Parameter(torch.zeros(width))

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch width"]:
        """Pool a batch."""
        # What is masked may hold anything, even NaN, which a weight of zero would not remove.
        parts = tokens.masked_fill(~mask[..., None], 0).unflatten(-1, (self.heads, -1))
        query = self.query.to(tokens.dtype).view(self.heads, -1)
        scores = (parts * query).sum(dim=-1, keepdim=True) * query.shape[1] ** -0.5
        scores = scores.masked_fill(~mask[..., None, None], torch.finfo(scores.dtype).min)
        return (scores.softmax(dim=1) * parts).sum(dim=1).flatten(1)


POOLERS: dict[str, Pooler | type[AttentionPool]] = {
    "mean": mean_pool,
    "max": max_pool,
    "cls": first_token,
    "last": last_token,
    "attention": AttentionPool,
}
IMAGE_POOLERS = tuple(name for name in POOLERS if name != "last")
NATIVE = "native"
"""The pooling that belongs to the architecture itself."""


def build_pooler(name: str, width: int) -> Pooler:
    """A pooler by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in POOLERS:
        raise ValueError(f"unknown pooler {name!r}; known: {', '.join([NATIVE, *POOLERS])}")
    pooler = POOLERS[name]
    return pooler(width) if isinstance(pooler, type) else pooler


def build_image_pooler(name: str, width: int) -> Pooler:
    """A pooler of places in a picture, by name; pictures have no last one.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in IMAGE_POOLERS:
        raise ValueError(f"unknown pooling {name!r}; known: {', '.join([NATIVE, *IMAGE_POOLERS])}")
    return build_pooler(name, width)
