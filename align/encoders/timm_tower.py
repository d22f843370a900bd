"""Image towers from timm: any of its backbones, without the classifier."""

from collections.abc import Iterable
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.models import group_parameters
from torch import Tensor, nn

from align.encoders.pooling import NATIVE, build_pooler
from align.encoders.tower import Features, ImageTower, first_line, near


class TimmImageEncoder(ImageTower):
    """A timm backbone without its classifier.

    Args:
        name: a timm architecture, as `timm.list_models()` lists them; `hf-hub:OWNER/NAME`; or
            `local-dir:FOLDER`, a folder in the format of timm's models on the hub.
        pretrained: fetch the published weights, or read those of the folder.
        pooling: `native` (the backbone's own), `mean`, `max`, `cls` or `attention`, over positions.
        mean: per channel, of pixel values in [0, 1]; None = the backbone's own.
        std: likewise.
        image_size: side of the pictures, for backbones that are built for one size.
        options: keyword arguments of `timm.create_model`, such as `patch_drop_rate`.

    Raises:
        ValueError: timm does not know the name or an option, or there are no such weights.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        pooling: str = NATIVE,
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
        image_size: int | None = None,
        **options: Any,
    ) -> None:
        backbone = _create(name, pretrained, pooling, image_size, options)
        cfg = backbone.default_cfg
        super().__init__(cfg["mean"] if mean is None else mean, cfg["std"] if std is None else std)
        self.name = f"timm:{cfg['architecture']}" if ":" in name else f"timm:{name}"
        self.options = options
        self.pooling = pooling
        self.backbone: Any = backbone
        self.token_width: int = backbone.num_features
        # Some families, such as MobileNet, widen what they pooled once more.
        self.width: int = getattr(backbone, "head_hidden_size", None) or self.token_width
        if pooling != NATIVE:
            if self.width != self.token_width:
                raise ValueError(
                    f"timm:{name} goes on after its own pooling; no pooling but {NATIVE} fits it"
                )
            self.pooler = build_pooler(pooling, self.width)

    @property
    def body(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def recipe(self) -> dict[str, Any]:
        """Options that rebuild the tower without weights."""
        pooling = {} if self.pooling == NATIVE else {"pooling": self.pooling}
        return {**self.options, **pooling, **self.statistics}

    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode normalised pixels."""
        feature_map = self.backbone.forward_features(pixels)
        tokens = as_tokens(feature_map, self.token_width)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if self.pooling == NATIVE:
            pooled = self.backbone.forward_head(feature_map, pre_logits=True)
        else:
            places = tokens
            if self.pooling != "cls":  # the class token and registers are no places
                places = tokens[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
            pooled = self.pooler(places, mask[:, : places.shape[1]])
        return Features(pooled, tokens, mask)

    def layer_groups(self) -> list[list[str]]:
        """The groups that timm knows of the architecture."""
        groups = group_parameters(self.backbone, self.backbone.group_matcher())
        ordered = [[f"backbone.{name}" for name in groups[key]] for key in sorted(groups)]
        own = [name for name, _ in self.named_parameters() if not name.startswith("backbone.")]
        return [*ordered[:-1], [*ordered[-1], *own]]

    def _checkpoint_gradients(self, enabled: bool) -> None:
        self.backbone.set_grad_checkpointing(enabled)


def _create(
    name: str, pretrained: bool, pooling: str, image_size: int | None, options: dict[str, Any]
) -> Any:
    """Timm's own factory, with its mistakes told in one line."""
    if ":" not in name and not timm.is_model(name):
        raise ValueError(
            f"timm has no model {name!r}{near(name, timm.list_models())}; "
            "`timm.list_models()` lists them all"
        )
    if pooling != NATIVE:
        options = {**options, "global_pool": ""}
    known = None if ":" in name else timm.get_pretrained_cfg(name, allow_unregistered=True)
    if image_size and known and known.fixed_input_size:
        options = {"img_size": image_size, **options}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"timm:{name} does not take these options: {error}") from error
    except Exception as error:  # each way to weights has errors of its own
        raise ValueError(
            f"timm:{name} could not be made"
            + (" with its weights" if pretrained else "")
            + f": {first_line(error)}"
        ) from error


def as_tokens(
    feature_map: Float[Tensor, "batch ..."], width: int
) -> Float[Tensor, "batch tokens width"]:
    """Flatten what a backbone returns: `[b, n, c]`, `[b, c, h, w]` or `[b, h, w, c]`."""
    if feature_map.ndim == 3:
        return feature_map
    # Hierarchical transformers such as Swin keep the channels last; everything else first.
    channels = 1 if feature_map.shape[1] == width else 3
    return feature_map.movedim(channels, -1).flatten(1, 2)
