"""The dual encoder: two towers, two projections, one space."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from align.encoders import IMAGE_LIBRARIES, TEXT_LIBRARIES, Features, build_tower
from align.preprocess import preprocess
from align.tokenizer import TokenBatch, Tokenizer


@dataclass(frozen=True)
class Tower:
    """Which tower to build: a prefixed name and the options of the library behind it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DualEncoderConfig:
    """All it takes to rebuild a `DualEncoder` without its weights.

    Attributes:
        image: the image tower.
        text: the text tower.
        dim: width of the aligned space.
        image_size: side of the square pictures that the image tower gets, in pixels.
        context_length: longest text, in tokens.
    """

    image: Tower
    text: Tower
    dim: int = 512
    image_size: int = 224
    context_length: int = 77

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DualEncoderConfig":
        """Back from `to_dict`."""
        towers = {key: Tower(**values[key]) for key in ("image", "text")}
        return cls(**{**values, **towers})


class DualEncoder(nn.Module):
    """Two towers and one space: `normalise(U f(picture))` and `normalise(V g(text))`.

    Radford et al. 2021 (arXiv 2103.00020, figure 3): linear projections without bias, unit length.

    Args:
        config: what to build.
        tokenizer: needed by `encode_text`; also fixes the size of the text tower's vocabulary.

    Raises:
        ValueError: an unknown tower or option, or a tokenizer that does not fit the text tower.
    """

    def __init__(self, config: DualEncoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.image = build_tower(config.image.name, IMAGE_LIBRARIES, **config.image.options)
        text_options = dict(config.text.options)
        if not text_options.get("pretrained") and "config" not in text_options:
            text_options.setdefault("vocab_size", len(tokenizer))
            text_options.setdefault("pad_token_id", tokenizer.backend.pad_token_id)
        self.text = build_tower(config.text.name, TEXT_LIBRARIES, **text_options)
        self._check_tokenizer()
        self.image_projection = nn.Linear(self.image.width, config.dim, bias=False)
        self.text_projection = nn.Linear(self.text.width, config.dim, bias=False)
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def _check_tokenizer(self) -> None:
        if len(self.tokenizer) > self.text.vocabulary_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} entries, the text tower "
                f"{self.config.text.name} embeds {self.text.vocabulary_size}: set "
                "model.text.options.vocab_size or choose the tower's own tokenizer"
            )
        if self.config.context_length > self.text.max_length:
            raise ValueError(
                f"context_length {self.config.context_length} is more than the text tower "
                f"{self.config.text.name} can take ({self.text.max_length} positions)"
            )

    def image_features(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """The image tower's pooled features and tokens, before projection."""
        return self.image(images)

    def text_features(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Features:
        """The text tower's pooled features and tokens, before projection."""
        return self.text(ids, mask)

    def project_image(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        """Into the aligned space, unit length, fp32."""
        return F.normalize(self.image_projection(pooled).float(), dim=-1)

    def project_text(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        """Into the aligned space, unit length, fp32."""
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
        """Embed a batch of pairs: (pictures, texts)."""
        return (
            self.project_image(self.image_features(images).pooled),
            self.project_text(self.text_features(ids, mask).pooled),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.image_projection.weight.device

    def preprocess(self, images: Sequence[Image.Image]) -> UInt8[Tensor, "batch 3 size size"]:
        """Pictures as the image tower wants them; see `align.preprocess`."""
        return torch.stack([preprocess(image, self.config.image_size) for image in images])

    def tokenize(self, texts: Sequence[str]) -> TokenBatch:
        """Texts as the text tower wants them."""
        return self.tokenizer(texts)

    @torch.no_grad()
    def encode_image(
        self,
        images: Sequence[Image.Image] | UInt8[Tensor, "rows 3 height width"],
        *,
        batch_size: int = 256,
    ) -> Float[Tensor, "rows dim"]:
        """Embed pictures: unit-length rows, fp32, on the CPU.

        Args:
            images: PIL pictures of any size and mode, or a uint8 tensor of the model's image size.
            batch_size: pictures at a time.
        """
        if isinstance(images, Image.Image):
            raise ValueError("encode_image takes a list of pictures, not one picture")
        with _evaluating(self):
            rows = [torch.empty(0, self.config.dim)]
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                pixels = part if isinstance(part, Tensor) else self.preprocess(part)
                features = self.image_features(pixels.to(self.device))
                rows.append(self.project_image(features.pooled).cpu())
            return torch.cat(rows)

    @torch.no_grad()
    def encode_text(
        self, texts: Sequence[str], *, batch_size: int = 256
    ) -> Float[Tensor, "rows dim"]:
        """Embed texts: unit-length rows, fp32, on the CPU.

        Args:
            texts: any strings; what exceeds the context length is cut.
            batch_size: texts at a time.
        """
        if isinstance(texts, str):
            raise ValueError("encode_text takes a list of strings, not one string")
        with _evaluating(self):
            rows = [torch.empty(0, self.config.dim)]
            for start in range(0, len(texts), batch_size):
                tokens = self.tokenize(texts[start : start + batch_size]).to(self.device)
                features = self.text_features(tokens.ids, tokens.mask)
                rows.append(self.project_text(features.pooled).cpu())
            return torch.cat(rows)


class _evaluating:  # noqa: N801 - reads as a statement where it is used
    """Switch a module to evaluation for a `with` block, then back to what it was."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.was_training = self.module.training
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.was_training)
