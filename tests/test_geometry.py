"""Scan orders, coordinates, masks and tiles, each against its definition written out pixel by pixel."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from models import geometry
from models.geometry import Grid, Predicate, Scan, Tiles
from models.orders import ORDERS

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 5), (7, 11)]
Pixel = tuple[int, int]
See = Callable[[Pixel, Pixel, int, int], bool]  # target, content, their places along the scan

# Every mask, written for one pair of pixels; `earlier in the scan` is added by `declared`.
MASKS: dict[str, tuple[Callable[[Scan], Predicate], Callable[[Scan], list[Tiles]], See]] = {
    "window1d": (
        lambda scan: geometry.window1d(scan, 4),
        lambda scan: [geometry.runs(scan, 4, length=3)],
        lambda p, q, i, j: abs(i - j) <= 4,
    ),
    "window2d": (
        lambda scan: geometry.window2d(scan, 2),
        lambda scan: [geometry.patches(scan, 2, side=3)],
        lambda p, q, i, j: abs(p[0] - q[0]) <= 2 and abs(p[1] - q[1]) <= 2,
    ),
    "dilated2d": (
        lambda scan: geometry.dilated2d(scan, 1, 2),
        lambda scan: [geometry.patches(scan, 1, side=2, dilation=2)],
        lambda p, q, i, j: abs(p[0] - q[0]) in (0, 2) and abs(p[1] - q[1]) in (0, 2),
    ),
    "global_window2d": (
        lambda scan: geometry.global_window2d(scan, 1),
        lambda scan: [geometry.patches_and_row_starts(scan, 1, side=3)],
        lambda p, q, i, j: (abs(p[0] - q[0]) <= 1 and abs(p[1] - q[1]) <= 1) or q[1] == 0,
    ),
    "blocks2d": (
        lambda scan: geometry.blocks2d(scan, 3, 2),
        lambda scan: [geometry.patches(scan, 2, side=3)],
        lambda p, q, i, j: all(-2 <= b - 3 * (a // 3) < 3 + 2 for a, b in zip(p, q, strict=True)),
    ),
    "row": (
        lambda scan: geometry.line(scan, "row"),
        lambda scan: [geometry.lines(scan, "row")],
        lambda p, q, i, j: p[0] == q[0],
    ),
    "column": (
        lambda scan: geometry.line(scan, "col"),
        lambda scan: [geometry.lines(scan, "col")],
        lambda p, q, i, j: p[1] == q[1],
    ),
    "strided": (
        lambda scan: geometry.strided(scan, 4),
        lambda scan: [geometry.runs(scan, 4, length=3), geometry.classes(scan, 4)],
        lambda p, q, i, j: abs(i - j) <= 4 or (i - j) % 4 == 0,
    ),
    "fixed": (
        lambda scan: geometry.fixed(scan, 4, 2),
        lambda scan: [geometry.runs_and_ends(scan, 4, 2)],
        lambda p, q, i, j: i // 4 == j // 4 or j % 4 >= 2,
    ),
}


def pixels(scan: Scan) -> list[Pixel]:
    """(row, col) along the scan."""
    return [divmod(int(index), scan.grid.width) for index in scan.path]


def declared(scan: Scan, see: See) -> torch.Tensor:
    """bool (query, key), from the definition: a loop over pixels that knows of slots only where a pixel is held."""
    along = pixels(scan)
    mask = torch.zeros(len(along), len(along), dtype=torch.bool)
    for i, target in enumerate(along):
        for j, content in enumerate(along):
            key = j + 1 if scan.causal else j
            if key < len(along) and (j < i or not scan.causal):
                mask[i, key] = see(target, content, i, j)
        if scan.causal:
            mask[i, 0] = True
    return mask


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_an_order_visits_every_pixel_once_at_its_true_coordinates(order: str, height: int, width: int) -> None:
    scan = Scan(Grid(height, width), order=order)
    slots = torch.arange(scan.grid.size)
    row, col = scan.target(slots)
    assert sorted(zip(row.tolist(), col.tolist(), strict=True)) == [(r, c) for r in range(height) for c in range(width)]
    assert torch.equal(row * width + col, scan.path)
    assert torch.equal(scan.rank[scan.path], slots)
    held_row, held_col = scan.content(slots)
    assert torch.equal(held_row[1:], row[:-1]) and torch.equal(held_col[1:], col[:-1])
    assert int(held_col[0]) == -1 and int(held_row[0]) == int(row[0])


def test_orders_of_three_by_four_are_these() -> None:
    paths = {order: Scan(Grid(3, 4), order=order).path.tolist() for order in ORDERS}
    assert paths["raster"] == list(range(12))
    assert paths["snake"] == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    assert paths["column"] == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert paths["random"] not in [path for order, path in paths.items() if order != "random"]
    assert paths["random"] == Scan(Grid(3, 4), "bert", "random").path.tolist()  # always the same one
    with pytest.raises(ValueError, match="did you mean 'hilbert'"):
        Scan(Grid(3, 4), order="hilber")


@pytest.mark.parametrize("height", range(1, 12))
@pytest.mark.parametrize("width", range(1, 12))
def test_hilbert_steps_to_a_neighbour(height: int, width: int) -> None:
    along = pixels(Scan(Grid(height, width), order="hilbert"))
    steps = [(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in itertools.pairwise(along)]
    assert set(steps) <= {(0, 1), (1, 0), (1, 1)}
    assert steps.count((1, 1)) <= (max(height, width) % 2 == 1 and min(height, width) % 2 == 0)


def test_hilbert_of_a_power_of_two_keeps_quadrants_together() -> None:
    """Not just any walk: every aligned 4×4 square of an 8×8 grid is one run of 16 places."""
    along = pixels(Scan(Grid(8, 8), order="hilbert"))
    for first in range(0, 64, 16):
        assert len({(row // 4, col // 4) for row, col in along[first : first + 16]}) == 1


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_a_mask_is_its_definition(name: str, order: str, objective: str) -> None:
    for height, width in SHAPES:
        scan = Scan(Grid(height, width), objective, order)
        mask, want = geometry.matrix(MASKS[name][0](scan), scan.grid.size), declared(scan, MASKS[name][2])
        assert torch.equal(mask, want), f"{height}×{width}"
        if scan.grid.size > 30 and not want.all():
            assert not torch.equal(mask.roll(1, dims=1), want)  # a mask shifted by one is another mask


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_tiles_hold_every_query_once_and_every_visible_key_once(name: str, order: str, objective: str) -> None:
    for height, width in SHAPES:
        scan = Scan(Grid(height, width), objective, order)
        size = scan.grid.size
        reached = torch.zeros(size, size, dtype=torch.bool)
        for queries, keys in MASKS[name][1](scan):
            assert sorted(queries[queries >= 0].tolist()) == list(range(size))
            assert int(keys.max()) < size
            for tile, named in zip(queries, keys, strict=True):
                assert len(set(named[named >= 0].tolist())) == int((named >= 0).sum())
                reached[tile[tile >= 0][:, None], named[named >= 0][None, :]] = True
        want = declared(scan, MASKS[name][2])
        assert not (want & ~reached).any(), f"{height}×{width}"


@pytest.mark.parametrize("cells", [1, 7, 50, geometry.CELLS])
@pytest.mark.parametrize("name", [name for name in MASKS if name != "strided"])
def test_pairs_are_those_of_the_mask_in_slices_of_any_size(
    name: str, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "CELLS", cells)
    for objective, order in itertools.product(("ar", "bert"), ORDERS):
        scan = Scan(Grid(5, 7), objective, order)
        visible, (tiles,) = MASKS[name][0](scan), MASKS[name][1](scan)
        assert tiles.pairs(visible) == int(geometry.matrix(visible, 35).sum())


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask", [geometry.strided, geometry.window1d])
def test_pairs_by_distance_are_those_of_the_mask(
    mask: Callable[[Scan, int], Predicate], order: str, objective: str
) -> None:
    for (height, width), reach in itertools.product(SHAPES, (1, 2, 4, 7, 11, 100)):
        scan = Scan(Grid(height, width), objective, order)
        visible = mask(scan, reach)
        assert geometry.pairs_by_distance(scan, visible) == int(geometry.matrix(visible, scan.grid.size).sum())


@pytest.mark.parametrize("order", ORDERS)
def test_a_reach_beyond_the_grid_makes_no_wider_tiles(order: str) -> None:
    scan = Scan(Grid(3, 40), "ar", order)
    for tiles in (lambda reach: geometry.patches(scan, reach), lambda reach: geometry.runs(scan, reach)):
        wide, wider = tiles(120), tiles(10**9)
        assert torch.equal(wide.queries, wider.queries) and torch.equal(wide.keys, wider.keys)
        assert wider.keys.shape[1] <= 1 + 9 * 88  # three rows on either side of three, 40 columns of 8


def test_a_target_far_from_the_border_sees_as_many_pixels_as_the_design_says() -> None:
    scan, radius = Scan(Grid(9, 9)), 3
    mask = geometry.matrix(geometry.window2d(scan, radius), 81)
    assert int(mask[4 * 9 + 4].sum()) == 1 + 2 * radius**2 + 2 * radius


@pytest.mark.parametrize(
    ("tiles", "power"),
    [
        (lambda scan: geometry.patches(scan, 3), 1.0),
        (lambda scan: geometry.patches(scan, 3, dilation=2), 1.0),
        (lambda scan: geometry.lines(scan, "row"), 1.5),
        (lambda scan: geometry.lines(scan, "col"), 1.5),
        (lambda scan: geometry.classes(scan, scan.line), 1.5),
        (lambda scan: geometry.runs_and_ends(scan, scan.line, 1), 1.5),
        (lambda scan: geometry.patches_and_row_starts(scan, 3), 1.5),
    ],
)
@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_pairs_in_tiles_grow_as_declared(tiles: Callable[[Scan], Tiles], power: float, order: str) -> None:
    pairs = []
    for side in (32, 64):
        queries, keys = tiles(Scan(Grid(side, side), order=order))
        pairs.append(queries.numel() * keys.shape[1])
    assert pairs[1] / pairs[0] <= 4**power * 1.05
