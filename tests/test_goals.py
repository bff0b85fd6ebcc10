"""Goals of a cost suite: judged from records, by turns where there were any, and sound where they are declared."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from attnbench import cost, curves
from attnbench.cost import CostConfig
from attnbench.goals import Goal, judged


def goal(**told: Any) -> Goal:
    usual = {"setting": "local2d", "scope": "attention", "side": 128, "phases": ["forward", "backward"]}
    return Goal.model_validate(usual | ({"than": "dense1d", "times": 10} if "share" not in told else {}) | told)


def cell(variant: str, seconds: tuple[float, ...], beside: tuple[float, ...] = (), **told: Any) -> dict[str, Any]:
    phases: dict[str, Any] = {}
    for phase, own in zip(("forward", "backward"), seconds, strict=False):
        phases[phase] = {"own": {"median": own, "n": 3}, "share_of_product": own / 10}
    for timing, other in zip(phases.values(), beside, strict=False):
        timing["baseline"] = {"median": other, "n": 3}
    record = {"variant": variant, "scope": "attention", "side": 128, "metrics": {"phases": phases}, "config": {}}
    return record | told


def test_beside_the_baseline_it_is_its_seconds_there_that_count() -> None:
    """8.7 times as fast by turns, and 20 times by the baseline's own cell, which ran when the machine was slow."""
    records = [cell("dense1d", (10.0, 10.0)), cell("local2d", (0.25, 0.75), (2.2, 6.5))]
    said = judged(goal(), records)
    assert said == (
        "local2d attention 128, forward + backward: at least 10 times as fast as dense1d: 8.7 times: missed"
    )
    assert judged(goal(times=8.7), records).endswith("8.7 times: reached")


def test_against_another_it_is_that_ones_own_cell() -> None:
    records = [cell("linear", (1.0, 1.0), (9.0, 9.0)), cell("gla", (0.2, 0.2), (9.0, 9.0))]
    said = judged(goal(setting="linear", than="gla", times=0.333), records)
    assert said.endswith("at least 0.333 times as fast as gla: 0.2 times: missed")


def test_a_share_of_the_products_rate() -> None:
    records = [cell("local2d", (4.2, 3.9), metrics_of="both")]
    said = judged(goal(share=0.4), records)
    assert said.endswith("at least 40% of the matrix product's rate: 39.0% of it: missed")
    assert judged(goal(share=0.4, phases=["forward"]), records).endswith("42.0% of it: reached")


@pytest.mark.parametrize(
    "records",
    [
        [],
        [cell("local2d", (1.0,), (9.0,))],
        [cell("local2d", (1.0, 1.0))],
        [cell("local2d", (1.0, 1.0), (9.0, 9.0), side=64), cell("dense1d", (9.0, 9.0))],
    ],
)
def test_what_was_not_measured_is_not_judged(records: list[dict[str, Any]]) -> None:
    assert judged(goal(), records).endswith("as fast as dense1d: not measured")


def test_the_kernel_of_dense_attention_is_named() -> None:
    beside = cell("local2d", (1.0, 1.0), (9.0, 9.0))
    beside["metrics"]["fused"] = "cudnn_attention"
    assert judged(goal(), [beside]).endswith("9 times: missed (torch serves dense attention by cudnn_attention)")


@pytest.mark.parametrize("told", [{"times": None}, {"than": None}, {"share": 0.4, "times": 2, "than": "dense1d"}])
def test_a_goal_is_one_of_two(told: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        goal(**told)


def test_every_goal_that_is_declared_is_that_of_declared_cells() -> None:
    declared = cost.suite("gpu")
    known = {
        (curves.label(cost._identity(c)), c.scope, c.side, c.decoding) for c in cost.cells(CostConfig(suite="gpu"))
    }
    assert len(declared.goals) == 7
    for one in declared.goals:
        for name in filter(None, (one.setting, one.than)):
            assert (name, one.scope, one.side, one.scope == "step") in known, name
        assert set(one.phases) <= {"forward", "backward", "training"}
