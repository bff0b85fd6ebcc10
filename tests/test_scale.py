"""The tables of what published models would cost: their columns, and that sharing and recomputing never need more."""

from __future__ import annotations

import re
from pathlib import Path

from attnbench import scale

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
