"""From a request to a query: JSON or a form, with texts, pictures, vectors and rows as terms."""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import numpy as np
from jaxtyping import Float32
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.config import ConfigError
from pipelines.queries import Query, Term, picture_and_text
from pipelines.serve.indexes import ServedIndex
from pipelines.serve.limits import Limits, Refused
from shards import decode
from shards.damage import BadSample, Reason

Finite = Annotated[float, Field(allow_inf_nan=False)]
Schema = TypeVar("Schema", bound=BaseModel)
_TOO_LARGE = (Reason.TOO_MANY_PIXELS, Reason.TOO_MANY_BYTES)


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AskedTerm(_Asked):
    """One part of a query: exactly one of text, image, upload, vector and id."""

    text: str | None = Field(default=None, description="What to look for, in words.")
    image: str | None = Field(default=None, description="A picture's file, in base64.")
    upload: int | None = Field(default=None, ge=0, description="Which of a form's files.")
    vector: str | None = Field(
        default=None, description="An embedding: base64url of little-endian float16."
    )
    id: int | None = Field(default=None, description="A row of the index: what is like it.")
    weight: Finite = Field(default=1.0, description="Negative: away from it.")

    @property
    def kinds(self) -> list[str]:
        """Which of its kinds were given."""
        names = ("text", "image", "upload", "vector", "id")
        return [name for name in names if getattr(self, name) is not None]


class Asked(_Asked):
    """A search."""

    index: str | None = Field(default=None, description="Name of an index; null if it is the one.")
    terms: list[AskedTerm] = Field(description="What to look for; weights are added up.")
    head: str | None = Field(
        default=None,
        description="A fusion head, for one picture and one text; null = the one that fused the "
        "rows, else their sum.",
    )
    k: int = Field(default=24, description="How many hits.")
    offset: int = Field(default=0, description="How many hits to pass over.")
    where: str | None = Field(default=None, description="An SQL expression over the metadata.")
    fields: dict[str, Any] = Field(
        default_factory=dict,
        description='Filters: {"field": [values]}, {"field": {"min": 1, "max": 2}}, '
        '{"field": {"contains": "red"}}.',
    )
    min_score: Finite | None = Field(default=None, description="Leave out hits below.")
    collapse: Finite | None = Field(
        default=None, description="Rows as similar as this (cosine) count as one."
    )
    diversity: Finite = Field(default=0.0, description="0 = the best, up to 1 = the most varied.")


def read_asked(body: bytes | str, limits: Limits) -> Asked:
    """Read a search.

    Raises:
        Refused: It is no JSON (400), of another form (422), or beyond a limit (400).
    """
    asked = read_json(Asked, body, limits)
    if not 1 <= asked.k <= limits.k:
        raise Refused(400, f"k: from 1 to {limits.k}, not {asked.k}")
    if not 0 <= asked.offset <= limits.offset:
        raise Refused(400, f"offset: from 0 to {limits.offset}, not {asked.offset}")
    if (asked.collapse is not None or asked.diversity) and asked.offset + asked.k > limits.varied:
        raise Refused(400, f"with collapse or diversity there are {limits.varied} hits at most")
    if asked.min_score is not None and not -1 <= asked.min_score <= 1:
        raise Refused(400, f"min_score: a cosine, from -1 to 1, not {asked.min_score:g}")
    if len(asked.terms) > limits.terms:
        raise Refused(400, f"terms: at most {limits.terms}, not {len(asked.terms)}")
    _check_fields(asked.fields, limits)
    texts = [asked.where, *(term.text for term in asked.terms)]
    if (longest := max(len(text or "") for text in texts)) > limits.text:
        raise Refused(400, f"a text has {longest} characters; at most {limits.text}")
    for place, term in enumerate(asked.terms):
        if len(term.kinds) != 1:
            raise Refused(
                400, f"terms[{place}]: give exactly one of text, image, upload, vector, id"
            )
    return asked


def _check_fields(fields: Mapping[str, Any], limits: Limits) -> None:
    """Each value is a part of a query to the database, which takes its time to be planned."""
    left: list[Any] = [fields]
    count = 0
    while left:
        one = left.pop()
        if isinstance(one, dict | list):
            count += len(one)
            if count > limits.values:
                raise Refused(400, f"fields: at most {limits.values:,} fields and values")
            left += [*one, *one.values()] if isinstance(one, dict) else one
        elif len(str(one)) > limits.text:
            raise Refused(400, f"fields: a value has at most {limits.text} characters")


def read_json(schema: type[Schema], body: bytes | str, limits: Limits) -> Schema:
    """Read a body, whatever type its headers tell.

    Raises:
        Refused: It is no JSON or has too many values (400), or is of another form (422).
    """
    data = body if isinstance(body, bytes) else body.encode("utf-8", "replace")
    most = limits.commas + limits.k
    if data.count(b",") > most:
        raise Refused(400, f"the JSON has too many values; at most {most:,}")
    if data.count(b"\\") > limits.escapes:
        raise Refused(400, f"the JSON has too many backslashes; at most {limits.escapes:,}")
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _unreadable(error) from None


def _unreadable(error: ValidationError) -> Refused:
    """The answer to what does not fit a schema: 400 where it is no JSON at all, else 422."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return Refused(400, first["msg"])
    place = ".".join(str(part)[:100] for part in first["loc"]) or "the request"
    return Refused(422, f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}")


def query_of(
    asked: Asked, served: ServedIndex, files: list[bytes], limits: Limits
) -> tuple[Query, list[int]]:
    """The query, and the ids of rows that it starts from; pictures are decoded here.

    Raises:
        Refused: A row is unknown (404), or a picture or a vector cannot be read.
    """
    terms, ids = [], []
    for place, term in enumerate(asked.terms):
        value: str | Image.Image | np.ndarray
        match term.kinds[0]:
            case "text":
                value = term.text or ""
            case "image":
                value = picture_of(base64_bytes(term.image or "", f"terms[{place}].image"), limits)
            case "upload":
                if term.upload is None or term.upload >= len(files):
                    raise Refused(400, f"terms[{place}].upload: there are {len(files)} files")
                value = picture_of(files[term.upload], limits)
            case "vector":
                value = vector_of(term.vector or "", served, f"terms[{place}].vector")
            case _:
                assert term.id is not None
                value = served.searcher.rows.vectors(rows_of([term.id], served))[0]
                ids.append(term.id)
        terms.append(Term(value, term.weight))
    own = served.own_head if picture_and_text(terms) else None
    query = Query(tuple(terms), asked.head or own)
    try:
        served.encoder.encoder.check(query)
    except ConfigError as error:
        raise Refused(400, str(error)) from None
    return query, ids


def rows_of(ids: list[int], served: ServedIndex) -> np.ndarray:
    """Row numbers of ids.

    Raises:
        Refused: The index does not hold one of them.
    """
    known = [one for one in ids if -(2**63) <= one < 2**63]
    rows = served.searcher.places(np.array(known, np.int64))
    if len(known) < len(ids) or (rows < 0).any():
        raise Refused(404, f"index {served.name} has no such row; ids are those of its answers")
    return rows


def picture_of(data: bytes, limits: Limits) -> Image.Image:
    """Decode a picture that a client sent.

    Raises:
        Refused: It has too many pixels (413), is none of the known types (415), or damaged (400).
    """
    if decode.sniff_extension(data) is None:
        known = ", ".join(decode.IMAGE_FORMATS)
        raise Refused(415, f"this is no picture of a known type ({known})")
    try:
        bounds = decode.Limits(image_bytes=limits.body, pixels=limits.pixels, aspect=1000.0)
        return Image.fromarray(decode.decode_image(data, limits=bounds))
    except BadSample as error:
        if error.reason in _TOO_LARGE:
            raise Refused(413, f"a picture may have {limits.pixels:,} pixels") from None
        raise Refused(400, f"the picture cannot be read: {error}") from None


def base64_bytes(text: str, name: str) -> bytes:
    """Bytes of base64 in either alphabet, with or without padding, or of a data: URL.

    Raises:
        Refused: It is something else.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        plain = text.rstrip("=").translate(_ALPHABET)
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"{name}: not base64") from None


_ALPHABET = str.maketrans("-_", "+/")


def vector_of(text: str, served: ServedIndex, name: str) -> Float32[np.ndarray, " dim"]:
    """The embedding that a client sent.

    Raises:
        Refused: It is no vector of this index.
    """
    data, dim = base64_bytes(text, name), served.searcher.card.dim
    if len(data) != 2 * dim:
        raise Refused(400, f"{name}: {len(data)} bytes; this index has {dim} numbers of 2 bytes")
    return np.frombuffer(data, "<f2").astype(np.float32)


def vector_text(vector: Float32[np.ndarray, " dim"]) -> str:
    """An embedding, as a client gets it and may send it back."""
    return base64.urlsafe_b64encode(vector.astype("<f2").tobytes()).rstrip(b"=").decode()


def json_bytes(value: Any) -> bytes:
    """JSON, where numbers that JSON has not (NaN, infinity) are null and other things text."""
    try:
        return json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain
        ).encode()
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), default=_plain).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return _finite(value.item())
    return value.tolist() if isinstance(value, np.ndarray) else str(value)
