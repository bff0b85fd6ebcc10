"""Attentions with one mistake each, for the tests of the checks. None is registered by default."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import geometry
from models.full import Dense
from models.geometry import Predicate, Tiles
from models.linear import Linear
from models.local import Local1D, Local2D
from models.mixer import Cache, ExactMixer, Layer

BUGS: dict[str, tuple[type, str]] = {}
"""name -> (class, the check that must catch it)"""


def bug(check: str) -> Any:
    def register(cls: type) -> type:
        BUGS[f"planted-{cls.__name__}"] = (cls, check)
        return cls

    return register


class Masked(ExactMixer):
    """Declares the mask of local2d, R = 1; attends by another one."""

    backends = ("math",)

    def visible(self) -> Predicate:
        return geometry.window2d(self.layer.scan, 1)

    def really(self, query: Tensor, key: Tensor) -> Tensor:
        return self.visible()(query, key)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any = None) -> Tensor:
        slot = torch.arange(q.shape[2])
        mask = self.really(slot[:, None], slot[None, :])
        mask = mask | ~mask.any(1, keepdim=True) & (slot[None, :] == 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@bug("visible is declared")
class ShiftedMask(Masked):
    """A mask shifted by one."""

    def really(self, query: Tensor, key: Tensor) -> Tensor:
        return self.visible()(query, (key + 1).clamp(max=self.layer.size - 1)) & (key <= query)


@bug("visible is declared")
class SwappedAxes(Masked):
    """Rows taken for columns."""

    def really(self, query: Tensor, key: Tensor) -> Tensor:
        height = self.layer.scan.grid.height
        pixel = key - 1
        near = (query % height - pixel % height).abs() <= 1
        near &= (query.div(height, rounding_mode="floor") - pixel.div(height, rounding_mode="floor")).abs() <= 1
        return (key == 0) | (key <= query) & near


@bug("visible is declared")
class SkewedWindow(Masked):
    """The 2D window computed on slot numbers."""

    def really(self, query: Tensor, key: Tensor) -> Tensor:
        width = self.layer.scan.grid.width
        near = (query % width - key % width).abs() <= 1
        near &= (query.div(width, rounding_mode="floor") - key.div(width, rounding_mode="floor")).abs() <= 1
        return (key == 0) | (key <= query) & near


@bug("visible is declared")
class WrapRound(Masked):
    """Offsets in the raster: the window wraps round at row starts."""

    def really(self, query: Tensor, key: Tensor) -> Tensor:
        width, back = self.layer.scan.grid.width, query - (key - 1)
        above = (back - width).abs() <= 1
        return (key == 0) | (key <= query) & ((back == 1) | above)


@bug("no future")
class PerAxisCausal(Masked):
    """Causal by row only: pixels to the right in the same row are seen."""

    def really(self, query: Tensor, key: Tensor) -> Tensor:
        (row, col), (key_row, key_col) = self.layer.scan.target(query), self.layer.scan.content(key)
        return (key == 0) | (key_row <= row) & ((row - key_row) <= 1) & ((col - key_col).abs() <= 1)


@bug("visible is declared")
class BothAxesCausal(Masked):
    """Causal along both axes: the pixels above right are hidden."""

    def really(self, query: Tensor, key: Tensor) -> Tensor:
        (_, col), (_, key_col) = self.layer.scan.target(query), self.layer.scan.content(key)
        return (key == 0) | self.visible()(query, key) & (key_col <= col)


@bug("visible is declared")
class WindowOffByOne(Local1D):
    """A window one longer than it says, in its tiles and its mask of the fast path alone."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer, window=3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any = None) -> Tensor:
        slot = torch.arange(q.shape[2])
        wider = geometry.window1d(self.layer.scan, self.window + 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=wider(slot[:, None], slot[None, :]))


@bug("visible is declared")
class NoStart(Masked):
    """The start token hidden from all but the first."""

    def really(self, query: Tensor, key: Tensor) -> Tensor:
        return self.visible()(query, key) & ((key > 0) | (query == 0))


@bug("equals oracle")
class MissingHalo(Local2D):
    """Tiles without the halo on the right."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer, radius=2)
        self.backend = "blocked"

    def tiles(self) -> Tiles:
        queries, keys = geometry.patches(self.layer.scan, 2, side=4)
        place = torch.arange(keys.shape[1])
        return Tiles(queries, torch.where((place % 8 == 7)[None, :], -1, keys))


@bug("no future")
class FullAttention(Dense):
    """No mask at all."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@bug("no future")
class MeanOfAll(Dense):
    """The mean of all values is taken out, the later ones' too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any = None) -> Tensor:
        return super().forward(q, k, v - v.mean(dim=2, keepdim=True), bias)


@bug("equals oracle")
class WrongScale(Dense):
    """Scores divided by head_dim, not by its root."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.layer.scan.causal, scale=1 / q.shape[-1])


@bug("equals oracle")
class DetachedKeys(Dense):
    """Right values, no gradient to the keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any = None) -> Tensor:
        return super().forward(q, k.detach(), v, bias)


@bug("decoding equals full pass")
class StaleCache(Dense):
    """A step that does not write its own key."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Cache, bias: Any = None) -> tuple[Tensor, Cache]:
        before = state.k.clone()
        out, state = super().step(q, k, v, state, bias)
        if state.slot % 3 == 0:
            state.k.copy_(before)
        return out, state


@bug("decoding equals full pass")
class ShortRing(Local2D):
    """A cache that forgets every slot one step too early."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer, radius=1)

    def last_use(self) -> Tensor:
        return torch.maximum(super().last_use() - 1, torch.arange(self.layer.size))


@bug("batch is independent")
class BatchMixUp(Dense):
    """Keys of the batch's first image for all."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any = None) -> Tensor:
        return super().forward(q, k[:1].expand_as(k), v, bias)


@bug("batch is independent")
class BatchStatistics(Dense):
    """Values scaled by their spread over the batch."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any = None) -> Tensor:
        return super().forward(q, k, v / (1 + v.std()), bias)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Σ (q·k) v over the keys so far, for the mistakes below."""
    return torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))


@bug("equals oracle")
class NormaliserWithoutNow(Linear):
    """The normaliser leaves the current token out."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **extras: Any) -> Tensor:
        q, k = self.feature(q), self.feature(k)
        mass = F.pad(k.cumsum(2), (0, 0, 1, -1))
        return summed(q, k, v) / ((q * mass).sum(-1, keepdim=True) + 1e-3)


@bug("equals oracle")
class ForgottenChunk(Linear):
    """From slot 24 on, what was before is lost."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **extras: Any) -> Tensor:
        parts = [slice(0, 24), slice(24, None)]
        return torch.cat([super(ForgottenChunk, self).forward(q[:, :, p], k[:, :, p], v[:, :, p]) for p in parts], 2)


@bug("decoding equals full pass")
class DecayTwice(Linear):
    """Decoding forgets; the full pass does not."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any, **extras: Any) -> tuple[Tensor, Any]:
        out, state = super().step(q, k, v, state, **extras)
        state.memory *= torch.linspace(0.9, 1.0, state.memory.shape[-1], dtype=q.dtype)
        return out, state


@bug("low precision")
class Overflow(Linear):
    """Scaled up and down again: float64 can hold what lies between, nothing smaller can."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **extras: Any) -> Tensor:
        out = super().forward(q, k, v, **extras)
        large = out.new_tensor(1e30)
        return out * large * large / large / large


@bug("grows as declared")
class SecretlyQuadratic(Linear):
    """Linear attention that forms n×n."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **extras: Any) -> Tensor:
        scores = (self.feature(q) @ self.feature(k).mT).tril()
        return scores @ v / scores.sum(-1, keepdim=True)


@bug("counts are true")
class FlattersItself(Dense):
    """Claims half of its FLOPs."""

    def flops(self) -> int:
        return super().flops() // 2


@bug("same weights outside")
class OwnSeed(Dense):
    """Draws from the global generator while it is built and seeds it anew."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        torch.manual_seed(99)
