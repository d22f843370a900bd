"""Filtered search: every plan over every kind of index, against a slow transcription."""

import inspect
import resource
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from eval.embed import EmbeddedRows, write_table
from eval.index.build import build_index
from eval.index.card import IndexCard
from eval.index.folder import with_checksums
from eval.search.engine import Engine
from eval.search.filters import Allowed, FilterTimeoutError, RowFilter
from eval.search.plan import Planner
from eval.search.searcher import Searcher

ROWS, DIM = 3000, 24
SELECTIVITIES = (0.5, 0.1, 0.01, 0.001)
KINDS = (
    "Flat",
    "SQ8",
    "HNSW16",
    "IVF32,Flat",
    "OPQ4_16,IVF4,PQ4x4",
    "PQ12x4fs,Refine(SQ8)",
    "RaBitQfs,Refine(SQ8)",
    "RR24,IVF16,RaBitQfs,Refine(SQ8)",
)


def make_table(folder, rows=ROWS, *, first=0):
    """Rows in 20 clusters, and texts that lie aside; `share` is spread evenly from 0 to 1."""
    generator = np.random.default_rng(rows + first)
    centres = np.random.default_rng(7).standard_normal((20, DIM))
    cluster = generator.integers(0, 20, rows)
    images = centres[cluster] + 0.7 * generator.standard_normal((rows, DIM))
    texts = images + 0.5 * generator.standard_normal((rows, DIM)) + centres[0]
    share = generator.permutation(rows) / rows
    vendors = ["noto", "fluent", "Ünïcode 'n' \"co\"", None]
    batch = EmbeddedRows(
        ids=first + 2 * np.arange(rows),
        keys=[f"k{row}" for row in range(rows)],
        captions=[f"a {'Red' if row % 5 == 0 else 'blue'} thing {row}" for row in range(rows)],
        shards=["a.tar"] * rows,
        embeddings={"image": images.astype(np.float32), "text": texts.astype(np.float32)},
        fields=[
            {
                "share": float(share[row]),
                "cluster": int(cluster[row]),
                "vendor": vendors[row % 4],
                "outer": {"inner": row % 7},
                "tags": ["x", f"t{row % 3}"] if row % 2 else [],
                "good": bool(row % 2),
            }
            for row in range(rows)
        ],
    )
    return write_table(
        folder,
        lambda _start: [batch],
        modalities=("image", "text"),
        dim=DIM,
        fingerprints={"model": "m", "data": f"d{first}"},
        rows_per_part=1300,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_table(tmp_path_factory.mktemp("data") / "table")


@pytest.fixture(scope="module")
def metadata(table):
    return table.metadata().to_pylist()


@pytest.fixture(scope="module", params=KINDS)
def searcher(request, table, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "index"
    build_index(table, out, factory=request.param, query_count=20)
    return Searcher(out, check="sizes")


@pytest.fixture(scope="module")
def flat(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "flat"
    build_index(table, out, factory="Flat", query_count=20)
    return Searcher(out, check="sizes")


def exact(table, queries, mask, k):
    """Sample ids of the best allowed rows, in float64."""
    scores = queries.astype(np.float64) @ table.vectors("image").astype(np.float64).T
    best = np.argsort(np.where(mask, -scores, np.inf), axis=1, kind="stable")[:, :k]
    return table.metadata()["id"].to_numpy()[best]


def those(metadata, rule):
    """Which rows a rule is true of, and their ids."""
    mask = np.array([bool(rule(row)) for row in metadata])
    return mask, {row["id"] for row in metadata if rule(row)}


def recall(found, best):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, best, strict=True)])


@pytest.mark.parametrize("plan", ["auto", "exact", "selector", "overfetch"])
def test_filters_are_exact_on_flat_and_nearly_so_on_every_other_kind(
    table, metadata, searcher, plan
):
    queries = table.vectors("text")[::75]
    for selectivity in SELECTIVITIES:
        mask, ids = those(metadata, lambda row, most=selectivity: row["share"] < most)
        k = min(10, int(mask.sum()))
        where = f"share < {selectivity}"
        if plan == "selector" and not Engine(searcher._planner._engine.index).selects:
            with pytest.raises(ValueError, match="takes no selector; choose exact or overfetch"):
                searcher.search(queries, 10, where=where, plan=plan)
            continue
        hits = searcher.search(queries, 10, where=where, plan=plan)
        best = exact(table, queries, mask, k)
        assert hits.matching == mask.sum()
        assert hits.ids.shape == (len(queries), k)
        assert all(set(some) <= ids and len(set(some)) == k for some in hits.ids.tolist())
        assert (np.diff(hits.scores, axis=1) <= 1e-6).all()
        if plan == "exact" or searcher.card.factory == "Flat":
            assert np.array_equal(hits.ids, best)
        assert recall(hits.ids, best) >= 0.95, (selectivity, hits.plan)


def test_a_filter_far_from_the_queries_is_answered_too(table, metadata, searcher):
    """Allowed rows all lie in clusters that the queries are not near."""
    mask, _ = those(metadata, lambda row: row["cluster"] == 3)
    queries = table.vectors("image")[~mask][:40]
    for plan in ("auto", "overfetch"):
        hits = searcher.search(queries, 10, fields={"cluster": 3}, plan=plan)
        assert recall(hits.ids, exact(table, queries, mask, 10)) >= 0.95


def test_the_planner_weighs_what_was_measured(table, searcher):
    engine = searcher._planner._engine
    share = np.arange(ROWS) / ROWS
    half, few = Allowed(share < 0.5), Allowed(share < 0.001)
    asking = "selector" if engine.selects else "overfetch"

    def chosen(allowed, query_s, row_s):
        card = replace(searcher.card, costs={"query_s": query_s, "exact_row_s": row_s})
        return Planner(engine, searcher.rows, card).choose(allowed, 10, 1)

    assert chosen(half, 1.0, 1e-9) == "exact"
    assert chosen(half, 1e-6, 1.0) == asking
    assert chosen(few, 1e-3, 1e-6) == "exact"
    if searcher.card.factory != "Flat":
        assert chosen(Allowed(share < 0.95), 1.0, 1e-9) == "auto"  # such as after removals


def test_allowed_rows_as_bits():
    mask = np.array([True, False, True] * 8)
    allowed = Allowed(mask)
    assert np.array_equal(allowed.mask, mask)
    assert np.array_equal(allowed.rows, np.flatnonzero(mask))
    assert (allowed.count, allowed.of) == (16, 24)
    asked = np.array([[0, 1, -1], [23, 18, 5]])
    assert allowed.has(asked).tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize(
    ("where", "rule"),
    [
        ("share > 0.25 and vendor = 'noto'", lambda m: m["share"] > 0.25 and m["vendor"] == "noto"),
        ("vendor is null", lambda m: m["vendor"] is None),
        ("vendor <> 'noto'", lambda m: m["vendor"] not in ("noto", None)),
        ("not (vendor = 'noto')", lambda m: m["vendor"] not in ("noto", None)),
        ("vendor = 'Ünïcode ''n'' \"co\"'", lambda m: (m["vendor"] or "").startswith("Ü")),
        ('"outer.inner" in (1, 2)', lambda m: m["outer.inner"] in (1, 2)),
        ("list_contains(tags, 't1')", lambda m: "t1" in m["tags"]),
        ("caption ilike '%RED%'", lambda m: "Red" in m["caption"]),
        ("good", lambda m: m["good"]),
        ("good -- a comment", lambda m: m["good"]),
        ("id = 10 or ID = 12", lambda m: m["id"] in (10, 12)),
        ("case when good then share > 0.5 end", lambda m: m["good"] and m["share"] > 0.5),
        ("share between 0.2 and 0.4", lambda m: 0.2 <= m["share"] <= 0.4),
        ("CAST(cluster AS DOUBLE) / 2 < 3", lambda m: m["cluster"] / 2 < 3),
        ("1 = 2", lambda _: False),
    ],
)
def test_sql_leaves_the_rows_it_is_true_of(table, metadata, flat, where, rule):
    mask, ids = those(metadata, rule)
    queries = table.vectors("text")[:2]
    hits = flat.search(queries, ROWS, where=where)
    assert hits.matching == mask.sum()
    assert [set(found) for found in hits.ids.tolist()] == [ids] * 2
    assert [[row["id"] for row in rows] for rows in hits.rows] == hits.ids.tolist()


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"vendor": ["noto", "fluent"]}, lambda m: m["vendor"] in ("noto", "fluent")),
        ({"vendor": [None, "noto"]}, lambda m: m["vendor"] in (None, "noto")),
        ({"vendor": None}, lambda m: m["vendor"] is None),
        ({"vendor": []}, lambda _: False),
        ({"vendor": "x' or 1=1 --"}, lambda _: False),
        ({"vendor": "Ünïcode 'n' \"co\""}, lambda m: (m["vendor"] or "").startswith("Ü")),
        ({"outer.inner": {"min": 2, "max": 3.5}}, lambda m: m["outer.inner"] in (2, 3)),
        ({"share": {"min": 0.5}, "good": True}, lambda m: m["share"] >= 0.5 and m["good"]),
        ({"share": {"min": None}}, lambda _: True),
        ({"caption": {"contains": "rED"}}, lambda m: "Red" in m["caption"]),
        ({"caption": {"contains": "%"}}, lambda _: False),
        ({"tags": ["t1", "t2"]}, lambda m: {"t1", "t2"} & set(m["tags"])),
        ({"tags": {"contains": "X"}}, lambda m: m["good"]),
        ({}, lambda _: True),
    ],
)
def test_fields_leave_the_rows_that_fit(table, metadata, flat, fields, rule):
    hits = flat.search(table.vectors("text")[:1], ROWS, fields=fields)
    assert set(hits.ids[0].tolist()) == those(metadata, rule)[1]
    both = flat.search(table.vectors("text")[:1], ROWS, fields=fields, where="cluster < 10")
    ids = those(metadata, lambda m: rule(m) and m["cluster"] < 10)[1]
    assert set(both.ids[0].tolist()) == ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sort": 1}, r"fields: no column 'sort'; columns: id, key, caption, shard, cluster"),
        ({"vendor": 3}, "fields: vendor holds text, not 3"),
        ({"cluster": "3"}, "fields: cluster holds numbers, not '3'"),
        ({"cluster": [True]}, "fields: cluster holds numbers, not True"),
        ({"good": 1}, "fields: good holds true or false, not 1"),
        ({"cluster": {"least": 3}}, "cannot be asked for 'least'; known: min, max, contains"),
        ({"cluster": {"contains": "3"}}, "`contains` compares a text with text columns"),
    ],
)
def test_bad_fields_are_one_line(table, flat, fields, message):
    with pytest.raises(ValueError, match=message):
        flat.search(table.vectors("text")[:1], 3, fields=fields)


ATTACKS = [
    ("parity(", "syntax error"),
    ("nothing > 1", '"nothing" not found.*columns: id, key, caption, .*"outer.inner"'),
    ("caption", "Could not convert string"),
    ("1=1) union select (1", "syntax error"),
    ("true) or (true", "syntax error"),
    ("1=1; drop table rows", "Only SELECT"),
    ("1=1; select 1", "one expression over the columns, not a statement"),
    ("true from rows", "one expression over the columns, not a statement"),
    ("true union select true", "one expression over the columns, not a statement"),
    ("true limit 3", "one expression over the columns, not a statement"),
    ("true, false", "one expression over the columns, not several"),
    ("true as x", "one expression over the columns, not several"),
    ("exists(select * from read_csv('/etc/passwd'))", "here is a subquery"),
    ("id in (select id from rows)", "here is a subquery"),
    ("read_csv('/etc/passwd') is null", "'read_csv' cannot be used; known: abs, "),
    ("read_text('/etc/passwd') is null", "'read_text' cannot be used"),
    ("getenv('HOME') is null", "'getenv' cannot be used"),
    ("attach '/tmp/x.db'", "the type 'attach' cannot be used"),
    ("pragma version", "one expression over the columns, not several"),
    ("true; set threads=1", "Only SELECT"),
    ("count(*) > 1", "'count_star' cannot be used"),
    ("row_number() over () > 1", "here is a window"),
    ("columns(*) is not null", "here is a star"),
    ("unnest([1, 2]) > 1", "'unnest' cannot be used"),
    ("? = 1", "here is a parameter"),
    ("error('boo')", "'error' cannot be used"),
    ("repeat('x', 1000000000) = 'y'", "'repeat' cannot be used"),
    ("len(list_filter(range(9), lambda x: x > 3)) > 1", "cannot be used|here is a lambda"),
    ("lower(upper(main.repeat('x', 3))) = 'x'", "'repeat' cannot be used"),
    ("vendor = 'x", "unterminated string"),
    ("true /* and", "unterminated"),
    ("(" * 300, "more than 200 brackets"),
    ("true and " * 2000 + "true", "longer than 10000 characters"),
    ("1+" * 2000 + "1 = 1", "expression depth"),
    ("\x00", "not found"),
    ("caption::VARCHAR[] is null", "the type 'list' cannot be used; known: bool, boolean, "),
    ("cast(null as integer[100000]) is null", "the type 'array' cannot be used"),
    ("caption::JSON is null", "the type 'json' cannot be used"),
    ("(" + "[" * 9 + "caption" + "]::text" * 9 + ") = 'x'", "too many texts or lists"),
    ("concat([" * 9 + "caption" + "])" * 9 + " = 'x'", "too many texts or lists"),
    ("len(concat(" + "caption, " * 101 + "id)) > 1", "too many texts or lists"),
    ("len(list_value(" + "tags, " * 51 + "tags)) > 1", "too many texts or lists"),
    ("upper(" * 101 + "caption" + ")" * 101 + " = 'X'", "too many texts or lists"),
    ("concat(caption, '" + "x" * 3000 + "') || '" + "y" * 4000 + "' = 'x'", None),
    ("lower('" + "x" * 9000 + "' || caption) || caption = 'x'", "too many texts or lists"),
    ("case when good then caption else vendor end || id::text = 'x'", None),
    ("json_extract(caption, '$..*') is null", "a path to one value, without '\\*'"),
    ("caption ->> ('$.' || vendor) is null", "a pattern or path in quotes"),
    ("regexp_matches(caption, vendor)", "a pattern or path in quotes"),
    ("regexp_extract(caption, '(.*)', ['a', 'b']) is null", "a pattern or path in quotes"),
    (" or ".join(["regexp_matches(vendor, 'x{900}y')"] * 13), "too many texts or lists"),
]
TAKEN = [where for where, message in ATTACKS if message is None]
ATTACKS = [(where, message) for where, message in ATTACKS if message is not None]


@pytest.mark.parametrize(("where", "message"), ATTACKS)
def test_only_one_expression_over_the_columns_is_taken(table, flat, where, message):
    with pytest.raises(ValueError, match=message) as caught:
        flat.search(table.vectors("text")[:1], 3, where=where)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("where: ")


@pytest.mark.parametrize(
    "where",
    [
        *TAKEN,
        "regexp_matches(caption, 'a|b') or regexp_full_match(vendor, 'n.*', 'i')",
        " or ".join(f"lower(caption) like '%{n}%'" for n in range(60)),
        "share::decimal(10, 2) > try_cast(vendor as double) or id in (1, 2)",
        "json_extract_string('{\"a\": [1]}', '$.a[0]')::int = 1 and [cluster, id][1] > 3",
    ],
)
def test_expressions_of_some_length_are_taken(flat, where):
    assert 0 <= flat._filter.allowed(where).count <= ROWS


@pytest.mark.parametrize("options", [{}, {"collapse": 0.9}])
def test_scores_are_the_cosines_of_the_rows_with_and_without_a_filter(table, searcher, options):
    queries = table.vectors("text")[:40]
    vectors = table.vectors("image").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = queries.astype(np.float64) @ vectors.T
    cosines /= np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    said = []
    for where in (None, "share < 0.97", "share < 0.5", "id >= 0"):
        for plan in ("auto", "exact", "overfetch"):
            hits = searcher.search(queries, 20, where=where, plan=plan, **options)
            assert (hits.ids >= 0).all()
            right = np.take_along_axis(cosines, hits.ids // 2, axis=1)
            np.testing.assert_allclose(hits.scores, right, atol=1e-5)
            assert (np.diff(hits.scores, axis=1) <= 0).all()
            pairs = [(query, one) for query, ids in enumerate(hits.ids) for one in ids]
            said.append(dict(zip(pairs, hits.scores.ravel(), strict=True)))
    for other in said[1:]:
        both = said[0].keys() & other.keys()
        assert len(both) > 100
        assert max(abs(said[0][one] - other[one]) for one in both) < 1e-5
    near = searcher.neighbours(queries, 20)
    right = np.take_along_axis(cosines, near.ids // 2, axis=1)
    np.testing.assert_allclose(near.scores, right, atol=1e-5)


class Steps:
    """An index that finds better rows with every doubling of the effort, up to the third."""

    navigated, lossless, selects = True, True, True

    def __init__(self):
        self.efforts = []

    def wanted(self, k, _effort):
        return k

    def selected(self, queries, _k, _allowed, effort):
        self.efforts.append(effort)
        row = {1.0: 5, 2.0: 3}.get(effort, 1)
        return np.full((len(queries), 1), 1 - row / 10, np.float32), np.array([[row]])


def test_an_index_is_asked_until_its_answer_stays_the_same():
    planner: Any = object.__new__(Planner)
    planner._engine, planner._rows = Steps(), [None] * 1000
    planner._query_s, planner._row_s = 1e-9, 1.0
    mask = np.arange(1000) % 2 == 1
    query = np.ones((1, 4), np.float32)
    found = planner.answer(query, 1, Allowed(mask), "selector")
    assert found.rows.tolist() == [[1]]
    assert planner._engine.efforts == [1.0, 2.0, 4.0, 8.0]


def filter_over(columns) -> Any:
    """A filter over these columns and the ids from 0 on."""
    table = pa.table(columns)

    class Rows:
        def __init__(self):
            self.ids = np.arange(len(table))
            self.table = table.append_column("id", pa.array(self.ids))

        def __len__(self):
            return len(self.ids)

    filter_ = object.__new__(RowFilter)
    inspect.unwrap(RowFilter.__init__)(filter_, Rows(), np.empty(0, np.int64), seconds=60.0)
    return filter_


def test_the_most_that_an_expression_may_make_takes_little_memory():
    filter_ = filter_over({"long": ["x" * 5000] * 2100})
    filter_.allowed("len(long) > 3")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    where = "len(" + "upper(" * 45 + "concat(long, long)" + ")" * 45 + ") = 10000"
    assert filter_.allowed(where).count == 2100
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert made < 400 * 2**10  # all steps of 2,048 rows together would be 1 GB


def test_columns_that_differ_only_in_case_cannot_be_filtered_by():
    filter_ = filter_over({"Name": ["A", "B"], "name": ["a", "b"], "ID": [7, 8], "n": [1, 2]})
    assert [*filter_.columns] == ["n", "id"]
    for where, fields in (("name = 'b'", {}), (None, {"name": "b"}), ("Name = 'B'", {})):
        with pytest.raises(ValueError, match=r"name|Name"):
            filter_.allowed(where, fields)
    assert filter_.allowed("id = 1 and n = 2").count == 1


def test_filters_of_very_many_values_are_refused(table, flat):
    query = table.vectors("text")[:1]
    many = [*range(10_000)]
    assert flat.search(query, ROWS, fields={"id": many}).matching == ROWS
    with pytest.raises(ValueError, match="fields: 10,001 values; at most 10,000"):
        flat.search(query, 3, fields={"id": many, "good": True})


def test_the_database_reaches_nothing_else(flat, tmp_path):
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for sql in (
        f"SELECT * FROM read_csv('{tmp_path}/secret.csv')",
        f"SELECT * FROM '{tmp_path}/secret.csv'",
        f"COPY rows TO '{tmp_path}/out.csv'",
        f"ATTACH '{tmp_path}/out.db'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        'SELECT * FROM "table"',  # a variable where the query is run
    ):
        with pytest.raises(Exception, match=r"(?i)error"):
            flat._filter.run(sql)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def test_a_slow_filter_is_interrupted(table, flat):
    before, flat._filter._seconds = flat._filter._seconds, 0.2
    try:
        with pytest.raises(FilterTimeoutError, match=r"where: took longer than 0.2 s"):
            flat._filter._look("id IN (SELECT range FROM range(100000000000))", [])
    finally:
        flat._filter._seconds = before
    assert flat.search(table.vectors("text")[:1], 3, where="good").matching == ROWS // 2


def test_what_a_filter_leaves_is_remembered_within_bounds(table, flat, monkeypatch):
    asked = []
    look = flat._filter._look
    monkeypatch.setattr(flat._filter, "_look", lambda *a: asked.append(a) or look(*a))
    monkeypatch.setattr("eval.search.filters._REMEMBERED_BYTES", 800)
    for where in ("share < 0.51", "share < 0.51", "share < 0.52", "share < 0.53", "share < 0.51"):
        flat.search(table.vectors("text")[:1], 3, where=where)
    assert len(asked) == 4  # the first was forgotten when the third came
    assert sum(one.bytes for one in flat._filter._kept.values()) <= 800


def test_threads_do_not_disturb_each_other(table, metadata, flat):
    queries = table.vectors("text")[:50]
    expected = {
        n: flat.search(queries[n : n + 1], 5, where=f"cluster <> {n % 20}").ids for n in range(50)
    }
    flat._filter._kept.clear()
    wrong = []

    def ask(order):
        for n in order:
            found = flat.search(queries[n : n + 1], 5, where=f"cluster <> {n % 20}")
            if not np.array_equal(found.ids, expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(range(a, 50, b),)) for a, b in ((0, 1), (3, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def remove_by_hand(folder, rows):
    """Mark rows as removed."""
    np.save(folder / "removed-1.npy", np.sort(rows))
    card = IndexCard.load(folder)
    card = replace(card, removed=len(rows), removed_file="removed-1.npy", generation=1)
    with_checksums(card, folder).save(folder)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "PQ12x4fs,Refine(SQ8)"])
def test_removed_rows_are_found_no_more(table, tmp_path, factory):
    build_index(table, tmp_path / "index", factory=factory, query_count=20)
    gone = np.array([0, 3, 4, 5, 2999])
    queries = table.vectors("image")[gone]  # each would find itself
    whole = Searcher(tmp_path / "index").search(queries, 3)
    assert whole.ids[:, 0].tolist() == (2 * gone).tolist()
    remove_by_hand(tmp_path / "index", gone)
    searcher = Searcher(tmp_path / "index")
    assert (searcher.live, len(searcher.ids)) == (ROWS - 5, ROWS)
    mask = np.ones(ROWS, bool)
    mask[gone] = False
    for hits in (searcher.search(queries, 3), searcher.search(queries, 3, where="id >= 0")):
        assert hits.matching == ROWS - 5
        assert recall(hits.ids, exact(table, queries, mask, 3)) >= 0.95
    everything = searcher.neighbours(queries[:1], ROWS)
    assert sorted(everything.ids[0] // 2) == np.flatnonzero(mask).tolist()
    assert searcher.search(queries, 3, fields={"id": [0, 6]}).ids.shape == (5, 0)
    assert searcher.places(np.array([2, 6, 7, 8, -1, 5998])).tolist() == [1, -1, -1, -1, -1, -1]
    assert searcher.places(np.array([5996])).tolist() == [2998]
    with pytest.raises(ValueError, match="holds no sample with id 6"):
        searcher.metadata(np.array([2, 6]))
    with pytest.raises(ValueError, match="holds no sample with id 6"):
        searcher.similar([6], 3)
    counts = {one.name: dict(one.values) for one in searcher.fields()}
    assert counts["vendor"]["noto"] == ROWS // 4 - 2
    assert sum(counts["good"].values()) == ROWS - 5


def test_fields_are_summed_up(metadata, flat):
    found = {one.name: one for one in flat.fields()}
    assert list(found) == [name for name in metadata[0] if name != "id"]
    assert (found["caption"].kind, found["caption"].values) == ("text", [])
    assert found["vendor"].kind == "text"
    assert sorted(found["vendor"].values) == [
        (name, ROWS // 4) for name in sorted({row["vendor"] for row in metadata} - {None})
    ]
    assert (found["share"].kind, found["share"].values) == ("number", [])
    assert (found["share"].low, found["share"].high) == (0.0, (ROWS - 1) / ROWS)
    assert (found["outer.inner"].low, found["outer.inner"].high) == (0, 6)
    assert len(found["outer.inner"].values) == 7
    assert dict(found["tags"].values) == {"x": 1500, "t0": 500, "t1": 500, "t2": 500}
    assert sorted(found["good"].values) == [(False, 1500), (True, 1500)]
    assert found["good"].kind == "flag"
    assert flat.fields() is flat.fields()
