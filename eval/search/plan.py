"""How the best of some rows are found: by exact search, a selector, or asking for more and sifting.

Which is quickest is estimated from what was measured when the index was built. Under a filter an
index that was tuned without one finds less, so that it is asked twice, with twice the effort, until
the answer stays the same; what costs more than exact search by then is searched exactly.

Scores are cosines of the vectors that the index keeps on disk, whatever its own codes say: those of
rough codes choose the candidates, and the vectors rank them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from eval.index.card import IndexCard
from eval.index.rows import IndexRows
from eval.search.engine import Engine
from eval.search.exact import best_first, exact_among
from eval.search.filters import Allowed

Plan = Literal["auto", "exact", "selector", "overfetch"]

_NEARLY_ALL = 0.9
"""From this share of the rows on, the index is asked as it was tuned, for a little more."""
_SAME = 1e-6
"""Scores this near are equal."""
_PICKED = 16_384
"""Vectors read at a time to rank candidates again."""
_PER_QUERY = 0.15
"""Of the cost of exact search, what each further query of a batch adds."""
_MEMBERSHIP_S = 4e-9
"""Seconds to look whether a row is allowed, in a scan of all."""
_ROUNDS = 8
"""Times that the effort is doubled."""


@dataclass(frozen=True)
class Found:
    """Scores and row numbers of the best, and how they were looked for."""

    scores: Float32[ndarray, "queries k"]
    rows: Int64[ndarray, "queries k"]
    plan: str


class Planner:
    """Answers queries over all or some rows of an index, each in the way that should be quickest.

    Args:
        engine: The FAISS index.
        rows: Its rows.
        card: What was measured when it was built.
    """

    def __init__(self, engine: Engine, rows: IndexRows, card: IndexCard) -> None:
        self._engine = engine
        self._rows = rows
        one_thread = card.speed[0].queries_per_second if card.speed else 1000.0
        self._query_s = card.costs.get("query_s") or 1 / one_thread
        self._row_s = card.costs.get("exact_row_s") or 2e-9 * card.dim

    @property
    def rows(self) -> int:
        """How many there are, removed ones included."""
        return len(self._rows)

    def choose(self, allowed: Allowed | None, k: int, queries: int, plan: Plan = "auto") -> Plan:
        """The plan for so many hits of so many queries; `auto` is the index as it was tuned.

        Raises:
            ValueError: The index takes no selector.
        """
        if plan == "selector" and allowed is not None and not self._engine.selects:
            raise ValueError(
                "plan: this kind of index takes no selector; choose exact or overfetch"
            )
        if plan != "auto" or allowed is None:
            return "exact" if plan == "exact" else "auto" if allowed is None else plan
        share = allowed.count / allowed.of
        exact_s = self._exact_seconds(allowed.count, queries)
        if not self._engine.navigated and self._engine.lossless and self._engine.selects:
            scan_s = queries * (self._query_s * share + allowed.of * _MEMBERSHIP_S)
            return "selector" if scan_s < exact_s else "exact"
        if 2 * k > allowed.count:
            return "exact"
        if share >= _NEARLY_ALL:
            return "auto"
        if exact_s <= self._asking_seconds(allowed, k, queries):
            return "exact"
        return "selector" if self._engine.selects else "overfetch"

    def answer(
        self,
        queries: Float32[ndarray, "queries dim"],
        k: int,
        allowed: Allowed | None,
        plan: Plan = "auto",
    ) -> Found:
        """The `k` best allowed rows of each unit-length query; fewer only where there are fewer.

        Raises:
            ValueError: As :meth:`choose`.
        """
        chosen = self.choose(allowed, k, len(queries), plan)
        if chosen == "exact":
            found = exact_among(self._rows, queries, k, allowed)
        elif allowed is None:
            found = self._completed(queries, k, None, *self._engine.as_tuned(queries, k))
        elif chosen == "auto":
            found = self._sifted(queries, k, allowed)
        elif not self._engine.navigated and self._engine.lossless and chosen == "selector":
            found = self._engine.selected(queries, k, allowed, 1.0)
            found = self._completed(queries, k, allowed, *found)
        else:
            found = self._until_steady(queries, k, allowed, chosen)
        return Found(*found, plan=_said(chosen, allowed, len(self._rows)))

    def _exact_seconds(self, rows: int, queries: int) -> float:
        return rows * self._row_s * (1 + _PER_QUERY * (queries - 1))

    def _asking_seconds(self, allowed: Allowed, k: int, queries: int) -> float:
        """Of the first two rounds of asking the index."""
        share = allowed.count / allowed.of
        ask = 3 * self._query_s * (1 / share if self._engine.navigated else 1.0)
        again = 0 if self._engine.lossless else 3 * self._engine.wanted(k, 1.0) * self._row_s
        sift = 0 if self._engine.selects else self._engine.wanted(k, 3.0) / share * self._row_s
        return queries * (ask + again + sift)

    def _sifted(
        self, queries: Float32[ndarray, "queries dim"], k: int, allowed: Allowed
    ) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
        """The index as it was tuned, asked for so much more as nearly all rows need."""
        asked = min(int(k / (allowed.count / allowed.of) * 1.1) + 16, allowed.of)
        scores, rows = self._engine.as_tuned(queries, asked)
        good = allowed.has(rows)
        rows, scores = np.where(good, rows, -1), np.where(good, scores, -np.inf)
        return self._completed(queries, k, allowed, scores, rows)

    def _until_steady(
        self, queries: Float32[ndarray, "queries dim"], k: int, allowed: Allowed, plan: Plan
    ) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
        """Ask with twice the effort until the best stay the same."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        waiting = np.arange(len(queries))
        spent, effort = 0.0, 1.0
        for turn in range(_ROUNDS):
            some = queries[waiting]
            ask = self._engine.selected if plan == "selector" else self._engine.overfetched
            candidates = ask(some, k, allowed, effort)
            best = self._ranked(some, k, *candidates)
            with np.errstate(invalid="ignore"):  # a short list ends with infinity: never the same
                steady = (np.abs(best[0] - scores[waiting]) < _SAME).all(axis=1)
            steady |= np.count_nonzero(candidates[1] >= 0, axis=1) == allowed.count
            scores[waiting], rows[waiting] = best
            waiting = waiting[~steady]
            spent += effort * self._asking_seconds(allowed, k, max(len(waiting), 1)) / 3
            effort *= 2
            worth = self._exact_seconds(allowed.count, max(len(waiting), 1))
            if not len(waiting) or (turn and spent > worth):
                break
        if len(waiting):
            found = exact_among(self._rows, queries[waiting], k, allowed)
            scores[waiting], rows[waiting] = found
        return scores, rows

    def _ranked(
        self,
        queries: Float32[ndarray, "queries dim"],
        k: int,
        scores: Float32[ndarray, "queries some"],
        rows: Int64[ndarray, "queries some"],
    ) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
        """The `k` best candidates, by the vectors themselves where the index's scores are rough."""
        if self._engine.lossless:
            return best_first(scores, rows, k)
        exact = np.full(rows.shape, -np.inf, np.float32)
        step = max(1, _PICKED // max(rows.shape[1], 1))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            query, place = np.nonzero(rows[part] >= 0)
            picked, where = np.unique(rows[part][query, place], return_inverse=True)
            vectors = self._rows.vectors(picked)
            pairs = np.einsum("nd,nd->n", queries[part][query], vectors[where])
            exact[part][query, place] = pairs
        return best_first(exact, rows, k)

    def _completed(
        self,
        queries: Float32[ndarray, "queries dim"],
        k: int,
        allowed: Allowed | None,
        scores: Float32[ndarray, "queries some"],
        rows: Int64[ndarray, "queries some"],
    ) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
        """The `k` best candidates; lists left short (graphs have unreachable corners) exactly."""
        if rows.shape[1] != k or not self._engine.lossless:
            scores, rows = self._ranked(queries, k, scores, rows)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            scores[short], rows[short] = exact_among(self._rows, queries[short], k, allowed)
        return scores, rows


def _said(plan: Plan, allowed: Allowed | None, rows: int) -> str:
    if allowed is None:
        return f"exact over {rows:,} rows" if plan == "exact" else "index as tuned"
    how = {
        "auto": "index as tuned",
        "exact": "exact",
        "selector": "index with a selector",
        "overfetch": "index asked for more, then filtered",
    }[plan]
    return f"{how} over {allowed.count:,} of {rows:,} rows"
