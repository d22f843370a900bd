"""HTML and SVG as trees: whatever comes in as a string is text, and leaves escaped.

The page shows captions written by strangers. Escaping is therefore a property of the way in which
markup is made (the standard library's element tree), not something that each caller remembers.
"""

import json
import re
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element

LONGEST_TEXT = 400
"""Characters of one caption shown on a page; the rest is cut with an ellipsis."""

EN_DASH, MINUS, TIMES = "\u2013", "\u2212", "\u00d7"

# Control characters, lone surrogates and non-characters are not HTML; bidirectional overrides could
# reorder the words around a caption (right-to-left letters need none: captions are isolated).
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def clean(text: str) -> str:
    r"""Text fit for a page: no control characters, one line, at most `LONGEST_TEXT` long.

    >>> clean("two\n lines\x00")
    'two lines�'
    """
    # Cut first: a caption of a megabyte shall not cost a megabyte of regular expression.
    text = " ".join(_UNPRINTABLE.sub("�", text[: 2 * LONGEST_TEXT]).split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def element(
    tag: str, *children: Element | str | None, **attributes: str | int | float | None
) -> Element:
    """One element: strings become escaped text, `None` children and attributes are left out.

    Attribute names follow Python: `class_="a"` makes `class="a"`, `aria_label` makes `aria-label`.

    >>> render(element("p", "1 < 2", class_="note"))
    '<p class="note">1 &lt; 2</p>'
    """
    node = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            shown = value if isinstance(value, str) else f"{value:.10g}"
            node.set(name.rstrip("_").replace("_", "-"), _UNPRINTABLE.sub("�", shown))
    last: Element | None = None
    for child in children:
        if child is None:
            continue
        if isinstance(child, Element):
            node.append(child)
            last = child
            continue
        text = _UNPRINTABLE.sub("�", child)
        if last is None:
            node.text = (node.text or "") + text
        else:
            last.tail = (last.tail or "") + text
    return node


def caption(text: str, **attributes: str | int | float | None) -> Element:
    """A caption somebody else wrote: cleaned, isolated from the direction of what is around it."""
    shown = clean(text)
    return element("span", shown, title=shown, dir="auto", **attributes)


def only_for_ears(text: str) -> Element:
    """Words for screen readers where the page shows a symbol or a colour."""
    return element("span", text, class_="ears")


def data_island(value: object) -> Element:
    """JSON for the page's own script; nothing in it can close the element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    node = element("script", type="application/json")
    node.text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return node


def render(root: Element) -> str:
    """The tree as HTML text; the same tree always gives the same text."""
    return ET.tostring(root, encoding="unicode", method="html")
