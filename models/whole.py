"""What a variant is built for that is a model of its own, rather than an attention in the trunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor, nn

from .geometry import Scan

TOLERANCE, CLOSE = 0.02, 0.005
"""A model scaled to a share of the trunk's parameters misses it by so much at most; so much is as good as none."""


LARGEST = 1000
"""The largest share of the trunk's parameters that is a sensible wish."""


@dataclass(frozen=True)
class Whole:
    """The task, and the shape of the trunk that the model stands beside."""

    scan: Scan
    vocab: int
    dim: int
    depth: int
    heads: int
    backend: str = "auto"
    channels: int = 1
    classes: int = 10

    def trunk_parameters(self, table: bool = True) -> int:
        """Parameters of Image GPT itself at this shape, L(12d² + 2d) + 2Vd + nd + 2d; `table`: with nd of it."""
        dim = self.dim
        places = self.scan.grid.size if table else 0
        return self.depth * (12 * dim**2 + 2 * dim) + (2 * self.vocab + places + 2) * dim

    def budget(self, share: float | str, table: bool = True) -> float:
        """That share of the trunk's parameters; 0.5 and "1/2" are the same.  Raises ValueError."""
        if not isinstance(table, bool):
            raise ValueError(f"table must be true or false, not {table!r}")
        try:
            wanted = Fraction(share)
        except (ValueError, TypeError, ZeroDivisionError, OverflowError):
            wanted = Fraction(0)
        if not 0 < wanted <= LARGEST or isinstance(share, bool):
            raise ValueError(
                "share must be a part of the trunk's parameters above 0, such as 1, 0.5 or 1/3, and at most "
                f"{LARGEST}: {share!r}"
            )
        return float(wanted * self.trunk_parameters(table))


class WholeModel(nn.Module):
    """Base of such a model.  Its own settings are the keyword-only arguments of its constructor."""

    backends: ClassVar[tuple[str, ...]] = ("conv",)
    order: Tensor  # (seq,): the raster index of the pixel that each slot predicts

    def __init__(self, whole: Whole) -> None:
        super().__init__()
        if whole.backend not in ("auto", *self.backends):
            refusal = f"has no such implementation (it has {', '.join(self.backends)})"
            raise ValueError(f"backend {whole.backend!r} cannot run {type(self).__name__}: {refusal}")
        self.scan, self.backend = whole.scan, self.backends[0]
        self.register_buffer("order", whole.scan.path, persistent=False)
        if whole.scan.order != "raster":
            raise ValueError(f"{type(self).__name__} reads the raster only, not scan {whole.scan.order!r}")

    def flops(self) -> int:
        """Forward FLOPs of one image, a multiplication and an addition being two."""
        raise NotImplementedError


def nearest(
    budget: float, sizes: dict[tuple[int, ...], int], unusual: Callable[[tuple[int, ...]], float] = lambda widths: 0.0
) -> tuple[int, ...]:
    """Of the widths with about `budget` parameters the least unusual, or else the nearest to it.

    Raises ValueError if none lies within 2 %.
    """
    missed = {widths: abs(size - budget) / budget for widths, size in sizes.items()}
    if close := [widths for widths, share in missed.items() if share <= CLOSE]:
        return min(close, key=unusual)
    widths = min(missed, key=lambda widths: missed[widths])
    if missed[widths] > TOLERANCE:
        raise ValueError(
            f"no width gives {budget:,.0f} parameters within {TOLERANCE:.0%}; choose a larger share or dim"
        )
    return widths
