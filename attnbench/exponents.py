"""How a cost grows with the number of tokens: its exponent with an interval, and where two costs cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
ALIKE = 0.05
"""How far from 1 a ratio may be and yet say nothing."""


@dataclass(frozen=True)
class Exponent:
    """cost ∝ n^value: the least-squares line through (log n, log cost), with a t interval; no interval below 3 points.

    The points are medians at different n, so that the interval holds what the line leaves over: noise and curvature.
    """

    value: float
    low: float | None
    high: float | None
    points: int


@dataclass(frozen=True)
class Crossover:
    """The side from which on a cost is below the baseline's: `side`, and the range that the quartiles leave open.

    side is None where it is not within the measured sides: `always` below, `alike` at all of them, or never; it is
    interpolated. `low` and `high` are measured sides, for nobody knows what lies between two: `high` is None beyond the
    measured, both where there is no range (`ranged`).
    """

    side: float | None
    low: float | None
    high: float | None
    always: bool = False
    ranged: bool = True
    alike: bool = False

    def text(self) -> str:
        """In words."""
        if self.alike:
            return "about the same"
        if self.always:
            return "at every measured side"
        if self.side is None:
            return "not within the measured sides"
        if not self.ranged:
            return f"{self.side:.0f} (no range)"
        high = "or more" if self.high is None else f"to {self.high:.0f}"
        return f"{self.side:.0f} ({self.low:.0f} {high})"


@dataclass(frozen=True)
class Ratio:
    """A cost over the baseline's at one side: median and quartiles of the ratios of runs taken in turn.

    A single turn has no quartiles.
    """

    side: float
    median: float
    low: float | None
    high: float | None

    @property
    def tells(self) -> bool:
        """Whether it says which of the two costs less: further from 1 than ALIKE, and all quartiles on one side."""
        ends = self.median, self.low or self.median, self.high or self.median
        return abs(self.median - 1) > ALIKE and (max(ends) < 1 or min(ends) > 1)


def exponent(tokens: Sequence[float], costs: Sequence[float], level: float = LEVEL) -> Exponent | None:
    """The exponent of positive costs against tokens; None for fewer than two different numbers of tokens."""
    from scipy import stats

    points = [(math.log(n), math.log(c)) for n, c in zip(tokens, costs, strict=True) if n > 0 and c > 0]
    if len({x for x, _ in points}) < 2:
        return None
    x, y = zip(*points, strict=True)
    line = stats.linregress(x, y)
    if len(points) < 3:
        return Exponent(float(line.slope), None, None, len(points))
    reach = float(stats.t.ppf(0.5 + level / 2, len(points) - 2)) * float(line.stderr)
    return Exponent(float(line.slope), float(line.slope) - reach, float(line.slope) + reach, len(points))


def last_exponent(tokens: Sequence[float], costs: Sequence[float]) -> float | None:
    """The exponent between the two largest numbers of tokens alone, where what is constant weighs least."""
    largest = sorted(set(tokens))[-2:]
    points = [(n, c) for n, c in zip(tokens, costs, strict=True) if n in largest]
    found = exponent([n for n, _ in points], [c for _, c in points])
    return found.value if found else None


def crossover(ratios: Sequence[Ratio]) -> Crossover:
    """Where the ratio falls below 1 for good, between measured sides along a line in (log side, log ratio).

    What does not tell is chance. Where no ratio tells, the costs are alike; a crossing needs one after it that does;
    and where the first ratios do not, though below 1, the crossing is put at the first side that does.

    The range is from the last measured side before the lower quartile's line crosses to the first one after the upper
    quartile's does; there is none where a ratio has no quartiles.
    """
    points = sorted(ratios, key=lambda ratio: ratio.side)
    if points and not any(point.tells for point in points):
        return Crossover(None, None, None, alike=True)
    last = max((i for i, point in enumerate(points) if point.median >= 1), default=-1)
    first = next((i for i, point in enumerate(points) if i > last and point.tells), None)
    if first is None:
        return Crossover(None, None, None)
    if last < 0:
        below = points[first].side
        return Crossover(below, points[first - 1].side, below) if first else Crossover(None, None, None, always=True)
    side = _falls_below([(p.side, p.median) for p in points])
    lows = [(p.side, p.low) for p in points if p.low is not None]
    highs = [(p.side, p.high) for p in points if p.high is not None]
    if min(len(lows), len(highs)) < len(points):
        return Crossover(side, None, None, ranged=False)
    low, high = _falls_below(lows), _falls_below(highs)
    sides = [point.side for point in points]
    return Crossover(
        side,
        None if low is None else max(one for one in sides if one <= low),
        None if high is None else min(one for one in sides if one >= high),
    )


def _falls_below(points: Sequence[tuple[float, float]]) -> float | None:
    """The side after which no ratio is 1 or more; the first side if none is, None if the last one still is."""
    above = [i for i, (_, ratio) in enumerate(points) if ratio >= 1]
    if not points or not above:
        return points[0][0] if points else None
    last = above[-1]
    if last == len(points) - 1:
        return None
    (s0, r0), (s1, r1) = points[last], points[last + 1]
    share = math.log(r0) / (math.log(r0) - math.log(r1))
    return math.exp(math.log(s0) + share * (math.log(s1) - math.log(s0)))
