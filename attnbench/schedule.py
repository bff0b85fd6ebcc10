"""Which cells of a suite are to run now: all but what is done, and what waits for tuning or for a measurement.

A pure function of the suite and of the records, so that a sweep that was stopped goes on where it stood.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attnbench import record, suite
from attnbench.config import RunConfig
from attnbench.frame import Record, part
from attnbench.suite import Budget, Cell, Suite

FINISHED = ("ok", "nan")
"""Statuses that trying again would not change."""

Fit = Callable[[RunConfig, Budget], RunConfig | None]
"""Gives a run the steps (or width) that its budget allows; None where a measurement must come first."""


@dataclass(frozen=True)
class Schedule:
    """Where a suite stands. `ready` can run now; `waiting` cells are known but not their learning rate or steps yet."""

    done: tuple[Cell, ...]
    failed: tuple[Cell, ...]
    ready: tuple[Cell, ...]
    waiting: int

    @property
    def total(self) -> int:
        """All cells of the suite."""
        return len(self.done) + len(self.failed) + len(self.ready) + self.waiting


def schedule(whole: Suite, cells: Iterable[Cell], find: Callable[[str], Record | None], fit: Fit) -> Schedule:
    """Sorts the cells of a suite by what is known of them.

    `cells` are those of suite.cells; `find` gives the record of an id. Of a setting that is tuned, the first
    `tune.seeds` seeds run at every rate, the others at the rate that these found best, when all of them are in.
    """
    blocks = {block.name: block for block in whole.blocks}
    done: list[Cell] = []
    failed: list[Cell] = []
    ready: list[Cell] = []
    waiting = 0
    seen: set[str] = set()
    for group in _settings(cells).values():
        tune = blocks[group[0].block].tune
        for cell in _at_rates(group, tune.seeds if tune else 0, find, fit):
            if cell is None:
                waiting += 1
            elif (name := record.identify(cell.config)) not in seen:  # suites share cells; each is one run
                seen.add(name)
                state = find(name)
                finished = state is not None and state.get("status") in FINISHED
                (ready if state is None else done if finished else failed).append(cell)
    return Schedule(tuple(done), tuple(failed), tuple(sorted(ready, key=lambda c: c.config.seed)), waiting)


def _settings(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.key].append(cell)
    return groups


def _at_rates(group: list[Cell], tuning: int, find: Callable[[str], Record | None], fit: Fit) -> list[Cell | None]:
    """The runs of one setting; None for one that must wait."""
    seeds = list(dict.fromkeys(cell.config.seed for cell in group))
    explored = [_fitted(cell, fit) for cell in group if not tuning or cell.config.seed in seeds[:tuning]]
    if not tuning:
        return explored
    later = seeds[tuning:]
    losses = _losses(explored, find)
    if losses is None:
        return [*explored, *[None] * len(later)]
    if not losses:  # no rate ends well: there is nothing to repeat
        return list(explored)
    best = min(losses, key=lambda lr: losses[lr])
    chosen = {seed: next(c for c in group if c.config.seed == seed) for seed in later}
    repeats = [
        _fitted(cell.model_copy(update={"config": suite.at_rate(cell.config, best)}), fit) for cell in chosen.values()
    ]
    return [*explored, *repeats]


def _fitted(cell: Cell, fit: Fit) -> Cell | None:
    if cell.budget is None:
        return cell
    config = fit(cell.config, cell.budget)
    return None if config is None else cell.model_copy(update={"config": config})


def _losses(explored: list[Cell | None], find: Callable[[str], Record | None]) -> dict[float, float] | None:
    """Mean validation loss by learning rate, of the rates that always ended well; None while a try is missing."""
    found: dict[float, list[float]] = defaultdict(list)
    for cell in explored:
        done = find(record.identify(cell.config)) if cell is not None else None
        if cell is None or done is None:
            return None
        metrics = part(done, "metrics") if done.get("status") == "ok" else {}
        value = metrics.get("validation_nats_per_token")
        if value is None:  # a supervised run has a loss of its own
            value = metrics.get("validation_nats_per_label")
        found[cell.config.train.lr].append(math.inf if value is None else float(value))
    means = {lr: sum(values) / len(values) for lr, values in found.items()}
    return {lr: mean for lr, mean in means.items() if math.isfinite(mean)}
