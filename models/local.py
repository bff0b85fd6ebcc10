"""Local attention: exact softmax over the pixels nearby, along the raster or on the grid."""

from __future__ import annotations

from torch import Tensor

from . import backends, geometry, kernels
from .geometry import Predicate, Tiles
from .mixer import ExactMixer, Layer, ScoreBias
from .registry import positive, variant

SMALL = 2**18
"""Numbers of working rows that no image is too small for."""


@variant(
    "local1d",
    family="local",
    time="O(n·w)",
    memory="O(n)",
    summary="the last `window` pixels of the raster",
    reference="Parmar et al., Image Transformer, ICML 2018 (1D local attention)",
)
class Local1D(ExactMixer):
    """A target sees the start token and the `window` pixels before it; with window < width never the pixel above."""

    backends = ("blocked", "flex", "xformers", "math")

    def __init__(self, layer: Layer, *, window: int = 16) -> None:
        self.window = positive("window", window)  # before the base asks whether a backend can serve it
        super().__init__(layer)

    def visible(self) -> Predicate:
        return geometry.window1d(self.layer.scan, self.window)

    def tiles(self) -> Tiles:
        return geometry.runs(self.layer.scan, self.window)

    def refusals(self, backend: str) -> list[str]:
        if backend == "xformers":
            return backends.xformers_reasons(self.layer.scan, self.window, self.layer.biased)
        return super().refusals(backend)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None) -> Tensor:
        if self.backend == "xformers":
            return backends.xformers(q, k, v, backends.xformers_bias(self.layer.scan, self.window))
        return super().forward(q, k, v, bias)


@variant(
    "local2d",
    family="local",
    time="O(n·R²)",
    memory="O(n)",
    summary="the raster-earlier pixels at most `radius` rows and columns away",
    reference="Ramachandran et al., Stand-Alone Self-Attention in Vision Models, NeurIPS 2019",
)
class Local2D(ExactMixer):
    """A target sees the start token and 2R² + 2R pixels (fewer at the borders): r - r' ≤ R, |c - c'| ≤ R, earlier.

    "compiled": a C++ kernel for CPU, float32 or float64, along the raster, with a bias by (Δrow, Δcol) or none.
    "triton": a kernel for CUDA, float32 or narrower, along the raster, without a bias.
    """

    backends = ("compiled", "triton", "blocked", "flex", "natten", "math")

    def __init__(self, layer: Layer, *, radius: int = 3) -> None:
        self.radius = positive("radius", radius)  # before the base asks whether a backend can serve it
        super().__init__(layer)
        self._offsets: tuple[Tensor, Tensor] | None = None

    def visible(self) -> Predicate:
        return geometry.window2d(self.layer.scan, self.radius)

    def tiles(self) -> Tiles:
        return geometry.patches(self.layer.scan, self.radius)

    def refusals(self, backend: str) -> list[str]:
        if backend == "natten":
            return backends.natten_reasons(self.layer.scan, self.radius, self.layer.biased)
        reasons = super().refusals(backend)
        if backend not in ("compiled", "triton"):
            return reasons
        scan = self.layer.scan
        if not scan.causal:
            reasons.append(f"serves objective 'ar' only, not {scan.objective!r}")
        if scan.order != "raster":
            reasons.append(f"reads along the raster only, not {scan.order!r}")
        if backend == "triton":
            biased = ["adds no bias to the scores"] if self.layer.biased else []
            reach = min(self.radius, max(scan.grid.height, scan.grid.width))
            return reasons + biased + kernels.window.reasons(self.layer.head_dim, reach)
        if self.layer.biased and not self.layer.by_offset:
            reasons.append("adds a bias to the scores by (Δrow, Δcol) only")
        rows = kernels.working_rows(scan.grid.height, scan.grid.width, self.radius)
        if rows > max(self.layer.size**2, SMALL):
            reasons.append(f"keeps {rows:,} numbers in working rows, more than a dense layer's scores")
        return reasons + kernels.reasons("local2d")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None) -> Tensor:
        if self.backend == "natten":
            return backends.natten(q, k, v, self.layer.scan, self.radius)
        window = self.layer.scan.grid.height, self.layer.scan.grid.width, self.radius
        if not kernels.serves(self, q, k, v):
            return super().forward(q, k, v, bias)
        if self.backend == "triton":
            return kernels.window.attend(q, k, v, *window)
        if bias is None:
            return kernels.local2d(q, k, v, *window)
        self._offsets = self._offsets or kernels.offsets(*window)
        return kernels.local2d(q, k, v, *window, bias(*self._offsets))
