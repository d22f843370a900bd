"""Training a fusion head on cached features: towers frozen, seconds instead of hours."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from align.fusion.head import FusionHead, Modality
from align.optim import build_optimizer, cosine_factor, parameter_groups, set_learning_rate


@dataclass(frozen=True)
class FeatureBank:
    """Cached features of one modality, a row each.

    Attributes:
        pooled: in the aligned space, unit length.
        tokens: in the tower's width; half precision saves memory.
        mask: `True` where a token is real.
    """

    pooled: Float[Tensor, "rows dim"]
    tokens: Float[Tensor, "rows tokens width"]
    mask: Bool[Tensor, "rows tokens"]

    def rows(self, index: Int[Tensor, " batch"]) -> Modality:
        """These rows as a head takes them."""
        return Modality(self.pooled[index], self.tokens[index].float(), self.mask[index])


@dataclass(frozen=True)
class ComposedQueries:
    """Queries of a picture and a text, each with the picture that answers it.

    Attributes:
        picture: row of the query's picture in the bank of pictures.
        text: row of its text in the bank of texts.
        reference: row of the query's picture among the candidates.
        target: row of the answer among the candidates.
    """

    picture: Int[Tensor, " queries"]
    text: Int[Tensor, " queries"]
    reference: Int[Tensor, " queries"]
    target: Int[Tensor, " queries"]

    def __len__(self) -> int:
        return len(self.target)


def composed_loss(
    fused: Float[Tensor, "batch dim"],
    candidates: Float[Tensor, "rows dim"],
    *,
    target: Int[Tensor, " batch"],
    allowed: Bool[Tensor, "batch rows"],
    temperature: float,
) -> Float[Tensor, ""]:
    r"""$-\log (e^{q \cdot c_t / \tau} / \sum_{j \in A} e^{q \cdot c_j / \tau})$, mean over queries.

    Every allowed picture is a candidate, not only those of the batch: with frozen towers they cost
    one matrix product.
    """
    scores = (fused @ candidates.T / temperature).masked_fill(~allowed, -torch.inf)
    return F.cross_entropy(scores, target)


def train_head(
    head: FusionHead,
    queries: ComposedQueries,
    *,
    pictures: FeatureBank,
    texts: FeatureBank,
    candidates: Float[Tensor, "rows dim"],
    groups: Int[Tensor, " rows"],
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    temperature: float,
    seed: int,
) -> list[float]:
    """Train a head to point from a picture and a change in words at the picture that answers.

    AdamW, 5 % linear warm-up, cosine to zero. A query's own picture is no candidate, and neither
    are pictures of another group.

    Args:
        head: trained in place and left in evaluation mode.
        queries: what to learn.
        pictures: features of the queries' pictures.
        texts: features of their texts.
        candidates: embeddings of all pictures that may be found, as a search would have them.
        groups: of each candidate (its artist, say): a query searches its own group.
        steps: batches.
        batch_size: queries in one, drawn without replacement in each pass.
        learning_rate: at its peak.
        weight_decay: on matrices.
        temperature: of the loss.
        seed: of the batches and of dropout.

    Returns:
        The loss of every step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        groups_ = parameter_groups(head, weight_decay=weight_decay)
        optimizer = build_optimizer("adamw", groups_, learning_rate=learning_rate)
        head.train()
        losses: list[float] = []
        order = torch.empty(0, dtype=torch.long)
        for step in range(steps):
            while len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(queries), generator=generator)])
            batch, order = order[:batch_size], order[batch_size:]
            reference = queries.reference[batch]
            fused = head(pictures.rows(queries.picture[batch]), texts.rows(queries.text[batch]))
            allowed = groups[reference][:, None] == groups[None, :]
            allowed[torch.arange(batch_size), reference] = False
            loss = composed_loss(
                fused.embedding,
                candidates,
                target=queries.target[batch],
                allowed=allowed,
                temperature=temperature,
            )
            factor = cosine_factor(step, warmup=max(1, steps // 20), steps=steps)
            set_learning_rate(optimizer, factor * learning_rate)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    head.eval()
    return losses


@torch.no_grad()
def fuse_all(
    head: FusionHead,
    queries: ComposedQueries,
    *,
    pictures: FeatureBank,
    texts: FeatureBank,
    batch_size: int = 512,
) -> Float[Tensor, "queries dim"]:
    """The fused embedding of every query."""
    rows = [
        head(pictures.rows(picture), texts.rows(text)).embedding
        for picture, text in zip(
            queries.picture.split(batch_size), queries.text.split(batch_size), strict=True
        )
    ]
    return torch.cat(rows)
