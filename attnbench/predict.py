"""Cost predicted without allocating anything: what a fake training step (trace.py) says, at any depth and size.

Layers repeat, so a deep model is traced at two small depths and continued along the line through them, stretch by
stretch of the step; where layers do not repeat, it is traced as it is. A stretch in the middle of a deep model has its
like among the first layers or the last: from one layer to the next what is alive grows, or falls, by the same.

A step of very many operations, which is that of a recurrence that walks the sequence, is traced at small heights of the
same width, or of a column where that is the same, and continued along a line too; the FLOPs of long sequences along
the parabola through three. A continuation is exact where the figure is such a polynomial; tests compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import product
from math import gcd, inf, isqrt, lcm
from typing import Any

from torch import nn

from attnbench import trace, variants
from attnbench.errors import Refusal
from attnbench.measure import Request
from models.mixer import Mixer

TRIED = 2**16
"""Slots up to which a count of operations is held against what shorter images say."""
PERIODS = (1, 2, 3, 4, 5, 6, 8)
"""After so many layers the kinds of layer may repeat."""

OPERATIONS = 5_000
"""A step of more for each layer is not traced at full height."""

MANY = 2**15
"""Slots beyond which another shape of image is looked for, of which fewer will do."""

STRAIGHT = 0.001
"""So much of the peak may the third of three heights lie beside the line through the others."""

TURNED = 64
"""A side at which units are what they are at larger ones: a loop's chunk may be as short as a small image."""

LONG = 2**13
"""FLOPs of longer sequences are continued from shorter ones: exact masks are counted pair by pair."""

Figures = dict[tuple[str, str], Fraction]
"""(stretch of the step, kind of memory) or ("model", "parameters" or "flops") -> its size."""


@dataclass(frozen=True)
class Prediction:
    """Parameters, forward FLOPs of an image, and the bytes by kind at the peak of a training step."""

    parameters: int
    flops: int
    kinds: dict[str, int]

    @property
    def bytes(self) -> int:
        """The peak."""
        return sum(self.kinds.values())


class Predictor:
    """Predictions for one model at any size."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._walked = variants.attends(request.config.variant)
        """Whether the model has mixers; others are taken as they are, at full depth and height."""
        self._depths = _small_depths(request) if self._walked else [request.config.model.depth]
        self._peaks = cache(self._memory)
        self._long = inf
        """Slots from which on a step was too long."""

    def __call__(self, height: int, width: int) -> Prediction:
        """Everything. Raises Refusal where no such model can be built."""
        model = self._deep([(d, _size(r, walked=self._walked)) for d, r in self._shallow(height, width)])
        size = {kind: round(figure) for (_, kind), figure in model.items()}
        return Prediction(size["parameters"], size["flops"], _worst(self._peaks(height, width)))

    def bytes(self, height: int, width: int) -> int:
        """The peak alone."""
        return sum(_worst(self._peaks(height, width)).values())

    def turns(self) -> list[int]:
        """The sides from which on a loop over the sequence takes more than one unit of some mixer's (Mixer.unit): it
        may then do its work anew in the backward pass, so that a larger square may need less."""
        mixers = _mixers(self._shallow(TURNED, TURNED)[-1][1]) if self._walked else []
        return sorted({isqrt(mixer.unit) + 1 for mixer in mixers if mixer.unit > 1})

    def _shallow(self, height: int, width: int) -> list[tuple[int, Request]]:
        """The models that are traced, by depth: two shallow ones where layers repeat."""
        request = replace(self._request, height=height, width=width)
        return [(d, _with_depth(request, d)) for d in self._depths]

    def _deep(self, points: list[tuple[int, Figures]]) -> Figures:
        return _continued(points, self._request.config.model.depth)

    def _memory(self, height: int, width: int) -> Figures:
        """The stretches' peaks."""
        shallow = self._shallow(height, width)
        points = self._whole(shallow[0][1])
        if not points and _is_as_a_column(shallow[0][1]):
            height, shallow = height * width, self._shallow(height * width, 1)
        (depth, shallowest), *others = shallow
        points = points or _confirmed(shallowest)
        heights = [h for h, _ in points]
        through = [(depth, _continued(points, height))]
        return self._deep(through + [(d, _continued(_at(r, heights), height)) for d, r in others])

    def _whole(self, request: Request) -> list[tuple[int, Figures]]:
        """The peaks at full height; none where that takes too many operations and may be told from fewer slots."""
        fewer = self._walked and (_small_heights(request, rows=1, slots=256) or _unit(request) > 1)
        slots = request.height * request.width
        if fewer and slots >= self._long:
            return []
        try:
            return [(request.height, _traced(request, OPERATIONS * request.config.model.depth if fewer else None))]
        except trace.TooLong:
            self._long = slots
            return []


def peak_bytes(request: Request) -> int:
    """The predicted peak of a training step. Raises Refusal where no such model can be built."""
    return Predictor(request).bytes(request.height, request.width)


def _worst(figures: Figures) -> dict[str, int]:
    """Bytes by kind in the stretch of the step that needs most."""
    places: dict[str, Counter[str]] = {}
    for (place, kind), size in figures.items():
        if place != "model":
            places.setdefault(place, Counter())[kind] = max(0, round(size))
    worst = max(places.values(), key=Counter.total)
    return {kind: worst[kind] for kind in trace.KINDS}


# --- the figures of one model as it is --------------------------------------------------------------------------------


def _at(request: Request, heights: Sequence[int]) -> list[tuple[int, Figures]]:
    return [(h, _traced(replace(request, height=h), None)) for h in heights]


def _confirmed(request: Request) -> list[tuple[int, Figures]]:
    """Two small heights, whose line a third has confirmed: a model may do otherwise from some size on (compute in
    groups, and again in the backward pass). Then taller ones, or the full height where there are none."""
    heights = _small_heights(request, rows=1, slots=256)
    if not heights:
        return _at(request, [request.height])
    points = _at(request, heights)
    while _beside(points) > STRAIGHT:
        first, step = points[2][0], 2 * (points[2][0] - points[1][0])
        if first + 2 * step >= request.height:
            return _at(request, [request.height])
        points = [points[2], *_at(request, [first + step, first + 2 * step])]
    return points[1:]


def _is_as_a_column(request: Request) -> bool:
    """Whether rows that fill the units of the mixers' loops are many, and a column of one pixel, of which any number
    does, has the same peak: tried on as few rows as fill two."""
    heights, width = _small_heights(request, rows=1, slots=256), request.width
    if heights and heights[-1] * width <= MANY:
        return False
    rows = min(-(-2 * _unit(request) // width), request.height)
    peaks = []
    for height, across in ((rows, width), (rows * width, 1)):
        try:
            peaks.append(sum(_worst(_traced(replace(request, height=height, width=across), None)).values()))
        except Refusal:  # an option is bound by the width
            return False
    return abs(peaks[0] - peaks[1]) <= STRAIGHT * peaks[0]


def _beside(points: list[tuple[int, Figures]]) -> float:
    """How far the peak of the third point lies beside the line through two others, as a part of it."""
    expected, found = (
        sum(_worst(figures).values()) for figures in (_continued(points[:2], points[2][0]), points[2][1])
    )
    return abs(expected - found) / found


def _traced(request: Request, limit: int | None) -> Figures:
    peaks = trace.step(request, limit).peaks
    return {(place, kind): Fraction(size) for place, kinds in peaks.items() for kind, size in kinds.items()}


def _size(request: Request, walked: bool) -> Figures:
    """Parameters and FLOPs; `walked`: of a model with mixers."""
    heights = _small_heights(request, rows=16, slots=1) if walked and request.height * request.width > LONG else []
    if not heights:
        return _counted(request)
    points = [(h, _counted(replace(request, height=h))) for h in heights]
    for height in _beyond(heights, request):
        if _continued(points, height) != _counted(replace(request, height=height)):  # a mask that reaches farther
            return _counted(request)
    return _continued(points, request.height)


def _beyond(heights: list[int], request: Request) -> list[int]:
    """Two taller heights in line with these, on which to try what they say: the next one, and one of about half."""
    stride = heights[1] - heights[0]
    half = heights[0] + stride * ((request.height // 2 - heights[0]) // stride)
    return [
        height
        for height in sorted({heights[-1] + stride, half})
        if heights[-1] < height < request.height and height * request.width <= TRIED
    ]


def _counted(request: Request) -> Figures:
    model: Any = trace.build(request)
    parameters = sum(p.numel() for p in model.parameters())
    return {("model", "parameters"): Fraction(parameters), ("model", "flops"): Fraction(model.flops())}


def _small_heights(request: Request, rows: int, slots: int) -> list[int]:
    """Three heights below the request's, or none, of `slots` slots at least, and each of as many more than the last.

    They leave the same rest as the request's height in `rows` and in the rows that fill the units of the mixers' loops,
    of which each height has at least two.
    """
    unit, width = _unit(request), request.width
    stride = lcm(rows, unit // gcd(width, unit))
    slots = max(slots, 2 * unit)
    stride *= -(-slots // (stride * width))
    first = request.height % stride
    first += stride if first < max(rows, -(-slots // width)) else 0
    heights = [first, first + stride, first + 2 * stride]
    return heights if heights[-1] < request.height else []


def _unit(request: Request) -> int:
    """Slots that fill the units of all of the mixers' loops."""
    return lcm(*(mixer.unit for mixer in _mixers(request)))


def _mixers(request: Request) -> list[Mixer]:
    """The model's; a whole model of other layers, whose widths may follow from its depth, has none."""
    return [module for module in trace.build(request).modules() if isinstance(module, Mixer)]


# --- from few layers to many ------------------------------------------------------------------------------------------


def _small(request: Request) -> Request:
    """Of few rows, as wide: an option may be bound by the width."""
    return replace(request, height=min(request.height, 8))


def _with_depth(request: Request, depth: int) -> Request:
    config = request.config
    return replace(
        request, config=config.model_copy(update={"model": config.model.model_copy(update={"depth": depth})})
    )


def _small_depths(request: Request) -> list[int]:
    """Two depths on whose line the request's lies, layer by layer, a period of layers apart; or the request's own."""
    depth, small = request.config.model.depth, _small(request)
    layers = cache(lambda d: _layers(_with_depth(small, d)))
    for period, periods in product(PERIODS, (1, 2)):
        first = depth % period + periods * period
        depths = [first, first + period]
        steps = (depth - first) // period
        if sum(depths) < depth and all(
            layers(depth)[k] == layers(first)[k] + steps * (layers(depths[1])[k] - layers(first)[k])
            for k in layers(depth) | layers(depths[1])
        ):
            return depths
    return [depth]


def _layers(request: Request) -> Counter[Any]:
    """How many modules there are of each kind, and what their own parameters hold; a kind is a class and plain settings
    but its number."""
    root = trace.build(request)
    found: Counter[Any] = Counter()
    for module in root.modules():
        if module is not root:
            found[kind(module)] += 1
            found[kind(module), "elements"] += sum(p.numel() for p in module.parameters(recurse=False))
    return found


def kind(module: nn.Module) -> tuple[Any, ...]:
    """What those have in common that cost the same: class and plain settings but the number of their layer."""
    settings = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str) and name not in ("index", "depth", "training")
    )
    return type(module).__name__, settings


def _continued(points: Sequence[tuple[int, Figures]], at: int) -> Figures:
    """The polynomial through the points, at another place, for each stretch that all have (Lagrange; exact)."""
    weights = []
    for x, _ in points:
        weight = Fraction(1)
        for other, _ in points:
            if other != x:
                weight *= Fraction(at - other, x - other)
        weights.append(weight)
    shared = set.intersection(*({place for place, _ in figures} for _, figures in points))
    keys = {key for _, figures in points for key in figures if key[0] in shared}
    return {
        key: sum((w * f.get(key, Fraction(0)) for w, (_, f) in zip(weights, points, strict=True)), Fraction(0))
        for key in keys
    }
