"""Intermediate fusion: the tokens of each modality look at those of the other."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from align.fusion.head import Fused, FusionHead, Modality, mean_of, zero_linear


class CrossAttention(nn.Module):
    """Pre-norm cross-attention with residual, then a feed-forward layer with residual.

    `q + Attention(LN(q), LN(k))`, then `+ MLP(LN(.))` (Vaswani et al. 2017; the crossmodal block of
    MulT, Tsai et al. 2019, arXiv 1906.00295, section 3.2).
    """

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self,
        queries: Float[Tensor, "batch queries width"],
        keys: Float[Tensor, "batch keys width"],
        mask: Bool[Tensor, "batch keys"],
    ) -> Float[Tensor, "batch queries width"]:
        """Every row of `mask` needs one `True`, or attention has nothing to look at."""
        normed = self.key_norm(keys)
        seen, _ = self.attention(
            self.query_norm(queries), normed, normed, key_padding_mask=~mask, need_weights=False
        )
        queries = queries + seen
        return queries + self.feed_forward(queries)


class Intermediate(FusionHead):
    r"""Bidirectional cross-attention between the towers' tokens.

    Each modality's sequence is its tokens, projected to a shared width, behind its projected
    embedding. Pictures look at words and words at pictures, in blocks with their own weights for
    each direction; what comes out is pooled over real tokens, concatenated, and added to the mean:
    $\text{mean}(x, y) + W\,[\text{pool}(A); \text{pool}(B)]$ with $W$ from zero.

    Args:
        dim: width of the aligned space.
        image_width: width of the image tower's tokens.
        text_width: width of the text tower's tokens.
        width: shared width of the attention.
        heads: attention heads.
        blocks: how many rounds.
        dropout: in the attention weights.
    """

    family = "intermediate"
    needs = "tokens"

    def __init__(
        self,
        *,
        dim: int,
        image_width: int,
        text_width: int,
        width: int = 256,
        heads: int = 4,
        blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim=dim, image_width=image_width, text_width=text_width)
        if width % heads:
            raise ValueError(f"Intermediate: width {width} must be a multiple of heads {heads}")
        self.image_tokens = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, width))
        self.text_tokens = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.image_pooled = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.text_pooled = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        block = {"width": width, "heads": heads, "dropout": dropout}
        self.image_blocks = nn.ModuleList([CrossAttention(**block) for _ in range(blocks)])
        self.text_blocks = nn.ModuleList([CrossAttention(**block) for _ in range(blocks)])
        self.output = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, 4 * width), nn.GELU(),
            zero_linear(4 * width, dim),
        )  # fmt: skip

    def mix(self, image: Modality, text: Modality) -> Fused:
        """See the class."""
        pictures, picture_mask = _sequence(image, self.image_pooled, self.image_tokens)
        words, word_mask = _sequence(text, self.text_pooled, self.text_tokens)
        for look_at_words, look_at_pictures in zip(
            self.image_blocks, self.text_blocks, strict=True
        ):
            pictures, words = (
                look_at_words(pictures, words, word_mask),
                look_at_pictures(words, pictures, picture_mask),
            )
        pooled = [_mean(pictures, picture_mask), _mean(words, word_mask)]
        return Fused(mean_of(image, text) + self.output(torch.cat(pooled, dim=-1)))


def _sequence(
    modality: Modality, project_pooled: nn.Module, project_tokens: nn.Module
) -> tuple[Float[Tensor, "batch positions width"], Bool[Tensor, "batch positions"]]:
    """The embedding, then the tokens; the first position is always real, so no row is empty."""
    assert modality.tokens is not None
    assert modality.mask is not None
    first = project_pooled(modality.pooled)[:, None]
    sequence = torch.cat([first, project_tokens(modality.tokens.float())], dim=1)
    real = torch.ones_like(modality.mask[:, :1])
    return sequence, torch.cat([real, modality.mask], dim=1)


def _mean(
    tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    return (tokens * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
