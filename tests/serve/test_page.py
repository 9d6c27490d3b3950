"""The web page in a real Chromium, against a real service."""

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from services import Here, model, serving_here

import xlstm_ray
from xlstm_ray.serve.options import Options
from xlstm_ray.serve.pages import AT
from xlstm_ray.serve.server import Server

__all__ = ["model"]

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
KEYS = "first-key-of-somebody", "second-key-of-another"
SHORT = "Germany is a country in Europe. " * 40
LONG = "A valley is a low place between hills. " * 4_000  # is read for much longer than it takes to stop it


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path, f"these tests drive a browser; install one of {BROWSERS}: apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[Here]:
    with serving_here(model, settings={"cache_memory_mb": 64}) as here:
        yield here


@contextmanager
def opened(browser: Browser, url: str, **how: object) -> Iterator[Page]:
    """The page at an address; at its end nothing was asked elsewhere, and nothing was wrong in it."""
    context = browser.new_context(**how)  # type: ignore[arg-type]
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type in ("warning", "error") else None)
    try:
        page.goto(url)
        yield page
        there = url.rpartition("/docs")[0] or url
        assert {one for one in asked if not one.startswith((there, f"blob:{there}"))} == set()
        # A reply that is not 200 is written to the console by the browser itself.
        assert [line for line in wrong if "Failed to load resource" not in line] == []
    finally:
        context.close()


def ready(page: Page) -> None:
    expect(page.locator("#status")).to_have_text("Ready")


def give(page: Page, name: str, data: bytes) -> None:
    """Choose a file."""
    page.set_input_files("#file", {"name": name, "mimeType": "text/plain", "buffer": data})


def card(page: Page, name: str):
    return page.locator(".document").filter(has=page.get_by_role("heading", name=name, exact=True))


def clear(service: Here) -> None:
    for one in service.ask("/v1/states").json["data"]:
        service.ask(f"/v1/states/{one['id']}", method="DELETE")


# -- asking ------------------------------------------------------------------------------------------------------------
def test_a_prompt_streams_what_the_service_says(browser, service):
    with opened(browser, service.url) as page:
        ready(page)
        expect(page.locator("#prompt")).to_be_focused()
        page.keyboard.type("the prompt")
        page.get_by_label("Most tokens").fill("40")
        page.keyboard.press("Shift+Tab")  # back over `After`, to the prompt
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".facts").first).to_contain_text("as many as were allowed")
        expected = service.complete("the prompt", max_tokens=40).json["choices"][0]["text"]
        assert page.locator(".answer .text").evaluate("it => it.textContent") == expected
        assert page.locator(".answer .text").evaluate("it => it.childNodes.length") > 1  # it came in pieces
        expect(page.locator(".answer .facts")).to_contain_text(
            re.compile(r"^40 tokens, \d.* 0 of \d+ tokens before it")
        )
        page.get_by_role("button", name="Ask", exact=True).click()  # the same again is in the cache
        expect(page.locator(".answer .facts").first).to_contain_text(re.compile(r"(\d+) of \1 tokens before it"))


def test_an_answer_is_stopped(browser, service):
    with opened(browser, service.url) as page:
        ready(page)
        page.fill("#prompt", "stop this")
        page.get_by_label("Most tokens").fill("4096")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_role("button", name="Stop", exact=True).click()
        expect(page.locator(".answer .facts")).to_have_text("Stopped.")
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()
        while service.desk.under_way:  # the service has given it up too
            page.wait_for_timeout(20)


def test_what_the_service_refuses_is_said_in_its_words(browser, service):
    with opened(browser, service.url) as page:
        ready(page)
        page.fill("#prompt", "a")
        page.get_by_label("Most tokens").fill("5000")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text(
            "`max_tokens` is 5000; this service allows up to 4096.".capitalize()
        )
        page.get_by_label("Most tokens").fill("1")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_role("alert")).to_be_hidden()


# -- documents ---------------------------------------------------------------------------------------------------------
def test_a_document_is_read_asked_forked_saved_and_deleted(browser, service, tmp_path):
    with opened(browser, service.url) as page:
        ready(page)
        give(page, "my book (1).txt", SHORT.encode())
        book = card(page, "my-book-1-")
        count = len(service.engine.encode(SHORT))
        expect(book.locator(".facts")).to_have_text(f"Ready: {count:,} tokens")
        book.get_by_role("button", name="Ask").click()
        expect(page.locator("#prompt")).to_be_focused()
        page.keyboard.type(" And so")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".answer .facts")).to_contain_text(f"{count:,} of {count + 7:,} tokens before it")
        expected = service.complete(" And so", state="my-book-1-", max_tokens=128).json["choices"][0]["text"]
        assert page.locator(".answer .text").evaluate("it => it.textContent") == expected

        book.get_by_role("button", name="Fork").click()
        fork = page.get_by_role("dialog")
        expect(fork).to_have_accessible_name("Fork my-book-1-")
        fork.get_by_label("Name").fill("my-book-1-")
        fork.get_by_role("button", name="Fork").click()
        expect(fork.get_by_role("alert")).to_contain_text("There is a state 'my-book-1-'")
        for name, more in (("copy", ""), ("longer", "More. ")):
            if name == "longer":
                book.get_by_role("button", name="Fork").click()
            fork.get_by_label("Name").fill(name)
            fork.get_by_label("Text").fill(more)
            fork.get_by_role("button", name="Fork").click()
            expect(fork).to_be_hidden()
            expect(card(page, name).locator(".facts")).to_have_text(f"Ready: {count + len(more):,} tokens")

        with page.expect_download() as waiting:
            card(page, "copy").get_by_role("button", name="Download").click()
        waiting.value.save_as(tmp_path / "copy.state")
        assert waiting.value.suggested_filename == "copy.state"
        whole = service.engine.prefill(SHORT).state
        assert xlstm_ray.RecurrentState.load(tmp_path / "copy.state").digest() == whole.digest()

        page.on("dialog", lambda dialog: dialog.accept())
        book.get_by_role("button", name="Delete").click()
        expect(book).to_have_count(0)
        assert page.locator("#after option").all_text_contents() == ["nothing", "copy", "longer"]
        assert {one["id"] for one in service.ask("/v1/states").json["data"]} == {"copy", "longer"}
    clear(service)


def test_a_dropped_document_shows_how_far_it_is_and_can_be_stopped(browser, service):
    with opened(browser, service.url) as page:
        ready(page)
        page.evaluate(
            """text => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([text], "hills.txt"));
                const more = {dataTransfer: transfer, bubbles: true, cancelable: true};
                for (const name of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(name, more));
            }""",
            LONG,
        )
        hills = card(page, "hills")
        total = f"{len(LONG):,}"
        expect(hills.locator(".facts")).to_have_text(
            re.compile(rf"Being read: [\d,]+ of {total} tokens, [\d,]+ a second, .* left"), timeout=30_000
        )
        bar = hills.get_by_role("progressbar", name="How far hills is")
        assert 0 < bar.evaluate("it => it.value") < 1
        hills.get_by_role("button", name="Stop").click()
        expect(hills.locator(".facts")).to_have_text(re.compile(rf"Stopped: [1-9][\d,]* of {total} tokens"))
        expect(bar).to_be_hidden()
        hills.get_by_role("button", name="Resume").click()
        expect(hills.locator(".facts")).to_contain_text(re.compile("Waiting|Being read"))
    clear(service)


def test_a_file_that_is_no_text_is_refused_by_its_name(browser, service):
    with opened(browser, service.url) as page:
        ready(page)
        give(page, "picture.txt", b"\xff\xfe\x00")
        expect(page.get_by_role("alert")).to_contain_text("picture.txt: The file, line 1: is not UTF-8 text")
        expect(page.locator(".document")).to_have_count(0)


# -- the service's own state -------------------------------------------------------------------------------------------
def test_a_key_is_asked_for_and_stays_in_the_tab(browser, model):
    with serving_here(model, keys=KEYS) as service, opened(browser, service.url) as page:
        field = page.get_by_label("This service needs a key")
        expect(field).to_be_focused()
        expect(page.locator("#status")).to_have_text("A key is needed")
        page.keyboard.type("not a key at all")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("This key is not one of the service's")
        page.keyboard.type(KEYS[0])
        page.keyboard.press("Enter")
        ready(page)
        page.fill("#prompt", "a")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".answer .facts")).to_contain_text("tokens before it")
        give(page, "ours.txt", SHORT.encode())
        expect(card(page, "ours").locator(".facts")).to_contain_text("Ready")
        stored = page.evaluate("() => [Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert stored == [[KEYS[0]], [], ""]
        page.get_by_role("button", name="Forget the key").click()
        expect(field).to_be_focused()
        assert page.evaluate("() => sessionStorage.length") == 0
        assert KEYS[0] not in page.content()


def test_it_tells_that_the_model_is_loaded_that_it_stops_and_that_it_is_gone(browser, model):
    server = Server(Options(port=0, name="tiny"), threading.Event())
    sizes = {"device": "cpu", "tile_size": 32, "chunk_size": 16, "chunkwise_backend": "native"}
    try:
        with opened(browser, f"http://127.0.0.1:{server.port}") as page:
            expect(page.locator("#status")).to_contain_text("The model is being loaded")
            page.fill("#prompt", "a")
            page.keyboard.press("Control+Enter")
            expect(page.get_by_role("alert")).to_have_text("The model is being loaded.")
            with xlstm_ray.load(model, **sizes) as engine:
                server.open(engine, engine.serve(slots=3))
                ready(page)
                expect(page.locator("#slots")).to_have_text("0 of 3")
                expect(page.locator("#cache")).to_have_text("off")
                server.drain(threading.Event())
                expect(page.locator("#status")).to_contain_text("The service is stopping")
                server.close()
                expect(page.locator("#status")).to_contain_text("The service does not answer")
    finally:
        server.close()


# -- for everybody -----------------------------------------------------------------------------------------------------
def test_everything_has_a_name_for_a_screen_reader_and_is_reached_by_the_keyboard(browser, service):
    with opened(browser, service.url) as page:
        ready(page)
        give(page, "one.txt", SHORT.encode())
        expect(card(page, "one").locator(".facts")).to_contain_text("Ready")
        tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
        roles = {"textbox", "spinbutton", "combobox", "button", "progressbar", "link", "region", "heading"}
        found = [
            (node["role"]["value"], node["name"]["value"]) for node in tree if not node["ignored"] and "name" in node
        ]
        unnamed = [role for role, name in found if role in roles and not name]
        assert not unnamed
        assert {("textbox", "Prompt"), ("combobox", "After"), ("button", "Ask: one"), ("link", "API reference")} <= set(
            found
        )
        reached = []
        page.locator("#prompt").focus()
        while "prompt" not in reached[1:]:  # once around
            reached.append(page.evaluate("() => document.activeElement.id || document.activeElement.ariaLabel"))
            ring = (
                "() => getComputedStyle(document.activeElement.closest('.drop') ?? document.activeElement).outlineStyle"
            )
            assert page.evaluate(ring) != "none" or reached[-1] in (None, "")
            page.keyboard.press("Tab")
        wanted = ["prompt", "after", "tokens", "temperature", "send", "file", "Ask: one", "Fork: one", "Download: one"]
        assert [one for one in reached[:-1] if one in wanted] == wanted
    clear(service)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(browser, service, scheme):
    with opened(browser, service.url, color_scheme=scheme) as page:
        colour = """name => {
            document.body.style.setProperty("color", `var(--${name})`);
            return getComputedStyle(document.body).color.match(/\\d+/g).map(Number);
        }"""
        names = ("text", "soft", "main", "bad", "ground", "card", "bad-tint", "on-main", "tint")
        light = {name: luminance(page.evaluate(colour, name)) for name in names}
        assert (light["ground"] > 0.5) == (scheme == "light")
        pairs = [(a, b) for a in ("text", "soft", "main") for b in ("ground", "card")]
        for a, b in [*pairs, ("bad", "bad-tint"), ("on-main", "main"), ("text", "tint"), ("soft", "tint")]:
            high, low = max(light[a], light[b]), min(light[a], light[b])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (a, b)  # WCAG 2.2, level AA


def luminance(colour: list[int]) -> float:
    """By WCAG."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_the_page_fits_a_phone(browser, service):
    with opened(browser, service.url, viewport={"width": 340, "height": 700}) as page:
        ready(page)
        give(page, f"{'long' * 20}.txt", SHORT.encode())
        expect(card(page, "long" * 20).locator(".facts")).to_contain_text("Ready")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 340
    clear(service)


def test_the_reference_lists_every_call(browser, service):
    with opened(browser, f"{service.url}/docs") as page:
        paths = service.ask("/openapi.json").json["paths"]
        calls = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
        expect(page.locator("summary")).to_have_count(len(calls))
        shown = [" ".join(text.split()[:2]) for text in page.locator("summary").all_inner_texts()]
        assert shown == calls
        page.get_by_text("/v1/completions", exact=True).click()
        expect(page.get_by_role("row", name="max_tokens")).to_contain_text("integer")


def test_the_page_may_load_nothing_from_elsewhere_and_stand_in_no_frame(service):
    for path in ("/", "/docs", "/page/main.js"):
        got = service.ask(path)
        policy = got.headers["content-security-policy"].split("; ")
        assert got.status == 200
        assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(
            policy
        )
        assert got.headers["x-content-type-options"] == "nosniff"
        assert not re.findall(rb"https?://(?!www\.w3\.org/2000/svg)", got.body)
    assert service.ask("/", host="evil.example").status == 403
    for path in ("/page/", "/page/none.js", "/page/..%2fapp.py"):
        assert service.ask(path).status == 404


def test_no_other_file_is_sent_as_a_page(service, tmp_path):
    (tmp_path / "own.html").write_text("of this machine")
    for path in AT:
        got = service.ask(f"{path}?path={tmp_path}/own.html")
        assert (got.status, got.error["param"]) == (400, "path")
