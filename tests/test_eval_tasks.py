import inspect
import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score

from eval.compare import compare
from eval.embed import EmbeddedRows, write_table
from eval.index.build import build_index
from eval.results import Report, format_table
from eval.search.searcher import Searcher
from eval.tasks import DIRECTIONS, TASKS, composed_retrieval, retrieval, zero_shot


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def scene(noise, *, labels=40, per_image=3, per_text=2, dim=12, seed=0):
    """Images and texts around one centre per label: several of each."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((labels, dim))
    image_labels, text_labels = np.arange(labels * per_image) % labels, np.arange(labels * per_text)
    text_labels = text_labels % labels
    images = centres[image_labels] + noise * generator.standard_normal((len(image_labels), dim))
    texts = centres[text_labels] + noise * generator.standard_normal((len(text_labels), dim))
    return {
        "images": images,
        "texts": texts,
        "image_labels": image_labels,
        "text_labels": text_labels,
    }


def values(report):
    return {figure.name: figure.value for figure in report.figures}


def everything_but_items(report):
    figures = [vars(figure) for figure in report.figures]
    return figures, {key: value for key, value in report.protocol.items() if key != "items"}


@pytest.fixture
def classified():
    generator = np.random.default_rng(3)
    classes = generator.standard_normal((9, 8))
    labels = generator.integers(0, 8, 300)  # the ninth class has no images
    images = classes[labels] + 1.2 * generator.standard_normal((300, 8))
    return images, classes, labels, [f"class {number}" for number in range(9)]


@pytest.fixture(scope="module")
def searcher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    vectors = np.random.default_rng(4).standard_normal((120, 10)).astype(np.float32)
    vectors[100:] = vectors[100]  # twenty pictures that look the same
    names = [str(row) for row in range(120)]
    batch = EmbeddedRows(10 + np.arange(120), names, names, names, {"image": vectors})
    table = write_table(
        folder / "table",
        lambda _start: [batch],
        modalities=["image"],
        dim=10,
        fingerprints={},
        dtype="float32",
    )
    build_index(table, folder / "index")
    return Searcher(folder / "index")


def stored(searcher, rows):
    return searcher.rows.vectors(np.asarray(rows, np.int64))


def test_zero_shot_agrees_with_scikit_learn(classified):
    images, classes, labels, names = classified
    report = zero_shot(images, classes, labels, names)
    scores = unit(images) @ unit(classes).T
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(9))
        assert report[f"top{k}"].value == pytest.approx(expected)
        assert report[f"top{k}"].chance == k / 9
    expected = recall_score(labels, scores.argmax(1), labels=np.arange(8), average="macro")
    assert report["mean_per_class_recall"].value == pytest.approx(expected)
    assert report["mean_per_class_recall"].count == 8
    assert report.protocol["classes_without_images"] == 1
    matrix = confusion_matrix(labels, scores.argmax(1), labels=np.arange(9))
    np.fill_diagonal(matrix, 0)
    confused = report.details["confused"]
    assert confused[0]["count"] == matrix.max()
    for pair in confused:
        truth, wrong = names.index(pair["truth"]), names.index(pair["predicted"])
        assert pair["count"] == matrix[truth, wrong] > 0
        assert pair["of"] == np.count_nonzero(labels == truth)
        for image in pair["images"]:
            assert (labels[image], scores[image].argmax()) == (truth, wrong)
    assert len(zero_shot(images, classes, labels, names, confused=2).details["confused"]) == 2
    found = {entry["name"]: entry["recall"] for entry in report.details["per_class"]}
    assert np.mean(list(found.values())) == pytest.approx(expected)


def test_retrieval_equals_the_slow_transcription():
    given = scene(1.1)
    report = retrieval(**given)
    scores = unit(given["images"]) @ unit(given["texts"]).T
    match = given["image_labels"][:, None] == given["text_labels"]
    for direction, table, right in (
        ("image_to_text", scores, match),
        ("text_to_image", scores.T, match.T),
    ):
        places = []
        for row, good in zip(table, right, strict=True):
            order = np.argsort(-row)
            places.append(1 + next(place for place, item in enumerate(order) if good[item]))
        places = np.array(places)
        for k in (1, 5, 10):
            assert report[f"{direction}_recall@{k}"].value == pytest.approx(np.mean(places <= k))
        # A rank counts the wrong ones ahead; no right one is ahead of the first right one.
        assert report[f"{direction}_median_rank"].value == np.median(places)
        assert not report[f"{direction}_median_rank"].higher_is_better
        for shown in report.details["galleries"][direction]:
            order = np.argsort(-table[shown["query"]])[:5]
            assert [one["item"] for one in shown["candidates"]] == order.tolist()
            assert [one["right"] for one in shown["candidates"]] == [
                bool(right[shown["query"], item]) for item in order
            ]
            assert shown["rank"] == places[shown["query"]]
    assert 0.2 < report["image_to_text_recall@1"].value < 0.95


def test_perfect_embeddings_score_one_and_collapsed_ones_zero(classified, searcher):
    given = scene(0.0)
    assert all(figure.value == 1.0 for figure in retrieval(**given).figures)
    flat = {**given, "images": np.ones((120, 4)), "texts": np.ones((80, 4))}
    report = retrieval(**flat)
    assert report["image_to_text_recall@10"].value == 0.0
    assert report["text_to_image_median_rank"].value == 118  # behind the 117 that are wrong
    images, classes, labels, names = classified
    assert zero_shot(classes[labels], classes, labels, names)["top1"].value == 1.0
    assert zero_shot(classes[labels], classes, labels, names).details["confused"] == []
    collapsed = zero_shot(np.ones_like(images), np.ones_like(classes), labels, names)
    assert all(figure.value == 0.0 for figure in collapsed.figures)
    assert all(pair["truth"] != pair["predicted"] for pair in collapsed.details["confused"])
    rows = np.arange(0, 100, 5)
    report = composed_retrieval(stored(searcher, rows), [[10 + row] for row in rows], searcher)
    assert all(figure.value == 1.0 for figure in report.figures)


def test_a_target_among_pictures_that_look_the_same_is_not_found(searcher):
    same = stored(searcher, [110] * 20)
    alone = composed_retrieval(same, [[row] for row in range(110, 130)], searcher)
    assert values(alone) == {"recall@1": 0.0, "recall@5": 0.0, "recall@10": 0.0}
    # Fifteen of the twenty are right: five wrong ones tie, and are counted ahead.
    many = composed_retrieval(same[:1], [range(110, 125)], searcher)
    assert values(many) == {"recall@1": 0.0, "recall@5": 0.0, "recall@10": 1.0}
    every = composed_retrieval(same[:1], [range(110, 130)], searcher)
    assert every["recall@1"].value == 1.0


def test_random_embeddings_lie_within_their_interval_of_chance(searcher):
    generator = np.random.default_rng(8)
    inside, cases = 0, 0
    look_alikes = [range(111, 130)] * 80
    for seed in range(12):
        given = scene(0.0, seed=seed)
        noise = {
            "images": generator.standard_normal((120, 12)),
            "texts": generator.standard_normal((80, 12)),
        }
        figures = [one for one in retrieval(**{**given, **noise}).figures if "recall" in one.name]
        queries = generator.standard_normal((80, 10)).astype(np.float32)
        targets = [[int(target)] for target in generator.integers(10, 110, 80)]
        figures += composed_retrieval(queries, targets, searcher, references=look_alikes).figures
        inside += sum(figure.low <= (figure.chance or 0) <= figure.high for figure in figures)
        cases += len(figures)
    assert inside >= 0.85 * cases  # 0.95 but for rough intervals where a handful are hit


@pytest.mark.parametrize("noise", [0.8, 0.0])
def test_the_order_of_items_changes_nothing(noise):
    given = scene(noise)
    generator = np.random.default_rng(9)
    one, other = generator.permutation(120), generator.permutation(80)
    shuffled = {
        "images": given["images"][one],
        "texts": given["texts"][other],
        "image_labels": given["image_labels"][one],
        "text_labels": given["text_labels"][other],
    }
    assert everything_but_items(retrieval(**given)) == everything_but_items(retrieval(**shuffled))


def test_the_order_of_images_and_classes_changes_nothing(classified):
    images, classes, labels, names = classified
    order, turn = np.random.default_rng(1).permutation(300), np.random.default_rng(2).permutation(9)
    place = np.argsort(turn)
    here = zero_shot(images, classes, labels, names)
    there = zero_shot(
        images[order], classes[turn], place[labels[order]], [names[some] for some in turn]
    )
    assert everything_but_items(here) == everything_but_items(there)


def test_composed_retrieval_removes_references_and_states_exact_chance(searcher):
    rows = np.arange(0, 60, 3)
    queries = stored(searcher, rows)  # the reference picture alone finds itself
    references = [[10 + int(row)] for row in rows]
    targets = [[11 + int(row), 12 + int(row)] for row in rows]
    with_them = composed_retrieval(queries, targets, searcher)
    without = composed_retrieval(queries, targets, searcher, references=references)
    assert without["recall@5"].value >= with_them["recall@5"].value
    assert with_them["recall@1"].value == 0.0
    assert without["recall@1"].chance == pytest.approx(2 / 119)
    vectors = stored(searcher, range(120)).astype(np.float64)
    for k in (1, 5, 10):
        hits = []
        for query, row in enumerate(rows):
            scores = vectors @ vectors[row]
            scores[row] = -9
            order = 10 + np.argsort(-scores)[:k]
            hits.append(bool(set(order) & set(targets[query])))
        assert without[f"recall@{k}"].value == pytest.approx(np.mean(hits))
    assert without.protocol["references_removed"] == 20
    for shown in without.details["gallery"]:
        assert len(shown["candidates"]) == 5
        assert references[shown["query"]][0] not in [one["id"] for one in shown["candidates"]]
    grouped = composed_retrieval(
        queries, targets, searcher, references=references, groups=np.arange(20) // 10
    )
    assert values(grouped) == values(without)
    wide, narrow = grouped["recall@10"], without["recall@10"]
    assert (wide.low, wide.high) != (narrow.low, narrow.high)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distractors_are_allowed_in_one_direction(direction):
    given = scene(0.3)
    side = "text" if direction == "image_to_text" else "image"
    given[f"{side}_labels"] = given[f"{side}_labels"].copy()
    given[f"{side}_labels"][:3] = 1000
    report = retrieval(**given, directions=[direction])
    assert all(figure.name.startswith(direction) for figure in report.figures)
    with pytest.raises(ValueError, match=r"retrieval, .*3 of .* queries have no right candidate"):
        retrieval(**given)


def test_reports_can_be_written_and_compared_in_pairs(classified):
    given = scene(0.9)
    worse = {**given, "texts": scene(0.9, seed=1)["texts"] * 0.25 + given["texts"]}
    a, b = retrieval(**given, title="a"), retrieval(**worse, title="b")
    assert Report.from_json(json.loads(json.dumps(a.to_json(), allow_nan=False))) == a
    difference = compare(a, b)
    assert difference.title == "a minus b"
    name = "image_to_text_recall@1"
    gain = difference[name]
    assert gain.value == pytest.approx(a[name].value - b[name].value)
    assert gain.unit == "points"
    assert gain.low <= gain.value <= gain.high
    # Paired: narrower than the two intervals together.
    apart = (a[name].high - a[name].low) ** 2 + (b[name].high - b[name].low) ** 2
    assert (gain.high - gain.low) ** 2 < apart
    nothing = compare(a, a)
    assert all((one.value, one.low, one.high) == (0, 0, 0) for one in nothing.figures)
    assert "a minus b" in format_table([difference])
    images, classes, labels, names = classified
    top = compare(
        zero_shot(images, classes, labels, names), zero_shot(images, classes, labels, names)
    )
    assert [one.name for one in top.figures] == ["top1", "top5", "mean_per_class_recall"]


def test_reports_that_are_not_comparable_are_refused(classified):
    given = scene(0.5)
    a = retrieval(**given, protocol={"data": "x"})
    with pytest.raises(ValueError, match=r"protocols differ in data: x / y$"):
        compare(a, retrieval(**given, protocol={"data": "y"}))
    turned = {name: rows[::-1] for name, rows in given.items()}
    with pytest.raises(ValueError, match="protocols differ in items"):
        compare(a, retrieval(**turned, protocol={"data": "x"}))
    with pytest.raises(ValueError, match="retrieval with zero_shot: not the same task"):
        compare(a, zero_shot(*classified))
    with pytest.raises(ValueError, match="evaluate both in one process"):
        compare(a, Report.from_json(a.to_json()))


def test_bad_input_to_zero_shot_is_one_line(classified):
    images, classes, labels, names = classified
    broken = images.copy()
    broken[7, 2] = np.nan
    outside = labels.copy()
    outside[4] = 9
    for given, message in (
        ((images[:0], classes, labels[:0], names), "there are no images"),
        ((images, classes[:1], labels * 0, names[:1]), "1 classes; with fewer than two"),
        ((images, classes, outside, names), "image 4 has label 9, which is no class"),
        ((images, classes, labels, names[:8]), "8 class names for 9 classes"),
        ((broken, classes, labels, names), "1 of 300 rows hold NaN or infinity: rows 7"),
    ):
        with pytest.raises(ValueError, match=message):
            zero_shot(*given)
    with pytest.raises(ValueError, match="cannot be negative"):
        zero_shot(images, classes, labels, names, confused=-1)


def test_bad_input_to_retrieval_is_one_line():
    given = scene(0.5)
    with pytest.raises(ValueError, match="0 images and 80 texts"):
        retrieval(**{**given, "images": np.empty((0, 12)), "image_labels": np.empty(0, np.int64)})
    with pytest.raises(ValueError, match=r"directions \['sideways'\]; choose from"):
        retrieval(**given, directions=["sideways"])
    with pytest.raises(ValueError, match="directions"):
        retrieval(**given, directions=[])
    for ks in ([], [0], [1, 1]):
        with pytest.raises(ValueError, match="ks must be different whole numbers"):
            retrieval(**given, ks=ks)
    with pytest.raises(ValueError, match="candidate embeddings: 1 of 80 rows are all zero: rows 3"):
        retrieval(**{**given, "texts": given["texts"] * (np.arange(80) != 3)[:, None]})


def test_bad_input_to_composed_retrieval_is_one_line(searcher):
    queries = stored(searcher, [0, 1])
    for targets, references, message in (
        ([[10]], None, "2 queries, but targets for 1 and references for 2"),
        ([[10], [11]], [[12]], "targets for 2 and references for 1"),
        ([[10], [5, 4]], None, r"no target of query 1 is in the index \(sample ids \[4, 5\]\)"),
        ([[10], [11]], [[12], [11]], "query 1 has sample 11 as target and reference"),
    ):
        with pytest.raises(ValueError, match=message):
            composed_retrieval(queries, targets, searcher, references=references)
    with pytest.raises(ValueError, match="there are no queries"):
        composed_retrieval(queries[:0], [], searcher)


def test_the_registry_holds_documented_tasks_that_return_reports():
    assert sorted(TASKS) == ["composed_retrieval", "retrieval", "zero_shot"]
    for name, task in TASKS.items():
        assert task.__name__ == name
        assert inspect.getdoc(task)
        options = inspect.signature(task).parameters
        assert {"title", "protocol"} <= set(options)
