"""Classes as texts: names put into templates, and one prototype vector per class."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Float32
from numpy import ndarray

from eval.metrics import check_rows
from eval.table import unit_rows

TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    # The seven of CLIP's notebook on prompt engineering, which did best on ImageNet together.
    "simple": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Sets of templates by name."""


def fill(template: str, name: str) -> str:
    """Put a class name into a template at `{}` (OpenCLIP's place) or `{c}` (CLIP_benchmark's).

    >>> fill("a photo of a {c}.", "red heart")
    'a photo of a red heart.'

    Raises:
        ValueError: The template has neither place.
    """
    if "{}" not in template and "{c}" not in template:
        raise ValueError(f"template {template!r} has no place for the name: write {{}} or {{c}}")
    # Not str.format: names and templates may hold braces of their own.
    return name.join(part.replace("{c}", name) for part in template.split("{}"))


def class_prototypes(
    encode_text: Callable[[list[str]], Float[ndarray, "texts dim"]],
    names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> Float32[ndarray, "classes dim"]:
    """One unit vector per class: `normalise(mean over templates of normalise(encode(template)))`.

    The template ensemble of CLIP (Radford et al., 2021, section 3.1.4), in embedding space.

    Args:
        encode_text: Texts in, one row per text out.
        names: The classes, in the order of the rows.
        templates: Each with a place for the name, see :func:`fill`.
        batch_size: Texts given to `encode_text` at a time.

    Raises:
        ValueError: No names, no templates, a template without a place, or an embedding without a
            direction.
    """
    if not names or not templates:
        raise ValueError(f"prototypes need names and templates: {len(names)} and {len(templates)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    prompts = [fill(template, name) for name in names for template in templates]
    parts = []
    for start in range(0, len(prompts), batch_size):
        encoded = encode_text(prompts[start : start + batch_size])
        check_rows(encoded, f"prompt (from {start})")
        parts.append(unit_rows(encoded))
    encoded = np.concatenate(parts)
    means = encoded.reshape(len(names), len(templates), -1).mean(axis=1)
    check_rows(means, "class prototype")
    return unit_rows(means)
