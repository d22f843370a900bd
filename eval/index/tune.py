"""Search knobs: the fastest setting of an index that finds what was asked of it."""

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from eval.index.folder import set_knobs
from eval.index.recall import Queries, found_by, shares
from eval.table import EmbeddingTable

DEPTH = 10
"""Length of the lists whose recall is tuned."""
_PROBES = 1.41
_SECONDS = 0.1
"""How long one timing of one setting lasts, about."""
_ROUNDS = 3
_SLACK = 1.3
"""A setting may take so much longer than another, timed once, and be the faster one in truth."""
_IDLE, _PATIENCE = 0.0005, 2
"""So many strides in turn that gain less recall end a search for the least step."""


@dataclass(frozen=True)
class Tuned:
    """A setting of an index.

    Attributes:
        knobs: For FAISS, comma separated; empty where the index has none.
        recall: Recall@10 of it on the queries it was tuned on.
        seconds: Per query, at one thread.
        enough: Whether the recall is what was asked for, with a margin of one standard error.
    """

    knobs: str
    recall: float
    seconds: float
    enough: bool


def tune(
    index: faiss.Index,
    table: EmbeddingTable,
    modality: str,
    queries: Queries,
    target_recall: float,
) -> Tuned:
    """Find the fastest setting whose recall@10 against exact search reaches a target.

    Recall and cost rise with every knob. Of each refine factor the least `nprobe` (or `efSearch`)
    that reaches the target is found; the fastest of these pairs wins, timed at one
    thread in turns. A setting reaches the target when its mean recall less one standard error
    does, so that it holds on queries which were not seen here. Where none does, the one with the
    highest mean wins, the fastest of equals.

    Args:
        index: Filled; it is left with some setting.
        table: Its rows.
        modality: Which of the embeddings are in it.
        queries: The queries to tune on.
        target_recall: Between 0 and 1.
    """
    grids = knob_grids(index)
    trial = _Trial(index, table, modality, queries, target_recall)
    if not grids:
        recall, low = trial.recall({})
        return Tuned("", recall, trial.seconds([{}])[0], low >= target_recall)
    frontier = list(_frontier(trial, grids))
    if not frontier:
        frontier = trial.best()
    seconds = trial.seconds(frontier)
    chosen = frontier[int(np.argmin(seconds))]
    recall, low = trial.recall(chosen)
    return Tuned(spelled(trial.whole(chosen)), recall, min(seconds), low >= target_recall)


def knob_grids(index: faiss.Index) -> dict[str, list[int]]:
    """The knobs that an index has, the one of its refinement last, and what to try for each."""
    index = downcast(index)
    if isinstance(index, faiss.IndexPreTransform):
        return knob_grids(index.index)
    if isinstance(index, faiss.IndexRefine):
        most = max(1, min(256, index.ntotal // DEPTH))
        return {**knob_grids(index.base_index), "k_factor_rf": _steps(1, most, 2.0)}
    if isinstance(index, faiss.IndexIVF):
        return {"nprobe": _steps(1, index.nlist, _PROBES)}
    if isinstance(index, faiss.IndexHNSW):
        return {"efSearch": _steps(DEPTH, max(DEPTH, min(2048, index.ntotal)), _PROBES)}
    return {}


def downcast(index: faiss.Index) -> Any:
    """An index with all that its class has, of which FAISS's own type says little."""
    return faiss.downcast_index(index)


def spelled(setting: Mapping[str, int]) -> str:
    """A setting as FAISS reads it."""
    return ",".join(f"{name}={value}" for name, value in setting.items())


def _steps(first: int, last: int, ratio: float) -> list[int]:
    """Whole numbers that grow by a ratio, with both ends."""
    steps = [first]
    while steps[-1] * ratio < last:
        steps.append(max(steps[-1] + 1, round(steps[-1] * ratio)))
    return sorted({*steps, last})


class _Trial:
    """An index tried with one setting after another; what was measured is kept."""

    def __init__(
        self,
        index: faiss.Index,
        table: EmbeddingTable,
        modality: str,
        queries: Queries,
        target: float,
    ) -> None:
        self.index, self.table, self.modality = index, table, modality
        self.queries, self.target = queries, target
        self._known: dict[str, tuple[Mapping[str, int], float, float]] = {}
        self._pace: dict[str, float] = {}
        ivf = faiss.try_extract_index_ivf(index)
        self._graph_over_lists = bool(ivf) and isinstance(
            faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW
        )

    def whole(self, setting: Mapping[str, int]) -> dict[str, int]:
        """The setting, and how far a graph looks for the lists that it names."""
        if self._graph_over_lists and "nprobe" in setting:
            return {**setting, "quantizer_efSearch": max(32, 2 * setting["nprobe"])}
        return dict(setting)

    def set(self, setting: Mapping[str, int]) -> None:
        """Set it on the index."""
        set_knobs(self.index, spelled(self.whole(setting)))

    def recall(self, setting: Mapping[str, int]) -> tuple[float, float]:
        """Mean recall@10, and what is left of it less one standard error."""
        key = spelled(setting)
        if key not in self._known:
            self.set(setting)
            depth = min(DEPTH, self.queries.rows.shape[1])
            started = time.perf_counter()
            found = found_by(self.index, self.queries, depth)
            self._pace[key] = (time.perf_counter() - started) / max(1, len(found))
            each = shares(found, self.queries, self.table, self.modality, depth)
            mean = float(each.mean()) if depth else 1.0
            error = float(each.std()) / len(each) ** 0.5 if depth else 0.0
            self._known[key] = setting, mean, mean - error
        return self._known[key][1:]

    def reaches(self, setting: Mapping[str, int]) -> bool:
        return self.recall(setting)[1] >= self.target

    def pace(self, setting: Mapping[str, int]) -> float:
        """Seconds a query, timed once, of a setting whose recall is known."""
        return self._pace[spelled(setting)]

    def best(self) -> list[Mapping[str, int]]:
        """The settings tried whose mean recall is highest; equal within a tenth of a point."""
        most = max(mean for _, mean, _ in self._known.values())
        return [setting for setting, mean, _ in self._known.values() if mean > most - 0.001]

    def seconds(self, settings: list[Mapping[str, int]]) -> list[float]:
        """Seconds a query of each setting at one thread: median of rounds taken in turns."""
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        taken: list[list[float]] = [[] for _ in settings]
        vectors = self.queries.vectors
        counts = [0] * len(settings)
        try:
            for _ in range(_ROUNDS if len(settings) > 1 else 1):
                for place, setting in enumerate(settings):
                    self.set(setting)
                    if not counts[place]:
                        one = _timed(self.index, vectors[:4])
                        counts[place] = max(4, min(len(vectors), int(_SECONDS / one)))
                    taken[place].append(_timed(self.index, vectors[: counts[place]]))
        finally:
            faiss.omp_set_num_threads(threads)
        return [statistics.median(times) for times in taken]


def _timed(index: faiss.Index, vectors: np.ndarray) -> float:
    started = time.perf_counter()
    index.search(vectors, DEPTH)
    return (time.perf_counter() - started) / len(vectors)


def _frontier(trial: _Trial, grids: Mapping[str, list[int]]) -> Iterable[Mapping[str, int]]:
    """For each value of the last knob the least of the first that reaches the target.

    From the largest value of the last knob down: a smaller one needs no fewer steps of the first,
    and where these alone take longer than the best so far, all that follow do as well.
    """
    *first, (last, values) = grids.items()
    if not first:
        least = _least(trial, {}, last, values)
        if least is not None:
            yield {last: values[least]}
        return
    name, steps = first[0]
    least, fastest = 0, math.inf
    for value in reversed(values):
        found = _least(trial, {last: value}, name, steps, start=least, limit=_SLACK * fastest)
        if found is None:
            return
        setting = {name: steps[found], last: value}
        yield setting
        least, fastest = found, min(fastest, trial.pace(setting))


def _least(
    trial: _Trial,
    fixed: Mapping[str, int],
    name: str,
    steps: list[int],
    *,
    start: int = 0,
    limit: float = math.inf,
) -> int | None:
    """Place of the first step that reaches the target; None where none does.

    Upwards in doubling strides, since the cost rises with the step, then by bisection. Where two
    strides running bring nothing, or a step takes longer than the limit, the rest is left out.

    Args:
        trial: The index.
        fixed: The other knobs.
        name: The knob.
        steps: Its values, ascending.
        start: Place of the first one to try.
        limit: Seconds a query.
    """
    low, high, stride, idle = start, start, 1, 0
    while not trial.reaches({name: steps[high], **fixed}):
        setting = {name: steps[high], **fixed}
        if high == len(steps) - 1 or trial.pace(setting) > limit:
            return None
        before = trial.recall(setting)[0]
        low, high, stride = high + 1, min(high + stride, len(steps) - 1), 2
        gain = trial.recall({name: steps[high], **fixed})[0] - before
        idle = idle + 1 if gain < _IDLE else 0
        if idle == _PATIENCE and not trial.reaches({name: steps[high], **fixed}):
            return None
    while low < high:
        middle = (low + high) // 2
        if trial.reaches({name: steps[middle], **fixed}):
            high = middle
        else:
            low = middle + 1
    return None if trial.pace({name: steps[low], **fixed}) > limit else low
