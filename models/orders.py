"""The orders in which a grid can be read: int64 (height · width,), the raster index of each pixel in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RANDOM_SEED = 0


def _raster(height: int, width: int) -> Tensor:
    """Row after row, each from the left."""
    return torch.arange(height * width)


def _snake(height: int, width: int) -> Tensor:
    """Row after row, every second one from the right: consecutive pixels are neighbours."""
    pixels = _raster(height, width).view(height, width)
    pixels[1::2] = pixels[1::2].flip(1)
    return pixels.flatten()


def _column(height: int, width: int) -> Tensor:
    """Column after column, each from the top."""
    return _raster(height, width).view(height, width).T.flatten()


def _hilbert(height: int, width: int) -> Tensor:
    """Hilbert's curve, generalised to any sides (Červený, gilbert, 2018): neighbours on the grid stay near in the scan.

    Consecutive pixels share a side, but for at most one diagonal step where the longer side is odd and the other even.
    """
    long, short = (complex(0, width), complex(height)) if width >= height else (complex(height), complex(0, width))
    return torch.tensor([round(pixel.real) * width + round(pixel.imag) for pixel in _curve(0j, long, short)])


def _random(height: int, width: int) -> Tensor:
    """One fixed permutation a grid."""
    return torch.randperm(height * width, generator=torch.Generator().manual_seed(RANDOM_SEED), device="cpu")


def _curve(at: complex, long: complex, short: complex) -> Iterator[complex]:
    """The pixels row + col·i of the rectangle spanned from `at`, entered there and left at the far end of `long`."""
    length, breadth = _size(long), _size(short)
    ahead, aside = long / length, short / breadth
    if breadth == 1 or length == 1:
        for step in range(length * breadth):
            yield at + step * (ahead if breadth == 1 else aside)
        return
    half_long, half_short = ahead * (length // 2), aside * (breadth // 2)
    if 2 * length > 3 * breadth:  # much longer than broad: two rectangles, one behind the other
        if (length // 2) % 2 and length > 2:
            half_long += ahead
        yield from _curve(at, half_long, short)
        yield from _curve(at + half_long, long - half_long, short)
        return
    if (breadth // 2) % 2 and breadth > 2:
        half_short += aside
    yield from _curve(at, half_short, half_long)  # out, along, and back
    yield from _curve(at + half_short, long, short - half_short)
    yield from _curve(at + long - ahead + half_short - aside, -half_short, half_long - long)


def _size(side: complex) -> int:
    return round(abs(side.real) + abs(side.imag))


ORDERS: dict[str, Callable[[int, int], Tensor]] = {
    "raster": _raster, "snake": _snake, "column": _column, "hilbert": _hilbert, "random": _random,
}  # fmt: skip
