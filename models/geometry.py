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
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .orders import ORDERS
from .registry import choose

Predicate = Callable[[Tensor, Tensor], Tensor]

CELLS = 2**18
"""Pairs that are counted at a time: whole numbers of so many stay in a core's cache."""


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
    """A grid read as a sequence: slot t has a target, the pixel that it predicts, and a content, the pixel it holds.

    order: the way through the grid, a name of orders.ORDERS; whatever it is, coordinates are the true ones.
    """

    grid: Grid
    objective: str = "ar"
    order: str = "raster"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise choose("scan", self.order, ORDERS)

    @property
    def causal(self) -> bool:
        return self.objective == "ar"

    @property
    def downward(self) -> bool:
        """Whether no earlier pixel lies below a later one."""
        return self.causal and self.order in ("raster", "snake")

    @property
    def line(self) -> int:
        """The length of a line of the scan: a row, or a column if it goes by columns."""
        return self.grid.height if self.order == "column" else self.grid.width

    @cached_property
    def path(self) -> Tensor:
        """int64 (n,): the raster index of the pixel that each slot predicts."""
        return ORDERS[self.order](self.grid.height, self.grid.width)

    @cached_property
    def _paths(self) -> dict[torch.device, Tensor]:
        return {}

    def _path_on(self, device: torch.device) -> Tensor:
        """`path` on a device, copied there once."""
        if device not in self._paths:
            self._paths[device] = self.path.to(device)
        return self._paths[device]

    @cached_property
    def rank(self) -> Tensor:
        """int64 (n,): the slot that predicts each pixel, by raster index; the inverse of `path`."""
        return torch.argsort(self.path)

    def coordinates(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """(row, col) of the pixels at these places of the scan."""
        pixel = place if self.order == "raster" else self._path_on(place.device)[place]
        return pixel.div(self.grid.width, rounding_mode="floor"), pixel % self.grid.width

    def target(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """(row, col) of the pixels that these slots predict."""
        return self.coordinates(slot)

    def content(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """(row, col) of the pixels that these slots contain.

        The start token stands in the row of the scan's first pixel, one column left of the grid: where no pixel is.
        """
        if not self.causal:
            return self.coordinates(slot)
        row, col = self.coordinates((slot - 1).clamp(min=0))
        return row, torch.where(slot == 0, -1, col)

    def content_place(self, slot: Tensor) -> Tensor:
        """The place along the scan of the pixels that these slots contain, -1 for the start token.

        A target's place is its slot.
        """
        return slot - 1 if self.causal else slot

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        """How many places along the scan the query's target comes after the key's content."""
        return query - self.content_place(key)

    def is_start(self, slot: Tensor) -> Tensor:
        """True where a slot contains the start token."""
        return (slot == 0) if self.causal else torch.zeros_like(slot, dtype=torch.bool)


class Offsets(NamedTuple):
    """How queries and keys stand to each other, by number: query s to key t as target[s] - content[t] says.

    query, key: a pair of slots that stand so, int64 (numbers,).  target, content: int32 (n,).
    """

    query: Tensor
    key: Tensor
    target: Tensor
    content: Tensor


def offsets(scan: Scan, along: bool = False) -> Offsets:
    """All (Δrow, Δcol) of the scan's grid, or with `along` all distances along the scan; and, where there is a start
    token, each target to it."""
    height, width = (1, scan.grid.size) if along else (scan.grid.height, scan.grid.width)
    cols, middle = 2 * width - 1, (height - 1) * (2 * width - 1) + width - 1
    every = torch.arange(scan.grid.size)  # along the scan a place's slot is its number
    place, rank = (every, every) if along else (scan.path, scan.rank)
    down, right = torch.meshgrid(torch.arange(1 - height, height), torch.arange(1 - width, width), indexing="ij")

    def slots(row: Tensor, col: Tensor) -> Tensor:
        return rank[(row.clamp(min=0) * width + col.clamp(min=0)).flatten()]

    query, key = slots(down, right), slots(-down, -right) + int(scan.causal)  # what is predicted is held one slot later
    target = place.div(width, rounding_mode="floor") * cols + place % width + middle
    if not scan.causal:
        return Offsets(query, key, target.int(), (target - middle).int())
    to_start = torch.zeros(int(target.max()) - middle + 1, dtype=torch.long)
    to_start[target - middle] = every
    content = torch.cat([torch.tensor([middle - len(query)]), (target - middle)[:-1]])
    return Offsets(torch.cat([query, to_start]), torch.cat([key, 0 * to_start]), target.int(), content.int())


def everything(scan: Scan) -> Predicate:
    """All that the objective allows: every earlier pixel ("ar"), or every pixel ("bert")."""
    if scan.causal:
        return lambda query, key: key <= query
    return lambda query, key: torch.ones_like(query * key, dtype=torch.bool)


def only(scan: Scan, condition: Predicate) -> Predicate:
    """The start token, and what both the objective and a condition on (query, key) allow."""
    allowed = everything(scan)
    return lambda query, key: scan.is_start(key) | (allowed(query, key) & condition(query, key))


def only2d(scan: Scan, condition: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Predicate:
    """The same for a condition on (row, col, key_row, key_col)."""
    return only(scan, lambda query, key: condition(*scan.target(query), *scan.content(key)))


def window1d(scan: Scan, window: int) -> Predicate:
    """The last `window` pixels of the scan ("ar"), or those at most `window` away ("bert")."""
    return only(scan, lambda query, key: scan.distance(query, key).abs() <= window)


def window2d(scan: Scan, radius: int) -> Predicate:
    """At most `radius` rows and columns away, and earlier in the scan ("ar")."""
    return dilated2d(scan, radius, dilation=1)


def dilated2d(scan: Scan, radius: int, dilation: int) -> Predicate:
    """Of every `dilation`-th row and column, counted from the target, the nearest `radius` on each side."""

    def near(row: Tensor, col: Tensor, key_row: Tensor, key_col: Tensor) -> Tensor:
        down, right = key_row - row, key_col - col
        reached = (down.abs() <= radius * dilation) & (right.abs() <= radius * dilation)
        return reached if dilation == 1 else reached & (down % dilation == 0) & (right % dilation == 0)

    return only2d(scan, near)


def global_window2d(scan: Scan, radius: int) -> Predicate:
    """window2d, and the first pixel of every row."""
    return only2d(
        scan,
        lambda row, col, key_row, key_col: (
            (((row - key_row).abs() <= radius) & ((col - key_col).abs() <= radius)) | (key_col == 0)
        ),
    )


def blocks2d(scan: Scan, block: int, memory: int) -> Predicate:
    """The target's own block of block × block pixels, and `memory` pixels around it."""

    def inside(place: Tensor, key_place: Tensor) -> Tensor:
        past = key_place - (place - place % block)
        return (past >= -memory) & (past < block + memory)

    return only2d(scan, lambda row, col, key_row, key_col: inside(row, key_row) & inside(col, key_col))


def line(scan: Scan, axis: Literal["row", "col"]) -> Predicate:
    """The target's own row, or its own column."""
    if axis == "row":
        return only2d(scan, lambda row, col, key_row, key_col: row == key_row)
    return only2d(scan, lambda row, col, key_row, key_col: col == key_col)


def strided(scan: Scan, stride: int) -> Predicate:
    """The last `stride` pixels of the scan, and every `stride`-th before the target; on both sides with "bert"."""

    def reached(query: Tensor, key: Tensor) -> Tensor:
        distance = scan.distance(query, key)
        return (distance.abs() <= stride) | (distance % stride == 0)

    return only(scan, reached)


def fixed(scan: Scan, stride: int, columns: int) -> Predicate:
    """The target's own run of `stride` pixels of the scan, and the last `columns` of every run."""

    def reached(query: Tensor, key: Tensor) -> Tensor:
        place = scan.content_place(key)
        same_run = query.div(stride, rounding_mode="floor") == place.div(stride, rounding_mode="floor")
        return same_run | (place % stride >= stride - columns)

    return only(scan, reached)


def matrix(visible: Predicate, size: int) -> Tensor:
    """bool (n, n), query × key: the mask itself, for oracles and pictures."""
    slot = torch.arange(size)
    return visible(slot[:, None], slot[None, :])


class Tiles(NamedTuple):
    """Queries that are served together and every key that one of them may see; int64 slots, -1 where there is none.

    Every slot is a query of exactly one tile, and no tile names a key twice.
    """

    queries: Tensor  # (tiles, queries)
    keys: Tensor  # (tiles, keys)

    def mask(self, visible: Predicate) -> Tensor:
        """bool (tiles, queries, keys): what the predicate shows, nothing where there is no query or no key."""
        queries, keys = self.queries[:, :, None], self.keys[:, None, :]
        return visible(queries, keys) & (queries >= 0) & (keys >= 0)

    def pairs(self, visible: Predicate) -> int:
        """How many pairs of the mask are True, counted in slices of about CELLS pairs."""
        rows = max(1, CELLS // self.keys.shape[1])
        some = max(1, rows // self.queries.shape[1])
        return sum(
            int(Tiles(part, keys).mask(visible).sum())
            for queries, keys in zip(self.queries.split(some), self.keys.split(some), strict=True)
            for part in queries.split(rows, dim=1)
        )


def pairs_by_distance(scan: Scan, visible: Predicate) -> int:
    """How many (query, key) pairs a predicate shows that asks for the distance along the scan alone, and with "bert"
    on both sides alike; time and memory O(n).

    The scan's last target stands at every distance, and as many targets as a key's place has before and in it do too.
    """
    size = scan.grid.size
    slot = torch.arange(size)
    found = int((scan.content_place(slot) + 1)[visible(slot[-1:], slot)].sum())
    return found + size if scan.causal else 2 * found - size  # the start token; both sides, but distance 0 once


def runs(scan: Scan, window: int, length: int = 64) -> Tiles:
    """Runs of `length` consecutive slots, for window1d: the start token, the run, `window` slots before (and after)."""
    size = scan.grid.size
    first = torch.arange(0, size, length)[:, None]
    queries = first + torch.arange(length)[None, :]
    window = min(window, size)
    after = 0 if scan.causal else window
    keys = first + torch.arange(-window, length + after)[None, :]
    return _with_start(scan, _inside(queries, size), _inside(keys, size))


def classes(scan: Scan, stride: int) -> Tiles:
    """Every `stride`-th pixel together, for the second part of strided; without the start token."""
    size = scan.grid.size
    stride = min(stride, size)
    first = torch.arange(stride)[:, None]
    places = _inside(first + torch.arange(0, size, stride)[None, :], size)
    return Tiles(places, _holders(scan, places))


def runs_and_ends(scan: Scan, stride: int, columns: int) -> Tiles:
    """Runs of `stride` pixels of the scan, for fixed: the run, and the last `columns` of the other runs."""
    size = scan.grid.size
    stride, columns = min(stride, size), min(columns, size)  # of a single run the ends are its own
    first = torch.arange(0, size, stride)[:, None]
    own = _inside(first + torch.arange(stride)[None, :], size)
    ends = first + torch.arange(stride - columns, stride)[None, :]
    run = torch.arange(len(first))
    others = ends.flatten()[None, :].masked_fill(run.repeat_interleave(columns)[None, :] == run[:, None], -1)
    return _with_start(scan, own, _holders(scan, torch.cat([own, _inside(others, size)], dim=1)))


def patches(scan: Scan, radius: int, side: int = 8, dilation: int = 1) -> Tiles:
    """Patches of side × side pixels with a halo of `radius`, for window2d and blocks2d; for dilated2d likewise, on
    every `dilation`-th row and column."""
    rows, key_rows = _stretches(scan.grid.height, side, radius, 0 if scan.downward else radius, dilation)
    cols, key_cols = _stretches(scan.grid.width, side, radius, radius, dilation)
    queries, contents = _rectangles(scan, rows, cols), _rectangles(scan, key_rows, key_cols)
    return _with_start(scan, queries, _holders(scan, contents))


def patches_and_row_starts(scan: Scan, radius: int, side: int = 8) -> Tiles:
    """The same and the first pixel of every row, for global_window2d."""
    queries, keys = patches(scan, radius, side)
    starts = _holders(scan, scan.rank[torch.arange(scan.grid.height) * scan.grid.width]).expand(len(keys), -1)
    ascending = keys.sort(dim=1).values
    nearest = torch.searchsorted(ascending, starts.contiguous()).clamp(max=keys.shape[1] - 1)
    named = ascending.gather(1, nearest) == starts
    return Tiles(queries, torch.cat([keys, starts.masked_fill(named, -1)], dim=1))


def lines(scan: Scan, axis: Literal["row", "col"]) -> Tiles:
    """Every row, or every column, for line, in the scan's order: with "ar" query i of a tile sees keys 0 to i.

    The last pixel of a line is no key there: no other of the line comes after it.
    """
    rows, cols = torch.arange(scan.grid.height)[:, None], torch.arange(scan.grid.width)[:, None]
    pixels = _rectangles(scan, rows, cols.T) if axis == "row" else _rectangles(scan, rows.T, cols)
    pixels = pixels.sort(dim=1).values
    return _with_start(scan, pixels, _holders(scan, pixels[:, :-1] if scan.causal else pixels))


def _stretches(limit: int, length: int, before: int, after: int, step: int) -> tuple[Tensor, Tensor]:
    """An axis of `limit` places cut into stretches of `length`, every `step`-th place going together: the places of
    each, and those with a halo, (stretches, places), -1 outside."""
    step = min(step, limit)
    most = -(-limit // step)
    length, before, after = min(length, most), min(before, most), min(after, most)
    first = torch.arange(0, limit, length * step)[:, None] + torch.arange(step)[None, :]
    first = first[first < limit].flatten()[:, None]
    own = first + step * torch.arange(length)[None, :]
    halo = first + step * torch.arange(-before, length + after)[None, :]
    return _inside(own, limit), _inside(halo, limit)


def _rectangles(scan: Scan, rows: Tensor, cols: Tensor) -> Tensor:
    """Each of rows (a, tall) with each of cols (b, wide): the slots that predict these pixels, (a·b, tall·wide)."""
    row, col = rows[:, None, :, None], cols[None, :, None, :]
    pixel = torch.where((row >= 0) & (col >= 0), row * scan.grid.width + col, -1).flatten(0, 1).flatten(1, 2)
    return torch.where(pixel < 0, -1, scan.rank[pixel])


def _holders(scan: Scan, place: Tensor) -> Tensor:
    """The slots that contain the pixels at these places; with "ar" the last pixel is held by none."""
    return _inside(torch.where(place < 0, -1, place + scan.causal), scan.grid.size)


def _inside(slots: Tensor, size: int) -> Tensor:
    return torch.where((slots >= 0) & (slots < size), slots, -1)


def _with_start(scan: Scan, queries: Tensor, keys: Tensor) -> Tiles:
    """Puts the start token first among every tile's keys, once."""
    if scan.causal:
        keys = torch.cat([torch.zeros_like(queries[:, :1]), torch.where(keys == 0, -1, keys)], dim=1)
    return Tiles(queries, keys)
