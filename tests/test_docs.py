"""What the documents say is true of the code: links resolve, commands exist, generated pages are fresh."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from attnbench import catalogue, cli
from attnbench.config import RunConfig
from attnbench.errors import Refusal

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def broken_links(page: Path) -> list[str]:
    """Relative targets of links and pictures that do not exist."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    return [t for t in targets if "://" not in t and not (page.parent / t).exists()]


class Understood(Exception):
    """A command line was read; what it asks for is not done."""


def refused_commands(page: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Command lines of a page that the command does not understand, each with its reason."""
    read = cli.parse

    def understand(*given: Any, **more: Any) -> None:
        read(*given, **more)
        raise Understood

    monkeypatch.setattr(cli, "parse", understand)
    refused = []
    for module, words in sorted(set(re.findall(r"python -m (attnbench\.\w+)([^`\n#|]*)", page.read_text()))):
        try:
            importlib.import_module(module).main(shlex.split(words))
            refused.append(f"{module}{words}: reads no command line")
        except Understood:
            pass
        except (ImportError, AttributeError, Refusal) as error:
            refused.append(f"{module}{words}: {error}")
    return refused


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve_and_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not broken_links(page)
    assert not refused_commands(page, monkeypatch)


def test_the_settings_that_the_readme_shows_are_a_run(tmp_path: Path) -> None:
    """Its other examples are run: by tests/test_check.py (CONTRIBUTING's attention) and by make run."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    path = tmp_path / "settings.yaml"
    path.write_text(block)
    config = cli.parse(RunConfig, ["--config", str(path), "--train.steps", "7"])
    assert (config.variant, config.model.dim, config.model.options, config.train.steps) == (
        "local2d", 128, {"radius": 5}, 7,
    )  # fmt: skip


def test_the_checks_of_pages_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[this](nowhere.md) and [that](page.md): `python -m attnbench.nothing`, `python -m attnbench.run --stepz 3`"
    )
    assert broken_links(page) == ["nowhere.md"]
    nothing, run = refused_commands(page, monkeypatch)
    assert nothing.startswith("attnbench.nothing") and "--stepz" in run


def test_the_catalogue_is_fresh() -> None:
    """After a change of a variant: python -m attnbench.catalogue."""
    assert (ROOT / "docs/variants.md").read_text() == catalogue.page() + "\n"
