"""A run that goes on from a bundle with all of its weights, instead of building a model anew."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align import hub, interop
from align.bundle import fingerprint, is_bundle, load, self_contained
from align.checkpoint import checkpoints
from align.draws import NoDraws
from align.folders import json_object
from align.model import DualEncoder, DualEncoderConfig
from align.objective import ContrastiveObjective
from align.tokenizer import Tokenizer
from pipelines import run_folder
from pipelines.config import ConfigError, read_yaml
from pipelines.importing import no_bars
from pipelines.schemas import PretrainConfig
from pipelines.schemas.training import ImageTowerConfig, ModelConfig, TextTowerConfig

_KEPT = "start"
"""What a run folder keeps of the bundle, so that going on does not need it: no weights."""


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        tokenizer: that of the bundle.
        weights: of the whole model; None where a checkpoint has them.
        origin: what is told of the bundle: its name, fingerprint and history.
    """

    tokenizer: Tokenizer
    weights: Mapping[str, Tensor] | None
    origin: dict[str, Any]

    @torch.no_grad()
    def put_into(self, objective: ContrastiveObjective) -> None:
        """Give an objective the weights, the temperature and, where both have one, the bias.

        A bundle's bias of zero stands for none: then the loss keeps its own.

        Raises:
            ConfigError: the bundle has not one temperature but several.
        """
        if self.weights is None:
            return
        model, loss = objective.model, objective.loss
        model.load_state_dict(self.weights)
        if model.logit_scale.numel() != 1 or model.logit_bias.numel() != 1:
            raise ConfigError(f"start_from: {self.origin['bundle']} has several temperatures")
        loss.logit_scale.copy_(model.logit_scale.reshape(()))
        loss.scale()  # a temperature below loss.min_temperature is set to it
        if loss.logit_bias is not None and bool(model.logit_bias.any()):
            loss.logit_bias.copy_(model.logit_bias.reshape(()))

    def keep(self, out: Path) -> None:
        """Write into a run folder what it takes to go on without the bundle."""
        (out / _KEPT).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(out / _KEPT / "tokenizer")
        run_folder.write_json(out / _KEPT / "origin.json", self.origin)

    def told(self, objective: ContrastiveObjective) -> str:
        """Where everything comes from, in a line."""
        loss = objective.loss
        numbers = f"temperature {(-loss.logit_scale).exp().item():.4g}"
        if loss.logit_bias is not None:
            numbers += f" and bias {loss.logit_bias.item():.4g}"
        return (
            f"towers, projections, tokenizer and {numbers} from {self.origin['bundle']}; "
            "loss.temperature is not used"
        )


def starting(config: PretrainConfig) -> tuple[PretrainConfig, Start | None]:
    """What `start_from` names, and the configuration with the bundle's model and tokenizer in it.

    A run that goes on from a checkpoint takes both from its own folder.

    Raises:
        ConfigError: there is no such bundle, or another model or tokenizer was given too.
    """
    if config.start_from is None:
        return config, None
    if config.resume and checkpoints(config.out) and (kept := _kept(config)):
        return kept
    place = config.start_from
    model, origin = _read(place)
    temperature = (-model.logit_scale).exp().flatten()[0].item()
    _refuse_others(config, _described(model), model.tokenizer.clean, temperature)
    wanted = replace(
        self_contained(model),
        image_size=_given(config.model, "image_size", model.config.image_size),
        context_length=_given(config.model, "context_length", model.config.context_length),
    )
    weights, tokenizer = model.state_dict(), model.tokenizer
    if wanted.context_length != tokenizer.context_length:
        tokenizer = _cut(place, tokenizer, wanted.context_length)
    _refuse_misfits(place, wanted, tokenizer)
    described = json.loads(json.dumps(wanted.to_dict()))
    return _with(config, described, tokenizer.clean), Start(tokenizer, weights, origin)


def _kept(config: PretrainConfig) -> tuple[PretrainConfig, Start] | None:
    """What the run folder says; None where it holds another run."""
    earlier = read_yaml(config.out / "config.yaml")
    if earlier.get("start_from") != config.start_from:
        return None
    clean = earlier["tokenizer"]["clean"]
    _refuse_others(config, earlier["model"], clean, earlier["loss"]["temperature"])
    sizes = {
        key: _given(config.model, key, earlier["model"][key])
        for key in ("image_size", "context_length")
    }
    resolved = _with(config, {**earlier["model"], **sizes}, clean)
    folder = config.out / _KEPT
    tokenizer = Tokenizer.load(
        folder / "tokenizer", context_length=resolved.model.context_length, clean=clean
    )
    return resolved, Start(tokenizer, None, run_folder.read_json(folder / "origin.json"))


def _read(place: str) -> tuple[DualEncoder, dict[str, Any]]:
    """The model, and what is told of it."""
    try:
        with no_bars():
            model = load(place)
    except (ValueError, OSError) as error:
        inside = Path(place) / "bundle"
        hint = f"; {inside} is one" if is_bundle(inside) else ""
        raise ConfigError(f"start_from: {error}{hint}") from error
    origin: dict[str, Any] = {"bundle": _name(place)}
    if interop.is_foreign(place):
        return model, origin
    history = json_object(hub.find(place), "config.json").get("provenance") or {}
    known = {key: history[key] for key in ("data", "samples", "start_from") if key in history}
    return model, {**origin, "fingerprint": fingerprint(place), **known}


def _name(place: str) -> str:
    """A hub id as it is; of a folder no more than tells it from others."""
    folder = Path(place).resolve()
    if not folder.exists():
        return place
    return f"{folder.parent.name}/{folder.name}" if folder.name == "bundle" else folder.name


def _described(model: DualEncoder) -> dict[str, Any]:
    return json.loads(json.dumps(self_contained(model).to_dict()))


def _cut(place: str, tokenizer: Tokenizer, context_length: int) -> Tokenizer:
    try:
        return Tokenizer(tokenizer.backend, context_length=context_length, clean=tokenizer.clean)
    except ValueError as error:
        raise ConfigError(f"model.context_length: {error} ({place})") from error


def _refuse_misfits(place: str, wanted: DualEncoderConfig, tokenizer: Tokenizer) -> None:
    """See whether the towers take other sizes than they were made for, where they are asked to."""
    try:
        with NoDraws(), no_bars():
            DualEncoder(wanted, tokenizer)
    except ValueError as error:
        raise ConfigError(f"start_from: {place}: {error}") from error


def _refuse_others(
    config: PretrainConfig, found: Mapping[str, Any], clean: str, temperature: float
) -> None:
    """A model, tokenizer or temperature that was given beside the bundle must be the bundle's.

    Of options it is enough that the bundle's have them; the sizes of pictures and texts may be
    others, where the towers take them. The default temperature is that of a run that named none,
    as its config.yaml has it.

    Raises:
        ConfigError: a line for each key that was given otherwise.
    """
    given = [*_given_otherwise(config.model, found)]
    tokenizer = config.tokenizer
    if tokenizer.name is not None:
        given.append(("tokenizer.name", tokenizer.name, "its own"))
    if tokenizer.clean not in (None, clean):
        given.append(("tokenizer.clean", tokenizer.clean, clean))
    asked = config.loss.temperature
    known = (type(config.loss)().temperature, temperature)
    if "temperature" in config.loss.model_fields_set and not any(
        math.isclose(asked, one, rel_tol=_AS_TOLD) for one in known
    ):
        given.append(("loss.temperature", asked, float(f"{temperature:.4g}")))
    if given:
        raise ConfigError(
            "\n".join(
                f"{key}: {value!r} was given, and {config.start_from} has {own!r}; leave it out: "
                "start_from brings model, tokenizer and temperature"
                for key, value, own in given
            )
        )


def _given_otherwise(
    model: ModelConfig, found: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for key in ("dim", "fit"):
        if _given(model, key, found[key]) != found[key]:
            yield f"model.{key}", getattr(model, key), found[key]
    for side in ("image", "text"):
        tower, own = getattr(model, side), found[side]
        for key in ("name", "projection"):
            if _given(tower, key, own[key]) != own[key]:
                yield f"model.{side}.{key}", getattr(tower, key), own[key]
        options = {**(own["options"].get("config") or {}), **own["options"]}
        for key, value in _given(tower, "options", {}).items():
            if key != "pretrained" and options.get(key, _NOTHING) != value:
                yield f"model.{side}.options.{key}", value, options.get(key)


_NOTHING = object()
_AS_TOLD = 1e-3
"""A temperature is told with four digits."""


def _given(config: ModelConfig | ImageTowerConfig | TextTowerConfig, key: str, other: Any) -> Any:
    """The value of a key where it was given, else another."""
    return getattr(config, key) if key in config.model_fields_set else other


def _with(config: PretrainConfig, found: Mapping[str, Any], clean: str) -> PretrainConfig:
    """A configuration with another model; how fast its layers learn stays as it was given."""
    towers: dict[str, Any] = {}
    for side, kind in (("image", ImageTowerConfig), ("text", TextTowerConfig)):
        own = getattr(config.model, side)
        said = {key: found[side][key] for key in ("name", "options", "projection")}
        towers[side] = kind(**said, trainable=own.trainable, layer_decay=own.layer_decay)
    sizes = {key: found[key] for key in ("dim", "image_size", "context_length", "fit")}
    return config.model_copy(
        update={
            "model": ModelConfig(**towers, **sizes),
            "tokenizer": config.tokenizer.model_copy(update={"clean": clean}),
        }
    )
