"""Image towers from Hugging Face: CLIP's, SigLIP's, and any other vision encoder."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from align.encoders.huggingface import build_model, configuration, plain
from align.encoders.pooling import NATIVE, build_pooler
from align.encoders.tower import Features, ImageTower

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class HuggingFaceImageEncoder(ImageTower):
    """A Hugging Face vision encoder.

    Args:
        name: an architecture to build from scratch (`clip_vision_model`), or a hub id or folder.
        pretrained: load the published weights; needs a hub id or folder.
        pooling: `native` (the architecture's own `pooler_output`), `mean`, `max`, `cls` or
            `attention`, over its tokens.
        attention: `sdpa` (fused) or `eager`.
        mean: per channel, of pixel values in [0, 1]; CLIP's unless given.
        std: likewise.
        image_size: side of the pictures, where it is built from scratch.
        config: the whole configuration, as a bundle keeps it; `name` is then only a name.
        options: fields of the model's configuration.

    Raises:
        ValueError: an unknown architecture, pooling or option, or weights that cannot be read.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        pooling: str = NATIVE,
        attention: str = "sdpa",
        mean: Iterable[float] = CLIP_MEAN,
        std: Iterable[float] = CLIP_STD,
        image_size: int | None = None,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(mean, std)
        settings = configuration(
            name, "vision", pretrained=pretrained, config=config, options=options
        )
        if image_size and config is None and not pretrained and hasattr(settings, "image_size"):
            settings.image_size = image_size
        self.vision = build_model(name, settings, pretrained=pretrained, attention=attention)
        width = getattr(settings, "hidden_size", None) or settings.hidden_sizes[-1]
        self.pooler = None if pooling == NATIVE else build_pooler(pooling, width)
        if self.pooler is not None:
            for unused in ("pooler", "head", "post_layernorm"):
                if isinstance(getattr(self.vision, unused, None), nn.Module):
                    if unused != "pooler":
                        raise ValueError(f"hf:{name} fits no pooling but {NATIVE}")
                    self.vision.pooler = None
        self.name = f"hf:{name}"
        self.own = {"pooling": pooling, "attention": attention}
        self.width = self.token_width = width

    @property
    def body(self) -> nn.Module:
        """The Hugging Face model."""
        return self.vision

    def recipe(self) -> dict[str, Any]:
        """Options that rebuild the tower without weights."""
        return {"config": plain(self.vision.config), **self.own, **self.statistics}

    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode normalised pixels."""
        output = self.vision(pixel_values=pixels)
        tokens = output.last_hidden_state
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).mT
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if self.pooler is not None:
            return Features(self.pooler(tokens, mask), tokens, mask)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{self.name} has no pooling of its own; choose another pooling")
        return Features(pooled.flatten(1), tokens, mask)

    def _checkpoint_gradients(self, enabled: bool) -> None:
        if enabled:
            self.vision.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.vision.gradient_checkpointing_disable()
