"""What cost records say: under which label, how each cost grows with the number of tokens, and where it is the less."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from attnbench.config import RunConfig
from attnbench.exponents import Exponent, Ratio, crossover, exponent, last_exponent

SHAPE = {"dim": 128, "depth": 6, "heads": 4}
"""The model, where no preset is named."""

BATCH = 2
"""Images at a time, where none are told."""

PRECISION: Literal["float32"] = "float32"
"""In which `--variants` are measured."""


def label(record: dict[str, Any]) -> str:
    """The variant as it was told to be, and of its model and training whatever differs from what `--variants` takes."""
    from attnbench import frame  # imports pandas, for which --help need not wait

    model, train = (record.get("config", {}).get(name, {}) for name in ("model", "train"))
    words = [frame.setting(record)]
    words += [f"{name} {model[name]}" for name, usual in SHAPE.items() if model.get(name, usual) != usual]
    if train.get("batch", BATCH) != BATCH:
        words.append(f"batch {train['batch']}")
    if train.get("precision", PRECISION) != PRECISION:
        words.append(train["precision"])
    if train.get("compile"):
        words.append("compiled")
    return " ".join(words)


def rival_label(record: dict[str, Any]) -> str:
    """That of the baseline which the record's variant is timed against: of the same shape, with nothing of its own."""
    config = record.get("config", {})
    model = config.get("model", {}) | {"options": {}, "backend": "auto"}
    return label({"variant": RunConfig().variant, "config": config | {"model": model}})


def by_place(records: Sequence[dict[str, Any]]) -> dict[tuple[str, float | None], list[dict[str, Any]]]:
    """(machine, threads) -> its cells, which alone make a curve; of an own attention those of its latest code."""
    from attnbench import frame

    found: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    latest: dict[tuple[Any, ...], Any] = {}
    for done in sorted(records, key=lambda done: str(frame.part(done, "environment").get("time"))):
        found.setdefault(frame.place(done), []).append(done)
        latest[frame.place(done), done.get("variant")] = done.get("code")
    return {
        place: [done for done in cells if done.get("code") == latest[place, done.get("variant")]]
        for place, cells in found.items()
    }


def series(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """(label, scope, phase or "memory") -> its points: side, tokens, cost, n, ratio to the baseline (Ratio or None).

    n: how many turns the cost is the median of. A time is the ratio to the baseline, taken by turns, times what the
    baseline takes in the median of all the cells that it was timed in, so that what slowed both leaves no trace.
    """
    base = RunConfig().variant
    usual = _usual(records)
    peaks = {(label(r), r["scope"], r["side"]): r["metrics"]["peak_bytes"] for r in records if r["variant"] == base}
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in records:
        name, place = label(r), {"side": r["side"], "tokens": r["tokens"]}
        for phase, timings in r["metrics"].get("phases", {}).items():
            told = timings.get("ratio")
            ratio = told and Ratio(r["side"], told["median"], *quartiles(told))
            times = 1.0 if name == rival_label(r) else told and told["median"]
            other = usual.get((rival_label(r), r["scope"], r["side"], phase))
            cost = other * times if other and times else timings["own"]["median"]
            point = place | {"cost": cost, "n": timings["own"]["n"], "ratio": ratio}
            found.setdefault((name, r["scope"], phase), []).append(point)
        peak, other = r["metrics"]["peak_bytes"], peaks.get((rival_label(r), r["scope"], r["side"]))
        if peak and peak > 0:
            share = Ratio(r["side"], peak / other, None, None) if other and r["variant"] != base else None
            found.setdefault((name, r["scope"], "memory"), []).append(place | {"cost": peak, "n": 1, "ratio": share})
    return found


def _usual(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int, str], float]:
    """What each baseline takes, by (label, scope, side, phase): the median over the cells that it was timed in."""
    found: dict[tuple[str, str, int, str], list[float]] = {}
    for r in records:
        side = "own" if label(r) == rival_label(r) else "baseline"
        for phase, timings in r["metrics"].get("phases", {}).items():
            if side in timings:
                key = rival_label(r), r["scope"], r["side"], phase
                found.setdefault(key, []).append(timings[side]["median"])
    return {key: statistics.median(times) for key, times in found.items()}


def quartiles(timing: dict[str, Any]) -> tuple[float | None, float | None]:
    """None of a single turn: older records repeat its value there."""
    return (timing["low"], timing["high"]) if timing["n"] > 1 else (None, None)


FROM = 1024
"""Tokens from which on the exponent is fitted, where three sides or more have as many: in fewer, constants weigh."""


class Curve(NamedTuple):
    """How one cost grows: its points by tokens, its exponent, its ratios to the baseline, and from where it is less.

    fitted: the points of the exponent; last: the exponent between the two largest sides alone.
    """

    label: str
    scope: str
    cost: str
    points: list[dict[str, Any]]
    fitted: list[dict[str, Any]]
    fit: Exponent | None
    last: float | None
    ratios: list[Ratio]
    cheaper_from: str | None


def curves(records: Sequence[dict[str, Any]]) -> Iterator[Curve]:
    """One for each series."""
    for names, found in series(records).items():
        points = sorted(found, key=lambda point: float(point["tokens"]))
        large = [point for point in points if point["tokens"] >= FROM]
        fitted = large if len(large) >= 3 else points
        grown = [p["tokens"] for p in fitted], [p["cost"] for p in fitted]
        ratios = [p["ratio"] for p in points if p["ratio"]]
        cheaper_from = crossover(ratios).text() if ratios else None
        yield Curve(*names, points, fitted, exponent(*grown), last_exponent(*grown), ratios, cheaper_from)
