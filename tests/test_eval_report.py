"""The report page: escaped, self-contained, repeatable, small, and clear about missing data."""

import base64
import hashlib
import io
import json
import math
import re
import zlib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eval.projection import project_2d
from eval.report import Chart, Confusion, Hit, Page, Query, Series, Tile
from eval.report_charts import Scale, line_chart, ticks
from eval.report_html import LONGEST_TEXT, clean, data_island, element, render
from eval.report_pictures import PictureStore, sprite_sheet
from eval.report_tables import times_chance
from eval.results import Figure, Report

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\'\x00\u202e\ud800'
VOID = {"meta", "link", "img", "input", "br", "hr"}


def picture(shade: int = 0, side: int = 24) -> Image.Image:
    pixels = np.full((side, side, 3), shade, dtype=np.uint8)
    pixels[: side // 2, :, 0] = 255 - shade
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def figure(name: str = "recall@1", value: float = 0.272, **other: object) -> Figure:
    fields = {"low": value - 0.021, "high": value + 0.021, "count": 1728, "chance": 1 / 1728}
    return Figure(name, value, **{**fields, **other})  # type: ignore[arg-type]


def report(*values: float) -> Report:
    names = ["recall@1", "recall@5", "recall@10"]
    return Report("retrieval", tuple(figure(*pair) for pair in zip(names, values, strict=False)))


def full_page(text: str = "red heart") -> Page:
    page = Page(f"Title {text}", f"Subtitle {text}")
    page.headline([Tile(f"Label {text}", figure(), f"Note {text}")])
    section = page.section(f"Training {text}", f"Lead {text}")
    steps = np.arange(1.0, 400.0)
    section.charts(
        [
            Chart(f"Loss {text}", [Series(f"image {text}", steps, 5 / steps)], "nats"),
            Chart(
                "Two",
                [Series("a", [0, 1], [0.1, 0.2]), Series("b", [0, 1], [0.1, 0.3])],
                "fraction",
            ),
        ]
    )
    section.figures(report(0.27, 0.54), labels={"recall@1": text})
    section.comparison({f"Sum {text}": report(0.7, 0.8), "Head": report(0.8, 0.9)})
    page.section(text).gallery(
        [
            Query([Hit(text, picture(1), 0.7, True), Hit("other", picture(2), 0.6, False)], text),
            Query(
                [Hit(text, picture(3), 0.7, False)], text, picture(1), text, Hit(text, picture(4))
            ),
        ]
    ).gallery([Query([Hit(text, right=True), Hit("b", right=False)], picture=picture(9))])
    section.confusions([Confusion(text, "wolf", 9, 12, picture(1), picture(2))])
    section.map(np.eye(3, 2), [picture(5), picture(6), picture(7)], [text, "b", "c"])
    section.facts({f"Model {text}": {f"tower {text}": text, "parameters": 8_000_000}})
    return page


class Structure(HTMLParser):
    """Fails where elements do not nest; collects tags, attributes, text and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def test_page_is_well_formed_and_its_ids_are_unique() -> None:
    structure = Structure(full_page().html())
    assert [tag for tag, _ in structure.tags[:2]] == ["html", "head"]
    ids = [attributes["id"] for _, attributes in structure.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    for tag, attributes in structure.tags:
        target = attributes.get("href") or ""
        if tag in ("use", "a"):
            assert target.removeprefix("#") in ids
    assert all(
        attributes.get("alt") is not None for tag, attributes in structure.tags if tag == "img"
    )


def test_hostile_captions_add_no_element_and_no_script() -> None:
    plain, hostile = Structure(full_page().html()), Structure(full_page(HOSTILE).html())
    assert [tag for tag, _ in plain.tags] == [tag for tag, _ in hostile.tags]
    assert plain.scripts[-1] == hostile.scripts[-1]
    assert not any(name.startswith("on") for _, found in hostile.tags for name in found)
    shown = "".join(hostile.words)
    assert "alert(1)" in shown
    assert "\x00" not in shown
    assert "\u202e" not in shown
    island = json.loads(hostile.scripts[0])
    assert island["names"] == [clean(HOSTILE), "b", "c"]


@given(st.text(st.characters(exclude_categories=[]), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_as_text(text: str) -> None:
    html = render(element("p", clean(text), title=clean(text)))
    structure = Structure(html)
    html.encode("utf-8")
    assert structure.tags == [("p", {"title": clean(text)})]
    assert "".join(structure.words) == clean(text)
    loaded = json.loads("".join(Structure(render(data_island([clean(text)]))).scripts))
    assert loaded == [clean(text)]


def test_long_captions_are_cut() -> None:
    assert len(clean("x" * 1_000_000)) == LONGEST_TEXT


def test_page_refers_to_nothing_outside_itself() -> None:
    html = full_page().html()
    structure = Structure(html)
    for _, attributes in structure.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#"))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", html)
    assert "http://" not in html
    assert "https://" not in html


def test_content_policy_allows_exactly_the_pages_script() -> None:
    structure = Structure(full_page().html())
    policy = next(found["content"] for _, found in structure.tags if found.get("http-equiv"))
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(structure.scripts[-1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_same_input_same_bytes(tmp_path: Path) -> None:
    first = full_page().write(tmp_path / "a.html")
    second = full_page().write(tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().decode("utf-8") == full_page().html()


def test_write_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="nothing on it"):
        Page("Empty").write(path)
    assert path.read_text() == "old"
    full_page().write(path)
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        full_page().write(tmp_path / "nowhere" / "report.html")


def test_values_intervals_and_chance_are_shown() -> None:
    page = Page("Figures")
    page.headline([Tile("Key", figure(value=0.272, low=0.251, high=0.293, chance=0.0016))])
    page.section("Table").figures(
        Report("t", (figure("top-1", 0.352, low=0.329, high=0.375, chance=None, count=5000),))
    )
    text = Structure(page.html()).text
    for shown in ("27.2", "25.1 – 29.3", "170 × chance", "35.2", "32.9 – 37.5", "5,000"):
        assert shown in text


def test_interval_bar_spans_the_interval_and_marks_chance() -> None:
    page = Page("Bar")
    page.headline([Tile("Key", figure(value=0.5, low=0.4, high=0.6, chance=0.1))])
    lines = {
        found["class"]: found
        for tag, found in Structure(page.html()).tags
        if tag in ("line", "circle") and "class" in found
    }

    def at(text: str | None) -> float:
        return float((text or "").removesuffix("%"))

    low, high = at(lines["range"]["x1"]), at(lines["range"]["x2"])
    assert at(lines["point"]["cx"]) == pytest.approx((low + high) / 2, abs=0.02)
    # The scale is linear: chance lies as far left of 0.4 as 1.5 interval widths.
    assert at(lines["chance"]["x1"]) == pytest.approx(low - 1.5 * (high - low), abs=0.05)


def test_differences_are_signed_and_held_against_zero() -> None:
    page = Page("Differences")
    gain = figure("gain", 0.05, low=-0.01, high=0.11, chance=None, unit="points")
    page.section("Table").figures(Report("t", (gain,)))
    structure = Structure(page.html())
    assert "+5.0 points" in structure.text
    assert "−1.0 – +11.0" in structure.text
    assert "no difference" in structure.text
    assert any(found.get("class") == "chance" for tag, found in structure.tags if tag == "line")


def test_figure_without_interval_says_so() -> None:
    page = Page("Figures")
    lonely = figure(low=math.nan, high=math.nan)
    page.section("Table").figures(Report("t", (lonely,)))
    html = page.html()
    assert "no interval" in html
    assert "nan" not in Structure(html).text


def test_best_method_is_marked_by_the_direction_of_the_figure() -> None:
    def measured(recall: float, rank: float) -> Report:
        ranked = figure("rank", rank, low=rank, high=rank, unit="rank", higher_is_better=False)
        return Report("t", (figure("recall@1", recall), ranked))

    page = Page("Methods")
    page.section("All").comparison({"a": measured(0.2, 3.0), "b": measured(0.4, 9.0)})
    cells = [
        (found["class"], found["data-sort"])
        for tag, found in Structure(page.html()).tags
        if tag == "td"
    ]
    assert cells == [
        ("method", "0.2"),
        ("method best", "3"),
        ("method best", "0.4"),
        ("method", "9"),
    ]


@pytest.mark.parametrize(
    ("made", "ratio"),
    [
        (figure(value=0.22, chance=0.002), 110.0),
        (figure(value=4.0, chance=864.0, unit="rank", higher_is_better=False), 216.0),
        (figure(chance=None), None),
        (figure(chance=0.0), None),
    ],
)
def test_times_chance(made: Figure, ratio: float | None) -> None:
    found = times_chance(made)
    assert found == (None if ratio is None else pytest.approx(ratio))


def test_marks_are_symbol_and_word() -> None:
    hits = [Hit("a", picture(1), right=True), Hit("b", picture(2), right=False)]
    page = Page("Marks")
    page.section("All").gallery(
        [Query(hits, "a"), Query(hits[1:], "c", target=Hit("c", picture(3)))]
    )
    structure = Structure(page.html())
    marks = [found for _, found in structure.tags if found.get("class") == "mark"]
    assert len(marks) == 4
    words = structure.text
    assert (words.count("right:"), words.count("wrong:"), words.count("not among the hits")) == (
        1,
        2,
        1,
    )


def test_target_is_shown_only_where_it_was_missed() -> None:
    def shown(right: bool) -> int:
        page = Page("Target")
        query = Query([Hit("a", picture(1), right=right)], "q", target=Hit("t", picture(2)))
        page.section("All").gallery([query])
        return page.html().count('class="missed"')

    assert (shown(True), shown(False)) == (0, 1)


def test_repeated_pictures_are_embedded_once() -> None:
    page = Page("Pictures")
    same = encoded(picture(3))
    page.section("All").gallery([Query([Hit(str(n), same, right=False) for n in range(20)], "q")])
    html = page.html()
    assert html.count("<use ") == 20
    assert html.count("<image ") == 1


def test_pictures_are_made_small_and_lose_their_metadata() -> None:
    store = PictureStore()
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    exif[0x0112] = 6  # lies on its side: a quarter turn clockwise stands it up
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (600, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", exif=exif)
    shown = store.show(buffer.getvalue(), alt="", place="test")
    assert shown.get("viewBox") == "0 0 80 160"
    embedded = render(store.definitions())
    data = base64.b64decode(embedded.split("base64,")[1].split('"')[0])
    assert b"secret" not in data
    assert len(data) < 20_000


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode(mode: str) -> None:
    store = PictureStore()
    image = Image.new(mode, (10, 6))
    assert store.show(image, alt="", place="test").get("viewBox") == "0 0 10 6"
    uri, cell, columns = sprite_sheet([image, image, image], place="test")
    sheet = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert sheet.size == (columns * cell, 2 * cell)


def test_map_of_noise_stays_small() -> None:
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(1200)
    ]
    page = Page("Map")
    names = [f"picture {number}" for number in range(1200)]
    page.section("All").map(random.normal(size=(1200, 2)), pictures, names)
    assert len(page.html()) < 5_500_000


def test_map_keeps_places_and_names() -> None:
    page = Page("Map")
    places = np.array([[0.0, 5.0], [10.0, 5.0], [5.0, 15.0]])
    page.section("All").map(places, [picture(n) for n in range(3)], ["a", "b", "c"])
    data = json.loads(Structure(page.html()).scripts[0])
    assert data["x"] == [0, 9999, 5000]
    assert data["y"] == [0, 0, 9999]
    assert data["names"] == ["a", "b", "c"]


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    x = np.arange(100_000.0)
    drawn = render(line_chart(Chart("Loss", [Series("loss", x, 1 + 1 / (x + 1))])))
    assert len(drawn) < 10_000
    assert 'class="band s1"' in drawn
    last = render(line_chart(Chart("Loss", [Series("loss", x, np.where(x < 99_999, 5.0, 3.25))])))
    assert ">3.25</text>" in last


def test_a_gap_breaks_the_line() -> None:
    y = [1.0, 2.0, math.nan, 2.0, 3.0]
    drawn = render(line_chart(Chart("Loss", [Series("loss", range(5), y)])))
    path = re.search(r'<path d="([^"]+)"', drawn)
    assert path is not None
    assert [step[0] for step in re.findall(r"[ML][^ML]+", path[1])] == ["M", "L", "M", "L"]


def test_end_labels_do_not_overlap() -> None:
    series = [Series(name, [0, 1], [0.0, 1.0 + n / 1000]) for n, name in enumerate("abcdef")]
    drawn = Structure(render(line_chart(Chart("Close", series))))
    heights = sorted(
        float(found["y"] or "nan")
        for _, found in drawn.tags
        if (found.get("class") or "").startswith("end")
    )
    assert len(heights) == 6
    assert all(lower - upper > 12.9 for upper, lower in pairwise(heights))


@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(1e-6, 1e6),
    st.integers(3, 12),
)
def test_ticks_cover_with_even_steps(low: float, span: float, at_most: int) -> None:
    high = low + max(span, abs(low) * 1e-6)
    found = ticks(low, high, at_most=at_most)
    step = found[1] - found[0]
    assert 2 <= len(found) <= at_most
    assert found[0] <= low + step * 1e-6
    assert found[-1] >= high - step * 1e-6
    assert np.allclose(np.diff(found), step, rtol=1e-3)


def test_scale_is_linear_or_logarithmic() -> None:
    assert Scale(2.0, 4.0).share(3.0) == pytest.approx(0.5)
    assert Scale(1.0, 100.0, log=True).share(10.0) == pytest.approx(0.5)


CHART_ERRORS = [
    (Chart("Loss", []), "no series"),
    (Chart("Loss", [Series("a", [], [])]), "no finite value"),
    (Chart("Loss", [Series("a", [0, 1], [math.nan, math.inf])]), "no finite value"),
    (Chart("Loss", [Series("a", [0, 1], [1.0])]), "x has 2 points"),
    (Chart("Loss", [Series("a", [0, math.nan], [1.0, 2.0])]), "x is not finite"),
    (Chart("Loss", [Series("a", [0, 1], [0.0, 1.0])], log=True), "positive"),
    (Chart("Loss", [Series("a", [0, 1], [1.0, 2.0], low=[0.5])]), "another number"),
    (Chart("Loss", [Series("a", np.ones((2, 2)), [1.0, 2.0])]), "2 dimensions"),
    (Chart("Loss", [Series(str(n), [0], [1.0]) for n in range(7)]), "at most 6"),
]


@pytest.mark.parametrize(("chart", "message"), CHART_ERRORS)
def test_charts_name_what_is_missing(chart: Chart, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Page("Bad").section("Training").charts([chart])
    assert "chart 'Loss'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_data_is_one_clear_line() -> None:
    section = Page("Bad").section("Part")
    nothing = Report("zero_shot", ())
    whole = [
        (lambda: Page("  "), "empty title"),
        (lambda: Page("Bad").section(""), "needs a title"),
        (lambda: Page("Bad").headline([]), "no tiles"),
        (lambda: Page("Bad").headline([Tile("a", figure(value=math.nan))]), "nothing was measured"),
        (lambda: section.charts([]), "no charts"),
        (lambda: section.figures(nothing), "'zero_shot': no figures"),
        (lambda: section.comparison({}), "no reports"),
        (lambda: section.comparison({"a": nothing}), "no figures"),
        (lambda: section.comparison({"a": report(0.1, 0.2), "b": report(0.1)}), "'b'.*'recall@5'"),
        (lambda: section.gallery([]), "no queries"),
        (lambda: section.gallery([Query([Hit("a")])]), "neither words nor a picture"),
        (lambda: section.gallery([Query([], "red heart")]), "'red heart'.*no hits"),
        (lambda: section.confusions([]), "no pairs"),
        (lambda: section.confusions([Confusion("a", "b", 3, 2)]), "3 of 2"),
        (lambda: section.facts({}), "without entries"),
        (lambda: section.facts({"Model": {}}), "without entries"),
    ]
    for call, message in whole:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_bad_maps_are_refused() -> None:
    section = Page("Bad").section("Part")
    one = [picture()]
    with pytest.raises(ValueError, match="2 points, 1 pictures"):
        section.map(np.zeros((2, 2)), one, ["a", "b"])
    with pytest.raises(ValueError, match="0 points"):
        section.map(np.zeros((0, 2)), [], [])
    with pytest.raises(ValueError, match="1 to 2000"):
        section.map(np.zeros((2001, 2)), one * 2001, ["a"] * 2001)
    with pytest.raises(ValueError, match="not finite"):
        section.map(np.array([[0.0, math.nan]]), one, ["a"])


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(picture())[:60]])
def test_damaged_pictures_are_named(data: bytes) -> None:
    section = Page("Bad").section("Part")
    with pytest.raises(ValueError, match=r"gallery, query 1.*cannot be read"):
        section.gallery([Query([Hit("a")], "fine"), Query([Hit("a", data)], "bad")])
    with pytest.raises(ValueError, match=r"map, picture 1.*cannot be read"):
        section.map(np.eye(2), [picture(), data], ["a", "b"])


def test_a_picture_of_absurd_size_is_refused_before_decoding() -> None:
    # A valid header that promises 40,000 x 40,000 pixels, with no pixels behind it.
    bomb = bytearray(encoded(picture()))
    bomb[16:24] = (40_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(ValueError, match="picture") as caught:
        PictureStore().show(bytes(bomb), alt="", place="test")
    assert "\n" not in str(caught.value)


def test_projection_is_repeatable_and_keeps_clusters() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 30)
    rows = random.normal(size=(4, 16))[labels] + 0.1 * random.normal(size=(120, 16))
    found = project_2d(rows.astype(np.float32))
    assert np.array_equal(found, project_2d(rows.astype(np.float32)))
    distances = np.linalg.norm(found[:, None] - found[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).all()


@pytest.mark.parametrize("rows", [2, 5, 19, 20, 25])
def test_projection_of_few_rows(rows: int) -> None:
    found = project_2d(np.random.default_rng(1).normal(size=(rows, 8)))
    assert found.shape == (rows, 2)
    assert np.isfinite(found).all()


def test_projection_refuses_what_it_cannot_place() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        project_2d(np.ones((1, 4)))
    with pytest.raises(ValueError, match="not finite"):
        project_2d(np.full((3, 4), np.nan))
