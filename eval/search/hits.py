"""What a search answers with."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float32, Int64
from numpy import ndarray


@dataclass(frozen=True)
class Hits:
    """The hits of each query, best first.

    Where fewer rows than were asked for remain, are alike enough or score enough, a list ends with
    id -1 and score minus infinity.

    Attributes:
        ids: Stable sample ids.
        scores: Cosine similarities.
        rows: Per query the metadata of its hits, as one dictionary each.
        matching: How many rows the filters and removals leave.
        plan: How the rows were looked for, in words.
        copies: Per hit, how many near-duplicates it stands for beside itself; 0 without collapse.
    """

    ids: Int64[ndarray, "queries k"]
    scores: Float32[ndarray, "queries k"]
    rows: list[list[dict[str, Any]]]
    matching: int
    plan: str
    copies: Int64[ndarray, "queries k"]


@dataclass(frozen=True)
class Neighbours:
    """Hits without metadata: ids and scores, as in :class:`Hits`."""

    ids: Int64[ndarray, "queries k"]
    scores: Float32[ndarray, "queries k"]


@dataclass(frozen=True)
class FieldSummary:
    """A column of the metadata, as a page offers it for filtering.

    Attributes:
        name: The column.
        kind: What it holds; `other` is for lists, times and whatever else there is.
        values: The values with their counts, most frequent first; empty where they are many.
        low: The least number; None for other kinds.
        high: The greatest number; None for other kinds.
    """

    name: str
    kind: Literal["text", "number", "flag", "other"]
    values: list[tuple[Any, int]]
    low: float | int | None = None
    high: float | int | None = None
