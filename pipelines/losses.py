"""The loss of a run, from its configuration."""

import re

from align.losses import build_loss, loss_class
from align.losses.loss import ContrastiveLoss
from pipelines.config import ConfigError
from pipelines.schemas.optimizer import LossConfig


def make_loss(config: LossConfig, *, samples: int) -> ContrastiveLoss:
    """The loss that a configuration describes.

    Args:
        config: of the loss.
        samples: size of the data set.

    Raises:
        ConfigError: no loss goes by that name, or it does not take an option; with the key.
    """
    try:
        loss_class(config.name)
    except ValueError as error:
        raise ConfigError(f"loss.name: {error}") from error
    own = {"temperature": config.temperature, "min_temperature": config.min_temperature}
    try:
        return build_loss(config.name, samples=samples, **own, **config.options)
    except (TypeError, ValueError) as error:
        keys = "|".join(re.escape(key) for key in config.options)
        said = re.search(rf"\b({keys})\b", str(error)) if keys else None
        place = f"loss.options.{said[1]}" if said else "loss.options" if keys else "loss"
        raise ConfigError(f"{place}: {error}") from error
