"""Fits on costs whose exponent and crossing are known, noise included; and those that come from records of cells."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest

from attnbench import afterwards, curves
from attnbench.exponents import Exponent, Ratio, crossover, exponent, last_exponent
from tests import synthetic_records as synthetic

SIDES = [16, 32, 64, 128, 256]
TOKENS = [float(s * s) for s in SIDES]


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
def test_a_pure_power(power: float) -> None:
    found = exponent(TOKENS, [3e-7 * n**power for n in TOKENS])
    assert found is not None and found.points == 5
    assert found.value == pytest.approx(power)
    assert found.low == pytest.approx(power) and found.high == pytest.approx(power)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """2,000 noisy lines: 95 % intervals hold the true exponent in 95 ± 1.5 % of them, 50 % ones in half."""
    draw = random.Random(0)
    hits = {0.95: 0, 0.5: 0}
    for _ in range(2000):
        costs = [n * draw.lognormvariate(0, 0.2) for n in TOKENS]
        for level in hits:
            found = exponent(TOKENS, costs, level)
            assert found is not None and found.low is not None and found.high is not None
            hits[level] += found.low <= 1 <= found.high
    assert hits[0.95] / 2000 == pytest.approx(0.95, abs=0.015)
    assert hits[0.5] / 2000 == pytest.approx(0.5, abs=0.04)


def test_curvature_widens_the_interval() -> None:
    """a + b·n² is no power of n; the interval says so."""
    found = exponent(TOKENS, [1e6 + n**2 for n in TOKENS])
    assert found is not None and found.low is not None and found.high is not None
    assert found.low < 1.7 < found.high and found.high - found.low > 0.5


def test_too_few_points() -> None:
    assert exponent([256.0], [1.0]) is None
    assert exponent([256.0, 256.0, 256.0], [1.0, 2.0, 3.0]) is None
    assert exponent([], []) is None
    assert exponent([256.0, 1024.0], [1.0, 4.0]) == Exponent(pytest.approx(1.0), None, None, 2)  # type: ignore[arg-type]


def test_the_last_exponent_forgets_a_constant() -> None:
    """n + 1,000 from 256 tokens on: 0.8 over all sides, 0.97 between the last two, whatever their order."""
    costs = [n + 1000 for n in TOKENS]
    whole, last = exponent(TOKENS, costs), last_exponent(TOKENS[::-1], costs[::-1])
    assert whole is not None and whole.value < 0.85
    assert last == pytest.approx(0.97, abs=0.005)
    assert last_exponent(TOKENS[:1], costs[:1]) is None and last_exponent([], []) is None


def test_crossing_of_two_powers() -> None:
    """n / n² · 2,500 falls below 1 at n = 2,500: side 50; on a log-log line the interpolation is exact."""
    ratios = [Ratio(s, *(2500 / s**2 * f for f in (1.0, 0.81, 1.21))) for s in SIDES]
    found = crossover(ratios)
    assert found.side == pytest.approx(50)
    assert (found.low, found.high) == (32, 64)
    assert found.text() == "50 (32 to 64)"


def test_not_within_the_measured_sides() -> None:
    assert crossover([Ratio(s, 2.0, 1.9, 2.1) for s in SIDES]).text() == "not within the measured sides"
    assert crossover([]).text() == "not within the measured sides"
    assert crossover([Ratio(s, 0.5, 0.4, 0.6) for s in SIDES]).text() == "at every measured side"


def test_a_cost_that_comes_back_does_not_cross_there() -> None:
    """Below, above, below: the crossing is the last."""
    ratios = [Ratio(s, r, r, r) for s, r in zip(SIDES, [0.5, 2.0, 2.0, 0.5, 0.4], strict=True)]
    found = crossover(ratios)
    assert found.side is not None and 64 < found.side < 128
    assert crossover([*ratios[:2], Ratio(64, 2.0, 0.9, 2.2)]).side is None


@pytest.mark.parametrize("single", range(2))
def test_a_single_turn_leaves_no_range(single: int) -> None:
    """Where one ratio has no quartiles nobody knows how far the crossing may be."""
    ratios = [Ratio(16, 2.0, 1.5, 2.5), Ratio(64, 0.5, 0.4, 0.6)]
    assert crossover(ratios).text() == "32 (16 to 64)"
    ratios[single] = Ratio(ratios[single].side, ratios[single].median, None, None)
    found = crossover(ratios)
    assert (found.low, found.high, found.text()) == (None, None, "32 (no range)")


def test_an_open_upper_end() -> None:
    found = crossover([Ratio(16, 2.0, 1.5, 2.5), Ratio(32, 0.5, 0.4, 0.6), Ratio(64, 0.9, 0.8, 1.1)])
    assert found.side is not None and found.low is not None and found.high is None
    assert found.text() == "23 (16 or more)"


def test_costs_that_differ_by_chance_are_about_the_same() -> None:
    """Medians a little below 1, or quartiles on both sides of it, are no crossing; only what tells is."""
    near = [Ratio(16, 0.96, 0.95, 0.97), Ratio(32, 0.7, 0.6, 1.1), Ratio(64, 1.04, None, None)]
    tells = Ratio(64, 0.9, 0.89, 0.91)
    assert crossover(near).text() == "about the same"
    assert crossover([*near[:2], tells]).text() == "64 (32 to 64)", "before that, chance"
    assert crossover([tells, Ratio(128, 0.96, 0.95, 0.97)]).text() == "at every measured side"
    above = Ratio(16, 1.2, 1.1, 1.3)
    assert crossover([above, near[1]]).text() == "not within the measured sides", "a crossing by chance"
    assert crossover([above, near[1], tells]).text() == "20 (16 to 64)"


# --- from records -----------------------------------------------------------------------------------------------------


def test_exponents_and_crossovers_come_from_records() -> None:
    def made(variant: str, side: int, seconds: float, ratio: float | None) -> dict[str, Any]:
        spread = {"median": seconds, "low": seconds, "high": seconds, "n": 3}
        phases: dict[str, Any] = {"forward": {"own": spread}}
        if ratio is not None:
            phases["forward"]["ratio"] = {"median": ratio, "low": ratio, "high": ratio, "n": 3}
        place = {"variant": variant, "scope": "attention", "side": side, "tokens": side**2}
        return {**place, "status": "ok", "metrics": {"peak_bytes": None, "phases": phases}}

    sides = (16, 32, 64, 128)
    records = [made("linear", s, 1e-6 * s**2, 2500 / s**2) for s in sides]
    points = curves.series(records)["linear", "attention", "forward"]
    fit = exponent([p["tokens"] for p in points], [p["cost"] for p in points])
    assert fit is not None and fit.value == pytest.approx(1.0)
    assert crossover([p["ratio"] for p in points]).side == pytest.approx(50)


def test_what_slowed_both_sides_of_a_cell_leaves_no_trace_in_its_exponent() -> None:
    """At each side one of the three cells ran on a busy machine, once that of the baseline itself."""

    def made(variant: str, side: int, busy: float) -> dict[str, Any]:
        seconds = {"dense1d": 1e-9 * side**4, "linear": 1e-7 * side**2, "axial": 1e-8 * side**3}
        spread = {name: {"median": busy * value, "low": 0, "high": 0, "n": 3} for name, value in seconds.items()}
        share = seconds[variant] / seconds["dense1d"]
        turns = {"baseline": spread["dense1d"], "ratio": {"median": share, "low": share, "high": share, "n": 3}}
        timings = {"own": spread[variant]} | (turns if variant != "dense1d" else {})
        place = {"variant": variant, "scope": "attention", "side": side, "tokens": side**2}
        return {**place, "status": "ok", "metrics": {"peak_bytes": None, "phases": {"forward": timings}}}

    slowed = {"linear": (1, 1, 3), "axial": (2, 1, 1), "dense1d": (1, 5, 1)}
    records = [made(name, side, busy) for name in slowed for side, busy in zip((16, 32, 64), slowed[name], strict=True)]
    found = {curve.label: curve.fit and curve.fit.value for curve in curves.curves(records)}
    assert found == pytest.approx({"linear": 1.0, "axial": 1.5, "dense1d": 2.0})


def test_the_exponent_is_that_of_1024_tokens_and_more_where_three_sides_have_them() -> None:
    """n + 2,000: 0.50 over all sides from 16 on, 0.65 from 32 on; where only two are as large, all are taken."""

    def made(side: int) -> dict[str, Any]:
        timing = {"median": 1e-6 * (side**2 + 2000), "low": 0, "high": 1, "n": 3}
        place = {"variant": "linear", "scope": "attention", "side": side, "tokens": side**2}
        return {**place, "status": "ok", "metrics": {"peak_bytes": None, "phases": {"forward": {"own": timing}}}}

    (curve,) = curves.curves([made(side) for side in (128, 64, 16, 32)])
    assert [point["side"] for point in curve.points] == [16, 32, 64, 128]
    assert [point["side"] for point in curve.fitted] == [32, 64, 128] and curve.fit is not None
    assert curve.fit.value == pytest.approx(0.65, abs=0.01) and curve.fit.points == 3
    whole = exponent([p["tokens"] for p in curve.points], [p["cost"] for p in curve.points])
    assert whole is not None and whole.value == pytest.approx(0.505, abs=0.01)
    (curve,) = curves.curves([made(side) for side in (16, 24, 32, 64)])
    assert len(curve.fitted) == 4


def test_a_phase_that_ended_before_its_cell_was_given_up_is_in_the_table(tmp_path: Path) -> None:
    """The forward pass at side 64 ended, its backward pass did not: given up is the one alone."""
    for side in (16, 32, 64):
        synthetic.cost_cell(tmp_path, "linear", side, 1e-6 * side**2, status="timeout" if side == 64 else "ok")
    synthetic.cost_cell(tmp_path, "linear", 128, 0.0, status="oom")
    table = afterwards.costs(tmp_path).set_index("cost")
    assert table.loc["forward", "sides"] == "16–64" and table.loc["forward", "given_up"] == "128 (oom)"


def test_the_report_has_a_table_of_the_cells(tmp_path: Path) -> None:
    """A row a cost; another shape, backend or machine is another row; what did not fit is named."""
    kept = functools.partial(synthetic.cost_cell, tmp_path)
    for side in (16, 32, 64, 128):
        kept("linear", side, 1e-6 * side**2)
        kept("linear", side, 1e-6 * side**2, threads=2, n=1, against=side < 128)
    kept("linear", 256, 0.0, status="oom")
    kept("linear", 512, 0.0, status="timeout")
    kept("axial", 64, 0.0, machine="B", status="crash")
    kept("linear", 16, 1.0, backend="blocked")
    kept("linear", 16, 1.0, machine="B")
    table = afterwards.costs(tmp_path)
    assert list(table["setting"]) == ["linear", "linear (blocked)", "linear", "linear", "axial"]
    assert list(table["given_up"].fillna("")) == ["256 (oom), 512 (timeout)", "", "", "", "64 (crash)"]
    table = table.dropna(subset="cost")
    assert list(table["machine"]) == list("AAAB") and list(table["threads"]) == [1, 1, 2, 1]
    first, twice = table.iloc[0], table.iloc[2]
    assert first["sides"] == twice["sides"] == "16–128" and first["exponent"] == pytest.approx(1.0)
    assert first["last_exponent"] == pytest.approx(1.0)
    assert first["ratio_to_baseline"] == 50 / 128 and (first["ratio_at_side"], twice["ratio_at_side"]) == (128, 64)
    assert (first["cheaper_from_side"], twice["cheaper_from_side"]) == ("50 (32 to 64)", "50 (no range)")
    assert list(table["n"]) == [3, 3, 1, 3]
    assert table.iloc[1]["sides"] == "16" and table["exponent"].isna().tolist() == [False, True, False, True]
