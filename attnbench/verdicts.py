"""Verdicts: a suite's declared rules applied to records, and nothing else. Another record, another verdict.

A rule says on which side of a threshold the effect is expected. Its interval lies wholly there: supported. Wholly on
the other side: refuted, or misstated where the statement is a fact that has a correction. Across the threshold, or with
too little run: undecided, with how many more seeds would decide. All rules of a claim are corrected together (Holm).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from attnbench import frame, stats
from attnbench.config import RunConfig
from attnbench.errors import Refusal, nearest
from attnbench.suite import Pair, Rule, Selector, Suite, shown

CLAIMS = ("C1", "C2", "C3", "C4", "C5", "S1", "S2")
VERDICTS = ("supported", "refuted", "undecided", "misstated")
CSV = ("claim", "verdict", "effect", "low", "high", "rule")

EQUAL = 0.05
"""Budgets are equal that differ by no more than this share: steps are whole numbers."""
EQUALLY = {"flops": "training_flops", "seconds": "seconds", "bytes": "train_peak_bytes"}
TIMES = {"seconds_per_image", "seconds"}
FEW = 4
"""Seeds below which their spread is too uncertain to plan with."""
_FREE: dict[str, set[str]] = {
    "steps": set(),
    "flops": {"train.steps", "train.warmup"},
    "seconds": {"train.steps", "train.warmup"},
    "bytes": {"model.dim"},
}
"""What a budget leaves free to differ."""


@dataclass(frozen=True)
class Part:
    """One pair of a rule: its effect, and the records that it came from."""

    label: str
    found: stats.Interval | None
    ids: tuple[str, ...]
    why_not: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a rule says of the records. `effect` to `high` are on the rule's own scale (a ratio for a ratio)."""

    claim: str
    suite: str
    rule: Rule
    verdict: str
    effect: float | None
    low: float | None
    high: float | None
    seeds: int
    units: int
    level: float
    more_seeds: int | None
    parts: tuple[Part, ...]
    correction: dict[str, str] | None
    why: str

    @property
    def ids(self) -> tuple[str, ...]:
        """The records that it stands on."""
        return tuple(dict.fromkeys(id for part in self.parts for id in part.ids))


class NotRun(Exception):
    """The records do not carry what a rule compares; the message says what is missing."""


@functools.lru_cache(maxsize=1)
def texts() -> dict[str, Any]:
    """claims.yaml: the claims in words, and the corrections."""
    found = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    return dict(found)


def judge(runs: pd.DataFrame, suites: Sequence[Suite]) -> list[Verdict]:
    """Every rule of every suite, the leading one of a claim first: of the highest-ranked suite that has records."""
    found: list[Verdict] = []
    for suite in suites:
        for claim in dict.fromkeys(rule.claim[:2] for rule in suite.rules):
            found += _claim(runs, suite, [rule for rule in suite.rules if rule.claim[:2] == claim])
    rank = {suite.name: suite.rank for suite in suites}
    return sorted(found, key=lambda v: (v.claim, v.effect is None, -rank[v.suite], v.suite))


def leading(found: Sequence[Verdict]) -> list[Verdict]:
    """One verdict a statement; a claim that no rule is declared for is left out."""
    return list({verdict.claim: verdict for verdict in reversed(found)}.values())[::-1]


def table(found: Sequence[Verdict]) -> pd.DataFrame:
    """verdicts.csv: a row a statement, columns CSV. Every claim has one, undecided where nothing was declared or run;
    its further statements have one where something was run for them."""
    shown = (verdict for verdict in leading(found) if verdict.claim in CLAIMS or verdict.effect is not None)
    rows = {verdict.claim: _csv_row(verdict) for verdict in shown}
    for claim in CLAIMS:
        rows.setdefault(claim, (claim, "undecided", None, None, None, "no rule is declared for it"))
    return pd.DataFrame([rows[claim] for claim in sorted(rows)], columns=list(CSV))


def rules(found: Sequence[Verdict]) -> pd.DataFrame:
    """rules.csv: every rule of every suite, with what it says, the seeds and records behind it, and why it is open."""
    rows = [(*_csv_row(v), v.rule.says, v.level, v.seeds, v.units, len(v.ids), v.more_seeds, v.why) for v in found]
    names = [*CSV, "says", "level", "seeds", "test_images", "records", "more_seeds", "why"]
    return pd.DataFrame(rows, columns=names)


def _csv_row(verdict: Verdict) -> tuple[Any, ...]:
    rule = f"{verdict.suite}: {verdict.rule.text()}"
    return verdict.claim, verdict.verdict, verdict.effect, verdict.low, verdict.high, rule


def _claim(runs: pd.DataFrame, suite: Suite, rules: Sequence[Rule]) -> list[Verdict]:
    """The verdicts of one claim's rules, corrected together."""
    measured = [_measure(runs, rule) for rule in rules]
    family = [
        (index, found, _scale(rules[index], rules[index].threshold))
        for index, (found, _, _) in enumerate(measured)
        if found is not None and not rules[index].exact
    ]
    alpha = min((1 - rules[index].level for index, _, _ in family), default=0.05)
    wide = stats.corrected([found for _, found, _ in family], [threshold for _, _, threshold in family], alpha)
    intervals = {index: one for (index, _, _), one in zip(family, wide, strict=True)}
    return [
        _verdict(suite.name, rule, intervals.get(index, found), parts, why)
        for index, (rule, (found, parts, why)) in enumerate(zip(rules, measured, strict=True))
    ]


def _measure(runs: pd.DataFrame, rule: Rule) -> tuple[stats.Interval | None, tuple[Part, ...], str]:
    """The rule's effect, its parts, and what is missing."""
    parts, tables, missing = [], [], []
    runs = _timed_alike(runs, rule)
    for pair in rule.pairs:
        try:
            values, ids = KINDS[rule.kind](runs, rule, pair)
        except NotRun as error:
            missing.append(str(error))
            parts.append(Part(pair.text(), None, (), str(error)))
            continue
        tables.append(values)
        parts.append(Part(pair.text(), stats.interval(values.to_numpy(), rule.level, exact=rule.exact), ids))
    if missing:
        return None, tuple(parts), "; ".join(dict.fromkeys(missing))
    parts = _corrected_parts(parts, rule)
    shared = sorted(set.intersection(*(set(values.index) for values in tables)))
    if not shared:
        return None, tuple(parts), "the pairs have no seed in common"
    same = len({values.shape[1] for values in tables}) == 1
    stacked = [(v if same else v.mean(axis=1).to_frame()).loc[shared].to_numpy() for v in tables]
    return stats.interval(np.mean(stacked, axis=0), rule.level, exact=rule.exact), tuple(parts), ""


def _timed_alike(runs: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """All runs; of a rule on times, those on the one machine, with as many threads, that has most seeds, then runs."""
    if rule.metric not in TIMES or runs.empty:
        return runs
    runs = frame.select(runs, rule.where)
    places = pd.Series([frame.place(record) for record in runs["record"]], index=runs.index, dtype=object)
    sizes = {where: (rows["seed"].nunique(), len(rows)) for where, rows in runs.groupby(places)}
    return runs[places == max(sizes, key=lambda where: sizes[where])] if sizes else runs


def _corrected_parts(parts: list[Part], rule: Rule) -> list[Part]:
    known = [part.found for part in parts if part.found is not None]
    wide = stats.corrected(known, [_scale(rule, rule.threshold)] * len(known), 1 - rule.level)
    return [replace(part, found=found) for part, found in zip(parts, wide, strict=True)]


def _verdict(suite: str, rule: Rule, found: stats.Interval | None, parts: tuple[Part, ...], why: str) -> Verdict:
    correction = texts()["corrections"].get(rule.correction) if rule.correction else None
    if found is None:
        return Verdict(
            rule.claim, suite, rule, "undecided", None, None, None, 0, 0, rule.level, None, parts, correction, why
        )
    verdict = decide(rule, found)
    more = stats.seeds_to_decide(found, _scale(rule, rule.threshold)) if verdict == "undecided" else None
    effect, low, high = (_unscale(rule, value) for value in (found.estimate, found.low, found.high))
    return Verdict(
        rule.claim, suite, rule, verdict, effect, low, high, found.seeds, found.units, found.level, more, parts,
        correction, _why(verdict, found, more),
    )  # fmt: skip


def decide(rule: Rule, found: stats.Interval) -> str:
    """supported, refuted (misstated where there is a correction) or undecided."""
    threshold = _scale(rule, rule.threshold)
    if found.low is None or found.high is None:
        return "undecided"
    above, below = found.low > threshold, found.high < threshold
    if above or below:
        if above == (rule.expects == "above"):
            return "supported"
        return "misstated" if rule.correction else "refuted"
    # An exact figure that equals the threshold does not exceed it.
    if rule.exact:
        return "misstated" if rule.correction else "refuted"
    return "undecided"


def _why(verdict: str, found: stats.Interval, more: int | None) -> str:
    if verdict != "undecided":
        return ""
    if found.low is None:
        return "one seed, or seeds that read the same, say nothing about the spread between seeds; more are needed"
    if more is None:
        return "no number of seeds up to 1,000 would be likely to decide it with these test images"
    if more == 0:
        return "a repetition with as many seeds would probably decide it"
    if found.seeds < FEW:
        return f"{found.seeds} seeds are too few to say how many more would decide it"
    return (
        f"about {more} more seed{'s' if more > 1 else ''} would decide it with a probability of {stats.POWER:.0%}, "
        "were the effect and its spread what they seem"
    )


def _scale(rule: Rule, value: float) -> float:
    """Ratios are compared as logarithms."""
    return math.log(value) if rule.kind == "ratio" else value


def _unscale(rule: Rule, value: float | None) -> float | None:
    if rule.kind == "correlation" and value is not None:
        return min(1.0, max(-1.0, value))
    return math.exp(value) if rule.kind == "ratio" and value is not None else value


def check(suite: Suite, variants: Collection[str]) -> None:
    """Raises Refusal for a rule that means nothing there is, and would wait for it for ever."""
    figures = (*frame.METRICS, *frame.DERIVED, "tokens", "height", "width", "lr")
    settings = (*frame.RUN, "data", "side", *frame.flat(RunConfig().model_dump()))
    corrections = texts()["corrections"]
    for rule in suite.rules:
        of = f"rule {rule.claim}: "
        for figure in (rule.metric, rule.against):
            _known(of, "figure", figure, figures)
        if rule.correction is not None:
            _known(of, "correction", rule.correction, corrections)
        for selector in (rule.where, *(side for pair in rule.pairs for side in (pair.these, pair.those or {}))):
            for path, value in selector.items():
                if not path.startswith(("model.options.", "data.options.")):
                    _known(of, "setting", path, settings)
                for name in value if isinstance(value, tuple) else (value,):
                    if path == "variant" and ":" not in str(name):
                        _known(of, "variant", str(name), variants)


def _known(of: str, what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise Refusal(f"{of}unknown {what} {name!r}; {nearest(name, known)}")


# The kinds of rules: from records to a table of effects, a row a seed and a column a test image (or a single column).

Kind = Callable[[pd.DataFrame, Rule, Pair], tuple[pd.DataFrame, tuple[str, ...]]]


def contrast(runs: pd.DataFrame, rule: Rule, pair: Pair) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """These minus those (of logarithms, for a ratio), paired by seed, and by test image where the figure allows it."""
    these, those = frame.select(runs, rule.where, pair.these), frame.select(runs, rule.where, pair.those or {})
    couples = coupled(these, those, rule, pair)
    if not couples:
        absent = [shown(name) for name, some in ((pair.these, these), (pair.those or {}, those)) if some.empty]
        raise NotRun(f"not run: {' and '.join(absent)}" if absent else "run under different settings or seeds only")
    tables = (
        [_images(a, b) for a, b in couples] if rule.metric == "nats_per_token" and rule.kind == "difference" else [None]
    )
    if all(one is not None for one in tables) and len({len(one) for one in tables if one is not None}) == 1:
        rows = [one for one in tables if one is not None]
    else:
        rows = [np.array([_gap(rule, a, b)]) for a, b in couples]
    values = pd.DataFrame(rows, index=[int(a.seed) for a, _ in couples]).dropna()
    if values.empty:
        raise NotRun(f"{rule.metric} was not measured")
    return values, tuple(id for a, b in couples for id in (a.id, b.id))


def free(rule: Rule, pair: Pair) -> set[str]:
    """The settings in which the two sides of a pair may differ."""
    return {*pair.these, *(pair.those or {}), *_FREE[rule.equal]} - {"variant"}


def coupled(these: pd.DataFrame, those: pd.DataFrame, rule: Rule, pair: Pair) -> list[tuple[Any, Any]]:
    """Runs of the same seed in the same context.

    Of several contexts, the one whose budgets are equal to the nearest percent, then with most seeds, then most steps.
    """
    without = free(rule, pair)
    others: dict[tuple[str, float], list[Any]] = {}
    for row in frame.rows(those):
        others.setdefault((frame.context_key(row.record, without), row.seed), []).append(row)
    contexts: dict[str, list[tuple[Any, Any]]] = {}
    for row in frame.rows(these):
        key = frame.context_key(row.record, without)
        partners = [other for other in others.get((key, row.seed), []) if other.id != row.id]
        partner = min(partners, key=lambda other: _unlike(row, other, rule), default=None)
        if partner is not None and _unlike(row, partner, rule) <= EQUAL:
            contexts.setdefault(key if rule.equal == "steps" else f"{key}{row.steps}", []).append((row, partner))
    if not contexts:
        return []

    def worth(rows: list[tuple[Any, Any]]) -> tuple[float, ...]:
        unlike = float(np.mean([_unlike(row, other, rule) for row, other in rows]))
        return -round(unlike, 2), len(rows), rows[0][0].steps, rows[0][0].tokens

    best = max(contexts.values(), key=worth)
    return list({row.seed: (row, match) for row, match in best}.values())


def _unlike(row: Any, other: Any, rule: Rule) -> float:
    """By how much the two differ in what must be equal, as a share; 0 where the context says it all."""
    if rule.equal == "steps":
        return 0.0
    left, right = getattr(row, EQUALLY[rule.equal]), getattr(other, EQUALLY[rule.equal])
    return abs(left - right) / max(left, right) if left > 0 and right > 0 else math.inf


def _images(a: Any, b: Any) -> np.ndarray | None:
    """Differences by test image; None where the two were not tested on the same images."""
    left, right = a.record.get("per_image_nats"), b.record.get("per_image_nats")
    same = frame.part(a.record, "data").get("checksum") == frame.part(b.record, "data").get("checksum")
    if not isinstance(left, list) or not isinstance(right, list) or len(left) != len(right) or not left or not same:
        return None
    both = frame.numbers([left, right])
    if both is None:
        return None
    found = both[0] - both[1]
    # The images must account for the reported mean: a changed number changes the verdict, wherever it was changed.
    agree = math.isclose(float(found.mean()), a.nats_per_token - b.nats_per_token, abs_tol=1e-4)
    return found if agree else None


def _gap(rule: Rule, a: Any, b: Any) -> float:
    left, right = getattr(a, rule.metric, math.nan), getattr(b, rule.metric, math.nan)
    if rule.kind == "difference":
        return float(left - right)
    return math.log(left / right) if left > 0 and right > 0 else math.nan


def exponent(runs: pd.DataFrame, rule: Rule, pair: Pair) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """For each seed the slope of log metric on log of `against`, less that of `those` where they are given."""
    found, ids = _slopes(runs, rule, pair.these)
    if pair.those is not None:
        other, more = _slopes(runs, rule, pair.those)
        found, ids = (found - other).dropna(), ids + more
    if found.empty:
        raise NotRun("no seed has both")
    return found.to_frame(), ids


def _slopes(runs: pd.DataFrame, rule: Rule, selector: Selector) -> tuple[pd.Series, tuple[str, ...]]:
    chosen = frame.select(runs, rule.where, selector).dropna(subset=[rule.metric, rule.against])
    chosen = chosen[(chosen[rule.metric] > 0) & (chosen[rule.against] > 0)]
    chosen = _best_context(chosen, {"side", "data", *selector} - {"variant"})
    chosen = _whole_seeds(chosen, chosen[rule.against])
    slopes, ids = {}, []
    for seed, rows in frame.by_seed(chosen):
        means = rows.groupby(rule.against)[rule.metric].mean()
        if len(means) >= 2:
            slopes[seed] = stats.slope(np.log(means.index.to_numpy(float)), np.log(means.to_numpy(float)))
            ids += rows["id"].tolist()
    if not slopes:
        raise NotRun(f"not run at two values of {rule.against} at least: {shown(selector)}")
    return pd.Series(slopes), tuple(ids)


def _whole_seeds(chosen: pd.DataFrame, points: pd.Series) -> pd.DataFrame:
    """The runs of the seeds that have as many different `points` as any: a seed of fewer would tell of others."""
    counts = points.groupby(chosen["seed"]).nunique()
    return chosen[chosen["seed"].isin(counts[counts == counts.max()].index)]


def _best_context(chosen: pd.DataFrame, without: set[str]) -> pd.DataFrame:
    """The runs of one context: the one with most seeds, then most runs, then most steps."""
    if chosen.empty:
        return chosen
    keys = pd.Series([frame.context_key(record, without) for record in chosen["record"]], index=chosen.index)
    sizes = {key: (rows["seed"].nunique(), len(rows), rows["steps"].max()) for key, rows in chosen.groupby(keys)}
    return chosen[keys == max(sizes, key=lambda key: sizes[key])]


def correlation(runs: pd.DataFrame, rule: Rule, pair: Pair) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """For each seed the rank correlation of the metric with `against` over every run that the pair selects."""
    chosen = frame.select(runs, rule.where, pair.these).dropna(subset=[rule.metric, rule.against])
    chosen = _whole_seeds(chosen, chosen["cell"])
    found = {
        seed: stats.rank_correlation(rows[rule.metric].tolist(), rows[rule.against].tolist())
        for seed, rows in frame.by_seed(chosen)
    }
    values = pd.Series(found, dtype=float).dropna()
    if values.empty:
        raise NotRun("fewer than three runs of a seed have both figures")
    return values.to_frame(), tuple(chosen["id"])


def rise_and_fall(runs: pd.DataFrame, rule: Rule, pair: Pair) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """For each seed the probe's accuracy at the best depth less that of the better end.

    The best depth and the better end are chosen on the other seeds: the best of several on its own seed is flattered.
    """
    chosen = frame.select(runs, rule.where, pair.these)
    chosen = _best_context(chosen[chosen["probe_depth"].notna()], set(pair.these) - {"variant"})
    probes = {int(row.seed): found for row in frame.rows(chosen) if len(found := frame.depths(row.record)) >= 3}
    if len(probes) < 2:
        raise NotRun("two seeds at least must have been probed at three depths or more")
    effects = {}
    for seed, own in probes.items():
        others = np.mean([found for other, found in probes.items() if other != seed], axis=0)
        effects[seed] = own[int(others.argmax())] - own[0 if others[0] > others[-1] else -1]
    return pd.Series(effects).to_frame(), tuple(chosen["id"])


KINDS: dict[str, Kind] = {
    "difference": contrast,
    "ratio": contrast,
    "exponent": exponent,
    "correlation": correlation,
    "rise-and-fall": rise_and_fall,
}
