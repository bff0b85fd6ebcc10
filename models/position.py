"""Positional encodings. Each adds to the input, turns queries and keys, or biases the scores: whatever it needs.

A query stands at its target's coordinate, a key at its content's (geometry).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .geometry import Scan
from .mixer import ScoreBias

TABLE_SIGMA = 0.01  # Image GPT's released code


@dataclass(frozen=True)
class Shape:
    """What a positional encoding is made for."""

    scan: Scan
    dim: int
    depth: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class Position(nn.Module):
    """Base: no position at all. `needs` says what a mixer must carry: "embed", "rotate" or "bias"."""

    needs: ClassVar[str] = "embed"

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def embed(self, slots: Tensor) -> Tensor | None:
        """What is added to the input at these slots, (slots, dim)."""
        return None

    def rotate(self, q: Tensor, k: Tensor, slots: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Queries and keys (batch, heads, slots, head_dim), turned."""
        return q, k

    def bias(self, layer: int) -> ScoreBias | None:
        """What is added to the scores of a layer."""
        return None


POSITIONS: dict[str, type[Position]] = {"none": Position}


def position(name: str) -> Callable[[type[Position]], type[Position]]:
    """Class decorator that puts the class into POSITIONS."""

    def register(cls: type[Position]) -> type[Position]:
        POSITIONS[name] = cls
        return cls

    return register


@position("learned1d")
class Learned1D(Position):
    """A learned table, one vector a slot (Chen et al., Image GPT, 2020): n · dim parameters."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.table = nn.Parameter(torch.empty(shape.scan.grid.size, shape.dim))

    def embed(self, slots: Tensor) -> Tensor:
        return self.table[slots]


@position("learned2d")
class Learned2D(Position):
    """A learned row vector + a learned column vector of the target: (height + width) · dim parameters."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        grid = shape.scan.grid
        self.row = nn.Parameter(torch.empty(grid.height, shape.dim))
        self.col = nn.Parameter(torch.empty(grid.width, shape.dim))

    def embed(self, slots: Tensor) -> Tensor:
        row, col = self.shape.scan.target(slots)
        return self.row[row] + self.col[col]
