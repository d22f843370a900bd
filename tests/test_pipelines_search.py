"""From shards to hits: embed, index, search, evaluate and fuse, as commands, on tiny data."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from pairs_corpus import COLOURS, SHAPES, encoded, picture, tiny_model, tiny_pretrain, write_pairs
from PIL import Image, ImageDraw
from pyarrow import parquet

import align
from align.bundle import fingerprint, save
from align.fusion import FUSION_HEADS
from eval.search.searcher import Searcher
from pipelines import pretrain
from pipelines.cli import VERBS, main, parse
from pipelines.config import build
from pipelines.pictures import GridHit, draw_grid
from pipelines.queries import Query, QueryEncoder, Term
from pipelines.schemas import PretrainConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Shards by two hands, a model trained on the first for a moment, a table and an index."""
    root = tmp_path_factory.mktemp("world")
    write_pairs(root / "one")
    write_pairs(root / "two", hand="two")
    values = tiny_pretrain(
        root / "one",
        root / "run",
        samples=48 * 20,
        batch_size=48,
        save_every=10_000,
        log_every=20,
        optimizer={"learning_rate": 5e-3},
        augment={"enabled": False},
    )
    assert pretrain.run(build(PretrainConfig, values, origin="test")) == 0
    run("embed", f"{root}/run/bundle", f"{root}/two", f"{root}/table", "rows_per_part=20")
    run("index", f"{root}/table", f"{root}/index")
    (root / "query.png").write_bytes(encoded(picture("red", "cross", side=70)))
    return root


def run(verb: str, *arguments: str) -> None:
    from pkgutil import resolve_name

    assert resolve_name(VERBS[verb].run)(parse(verb, arguments)) in (0, None)


def refused(capsys, verb: str, *arguments: str) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([verb, *arguments])
    captured = capsys.readouterr()
    assert left.value.code == 2, captured.err
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err


def search(place: Path, out: Path, *arguments: str) -> None:
    run("search", *arguments, f"index={place}/index", f"out={out}")


# --- search ---


def hits_in(printed: str) -> list[tuple[float, str, str]]:
    """(score, caption, key) of each line."""
    found = []
    for line in printed.splitlines():
        number, _, rest = line.strip().partition("  ")
        if number.isdigit():
            score, _, name = rest.strip().partition("  ")
            caption, _, key = name.rpartition("  ")
            found.append((float(score), caption, key.strip("[]")))
    return found


@pytest.mark.parametrize("how", ["text", "image", "both"])
def test_search_prints_and_draws_what_the_model_says(how, place, tmp_path, capsys):
    arguments = {
        "text": ["red cross"],
        "image": [f"image={place}/query.png"],
        "both": ["blue instead of red", f"image={place}/query.png"],
    }[how]
    capsys.readouterr()
    search(place, tmp_path / "deep" / "hits.png", *arguments, "k=7")
    printed = capsys.readouterr().out
    hits = hits_in(printed)
    assert len(hits) == 7
    assert [score for score, _, _ in hits] == sorted((score for score, _, _ in hits), reverse=True)
    model = align.load(place / "run" / "bundle")
    text, image = model.encode_text([arguments[0]]), None
    if how != "text":
        image = model.encode_image([Image.open(place / "query.png")])
    query = {
        "text": text,
        "image": image,
        "both": None if image is None else torch.nn.functional.normalize(image + text, dim=-1),
    }[how]
    assert query is not None
    pictures = {
        f"two-{colour}-{shape}": picture(colour, shape, side=40)
        for colour in COLOURS
        for shape in SHAPES
    }
    scores = (model.encode_image([*pictures.values()]) @ query[0]).tolist()
    by_key = dict(zip(pictures, scores, strict=True))
    best = sorted(by_key.values(), reverse=True)[:7]
    for (score, caption, key), expected in zip(hits, best, strict=True):
        assert score == pytest.approx(expected, abs=2e-3), "the table holds half precision"
        assert by_key[key] == pytest.approx(score, abs=2e-3)
        assert caption == " ".join(key.split("-")[1:])
    with Image.open(tmp_path / "deep" / "hits.png") as drawn:
        assert drawn.format == "PNG"
        assert drawn.size == (6 * 148 + 20, 64 + 2 * (148 + 62) + 20)
    assert "(48 pictures in" in printed
    assert str(tmp_path / "deep" / "hits.png") in printed


def test_more_hits_than_there_are_is_all_of_them(place, tmp_path, capsys):
    capsys.readouterr()
    search(place, tmp_path / "hits.png", "dot", "k=500")
    assert len(hits_in(capsys.readouterr().out)) == 48


def test_a_turned_or_transparent_picture_searches_as_it_looks(place, tmp_path, capsys):
    upright = picture("red", "corner", side=60)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif.tobytes())
    clear = Image.new("RGBA", upright.size, (0, 0, 0, 0))
    mask = Image.eval(upright.convert("L"), lambda value: 0 if value > 250 else 255)
    clear.paste(upright, mask=mask)
    said = []
    for name, data in {"a": encoded(upright), "b": turned, "c": encoded(clear)}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
        capsys.readouterr()
        search(place, tmp_path / "hits.png", f"image={tmp_path}/{name}.png")
        said.append(hits_in(capsys.readouterr().out))
    assert said[0] == said[1] == said[2]


def test_hits_are_printed_also_where_the_shards_are_gone(place, tmp_path, capsys):
    index = tmp_path / "index"
    import shutil

    shutil.copytree(place / "index", index)
    card = json.loads((index / "index.json").read_text())
    card["sources"][0]["origin"]["data"] = "/gone"
    (index / "index.json").write_text(json.dumps(card))
    run("search", "dot", f"index={index}", f"out={tmp_path}/hits.png")
    printed = capsys.readouterr().out
    assert hits_in(printed)
    assert "captions instead of pictures: the shards are no longer at /gone" in printed
    assert printed.count("/gone") == 1, "one line says it for all of them"
    with Image.open(tmp_path / "hits.png") as drawn:
        tile = drawn.crop((20, 64, 148, 192))
    assert len(set(tile.getdata())) > 2, "the caption stands where the picture was"


def test_what_is_no_picture_is_told(place, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes((place / "query.png").read_bytes()[:100])
    for name, says in {
        "nowhere.png": "image: there is no file",
        "words.txt": "cannot be read as a picture (undecodable: not a picture of a known format)",
        "cut.png": "cannot be read as a picture",
        ".": "image: ",
    }.items():
        line = refused(capsys, "search", f"image={tmp_path / name}", f"index={place}/index")
        assert says in line
        assert str(tmp_path / name) in line


@pytest.mark.parametrize("kind", ["missing", "empty", "shards", "table", "file"])
def test_what_is_no_index_is_told(kind, place, tmp_path, capsys):
    folder = {
        "missing": tmp_path / "nowhere",
        "empty": tmp_path,
        "shards": place / "two",
        "table": place / "table",
        "file": place / "query.png",
    }[kind]
    assert str(folder) in refused(capsys, "search", "dot", f"index={folder}")


def test_a_model_that_did_not_make_the_index_is_told(place, tmp_path, capsys):
    save(tiny_model(), tmp_path / "other")
    line = refused(capsys, "search", "dot", f"index={place}/index", f"model={tmp_path}/other")
    assert "not the model that" in line
    assert str(tmp_path / "other") in line


def test_no_model_is_told(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path), str(tmp_path / "nowhere"), "someone/model"):
        line = refused(capsys, "search", "dot", f"index={place}/index", f"model={name}")
        assert name in line


@pytest.mark.parametrize("count", [0, 1, 6, 7, 13])
def test_a_grid_has_a_row_for_every_six_hits(count):
    hits = [
        GridHit(picture("red", "dot", side=20 + 40 * (n % 5)), "a name " * n, 0.5)
        for n in range(count)
    ]
    sheet = draw_grid("what was asked " * 20, hits)
    rows = -(-count // 6)
    assert sheet.size == (6 * 148 + 20, 64 + rows * (148 + 62) + 20)
    narrow = draw_grid("x", hits, columns=2)
    assert narrow.width == 2 * 148 + 20


def test_a_grid_shows_each_picture_whole_in_its_place():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    hits = [
        GridHit(Image.new("RGB", size, colour), "", 0.0)
        for size, colour in zip([(10, 10), (500, 500), (300, 100)], colours, strict=True)
    ]
    sheet = draw_grid("", hits, columns=3)
    for place_, colour in enumerate(colours):
        assert sheet.getpixel((20 + place_ * 148 + 64, 64 + 64)) == colour
    assert sheet.getpixel((20 + 2 * 148 + 64, 64 + 10)) == (255, 255, 255), "proportions are kept"
    assert isinstance(ImageDraw.Draw(sheet), ImageDraw.ImageDraw)


# --- embed and index ---


def test_the_table_holds_what_the_model_says(place):
    model = align.load(place / "run" / "bundle")
    searcher = Searcher(place / "index")
    rows = searcher.metadata(searcher.ids)
    assert [row["key"] for row in rows] != sorted(row["key"] for row in rows), "in stream order"
    assert {row["caption"] for row in rows} == {f"{c} {s}" for c in COLOURS for s in SHAPES}
    vectors = model.encode_text([row["caption"] for row in rows]).numpy()
    saved = np.concatenate(
        [np.load(path) for path in sorted((place / "table" / "text_emb").glob("*.npy"))]
    )
    assert np.abs(saved.astype(np.float32) - vectors).max() < 2e-3
    assert searcher.card.fingerprints["model"] == fingerprint(place / "run" / "bundle")


def test_embedding_and_indexing_again_changes_nothing(place):
    before = {p: p.read_bytes() for p in (place / "table").rglob("*") if p.is_file()}
    run("embed", f"{place}/run/bundle", f"{place}/two", f"{place}/table", "rows_per_part=20")
    assert {p: p.read_bytes() for p in (place / "table").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["embed", "{place}/nowhere", "{place}/two", "{tmp}/t"], "{place}/nowhere"),
        (["embed", "{place}/run/bundle", "{place}/nowhere", "{tmp}/t"], "{place}/nowhere"),
        (["embed", "{place}/run/bundle", "{place}/one", "{place}/table"], "{place}/table"),
        (["index", "{place}/two", "{tmp}/i"], "{place}/two"),
        (["index", "{place}/table", "{tmp}/i", "factory=Nonsense"], "Nonsense"),
        (["index", "{place}/table", "{place}/one"], "{place}/one"),
    ],
    ids=lambda one: "-".join(one[:1]) if isinstance(one, list) else "",
)
def test_mistakes_of_embed_and_index_are_one_line(arguments, says, place, tmp_path, capsys):
    given = [one.format(place=place, tmp=tmp_path) for one in arguments]
    assert says.format(place=place) in refused(capsys, *given)


# --- evaluate ---


def evaluation(place: Path, folder: Path, **tasks: dict[str, Any]) -> Path:
    path = folder / "evaluate.yaml"
    values = {"model": f"{place}/run/bundle", "tasks": tasks, "out": str(folder / "out")}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_evaluate_prints_and_keeps_figures_with_intervals(place, tmp_path, capsys):
    path = evaluation(
        place,
        tmp_path,
        pairs={"task": "retrieval", "data": f"{place}/one"},
        colours={"task": "zero_shot", "data": f"{place}/one", "label": "colour",
                 "templates": ["{}", "a {} dot"]},
        dots={"task": "zero_shot", "data": f"{place}/two", "where": {"shape": ["dot", "ring"]}},
    )  # fmt: skip
    run("evaluate", str(path))
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["fingerprint"] == fingerprint(place / "run" / "bundle")
    assert [report["title"] for report in results["reports"]] == ["pairs", "colours", "dots"]
    for report in results["reports"]:
        assert report["title"] in printed
        for figure in report["figures"]:
            assert figure["low"] <= figure["value"] <= figure["high"]
    pairs, colours, dots = results["reports"]
    assert (pairs["protocol"]["images"], colours["protocol"]["classes"]) == (48, len(COLOURS))
    assert dots["protocol"]["images"] == 12
    value = {figure["name"]: figure["value"] for figure in pairs["figures"]}
    model = align.load(place / "run" / "bundle")
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    images = model.encode_image([picture(*name.split()) for name in names])
    right = (images @ model.encode_text(names).T).argmax(dim=1) == torch.arange(48)
    assert value["image_to_text_recall@1"] == pytest.approx(right.float().mean().item())
    assert value["image_to_text_recall@1"] > 5 / 48, "five times chance: it has learned something"


def test_the_shards_alone_are_evaluated_by_retrieval(place, capsys):
    run("evaluate", f"{place}/run/bundle", f"{place}/two")
    assert "recall@1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"task": "zero_shot", "label": "kolor"}, "no field 'kolor'; it has caption, colour"),
        ({"task": "retrieval", "where": {"colour": "mauve"}}, "leaves no sample"),
        ({"task": "retrieval", "data": "/nowhere"}, "/nowhere"),
    ],
    ids=["label", "where", "data"],
)
def test_mistaken_tasks_are_one_line(task, says, place, tmp_path, capsys):
    path = evaluation(place, tmp_path, one={"data": f"{place}/one", **task})
    assert says in refused(capsys, "evaluate", str(path))


# --- fuse ---


def pairs_file(path: Path, hand: str, shapes: tuple[str, ...], **changes: Any) -> Path:
    rows = [
        {
            "reference": f"{hand}-{old}-{shape}",
            "target": f"{hand}-{new}-{shape}",
            "change": f"{new} instead of {old}",
            "kind": "colour",
            "base": shape,
            **changes,
        }
        for shape in shapes
        for old in COLOURS
        for new in COLOURS
        if old != new
    ]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def fuse_values(place, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pairs")
    return {
        "model": f"{place}/run/bundle",
        "data": f"{place}/one",
        "pairs": str(pairs_file(folder / "train.parquet", "one", SHAPES[:5])),
        "test_data": f"{place}/two",
        "index": f"{place}/index",
        "test_pairs": str(pairs_file(folder / "test.parquet", "two", SHAPES[5:])),
        "steps": 15,
        "batch_size": 32,
    }


@pytest.mark.slow
def test_fuse_compares_every_head_on_the_same_queries(place, fuse_values, tmp_path, capsys):
    path = tmp_path / "fuse.yaml"
    path.write_text(yaml.safe_dump({**fuse_values, "out": str(tmp_path / "out")}))
    run("fuse", str(path))
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    titles = [report["title"] for report in results["reports"]]
    assert titles == ["image only", "text only", "sum", *FUSION_HEADS]
    assert results["best"] in FUSION_HEADS
    for report in results["reports"]:
        assert report["protocol"]["queries"] == 3 * 30
        assert report["title"] in printed
        for figure in report["figures"]:
            assert figure["low"] <= figure["value"] <= figure["high"]
    first = (tmp_path / "out" / "results.json").read_text()
    run("fuse", str(path))
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["reports"] == json.loads(first)["reports"], "a function of the configuration"

    head = tmp_path / "out" / "heads" / "intermediate"
    capsys.readouterr()
    search(place, tmp_path / "a.png", "blue instead of red", f"image={place}/query.png")
    plain = hits_in(capsys.readouterr().out)
    search(
        place, tmp_path / "b.png", "blue instead of red", f"image={place}/query.png", f"head={head}"
    )
    assert hits_in(capsys.readouterr().out) != plain
    with Image.open(io.BytesIO((place / "query.png").read_bytes())) as query:
        from align.fusion.store import load_head

        encoder = QueryEncoder(
            align.load(place / "run" / "bundle"),
            {"it": load_head(head, towers=fingerprint(place / "run" / "bundle"))},
        )
        vectors = encoder.vectors([Query((Term(query), Term("blue instead of red")), "it")])
    assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5)
    save(tiny_model(), tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on other towers"):
        load_head(head, towers=fingerprint(tmp_path / "other"))


def test_a_head_that_is_none_is_told(place, tmp_path, capsys):
    arguments = ["dot", f"image={place}/query.png", f"index={place}/index"]
    line = refused(capsys, "search", *arguments, f"head={tmp_path}")
    assert f"{tmp_path} is no fusion head" in line
    line = refused(capsys, "search", *arguments, "head=intermediat")
    assert "head: 'intermediat' is no folder of a fusion head" in line
    assert f"nor one of the heads of {place}/run/bundle (known: none there" in line


def without_base(path: str, folder: Path) -> Path:
    table = parquet.read_table(path).drop_columns(["base"])
    parquet.write_table(table, folder / "no-base.parquet")
    return folder / "no-base.parquet"


def mistaken(mistake: str, values: dict[str, Any], tmp: Path) -> dict[str, Any]:
    """What to change of the values to make a mistake."""
    match mistake:
        case "a missing file":
            return {"pairs": str(tmp / "nowhere.parquet")}
        case "no Parquet":
            return {"pairs": f"{values['data']}/manifest.json"}
        case "a missing column":
            return {"pairs": str(without_base(values["pairs"], tmp))}
        case "no query":
            table = parquet.read_table(values["pairs"]).slice(0, 0)
            parquet.write_table(table, tmp / "empty.parquet")
            return {"pairs": str(tmp / "empty.parquet")}
        case "shared bases":
            return {"test_pairs": values["pairs"]}
        case "an unknown key":
            return {"pairs": str(pairs_file(tmp / "k.parquet", "three", SHAPES[:2]))}
        case "another index":
            return {"test_data": values["data"]}
    return {"heads": {"a": {"name": "early", "options": {"no_such": 1}}}}


SAYS = {
    "a missing file": "pairs: there is no file",
    "no Parquet": "is not a Parquet file",
    "a missing column": "has no column 'base'; it has reference, target, change, kind",
    "no query": "holds no query",
    "shared bases": "shares the base 'bar'",
    "an unknown key": "names 'three-red-circle', which the data does not hold",
    "another index": "was not made from",
    "an unknown option": "heads: early does not take these options",
}


@pytest.mark.parametrize("mistake", SAYS)
def test_mistakes_of_fuse_are_one_line(mistake, fuse_values, tmp_path, capsys):
    values = {**fuse_values, "out": str(tmp_path / "out")}
    values |= mistaken(mistake, values, tmp_path)
    path = tmp_path / "fuse.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert SAYS[mistake] in refused(capsys, "fuse", str(path))
    assert not (tmp_path / "out" / "results.json").exists()


# --- pack ---


def test_pack_a_folder_and_a_table_and_say_what_was_left_out(tmp_path, capsys):
    source = tmp_path / "pictures"
    source.mkdir()
    for number, colour in enumerate(COLOURS):
        (source / f"{number}.png").write_bytes(encoded(picture(colour, "dot")))
        (source / f"{number}.txt").write_text(f"{colour} dot")
    (source / "bad.png").write_bytes(b"no picture")
    (source / "bad.txt").write_text("bad")
    run("pack", str(source), str(tmp_path / "shards"), "samples_per_shard=4")
    printed = capsys.readouterr().out
    assert "left out: " in printed
    assert "bad" in printed
    assert f"{tmp_path}/shards: 6 samples in 2 shards" in printed

    rows = [{"png": encoded(picture(c, "dot")), "text": f"{c} dot", "kind": c} for c in COLOURS]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    run("pack", f"{tmp_path}/t.parquet", f"{tmp_path}/table", "image=png", "caption=text",
        "where.kind=[red, blue]", "key=a-{kind}")  # fmt: skip
    assert "2 samples in 1 shard" in capsys.readouterr().out


def test_mistakes_of_pack_are_one_line_and_leave_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    rows = [{"image": encoded(picture("red", "dot")), "caption": "red dot"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for arguments, says in {
        (f"{tmp_path}/nowhere", f"{tmp_path}/out"): "nowhere",
        (f"{tmp_path}/empty", f"{tmp_path}/out"): "holds no picture",
        (f"{tmp_path}/t.parquet", f"{tmp_path}/out", "caption=text"): "has no column 'text'",
        (f"{tmp_path}/t.parquet", f"{tmp_path}/out", "where.caption=blue"): "leaves no row",
    }.items():
        assert says in refused(capsys, "pack", *arguments)
        assert not (tmp_path / "out").exists()


def test_one_caption_under_two_labels_is_two_candidates(tmp_path):
    """Two dogs, two ids, one caption: each picture has its own right answer, and they tie."""
    from dataclasses import replace

    from pipelines.evaluate import retrieval_report
    from pipelines.pairs import EmbeddedPairs

    pairs = EmbeddedPairs(
        images=np.eye(3, dtype=np.float32),
        texts=np.eye(3, dtype=np.float32)[[0, 0, 2]],
        captions=["a dog", "a dog", "a cat"],
        fields=[{"id": "1"}, {"id": "2"}, {"id": "3"}],
        ids=np.arange(3),
        keys=["a", "b", "c"],
        fingerprint="none",
        bad=0,
    )
    report = retrieval_report(pairs, label="id")
    assert (report.protocol["images"], report.protocol["texts"]) == (3, 3)
    same = replace(pairs, fields=[{"id": "1"}, {"id": "1"}, {"id": "3"}])
    assert retrieval_report(same, label="id").protocol["texts"] == 2


@pytest.mark.parametrize("verb", ["embed", "index"])
def test_two_writers_of_one_folder_are_refused(place, tmp_path, capsys, verb):
    from pipelines import run_folder

    out = tmp_path / "out"
    sources = {"embed": [f"{place}/run/bundle", f"{place}/two"], "index": [f"{place}/table"]}
    with run_folder.locked_beside(out):
        assert "another run is at work here" in refused(capsys, verb, *sources[verb], str(out))
    assert not out.exists()
