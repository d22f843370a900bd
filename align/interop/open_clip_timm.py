"""A tower of timm's as OpenCLIP's adapter of timm: which of its ways to pool and project fits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from torch import Tensor, nn
from torch.nn import functional as F

from align.encoders.pooling import NATIVE
from align.encoders.timm_tower import TimmImageEncoder
from align.model import DualEncoder

_POOLS = {"mean": "avg", "max": "max", "cls": "token"}
_OWN_POOLS = ("avg", "token", "map", "max")


def timm_part(
    model: DualEncoder, tower: TimmImageEncoder, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`vision_cfg` and the weights of a timm tower with its projection.

    OpenCLIP has several ways to cut and to extend a timm model, which differ from model to model in
    what is normalised and when. Each that may fit is built, given the weights and compared with the
    tower on pictures of noise; the first that says the same is taken.

    Args:
        model: the whole.
        tower: its image tower.
        folder: made where the architecture has options that OpenCLIP's configuration has no key
            for; it holds them in timm's format.

    Raises:
        ValueError: none fits.
    """
    size, kind = model.config.image_size, model.config.image.projection
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(model.device)
    training = tower.training
    tower.eval()
    expected = model.image_projection(tower.encode(noise).pooled).cpu()
    tower.train(training)
    weights = {f"trunk.{key}": value.cpu() for key, value in tower.backbone.state_dict().items()}
    last = {key: value.cpu() for key, value in model.image_projection.state_dict().items()}
    for section in _candidates(tower, kind, _section(model, tower, folder)):
        try:
            visual: Any = _build_vision_tower(model.config.dim, CLIPVisionCfg(**section)).eval()
            visual.load_state_dict({**weights, **_projection(visual, section, last)})
            found = visual(noise.cpu())
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            continue  # other shapes: another way to pool or to project
        if found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4, rtol=1e-3):
            state = {f"visual.{key}": value for key, value in visual.state_dict().items()}
            return section, state
    raise ValueError(
        f"the image tower {tower.name} with pooling {tower.pooling} and projection {kind} does not "
        "fit OpenCLIP's format; `--to onnx` takes any model"
    )


def _section(model: DualEncoder, tower: TimmImageEncoder, folder: Path) -> dict[str, Any]:
    """What is the same in every way to cut it: the architecture, its options, the picture size."""
    name, size = tower.name.removeprefix("timm:"), model.config.image_size
    options = {key: value for key, value in tower.options.items() if key != "global_pool"}
    section: dict[str, Any] = {"image_size": size, "timm_model_pretrained": False}
    if "drop_path_rate" in options:
        section["timm_drop_path"] = options.pop("drop_path_rate")
    if rate := options.pop("patch_drop_rate", 0):
        section["patch_dropout"] = rate
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is not None and known.fixed_input_size:
        options.setdefault("img_size", size)
        if options["img_size"] in (known.input_size[-1], known.input_size[1:]):
            del options["img_size"]  # its own
    if options:
        described = {"architecture": name.partition(".")[0], "num_classes": 0, "global_pool": ""}
        try:
            text = json.dumps({**described, "model_args": options, "pretrained_cfg": {}}, indent=2)
        except TypeError as error:
            raise ValueError(
                f"the options {sorted(options)} of {tower.name} cannot be written down ({error}); "
                "`--to onnx` takes any model"
            ) from error
        folder.mkdir()
        (folder / "config.json").write_text(text + "\n")
        name = f"local-dir:{folder}"
    return {**section, "timm_model_name": name}


def _candidates(
    tower: TimmImageEncoder, kind: str, section: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Ways of OpenCLIP's to pool and project, the likeliest first."""
    pool = tower.options.get("global_pool", "")
    if tower.pooling != NATIVE:
        pool = _POOLS.get(tower.pooling)
        if pool is None:
            return
    pools = (pool,) if pool else _OWN_POOLS
    biased = {"timm_proj_bias": kind == "affine"}
    if kind == "none":
        yield from ({**section, "timm_pool": one, "timm_proj": "none"} for one in pools)
    elif kind == "mlp":
        yield {**section, "timm_pool": pool, "timm_proj": "mlp"}
    else:
        yield {**section, "timm_pool": pool, "timm_proj": "linear", **biased}
        # The model's own classifier, made as wide as the space.
        yield from ({**section, "timm_pool": one, "timm_proj": None} for one in pools)


def _projection(visual: Any, section: dict[str, Any], last: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our projection under the names of the adapter's."""
    match section["timm_proj"]:
        case "linear":
            return {f"head.proj.{key}": value for key, value in last.items()}
        case "mlp":  # wider inside than ours: what is added gives zero
            perceptron = visual.head.mlp
            more = perceptron.fc1.out_features - len(last["0.weight"])
            return {
                "head.mlp.fc1.weight": F.pad(last["0.weight"], (0, 0, 0, more)),
                "head.mlp.fc1.bias": torch.zeros_like(perceptron.fc1.bias),
                "head.mlp.fc2.weight": F.pad(last["2.weight"], (0, more)),
            }
        case None:
            trunk = visual.trunk
            classifier = trunk.get_classifier()
            if not isinstance(classifier, nn.Linear):
                raise ValueError("its classifier is no linear map")
            name = next(name for name, part in trunk.named_modules() if part is classifier)
            last = {"bias": torch.zeros(classifier.out_features), **last}
            return {f"trunk.{name}.{key}": last[key] for key in classifier.state_dict()}
    return {}
