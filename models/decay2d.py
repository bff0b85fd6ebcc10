"""Decay by the true two-dimensional offset, in linear time.

A query at its target (r, c) reads every raster-earlier content (r', c'), a key and a value, with the weight

    w = λ_row^(r - r') · λ_col^|c - c'|,        out = Σ w (q·k) v / √d, divided by its root mean square.

Let X[r', c'] = kᵀv, d × d.  Earlier rows are read whole, so |c - c'| has both signs there; the own row only to the
left.  Step by step, with a state for every column, A[r, c] = Σ_{r' < r} λ_row^(r-r') X[r', c] = λ_row (A + X)[r-1, c],

    out[r, c] ∝ q · ( Σ_c' λ_col^|c-c'| A[r, c']  +  Σ_{c' < c} λ_col^(c-c') X[r, c'] ),

and the sum over c' is two scans, one from the left and one from the right: O(d²) a pixel whatever the width.  `advance`
and the kernel for CPU do that.  As matrix products ("blocked"): rows are cut into bands of B, columns into strips of C,
and a pair of pixels is served in one of three ways.  B = C = 8 or a little less unless told otherwise; the weight's two
factors let each stand on its own side.

    inside    same band, same strip: the B·C pixels of a tile against each other.             O(B·C·d) a pixel
    sideways  same band, another strip: for every row of a strip the states of its two ends,
              L = Σ_c' λ_col^(C-c') X and R = Σ_c' λ_col^c' X; L is carried to the strips
              right of it and R to those left of it, fading by λ_col^C a strip; then both
              down the rows of the band, L from the own row on and R from the one above.      O(d²·(1 + B/C)) a pixel
    above     an earlier band: for every column and band one state, Σ_r' λ_row^(B-r') X,
              carried down, fading by λ_row^B a band; then spread over the columns by
              products within strips and scans between them.                                  O(d²·(1 + C/B)) a pixel

Nothing is raised to a negative power, so nothing overflows.  There are n·(1/B + 1/C) states of d² numbers, which the
backward pass wants to see again.

Shapes: q, k, v (batch, heads, seq, head_dim) outside, (batch, heads, bands, B, strips, C, head_dim) inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import geometry, kernels, reference
from .gated import EPS, normalised
from .mixer import Layer
from .recurrence import Recurrent, carried, widened
from .registry import positive, variant


@dataclass
class Columns:
    """What decoding keeps: 2·(width + 1) states, (…, head_dim, head_dim), a fixed size for a fixed width."""

    contents: Tensor  # (batch, heads, width, …): all contents so far by column, faded down to the target's row
    above: Tensor  # (batch, heads, width, …): those of earlier rows, spread over the columns
    left: Tensor  # (batch, heads, …): those of the target's row, faded to the target
    start: Tensor  # (batch, heads, …): the start token
    slot: int = 0


@variant(
    "decay2d",
    family="linear",
    time="O(n·d²)",
    memory="O(n·d²/B)",
    summary="decay by the true 2D offset: λ_row^Δrow · λ_col^|Δcol|, raster-causal",
    reference="this project; close to Fan et al., RMT: Retentive Networks Meet Vision Transformers, CVPR 2024, whose "
    "decay by |Δrow| + |Δcol| is not causal",
)
class Decay2D(Recurrent):
    """Σ λ_row^Δrow λ_col^|Δcol| (q·k) v, root mean square 1; see the module for how it is summed in O(n·d²).

    λ_row and λ_col are 1 - 2^(-1-h) for the head h = 0 … heads - 1: RetNet's spread, four octaves shorter, since they
    count rows and columns and not slots.  The start token has no coordinate: its weight is 1 everywhere.  With
    objective "bert" all pixels are read, with |Δrow|.
    learned: both are parameters of a head that start there, which "blocked" alone has gradients for.
    band, strip: the most rows and columns of a tile of "blocked".
    "compiled": a C++ kernel for CPU, which carries the states from pixel to pixel, knows no tiles and keeps none.

    Raises ValueError for a scan other than the raster: what is earlier would not be whole rows and a part of one.
    """

    backends: tuple[str, ...] = ("compiled", "blocked")

    def __init__(self, layer: Layer, *, learned: bool = False, band: int = 8, strip: int = 8) -> None:
        if layer.scan.order != "raster":
            raise ValueError(f"decay2d sums whole earlier rows, which needs scan 'raster', not {layer.scan.order!r}")
        if not isinstance(learned, bool):
            raise ValueError(f"learned must be true or false, not {learned!r}")
        self.learned = learned  # before the base asks whether a backend can serve it
        super().__init__(layer)
        self.band = evened(layer.scan.grid.height, positive("band", band))
        self.strip = evened(layer.scan.grid.width, positive("strip", strip))
        self.unit = self.band * layer.scan.grid.width
        head = torch.arange(layer.heads, dtype=torch.get_default_dtype())
        rates = (-torch.log1p(-(2.0 ** (-1 - head)))).log().repeat(2, 1)
        if learned:
            self.log_rates = nn.Parameter(rates)  # (2, heads): λ = exp(-exp(·)) of rows and of columns
        else:
            self.register_buffer("log_rates", rates, persistent=False)

    def refusals(self, backend: str) -> list[str]:
        reasons = super().refusals(backend)
        if backend != "compiled" or reasons:
            return reasons
        learned = ["has no gradient of learned rates"] if self.learned else []
        return learned + kernels.reasons("decay")

    def faded(self, axis: int, distance: Tensor, like: Tensor) -> Tensor:
        """λ_row (axis 0) or λ_col (axis 1) to the power of distances ≥ 0: (heads, *distance.shape), of like's dtype."""
        log_decay = -widened(self.log_rates[axis])[0].exp()
        return (log_decay.view(-1, *(1,) * distance.dim()) * distance).exp().to(like.dtype)

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        scan, scale = self.layer.scan, q.shape[-1] ** -0.5
        if kernels.serves(self, q, k, v):
            return kernels.unit(self._compiled(q, k, v, scale), EPS)
        q = q * scale
        if scan.causal:
            start = (q @ k[:, :, :1].mT) @ v[:, :, :1]
            # By what they hold: slot p + 1 holds pixel p, and none the last pixel.
            k, v = (F.pad(x[:, :, 1:], (0, 0, 0, 1)) for x in (k, v))
            return normalised(start + self._earlier(q, k, v))
        both = self._earlier(q, k, v) + self._earlier(q, k, v, later=True)
        return normalised((q * k).sum(-1, keepdim=True) * v + both)

    def _compiled(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        grid, causal = self.layer.scan.grid, self.layer.scan.causal
        fades = torch.stack([self.faded(axis, torch.ones((), device=q.device), q) for axis in (0, 1)])
        summed = partial(kernels.decayed2d, q, k, v, fades, grid.height, grid.width, scale=scale)
        earlier = summed(started=causal)
        if causal:
            return earlier
        return scale * (q * k).sum(-1, keepdim=True) * v + earlier + summed(later=True)

    def _earlier(self, q: Tensor, k: Tensor, v: Tensor, later: bool = False) -> Tensor:
        """Each pixel's sum over raster-earlier pixels, or over later ones, all (batch, heads, pixels, head_dim)."""
        grid = self.layer.scan.grid
        if later:  # turned by 180°, later is earlier
            return self._earlier(q.flip(2), k.flip(2), v.flip(2)).flip(2)
        q, k, v = (self._tiled(x.unflatten(2, (grid.height, grid.width))) for x in (q, k, v))
        out = self._inside(q, k, v)
        if q.shape[4] > 1:
            out = out + self._sideways(q, k, v)
        if q.shape[2] > 1:
            out = out + self._above(q, k, v)
        return out.flatten(4, 5).flatten(2, 3)[:, :, : grid.height, : grid.width].flatten(2, 3)

    def _tiled(self, x: Tensor) -> Tensor:
        """(batch, heads, height, width, d) -> (batch, heads, bands, B, strips, C, d), filled up with zeros."""
        x = F.pad(x, (0, 0, 0, -x.shape[3] % self.strip, 0, -x.shape[2] % self.band))
        return x.unflatten(3, (-1, self.strip)).unflatten(2, (-1, self.band))

    def _inside(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "b h i r j c d -> b h i j (r c) d") for x in (q, k, v))
        row, col = torch.meshgrid(*(torch.arange(s, device=q.device) for s in (self.band, self.strip)), indexing="ij")
        row, col = (x.flatten()[:, None] - x.flatten()[None, :] for x in (row, col))
        faded = self.faded(0, row.clamp(min=0), q) * self.faded(1, col.abs(), q)
        weight = faded.tril(-1)  # a key is earlier
        out = (q @ k.mT * weight[:, None, None]) @ v
        return rearrange(out, "b h i j (r c) d -> b h i r j c d", r=self.band)

    def _sideways(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        across = torch.arange(self.strip, device=q.device)
        near, far = (self.faded(1, x, q)[:, None, None, None, :, None] for x in (across, self.strip - across))
        fade = self.faded(1, torch.full((1,), self.strip, device=q.device), q)[..., None, None, None, None]
        down = torch.arange(self.band, device=q.device)
        down = down[:, None] - down[None, :]
        weight = self.faded(0, down.clamp(min=0), q)[:, None]

        def read(q: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
            ends = (weight @ ends.flatten(4)).view_as(ends)  # down the band
            return q @ ends

        # λ^(C-c') to the strip's right border, λ^c' to its left; the query's factor is what is left of the way.
        left = carried((k * far)[:, :, :, :, :-1].mT @ v[:, :, :, :, :-1], fade, dim=4)
        right = carried((k * near)[:, :, :, :, 1:].mT @ v[:, :, :, :, 1:], fade, dim=4, backward=True)
        from_left = read((q * near)[:, :, :, :, 1:], left, weight.tril())
        from_right = read((q * far)[:, :, :, :, :-1], right, weight.tril(-1))
        return F.pad(from_left, (0, 0, 0, 0, 1, 0)) + F.pad(from_right, (0, 0, 0, 0, 0, 1))

    def _above(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What bands read of earlier ones: by states above all but the first, (batch, heads, bands, columns, d, d)."""
        q, k, v = (rearrange(x, "b h i r j c d -> b h i (j c) r d") for x in (q[:, :, 1:], k[:, :, :-1], v[:, :, :-1]))
        row = torch.arange(self.band, device=q.device)
        near, far = (self.faded(0, x, q)[:, None, None, :, None] for x in (row, self.band - row))
        fade = self.faded(0, torch.full((1,), self.band, device=q.device), q)[..., None, None, None]
        states = carried((k * far).mT @ v, fade, dim=2)
        out = rearrange((q * near) @ self._spread(states), "b h i (j c) r d -> b h i r j c d", c=self.strip)
        return F.pad(out, (0, 0) * 4 + (1, 0))

    def _spread(self, columns: Tensor) -> Tensor:
        """Σ_c' λ_col^|c-c'| columns[c'] over whole strips: (batch, heads, bands, columns, d, d), both ways."""
        x = columns.flatten(4).unflatten(3, (-1, self.strip))  # (batch, heads, bands, strips, C, d·d)
        col = torch.arange(self.strip, device=x.device)
        out = self.faded(1, (col[:, None] - col[None, :]).abs(), x)[:, None, None] @ x
        if x.shape[3] > 1:
            fade = self.faded(1, torch.full((1,), self.strip, device=x.device), x)[..., None, None]
            # What a strip's border pixels read of their own strip is all that the next strip needs of it.
            left = carried(out[:, :, :, :-1, -1], fade, dim=3)[..., None, :]
            right = carried(out[:, :, :, 1:, 0], fade, dim=3, backward=True)[..., None, :]
            near, far = (self.faded(1, y, x)[:, None, None, :, None] for y in (col + 1, self.strip - col))
            out = out + F.pad(left * near, (0, 0, 0, 0, 1, 0)) + F.pad(right * far, (0, 0, 0, 0, 0, 1))
        return out.flatten(3, 4).view_as(columns)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        out = reference.weighted_attention(q, k, v, self.weight(q)) / q.shape[-1] ** 0.5
        return reference.unit_mean_square(out, EPS)

    def weight(self, like: Tensor) -> Tensor:
        """(heads, query, key): the definition, from geometry's coordinates."""
        scan = self.layer.scan
        slot = torch.arange(self.layer.size, device=like.device)
        query, key = slot[:, None], slot[None, :]
        (row, col), (key_row, key_col) = scan.target(query), scan.content(key)
        weight = self.faded(0, (row - key_row).abs(), like) * self.faded(1, (col - key_col).abs(), like)
        weight = torch.where(scan.is_start(key), torch.ones_like(weight), weight)
        return weight.masked_fill(~geometry.everything(scan)(query, key), 0.0)

    def start(self, batch: int, like: Tensor) -> Columns:
        d, width = self.layer.head_dim, self.layer.scan.grid.width
        by_column, one = self.zeros(batch, like, width, d, d), self.zeros(batch, like, d, d)
        return Columns(by_column, by_column.clone(), one, one.clone())

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Columns, **extras: Tensor) -> tuple[Tensor, Columns]:
        slot, written = torch.tensor(state.slot), k.mT @ v
        col = int(self.layer.scan.target(slot)[1])
        row_decay, col_decay = (self.faded(axis, torch.ones(1, 1, device=q.device), q) for axis in (0, 1))
        if state.slot == 0:
            state.start = written
        else:
            state.contents[:, :, int(self.layer.scan.content(slot)[1])] += written
            state.left = col_decay * (state.left + written)
            if col == 0:
                state.contents *= row_decay[..., None]
                state.left = torch.zeros_like(written)
                width = state.contents.shape[2]
                filled = F.pad(state.contents, (0, 0, 0, 0, 0, -width % self.strip))
                state.above = self._spread(filled[:, :, None])[:, :, 0, :width]
        state.slot += 1
        return normalised(q * q.shape[-1] ** -0.5 @ (state.start + state.left + state.above[:, :, col])), state

    def flops(self) -> int:
        """The matrix products: two states a pixel, made and read, or whole tiles and the start token's."""
        grid, d, causal = self.layer.scan.grid, self.layer.head_dim, self.layer.scan.causal
        # The kernel adds the start token's state to another before it reads them.
        once = 8 * grid.size * d * d if self.backend == "compiled" else self._tile_flops() + causal * 4 * grid.size * d
        return self.layer.heads * (once if causal else 2 * once)

    def _tile_flops(self) -> int:
        """Of a head: inside, sideways, above."""
        d, band, strip, grid = self.layer.head_dim, self.band, self.strip, self.layer.scan.grid
        bands, strips, tile = -(-grid.height // band), -(-grid.width // strip), band * strip
        inside = bands * strips * 4 * tile * tile * d
        sideways = 2 * bands * (strips - 1) * (4 * tile * d * d + 2 * band * band * d * d)
        above = (bands - 1) * strips * (4 * tile * d * d + 2 * strip * strip * d * d)
        return inside + sideways + above


def evened(side: int, most: int) -> int:
    """The length of the fewest pieces no longer than `most` that a side is cut into, as equal as can be."""
    return -(-side // -(-side // most))
