"""Parts of a whole as one bar, with a legend that says every number."""

import math
from collections.abc import Mapping

from eval.report_charts import COLOURS, compact
from eval.report_html import Element, caption, element

_WIDTH, _HEIGHT, _GAP = 1000.0, 44.0, 3.0


def shares_bar(parts: Mapping[str, float], *, unit: str = "") -> Element:
    """A bar cut into parts in proportion, and beneath it each part's name, number and percentage.

    Args:
        parts: numbers of one unit, none below zero, by name.
        unit: written behind each number.

    Raises:
        ValueError: no parts or more than colours, or numbers that make no whole.
    """
    values, total = list(parts.values()), sum(parts.values())
    fit = 0 < len(values) <= COLOURS and all(math.isfinite(one) and one >= 0 for one in values)
    if not fit or total <= 0:
        raise ValueError(
            f"bar of {', '.join(parts) or 'nothing'}: takes 1 to {COLOURS} numbers that are finite "
            "and not negative, of which one is more than zero"
        )
    pieces, items, left = [], [], 0.0
    for number, (name, value) in enumerate(parts.items(), start=1):
        width = _WIDTH * value / total
        if width > _GAP:
            shown = round(width - _GAP, 1)
            pieces.append(
                element("rect", x=round(left, 1), width=shown, height=_HEIGHT, class_=f"s{number}")
            )
        left += width
        said = f"{compact(float(f'{value:.3g}'))}{f' {unit}' if unit else ''}"
        items.append(
            element(
                "li",
                element("span", class_=f"chip s{number}"),
                element("span", caption(name), class_="label"),
                element("span", said, class_="amount"),
                element("span", f"{100 * value / total:.0f}\u202f%", class_="part"),
            )
        )
    drawing = element(
        "svg",
        *pieces,
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    return element("div", drawing, element("ul", *items), class_="shares")
