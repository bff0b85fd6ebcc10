"""Tables that hold runs side by side take only such as differ in nothing else."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnbench import afterwards, figures, frame, page, record, suite, tables, verdicts
from tests import synthetic_records as synthetic

REFERENCE = Path(__file__).resolve().parent.parent / "results" / "reference"


def framed(*records: dict[str, Any]) -> Any:
    return frame.frame(records)


def test_scan_orders_are_compared_within_one_context() -> None:
    """Runs of another width, and those of a single step, are none of the table's."""
    snakes = [synthetic.one("dense1d", s, nats=1.5, settings={"scan": "snake"}) for s in range(3)]
    rasters = [synthetic.one("dense1d", s, nats=1.4) for s in range(3)]
    others = [synthetic.one("dense1d", s, nats=9.0, settings={"model": {"dim": 64}}) for s in range(3)]
    single = [synthetic.one("dense1d", s, nats=9.0, steps=1) for s in range(3)]
    (row,) = tables.scans(framed(*snakes, *rasters, *others, *single)).to_dict("records")
    assert row["raster"] == pytest.approx(1.4, abs=0.02) and row["snake"] == pytest.approx(1.5, abs=0.02)
    assert "snake" not in row["context"] and row["seeds"] == 3


def test_scan_orders_and_positions_are_compared_at_one_rate() -> None:
    """The rate that validation chose for the raster was not tried for the snake: the two differ in the rate too."""
    rasters = [synthetic.one("dense1d", s, lr=lr, nats=n) for s in range(3) for lr, n in ((5e-3, 1.4), (8e-3, 1.2))]
    snakes = [synthetic.one("dense1d", s, nats=1.5, settings={"scan": "snake"}) for s in range(3)]
    turned = [synthetic.one("dense1d", s, nats=1.3, settings={"position": "rope2d"}) for s in range(3)]
    runs = framed(*rasters, *snakes, *turned)
    assert set(runs.loc[runs["chosen"] & (runs["setting"] == "dense1d"), "lr"]) == {8e-3, 5e-3}
    (row,) = tables.scans(runs).to_dict("records")
    assert row["lr"] == 5e-3 and row["raster"] == pytest.approx(1.4, abs=0.02)
    (row,) = tables.positions(runs).to_dict("records")
    assert row["lr"] == 5e-3 and row["learned1d"] == pytest.approx(1.4, abs=0.02)


def test_a_correlation_without_an_interval_has_none() -> None:
    """Three lengths of training of two seeds rank alike: -1 twice, and nothing is known of other seeds."""
    records = [synthetic.one("dense1d", s, steps=steps) for s in range(2) for steps in (40, 120, 250)]
    for done in records:
        done["metrics"]["probe_accuracy_best"] = 1 - done["metrics"]["nats_per_token"] / 10
    runs = framed(*records)
    (row,) = tables.correlations(runs).to_dict("records")
    assert row["rank_correlation"] == -1
    assert math.isnan(row["rank_correlation_low"]) and math.isnan(row["rank_correlation_high"])


def test_a_ladder_needs_two_sides_of_one_context() -> None:
    """A side at another width is no rung, and a fitted growth does not lead over it."""
    rungs = [synthetic.one("dense1d", s, side=side, cost=True) for side in (8, 16) for s in range(2)]
    other = [synthetic.one("dense1d", s, side=32, cost=True, settings={"model": {"dim": 64}}) for s in range(2)]
    runs = framed(*rungs, *other)
    assert tables.ladder(runs)["side"].tolist() == ["8×8", "16×16"]
    (growth,) = tables.exponents(runs).to_dict("records")
    assert growth["sides"] == 2
    assert growth["exponent_seconds_per_image"] == pytest.approx(2.0, abs=0.1)
    assert tables.ladder(framed(*rungs[:2], *other)).empty


def test_growth_between_the_two_largest_sides_stands_beside_that_over_all() -> None:
    records = [synthetic.one("dense1d", s, side=side, cost=True) for side in (8, 16, 32) for s in range(2)]
    for done in records:
        if done["data"]["height"] == 8:  # what a small image costs anyway
            done["metrics"]["train_images_per_second"] /= 10
    (row,) = tables.exponents(framed(*records)).to_dict("records")
    assert row["last_exponent_seconds_per_image"] == pytest.approx(2.0, abs=0.1)
    assert row["exponent_seconds_per_image"] < 1.5


def test_a_position_is_tabled_with_the_options_that_its_attention_comes_with() -> None:
    plain = [synthetic.one("local2d", s, nats=1.4) for s in range(2)]
    turned = [synthetic.one("local2d", s, nats=1.3, settings={"position": "rope2d"}) for s in range(2)]
    narrow = [synthetic.one("local2d", s, nats=9.0, settings={"model": {"options": {"radius": 1}}}) for s in range(2)]
    (row,) = tables.positions(framed(*plain, *turned, *narrow)).to_dict("records")
    assert row["learned1d"] == pytest.approx(1.4, abs=0.02)


def test_radii_are_lines_of_their_own_and_a_window_of_the_sequence_is_no_radius() -> None:
    def one(variant: str, nats: float, **options: Any) -> dict[str, Any]:
        position = {"position": options.pop("position")} if "position" in options else {}
        return synthetic.one(variant, nats=nats, settings={"model": {"options": options}} | position)

    records = [one("local2d", 1.4), one("local2d", 1.5, radius=1), one("local1d", 9.0, window=24)]
    records += [one("local2d", 1.9, position="none"), one("local2d", 1.7, position="none", radius=1)]
    table = tables.radii(framed(*records))
    assert set(zip(table["setting"], table["radius"], strict=True)) == {
        ("local2d", 3.0), ("local2d", 1.0), ("local2d + none", 3.0), ("local2d + none", 1.0),
    }  # fmt: skip


def test_what_a_setting_costs_is_known_from_any_of_its_rates() -> None:
    """The rate that validation chose was not measured; another was, and no step of training costs more at a rate."""
    chosen = [synthetic.one("local2d", s, nats=1.2) for s in range(3)]
    older, measured = (synthetic.one("local2d", s, lr=1e-2, nats=1.6, cost=True) for s in (1, 0))
    for year, done in ((2025, older), (2026, measured)):
        done["environment"]["time"] = f"{year}-01-01T00:00:00+00:00"
    (row,) = tables.front(framed(*chosen, measured, older)).to_dict("records")
    assert row["train_peak_bytes"] == measured["metrics"]["train_peak_bytes"]
    assert row["lr"] == 5e-3 and row["rates_tried"] == 2
    tried = tables.tuning(framed(*chosen, measured, *[done | {"id": done["id"] + "x"} for done in chosen]))
    assert tried.set_index("lr")["chosen"].to_dict() == {5e-3: "yes", 1e-2: ""}


def test_pareto_says_by_what() -> None:
    """Memory counts where all have it; costs that print alike are equal."""
    known = [synthetic.one(v, 0, cost=True) for v in ("dense1d", "local2d")]
    assert page.compared(tables.front(framed(*known))) == "likelihood, FLOPs and peak memory"
    table = tables.front(framed(*known, synthetic.one("linear", nats=1.0)))
    assert page.compared(table) == "likelihood and FLOPs"
    known[0]["metrics"] |= {name: known[1]["metrics"][name] * 0.99999 for name in tables.COSTS[:2]}
    assert tables.front(framed(*known)).set_index("setting")["pareto"].to_dict() == {"local2d": "yes", "dense1d": ""}


def test_runs_that_differ_in_heads_or_precision_are_other_contexts() -> None:
    plain, heads = synthetic.one("dense1d"), synthetic.one("dense1d", settings={"model": {"heads": 8}})
    half = synthetic.one("dense1d", settings={"train": {"precision": "bfloat16"}})
    assert len({frame.context(done) for done in (plain, heads, half)}) == 3


def test_of_an_own_attention_the_latest_code_counts() -> None:
    old, new = (synthetic.one("my_own:Attention", nats=nats, cost=nats < 2) for nats in (1.5, 2.5))
    for name, done in (("1", old), ("2", new)):
        done |= {"id": name, "code": name}
        done["environment"]["time"] = f"2026-01-0{name}T00:00:00+00:00"
    (row,) = tables.summary(framed(old, new)).to_dict("records")
    assert row["nats_per_token"] == pytest.approx(2.5, abs=0.02)


def test_a_seed_that_lacks_a_side_does_not_bend_the_exponent() -> None:
    rule = suite.Rule(claim="C1", says="", kind="exponent", metric="seconds_per_image",
                      pairs=({"these": {"variant": "dense1d"}},), expects="above", threshold=1.5)  # type: ignore[arg-type]  # fmt: skip
    whole = [synthetic.one("dense1d", s, side=side, cost=True) for s in range(2) for side in (8, 16, 32)]
    part = [synthetic.one("dense1d", 2, side=side, cost=True) for side in (8, 16)]
    part[1]["metrics"]["train_images_per_second"] *= 100
    found, _ = verdicts.exponent(framed(*whole, *part), rule, rule.pairs[0])
    assert sorted(found.index) == [0, 1]


def test_a_lettered_claim_is_one_statement_whatever_suite_it_stands_in() -> None:
    said: dict[str, set[str]] = {}
    for rule in (rule for one in suite.packaged() for rule in one.rules if len(rule.claim) > 2):
        said.setdefault(rule.claim, set()).add(rule.says)
    assert {claim: words for claim, words in said.items() if len(words) > 1} == {}


def test_both_sides_of_a_comparison_were_tuned_alike() -> None:
    """As many learning rates tried on both sides of every pair that the reference judges by likelihood."""
    runs = frame.frame(record.read_all(REFERENCE)[0])
    rates = runs[runs["status"] == "ok"].groupby("cell")["lr"].nunique()
    unlike = []
    for rule in (rule for one in suite.packaged() for rule in one.rules):
        if rule.kind != "difference" or rule.metric != "nats_per_token" or "train.lr" in rule.where:
            continue
        for pair in rule.pairs:
            these, those = (frame.select(runs, rule.where, side or {}) for side in (pair.these, pair.those))
            couples = verdicts.coupled(these, those, rule, pair)
            cells = runs.set_index("id")["cell"]
            tried = {(rates[cells[a.id]], rates[cells[b.id]]) for a, b in couples}
            unlike += [(rule.claim, pair.text(), found) for found in tried if found[0] != found[1]]
    assert unlike == []


def test_what_was_done_with_trained_weights_is_told_with_what_they_are(tmp_path: Path) -> None:
    """By the run's record; weights that are nobody's run here keep their name, and two alike in words their ids."""
    runs = [synthetic.one("dense1d", seed, settings={"position": "rope2d"}) for seed in (0, 1)]
    sources = [*(done["id"] for done in runs), "others' weights"]
    for number, source in enumerate(sources):
        cut = {"source": source, "finetune": 0, "cost_nats_per_token": 0.5, "cost_low": 0.4, "cost_high": 0.6}
        about = {"id": f"cut-{number}", "status": "ok", "variant": "local2d", "data": {}, "metrics": {}}
        record.write(tmp_path / "surgery", about | {"surgery": cut | {"value": 1}})
        record.write(tmp_path / "transfer", about | {"transfer": {"source": source}})
    assert set(afterwards.surgery(tmp_path)["weights"]) == set(sources)
    synthetic.write(tmp_path, runs)
    words = "dense1d + rope2d, digits 8×8, 250 steps"
    cuts = afterwards.surgery(tmp_path).set_index("weights_of")
    assert cuts.loc[sources, "weights"].tolist() == [words, words, sources[-1]]
    assert cuts.loc[sources[0], "context"] == frame.context(runs[0])
    moved = afterwards.transfer(tmp_path).set_index("weights_of")
    assert moved.loc[sources, "setting"].tolist() == ["dense1d + rope2d", "dense1d + rope2d", "local2d"]
    (drawn,) = figures.pictures(framed(*runs), tmp_path, {"surgery"})
    assert all(f"{words} ({id}), under local2d" in drawn.svg for id in sources[:2])


def test_one_step_is_one_step() -> None:
    told = [frame.context(synthetic.one("dense1d", steps=steps)) for steps in (1, 2)]
    assert "layers of 32, 1 step of 32" in told[0] and "layers of 32, 2 steps of 32" in told[1]


def test_numbers_of_neighbours_on_a_front_stand_apart() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    canvas, axes = pyplot.subplots(figsize=(5.4, 3.8))
    front = np.array([[1.0, 2.0], [1.001, 1.999], [1.002, 1.998], [3.0, 1.0]])
    axes.plot(*front.T, "o")
    figures._number(axes, front, ["a", "b", "c", "d"])
    told = [axes.transData.transform(t.xy) * 72 / canvas.dpi + t.get_position() for t in axes.texts]
    pyplot.close(canvas)
    assert [t.get_text() for t in axes.texts] == ["1", "2", "3", "4"]
    assert min(math.dist(a, b) for a, b in itertools.combinations(told, 2)) > 9


def test_as_many_looks_as_settings_all_of_them_unlike() -> None:
    looks = figures._looks(50)
    assert len(set(looks)) == len(looks) == 50
    assert len({colour for colour, _ in looks[: figures.MOST_DOTS]}) == figures.MOST_DOTS


def test_a_figure_takes_any_name_and_says_which_lines_lie_on_one_another(tmp_path: Path) -> None:
    def one(variant: str, side: int, seed: int, bytes: float) -> dict[str, Any]:
        done = synthetic.one(variant, seed, side=side, cost=True)
        done["metrics"]["train_peak_bytes"] = bytes * side**2
        return done

    cases = (("dense1d", 1e4), ("$x_{$", 1.01e4), ("local2d", 2e4))
    records = [one(name, side, seed, size) for name, size in cases for side in (8, 16) for seed in range(2)]
    drawn = {picture.key: picture for picture in figures.pictures(framed(*records), tmp_path)}
    assert "the bar: from the least to the greatest of all seeds." in drawn["memory"].caption
    assert drawn["memory"].caption.endswith("Within 5 % of one another everywhere: dense1d, $x_{$.")
    assert "At the largest side: dense1d" in drawn["memory"].alt and "$x_{$" in drawn["cost"].svg
