"""Configurations and weights of Hugging Face models, by architecture, hub id or folder."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.configuration_utils import PretrainedConfig

from align.encoders.tower import first_line, near

ATTENTION = ("sdpa", "eager")
_NOT_AUTOMATIC = {"siglip_text_model": "SiglipTextModel", "siglip2_text_model": "Siglip2TextModel"}
"""Models that `AutoModel` leaves out, by their type."""


def configuration(
    name: str,
    side: str,
    *,
    pretrained: bool,
    config: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> PretrainedConfig:
    """The configuration of one side of a Hugging Face model.

    Args:
        name: an architecture, or a hub id or folder.
        side: `vision` or `text`: which half of a model that has both.
        pretrained: whether `name` must be a hub id or folder.
        config: the whole configuration; `name` is then not looked up.
        options: fields to change.

    Raises:
        ValueError: an unknown architecture or field.
    """
    if config is not None:
        if options:
            raise ValueError(f"config is whole; {sorted(options)[0]!r} beside it is unknown")
        if "auto_map" in config:
            raise ValueError("a configuration with auto_map runs code of others; it is refused")
        return AutoConfig.for_model(**config)
    if name in CONFIG_MAPPING and not pretrained:
        found = AutoConfig.for_model(name)
    else:
        try:
            found = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"hf:{name} is no architecture known to transformers{near(name, CONFIG_MAPPING)}, "
                f"and no folder or hub model of that name could be read ({first_line(error)})"
            ) from error
    found = getattr(found, f"{side}_config", None) or found
    unknown = sorted(key for key in options if not hasattr(found, key))
    if unknown:
        known = sorted(key for key in found.to_dict() if not key.startswith("_"))
        raise ValueError(
            f"hf:{name} has no option {unknown[0]!r}{near(unknown[0], known)}; it has {known}"
        )
    for key, value in options.items():
        setattr(found, key, value)
    return found


def build_model(name: str, settings: PretrainedConfig, *, pretrained: bool, attention: str) -> Any:
    """The model of a configuration, with the weights of `name` or with fresh ones; in fp32.

    Raises:
        ValueError: an unknown attention, or no weights in safetensors.
    """
    if attention not in ATTENTION:
        raise ValueError(f"unknown attention {attention!r}; known: {', '.join(ATTENTION)}")
    family: Any = AutoModel
    if settings.model_type in _NOT_AUTOMATIC:
        family = getattr(transformers, _NOT_AUTOMATIC[settings.model_type])
    elif settings.is_encoder_decoder:  # only the encoder is wanted
        family = AutoModelForTextEncoding
    options: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
    try:
        if not pretrained:
            make = getattr(family, "from_config", None) or family._from_config
            return make(settings, **options)
        return family.from_pretrained(
            name, config=settings, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"hf:{name} could not be made{' with its weights' if pretrained else ''}: "
            f"{first_line(error)}"
        ) from error


def plain(settings: PretrainedConfig) -> dict[str, Any]:
    """A configuration as JSON values, complete, whatever defaults a later version has."""
    return json.loads(settings.to_json_string(use_diff=False))
