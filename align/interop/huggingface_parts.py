"""A dual encoder as one of Hugging Face's models: which one fits, its configuration and weights."""

import json
import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from align.encoders.tower import TowerModule, refusals
from align.model import DualEncoder

FAMILIES = {
    "clip": "CLIP",
    "siglip": "Siglip",
    "vision-text-dual-encoder": "VisionTextDualEncoder",
}
"""How the names of the classes begin, by a model's type."""
_MATRICES = ("linear", "none")
"""Projections that are a matrix: one of them is the identity."""


def as_huggingface(model: DualEncoder) -> tuple[str, Any]:
    """Hugging Face's model with a dual encoder's weights, and how the name of its class begins.

    `CLIP` and `Siglip` where both towers are theirs, else `VisionTextDualEncoder`.

    Args:
        model: stays as it is.

    Raises:
        ValueError: a part that fits none of the three.
    """
    kinds = (_model_type(model.image), _model_type(model.text))
    if kinds == ("siglip_vision_model", "siglip_text_model"):
        family, make = FAMILIES["siglip"], _siglip
    elif kinds == ("clip_vision_model", "clip_text_model"):
        family, make = FAMILIES["clip"], _with_matrices
    else:
        family, make = FAMILIES["vision-text-dual-encoder"], _with_matrices
    vision, vision_weights = _image_part(model, family)
    text, text_weights = _text_part(model, family)
    return family, make(model, family, (vision, text), (vision_weights, text_weights)).eval()


def _with_matrices(
    model: DualEncoder,
    family: str,
    settings: tuple[dict[str, Any], dict[str, Any]],
    weights: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> Any:
    """A model with a matrix behind each tower, and no bias."""
    if model.logit_bias != 0:
        raise ValueError(
            f"the logit_bias {float(model.logit_bias):.3g} does not fit {family}Model, which has "
            "none"
        )
    matrices = [_matrix(model, side, family) for side in ("image", "text")]
    with refusals(f"{model.image.name} with {model.text.name} fits no {family}Model"):
        config = getattr(transformers, f"{family}Config")(
            vision_config=settings[0],
            text_config=settings[1],
            projection_dim=model.config.dim,
            logit_scale_init_value=float(model.logit_scale),
        )
        whole: Any = getattr(transformers, f"{family}Model")(config)
        text_weights, times = dict(weights[1]), 1.0
        if _pooling(model.text) == "cls":
            times = _pass_first_token(whole.text_model, text_weights)
        whole.vision_model.load_state_dict(weights[0])
        whole.text_model.load_state_dict(text_weights)
        whole.visual_projection.load_state_dict({"weight": matrices[0]})
        whole.text_projection.load_state_dict({"weight": matrices[1] * times})
    return whole


def _siglip(
    model: DualEncoder,
    family: str,
    settings: tuple[dict[str, Any], dict[str, Any]],
    weights: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> Any:
    """A model with a bias, whose only map behind a tower is that of the texts, with a bias too."""
    if model.config.image.projection != "none":
        raise ValueError(
            f"the image projection {model.config.image.projection!r} does not fit {family}Model, "
            "which has none"
        )
    text, text_weights = dict(settings[1]), dict(weights[1])
    projection = model.text_projection
    if isinstance(projection, nn.Linear):  # P (H x + h) + p = (P H) x + (P h + p)
        matrix, head = projection.weight.detach().cpu().double(), text_weights["head.weight"]
        bias = matrix @ text_weights["head.bias"].double()
        if projection.bias is not None:
            bias = bias + projection.bias.detach().cpu().double()
        text_weights |= {"head.weight": (matrix @ head.double()).float(), "head.bias": bias.float()}
        text["projection_size"] = model.config.dim
    elif not isinstance(projection, nn.Identity):
        raise ValueError(
            f"the text projection {model.config.text.projection!r} does not fit {family}Model"
        )
    with refusals(f"{model.image.name} with {model.text.name} fits no {family}Model"):
        whole: Any = transformers.SiglipModel(
            transformers.SiglipConfig(vision_config=settings[0], text_config=text)
        )
        whole.vision_model.load_state_dict(weights[0])
        whole.text_model.load_state_dict(text_weights)
    with torch.no_grad():
        whole.logit_scale.fill_(float(model.logit_scale))
        whole.logit_bias.fill_(float(model.logit_bias))
    return whole


def _model_type(tower: TowerModule) -> str | None:
    """Hugging Face's name of a tower's architecture."""
    return tower.recipe()["config"]["model_type"] if tower.name.startswith("hf:") else None


def _pooling(tower: TowerModule) -> str:
    recipe = tower.recipe()
    return recipe.get("pooling") or recipe.get("pooler") or "native"


def _image_part(model: DualEncoder, family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of the image tower."""
    tower: Any = model.image
    if _pooling(tower) != "native":
        raise ValueError(
            f"the image tower's pooling {_pooling(tower)!r} does not fit {family}Model, which "
            "takes the architecture's own"
        )
    library, _, name = tower.name.partition(":")
    if library == "hf":
        return {"hidden_size": tower.width, **tower.recipe()["config"]}, _weights(tower.body)
    if library != "timm":
        raise ValueError(f"the image tower {tower.name} does not fit {family}Model")
    options = dict(tower.options)
    try:
        json.dumps(options)
    except TypeError as error:
        raise ValueError(f"an option of {tower.name} is no JSON value: {error}") from error
    settings = transformers.TimmWrapperConfig(architecture=name, model_args=options)
    weights = {f"timm_model.{key}": value for key, value in _weights(tower.body).items()}
    # It asks for the width, which timm's configuration leaves out, and for no classes.
    more = {"hidden_size": tower.width, "num_classes": 0, "label_names": []}
    return {**settings.to_dict(), **more}, weights


def _text_part(model: DualEncoder, family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of the text tower."""
    tower: Any = model.text
    if not tower.name.startswith("hf:"):
        raise ValueError(f"the text tower {tower.name} does not fit {family}Model")
    if _pooling(tower) not in ("native", "cls"):
        raise ValueError(
            f"the text tower's pooler {_pooling(tower)!r} does not fit {family}Model, which takes "
            "the architecture's own"
        )
    if _pooling(tower) == "cls" and family != FAMILIES["vision-text-dual-encoder"]:
        raise ValueError(f"the text tower's pooler 'cls' does not fit {family}Model")
    return tower.recipe()["config"], _weights(tower.body)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights on the CPU; fp32 where they are no counters."""
    return {
        key: value.cpu().float() if value.is_floating_point() else value.cpu()
        for key, value in module.state_dict().items()
    }


def _matrix(model: DualEncoder, side: str, family: str) -> Tensor:
    """The matrix of a projection."""
    kind = getattr(model.config, side).projection
    if kind not in _MATRICES:
        raise ValueError(
            f"the {side} projection {kind!r} does not fit {family}Model, which has a matrix there"
        )
    if kind == "none":
        return torch.eye(model.config.dim)
    return getattr(model, f"{side}_projection").weight.detach().cpu().float()


def _pass_first_token(text: Any, weights: dict[str, Tensor]) -> float:
    r"""Make the pooling layer of BERT and its kin pass the first token through.

    That layer is $\tanh(W h + b)$. With $W = \epsilon I$ and $b = 0$ it is
    $\epsilon h - (\epsilon h)^3 / 3 + \dots$, and the cubic term is below the rounding of fp32
    where $(\epsilon h)^2 / 3 < 2^{-25}$: $\epsilon |h| \le 2^{-12}$ is enough. $|h|$ has a bound,
    because h leaves a layer norm: $|\gamma| \sqrt{d} + |\beta|$. A power of two changes no digit
    of h, nor does its inverse, which the projection is multiplied by, so that the embedding is the
    one it was even before it is given unit length.

    Args:
        text: Hugging Face's model, which has the layer.
        weights: of the tower, which has not; they are added here.

    Returns:
        What the projection has to be multiplied by.

    Raises:
        ValueError: the architecture has no such layer.
    """
    pooler = getattr(text, "pooler", None)
    inside = isinstance(getattr(pooler, "dense", None), nn.Linear)
    name = "pooler.dense" if inside else "pooler"
    layer: Any = getattr(pooler, "dense", None) if inside else pooler
    activation = (
        getattr(pooler, "activation", None)
        if inside
        else text.__dict__["_modules"].get("pooler_activation")
    )
    norms = [part for part in text.modules() if isinstance(part, nn.LayerNorm)]
    if not isinstance(layer, nn.Linear) or not isinstance(activation, nn.Tanh) or not norms:
        raise ValueError(
            f"the text tower's pooler 'cls' does not fit: {text.config.model_type} has no pooling "
            "layer of its own that would pass it on"
        )
    names = {id(part): key for key, part in text.named_modules()}
    bound = max(
        float(weights[f"{names[id(norm)]}.weight"].abs().max()) * math.sqrt(layer.in_features)
        + float(weights[f"{names[id(norm)]}.bias"].abs().max())
        for norm in norms
    )
    shrink = 2.0 ** math.floor(math.log2(2.0**-12 / bound))
    weights[f"{name}.weight"] = torch.eye(layer.in_features) * shrink
    weights[f"{name}.bias"] = torch.zeros(layer.in_features)
    return 1 / shrink
