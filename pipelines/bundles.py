"""The bundle of a run: its weights, what they were trained on, and how well they did."""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import torch

from align.bundle import save
from eval.results import Report
from pipelines.evaluate import record_reports
from pipelines.schemas import PretrainConfig
from pipelines.training import Training

_OF_THIS_MACHINE = {"data", "out", "bundle", "resume", "start_from", "validation"}
"""Keys that say where things lie here; a bundle goes to others."""


def bundle_of(config: PretrainConfig) -> Path:
    """Where the trained model goes."""
    return config.bundle or config.out / "bundle"


def save_bundle(training: Training, validated: Iterable[Report] = ()) -> None:
    """The trained model as a folder that `align.load` opens, with its last temperature and bias.

    All processes must call it; the main one writes.

    Args:
        training: the run.
        validated: reports of what its end was measured to be.
    """
    config, model, loss = training.config, training.chosen_model, training.chosen.loss
    if not training.accelerator.is_main_process:
        return
    with torch.no_grad():
        loss.scale()  # sets what an optimiser overshot back to its bound
        model.logit_scale.copy_(loss.logit_scale)
        if loss.logit_bias is not None:
            model.logit_bias.copy_(loss.logit_bias)
        else:
            model.logit_bias.zero_()  # of a bundle that the run began with
    save(
        model,
        bundle_of(config),
        provenance={
            "data": training.fingerprint,
            "sources": sources(config),
            "samples": training.step * config.batch_size,
            "steps": training.step,
            **({"start_from": training.start.origin} if training.start else {}),
            "config": config.model_dump(mode="json", exclude=_OF_THIS_MACHINE),
        },
    )
    if reports := list(validated):
        record_reports(bundle_of(config), reports)


def sources(config: PretrainConfig) -> list[str]:
    """The data sets of a run as others may read them: without folders of this machine or keys."""
    places = [config.data] if isinstance(config.data, str) else [one.data for one in config.data]
    return [_public(place) for place in places]


def _public(place: str) -> str:
    parts = urlsplit(place)
    if not parts.scheme or parts.scheme == "file":
        return Path(place).name or place
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
