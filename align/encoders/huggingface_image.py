"""Image towers from Hugging Face: CLIP's, SigLIP's, and any other vision encoder."""

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from align.encoders.huggingface import (
    build_model,
    checkpoint_gradients,
    configuration,
    plain,
    pools,
    title,
)
from align.encoders.pooling import NATIVE, build_image_pooler
from align.encoders.tower import Features, ImageTower, refuse_small

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class HuggingFaceImageEncoder(ImageTower):
    """A Hugging Face vision encoder.

    Args:
        name: an architecture to build from scratch (`clip_vision_model`), or a hub id or folder.
        pretrained: load the published weights; needs a hub id or folder.
        pooling: `native` (the architecture's own `pooler_output`), `mean`, `max`, `cls` or
            `attention`, over its tokens.
        attention: `auto` (fused where the architecture can), `sdpa` (fused) or `eager`.
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
        attention: str = "auto",
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
        if getattr(settings, "num_channels", 3) != 3:
            raise ValueError(f"hf:{name}: pictures have 3 channels, not {settings.num_channels}")
        if hasattr(settings, "use_mask_token"):
            settings.use_mask_token = False  # stands for hidden patches, and none is hidden here
        if pooling != NATIVE and hasattr(settings, "vision_use_head"):
            settings.vision_use_head = False
        pooler = None if pooling == NATIVE else build_image_pooler(pooling, _widest(settings))
        self.vision = build_model(
            name,
            settings,
            pretrained=pretrained,
            attention=attention,
            prune=partial(_prune, pooling=pooling, name=name),
        )
        self.pooler = pooler
        self.token_width: int = _widest(settings)
        self.width: int = self.token_width
        if pooling == NATIVE:
            self.width = getattr(settings, "pooler_output_size", None) or self.width
        known_as = title(name, settings, pretrained=pretrained, given=config is not None)
        self.name = f"hf:{known_as}"
        self.own = {"pooling": pooling, "attention": attention}
        self.picture_size = _built_for(self.vision)
        refuse_small(self.name, self.picture_size, getattr(settings, "patch_size", None))

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
        if output.pooler_output is None:
            raise ValueError(f"{self.name} has no pooling of its own; choose another pooling")
        return Features(output.pooler_output.flatten(1), tokens, mask)

    def _checkpoint_gradients(self, enabled: bool) -> None:
        checkpoint_gradients(self.vision, enabled)


_POOLED_FIRST = {"clip_vision_model", "convnext", "convnextv2"}
"""Architectures whose last normalisation is for their own pooled vector alone."""
_CLASS_TOKENS = ("cls_token", "class_embedding")


def _prune(vision: Any, *, pooling: str, name: str) -> None:
    """Take away what would never receive a gradient.

    Raises:
        ValueError: the architecture does not go with the pooling.
    """
    if vision.main_input_name != "pixel_values":
        raise ValueError(f"hf:{name} is no image tower: it takes {vision.main_input_name}")
    names = [key for key, _ in vision.named_parameters()]
    for part in vision.modules():
        if isinstance(getattr(part, "mask_token", None), nn.Parameter):
            part.register_parameter("mask_token", None)
    if pooling == NATIVE:
        if not pools(vision):
            raise ValueError(f"hf:{name} has no pooling of its own; choose another pooling")
        return
    settings: Any = vision.config
    if settings.model_type in _POOLED_FIRST or getattr(vision, "head", None) is not None:
        raise ValueError(f"hf:{name} goes on after its own pooling; no pooling but {NATIVE} fits")
    if pooling == "cls" and not any(key.endswith(_CLASS_TOKENS) for key in names):
        raise ValueError(f"hf:{name} has no class token; choose another pooling")
    pooler = getattr(vision, "pooler", None)
    if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        vision.pooler = None


def _widest(settings: Any) -> int:
    """Channels of what comes out."""
    if not hasattr(settings, "hidden_size") and not hasattr(settings, "hidden_sizes"):
        raise ValueError(f"hf:{settings.model_type} is no image tower")
    return getattr(settings, "hidden_size", None) or settings.hidden_sizes[-1]


def _built_for(vision: Any) -> int | None:
    """The side of the pictures that positions were made for; None = they are stretched."""
    size = getattr(vision.config, "image_size", None)
    stretched = "interpolate_pos_encoding" not in inspect.signature(vision.forward).parameters
    if stretched or not getattr(vision.config, "use_absolute_embeddings", True):
        return None
    return max(size) if isinstance(size, list | tuple) else size
