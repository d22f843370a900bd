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
        ValueError: no such loss; the known ones are listed. Or what is named cannot be imported,
            or is no loss.
    """
    if name not in LOSSES and ":" not in name:
        raise ValueError(
            f"unknown loss {name!r}; known: {', '.join(LOSSES)}, or package.module:Name"
        )
    path = LOSSES.get(name, name)
    module, _, inside = path.partition(":")
    try:
        found = resolve_name(path)
    except AttributeError as error:
        raise ValueError(f"loss {name!r}: module {module} has no {inside}") from error
    except Exception as error:  # a module of somebody else's may fail in any way
        raise ValueError(
            f"loss {name!r}: module {module} cannot be imported: {str(error) or repr(error)}"
        ) from error
    from align.losses.loss import ContrastiveLoss

    if not (isinstance(found, type) and issubclass(found, ContrastiveLoss)):
        raise ValueError(
            f"loss {name!r} must be a subclass of align.losses.loss.ContrastiveLoss, and is "
            f"{found!r}"
        )
    return found


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
    parameters = {k: one for k, one in signature(kind).parameters.items() if k != "samples"}
    for key, value in options.items():
        if key not in parameters:
            raise ValueError(f"loss {name} has no option {key!r}; known: {', '.join(parameters)}")
        wanted = parameters[key].annotation
        simple = _SIMPLE.get(getattr(wanted, "__name__", wanted))
        if simple and (
            not isinstance(value, simple[0]) or isinstance(value, bool) is not (simple[0] is bool)
        ):
            raise ValueError(f"{key} of loss {name} must be {simple[1]}, not {value!r}")
        if simple and simple[0] == (int, float):
            options[key] = float(value)  # YAML tells 6 from 6.0
    if kind.keeps_samples:
        options["samples"] = samples
    return kind(**options)


_SIMPLE: dict[Any, tuple[Any, str]] = {
    "float": ((int, float), "a number"),
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
}
"""What may be given where a loss wants a number, and so on, by the name of the annotation."""
