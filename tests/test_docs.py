"""What the documents say is true of the code: links resolve, commands exist, generated pages are fresh."""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest

import models
from attnbench import catalogue, checks, cli
from attnbench.checks import Subject, examine
from attnbench.config import RunConfig
from attnbench.errors import Refusal

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def broken_links(page: Path) -> list[str]:
    """Relative targets of links and pictures that do not exist."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    return [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def commands(text: str) -> list[tuple[str, str]]:
    """Module and flags of every command line, in a sentence or in a block, by itself or through torchrun."""
    # In a sentence a command may go on in the next line, in a block it ends with its own.
    sentences, blocks = text.split("```")[::2], text.split("```")[1::2]
    joined = [re.sub("`[^`]*`", lambda code: " ".join(code[0].split()), sentence) for sentence in sentences]
    found = re.findall(r"(?:python |torchrun [^`\n#|]*?)-m (attnbench\.\w+)([^`\n#|]*)", "\n".join(joined + blocks))
    return sorted(set(found))


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
    for module, words in commands(page.read_text()):
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
    """Its other examples are run: by tests/test_check.py (CONTRIBUTING's attention, own pictures) and by make run."""
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
        "[this](nowhere.md) and [that](page.md): `python -m attnbench.nothing`, `python -m attnbench.run --stepz 3`,\n"
        "`python -m\nattnbench.doctor\n--wrong`\n"
        "```sh\ntorchrun --nproc-per-node 8 -m attnbench.run --widez 4  # DDP\n```\n"
    )
    assert broken_links(page) == ["nowhere.md"]
    doctor, nothing, steps, wide = refused_commands(page, monkeypatch)
    assert nothing.startswith("attnbench.nothing") and "--stepz" in steps
    assert "--wrong" in doctor and "--widez" in wide


@pytest.mark.parametrize("options", [{}, {"columns": True}])
def test_the_variant_that_contributing_adds_holds(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```python\n( *# models/lines.py\n.*?)```", page, flags=re.DOTALL)
    monkeypatch.setattr(checks, "SHAPES", ((3, 5), (10, 9)))
    exec(textwrap.dedent(block), {"__name__": "models.lines", "__package__": "models"})
    try:
        for which in ("equals oracle", "visible is declared", "decoding equals full pass", "grows as declared"):
            verdict = examine(Subject("line", options), which)
            assert verdict.status == "passed", verdict.words
    finally:
        models.VARIANTS.pop("line", None)


def test_the_catalogue_is_fresh() -> None:
    """After a change of a variant: python -m attnbench.catalogue."""
    assert (ROOT / "docs/variants.md").read_text() == catalogue.page() + "\n"
