"""Fusion heads: one vector for a picture and some words, in the space of the plain embeddings.

`FUSION_HEADS` names every head; a head of another package goes by `package.module:Name`. Nothing
here imports torch until a head is asked for, so that names can be checked quickly.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.fusion.head import FusionHead

FUSION_HEADS: dict[str, str] = {
    "early": "align.fusion.early:Early",
    "intermediate": "align.fusion.intermediate:Intermediate",
    "late": "align.fusion.late:Late",
}


def fusion_head(name: str) -> "type[FusionHead]":
    """The class behind a head's name, or behind `package.module:Name`.

    Raises:
        ValueError: no such head; the known ones are listed.
    """
    try:
        return resolve_name(FUSION_HEADS[name] if ":" not in name else name)
    except (KeyError, ImportError, AttributeError) as error:
        known = ", ".join(FUSION_HEADS)
        raise ValueError(
            f"unknown fusion head {name!r}; known: {known}, or package.module:Name"
        ) from error
