"""The report in a real browser: what it loads, how it fits, and who can read it.

Needs Chromium (Debian's package `chromium`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from sample_audits import AUDITS

from rgap import report

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
TITLES = ["rich", "partial", "empty", "closed", "hostile"]

# The least contrast, over all elements with text of their own, against the nearest background that is no glass.
CONTRAST = """() => {
    const channels = colour => colour.match(/[\\d.]+/g).map(Number);
    const luminance = colour => {
        const [r, g, b] = channels(colour).slice(0, 3).map(c => {
            c /= 255;
            return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            const parts = channels(colour);
            if (parts.length === 3 || parts[3] > 0) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    let least = [21, ""];
    for (const element of document.body.querySelectorAll("*:not(.on)")) {
        if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
        if (["title", "desc"].includes(element.tagName)) continue;
        const style = getComputedStyle(element);
        const text = luminance(element instanceof SVGElement ? style.fill : style.color);
        const paper = luminance(behind(element));
        const contrast = (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
        if (contrast < least[0]) least = [contrast, element.outerHTML.slice(0, 100)];
    }
    return least;
}"""

# Whatever is cut off where nothing scrolls: beyond the window, and not inside something that scrolls.
OUTSIDE = """() => [...document.body.querySelectorAll("*")]
    .filter(element => !element.closest(".scroll, .hidden") && !element.closest("svg svg"))
    .filter(element => { const box = element.getBoundingClientRect();
                         return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5); })
    .map(element => element.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        message = "no Chromium on this machine: install Debian's package chromium to run the tests in a browser"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        # Every launch has a user data directory of its own, which is deleted afterwards.
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports, made from files as a user makes them."""
    folder = tmp_path_factory.mktemp("reports")
    for title in TITLES:
        source = folder / f"{title}.json"
        source.write_text(json.dumps(AUDITS[title](), allow_nan=False))
        report.write(source, folder / f"{title}.html")
    return folder


class Opened:
    """A page in a window, and what happened as it was opened."""

    def __init__(self, browser: Browser, url: str, width: int = 1100) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800})
        self.page: Page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


Show = Callable[..., Page]


@pytest.fixture(scope="module")
def show(browser: Browser, folder: Path) -> Iterator[Show]:
    """Gives the page of a report in a window of some width, with its details closed. Each is opened once: nothing in it
    runs, so that it is at any width what it would be had it been opened there."""
    with contextlib.ExitStack() as stack:
        pages: dict[str, Page] = {}

        def at(title: str, width: int = 1100, scheme: Literal["light", "dark"] = "light") -> Page:
            if title not in pages:
                pages[title] = stack.enter_context(Opened(browser, (folder / f"{title}.html").as_uri())).page
            page = pages[title]
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(media="screen", color_scheme=scheme)
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = false); scrollTo(0, 0)")
            return page

        yield at


@pytest.mark.parametrize("title", TITLES)
def test_a_page_loads_nothing_but_itself(title: str, browser: Browser, folder: Path) -> None:
    url = (folder / f"{title}.html").as_uri()
    with Opened(browser, url) as opened:
        opened.page.wait_for_load_state("networkidle")
        assert opened.messages == []
        assert [request for request in opened.requests if not request.startswith("data:")] == [url]
        broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
        assert opened.page.evaluate(broken) == 0
        assert opened.page.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_headline_is_seen_at_once(title: str, scheme: str, show: Show) -> None:
    headline = show(title, 360, scheme).get_by_role("heading", level=1)
    assert headline.count() == 1
    assert headline.is_visible()
    box = headline.bounding_box()
    assert box is not None
    assert box["y"] < 400
    assert headline.inner_text() == AUDITS[title]()["verdict"]["headline"]


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize("width", [320, 360, 800, 1600])
@pytest.mark.parametrize("opened_details", [False, True])
def test_a_page_never_scrolls_sideways(title: str, width: int, opened_details: bool, show: Show) -> None:
    page = show(title, width)
    if opened_details:
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []


@pytest.mark.parametrize("title", ["rich", "partial", "closed"])
def test_a_table_is_whole_on_a_desk_and_says_that_it_scrolls_on_a_phone(title: str, show: Show) -> None:
    for width, hidden in ((1280, False), (390, True)):
        page = show(title, width)
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        wide = "[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth + 1)"
        assert page.evaluate(f"{wide}.length > 0") is hidden
        # A shadow that stays at the edge, and a cover that moves away from it with what scrolls.
        moves = f"{wide}.map(each => getComputedStyle(each).backgroundAttachment)"
        assert set(page.evaluate(moves)) <= {"local, local, scroll, scroll"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("title", TITLES)
def test_text_stands_out(title: str, scheme: str, show: Show) -> None:
    contrast, where = show(title, scheme=scheme).evaluate(CONTRAST)
    assert contrast >= 4.5, where


def brightness(page: Page) -> float:
    """Of the page's background, from 0 to 1."""
    red, green, blue = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    return float(red + green + blue) / (3 * 255)


def test_dark_mode_is_dark_and_paper_is_white(show: Show) -> None:
    assert brightness(show("rich")) > 0.9
    page = show("rich", scheme="dark")
    assert brightness(page) < 0.2
    page.emulate_media(media="print", color_scheme="dark")
    assert brightness(page) == 1.0
    contrast, where = page.evaluate(CONTRAST)
    assert contrast >= 4.5, where
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_on_paper_everything_is_opened(show: Show) -> None:
    page = show("rich")
    inside = page.locator("details > :not(summary)")
    assert inside.count() > 10
    seen = "all => all.map(each => each.checkVisibility({contentVisibilityAuto: true}) && each.clientHeight > 0)"
    assert not any(inside.evaluate_all(seen))
    page.emulate_media(media="print")
    assert all(inside.evaluate_all(seen))
    assert not page.get_by_role("navigation").is_visible()


def test_the_keyboard_reaches_and_opens_the_details(browser: Browser, folder: Path) -> None:
    with Opened(browser, (folder / "rich.html").as_uri()) as opened:
        page = opened.page
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.tagName") == "SUMMARY":
                break
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert float(page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")) >= 2
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.parentElement.open")
        page.keyboard.press("Tab")
        focused = "document.activeElement.matches('.scroll[role=region][aria-label]')"
        assert page.evaluate(focused), "a table that scrolls can be scrolled with the keyboard"


def test_what_a_screen_reader_is_told(browser: Browser, folder: Path) -> None:
    with Opened(browser, (folder / "rich.html").as_uri()) as opened:
        page = opened.page
        for role in ("main", "navigation", "banner", "contentinfo"):
            assert page.get_by_role(role).count() == 1, role
        alternatives = page.evaluate("[...document.images].map(image => image.alt)")
        assert all(alternatives)
        assert "Original of astronaut-0.png" in alternatives
        assert "Reconstruction of astronaut-0.png by Closed" in alternatives
        charts = page.get_by_role("img", name="Constraints against unknowns, layer by layer")
        assert charts.count() == 1
        assert page.get_by_role("img", name="Leak against strength (deviation): GaussianNoise").count() == 1
        summaries = page.evaluate("[...document.querySelectorAll('summary')].map(each => each.textContent)")
        assert len(summaries) == len(set(summaries)), "each can be told from the others by its words alone"


def test_small_pictures_keep_their_squares(browser: Browser, folder: Path) -> None:
    with Opened(browser, (folder / "rich.html").as_uri(), 360) as opened:
        image = opened.page.get_by_alt_text("Original of astronaut-0.png")
        assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
        box = image.bounding_box()
        assert box is not None
        assert box["width"] == pytest.approx(box["height"], abs=1)
        assert box["width"] > 100
