"""Verdicts follow from records by declared rules: another record or another number, another verdict."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest

from attnbench import frame, suite, verdicts
from tests import synthetic_records as synthetic

STUDY = synthetic.study()
QUICK = suite.load("quick")


def judged(records: list[dict[str, Any]], *suites: suite.Suite) -> dict[str, dict[str, Any]]:
    table = verdicts.table(verdicts.judge(frame.frame(records), suites or [QUICK]))
    assert list(table.columns) == list(verdicts.CSV)
    return {row["claim"]: row for row in json.loads(table.to_json(orient="records"))}


def test_planted_effects_are_found() -> None:
    found = judged(STUDY)
    assert {claim: row["verdict"] for claim, row in found.items()} == {
        "C1": "supported", "C1a": "refuted", "C1b": "misstated", "C2": "supported", "C2d": "supported",
        "C3": "supported", "C3a": "misstated", "C3d": "supported", "C4": "supported", "C4a": "misstated",
        "C4e": "supported", "C5": "supported", "C5a": "undecided", "C5b": "refuted", "S1": "supported",
        "S2": "supported",
    }  # fmt: skip
    assert found["C4"]["low"] < -0.06 < found["C4"]["high"]
    assert found["C1"]["effect"] == pytest.approx(2.0, abs=0.05)
    assert "local2d against dense1d" in found["C4"]["rule"]


def test_no_records_leave_all_seven_undecided() -> None:
    found = judged([])
    assert set(verdicts.CLAIMS) <= set(found)
    assert {row["verdict"] for row in found.values()} == {"undecided"}
    assert {row["effect"] for row in found.values()} == {None}


def test_without_rules_every_claim_still_has_a_row() -> None:
    table = verdicts.table(verdicts.judge(frame.frame(STUDY), []))
    assert table["claim"].tolist() == sorted(verdicts.CLAIMS)


def test_deleting_a_variants_records_undoes_the_verdicts_that_stand_on_it() -> None:
    found = judged([done for done in STUDY if done["variant"] != "local2d"])
    assert found["C4"]["verdict"] == "undecided"
    assert found["C2"]["verdict"] == "undecided"
    assert found["C3"]["verdict"] == "supported"


def test_deleting_one_record_changes_the_interval() -> None:
    gone = next(d for d in STUDY if d["variant"] == "local2d" and d["seed"] == 4 and not d["config"]["measure"])
    before, after = judged(STUDY)["C4"], judged([done for done in STUDY if done is not gone])["C4"]
    assert (before["low"], before["high"]) != (after["low"], after["high"])


def test_a_changed_number_changes_the_verdict() -> None:
    """Also where the figures by image still tell the old story: the two must agree to be used together."""
    changed = copy.deepcopy(STUDY)
    for done in changed:
        if done["variant"] == "local2d" and done["config"]["train"]["steps"] == 250:
            done["metrics"]["nats_per_token"] += 0.2
    assert judged(changed)["C4"]["verdict"] == "refuted"


def test_changed_figures_by_image_change_the_verdict() -> None:
    changed = copy.deepcopy(STUDY)
    for done in changed:
        if done["variant"] == "local2d" and done["config"]["train"]["steps"] == 250:
            done["metrics"]["nats_per_token"] += 0.2
            done["per_image_nats"] = [value + 0.2 for value in done["per_image_nats"]]
    assert judged(changed)["C4"]["verdict"] == "refuted"


def test_a_fact_that_the_records_bear_out_is_no_misstatement() -> None:
    changed = copy.deepcopy(STUDY)
    for done in changed:
        done["metrics"]["parameters"] *= (done["data"]["height"] / 8) ** 4
    found = judged(changed)
    assert found["C1b"]["verdict"] == "supported"
    assert found["C1b"]["effect"] == pytest.approx(2.0)


def test_few_and_noisy_seeds_are_undecided_and_say_how_many_more() -> None:
    records = [synthetic.one(v, s) for v in ("dense1d", "local2d") for s in range(4)]
    for done in records:
        if done["variant"] == "local2d":
            done["metrics"]["nats_per_token"] += (0.0, 0.05, 0.1, 0.02)[done["seed"]]

    def judge(seeds: int) -> verdicts.Verdict:
        few = [done for done in records if done["seed"] < seeds]
        return next(v for v in verdicts.judge(frame.frame(few), [QUICK]) if v.claim == "C4")

    found = judge(4)
    assert found.verdict == "undecided"
    assert found.more_seeds is not None and found.more_seeds > 0
    assert f"about {found.more_seeds} more seed" in found.why
    assert judge(3).verdict == "undecided" and "3 seeds are too few to say" in judge(3).why


def test_one_seed_is_undecided() -> None:
    found = judged([synthetic.one(v, 0) for v in synthetic.EFFECTS])
    assert found["C4"]["verdict"] == "undecided"
    assert found["C4"]["effect"] == pytest.approx(-0.06, abs=0.03)
    assert found["C4"]["low"] is None
    assert found["C4a"]["verdict"] == "misstated", "parameters need no second seed"


def test_runs_of_other_contexts_are_not_compared() -> None:
    """dense1d at 250 steps, local2d at 250 steps of another width: nothing to pair."""
    records = [synthetic.one("dense1d", s) for s in range(3)]
    records += [synthetic.one("local2d", s, settings={"model": {"dim": 64}}) for s in range(3)]
    assert judged(records)["C4"]["verdict"] == "undecided"


def test_a_named_variant_means_it_as_it_comes() -> None:
    extra = [synthetic.one("local2d", s, nats=9.0, settings={"model": {"options": {"radius": 1}}}) for s in range(5)]
    assert judged(STUDY + extra)["C4"] == judged(STUDY)["C4"]


def test_failed_runs_count_for_nothing() -> None:
    failed = [synthetic.one("local2d", s, status="nan", lr=0.1) for s in range(5)]
    assert judged(STUDY + failed)["C4"]["verdict"] == "supported"


def test_the_learning_rate_is_chosen_by_validation_and_not_by_the_test_images() -> None:
    lucky = [synthetic.one("local2d", s, lr=1e-2, nats=0.5) for s in range(5)]
    for done in lucky:
        done["metrics"]["validation_nats_per_token"] = 3.0
    assert judged(STUDY + lucky)["C4"] == judged(STUDY)["C4"]


def rule(**told: Any) -> suite.Rule:
    base = {"claim": "C4", "says": "x", "pairs": [{"these": {"variant": "local2d"}, "those": {"variant": "dense1d"}}],
            "expects": "below", "threshold": 0.01}  # fmt: skip
    return suite.Rule.model_validate(base | told)


def test_several_rules_of_a_claim_are_corrected_together() -> None:
    alone = suite.Suite(name="a", question="?", rules=(rule(),))
    many = suite.Suite(name="b", question="?", rules=(rule(), *(rule(claim=f"C4{c}") for c in "abcdef")))
    one, seven = (next(v for v in verdicts.judge(frame.frame(STUDY), [s]) if v.claim == "C4") for s in (alone, many))
    assert one.low is not None and seven.low is not None
    assert seven.low < one.low
    assert seven.level > one.level


def test_the_higher_ranked_suite_leads_where_it_has_records_only() -> None:
    low = suite.Suite(name="low", question="?", rank=0, rules=(rule(),))
    high = suite.Suite(name="high", question="?", rank=9, rules=(rule(threshold=-0.5),))
    none = suite.Suite(name="none", question="?", rank=99, rules=(rule(where={"data": "photos"}),))
    found = judged(STUDY, low, high, none)["C4"]
    assert found["rule"].startswith("high: ")
    assert found["verdict"] == "refuted"


def test_missing_pairs_leave_a_rule_undecided_and_are_named() -> None:
    pairs = [{"these": {"variant": v}, "those": {"variant": "dense1d"}} for v in ("local2d", "axial")]
    whole = suite.Suite(name="a", question="?", rules=(rule(pairs=pairs),))
    found = verdicts.judge(frame.frame(STUDY), [whole])[0]
    assert found.verdict == "undecided"
    assert "not run: axial" in found.why


def test_the_mean_over_pairs_is_the_effect() -> None:
    pairs = [{"these": {"variant": v}, "those": {"variant": "dense1d"}} for v in ("local2d", "linear")]
    whole = suite.Suite(name="a", question="?", rules=(rule(pairs=pairs),))
    found = verdicts.judge(frame.frame(STUDY), [whole])[0]
    estimates = [part.found.estimate for part in found.parts if part.found is not None]
    assert found.effect == pytest.approx(sum(estimates) / 2, abs=1e-9)
    assert len(estimates) == 2


def test_a_peak_that_is_chosen_on_other_seeds_is_not_found_in_noise() -> None:
    """Flat probes with noise: taking the best layer of the same seed would always 'rise and fall'."""
    records = copy.deepcopy([d for d in STUDY if d["variant"] == "dense1d" and d["config"]["train"]["steps"] == 250])
    import numpy as np

    draw = np.random.default_rng(0)
    for done in records:
        done["metrics"]["probe_accuracy"] = (0.8 + draw.normal(0, 0.02, 5)).tolist()
    assert judged(records)["S2"]["verdict"] != "supported"


def test_the_better_end_is_chosen_on_other_seeds_too() -> None:
    """Ends that differ by noise alone: the better one of a seed's own ends would always stand too high."""
    records = copy.deepcopy([d for d in STUDY if d["variant"] == "dense1d" and d["config"]["train"]["steps"] == 250])
    for sign, done in zip(itertools.cycle((1, -1)), records, strict=False):
        done["metrics"]["probe_accuracy"] = [0.8 + 0.1 * sign, 0.85, 0.9, 0.85, 0.8 - 0.1 * sign]
    (found,) = (
        v for v in verdicts.judge(frame.frame(records), [suite.load("quick")]) if v.rule.kind == "rise-and-fall"
    )
    assert found.effect is not None and found.effect >= 0.1


def test_times_of_other_threads_are_not_mixed() -> None:
    """Two seeds on one thread, a third on two, which is as fast at every side: mixed, no interval would be of use."""
    records = [
        synthetic.one("dense1d", s, side=side, steps=1, cost=True, data="source:above",
                      settings={"train": {"batch": 4}}) for s in range(3) for side in (8, 16, 32)
    ]  # fmt: skip
    for done in records:
        done["environment"]["threads"] = 2 if done["seed"] == 2 else 1
        if done["seed"] == 2:
            done["metrics"]["train_images_per_second"] = 100.0
    found = next(v for v in verdicts.judge(frame.frame(records), [QUICK]) if v.claim == "C1")
    assert found.seeds == 2 and found.effect == pytest.approx(2.0, abs=0.1)


def test_of_several_contexts_the_one_with_equal_budgets_is_judged() -> None:
    """400 steps of either are within five percent in FLOPs, and have more seeds; 415 are as many."""

    def made(variant: str, steps: int, seed: int, nats: float, cost: float) -> dict[str, Any]:
        done = synthetic.one(variant, seed, steps=steps, nats=nats)
        done["metrics"] |= {"train_flops_per_image": cost}
        return done

    dense = [made("dense1d", 400, s, 1.4, 1.0) for s in range(5)]
    near = [made("local2d", 400, s, 1.4, 0.96) for s in range(5)]
    equal = [made("local2d", 416, s, 1.3, 0.96) for s in range(3)]
    whole = suite.Suite(name="a", question="?", rules=(rule(equal="flops"),))
    (found,) = verdicts.judge(frame.frame([*dense, *near, *equal]), [whole])[:1]
    assert found.seeds == 3 and found.effect == pytest.approx(-0.1, abs=0.02)


def test_every_verdict_is_one_of_four_and_texts_exist_for_all() -> None:
    told = verdicts.texts()
    assert set(told["claims"]) == set(verdicts.CLAIMS)
    for found in verdicts.judge(frame.frame(STUDY), suite.packaged()):
        assert found.verdict in verdicts.VERDICTS
        assert (found.verdict == "misstated") <= (found.correction is not None)
