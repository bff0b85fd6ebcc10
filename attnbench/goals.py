"""What a cost suite is run to find out, declared before it runs, and what its records say to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from attnbench.config import Settings
from attnbench.curves import label, rival_label

Scope = Literal["attention", "step"]


class Goal(Settings):
    """So many times as fast as another, or such a share of the matrix product's rate."""

    setting: str
    """Whose: its label, as the table has it."""
    scope: Scope
    side: PositiveInt
    phases: tuple[str, ...] = Field(min_length=1)
    """Whose seconds are added up."""
    than: str | None = None
    """The other's label."""
    times: PositiveFloat | None = None
    """At least so many times as fast."""
    share: PositiveFloat | None = None
    """At least such a share."""

    @model_validator(mode="after")
    def _one(self) -> Goal:
        if (self.than is None) != (self.times is None) or (self.times is None) == (self.share is None):
            raise ValueError("a goal is `than` and `times`, or `share`")
        return self


def judged(goal: Goal, records: Sequence[dict[str, Any]]) -> str:
    """In a line: what was reached, and whether that is the goal; or that it was not measured."""
    reached = _share(goal, records) if goal.share else _times(goal, records)
    what = f"{goal.setting} {goal.scope} {goal.side}, {' + '.join(goal.phases)}"
    if goal.share:
        says = f"{goal.share:.0%} of the matrix product's rate"
        found = "" if reached is None else f"{reached:.1%} of it: "
    else:
        says = f"{goal.times:.3g} times as fast as {goal.than}"
        found = "" if reached is None else f"{reached:.3g} times: "
    if reached is None:
        return f"{what}: at least {says}: not measured"
    fused = {record["metrics"].get("fused") for record in records if record["scope"] == goal.scope} - {None}
    served = f" (torch serves dense attention by {' and '.join(sorted(fused))})" if fused else ""
    verdict = "reached" if reached >= (goal.share or goal.times or 0) else "missed"
    return f"{what}: at least {says}: {found}{verdict}{served}"


def _phases(goal: Goal, records: Sequence[dict[str, Any]], setting: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of that setting at the goal's side, and its phases; of several the one with most; empty for none."""
    found = [
        (record, record["metrics"].get("phases", {}))
        for record in records
        if (label(record), record["scope"], record["side"]) == (setting, goal.scope, goal.side)
    ]
    return max(found, key=lambda one: len(one[1]), default=({}, {}))


def _times(goal: Goal, records: Sequence[dict[str, Any]]) -> float | None:
    """How many times as fast: by turns where the other is the baseline that it was timed beside."""
    record, own = _phases(goal, records, goal.setting)
    _, other = _phases(goal, records, str(goal.than))
    beside = bool(own) and rival_label(record) == goal.than and all("baseline" in timing for timing in own.values())
    those, side = (own, "baseline") if beside else (other, "own")
    if not all(phase in own and phase in those for phase in goal.phases):
        return None
    seconds = (sum(timings[phase][name]["median"] for phase in goal.phases)
               for timings, name in ((those, side), (own, "own")))  # fmt: skip
    slow, fast = seconds
    return float(slow / fast)


def _share(goal: Goal, records: Sequence[dict[str, Any]]) -> float | None:
    """The least of the phases'."""
    _, own = _phases(goal, records, goal.setting)
    shares = [own.get(phase, {}).get("share_of_product") for phase in goal.phases]
    return None if None in shares else float(min(shares))
