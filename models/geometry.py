"""How a grid of pixels becomes a sequence of slots, and who may see whom. The only place that knows coordinates.

    objective "ar":    slot t contains pixel t - 1 (slot 0: the start token) and predicts pixel t
    objective "bert":  slot t contains pixel t (or a hole) and predicts pixel t

A query stands at its target's coordinate, a key at its content's.  Pixels are counted along the scan; a scan says
which (row, col) each of them has.  A mask is a predicate: it takes query slots and key slots as int64 tensors that
broadcast against each other, and returns True where the query may attend.  The start token is visible to every query.

Shapes: n = height · width slots; tiles (tiles, queries) and (tiles, keys) of slots, -1 where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Predicate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """height × width pixels; rows and columns count from 0 at the top left."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a grid needs at least one row and one column, not {self.height}×{self.width}")

    @property
    def size(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Scan:
    """A grid read as a sequence: slot t has a target, the pixel that it predicts, and a content, the pixel it holds."""

    grid: Grid
    objective: str = "ar"

    @property
    def causal(self) -> bool:
        return self.objective == "ar"

    def order(self) -> Tensor:
        """int64 (n,): the raster index of the pixel that each slot predicts."""
        return torch.arange(self.grid.size)

    def coordinates(self, pixel: Tensor) -> tuple[Tensor, Tensor]:
        """(row, col) of the pixels at these places of the scan."""
        return pixel.div(self.grid.width, rounding_mode="floor"), pixel % self.grid.width

    def target(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """(row, col) of the pixels that these slots predict."""
        return self.coordinates(slot)

    def content(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """(row, col) of the pixels that these slots contain; the start token stands left of the first pixel."""
        if not self.causal:
            return self.coordinates(slot)
        row, col = self.coordinates((slot - 1).clamp(min=0))
        return row, torch.where(slot == 0, -1, col)

    def is_start(self, slot: Tensor) -> Tensor:
        """True where a slot contains the start token."""
        return (slot == 0) if self.causal else torch.zeros_like(slot, dtype=torch.bool)


def everything(scan: Scan) -> Predicate:
    """All that the objective allows: every earlier pixel ("ar"), or every pixel ("bert")."""
    if scan.causal:
        return lambda query, key: key <= query
    return lambda query, key: torch.ones_like(query * key, dtype=torch.bool)


def window1d(scan: Scan, window: int) -> Predicate:
    """The last `window` pixels of the scan ("ar"), or those at most `window` away ("bert")."""
    if scan.causal:
        return lambda query, key: (key == 0) | ((key <= query) & (query - key < window))
    return lambda query, key: (query - key).abs() <= window


def window2d(scan: Scan, radius: int) -> Predicate:
    """At most `radius` rows and columns away, and earlier in the scan ("ar")."""
    allowed = everything(scan)

    def visible(query: Tensor, key: Tensor) -> Tensor:
        (row, col), (key_row, key_col) = scan.target(query), scan.content(key)
        near = ((row - key_row).abs() <= radius) & ((col - key_col).abs() <= radius)
        return scan.is_start(key) | (allowed(query, key) & near)

    return visible


def matrix(visible: Predicate, size: int) -> Tensor:
    """bool (n, n), query × key: the mask itself, for oracles and pictures."""
    slot = torch.arange(size)
    return visible(slot[:, None], slot[None, :])


class Tiles(NamedTuple):
    """Queries that are served together and every key that one of them may see; int64 slots, -1 where there is none."""

    queries: Tensor  # (tiles, queries)
    keys: Tensor  # (tiles, keys)


def runs(scan: Scan, window: int, length: int = 64) -> Tiles:
    """Runs of `length` consecutive slots, for window1d: the start token, the run, `window` slots before (and after)."""
    size = scan.grid.size
    first = torch.arange(0, size, length)[:, None]
    queries = first + torch.arange(length)[None, :]
    after = 0 if scan.causal else window
    keys = first + torch.arange(-window, length + after)[None, :]
    return _with_start(scan, _inside(queries, size), _inside(keys, size))


def patches(scan: Scan, radius: int, side: int = 8) -> Tiles:
    """Patches of side × side pixels with a halo of `radius`, for window2d."""
    height, width = scan.grid.height, scan.grid.width
    below = 0 if scan.causal else radius

    def pixels(first: Tensor, length: int, before: int, after: int, limit: int) -> Tensor:
        place = first[:, None] + torch.arange(-before, length + after)[None, :]
        return _inside(place, limit)

    tall, wide = min(side, height), min(side, width)
    top, left = torch.arange(0, height, tall), torch.arange(0, width, wide)

    def slots(rows: Tensor, cols: Tensor) -> Tensor:
        row, col = rows[:, None, :, None], cols[None, :, None, :]
        pixel = torch.where((row >= 0) & (col >= 0), row * width + col, -1)
        return pixel.flatten(0, 1).flatten(1, 2)

    queries = slots(pixels(top, tall, 0, 0, height), pixels(left, wide, 0, 0, width))
    contents = slots(pixels(top, tall, radius, below, height), pixels(left, wide, radius, radius, width))
    # Pixel p is held by slot p + 1 under "ar"; the last pixel is held by none.
    keys = _inside(torch.where(contents >= 0, contents + scan.causal, -1), scan.grid.size)
    return _with_start(scan, queries, keys)


def _inside(slots: Tensor, size: int) -> Tensor:
    return torch.where((slots >= 0) & (slots < size), slots, -1)


def _with_start(scan: Scan, queries: Tensor, keys: Tensor) -> Tiles:
    """Puts the start token first among every tile's keys, once."""
    if scan.causal:
        keys = torch.cat([torch.zeros_like(keys[:, :1]), torch.where(keys == 0, -1, keys)], dim=1)
    return Tiles(queries, keys)
