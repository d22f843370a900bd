"""Contrastive losses over unit-length embeddings, by name.

`LOSSES` names every loss; one of another package goes by `package.module:Name`. Nothing here
imports torch until a loss is asked for, so that names can be checked quickly.
"""

from inspect import signature
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.losses.global_contrastive import GlobalContrastive
    from align.losses.infonce import InfoNCE
    from align.losses.loss import ContrastiveLoss
    from align.losses.sigmoid import Sigmoid

__all__ = ["LOSSES", "GlobalContrastive", "InfoNCE", "Sigmoid", "build_loss", "loss_class"]

LOSSES: dict[str, str] = {
    "infonce": "align.losses.infonce:InfoNCE",
    "sigmoid": "align.losses.sigmoid:Sigmoid",
    "global_contrastive": "align.losses.global_contrastive:GlobalContrastive",
}


def __getattr__(name: str) -> Any:
    for path in LOSSES.values():
        if path.rpartition(":")[2] == name:
            return resolve_name(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def loss_class(name: str) -> "type[ContrastiveLoss]":
    """The class behind a loss's name, or behind `package.module:Name`.

    Raises:
        ValueError: no such loss; the known ones are listed.
    """
    try:
        return resolve_name(LOSSES[name] if ":" not in name else name)
    except (KeyError, ImportError, AttributeError) as error:
        known = ", ".join(LOSSES)
        raise ValueError(
            f"unknown loss {name!r}; known: {known}, or package.module:Name"
        ) from error


def build_loss(name: str, *, samples: int = 0, **options: Any) -> "ContrastiveLoss":
    """A loss by name.

    Args:
        name: of `LOSSES`, or `package.module:Name`.
        samples: size of the data set, for a loss that keeps something of every sample.
        options: keyword arguments of the loss.

    Raises:
        ValueError: an unknown name or option, or a senseless value.
    """
    kind = loss_class(name)
    known = [key for key in signature(kind).parameters if key != "samples"]
    for key in options:
        if key not in known:
            raise ValueError(f"loss {name} has no option {key!r}; known: {', '.join(known)}")
    if kind.keeps_samples:
        options["samples"] = samples
    return kind(**options)
