"""Image and text towers from timm and Hugging Face, by prefixed name.

`timm:resnet10t` is whatever `timm.create_model("resnet10t")` builds, without its classifier;
`hf:bert` is a Hugging Face text encoder built from its configuration alone, and
`hf:bert-base-uncased`, a hub id or a local folder in the hub's format, one that is known there.
Options go to the library as they are, so a new architecture needs no code here.

Both kinds return `Features`: one pooled vector a row, and the tokens it was pooled from.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel


@dataclass(frozen=True)
class Features:
    """What a tower says of a batch, in the tower's own widths.

    Attributes:
        pooled: one vector a row.
        tokens: the vectors it was pooled from (positions of the image, tokens of the text).
        mask: `True` where a token is real; padding is `False` and must not be read.
    """

    pooled: Float[Tensor, "batch width"]
    tokens: Float[Tensor, "batch tokens token_width"]
    mask: Bool[Tensor, "batch tokens"]


class TimmImageEncoder(nn.Module):
    """A timm backbone without its classifier.

    Pictures come as uint8 and are scaled and normalised here, on the device:
    `(x / 255 - mean) / std`, with the backbone's own statistics unless others are given.

    Args:
        name: a timm architecture, as `timm.list_models()` lists them.
        pretrained: fetch the published weights.
        mean: per channel, of pixel values in [0, 1]; None = the backbone's own.
        std: likewise.
        options: keyword arguments of `timm.create_model`.

    Raises:
        ValueError: timm does not know the name or an option.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ValueError(
                f"timm has no model {name!r}{_near(name, timm.list_models())}; "
                "`timm.list_models()` lists them all"
            )
        try:
            backbone = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except TypeError as error:
            raise ValueError(f"timm:{name} does not take these options: {error}") from error
        self.backbone: Any = backbone
        self.token_width: int = self.backbone.num_features
        # Some families, such as MobileNet, widen what they pooled once more.
        self.width: int = getattr(self.backbone, "head_hidden_size", None) or self.token_width
        own = self.backbone.default_cfg
        self.statistics = {
            "mean": [float(value) for value in (own["mean"] if mean is None else mean)],
            "std": [float(value) for value in (own["std"] if std is None else std)],
        }
        for key, values in self.statistics.items():
            buffer = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) * 255
            self.register_buffer(f"pixel_{key}", buffer, persistent=False)

    pixel_mean: Tensor
    pixel_std: Tensor

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """Encode a batch of pictures."""
        pixels = (images.float() - self.pixel_mean) / self.pixel_std
        feature_map = self.backbone.forward_features(
            pixels.contiguous(memory_format=torch.channels_last)
        )
        pooled = self.backbone.forward_head(feature_map, pre_logits=True)
        tokens = _as_tokens(feature_map, self.token_width)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(pooled, tokens, mask)

    def check_size(self, size: int) -> None:
        """See whether the backbone takes square pictures of this size.

        Raises:
            ValueError: it does not.
        """
        training, zeros = self.training, torch.zeros(1, 3, size, size, dtype=torch.uint8)
        try:
            with torch.no_grad():
                self.eval()(zeros.to(self.pixel_mean.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the image tower does not take pictures of {size} px ({_first_line(error)}); "
                f"add model.image.options.img_size={size}, or choose another model.image_size"
            ) from error
        finally:
            self.train(training)


def _as_tokens(
    feature_map: Float[Tensor, "batch ..."], width: int
) -> Float[Tensor, "batch tokens width"]:
    """Flatten what a backbone returns: `[b, n, c]`, `[b, c, h, w]` or `[b, h, w, c]`."""
    if feature_map.ndim == 3:
        return feature_map
    # Hierarchical transformers such as Swin keep the channels last; everything else first.
    channels = 1 if feature_map.shape[1] == width else 3
    return feature_map.movedim(channels, -1).flatten(1, 2)


def _mean_pool(
    tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    kept = tokens.masked_fill(~mask[..., None], 0)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _max_pool(
    tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    return tokens.masked_fill(~mask[..., None], torch.finfo(tokens.dtype).min).amax(dim=1)


def _first(
    tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    del mask
    return tokens[:, 0]


def _last(
    tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    return tokens[torch.arange(len(tokens), device=tokens.device), last]


class HuggingFaceTextEncoder(nn.Module):
    """A Hugging Face text encoder with a pooler that respects the mask.

    Args:
        name: an architecture to build from scratch (`bert`), or a hub id or local folder.
        pretrained: load the published weights; needs a hub id or folder.
        pooler: `mean`, `max`, `cls` (first token) or `last` (last real token).
        attention: `sdpa` (fused) or `eager`, which is quicker for short texts on a CPU.
        config: the whole configuration, as a bundle keeps it; `name` then only says the family.
        options: fields of the model's configuration (`hidden_size`, `num_hidden_layers`, ...).

    Raises:
        ValueError: an unknown architecture, pooler or option.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        pooler: str = "mean",
        attention: str = "sdpa",
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if pooler not in POOLERS:
            raise ValueError(f"unknown pooler {pooler!r}; known: {', '.join(POOLERS)}")
        if attention not in ATTENTION:
            raise ValueError(f"unknown attention {attention!r}; known: {', '.join(ATTENTION)}")
        if config is not None:
            if options:
                raise ValueError(f"config is whole; {sorted(options)[0]!r} beside it is unknown")
            settings = AutoConfig.for_model(**config)
        else:
            settings = _text_config(name, pretrained=pretrained, options=options)
        if pretrained:
            self.transformer = AutoModel.from_pretrained(
                name, config=settings, attn_implementation=attention, dtype=torch.float32
            )
        else:
            self.transformer = AutoModel.from_config(
                settings, attn_implementation=attention, dtype=torch.float32
            )
        if getattr(self.transformer, "pooler", None) is not None:
            # The architecture's own pooling layer would never receive a gradient: ours replaces it.
            self.transformer.pooler = None
        self.width: int = settings.hidden_size
        self.token_width: int = self.width
        self.vocabulary_size: int = settings.vocab_size
        self.max_length: int = getattr(settings, "max_position_embeddings", 1 << 30)
        embeddings = getattr(self.transformer, "embeddings", None)
        padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
        if padding is not None:  # RoBERTa and its kin count positions from the padding id on
            self.max_length -= padding + 1
        self.pool = POOLERS[pooler]

    def forward(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Features:
        """Encode a batch of token ids."""
        output = self.transformer(input_ids=ids, attention_mask=mask.long())
        tokens = output.last_hidden_state
        return Features(self.pool(tokens, mask), tokens, mask)


def _text_config(name: str, *, pretrained: bool, options: Mapping[str, Any]) -> Any:
    if name in CONFIG_MAPPING and not pretrained:
        config = AutoConfig.for_model(name)
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"hf:{name} is no architecture known to transformers{_near(name, CONFIG_MAPPING)}, "
                f"and no folder or hub model of that name could be read ({_first_line(error)})"
            ) from error
    config = getattr(config, "text_config", None) or config
    unknown = sorted(key for key in options if not hasattr(config, key))
    if unknown:
        known = sorted(key for key in config.to_dict() if not key.startswith("_"))
        raise ValueError(
            f"hf:{name} has no option {unknown[0]!r}{_near(unknown[0], known)}; it has {known}"
        )
    for key, value in options.items():
        setattr(config, key, value)
    return config


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" (near: {', '.join(near)})" if near else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def build_tower(spec: str, libraries: Mapping[str, Callable[..., Any]], **options: Any) -> Any:
    """Build the tower that a prefixed name such as `timm:resnet10t` stands for.

    Args:
        spec: `library:name`.
        libraries: `IMAGE_LIBRARIES` or `TEXT_LIBRARIES`.
        options: passed to the library.

    Raises:
        ValueError: no prefix, an unknown one, or what the library refuses.
    """
    library, separator, name = spec.partition(":")
    if not separator or library not in libraries:
        raise ValueError(
            f"tower {spec!r} must start with one of "
            f"{', '.join(f'{known}:' for known in libraries)}, as in "
            f"{next(iter(libraries))}:NAME"
        )
    return libraries[library](name, **options)


ATTENTION = ("sdpa", "eager")
POOLERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean_pool,
    "max": _max_pool,
    "cls": _first,
    "last": _last,
}
IMAGE_LIBRARIES: dict[str, Callable[..., Any]] = {"timm": TimmImageEncoder}
TEXT_LIBRARIES: dict[str, Callable[..., Any]] = {"hf": HuggingFaceTextEncoder}
