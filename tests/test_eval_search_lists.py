"""Lists of hits: pages, thresholds, near-duplicates, diversity."""

import numpy as np
import pytest
from test_eval_search import ROWS, make_table

from eval.embed import EmbeddedRows, write_table
from eval.index.build import build_index
from eval.search.diverse import collapse_copies, spread
from eval.search.searcher import Searcher


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_table(tmp_path_factory.mktemp("data") / "table")


@pytest.fixture(scope="module", params=["Flat", "HNSW8", "IVF32,Flat"])
def searcher(request, table, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "index"
    build_index(table, out, factory=request.param, query_count=20)
    return Searcher(out, check="sizes")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """40 pictures, each there 1 to 5 times with a little noise, and an index of them."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(3)
    times = 1 + np.arange(40) % 5
    originals = generator.standard_normal((40, 16))
    images = np.repeat(originals, times, axis=0)
    images += 0.01 * generator.standard_normal(images.shape)
    rows = len(images)
    batch = EmbeddedRows(
        ids=np.arange(rows),
        keys=[str(row) for row in range(rows)],
        captions=[None] * rows,
        shards=["a"] * rows,
        embeddings={"image": images.astype(np.float32)},
    )
    table = write_table(
        folder / "table", lambda _: [batch], modalities=("image",), dim=16, fingerprints={}
    )
    build_index(table, folder / "index", factory="Flat", query_count=20)
    return Searcher(folder / "index"), np.repeat(np.arange(40), times), originals


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"where": "share < 0.6"},
        {"where": "share < 0.6", "plan": "overfetch"},
        {"where": "share < 0.6", "plan": "exact"},
        {"collapse": 0.8},
        {"diversity": 0.3},
        {"collapse": 0.8, "diversity": 0.3, "where": "good"},
    ],
)
def test_pages_go_on_without_repeats(table, searcher, options):
    queries = table.vectors("text")[:8]
    exclude = [[int(one)] for one in searcher.search(queries, 1).ids[:, 0]]
    pages = [
        searcher.search(queries, 12, offset=12 * page, exclude=exclude, **options).ids
        for page in range(6)
    ]
    joined = np.concatenate(pages, axis=1)
    assert joined.shape == (8, 72)
    assert all(len(set(ids)) == 72 for ids in joined)
    assert not any(set(ids) & set(banned) for ids, banned in zip(joined, exclude, strict=True))
    again = searcher.search(queries, 12, offset=48, exclude=exclude, **options)
    assert np.array_equal(again.ids, pages[4])
    alone = searcher.search(queries[3:4], 12, offset=12, exclude=exclude[3:4], **options)
    assert np.array_equal(alone.ids[0], pages[1][3]) or searcher.card.factory != "Flat"


def test_the_last_pages_are_short_and_then_empty(table, searcher):
    queries = table.vectors("text")[:3]
    hits = searcher.search(queries, 20, where="share < 0.01", offset=20)
    assert hits.ids.shape == (3, 10)
    assert hits.matching == 30
    first = searcher.search(queries, 20, where="share < 0.01")
    assert all(len({*a, *b}) == 30 for a, b in zip(first.ids, hits.ids, strict=True))
    nothing = searcher.search(queries, 20, where="share < 0.01", offset=40)
    assert nothing.ids.shape == (3, 0)
    assert nothing.rows == [[], [], []]
    assert searcher.search(queries, 5, offset=ROWS - 2).ids.shape == (3, 2)
    assert searcher.search(queries, 5, where="false").matching == 0


def test_hits_score_at_least_as_asked(table, searcher):
    queries = table.vectors("text")[:5]
    everything = searcher.search(queries, 50)
    least = float(everything.scores[0, 20])
    hits = searcher.search(queries, 50, min_score=least)
    for ids, scores, all_ids, all_scores, rows in zip(
        hits.ids, hits.scores, everything.ids, everything.scores, hits.rows, strict=True
    ):
        count = int((all_scores >= least).sum())
        assert np.array_equal(ids[:count], all_ids[:count])
        assert (ids[count:] == -1).all()
        assert np.isneginf(scores[count:]).all()
        assert len(rows) == count
    assert (searcher.search(queries, 3, min_score=1.5).ids == -1).all()


def test_near_duplicates_collapse_into_the_best(copies):
    searcher, picture, originals = copies
    queries = originals[:6].astype(np.float32)
    hits = searcher.search(queries, 12, collapse=0.95)
    plain = searcher.search(queries, len(picture))
    for query in range(6):
        groups = picture[hits.ids[query]]
        assert len(set(groups)) == 12  # refilled: no picture twice, none left out
        order = picture[plain.ids[query]]
        assert groups.tolist() == list(dict.fromkeys(order))[:12]
        assert hits.ids[query, 0] == plain.ids[query, 0]
        assert hits.copies[query, 0] == groups[0] % 5
    everything = searcher.search(queries, len(picture), collapse=0.95)
    assert (everything.ids >= 0).sum(axis=1).tolist() == [40] * 6
    assert all(
        np.array_equal(counts[:40], picture[ids[:40]] % 5)
        for ids, counts in zip(everything.ids, everything.copies, strict=True)
    )
    assert (plain.copies == 0).all()
    some = searcher.search(queries, 9, where="id in (3, 7, 9) or id = 1000", collapse=0.95)
    assert some.matching == 3
    assert set(some.ids[0]) <= {3, 7, 9, -1}


def slow_collapse(vectors, least):
    kept, copies = [], []
    for place, vector in enumerate(vectors):
        for number, other in enumerate(kept):
            if vectors[other] @ vector >= least:
                copies[number] += 1
                break
        else:
            kept.append(place)
            copies.append(0)
    return kept, copies


def slow_mmr(scores, vectors, count, diversity):
    picked = []
    while len(picked) < min(count, len(scores)):
        best, best_value = None, None
        for place in range(len(scores)):
            if place in picked:
                continue
            closest = max((float(vectors[place] @ vectors[one]) for one in picked), default=0.0)
            value = (1 - diversity) * scores[place] - diversity * closest
            if best_value is None or value > best_value:
                best, best_value = place, value
        picked.append(best)
    return picked


def test_collapse_and_diversity_equal_their_transcriptions():
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((60, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = vectors[0] + 0.3 * generator.standard_normal(5)
    scores = vectors @ query
    vectors, scores = vectors[np.argsort(-scores)], np.sort(scores)[::-1]
    for least in (0.3, 0.7, 0.95, 1.0):
        found = collapse_copies(vectors, least, 60)
        assert (found.places.tolist(), found.copies.tolist()) == slow_collapse(vectors, least)
        assert collapse_copies(vectors, least, 4).places.tolist() == found.places[:4].tolist()
    for diversity in (0.0, 0.2, 0.5, 0.9, 1.0):
        found = spread(scores, vectors, count=15, diversity=diversity, page=15, pool=60)
        assert found.tolist() == slow_mmr(scores, vectors, 15, diversity)
    narrow = spread(scores, vectors, count=4, diversity=0.9, page=4, pool=10)
    assert narrow.tolist() == slow_mmr(scores[:10], vectors[:10], 4, 0.9)
    longer = spread(scores, vectors, count=12, diversity=0.9, page=4, pool=10)
    assert longer[:4].tolist() == narrow.tolist()
    assert longer[4:8].max() < 20


def test_diversity_takes_hits_apart(table, searcher):
    queries = table.vectors("text")[:5]
    plain, spread_out = (searcher.search(queries, 10, diversity=one) for one in (0.0, 0.7))
    assert np.array_equal(plain.ids[:, 0], spread_out.ids[:, 0])

    def likeness(hits):
        rows = [searcher.rows.vectors(searcher.rows.places(ids)) for ids in hits.ids]
        return np.mean([(one @ one.T).mean() for one in rows])

    assert likeness(spread_out) < likeness(plain) - 0.05
    pool = searcher.search(queries, 50)
    assert all(set(a) <= set(b) for a, b in zip(spread_out.ids, pool.ids, strict=True))


def test_rows_like_a_row_leave_it_out(table, searcher):
    ids = [0, 10, 4000]
    hits = searcher.similar(ids, 5)
    vectors = table.vectors("image")[np.array(ids) // 2]
    plain = searcher.search(vectors, 6)
    for own, found, expected in zip(ids, hits.ids, plain.ids, strict=True):
        assert own not in found
        assert found.tolist() == [one for one in expected.tolist() if one != own][:5]
    one = int(hits.ids[0, 0])
    less = searcher.similar(ids, 4, exclude=[[one], [], []], where="share < 2")
    assert one not in less.ids[0]
    with pytest.raises(ValueError, match="holds no sample with id 7"):
        searcher.similar([7], 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": -1}, "offset must be at least 0, not -1"),
        ({"min_score": float("nan")}, "min_score must be a number, not nan"),
        ({"collapse": 0.0}, "collapse must be above 0 and at most 1, not 0.0"),
        ({"collapse": 1.5}, "collapse must be above 0 and at most 1, not 1.5"),
        ({"diversity": -0.1}, "diversity must be from 0 to 1, not -0.1"),
        ({"diversity": float("nan")}, "diversity must be from 0 to 1, not nan"),
    ],
)
def test_bad_options_are_one_line(table, searcher, options, message):
    with pytest.raises(ValueError, match=message):
        searcher.search(table.vectors("text")[:1], 3, **options)
