"""Cost predicted without allocating anything: what a fake training step (trace.py) says, at any depth and size.

Layers repeat, so a deep model is traced at two small depths of the same parity and continued along the line through
them; where layers do not repeat, it is traced as it is. A step of very many operations, which is that of a recurrence
that walks the sequence, is traced at small heights of the same width and continued along a line too; the FLOPs of
long sequences along the parabola through three. A continuation is exact where the figure is such a polynomial; tests
compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from torch import nn

from attnbench import trace
from attnbench.measure import Request

SHALLOW = 8
"""Models up to this depth are traced as they are."""

PERIODS = (1, 2, 3, 4, 5, 6, 8)
"""After so many layers the kinds of layer may repeat."""

OPERATIONS = 6_000
"""A longer step is not traced at full height."""

STRAIGHT = 0.01
"""So much of the peak may the third of three heights lie beside the line through the others."""

LONG = 2**13
"""FLOPs of longer sequences are continued from shorter ones: exact masks are counted pair by pair."""

_walks: dict[str, int] = {}
"""Variants that turned out to have steps of too many operations, and at how many slots."""

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
        self._depths = _small_depths(request)

    def __call__(self, height: int, width: int) -> Prediction:
        """Everything. Raises Refusal where no such model can be built."""
        figures = self._deep(height, width, _memory) | self._deep(height, width, _size)
        model = {kind: round(size) for (place, kind), size in figures.items() if place == "model"}
        return Prediction(model["parameters"], model["flops"], _worst(figures))

    def bytes(self, height: int, width: int) -> int:
        """The peak alone."""
        return sum(_worst(self._deep(height, width, _memory)).values())

    def _deep(self, height: int, width: int, figures: Callable[[Request], Figures]) -> Figures:
        """The figures of the model, from two shallower ones of the same kinds of layers where there are such."""
        request = replace(self._request, height=height, width=width)
        if not self._depths:
            return figures(request)
        points = [(d, figures(_with_depth(request, d))) for d in self._depths]
        return _continued(points, request.config.model.depth)


def peak_bytes(request: Request) -> int:
    """The predicted peak of a training step. Raises Refusal where no such model can be built."""
    return Predictor(request).bytes(request.height, request.width)


def _worst(figures: Figures) -> dict[str, int]:
    """Bytes by kind in the stretch of the step that needs most."""
    places: dict[str, Counter[str]] = {}
    for (place, kind), size in figures.items():
        if place != "model":
            places.setdefault(place, Counter())[kind] = max(0, round(size))
    worst = max(places.values(), key=lambda kinds: kinds.total())
    return {kind: worst[kind] for kind in trace.KINDS}


# --- the figures of one model as it is --------------------------------------------------------------------------------


def _memory(request: Request) -> Figures:
    """The stretches' peaks, traced at full height or continued from small ones."""
    heights = _small_heights(request, rows=1, slots=256)
    size = request.height * request.width
    if not heights or size < _walks.get(request.config.variant, size + 1):
        try:
            return _traced(request, OPERATIONS if heights else None)
        except trace.TooLong:
            _walks[request.config.variant] = size
    return _walked(request, heights)


def _walked(request: Request, heights: list[int]) -> Figures:
    """From two heights, which a third must confirm: a model may do otherwise from some size on (compute in groups, and
    again in the backward pass). Then from taller ones, or at full height where there are none."""

    def traced(height: int) -> tuple[int, Figures]:
        return height, _traced(replace(request, height=height), None)

    points = [traced(h) for h in heights]
    while _beside(points) > STRAIGHT:
        first, step = points[2][0], points[1][0] - points[0][0]
        if first + 2 * step >= request.height:
            return _traced(request, None)
        points = [points[2], traced(first + step), traced(first + 2 * step)]
    return _continued(points[1:], request.height)


def _beside(points: list[tuple[int, Figures]]) -> float:
    """How far the peak of the third point lies beside the line through two others, as a part of it."""
    expected, found = (
        sum(_worst(figures).values()) for figures in (_continued(points[:2], points[2][0]), points[2][1])
    )
    return abs(expected - found) / found


def _traced(request: Request, limit: int | None) -> Figures:
    peaks = trace.step(request, limit).peaks
    return {(place, kind): Fraction(size) for place, kinds in peaks.items() for kind, size in kinds.items()}


def _size(request: Request) -> Figures:
    """Parameters and FLOPs."""
    heights = _small_heights(request, rows=16, slots=1) if request.height * request.width > LONG else []
    if not heights:
        return _counted(request)
    return _continued([(h, _counted(replace(request, height=h))) for h in heights], request.height)


def _counted(request: Request) -> Figures:
    model: Any = trace.build(request)
    parameters = sum(p.numel() for p in model.parameters())
    return {("model", "parameters"): Fraction(parameters), ("model", "flops"): Fraction(model.flops())}


def _small_heights(request: Request, rows: int, slots: int) -> list[int]:
    """Three heights below the request's, or none, each of `slots` slots more than the one before.

    They leave the same rest as the request's height in `rows` and in the rows that fill chunks of 64 slots.
    """
    stride = lcm(rows, 64 // gcd(request.width, 64))
    stride *= -(-slots // (stride * request.width))
    first = request.height % stride + stride
    heights = [first, first + stride, first + 2 * stride]
    return heights if heights[-1] < request.height else []


# --- from few layers to many ------------------------------------------------------------------------------------------


def _with_depth(request: Request, depth: int) -> Request:
    config = request.config
    return replace(
        request, config=config.model_copy(update={"model": config.model.model_copy(update={"depth": depth})})
    )


def _small_depths(request: Request) -> list[int]:
    """Two depths on whose line the request's lies, layer by layer, or none.

    They differ from it by even numbers of periods: the middle of the backward pass then lies at like places.
    """
    depth = request.config.model.depth
    if depth <= SHALLOW:
        return []
    small = replace(request, height=min(request.height, 8), width=min(request.width, 8))
    whole = _layers(small)
    for period in PERIODS:
        first = depth % (2 * period) + 4 * period
        depths = [first, first + 2 * period]
        if depths[1] >= depth:
            return []
        low, high = (_layers(_with_depth(small, d)) for d in depths)
        steps = (depth - first) // (2 * period)
        if all(whole[k] == low[k] + steps * (high[k] - low[k]) for k in whole | high):
            return depths
    return []


def _layers(request: Request) -> Counter[Any]:
    """How many modules there are of each kind: class, shapes of its own parameters, plain settings but its number."""
    root = trace.build(request)
    return Counter(_kind(module) for module in root.modules() if module is not root)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    shapes = tuple(tuple(p.shape) for p in module.parameters(recurse=False))
    settings = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str) and name not in ("index", "depth", "training")
    )
    return type(module).__name__, shapes, settings


def _continued(points: Sequence[tuple[int, Figures]], at: int) -> Figures:
    """The polynomial through the points, at another place, figure by figure (Lagrange; exact)."""
    weights = []
    for x, _ in points:
        weight = Fraction(1)
        for other, _ in points:
            if other != x:
                weight *= Fraction(at - other, x - other)
        weights.append(weight)
    keys = {key for _, figures in points for key in figures}
    return {
        key: sum((w * f.get(key, Fraction(0)) for w, (_, f) in zip(weights, points, strict=True)), Fraction(0))
        for key in keys
    }
