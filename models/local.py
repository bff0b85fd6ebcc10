"""Local attention: exact softmax over the pixels nearby, along the raster or on the grid."""

from __future__ import annotations

from . import geometry
from .geometry import Predicate, Tiles
from .mixer import ExactMixer, Layer
from .registry import variant


@variant(
    "local1d",
    family="local",
    time="O(n·w)",
    memory="O(n)",
    summary="the last `window` pixels of the raster",
    reference="Parmar et al., Image Transformer, ICML 2018 (1D local attention)",
)
class Local1D(ExactMixer):
    """A target sees the start token and the `window` pixels before it; with window ≤ width never the pixel above."""

    def __init__(self, layer: Layer, *, window: int = 16) -> None:
        super().__init__(layer)
        self.window = positive("window", window)

    def visible(self) -> Predicate:
        return geometry.window1d(self.layer.scan, self.window)

    def tiles(self) -> Tiles:
        return geometry.runs(self.layer.scan, self.window)


@variant(
    "local2d",
    family="local",
    time="O(n·R²)",
    memory="O(n)",
    summary="the raster-earlier pixels at most `radius` rows and columns away",
    reference="Ramachandran et al., Stand-Alone Self-Attention in Vision Models, NeurIPS 2019",
)
class Local2D(ExactMixer):
    """A target sees the start token and 2R² + 2R pixels (fewer at the borders): r - r' ≤ R, |c - c'| ≤ R, earlier."""

    def __init__(self, layer: Layer, *, radius: int = 3) -> None:
        super().__init__(layer)
        self.radius = positive("radius", radius)

    def visible(self) -> Predicate:
        return geometry.window2d(self.layer.scan, self.radius)

    def tiles(self) -> Tiles:
        return geometry.patches(self.layer.scan, self.radius)


def positive(name: str, value: object) -> int:
    """The value, if it is a whole number of at least 1; else ValueError."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")
    return value
