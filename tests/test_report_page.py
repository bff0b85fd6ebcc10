"""The page in a real browser: silent, self-contained, sortable, filterable, readable on a phone, accessible.

Needs a Chromium on this machine, and playwright to drive it; axe-core comes with axe-playwright-python. Where one of
them is missing the tests are skipped by its name.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attnbench import report
from tests import synthetic_records as synthetic

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def axe() -> str:
    """The source of axe-core, from the package that carries it."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-playwright-python is not installed")
    return Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of a whole study, with failures and pictures, and one of nothing."""
    out, empty = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("empty")
    records = [*synthetic.study(3), synthetic.one("linear", 8, status="oom")]
    records += [synthetic.one("local2d", s, settings={"model": {"options": {"radius": r}}})
                for r in (1, 2) for s in range(2)]  # fmt: skip
    synthetic.write(out, records)
    (out / "runs" / "broken-1.json").write_text("{")
    return {"study": report.write(out, out / "report"), "empty": report.write(empty, empty / "report")}


class Visit:
    """An open page, and everything that it said or asked for."""

    def __init__(self, browser: Browser, path: Path, width: int = 1280, scheme: Any = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(20_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Page:
        return self.page

    def __exit__(self, *args: object) -> None:
        self.page.close()


def until(page: Page, condition: str) -> None:
    """Waits; the page's policy forbids playwright's own way of it."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {condition}")


def column(page: Page, table: str, number: int) -> list[str]:
    return page.locator(f"#{table} tbody tr:not([hidden])").evaluate_all(
        "(rows, n) => rows.map((row) => row.cells[n].textContent.trim())", number
    )


@pytest.mark.parametrize("name", ["study", "empty"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_without_a_word_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str
) -> None:
    visit = Visit(browser, pages[name], scheme=scheme)
    with visit as page:
        page.mouse.wheel(0, 100_000)
        page.wait_for_timeout(200)
        assert visit.said == []
        outside = [url for url in visit.asked if not url.startswith("data:") and url != pages[name].as_uri()]
        assert outside == []


@pytest.mark.parametrize("name", ["study", "empty"])
def test_every_anchor_resolves(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with Visit(browser, pages[name]) as page:
        links = page.locator("a").evaluate_all("(all) => all.map((a) => a.getAttribute('href'))")
        assert len(links) > 10
        assert [href for href in links if not href.startswith("#")] == []
        lost = page.evaluate("(all) => all.filter((href) => !document.getElementById(href.slice(1)))", links)
        assert lost == []


@pytest.mark.parametrize("name", ["study", "empty"])
@pytest.mark.parametrize("width", [375, 768])
def test_nothing_overflows_a_narrow_screen(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    with Visit(browser, pages[name], width=width) as page:
        page.locator("details").evaluate_all("(all) => all.forEach((one) => { one.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for part in ("h1", "main section", "footer p"):
            assert page.locator(part).first.evaluate("(one) => one.getBoundingClientRect().left") >= 12, "no margin"


def test_tables_sort_by_number_both_ways_and_keep_what_was_not_measured_last(
    browser: Browser, pages: dict[str, Path]
) -> None:
    with Visit(browser, pages["study"]) as page:
        heads = page.locator("#runs thead th").all_inner_texts()
        place = heads.index("training MiB at peak")
        button = page.locator("#runs thead th").nth(place).get_by_role("button")
        for direction, reverse in (("ascending", False), ("descending", True)):
            button.click()
            head = page.locator("#runs thead th").nth(place)
            assert head.get_attribute("aria-sort") == direction
            cells = column(page, "runs", place)
            numbers = [float(text.replace(",", "")) for text in cells if text != "not measured"]
            assert len(numbers) > 10
            assert numbers == sorted(numbers, reverse=reverse)
            assert set(cells[len(numbers) :]) == {"not measured"}
        assert page.locator("#runs thead th[aria-sort]").count() == 1


def test_tables_sort_by_text_with_the_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["study"]) as page:
        before = column(page, "front", 0)
        page.locator("#front thead th").first.get_by_role("button").focus()
        page.keyboard.press("Enter")
        assert column(page, "front", 0) == sorted(before)
        assert before != sorted(before)


def test_tables_filter_by_words(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["study"]) as page:
        total = page.locator("#runs tbody tr").count()
        box = page.locator("#runs-filter")
        box.fill("local2d radius=1")
        assert column(page, "runs", 2) == ["local2d radius=1"] * 2
        assert page.locator("#runs-count").inner_text() == f"2 of {total} rows"
        box.fill("no such thing")
        assert column(page, "runs", 0) == []
        box.fill("")
        assert len(column(page, "runs", 0)) == total


def test_a_verdict_is_one_click_from_its_table(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["study"]) as page:
        page.get_by_role("link", name="C4: table, figure and rule").click()
        until(page, "location.hash === '#C4'")
        until(page, "Math.abs(document.getElementById('C4').getBoundingClientRect().top) < 100")
        assert page.locator("section", has=page.locator("#C4")).locator("table").count() >= 1


def test_a_settings_link_opens_how_it_was_run(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["study"]) as page:
        page.locator("#front tbody th a").first.click()
        until(page, "document.querySelector('details[open] :target') !== null")
        assert "python -m attnbench.run" in page.locator("details[open] dd code").last.inner_text()


def test_the_verdicts_come_first(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["study"]) as page:
        assert page.locator(".card").count() == 7
        verdicts = page.locator(".card > p > .verdict:first-child").all_inner_texts()
        assert {text.lower() for text in verdicts} <= {"supported", "refuted", "undecided", "misstated"}
        assert page.locator("h2").first.inner_text() == "Seven claims, seven verdicts"


@pytest.mark.parametrize(
    ("name", "scheme", "width"), [("study", "light", 1280), ("study", "dark", 375), ("empty", "dark", 1280)]
)
def test_axe_finds_nothing(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str, width: int, tmp_path: Path
) -> None:
    source = axe()
    text = pages[name].read_text(encoding="utf-8")
    free = tmp_path / "index.html"  # the page's own policy would not let a stranger's script in
    free.write_text(text.replace('http-equiv="Content-Security-Policy"', 'name="was"'), encoding="utf-8")
    with Visit(browser, free, width=width, scheme=scheme) as page:
        page.evaluate(source)
        found = page.evaluate("async () => (await axe.run(document, {resultTypes: ['violations']})).violations")
        assert [(one["id"], one["nodes"][0]["html"][:120]) for one in found] == []


def test_it_prints(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["study"]) as page:
        page.emulate_media(media="print")
        assert not page.locator("nav").first.is_visible()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_the_browser_sees_no_more_than_the_file(pages: dict[str, Path]) -> None:
    """Under 5 MB, and a policy that forbids every request."""
    assert os.path.getsize(pages["study"]) < 5_000_000
    assert "default-src 'none'" in pages["study"].read_text(encoding="utf-8")
