"""From shards to hits: embed, index, search, evaluate and fuse, as commands, on tiny data."""

import io
import json
import shutil
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
from eval.index.change import remove
from eval.search.searcher import Searcher
from pipelines import pretrain
from pipelines.cli import VERBS, main, parse
from pipelines.config import ConfigError, build
from pipelines.pictures import (
    GridHit,
    IndexPictures,
    PicturesGoneError,
    draw_grid,
    open_picture,
    read_picture,
)
from pipelines.queries import Query, QueryEncoder, Term
from pipelines.schemas import PretrainConfig
from shards.manifest import Manifest


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
    assert printed.count("captions instead") == 1, "one line says it for all of them"
    with Image.open(tmp_path / "hits.png") as drawn:
        tile = drawn.crop((20, 64, 148, 192))
    assert len(tile.getcolors() or []) > 2, "the caption stands where the picture was"


def test_what_is_no_picture_is_told(place, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes((place / "query.png").read_bytes()[:100])
    for name, says in {
        "nowhere.png": "image: there is no file",
        "words.txt": "not a picture of a known format); known formats: WEBP, JPEG",
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


def test_words_are_cut_between_words_and_never_overlap():
    hits = [
        GridHit(Image.new("RGB", (9, 9), "white"), caption, 0.0)
        for caption in ("word " * 4000, "w" * 90_000, "", "\udc80 \n\t x", "наука 日本")
    ]
    sheet = draw_grid("a title " * 300, hits, columns=5)
    for column in range(1, 5):
        gap = sheet.crop((20 + column * 148 - 18, 64 + 130, 20 + column * 148 - 2, sheet.height))
        assert gap.getextrema() == ((255, 255),) * 3, "nothing between the cells"
    assert sheet.crop((sheet.width - 18, 0, *sheet.size)).getextrema() == ((255, 255),) * 3
    thin = draw_grid("", [GridHit(Image.new("L", (3000, 1), 9), "", 0.0, 3)])
    assert thin.getpixel((84, 127)) == (9, 9, 9)


@pytest.mark.parametrize(("count", "columns"), [(36, 6), (37, 8), (97, 12)])
def test_many_hits_are_drawn_wider(count, columns):
    hits = [GridHit(None, "x", 0.0)] * count
    assert draw_grid("", hits).width == columns * 148 + 20


# --- what a query can say ---


def found(place: Path, capsys, *arguments: str) -> dict[str, Any]:
    """What `format=json` prints."""
    capsys.readouterr()
    run("search", *arguments, f"index={place}/index", "format=json")
    return json.loads(capsys.readouterr().out)


def vectors_of(place: Path, *values: Any) -> np.ndarray:
    model = align.load(place / "run" / "bundle")
    rows = [
        model.encode_text([one]) if isinstance(one, str) else model.encode_image([one])
        for one in values
    ]
    return torch.cat(rows).numpy()


def nearest(place: Path, vector: np.ndarray, k: int, *, without: tuple[int, ...] = ()) -> list[int]:
    """Ids by exact search in the stored rows."""
    searcher = Searcher(place / "index")
    scores = searcher.rows.vectors(np.arange(len(searcher.ids))) @ vector
    scores[np.isin(searcher.ids, without)] = -2
    return searcher.ids[np.argsort(-scores, kind="stable")[:k]].tolist()


def ids_of(answer: dict[str, Any]) -> list[int]:
    return [hit["id"] for hit in answer["hits"]]


def test_terms_are_added_and_subtracted(place, capsys):
    image = Image.open(place / "query.png").convert("RGB")
    red, cross, dot, pic = vectors_of(place, "red", "cross", "dot", image)
    answer = found(place, capsys, "red", "minus=[cross, dot]", "k=5")
    assert ids_of(answer) == nearest(place, red - cross - dot, 5)
    assert answer["query"] == {"text": "red", "minus": ["cross", "dot"], "k": 5}
    parts = f"{{image: {place}/query.png, weight: 0.5}}, {{text: cross, weight: -2}}"
    answer = found(place, capsys, f"terms=[{{text: red}}, {parts}]", "k=5")
    assert ids_of(answer) == nearest(place, red + 0.5 * pic - 2 * cross, 5)
    two = f"image=[{place}/query.png, {place}/query.png]"
    assert ids_of(found(place, capsys, "dot", two)) == nearest(place, 2 * pic + dot, 12)


def test_the_balance_leads_from_the_picture_to_the_words(place, capsys):
    image = Image.open(place / "query.png").convert("RGB")
    words, pic = vectors_of(place, "blue dot", image)
    both = ["blue dot", f"image={place}/query.png", "k=6"]
    for balance in (0, 0.25, 0.5, 1):
        answer = found(place, capsys, *both, f"balance={balance}")
        assert ids_of(answer) == nearest(place, (1 - balance) * pic + balance * words, 6)
    assert ids_of(found(place, capsys, *both)) == nearest(place, pic + words, 6)
    for number in (0, 1):
        alone = found(place, capsys, both[1 - number], "k=6")
        same = found(place, capsys, *both, f"balance={number}")
        assert [hit["score"] for hit in same["hits"]] == [hit["score"] for hit in alone["hits"]]


def test_rows_like_a_row_need_no_model_and_are_not_found_themselves(place, capsys, monkeypatch):
    from pipelines import search as verb

    monkeypatch.setattr(verb, "open_model", lambda place: pytest.fail(f"{place} was loaded"))
    rows = Searcher(place / "index").rows
    first, second = rows.vectors(np.array([7, 9]))
    assert ids_of(found(place, capsys, "like=7", "k=4")) == nearest(place, first, 4, without=(7,))
    answer = found(place, capsys, "like=[7, 9]", "terms=[{id: 3, weight: -0.5}]", "k=40")
    third = rows.vectors(np.array([3]))[0]
    expected = nearest(place, first + second - 0.5 * third, 40, without=(7, 9))
    assert ids_of(answer) == expected


def test_a_removed_row_can_be_asked_for_no_more(place, tmp_path, capsys):
    shutil.copytree(place / "index", tmp_path / "index")
    remove(tmp_path / "index", [7])
    for asked in ("like=7", "terms=[{id: 7}]", "terms=[{text: red}, {id: 7, weight: -0.5}]"):
        line = refused(capsys, "search", f"index={tmp_path / 'index'}", asked)
        assert "like: the index holds no row with id 7" in line
    answer = found(tmp_path, capsys, "like=8", "k=470")
    assert len(ids_of(answer)) == answer["matching"] - 1
    assert 7 not in ids_of(answer)


def test_filters_leave_what_they_say_and_a_short_list_says_why(place, tmp_path, capsys):
    answer = found(place, capsys, "dot", "where=colour = 'red' AND shape <> 'dot'", "k=20")
    assert {hit["fields"]["colour"] for hit in answer["hits"]} == {"red"}
    assert (answer["matching"], len(answer["hits"])) == (7, 7)
    assert answer["plan"]
    wide = found(place, capsys, "dot", "fields.colour=[red, blue]", "fields.shape=dot")
    assert sorted(hit["key"] for hit in wide["hits"]) == ["two-blue-dot", "two-red-dot"]
    hit = wide["hits"][0]
    assert list(hit) == ["id", "score", "key", "caption", "shard", "copies", "fields"]
    assert hit["fields"] == {"colour": hit["key"].split("-")[1], "hand": "two", "shape": "dot"}
    capsys.readouterr()
    search(place, tmp_path / "a.png", "dot", "where=colour = 'red'", "k=20")
    assert "8 hits instead of 20: 8 rows match the filter" in capsys.readouterr().out
    search(place, tmp_path / "a.png", "dot", "k=50")
    assert "48 hits instead of 50: 48 rows can be found" in capsys.readouterr().out
    search(place, tmp_path / "a.png", "dot", "k=5", "min_score=0.999")
    assert "0 hits instead of 5: 48 rows can be found; fewer remain by min_score=0.999" in (
        capsys.readouterr().out
    )


def test_pages_of_hits_follow_each_other(place, capsys):
    whole = ids_of(found(place, capsys, "red ring", "k=10"))
    assert ids_of(found(place, capsys, "red ring", "k=4", "offset=6")) == whole[6:]


def test_a_fusion_head_is_found_by_its_name_in_the_bundle(place, tmp_path, capsys):
    import shutil

    bundle, folder = tmp_path / "bundle", tmp_path / "own"
    shutil.copytree(place / "run" / "bundle", bundle)
    model = align.load(bundle)
    for where in (bundle / "heads" / "mine", folder):
        head = early_head(model, where, fingerprint(bundle))
    both = ["blue", f"image={place}/query.png", f"model={bundle}", "k=8"]
    with Image.open(place / "query.png") as image:
        encoder = QueryEncoder(model, {"mine": head})
        row = encoder.vectors([Query((Term(image.convert("RGB")), Term("blue")), "mine")])[0]
    by_name = found(place, capsys, *both, "head=mine")
    assert ids_of(by_name) == nearest(place, row, 8)
    assert ids_of(found(place, capsys, *both, f"head={folder}")) == ids_of(by_name)
    assert ids_of(found(place, capsys, *both)) != ids_of(by_name)
    line = refused(capsys, "search", *both, "head=nine", f"index={place}/index")
    assert f"head: 'nine' is no folder of a fusion head, nor one of the heads of {bundle}" in line
    assert "(known: mine)" in line
    line = refused(capsys, "search", "blue", f"model={bundle}", "head=mine",
                   f"index={place}/index")  # fmt: skip
    assert "head: a fusion head takes exactly one picture and one text" in line
    description = json.loads((bundle / "heads" / "mine" / "head.json").read_text())
    description["name"] = "some.package:Head"
    (bundle / "heads" / "mine" / "head.json").write_text(json.dumps(description))
    line = refused(capsys, "search", *both, "head=mine", f"index={place}/index")
    assert "head: 'mine' is no folder of a fusion head" in line, "a bundle runs no code of others"


def early_head(model: Any, folder: Path, towers: str) -> Any:
    """A head that is not the mean of both, saved in a folder."""
    from align.fusion import fusion_head
    from align.fusion.store import save_head

    torch.manual_seed(1)
    widths = {"image_width": model.image.token_width, "text_width": model.text.token_width}
    head = fusion_head("early")(dim=model.config.dim, **widths)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_head(head, folder, name="early", options={}, towers=towers)
    return head.eval()


def test_fused_rows_are_asked_through_the_head_that_fused_them(place, tmp_path, capsys):
    import shutil

    bundle, folder, index = place / "run" / "bundle", tmp_path / "head", tmp_path / "index"
    model = align.load(bundle)
    head = early_head(model, folder, fingerprint(bundle))
    run("embed", str(bundle), f"{place}/two", f"{tmp_path}/table", "rows=fused", f"head={folder}")
    run("index", f"{tmp_path}/table", str(index), "modality=fused", "factory=Flat")
    both = ["red cross", f"image={place}/query.png", f"index={index}", "k=8", "format=json"]
    with Image.open(place / "query.png") as image:
        encoder = QueryEncoder(model, {"it": head})
        row = encoder.vectors([Query((Term(image.convert("RGB")), Term("red cross")), "it")])[0]
    capsys.readouterr()
    run("search", *both)
    answer = json.loads(capsys.readouterr().out)
    rows = Searcher(index).rows
    scores = rows.vectors(np.arange(48)) @ row
    assert ids_of(answer) == rows.ids[np.argsort(-scores)[:8]].tolist()
    assert answer["hits"][0]["score"] == pytest.approx(scores.max(), abs=2e-5)
    early_head(model, folder, fingerprint(bundle))
    (folder / "head.json").write_text((folder / "head.json").read_text() + "\n")
    assert f"{folder} is not the head that {index} was made with" in refused(
        capsys, "search", *both
    )
    shutil.rmtree(folder)
    assert "which is no longer there" in refused(capsys, "search", *both)


def test_an_index_that_does_not_say_its_model_takes_the_one_that_is_named(
    place, tmp_path, capsys
):  # fmt: skip
    import shutil

    index = tmp_path / "index"
    shutil.copytree(place / "index", index)
    card = json.loads((index / "index.json").read_text())
    card["fingerprints"]["model"] = ""
    del card["sources"][0]["origin"]["model"]
    (index / "index.json").write_text(json.dumps(card))
    line = refused(capsys, "search", "dot", f"index={index}")
    assert f"model: {index} does not say which model it was made with; name it" in line
    run("search", "dot", f"index={index}", f"model={place}/run/bundle", "format=json")
    assert len(ids_of(json.loads(capsys.readouterr().out))) == 12
    assert len(ids_of(found(place, capsys, "like=3", "k=4"))) == 4
    from dataclasses import replace

    other = tiny_model()
    wide = type(other)(replace(other.config, dim=24), other.tokenizer)
    save(wide, tmp_path / "wide")
    line = refused(capsys, "search", "dot", f"index={index}", f"model={tmp_path}/wide")
    assert "gives vectors of 24, but" in line
    assert "holds vectors of 16: it was made with another model" in line


def test_numbers_that_json_does_not_know_are_null(place, capsys):
    from pipelines.answers import Answer, as_json_text, hit_of
    from pipelines.query_files import Asked
    from pipelines.schemas.search import QueryConfig

    nothing = float("nan")
    hit = hit_of({"id": 3, "size": nothing, "sizes": [1.0, -nothing], "x": {"y": nothing}}, 0.5, 2)
    answer = Answer(Asked(QueryConfig(text="x")), [hit], 9, "exact")
    (text,) = as_json_text([answer], is_one=True)
    assert "NaN" not in text
    fields = json.loads(text)["hits"][0]["fields"]
    assert fields == {"size": None, "sizes": [1.0, None], "x": {"y": None}}


# --- many queries, and what comes out ---


def test_a_file_of_queries_is_answered_as_each_alone(place, tmp_path, capsys):
    picture_file = tmp_path / "q.png"
    picture_file.write_bytes((place / "query.png").read_bytes())
    asked: list[tuple[dict[str, Any], list[str]]] = [
        ({"text": "red cross"}, ["red cross"]),
        ({"image": "q.png", "text": "blue", "balance": 0.2},
         [f"image={picture_file}", "blue", "balance=0.2"]),
        ({"text": "dot", "minus": "red", "k": 2}, ["dot", "minus=red", "k=2"]),
        ({"like": 4, "where": "colour = 'red'"}, ["like=4", "where=colour = 'red'"]),
        ({"terms": [{"image": "q.png", "weight": 0.5}, {"text": "ring"}]},
         [f"terms=[{{image: {picture_file}, weight: 0.5}}, {{text: ring}}]"]),
    ]  # fmt: skip
    lines = "\n\n".join(json.dumps(one) for one, _ in asked)
    (tmp_path / "q.jsonl").write_text(lines)
    alone = [found(place, capsys, "k=3", *arguments) for _, arguments in asked]
    for size in (1, 2, 256):
        run("search", f"queries={tmp_path}/q.jsonl", "k=3", f"batch_size={size}",
            f"index={place}/index", f"out={tmp_path}/deep/a.jsonl")  # fmt: skip
        text = (tmp_path / "deep" / "a.jsonl").read_text()
        answers = [json.loads(line) for line in text.splitlines()]
        assert [ids_of(one) for one in answers] == [ids_of(one) for one in alone]
        for one, other in zip(answers, alone, strict=True):
            scores = [hit["score"] for hit in other["hits"]]
            assert [hit["score"] for hit in one["hits"]] == pytest.approx(scores, abs=2e-6)
    assert [len(one["hits"]) for one in answers] == [3, 3, 2, 3, 3]


def test_every_kind_of_file_says_the_same(place, tmp_path, capsys):
    texts = ["red cross", 'a, "blue" ring', "точка"]
    (tmp_path / "q.txt").write_text("\ufeff" + "\r\n\n".join(texts), encoding="utf-8")
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(one) for one in texts))
    table = pa.table({"text": texts, "k": [4, None, None], "image": pa.nulls(3, pa.string())})
    parquet.write_table(table, tmp_path / "q.parquet")
    import csv

    with (tmp_path / "q.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "text"], *(["", text] for text in texts)])
    lists = {}
    for suffix in ("txt", "jsonl", "parquet", "csv"):
        run("search", f"queries={tmp_path}/q.{suffix}", f"index={place}/index", "k=4",
            "format=json", f"out={tmp_path}/out.txt")  # fmt: skip
        answers = json.loads((tmp_path / "out.txt").read_text())
        assert [one["query"]["text"] for one in answers] == texts
        lists[suffix] = [ids_of(one) for one in answers]
    assert lists["txt"] == lists["jsonl"] == lists["parquet"] == lists["csv"]
    assert not list(tmp_path.glob(".writing*"))


def test_hits_come_as_a_table_csv_and_pictures(place, tmp_path, capsys):
    import csv

    (tmp_path / "q.txt").write_text("red cross\nblue ring\n")
    many = [f"queries={tmp_path}/q.txt", f"index={place}/index", "k=3"]
    capsys.readouterr()
    run("search", *many)
    printed = capsys.readouterr().out
    assert len(hits_in(printed)) == 6
    assert "picture:" not in printed, "a picture of several is drawn where it was asked for"
    run("search", *many, "format=csv", "offset=1")
    rows = [*csv.DictReader(capsys.readouterr().out.splitlines())]
    assert [(row["query"], row["rank"]) for row in rows] == [
        (str(query), str(rank)) for query in (0, 1) for rank in (2, 3, 4)
    ]
    assert [row["caption"] for row in rows][:2] == [hit[1] for hit in hits_in(printed)[1:3]]
    assert json.loads(rows[0]["fields"])["hand"] == "two"
    run("search", *many, "format=picture", f"out={tmp_path}/p.webp")
    with Image.open(tmp_path / "p.webp") as drawn:
        assert drawn.size == (6 * 148 + 20, 2 * (64 + 148 + 62 + 20))
    (tmp_path / "q.txt").write_text("red cross\n" * 11)
    line = refused(capsys, "search", *many[:2], "k=48", "format=picture")
    assert "a picture shows 480 hits at most" in line


MISTAKES: dict[str, tuple[list[str], str]] = {
    "sql": (["dot", "where=kolour = 'red'"], "columns: id, key, caption, shard, colour, hand"),
    "empty": (["  "], "a text to look for is empty"),
    "cancelled": (["red", "minus=red"], "cancel each other out"),
    "balance": (["red", "balance=0.5"], "balance: lies between pictures and words"),
    "row": (["like=480"], "like: the index holds no row with id 480"),
    "file": (["queries={tmp}/none.txt"], "queries: there is no file or folder"),
    "no queries": (["queries={tmp}/empty.txt"], "empty.txt: holds no query"),
    "bytes": (["queries={tmp}/bytes.txt"], "bytes.txt: is not UTF-8"),
    "line": (["queries={tmp}/bad.jsonl"], "bad.jsonl line 2: is not JSON"),
    "cancelled in a file": (["queries={tmp}/cancelled.jsonl"], "cancelled.jsonl line 3: the terms"),
    "column": (["queries={tmp}/column.csv"], "unknown column 'wehre'; leave it out or rename it"),
    "no column": (["queries={tmp}/none.csv"], "has no column text or image; it has caption"),
    "no parquet": (["queries={tmp}/no.parquet"], "no.parquet: cannot be read as parquet"),
    "gone picture": (["queries={tmp}/gone.jsonl"], "gone.jsonl line 1: image: there is no file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistaken_queries_are_one_line(mistake, place, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.jsonl").write_text('"red"\n{"text": \n')
    (tmp_path / "cancelled.jsonl").write_text(
        '"red"\n\n{"text": "red", "minus": "red"}\n"blue"\n{"like": 1}'
    )
    (tmp_path / "column.csv").write_text("text,wehre\nred,1\n")
    (tmp_path / "none.csv").write_text("caption\nred\n")
    (tmp_path / "no.parquet").write_text("text")
    (tmp_path / "gone.jsonl").write_text('{"image": "gone.png"}')
    given, says = MISTAKES[mistake]
    arguments = [one.format(tmp=tmp_path) for one in given]
    assert says in refused(
        capsys, "search", *arguments, f"index={place}/index", f"out={tmp_path}/hits.jsonl"
    )
    assert not (tmp_path / "hits.jsonl").exists()
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["red", "k=0"], "k: input should be greater than 0"),
        (["red", "balance=1.5"], "balance: input should be less than or equal to 1"),
        (["red", "out=hits.gif"], "hits.gif is no picture file"),
        (["red", "format=picture", "out=hits.json"], "hits.json is no picture file"),
        (["red", "queries=a.txt"], "text: each of the queries has its own"),
        (["queries=a.xls"], "known: .txt, .jsonl, .csv, .parquet"),
        (["terms=[{text: a, id: 3}]"], "terms.0: a term has one of text, image and id"),
        (["terms=[{text: a, weight: .nan}]"], "weight: input should be a finite number"),
        (["collapse=2", "red"], "collapse: input should be less than or equal to 1"),
        ([], "give a text to look for"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_opened(arguments, says):
    with pytest.raises(ConfigError) as caught:
        parse("search", arguments)
    assert says in str(caught.value)


# --- pictures ---


def test_pictures_of_every_kind_are_read_and_others_told(tmp_path):
    upright = picture("red", "corner", side=60)
    exact = np.asarray(upright)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [upright, picture("blue", "dot", side=60)]
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    deep = Image.fromarray(np.asarray(upright.convert("L")).astype(np.uint16) * 257)
    kinds = {
        "turned": (encoded(turned, "PNG", exif=exif.tobytes()), exact),
        "animated": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:],
                             lossless=True), exact),
        "sixteen bits": (encoded(deep), np.asarray(upright.convert("L").convert("RGB"))),
        "palette": (encoded(upright.quantize(colors=8)), exact),
        "cmyk": (encoded(upright.convert("CMYK"), "JPEG", quality=100), exact),
    }  # fmt: skip
    for name, (data, expected) in kinds.items():
        read = read_picture(data, name)
        assert read.mode == "RGB"
        off = np.abs(np.asarray(read).astype(int) - expected)
        assert np.median(off) == 0, name
        assert off.mean() < (6 if name == "cmyk" else 0.01), name
    bomb = bytearray(encoded(Image.new("1", (1, 1))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    for data in (bytes(bomb), b"", b"GIF89a", encoded(upright, "TIFF"), encoded(upright)[:90]):
        with pytest.raises(ConfigError, match="it cannot be read as a picture") as caught:
            read_picture(data, "it")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="image: there is no file"):
        open_picture(tmp_path / "none.png")


def test_pictures_come_from_the_source_of_their_row(place, tmp_path):
    from dataclasses import replace

    source = Searcher(place / "index").card.sources[0]
    other = replace(
        source,
        data=Manifest.open(place / "one").fingerprint,
        first_id=1000,
        origin={"data": str(place / "one")},
    )
    gone = replace(source, first_id=2000, origin={"data": str(tmp_path / "gone")})
    changed = replace(source, first_id=3000, origin={"data": str(place / "one")})
    silent = replace(source, first_id=4000, origin={})
    pictures = IndexPictures([source, other, gone, changed, silent])
    for first, folder, side in ((0, "two", 40), (1000, "one", 32)):
        keys = Manifest.open(place / folder).keys.to_pylist()
        for sample in (0, 17, 47):
            _, colour, shape = keys[sample].split("-")
            expected = np.asarray(picture(colour, shape, side=side))
            assert (np.asarray(pictures[first + sample]) == expected).all()
    for row, says in {
        2003: "the shards are no longer at",
        3003: "holds other samples than were embedded",
        4003: "does not say where",
        1048: "holds no row with id 1048",
        -1: "holds no row with id -1",
    }.items():
        with pytest.raises(PicturesGoneError, match=says):
            pictures[row]
    assert len(pictures.why_gone()) == 3


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
