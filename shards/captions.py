"""The captions of a sample: where they stand, and which of several is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int64
from numpy import ndarray

from shards.damage import BadSample, Reason
from shards.decode import Limits, decode_caption, decode_fields
from shards.manifest import CAPTION_FIELD, JSON_FIELD
from shards.order import hash64

_DRAW = 6  # keeps this draw apart from others over the same counters

_WHOLE, _LINES, _JSON = "txt", "txt.lines", "json."


@dataclass(frozen=True)
class CaptionRule:
    """Where the captions of a sample stand.

    Attributes:
        places: Where to look; what is found in all of them is the sample's captions, in this order.
            `txt` is the whole text member; `txt.lines` takes each of its lines as a caption;
            `json.KEY` is a text or a list of texts in the JSON member, and dots lead into objects
            within it. Nothing named means what most data sets do: the list `captions` of the JSON
            member where there is one, else the whole text member, else `caption` of the JSON.
        seed: Of the draw among several; None takes the first.
    """

    places: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for place in self.places:
            if place not in (_WHOLE, _LINES) and not (
                place.startswith(_JSON) and all(place.split("."))
            ):
                raise ValueError(
                    f"unknown place of captions {place!r}; known: {_WHOLE}, {_LINES}, {_JSON}KEY"
                )

    def read(
        self, members: Mapping[str, bytes], limits: Limits
    ) -> tuple[list[str], dict[str, Any]]:
        """The captions of a sample, at least one, and its JSON fields.

        Args:
            members: Its members; the text and the JSON one are looked at.
            limits: What they may ask for.

        Raises:
            BadSample: If a member is damaged, or no caption is found.
        """
        data, text = members.get(JSON_FIELD), members.get(CAPTION_FIELD)
        fields = decode_fields(data, limits=limits) if data is not None else {}
        found = self._found(text, fields)
        if not found:
            looked = ", ".join(self.places) or f"{_WHOLE}, {_JSON}captions, {_JSON}caption"
            raise BadSample(Reason.NO_CAPTION, f"looked for {looked}")
        captions: list[str] = []
        for number, one in enumerate(found, 1):
            try:
                captions.append(decode_caption(one, limits=limits))
            except BadSample as bad:
                # Of several captions the empty ones are passed over, unless all are.
                if bad.reason != Reason.EMPTY_CAPTION or (number == len(found) and not captions):
                    raise
        return captions, fields

    def draw(
        self,
        captions: Sequence[list[str]],
        ids: Int64[ndarray, " n"],
        epochs: Int64[ndarray, " n"],
    ) -> list[str]:
        """One caption for each sample, drawn from (seed, epoch, id); without a seed, the first.

        Args:
            captions: Those of each sample.
            ids: Sample ids.
            epochs: The epoch that each sample is in.
        """
        if self.seed is None or all(len(several) == 1 for several in captions):
            return [several[0] for several in captions]
        bits = hash64(self.seed, _DRAW, epochs, ids).tolist()
        return [several[draw % len(several)] for several, draw in zip(captions, bits, strict=True)]

    def _found(self, text: bytes | None, fields: Mapping[str, Any]) -> list[bytes]:
        """Every caption as bytes, not yet looked at."""
        if not self.places:
            if several := _texts(fields.get("captions")):
                return several
            return [text] if text is not None else _texts(fields.get("caption"))
        found: list[bytes] = []
        for place in self.places:
            if place.startswith(_JSON):
                value: Any = fields
                for key in place.split(".")[1:]:
                    value = value.get(key) if isinstance(value, Mapping) else None
                found += _texts(value)
            elif text is not None:
                found += text.splitlines() if place == _LINES else [text]
        return found


def _texts(value: object) -> list[bytes]:
    several = value if isinstance(value, list) else [value]
    return [one.encode("utf-8", "surrogatepass") for one in several if isinstance(one, str)]
