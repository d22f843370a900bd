"""Configurations and weights of Hugging Face models, by architecture, hub id or folder."""

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of whatever client the hub uses
)
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.configuration_utils import PretrainedConfig

from align.encoders.reach import hub_if_it_answers
from align.encoders.tower import near
from align.folders import damage

ATTENTION = ("auto", "sdpa", "eager")
"""How attention is computed: fused where the architecture can, fused, or step by step."""
_NOT_AUTOMATIC = {
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
    "m2m_100": "M2M100Model",  # NLLB, the text side of some models of OpenCLIP's
}
"""Models, by their type, that `AutoModel` or, for encoders alone, its sibling leaves out."""


def configuration(
    name: str,
    side: str,
    *,
    pretrained: bool,
    config: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """The configuration of one side of a Hugging Face model.

    Args:
        name: an architecture, or a hub id or folder.
        side: `vision` or `text`: which half of a model that has both.
        pretrained: whether `name` must be a hub id or folder.
        config: the whole configuration; `name` is then not looked up.
        options: fields to change.
        defaults: likewise, unless `options` does; those that the architecture lacks are left out.

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
        with _untold():
            found, resolve = AutoConfig.for_model(name), True
    else:
        found, resolve = _published(name), False
    found = getattr(found, f"{side}_config", None) or found
    unknown = sorted(key for key in options if not hasattr(found, key))
    if unknown:
        known = sorted(key for key in found.to_dict() if not key.startswith("_"))
        raise ValueError(
            f"hf:{name} has no option {unknown[0]!r}{near(unknown[0], known)}; it has {known}"
        )
    # T5 has no id for the beginning of a text, for one.
    fitting = {key: value for key, value in (defaults or {}).items() if hasattr(found, key)}
    options = {**fitting, **options}
    if resolve:  # made once more, for what it derives from its fields
        try:
            return type(found)(**options)
        except Exception as error:  # each field has a check of its own
            raise ValueError(f"hf:{name} does not take {options}: {damage(error)}") from error
    for key, value in options.items():
        setattr(found, key, value)
    return found


@contextmanager
def _untold() -> Iterator[None]:
    """Have transformers not warn of defaults that are looked at alone: some of SigLIP's clash."""
    logger = logging.getLogger("transformers.configuration_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _published(name: str) -> PretrainedConfig:
    """The configuration in a folder or on the hub."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"hf:{name}: there is no such folder")
    with hub_if_it_answers(name) as silence:
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (HTTPError, OSError, ValueError, KeyError, TypeError) as error:
            if Path(name).is_dir():
                raise ValueError(
                    f"hf:{name}: its config.json cannot be read ({damage(error)})"
                ) from error
            known = set(CONFIG_MAPPING) - {name}
            raise ValueError(
                f"hf:{name} is no {'published model' if name in CONFIG_MAPPING else 'architecture'}"
                f" known to transformers{near(name, known)}, and no folder or hub model of that "
                f"name could be read ({damage(error)}{silence})"
            ) from error


def build_model(
    name: str,
    settings: PretrainedConfig,
    *,
    pretrained: bool,
    attention: str,
    prune: Callable[[Any], None],
) -> Any:
    """The model of a configuration, with the weights of `name` or with fresh ones; in fp32.

    Args:
        name: of the model.
        settings: its configuration.
        pretrained: whether to load weights.
        attention: one of `ATTENTION`.
        prune: takes away what is not used, and need not be among the weights.

    Raises:
        ValueError: an unknown attention, or no weights in safetensors, or too few of them.
    """
    if attention not in ATTENTION:
        raise ValueError(f"unknown attention {attention!r}; known: {', '.join(ATTENTION)}")
    family: Any = AutoModel
    encoder_alone = settings.is_encoder_decoder
    if settings.model_type in _NOT_AUTOMATIC:
        family = getattr(transformers, _NOT_AUTOMATIC[settings.model_type])
    elif encoder_alone:
        family = AutoModelForTextEncoding
    options: dict[str, Any] = {"dtype": torch.float32}
    if attention != "auto":
        options["attn_implementation"] = attention
    if pretrained:
        model = _with_weights(family, name, settings, options, prune)
    else:
        make = getattr(family, "from_config", None) or family._from_config
        try:
            model = make(settings, **options)
        except Exception as error:  # each architecture has checks of its own
            raise ValueError(f"hf:{name} could not be made: {damage(error)}") from error
        prune(model)
    # Around the encoder alone the table of embeddings would have two names.
    return model.get_encoder() if encoder_alone else model


def _with_weights(
    family: Any,
    name: str,
    settings: PretrainedConfig,
    options: dict[str, Any],
    prune: Callable[[Any], None],
) -> Any:
    with hub_if_it_answers(name) as silence:
        try:
            model, told = family.from_pretrained(
                name,
                config=settings,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except (HTTPError, OSError, SafetensorError) as error:
            raise ValueError(
                f"hf:{name} could not be made with its weights: {damage(error)}{silence}"
            ) from error
        except Exception as error:  # each architecture has checks of its own
            raise ValueError(
                f"hf:{name} could not be made with its weights: {damage(error)}"
            ) from error
    prune(model)
    if missing := sorted(set(told["missing_keys"]) & set(model.state_dict())):
        raise ValueError(
            f"hf:{name}: its weights lack {missing[0]!r} and {len(missing) - 1} more: they are not "
            f"those of {settings.model_type}"
        )
    return model


def title(name: str, settings: PretrainedConfig, *, pretrained: bool, given: bool) -> str:
    """What a tower is called: an architecture or hub id; of a folder, which may move, its type.

    Args:
        name: what the tower was built by.
        settings: its configuration.
        pretrained: whether `name` must be a hub id or folder.
        given: whether the configuration was given whole, so that `name` was not looked up.
    """
    looked_up = not given and (pretrained or name not in CONFIG_MAPPING)
    return settings.model_type if looked_up and Path(name).is_dir() else name


def pools(model: nn.Module) -> bool:
    """Whether an architecture has a pooled output of its own, as far as its signature tells."""
    returned = inspect.signature(type(model).forward).return_annotation
    kinds = get_args(returned) or (returned,)
    return inspect.Signature.empty in kinds or any(
        "pooler_output" in getattr(kind, "__dataclass_fields__", {}) for kind in kinds
    )


def plain(settings: PretrainedConfig) -> dict[str, Any]:
    """A configuration as JSON values, complete, whatever defaults a later version has.

    Where it was read from is no part of it: that may be a folder of this machine.
    """
    return {**json.loads(settings.to_json_string(use_diff=False)), "_name_or_path": ""}


def checkpoint_gradients(model: Any, enabled: bool) -> None:
    """Have a Hugging Face model keep no activations inside its blocks, or keep them again.

    Raises:
        ValueError: it cannot.
    """
    # Later releases of transformers warn of the old names; earlier ones know no others.
    verb = "enable" if enabled else "disable"
    switch = getattr(model, f"activation_checkpointing_{verb}", None) or getattr(
        model, f"gradient_checkpointing_{verb}"
    )
    switch(*([{"use_reentrant": False}] * enabled))
