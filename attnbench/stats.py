"""Intervals, corrections for many comparisons, ranks and power: everything said about a difference goes through here.

Every comparison is brought to one shape first, a table `values[seed, unit]` of paired differences: units are test
images where a figure is known image by image, and a single column where it is one number a seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
BySeed = Mapping[int, Values]
"""Seed: the figure of each unit (test image), or a single one."""

RESAMPLES = 2000
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Interval:
    """An estimate with its `level` interval; `low` and `high` are None where nothing can be said (one seed, no data).

    `error` is the standard error, of which `seed_error` and `unit_error` are the parts due to seeds and to test images;
    `freedom` the degrees of freedom of the t quantile; `seeds` and `units` how many of each there were.
    """

    estimate: float
    low: float | None
    high: float | None
    error: float
    seed_error: float
    unit_error: float
    freedom: float
    seeds: int
    units: int
    level: float

    def p_value(self, threshold: float = 0.0) -> float:
        """Two-sided probability of an estimate so far from `threshold` if that were true; 1 if nothing is known."""
        if self.low is None:
            return 1.0
        distance = abs(self.estimate - threshold)
        if self.error == 0:
            return 0.0 if distance else 1.0
        return 2 * _tail(distance / self.error, self.freedom)

    def at(self, level: float) -> Interval:
        """The same evidence at another level."""
        if self.low is None:
            return Interval(**{**self.__dict__, "level": level})
        reach = self.error and _quantile(0.5 + level / 2, self.freedom) * self.error
        ends = {"low": self.estimate - reach, "high": self.estimate + reach, "level": level}
        return Interval(**{**self.__dict__, **ends})


def interval(
    values: Values,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    exact: bool = False,
    images: tuple[float, int] = (0, 0),
) -> Interval:
    """Interval for the mean of `values` (seeds, units) by a hierarchical bootstrap: seeds, then units within them.

    The same test images serve every seed, so a resample draws seeds and images crosswise. With few seeds the plain
    percentile interval is far too narrow (three seeds never reach 95 %), so deviations are first widened by
    √(n / (n − 1)) (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015), and the bootstrap's standard
    error meets a t quantile whose degrees of freedom combine both levels (Satterthwaite, 1946). One seed, or seeds that
    all read the same (counts do, when few are counted), leave the spread between seeds unknown: no interval, unless the
    figure is `exact`, the same for every seed by definition.

    `images`: where a seed's value is of so many test images that are not told apart, its standard error by them, and
    their number.

    Raises ValueError on an empty table.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must be (seeds, units) and not empty, not {values.shape}")
    seeds, units = values.shape
    mean = float(values.mean())
    if exact:
        return Interval(mean, mean, mean, 0.0, 0.0, 0.0, math.inf, seeds, units, level)
    if seeds < 2 or np.ptp(values) == 0:
        return Interval(mean, None, None, math.nan, math.nan, math.nan, math.nan, seeds, units, level)
    by_seed, by_unit = _errors(values, resamples)
    by_unit, units = (by_unit, units) if units > 1 else (images[0], max(1, images[1]))
    error = math.hypot(by_seed, by_unit)
    freedom = _freedom((by_seed, seeds), (by_unit, units))
    found = Interval(mean, mean, mean, error, by_seed, by_unit, freedom, seeds, units, level)
    return found.at(level)


def _errors(values: Values, resamples: int) -> tuple[float, float]:
    """Standard errors of the mean from resampled seeds and from resampled units."""
    return _resampled(values.mean(axis=1), resamples), _resampled(values.mean(axis=0), resamples)


def _resampled(means: Values, resamples: int) -> float:
    count = len(means)
    if count < 2:
        return 0.0
    spread = math.sqrt(count / (count - 1))
    return float((_weights(count, resamples) @ ((means - means.mean()) * spread)).std())


@functools.lru_cache(maxsize=16)
def _weights(count: int, resamples: int) -> Values:
    """How often each of `count` is drawn in each resample, as shares: always the same, so that reports repeat."""
    draw = np.random.default_rng(count)
    return draw.multinomial(count, np.full(count, 1 / count), size=resamples) / count


def _freedom(*parts: tuple[float, int]) -> float:
    """Satterthwaite's degrees of freedom of a sum of variances, each an (error, count)."""
    total = sum(error**2 for error, _ in parts)
    below = sum(error**4 / (count - 1) for error, count in parts if count > 1 and error)
    return total**2 / below if below else math.inf


def unit_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval (BCa; Efron, 1987) of one run's mean over its test images: says nothing about other seeds."""
    from scipy.stats import bootstrap

    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2 or np.ptp(sample) == 0:
        return float(sample.mean()), float(sample.mean())
    found = bootstrap(
        (sample,), np.mean, confidence_level=level, n_resamples=1000, batch=100, rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float], alpha: float = 0.05) -> list[float]:
    """For each of several tests the alpha at which Holm (1979) holds it: rejected exactly where p <= that alpha.

    An interval at the level 1 − alpha so found excludes the threshold exactly where Holm's procedure rejects.
    """
    count = len(p_values)
    order = sorted(range(count), key=lambda i: p_values[i])
    alphas = [0.0] * count
    stopped: float | None = None
    for place, index in enumerate(order):
        own = alpha / (count - place)
        if stopped is None and p_values[index] > own:
            stopped = own
        alphas[index] = own if stopped is None else stopped
    return alphas


def corrected(found: Sequence[Interval], thresholds: Sequence[float], alpha: float = 0.05) -> list[Interval]:
    """The intervals widened so that all of them together err with probability `alpha` at most (Holm)."""
    p_values = [one.p_value(threshold) for one, threshold in zip(found, thresholds, strict=True)]
    return [one.at(1 - own) for one, own in zip(found, holm(p_values, alpha), strict=True)]


def ranks(values: Sequence[BySeed], alpha: float = 0.05) -> list[tuple[int, int]]:
    """Best and worst rank of each of several figures, less is better; all pairs are tested, with Holm's correction.

    Two are told apart only where the interval of their paired difference excludes 0; where none does, everyone's ranks
    are 1 to n.
    """
    count = len(values)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    differences = [paired(values[i], values[j]) for i, j in pairs]
    known = [
        (pair, interval(found, resamples=500)) for pair, found in zip(pairs, differences, strict=True) if found.size
    ]
    better, worse = [0] * count, [0] * count
    wide = corrected([found for _, found in known], [0.0] * len(known), alpha)
    for ((i, j), _), one in zip(known, wide, strict=True):
        if one.low is None or one.high is None or one.low <= 0 <= one.high:
            continue
        first, second = (i, j) if one.high < 0 else (j, i)
        worse[first] += 1
        better[second] += 1
    return [(1 + better[i], count - worse[i]) for i in range(count)]


def paired(left: BySeed, right: BySeed) -> Values:
    """left − right (seeds, units) on the seeds that both have; a single column where the units are not the same."""
    shared = sorted(left.keys() & right.keys())
    if not shared:
        return np.zeros((0, 1))
    if len({len(side[seed]) for side in (left, right) for seed in shared}) == 1:
        return np.asarray([left[seed] - right[seed] for seed in shared])
    return np.asarray([[left[seed].mean() - right[seed].mean()] for seed in shared])


def seeds_to_decide(found: Interval, threshold: float, power: float = POWER) -> int | None:
    """How many more seeds would separate the estimate from `threshold` with this power, if the estimate is right.

    None where the spread between seeds is unknown, or where MOST_SEEDS would not do: the test images are too few, or
    the effect is the threshold.
    """
    if found.low is None or not math.isfinite(found.error):
        return None
    distance = abs(found.estimate - threshold)
    for count in range(max(2, found.seeds), MOST_SEEDS + 1):
        by_seed = found.seed_error * math.sqrt(found.seeds / count)
        freedom = _freedom((by_seed, count), (found.unit_error, found.units))
        needed = _quantile(0.5 + found.level / 2, freedom) + _quantile(power, freedom)
        if distance >= needed * math.hypot(by_seed, found.unit_error):
            return count - found.seeds
    return None


def slope(log_x: Values, log_y: Values) -> float:
    """Least-squares slope of log y on log x: the exponent of a power law. NaN where x does not vary."""
    spread = log_x - log_x.mean()
    below = float((spread**2).sum())
    return float((spread * log_y).sum()) / below if below > 0 else math.nan


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation (1904); NaN where one of them does not vary."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    return float(np.corrcoef(_ranked(x), _ranked(y))[0, 1])


def _ranked(values: Sequence[float]) -> Values:
    """Ranks, ties sharing their mean rank."""
    _, place, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[place])


def pareto(points: Sequence[Sequence[float | None]]) -> list[bool]:
    """Which points no other is at least as good as in everything and better in something; less is better.

    A point with a coordinate that was not measured is not marked, and beats nobody.
    """
    known = [None if any(c is None or math.isnan(c) for c in p) else tuple(float(c or 0.0) for c in p) for p in points]
    rivals = [p for p in known if p is not None]

    def beaten(point: tuple[float, ...]) -> bool:
        return any(all(r <= p for r, p in zip(rival, point, strict=True)) and rival != point for rival in rivals)

    return [point is not None and not beaten(point) for point in known]


def _quantile(share: float, freedom: float) -> float:
    """Of Student's t. From scipy.special: scipy.stats takes a second to import."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))


def _tail(distance: float, freedom: float) -> float:
    """Probability that Student's t exceeds `distance`."""
    from scipy.special import ndtr, stdtr

    return float(ndtr(-distance) if math.isinf(freedom) else stdtr(freedom, -distance))
