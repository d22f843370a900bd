"""Queries: weighted words and pictures, added, subtracted or fused, as one vector each."""

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Term:
    """One part of a query: a text, or a picture, or a vector that was embedded before.

    Attributes:
        value: what to look for.
        weight: how much it counts; negative terms are moved away from.
    """

    value: str | Image.Image | Float32[np.ndarray, " dim"]
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """What to look for.

    The vector is the unit-length `sum of weight_i * embedding_i`. With a head, one picture and one
    text among the terms are fused by it first: the balance `b = w_text / (w_image + w_text)` leads
    from the picture alone (0) over the head's own vector (1/2) to the text alone (1), and what it
    gives counts as one term of weight `w_image + w_text`.

    Attributes:
        terms: at least one.
        head: name of a fusion head of the encoder; None = their sum.
    """

    terms: tuple[Term, ...]
    head: str | None = None


class QueryEncoder:
    """Queries into vectors, all texts of a call in one pass and all pictures in another.

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
            ConfigError: it has no terms, an unknown head, or a head without exactly one picture and
                one text of positive weight.
        """
        if not query.terms or all(term.weight == 0 for term in query.terms):
            raise ConfigError("a query needs a text or a picture, with a weight other than 0")
        if query.head is None:
            return
        if query.head not in self.heads:
            known = ", ".join(self.heads) or "none here"
            raise ConfigError(f"head: unknown fusion head {query.head!r}; known: {known}")
        kinds = [type(term.value) for term in query.terms if term.weight > 0]
        pictures = sum(issubclass(kind, Image.Image) for kind in kinds)
        if pictures != 1 or kinds.count(str) != 1:
            raise ConfigError("head: a fusion head takes one picture and one text")

    @torch.no_grad()
    def vectors(self, queries: Sequence[Query]) -> Float32[np.ndarray, "queries dim"]:
        """A unit-length row for each query.

        Raises:
            ConfigError: as `check`, or the terms of a query cancel each other out.
        """
        for query in queries:
            self.check(query)
        rows = self._embedded([term.value for query in queries for term in query.terms])
        found, start = [], 0
        for query in queries:
            parts = rows[start : start + len(query.terms)]
            start += len(parts)
            weights = torch.tensor([term.weight for term in query.terms])
            total = weights @ parts
            if query.head is not None:
                total = total + self._fused_instead(query, parts)
            if not torch.linalg.vector_norm(total) > 1e-6:
                raise ConfigError("the terms of the query cancel each other out")
            found.append(F.normalize(total, dim=0))
        return torch.stack(found).numpy() if found else np.empty((0, self._dim), np.float32)

    @property
    def _dim(self) -> int:
        return self.model.config.dim

    def _embedded(
        self, values: Sequence[str | Image.Image | np.ndarray]
    ) -> Float[Tensor, "values dim"]:
        rows = torch.empty(len(values), self._dim)
        texts = [n for n, value in enumerate(values) if isinstance(value, str)]
        pictures = [n for n, value in enumerate(values) if isinstance(value, Image.Image)]
        if texts:
            rows[texts] = self.model.encode_text([values[n] for n in texts])  # type: ignore[misc]
        if pictures:
            rows[pictures] = self.model.encode_image([values[n] for n in pictures])  # type: ignore[misc]
        for n, value in enumerate(values):
            if isinstance(value, np.ndarray):
                if value.shape != (self._dim,) or not np.isfinite(value).all():
                    raise ConfigError(f"a vector must hold {self._dim} finite numbers")
                rows[n] = F.normalize(torch.from_numpy(value.astype(np.float32)), dim=0)
        return rows

    def _fused_instead(
        self, query: Query, rows: Float[Tensor, "terms dim"]
    ) -> Float[Tensor, " dim"]:
        """What to add to the weighted sum, so that picture and text count as the head has them."""
        used = [
            next(n for n, t in enumerate(query.terms) if isinstance(t.value, kind) and t.weight > 0)
            for kind in (Image.Image, str)
        ]
        picture, text = (query.terms[n] for n in used)
        image_weight, text_weight = picture.weight, text.weight
        images = self.model.image_features(self.model.preprocess([picture.value]))  # type: ignore[list-item]
        tokens = self.model.tokenize([text.value])  # type: ignore[list-item]
        texts = self.model.text_features(tokens.ids, tokens.mask)
        fused = self.heads[query.head or ""](
            Modality(self.model.project_image(images.pooled), images.tokens, images.mask),
            Modality(self.model.project_text(texts.pooled), texts.tokens, texts.mask),
        ).embedding[0]
        both = image_weight + text_weight
        lean = 2 * text_weight / both - 1
        alone = rows[used[1]] if lean > 0 else rows[used[0]]
        mixed = F.normalize((1 - abs(lean)) * fused + abs(lean) * alone, dim=0)
        return both * mixed - image_weight * rows[used[0]] - text_weight * rows[used[1]]
