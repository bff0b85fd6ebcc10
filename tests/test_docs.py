"""What the documents say is true of the code: links resolve, commands exist, generated pages are fresh."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from attnbench import catalogue

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def broken_links(page: Path) -> list[str]:
    """Relative targets of links and pictures that do not exist."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    return [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def unknown_commands(page: Path) -> list[str]:
    """Modules that a page tells to run and that are not there."""
    told = set(re.findall(r"python -m (attnbench\.\w+)", page.read_text()))
    return sorted(module for module in told if importlib.util.find_spec(module) is None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_resolve(page: Path) -> None:
    assert not broken_links(page)
    assert not unknown_commands(page)


def test_the_checks_of_pages_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("see [this](nowhere.md) and [that](page.md), run `python -m attnbench.nothing`")
    assert broken_links(page) == ["nowhere.md"]
    assert unknown_commands(page) == ["attnbench.nothing"]


def test_the_catalogue_is_fresh() -> None:
    """After a change of a variant: python -m attnbench.catalogue."""
    assert (ROOT / "docs/variants.md").read_text() == catalogue.page() + "\n"
