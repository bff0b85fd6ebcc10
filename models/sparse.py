"""Sparse attention: exact softmax over a few keys, near and far, along the scan or on the grid.

Shapes: q, k, v, out (batch, heads, seq, head_dim); tiles (tiles, queries) and (tiles, keys) of slots.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import geometry
from .full import Dense
from .geometry import Predicate, Tiles
from .local import Local2D
from .mixer import ExactMixer, Layer, Mixer, ScoreBias, put_back, take
from .registry import positive, variant

Part = tuple[Tensor, Tensor, Tensor]
"""Query slots (tiles, queries), key slots (tiles, keys), mask (tiles, queries, keys)."""

_CHILD = "Child et al., Generating Long Sequences with Sparse Transformers, 2019"
sparse = partial(variant, family="sparse")


@sparse(
    "dilated2d",
    time="O(n·R²)",
    memory="O(n)",
    summary="as local2d on every `dilation`-th row and column",
    reference="Hassani & Shi, Dilated Neighborhood Attention Transformer, 2022",
)
class Dilated2D(ExactMixer):
    """A target sees the earlier pixels at 0, d, …, R·d rows and columns from it, d the dilation: with a dilation of 2
    none of its neighbours, in one layer."""

    def __init__(self, layer: Layer, *, radius: int = 3, dilation: int = 2) -> None:
        super().__init__(layer)
        self.radius, self.dilation = positive("radius", radius), positive("dilation", dilation)

    def visible(self) -> Predicate:
        return geometry.dilated2d(self.layer.scan, self.radius, self.dilation)

    def tiles(self) -> Tiles:
        return geometry.patches(self.layer.scan, self.radius, dilation=self.dilation)


@sparse(
    "block2d",
    time="O(n·memory)",
    memory="O(n)",
    summary="query blocks with memory above, left and right",
    reference="Parmar et al., Image Transformer, ICML 2018 (2D local attention)",
)
class Block2D(ExactMixer):
    """The pixels of a block × block square see what is earlier in it and in the `memory` pixels around it: under a
    raster scan above, left and right.  Pixels are still read along the scan, not block by block."""

    def __init__(self, layer: Layer, *, block: int = 4, memory: int = 4) -> None:
        super().__init__(layer)
        self.block, self.memory = positive("block", block), positive("memory", memory)

    def visible(self) -> Predicate:
        return geometry.blocks2d(self.layer.scan, self.block, self.memory)

    def tiles(self) -> Tiles:
        return geometry.patches(self.layer.scan, self.memory, side=self.block)


@sparse(
    "global-local2d",
    time="O(n·(R² + H))",
    memory="O(n·H)",
    summary="local2d, and row starts visible to all",
    reference="Beltagy et al., Longformer, 2020 (a window and global tokens), in two dimensions",
)
class GlobalLocal2D(ExactMixer):
    """A target sees what local2d shows it and the first pixel of every earlier row."""

    def __init__(self, layer: Layer, *, radius: int = 3) -> None:
        super().__init__(layer)
        self.radius = positive("radius", radius)

    def visible(self) -> Predicate:
        return geometry.global_window2d(self.layer.scan, self.radius)

    def tiles(self) -> Tiles:
        return geometry.patches_and_row_starts(self.layer.scan, self.radius)


@sparse(
    "axial",
    time="O(n·(H + W))",
    memory="O(n)",
    summary="layers alternate: own row so far, own column so far",
    reference="Ho et al., Axial Attention in Multidimensional Transformers, 2019",
)
class Axial(ExactMixer):
    """Even layers see the target's row, odd ones its column, as far as the scan has come.

    Under a raster scan two layers reach the target's own row and, of the earlier rows, what is not right of it; in the
    last column only the column itself, for the slot that holds a row's last pixel already predicts the next row.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.axis: Literal["row", "col"] = "col" if layer.index % 2 else "row"

    def visible(self) -> Predicate:
        return geometry.line(self.layer.scan, self.axis)

    def tiles(self) -> Tiles:
        return geometry.lines(self.layer.scan, self.axis)

    def _blocked(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None) -> Tensor:
        """Without a bias no mask is needed: a line is dense attention, its queries and keys in the scan's order."""
        if bias is not None:
            return super()._blocked(q, k, v, bias)
        queries, keys, _ = self._tables(q.device)
        line_q, line_k, line_v = (take(x, slots).flatten(1, 2) for x, slots in ((q, queries), (k, keys), (v, keys)))
        out = F.scaled_dot_product_attention(line_q, line_k, line_v, is_causal=self.layer.scan.causal)
        return put_back(out.unflatten(1, (q.shape[1], -1)), queries, q.shape[2])


@sparse(
    "strided",
    time="O(n·√n)",
    memory="O(n·√n)",
    summary="the last `stride` pixels and every `stride`-th (none: a row of the scan)",
    reference=_CHILD,
)
class Strided(ExactMixer):
    """A target sees the `stride` pixels of the scan before it, and of all before those every `stride`-th: with the
    width for a stride, under a raster scan, its own column."""

    def __init__(self, layer: Layer, *, stride: int | None = None) -> None:
        super().__init__(layer)
        self.stride = layer.scan.line if stride is None else positive("stride", stride)
        self._made: list[Part] = []

    def refusals(self, backend: str) -> list[str]:
        return [] if backend == "blocked" else super().refusals(backend)

    def visible(self) -> Predicate:
        return geometry.strided(self.layer.scan, self.stride)

    def last_use(self) -> Tensor:
        """Nothing is forgotten: a pixel is seen again a stride later, and so on to the end."""
        return torch.full((self.layer.size,), self.layer.size - 1)

    def parts(self, device: torch.device) -> list[Part]:
        """The window and the start token in runs; then, no pair twice, the pixels that are strides apart."""
        if not self._made or self._made[0][0].device != device:
            scan = self.layer.scan
            near, far = geometry.runs(scan, self.stride, max(16, self.stride)), geometry.classes(scan, self.stride)
            in_window, allowed = geometry.window1d(scan, self.stride), geometry.everything(scan)
            self._made = [
                _part(near, in_window, device),
                _part(far, lambda query, key: allowed(query, key) & ~in_window(query, key), device),
            ]
        return self._made

    def _blocked(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None) -> Tensor:
        return softmax_over_parts(q, k, v, self.parts(q.device), bias)

    def pairs(self) -> int:
        return geometry.pairs_by_distance(self.layer.scan, self.visible())


def _part(tiles: Tiles, visible: Predicate, device: torch.device) -> Part:
    return tiles.queries.to(device), tiles.keys.to(device), tiles.mask(visible).to(device)


def softmax_over_parts(q: Tensor, k: Tensor, v: Tensor, parts: list[Part], bias: ScoreBias | None) -> Tensor:
    """One softmax over keys that come in several parts, each query being in one tile of every part.

    Every query needs a visible key in some part.  The parts share the greatest score of a query, so their weighted sums
    and masses add up.  Time and memory O(Σ tiles · queries · keys).
    """
    size = q.shape[2]
    scores = [_scores(q, k, part, bias) for part in parts]
    tops = [
        put_back(s.detach().amax(dim=-1, keepdim=True), part[0], size) for s, part in zip(scores, parts, strict=True)
    ]
    top = torch.stack(tops).amax(dim=0)
    out, mass = torch.zeros_like(top), torch.zeros_like(top)
    for s, (queries, keys, _) in zip(scores, parts, strict=True):
        weights = (s - take(top, queries)).exp()
        out = out + put_back(weights.to(v.dtype) @ take(v, keys), queries, size)
        mass = mass + put_back(weights.sum(dim=-1, keepdim=True), queries, size)
    return (out / mass).to(v.dtype)


def _scores(q: Tensor, k: Tensor, part: Part, bias: ScoreBias | None) -> Tensor:
    """(batch, heads, tiles, queries, keys), at least float32, -inf where not visible."""
    queries, keys, mask = part
    scores = take(q, queries) @ take(k, keys).mT / q.shape[-1] ** 0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias(queries.clamp(min=0)[:, :, None], keys.clamp(min=0)[:, None, :])
    return scores.masked_fill(~mask, float("-inf"))


@sparse(
    "fixed",
    time="O(n·√n)",
    memory="O(n·√n)",
    summary="own row and the last `columns` columns of earlier rows",
    reference=_CHILD,
)
class Fixed(ExactMixer):
    """The scan is cut into runs of `stride` pixels (none: rows, under a raster scan); a target sees what is earlier in
    its own run, and the last `columns` pixels of every earlier one."""

    def __init__(self, layer: Layer, *, stride: int | None = None, columns: int = 1) -> None:
        super().__init__(layer)
        self.stride = layer.scan.line if stride is None else positive("stride", stride)
        self.columns = positive("columns", columns)
        if self.columns > self.stride:
            raise ValueError(f"columns {columns} must not exceed stride {self.stride}: a run has no more pixels")

    def visible(self) -> Predicate:
        return geometry.fixed(self.layer.scan, self.stride, self.columns)

    def tiles(self) -> Tiles:
        return geometry.runs_and_ends(self.layer.scan, self.stride, self.columns)


@variant(
    "hybrid-local2d",
    family="hybrid",
    time="mixed",
    memory="O(n)",
    summary="one dense layer for every `every` local2d layers",
    reference="Ramachandran et al., NeurIPS 2019, and Chen et al., Image GPT, ICML 2020, in turns",
)
class HybridLocal2D(ExactMixer):
    """Makes `every` local2d layers, then a dense one, and so on; a trunk too shallow for that ends with a dense one.

    Dense comes last of each group: by then a key speaks for its surroundings, not for its pixel alone.
    """

    def __new__(cls, layer: Layer, *, every: int = 3, radius: int = 3) -> Mixer:  # type: ignore[misc]  # one of two others
        dense = layer.index % (positive("every", every) + 1) == min(every, layer.depth - 1)
        return Dense(layer) if dense else Local2D(layer, radius=radius)
