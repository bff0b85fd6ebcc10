"""The tables of what published models would cost: their columns, and that sharing and recomputing never need more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attnbench import scale, suite
from attnbench.config import RunConfig
from models import VARIANTS

FAMILIES = {name: variant.family for name, variant in VARIANTS.items()}
CONFIG = scale.ScaleConfig(variants=("dense1d",), presets=("igpt-s",), sides=(4, 16), gpus=(1, 8), memory=1.5)
ROOT = Path(__file__).resolve().parent.parent


def test_rooms_shrink_when_shared_and_recomputed() -> None:
    rows = [line for line in scale.page(CONFIG).splitlines() if re.match(r"\| \d+² ", line)]
    assert len(rows) == 2
    for row in rows:
        cells = row.strip("| ").split(" | ")
        alone, eight = ([float(x.strip("*")) for x in cell.split(" / ")] for cell in cells[3:5])
        assert alone[0] >= alone[1] > eight[1] and eight[0] >= eight[1]
        assert float(cells[5]) > float(cells[6]) > 0


def test_what_fits_is_bold_and_what_does_not_is_plain() -> None:
    assert scale._room(1.4e9, 1.5e9) == "**1.4**" and scale._room(1.6e9, 1.5e9) == "1.6"


def test_the_page_in_docs_is_of_this_generator() -> None:
    told = scale.ScaleConfig(variants=("dense1d", "local2d", "linear"), presets=())
    page = (ROOT / "docs" / "scale-figures.md").read_text()
    assert page.startswith(scale.page(told))
    assert len(re.findall(r"^\| \d+² ", page, re.M)) == 27


def test_a_suite_is_the_sum_of_its_runs() -> None:
    told = scale.ScaleConfig(suite="digits", gpus=(1, 2))
    (row,) = [line for line in scale.page(told).splitlines() if line.startswith("| digits |")]
    _, _, runs, flops, one, two, _ = (cell.strip() for cell in row.split("|"))
    assert runs == "160" and float(flops) > 1e14
    assert float(one) == pytest.approx(float(flops) / (989e12 * 0.4), rel=0.05)
    assert float(two) == pytest.approx(float(one) / 2, rel=0.1)


def test_the_page_of_the_reference_suite_names_every_suite() -> None:
    """After a change of suites: python -m attnbench.scale --suite reference --out docs/suite-figures.md."""
    page = (ROOT / "docs" / "suite-figures.md").read_text()
    known = suite.load("reference")
    counts = {name: len(suite.cells(suite.load(name), FAMILIES, RunConfig())) for name in known.includes}
    for name, count in counts.items():
        assert f"\n| {name} | {count} |" in page
