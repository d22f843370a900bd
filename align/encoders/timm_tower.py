"""Image towers from timm: any of its backbones, without the classifier."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Bool, Float
from timm.models import group_parameters
from torch import Tensor, nn

from align.encoders.pooling import NATIVE, build_image_pooler
from align.encoders.reach import hub_if_it_answers
from align.encoders.tower import Features, ImageTower, near, refuse_small
from align.folders import damage

WEIGHTS = "model.safetensors"


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
        backbone, options = _create(name, pretrained, pooling, image_size, options)
        cfg = backbone.default_cfg
        super().__init__(cfg["mean"] if mean is None else mean, cfg["std"] if std is None else std)
        self.name = f"timm:{cfg['architecture']}" if ":" in name else f"timm:{name}"
        self.options = options
        self.pooling = pooling
        self.backbone: Any = backbone
        # Some families, such as MobileNet, widen what they pooled once more.
        self.width: int = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        self.token_width: int = backbone.num_features if pooling == NATIVE else self.width
        self.picture_size = built_for(backbone)
        patches = getattr(backbone, "patch_embed", None)
        refuse_small(self.name, self.picture_size, getattr(patches, "patch_size", None))
        if pooling == NATIVE:
            return
        if pooling == "cls" and not getattr(backbone, "num_prefix_tokens", 0):
            raise ValueError(f"{self.name} has no class token; choose another pooling")
        self.pooler = build_image_pooler(pooling, self.width)

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
        features = self.backbone.forward_features(pixels)
        pooled = self.backbone.forward_head(features, pre_logits=True)
        if self.pooling == NATIVE:
            tokens = as_tokens(features, self.token_width)
            return Features(pooled, tokens, _all(tokens))
        if pooled.ndim < 3:
            raise ValueError(f"{self.name} fits no pooling but {NATIVE}")
        # Without a pooling of its own, a head normalises each place.
        tokens = as_tokens(pooled, self.token_width)
        places = tokens
        if self.pooling != "cls":  # the class token and registers are no places
            places = tokens[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        return Features(self.pooler(places, _all(places)), tokens, _all(tokens))

    def layer_groups(self) -> list[list[str]]:
        """The groups that timm knows of the architecture."""
        ordered = timm_groups(self.backbone, "backbone.")
        own = [name for name, _ in self.named_parameters() if not name.startswith("backbone.")]
        return [*ordered[:-1], [*ordered[-1], *own]]

    def _checkpoint_gradients(self, enabled: bool) -> None:
        self.backbone.set_grad_checkpointing(enabled)


_NOT_OURS = {
    "in_chans": "pictures have 3 channels",
    "num_classes": "a tower has no classifier",
    "features_only": "a tower pools its last features",
    "checkpoint_path": "weights lie in a folder, local:FOLDER",
    "scriptable": "towers are compiled otherwise",
    "exportable": "towers are exported otherwise",
}
_NO_PART_OF_IT = ("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
"""Options that say where weights are, not what the architecture is."""


def _create(
    name: str, pretrained: bool, pooling: str, image_size: int | None, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Timm's own factory, with its mistakes told in one line; and the options it was given."""
    for key in options.keys() & _NOT_OURS.keys():
        raise ValueError(f"timm:{name} does not take {key!r} here: {_NOT_OURS[key]}")
    if pooling == NATIVE and options.get("global_pool") == "":
        raise ValueError(f"timm:{name} without a global_pool needs another pooling than {NATIVE}")
    kind, _, place = name.rpartition(":")
    asks_the_hub = kind == "hf-hub" or (pretrained and not kind)
    with hub_if_it_answers(place if asks_the_hub else ".") as silence:
        saved, fixed = _known(name, pretrained, silence)
        options = {**saved, **options}
        if image_size and fixed:
            options = {"img_size": image_size, **options}
        own = {} if pooling == NATIVE else {"global_pool": ""}
        try:
            with _not_loaded() as missing:
                made: Any = timm.create_model(
                    name, pretrained=pretrained, num_classes=0, **{**options, **own}
                )
        except TypeError as error:
            raise ValueError(f"timm:{name} does not take these options: {error}") from error
        except Exception as error:  # each way to weights has errors of its own
            raise ValueError(
                f"timm:{name} could not be made"
                + (" with its weights" if pretrained else "")
                + f": {damage(error)}{silence}"
            ) from error
    if missing:  # timm is content with what there is; options may add weights, the rest must be
        plain: Any = timm.create_model(made.default_cfg["architecture"], num_classes=0, **saved)
        if lost := sorted(missing & plain.state_dict().keys()):
            raise ValueError(f"timm:{name}: its weights lack {lost[0]!r} and {len(lost) - 1} more")
    return made, {key: value for key, value in options.items() if key not in _NO_PART_OF_IT}


@contextmanager
def _not_loaded() -> Iterator[set[str]]:
    """Names of the weights that timm finds none for in a `with` block; it only logs them."""
    found: set[str] = set()

    def note(record: logging.LogRecord) -> bool:
        if told := re.match(r"Missing keys \((.*?)\)", record.getMessage()):
            found.update(told[1].split(", "))
        return record.levelno >= before

    builder = logging.getLogger("timm.models._builder")
    before, level = builder.getEffectiveLevel(), builder.level
    builder.addFilter(note)
    builder.setLevel(logging.INFO)
    try:
        yield found
    finally:
        builder.setLevel(level)
        builder.removeFilter(note)


def _known(name: str, pretrained: bool, silence: str) -> tuple[dict[str, Any], bool]:
    """What options something published was made with; whether pictures have a fixed size."""
    kind, _, place = name.rpartition(":")
    if not kind:
        if not timm.is_model(name):
            raise ValueError(
                f"timm has no model {name!r}{near(name, timm.list_models())}; "
                "`timm.list_models()` lists them all"
            )
        try:
            known = timm.get_pretrained_cfg(name, allow_unregistered=True)
        except RuntimeError as error:
            raise ValueError(f"timm:{name}: {damage(error)}") from error
        return {}, bool(known and known.fixed_input_size)
    if kind == "hf-hub":
        try:
            published, _, arguments = timm.models.load_model_config_from_hf(place)
        except Exception as error:  # each way to the hub has errors of its own
            raise ValueError(f"timm:{name} could not be read: {damage(error)}{silence}") from error
    elif kind == "local-dir":
        published, arguments = _in_folder(Path(place), pretrained)
    else:
        raise ValueError(f"timm:{name}: {kind}: is neither local-dir: nor hf-hub:")
    wanted = {key: value for key, value in (arguments or {}).items() if key not in _NOT_OURS}
    return wanted, bool(published.get("fixed_input_size"))


def _in_folder(folder: Path, pretrained: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a folder in timm's format says of the model in it."""
    if not folder.is_dir():
        raise ValueError(f"timm:local-dir:{folder}: there is no such folder")
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(told, dict) or not timm.is_model(str(told.get("architecture"))):
        raise ValueError(f"{folder / 'config.json'} names no architecture of timm's")
    if pretrained and not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no weights: {WEIGHTS} is missing (pickles are not read)")
    return told.get("pretrained_cfg", told), told.get("model_args") or {}


def built_for(backbone: Any) -> int | None:
    """The side of the pictures that a backbone insists on; None = it says nothing."""
    patches = getattr(backbone, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    free = getattr(patches, "dynamic_img_pad", False) or not getattr(
        patches, "strict_img_size", True
    )
    return None if size is None or free else max(size)


def timm_groups(backbone: nn.Module, prefix: str) -> list[list[str]]:
    """Names of a backbone's parameters from input to output, as timm groups its layers.

    Args:
        backbone: a timm model.
        prefix: stands before each name.
    """
    model: Any = backbone
    groups = group_parameters(model, model.group_matcher())
    return [[f"{prefix}{name}" for name in groups[key]] for key in sorted(groups)]


def _all(tokens: Float[Tensor, "batch tokens width"]) -> Bool[Tensor, "batch tokens"]:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def as_tokens(
    feature_map: Float[Tensor, "batch ..."], width: int
) -> Float[Tensor, "batch tokens width"]:
    """Flatten what a backbone returns: `[b, n, c]`, `[b, c, h, w]` or `[b, h, w, c]`."""
    if feature_map.ndim == 3:
        return feature_map
    # Hierarchical transformers such as Swin keep the channels last; everything else first.
    channels = 1 if feature_map.shape[1] == width else 3
    return feature_map.movedim(channels, -1).flatten(1, 2)
