"""The search page in a real browser, over a real server with a tiny model and real shards."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pairs_corpus import COLOURS, SHAPES, encoded, picture, tiny_model

from align.bundle import fingerprint, save
from align.fusion import fusion_head
from align.fusion.store import save_head
from pipelines.cli import VERBS, parse
from shards.packing import pack
from shards.sources import Record

PAGE = Path(__file__).parent.parent / "pipelines" / "serve" / "page"
SIDES = (24, 32, 40)
ROWS = len(COLOURS) * len(SHAPES) * len(SIDES)
MISCHIEF = "<img src=x onerror=document.title='taken'>"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.slow
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


# --- a world to search in ---


@dataclass
class Site:
    """A server under way.

    Attributes:
        url: Where it answers.
        indexes: What it says of its indexes.
    """

    url: str
    indexes: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Shards, an untrained model with a fusion head, a table and an index."""
    root = tmp_path_factory.mktemp("page")
    records = [
        Record(
            key=f"{colour}-{shape}-{side}",
            image=encoded(picture(colour, shape, side=side)),
            caption=f"{colour} {shape} {side}" + (MISCHIEF if colour == "black" else ""),
            fields={"colour": colour, "shape": shape, "side": side, "number": number},
        )
        for number, (colour, shape, side) in enumerate(product(COLOURS, SHAPES, SIDES))
    ]
    pack(records, root / "data", samples_per_shard=50, shuffle_seed=0)
    model = tiny_model()
    save(model, root / "bundle")
    widths = {"image_width": model.image.token_width, "text_width": model.text.token_width}
    head = fusion_head("early")(dim=model.config.dim, **widths)
    towers = fingerprint(root / "bundle")
    save_head(head, root / "bundle/heads/early", name="early", options={}, towers=towers)
    run("embed", f"{root}/bundle", f"{root}/data", f"{root}/table")
    run("index", f"{root}/table", f"{root}/index", "factory=Flat")
    return root


def run(verb: str, *arguments: str) -> None:
    from pkgutil import resolve_name

    assert resolve_name(VERBS[verb].run)(parse(verb, arguments)) in (0, None)


def served(folders: dict[str, Path], token: str | None = None) -> Iterator[Site]:
    """Serve indexes in a thread."""
    import uvicorn

    from pipelines.serve import address, listening
    from pipelines.serve.answers import Service
    from pipelines.serve.app import application
    from pipelines.serve.indexes import open_indexes
    from pipelines.serve.limits import Limits
    from pipelines.serve.metrics import Metrics

    metrics = Metrics()
    indexes = open_indexes(
        folders,
        model=None,
        heads=None,
        check="sha256",
        memory_map=False,
        max_batch=8,
        max_waiting=64,
        metrics=metrics,
    )
    service = Service(indexes, limits=Limits(), metrics=metrics, threads=1)
    app = application(service, token=token)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical", ws="none"))
    with listening("127.0.0.1", 0) as door:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        yield Site(address(door), [one.summary() for one in indexes.values()])
        server.should_exit = True
        thread.join()
    service.close()


@pytest.fixture(scope="module")
def site(world) -> Iterator[Site]:
    yield from served({"shapes": world / "index"})


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    arguments = ["--no-sandbox", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


NOTE_FORMS = """
const append = FormData.prototype.append;
FormData.prototype.append = function (name, value, ...more) {
  if (name === "query") globalThis.lastQuery = value;
  return append.call(this, name, value, ...more);
};
"""


class Visitor:
    """A page of a browser, and what went wrong in it.

    Args:
        context: The browser's, with its cookies.
        forgiven: What the console may say.
    """

    def __init__(self, context: Any, forgiven: str = "nothing at all") -> None:
        self.forgiven = forgiven
        context.add_init_script(NOTE_FORMS)
        self.page = context.new_page()
        self.page.set_default_timeout(10_000)
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self.wrong.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("requestfailed", self._failed)

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # a stale search is given up
            self.wrong.append(f"{request.url}: {request.failure}")

    def until(self, expression: str) -> None:
        """Wait for something; the page's policy forbids Playwright's own way."""
        for _ in range(500):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"never so: {expression}")

    def settled(self) -> None:
        """Wait until what was asked last is on the page."""
        self.until("!document.querySelector('.hits.waiting')")

    def visit(self, url: str) -> None:
        self.page.goto(url)
        self.page.wait_for_selector("#status:not(:empty), #trouble:not([hidden])")
        self.settled()

    def asked(self, act: Any) -> dict[str, Any]:
        """What the page asks the server when something is done, once the answer is shown."""
        path = "**/api/search"
        with self.page.expect_request(path) as found, self.page.expect_response(path):
            act()
        self.until("document.querySelector('#status').textContent.includes('ms')")
        self.settled()
        sent = found.value.post_data or self.page.evaluate("lastQuery")  # none of a form with files
        return json.loads(sent)

    def type(self, text: str) -> dict[str, Any]:
        return self.asked(lambda: self.page.fill("#words", text))

    @property
    def ids(self) -> list[int]:
        tiles = self.page.locator(".tile")
        return [int(one) for one in tiles.evaluate_all("all => all.map(one => one.dataset.id)")]

    @property
    def captions(self) -> list[str]:
        return self.page.locator(".tile .caption").all_text_contents()

    @property
    def status(self) -> str:
        return self.page.locator("#status").inner_text()


@pytest.fixture
def visitor(browser, site) -> Iterator[Visitor]:
    """Somebody who opens the page on a desk; nothing may go wrong behind their back."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    visitor = Visitor(context)
    visitor.visit(site.url)
    yield visitor
    context.close()
    assert [line for line in visitor.wrong if visitor.forgiven not in line] == []


def hits_of(visitor: Visitor, site: Site, body: dict[str, Any]) -> list[int]:
    """The ids that the server gives for a request."""
    answer = visitor.page.request.post(f"{site.url}api/search", data=body)
    assert answer.ok, answer.text()
    return [hit["id"] for hit in answer.json()["hits"]]


def drop(page: Any, data: bytes, *, name: str = "it.png", kind: str = "image/png") -> None:
    """Let a file fall onto the page."""
    given = page.evaluate_handle(
        """([data, name, kind]) => {
          const carried = new DataTransfer();
          carried.items.add(new File([new Uint8Array(data)], name, { type: kind }));
          return carried;
        }""",
        [list(data), name, kind],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("main", event, {"dataTransfer": given})


RED_CROSS = encoded(picture("red", "cross", side=64))


# --- words ---


@in_browser
def test_words_find_what_the_server_finds_and_the_link_holds_them(visitor, site):
    assert visitor.status == f"{ROWS} pictures"
    assert len(visitor.ids) == 24, "some of what there is, before anything was asked"
    asked = visitor.type("red circle -blue")
    assert asked["terms"] == [{"text": "red circle", "weight": 1}, {"text": "blue", "weight": -0.5}]
    assert visitor.ids == hits_of(visitor, site, asked)
    assert re.match(rf"{ROWS} pictures · [\d.]+ ms · \S+", visitor.status)
    assert visitor.page.locator("#parts").inner_text() == "without “blue”"
    assert visitor.page.title() == "red circle"
    before = visitor.ids
    visitor.page.reload()
    visitor.page.wait_for_selector(".tile .score")
    assert visitor.page.input_value("#words") == "red circle -blue"
    assert visitor.ids == before


@in_browser
def test_the_button_for_what_to_avoid_writes_the_minus(visitor):
    visitor.type("red")
    visitor.page.click("#without")
    asked = visitor.asked(lambda: visitor.page.keyboard.type('"blue ring" -t-shirt semi-dry'))
    assert asked["terms"] == [
        {"text": "red semi-dry", "weight": 1},
        {"text": "blue ring", "weight": -0.5},
        {"text": "t-shirt", "weight": -0.5},
    ]


@in_browser
def test_what_is_typed_last_wins_over_an_answer_that_comes_late(visitor, site):
    page, held, ended = visitor.page, [], []
    for event in ("requestfinished", "requestfailed"):
        page.on(event, lambda one: ended.append(one.post_data))
    page.route("**/api/search", lambda one: one.continue_() if held else held.append(one))
    page.fill("#words", "yellow bar")
    visitor.until("location.hash.includes('yellow')")
    while not held:
        page.wait_for_timeout(20)
    asked = visitor.type("green dot")
    with suppress(Exception):  # it was given up
        held[0].continue_()
    while not any("yellow" in (data or "") for data in ended):
        page.wait_for_timeout(20)
    page.wait_for_timeout(200)
    assert visitor.ids == hits_of(visitor, site, asked)
    assert "yellow" not in page.url


@in_browser
def test_what_the_data_says_is_text_and_never_markup(visitor):
    visitor.type("black frame")
    visitor.page.locator(".tile", has_text="black").first.click()
    assert MISCHIEF in visitor.page.locator("#detail h2").inner_text()
    assert visitor.page.title() == "black frame"


# --- pictures, and pictures with words ---


@in_browser
def test_a_dropped_picture_a_balance_and_a_head(visitor, site, browser):
    page = visitor.page
    asked = visitor.asked(lambda: drop(page, RED_CROSS))
    assert asked["terms"] == [{"upload": 0, "weight": 1}]
    assert page.locator(".chip img").evaluate("one => one.naturalWidth") > 0
    assert "picture=" in page.url
    assert page.locator("#mixing").is_hidden(), "there are no words to balance with"
    alone = visitor.ids
    asked = visitor.type("blue")
    vector = asked["terms"][0]["vector"]
    assert asked["terms"] == [{"vector": vector, "weight": 0.5}, {"text": "blue", "weight": 0.5}]
    asked = visitor.asked(lambda: page.fill("#balance", "0.8"))
    assert [term["weight"] for term in asked["terms"]] == [pytest.approx(0.2), 0.8]
    assert "balance=0.8" in page.url
    mixed, link = visitor.ids, page.url
    asked = visitor.asked(lambda: page.fill("#balance", "0"))
    assert asked["terms"] == [{"vector": vector, "weight": 1}]
    assert visitor.ids == alone, "the vector of the link finds what the picture found"

    visitor.asked(lambda: page.fill("#balance", "0.5"))
    asked = visitor.asked(lambda: page.select_option("#head", "early"))
    assert asked["head"] == "early"
    assert [sorted(term) for term in asked["terms"]] == [["upload", "weight"], ["text", "weight"]]
    fused, fused_link = visitor.ids, page.url
    context = browser.new_context()
    other = Visitor(context)
    for url, expected in {link: mixed, fused_link: fused}.items():
        other.visit(url)
        other.page.wait_for_selector(".tile .score")
        assert other.ids[: len(expected)] == expected
        other.page.goto("about:blank")
    context.close()
    assert other.wrong == []
    page.locator(".chip button").click()
    visitor.settled()
    assert page.locator("#mixing").is_hidden()


@in_browser
def test_a_head_takes_the_picture_of_a_row(visitor, site):
    row = visitor.ids[5]
    link = f"#q=blue&like={row}&head=early"
    asked = visitor.asked(lambda: visitor.page.goto(site.url + link))
    assert asked["head"] == "early"
    assert [sorted(term) for term in asked["terms"]] == [["upload", "weight"], ["text", "weight"]]
    assert visitor.page.url == site.url + link, "a row needs no vector in the link"
    summed = visitor.asked(lambda: visitor.page.select_option("#head", ""))
    assert summed["head"] is None
    assert summed["terms"][0] == {"id": row, "weight": 0.5}


@in_browser
def test_pictures_are_chosen_and_pasted_and_what_is_none_is_told(visitor, tmp_path):
    page = visitor.page
    (tmp_path / "a.png").write_bytes(RED_CROSS)
    visitor.asked(lambda: page.set_input_files("#file", tmp_path / "a.png"))
    paste = """data => {
      const carried = new DataTransfer();
      carried.items.add(new File([new Uint8Array(data)], "b.png", { type: "image/png" }));
      dispatchEvent(new ClipboardEvent("paste", { clipboardData: carried }));
    }"""
    asked = visitor.asked(lambda: page.evaluate(paste, list(RED_CROSS)))
    assert [term["weight"] for term in asked["terms"]] == [0.5, 0.5]
    assert page.locator(".chip").count() == 2
    drop(page, b"words", name="a.txt", kind="text/plain")
    assert page.locator("#trouble").inner_text() == "That is no picture. Drop a picture file here."
    visitor.forgiven = "415"
    drop(page, b"no picture at all")
    visitor.until("document.querySelector('#trouble').textContent.includes('known type')")


# --- more like this, back and forward ---


@in_browser
def test_more_like_this_and_back_again(visitor, site):
    page = visitor.page
    visitor.type("purple ring")
    first = visitor.ids
    page.locator(".tile").nth(2).click()
    page.wait_for_selector("#detail dt:text-is('id')")
    facts = page.locator("#detail dt").all_text_contents()
    assert {*facts} == {"score", "colour", "shape", "side", "number", "id", "key", "shard"}
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail h2").inner_text() == visitor.captions[3]
    asked = visitor.asked(lambda: page.get_by_role("button", name="More like this").click())
    assert asked["terms"] == [{"id": first[3], "weight": 1}]
    assert visitor.ids == hits_of(visitor, site, asked)
    assert first[3] not in visitor.ids
    assert page.input_value("#words") == ""
    alike = visitor.ids
    page.go_back()
    visitor.until("document.querySelector('#words').value === 'purple ring'")
    assert visitor.ids == first
    page.go_forward()
    page.wait_for_selector(".chip")
    assert visitor.ids == alike
    page.locator(".tile").first.click()
    asked = visitor.asked(lambda: page.get_by_role("button", name="Add to query").click())
    assert [term["id"] for term in asked["terms"]] == [first[3], alike[0]]


@in_browser
def test_the_link_is_copied(visitor):
    visitor.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visitor.type("blue corner")
    visitor.page.click("#copy")
    visitor.until("document.querySelector('#copy').textContent === 'Copied'")
    assert visitor.page.evaluate("navigator.clipboard.readText()") == visitor.page.url


# --- filters ---


@in_browser
def test_filters_narrow_the_search_and_the_link_holds_them(visitor, site):
    page = visitor.page
    visitor.type("bar")
    asked = visitor.asked(lambda: page.locator("#filters").get_by_label("green").check())
    assert asked["fields"] == {"colour": ["green"]}
    each = ROWS // len(COLOURS)
    assert visitor.status.startswith(f"{each} of {ROWS} pictures match")
    assert all(caption.startswith("green") for caption in visitor.captions)
    assert len(visitor.ids) == each
    assert page.locator("#counted").inner_text() == "1"
    page.get_by_label("number from").fill("30.5")
    asked = visitor.asked(lambda: page.keyboard.press("Enter"))
    assert asked["fields"] == {"colour": ["green"], "number": {"min": 30.5}}
    assert len(visitor.ids) == each - 7, "24 to 30 are green and below"
    page.locator("summary", has_text="SQL").click()
    page.locator("#filters textarea").fill("shape = 'bar' or shape = 'ring'")
    asked = visitor.asked(lambda: page.keyboard.press("Enter"))
    assert asked["where"] == "shape = 'bar' or shape = 'ring'"
    assert len(visitor.ids) == 5
    page.reload()
    page.wait_for_selector(".tile .score")
    assert len(visitor.ids) == 5
    assert page.locator("#filters").get_by_label("green").is_checked()
    assert page.get_by_label("number from").input_value() == "30.5"
    asked = visitor.asked(lambda: page.get_by_role("button", name="Reset").click())
    assert (asked["fields"], asked["where"]) == ({}, None)
    assert not page.locator("#filters").get_by_label("green").is_checked()


@in_browser
def test_the_list_can_be_folded_and_varied(visitor):
    page = visitor.page
    visitor.type("red dot")
    fold = page.get_by_role("slider", name="Fold near-duplicates")
    asked = visitor.asked(lambda: fold.fill("5"))
    assert asked["collapse"] == 0.95
    assert "collapse=0.95" in page.url
    page.wait_for_selector(".copies")
    asked = visitor.asked(lambda: page.get_by_role("slider", name="Variety").fill("0.5"))
    assert asked["diversity"] == 0.5
    page.reload()
    page.wait_for_selector(".tile .score")
    assert fold.input_value() == "5"


# --- an endless grid, the keyboard, small and dark screens ---


@in_browser
def test_the_grid_grows_to_its_end_with_each_row_once(visitor, site):
    asked = visitor.type("yellow frame")
    assert len(visitor.ids) < ROWS
    while len(visitor.ids) < ROWS:
        count = len(visitor.ids)
        tops = "[...document.querySelectorAll('.hits > li')].map(one => one.offsetTop)"
        before = visitor.page.evaluate(tops)
        visitor.page.mouse.wheel(0, 4000)
        visitor.until(f"document.querySelectorAll('.tile').length > {count}")
        assert visitor.page.evaluate(tops)[:count] == before, "nothing moves when more arrives"
    assert visitor.ids == hits_of(visitor, site, {**asked, "k": ROWS})
    assert visitor.page.locator("#end").inner_text() == "That is all."


@in_browser
def test_everything_goes_by_keyboard(visitor):
    page, focused = visitor.page, "document.activeElement.dataset.id ?? document.activeElement.id"
    visitor.type("red")
    page.locator("#copy").focus()
    page.keyboard.press("/")
    assert page.evaluate(focused) == "words"
    assert page.input_value("#words") == "red"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == str(visitor.ids[0])
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == str(visitor.ids[2])
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('.hits')).gridTemplateColumns.split(' ').length"
    )
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == str(visitor.ids[2 + columns])
    page.keyboard.press("Enter")
    assert page.locator("dialog[open] h2").inner_text() == visitor.captions[2 + columns]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("dialog[open] h2").inner_text() == visitor.captions[columns]
    page.keyboard.press("Escape")
    visitor.until(f"({focused}) === '{visitor.ids[columns]}'")
    assert page.locator("dialog[open]").count() == 0
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "words"


@in_browser
def test_a_phone_in_the_dark(browser, site):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True, is_mobile=True
    )
    visitor, wide = Visitor(context), "document.documentElement.scrollWidth"
    page = visitor.page
    visitor.visit(site.url)
    assert page.evaluate(wide) == 390
    visitor.type("red circle without end and without sense -blue")
    visitor.asked(lambda: drop(page, RED_CROSS))
    assert page.locator("#balance").is_visible()
    assert page.evaluate(wide) == 390
    assert page.locator("#filters").is_hidden()
    page.tap("#refine")
    asked = visitor.asked(lambda: page.locator("#filters").get_by_label("green").check())
    assert asked["fields"] == {"colour": ["green"]}
    page.get_by_role("button", name="Close the filters").tap()
    assert page.locator("#filters").is_hidden()
    page.locator(".tile").first.tap()
    assert page.locator("dialog[open]").bounding_box()["width"] == 390
    assert page.evaluate(wide) == 390
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(22, 23, 25)"
    context.close()
    assert visitor.wrong == []


# --- what goes wrong is told ---


@in_browser
def test_the_line_of_the_server_is_shown(visitor, site):
    page, trouble = visitor.page, visitor.page.locator("#trouble")
    visitor.forgiven = "Failed to load resource"
    visitor.type("red")
    page.locator("summary", has_text="SQL").click()
    page.locator("#filters textarea").fill("no_such_column = 1")
    page.keyboard.press("Enter")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "no_such_column" in trouble.inner_text()
    assert visitor.ids == []
    page.locator("#filters textarea").fill("")
    visitor.asked(lambda: page.keyboard.press("Enter"))
    assert trouble.is_hidden()
    page.route("**/api/search", lambda route: route.abort("connectionrefused"))
    visitor.forgiven = "ERR_CONNECTION_REFUSED"
    page.fill("#words", "blue")
    page.wait_for_selector("#trouble:not([hidden])")
    assert trouble.inner_text() == "The server does not answer. Is it still running?"
    visitor.wrong = [line for line in visitor.wrong if "status of 400" not in line]


@in_browser
def test_nothing_matches_is_told(visitor):
    visitor.type("red")
    visitor.page.locator("summary", has_text="SQL").click()
    visitor.page.locator("#filters textarea").fill("side > 1000")
    visitor.asked(lambda: visitor.page.keyboard.press("Enter"))
    assert visitor.page.locator("#end").inner_text() == "Nothing matches these filters."
    assert visitor.status.startswith(f"0 of {ROWS} pictures match")


@in_browser
def test_a_token_is_asked_for_and_two_indexes_are_a_choice(browser, world):
    folders = {"shapes": world / "index", "again": world / "index"}
    for site in served(folders, token="open sesame"):
        context = browser.new_context()
        visitor = Visitor(context)
        page = visitor.page
        page.goto(f"{site.url}#q=red&index=again")
        page.wait_for_selector("dialog[open]")
        page.fill("#token", "open barley")
        page.keyboard.press("Enter")
        visitor.until("document.querySelector('#refused').textContent")
        assert "not the token" in page.locator("#refused").inner_text()
        page.fill("#token", "open sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector(".tile .score")
        assert page.input_value("#index") == "again"
        asked = visitor.asked(lambda page=page: page.select_option("#index", "shapes"))
        assert asked["index"] == "shapes"
        assert "index=shapes" in page.url
        context.close()
        assert [line for line in visitor.wrong if "401" not in line] == []


# --- the files themselves ---


class _Parts(HTMLParser):
    """Elements of a page, with what a strict policy forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "style" or name.startswith("on"):
                self.forbidden.append(f"{tag} {name}")
            if name == "src" or (name == "href" and tag == "link"):
                self.sources.append(value or "")
        if tag == "script" and "src" not in dict(attrs):
            self.forbidden.append("a script without a source")


def test_the_page_needs_nothing_from_elsewhere_and_nothing_inline():
    parts = _Parts()
    parts.feed((PAGE / "index.html").read_text())
    assert parts.forbidden == []
    own = [source for source in parts.sources if not source.startswith("data:")]
    scripts = {path.name: path.read_text() for path in PAGE.glob("*.js")}
    for text in scripts.values():
        own += [one.removeprefix("./") for one in re.findall(r'from "([^"]+)"', text)]
        assert len(text.splitlines()) <= 420
        assert "console." not in text
        assert "innerHTML" not in text
    assert {*own} == {*scripts, "page.css"}, "each file is used, and each file used is there"
    for path in PAGE.iterdir():
        known = {"http://www.w3.org/2000/svg"}
        assert {*re.findall(r"https?://[^\s'\"]+", path.read_text())} <= known, path.name
