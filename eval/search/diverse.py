"""Lists without repeats: near-duplicates collapsed into one hit, and hits unlike each other."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray


@dataclass(frozen=True)
class Collapsed:
    """The places of a list that stay, and how many later ones each of them stands for."""

    places: Int64[ndarray, " kept"]
    copies: Int64[ndarray, " kept"]


def collapse_copies(vectors: Float[ndarray, "hits dim"], least: float, most: int) -> Collapsed:
    """Keep the first of each group of near-duplicates.

    From the best hit on, each that is left stays and takes away those behind it whose cosine with
    it is at least `least`.

    Args:
        vectors: Unit-length vectors of the hits, best first.
        least: Cosine from which on two are near-duplicates.
        most: Stop when so many are kept.
    """
    left = np.ones(len(vectors), bool)
    places, copies = [], []
    for place in range(len(vectors)):
        if len(places) == most:
            break
        if not left[place]:
            continue
        left[place] = False
        alike = left & (vectors @ vectors[place] >= least)
        left &= ~alike
        places.append(place)
        copies.append(np.count_nonzero(alike))
    return Collapsed(np.array(places, np.int64), np.array(copies, np.int64))


def spread(
    scores: Float[ndarray, " hits"],
    vectors: Float[ndarray, "hits dim"],
    *,
    count: int,
    diversity: float,
    page: int,
    pool: int,
) -> Int64[ndarray, " picked"]:
    """Pick hits that are similar to the query and unlike each other, page by page.

    Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): the next one maximises
    `(1 - diversity) * score - diversity * greatest similarity to one that is picked`; the first of
    equals. Candidates of page `p` (from 0) are the first `pool * (p + 1)` hits, so that a list of
    more pages begins with that of fewer.

    Args:
        scores: Of the hits, best first.
        vectors: Their unit-length vectors.
        count: How many to pick; fewer where there are fewer hits.
        diversity: From 0 to 1.
        page: Hits of a page.
        pool: Candidates that a page brings.
    """
    closest = np.full(len(scores), -np.inf)
    open_ = np.ones(len(scores), bool)
    picked: list[int] = []
    for number in range(min(count, len(scores))):
        last = pool * (number // page + 1)
        similar = closest[:last] if picked else 0.0
        value = (1 - diversity) * scores[:last] - diversity * similar
        best = int(np.argmax(np.where(open_[:last], value, -np.inf)))
        picked.append(best)
        open_[best] = False
        closest = np.maximum(closest, vectors @ vectors[best])
    return np.array(picked, np.int64)
