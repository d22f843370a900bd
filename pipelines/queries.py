"""Queries: weighted words and pictures, added, subtracted or fused, as one vector each."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from align.fusion.head import FusionHead, Modality
from align.model import DualEncoder
from pipelines.config import ConfigError

MOST_WEIGHT = 1e6
"""Weights are at most this far from zero."""
_CANCELLED = 1e-5
"""Terms whose sum is shorter than this share of their weights leave rounding errors alone."""
_BATCH = 256


@dataclass(frozen=True, eq=False)
class Term:
    """One part of a query: a text, or a picture, or a vector that was embedded before.

    Attributes:
        value: what to look for.
        weight: how much it counts; negative terms are moved away from.
    """

    value: str | Image.Image | Float[np.ndarray, " dim"]
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Query:
    """What to look for.

    The vector is the unit-length `sum of weight_i * e_i` over the unit-length embeddings `e_i`.

    With a head, the one picture and the one text of weights `p, t >= 0` count together as one term
    of weight `p + t`, whose vector leads from the picture alone over what the head gives to the
    text alone: with `lean = (t - p) / (t + p)` from -1 to 1 it is the unit-length
    `(1 - |lean|) * fused + |lean| * (e_text if lean > 0 else e_picture)`.

    Attributes:
        terms: at least one.
        head: name of a fusion head of the encoder; None = their sum.
    """

    terms: tuple[Term, ...]
    head: str | None = None


@dataclass(frozen=True, eq=False)
class _Pair:
    """The picture and the text of a query that its head fuses."""

    head: str
    picture: Term
    text: Term

    @property
    def weight(self) -> float:
        return self.picture.weight + self.text.weight

    @property
    def lean(self) -> float:
        return (self.text.weight - self.picture.weight) / self.weight

    @property
    def key(self) -> Hashable:
        return self.head, _key(self.picture.value), _key(self.text.value)


class QueryEncoder:
    """Queries into vectors: all texts of a call in one pass, and all pictures in another.

    Equal texts, and a picture that is in several terms as one object, are embedded once a call.
    It keeps nothing between calls; several threads may use it.

    Args:
        model: ready to encode.
        heads: fusion heads of this model, by name.
    """

    def __init__(self, model: DualEncoder, heads: Mapping[str, FusionHead] | None = None) -> None:
        self.model = model
        self.heads = dict(heads or {})

    def check(self, query: Query) -> None:
        """Refuse a query that cannot be embedded, without embedding it.

        Raises:
            ConfigError: it has no terms, an empty text, a weight that is no number or too large, a
                vector of another length or without a direction, an unknown head, or a head without
                exactly one picture and one text.
        """
        check_terms(query.terms, self.model.config.dim)
        if query.head is None:
            return
        if query.head not in self.heads:
            known = ", ".join(self.heads) or "none here"
            raise ConfigError(f"head: unknown fusion head {query.head!r}; known: {known}")
        if _pair(query) is None:
            raise ConfigError("head: a fusion head takes exactly one picture and one text")

    @torch.no_grad()
    def vectors(self, queries: Sequence[Query]) -> Float32[np.ndarray, "queries dim"]:
        """A unit-length row for each query.

        Raises:
            ConfigError: as `check`, or the terms of a query cancel each other out.
            ValueError: a picture cannot be read.
        """
        for query in queries:
            self.check(query)
        pairs = [pair for query in queries if (pair := _pair(query)) is not None]
        rows, fused = self._fused([pair for pair in pairs if abs(pair.lean) < 1])
        values = [t.value for query in queries for t in query.terms if t.weight]
        rows |= self._embedded([value for value in values if _key(value) not in rows])
        found = [_vector(query, rows, fused) for query in queries]
        return torch.stack(found).numpy() if found else np.empty((0, self._dim), np.float32)

    @property
    def _dim(self) -> int:
        return self.model.config.dim

    def _embedded(
        self, values: Iterable[str | Image.Image | np.ndarray]
    ) -> dict[Hashable, Float[Tensor, " dim"]]:
        """The unit-length embedding of each distinct value, by its key."""
        distinct = {_key(value): value for value in values}
        texts = {key: value for key, value in distinct.items() if isinstance(value, str)}
        pictures = {k: value for k, value in distinct.items() if isinstance(value, Image.Image)}
        rows: dict[Hashable, Tensor] = {}
        if texts:
            rows |= zip(texts, self.model.encode_text([*texts.values()]), strict=True)
        if pictures:
            rows |= zip(pictures, self.model.encode_image([*pictures.values()]), strict=True)
        for key, value in distinct.items():
            if isinstance(value, np.ndarray):
                rows[key] = F.normalize(torch.from_numpy(value.astype(np.float64)), dim=0).float()
        return rows

    def _fused(
        self, pairs: Sequence[_Pair]
    ) -> tuple[dict[Hashable, Tensor], dict[Hashable, Tensor]]:
        """Embeddings of the pictures and texts of these pairs, and what the heads make of them."""
        rows: dict[Hashable, Tensor] = {}
        fused: dict[Hashable, Tensor] = {}
        by_head: dict[str, dict[Hashable, _Pair]] = defaultdict(dict)
        for pair in pairs:
            by_head[pair.head][pair.key] = pair
        for head, some in by_head.items():
            chosen = [*some.values()]
            for start in range(0, len(chosen), _BATCH):
                part = chosen[start : start + _BATCH]
                image, text = self._modalities(part)
                given = self.heads[head](image, text).embedding.cpu()
                fused |= zip([pair.key for pair in part], given, strict=True)
                rows |= zip([_key(p.picture.value) for p in part], image.pooled.cpu(), strict=True)
                rows |= zip([_key(p.text.value) for p in part], text.pooled.cpu(), strict=True)
        return rows, fused

    def _modalities(self, pairs: Sequence[_Pair]) -> tuple[Modality, Modality]:
        """What a head is given of these pairs."""
        model = self.model
        pixels = model.preprocess([pair.picture.value for pair in pairs])  # type: ignore[misc]
        images = model.image_features(pixels.to(model.device))
        tokens = model.tokenize([pair.text.value for pair in pairs]).to(model.device)  # type: ignore[misc]
        texts = model.text_features(tokens.ids, tokens.mask)
        return (
            Modality(model.project_image(images.pooled), images.tokens, images.mask),
            Modality(model.project_text(texts.pooled), texts.tokens, texts.mask),
        )


def check_terms(terms: Sequence[Term], dim: int) -> None:
    """Refuse terms that nothing can be looked for with.

    Args:
        terms: of one query.
        dim: length of its vector.

    Raises:
        ConfigError: as `QueryEncoder.check`.
    """
    if not any(term.weight for term in terms):
        raise ConfigError("a query needs a text or a picture, with a weight other than 0")
    for term in terms:
        if not math.isfinite(term.weight) or abs(term.weight) > MOST_WEIGHT:
            raise ConfigError(
                f"weight: {term.weight} is no number from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
        value = term.value
        if isinstance(value, str) and not value.strip():
            raise ConfigError("a text to look for is empty")
        if isinstance(value, np.ndarray):
            if value.shape != (dim,) or not np.isfinite(value).all():
                raise ConfigError(
                    f"a vector to look for must hold {dim} finite numbers, as the index does; this "
                    f"one has the shape {[*value.shape]}"
                )
            if not np.linalg.norm(value.astype(np.float64)) > 1e-12:
                raise ConfigError("a vector to look for has no direction: it is all zeros")


def summed(
    weights: Sequence[float], rows: Sequence[Float[Tensor, " dim"]]
) -> Float[Tensor, " dim"]:
    """The unit-length weighted sum of unit-length rows.

    Raises:
        ConfigError: they cancel each other out.
    """
    total = torch.zeros_like(rows[0])
    for weight, row in zip(weights, rows, strict=True):
        total = total + weight * row
    length = torch.linalg.vector_norm(total)
    if not length > _CANCELLED * sum(abs(weight) for weight in weights):
        raise ConfigError("the terms of the query cancel each other out: nothing is left to find")
    return total / length


def _vector(
    query: Query, rows: Mapping[Hashable, Tensor], fused: Mapping[Hashable, Tensor]
) -> Float[Tensor, " dim"]:
    """The formula of :class:`Query`."""
    pair = _pair(query)
    own = () if pair is None else (pair.picture, pair.text)
    terms = [term for term in query.terms if term.weight and term not in own]
    weights = [term.weight for term in terms]
    parts = [rows[_key(term.value)] for term in terms]
    if pair is not None:
        weights.append(pair.weight)
        parts.append(_leaning(pair, rows, fused))
    return summed(weights, parts)


def _leaning(
    pair: _Pair, rows: Mapping[Hashable, Tensor], fused: Mapping[Hashable, Tensor]
) -> Float[Tensor, " dim"]:
    share = abs(pair.lean)
    alone = pair.text if pair.lean > 0 else pair.picture
    if share == 1:
        return rows[_key(alone.value)]
    if share == 0:
        return fused[pair.key]
    return F.normalize((1 - share) * fused[pair.key] + share * rows[_key(alone.value)], dim=0)


def picture_and_text(terms: Sequence[Term]) -> tuple[Term, Term] | None:
    """What a head would fuse: the one picture and the one text, of weights that are not both 0."""
    liked = [term for term in terms if term.weight >= 0]
    pictures = [term for term in liked if isinstance(term.value, Image.Image)]
    texts = [term for term in liked if isinstance(term.value, str)]
    if len(pictures) != 1 or len(texts) != 1 or pictures[0].weight + texts[0].weight == 0:
        return None
    return pictures[0], texts[0]


def _pair(query: Query) -> _Pair | None:
    found = picture_and_text(query.terms) if query.head is not None else None
    return _Pair(query.head or "", *found) if found else None


def _key(value: str | Image.Image | np.ndarray) -> Hashable:
    """Texts are told apart by what they say, all else by being the same object."""
    return value if isinstance(value, str) else id(value)
