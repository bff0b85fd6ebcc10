"""Positional encodings. Each adds to the input, turns queries and keys, or biases the scores: whatever it needs.

A query stands at its target's coordinate, a key at its content's (geometry).  In one dimension that is the place along
the scan, in two the true row and column.  The start token stands where geometry puts it, one step before the first
pixel (place -1; column -1), and is turned and biased like a pixel there; but relbias2d learns an entry for it alone.

All but the learned tables carry over to another side: what they learn does not depend on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

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
    by_offset: ClassVar[bool] = False
    """Whether the bias depends on (Δrow, Δcol) alone, and for the start token on nothing."""
    relates: ClassVar[str] = ""
    """What of a query's target and a key's pixel the bias depends on, whatever it is for the start token: "offset",
    (Δrow, Δcol); "distance", along the scan; none: anything."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def embed(self, slots: Tensor) -> Tensor | None:
        """What is added to the input at these slots, (slots, dim)."""
        return None

    def rotate(self, q: Tensor, k: Tensor, slots: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Queries and keys (batch, heads, slots, head_dim), turned."""
        return q, k

    def angles(self, slots: Tensor, layer: int) -> tuple[Tensor, Tensor] | None:
        """By what `rotate` turns pairs of channels of queries and of keys, (heads or none, slots, head_dim / 2)."""
        return None

    def bias(self, layer: int) -> ScoreBias | None:
        """What is added to the scores of a layer."""
        return None

    def initialise(self) -> None:
        """Sets the parameters that are not to be drawn like a table, after the trunk has drawn them all."""


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
    """A learned row vector + a learned column vector of the target (Child et al., Sparse Transformers, 2019, for
    images): (height + width) · dim parameters."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        grid = shape.scan.grid
        self.row = nn.Parameter(torch.empty(grid.height, shape.dim))
        self.col = nn.Parameter(torch.empty(grid.width, shape.dim))

    def embed(self, slots: Tensor) -> Tensor:
        row, col = self.shape.scan.target(slots)
        return self.row[row] + self.col[col]


def geometric(base: float, count: int) -> Tensor:
    """float64 (count,): frequencies from 1 down towards 1 / base, each by the same factor (Vaswani 2017)."""
    return base ** -(torch.arange(count, dtype=torch.float64) / count)


def waves(place: Tensor, width: int, base: float = 10_000.0) -> Tensor:
    """float64 (places, width): sines, then cosines, of a coordinate (places,) at width / 2 frequencies."""
    angle = place[:, None].double() * geometric(base, width // 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def _divides(parts: int, what: str, width: int, name: str) -> None:
    if width % parts:
        raise ValueError(
            f"position {name!r} splits {what} into {parts} equal parts, which {width} is not; change dim or heads"
        )


class Sinusoids(Position):
    """Base: a fixed table of waves times one learned number, at first as loud as a learned table is at first."""

    table: Tensor  # (n, dim)

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.scale = nn.Parameter(torch.empty(1))  # not a scalar: those FSDP cannot share out
        table = self.waves(torch.arange(shape.scan.grid.size))
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def waves(self, slots: Tensor) -> Tensor:
        """float64 (slots, dim): the table's rows.  Raises ValueError for a dim that does not split into equal parts."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self) -> None:
        self.scale.fill_(TABLE_SIGMA * math.sqrt(2))  # a wave's mean square is 1/2

    def embed(self, slots: Tensor) -> Tensor:
        return self.scale * self.table[slots]


@position("sin1d")
class Sin1D(Sinusoids):
    """Sines and cosines of the target's place along the scan (Vaswani et al., Attention Is All You Need, 2017)."""

    def waves(self, slots: Tensor) -> Tensor:
        _divides(2, "dim", self.shape.dim, "sin1d")
        return waves(slots, self.shape.dim)


@position("sin2d")
class Sin2D(Sinusoids):
    """Half the channels are waves of the target's row, half of its column (Parmar et al., Image Transformer, 2018; Wang
    & Liu, 2D positional embedding, 2019; He et al., MAE, 2022)."""

    def waves(self, slots: Tensor) -> Tensor:
        _divides(4, "dim", self.shape.dim, "sin2d")
        return torch.cat([waves(place, self.shape.dim // 2) for place in self.shape.scan.target(slots)], dim=-1)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Turns channels p and p + head_dim/2 of x (…, slots, head_dim) together by angle (…, slots, head_dim/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Rotary(Position):
    """Base: pairs of channels of queries and keys are turned by Σ coordinate · frequency, so that scores depend on
    offsets alone (Su et al., RoFormer, 2021)."""

    needs = "rotate"

    def frequencies(self, layer: int) -> Tensor:
        """(coordinates, heads or 1, head_dim / 2), radians a step."""
        raise NotImplementedError

    def places(self, slots: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The coordinates of these slots as queries and as keys."""
        scan = self.shape.scan
        return scan.target(slots), scan.content(slots)

    def angles(self, slots: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        frequency = self.frequencies(layer).to(slots.device)
        at_query, at_key = (
            sum(at[:, None] * f[:, None, :] for at, f in zip(place, frequency, strict=True))
            for place in self.places(slots)
        )
        return at_query, at_key

    def rotate(self, q: Tensor, k: Tensor, slots: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        at_query, at_key = self.angles(slots, layer)
        return turn(q, at_query), turn(k, at_key)


class FixedRotary(Rotary):
    """Base: frequencies that are not learned, so that the angles are worked out once."""

    table: Tensor  # (queries and keys, n, head_dim / 2)

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        frequency = self.frequencies(0)[:, 0]
        angles = [torch.stack(c).T.double() @ frequency for c in self.places(torch.arange(shape.scan.grid.size))]
        # Whole turns are taken away in float64: a place of 65,536 would cost float32 its last four digits.
        turns = torch.stack(angles).remainder(2 * math.pi)
        self.register_buffer("table", turns.to(torch.get_default_dtype()), persistent=False)

    def angles(self, slots: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.table[0, slots], self.table[1, slots]


@position("rope1d")
class Rope1D(FixedRotary):
    """Rotary by the place along the scan, base 10,000 (Su et al., RoFormer, 2021)."""

    def frequencies(self, layer: int) -> Tensor:
        _divides(2, "head_dim", self.shape.head_dim, "rope1d")
        return geometric(10_000.0, self.shape.head_dim // 2)[None, None]

    def places(self, slots: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (slots,), (self.shape.scan.content_place(slots),)


@position("rope2d")
class Rope2D(FixedRotary):
    """Axial rotary: half of each head is turned by the row, half by the column, base 100 (Heo et al., Rotary Position
    Embedding for Vision Transformer, 2024)."""

    def frequencies(self, layer: int) -> Tensor:
        _divides(4, "head_dim", self.shape.head_dim, "rope2d")
        frequency = geometric(100.0, self.shape.head_dim // 4)
        none = torch.zeros_like(frequency)
        return torch.stack([torch.cat([frequency, none]), torch.cat([none, frequency])])[:, None]


@position("mixed2d")
class Mixed2D(Rotary):
    """Rotary by ω_row · row + ω_col · col, both learned for each layer, head and pair (Heo et al., 2024, RoPE-Mixed).

    At first the frequencies have base 10 and come two by two at right angles, in directions that differ by head.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        _divides(2, "head_dim", shape.head_dim, "mixed2d")
        self.frequency = nn.Parameter(torch.empty(shape.depth, 2, shape.heads, shape.head_dim // 2))

    @torch.no_grad()
    def initialise(self) -> None:
        heads, pairs = self.shape.heads, self.shape.head_dim // 2
        magnitude = geometric(10.0, -(-pairs // 2)).repeat_interleave(2)[:pairs]
        quarter = math.pi / 2
        direction = quarter * (torch.arange(heads)[:, None] / heads + torch.arange(pairs) % 2)
        self.frequency.copy_(magnitude * torch.stack([direction.sin(), direction.cos()]))

    def frequencies(self, layer: int) -> Tensor:
        return self.frequency[layer]


class Alibi(Position):
    """Base: a penalty that grows with the distance, head h of H by 2^(-8(h + 1)/H) a step; nothing is learned (Press et
    al., Train Short, Test Long, 2021; the slopes of any H by its formula, without its rounding to powers of two)."""

    needs = "bias"
    slopes: Tensor  # (heads,)

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.register_buffer("slopes", 2 ** (-8 * (torch.arange(shape.heads) + 1.0) / shape.heads), persistent=False)

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        """Steps from each query's target to its key's pixel, at least 0, in the shape of the slots together."""
        raise NotImplementedError

    def bias(self, layer: int) -> ScoreBias:
        def penalty(query: Tensor, key: Tensor, head: Tensor | None = None) -> Tensor:
            distance = self.distance(query, key)
            slopes = self.slopes.view(-1, *[1] * distance.ndim) if head is None else self.slopes[head]
            return -slopes * distance

        return penalty


@position("alibi1d")
class Alibi1D(Alibi):
    """The distance along the scan."""

    relates = "distance"

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        return self.shape.scan.distance(query, key).abs()


@position("alibi2d")
class Alibi2D(Alibi):
    """|Δrow| + |Δcol|."""

    relates = "offset"

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        (row, col), (key_row, key_col) = self.shape.scan.target(query), self.shape.scan.content(key)
        return (row - key_row).abs() + (col - key_col).abs()


@position("relbias2d")
class RelativeBias2D(Position):
    """A learned number for each layer, head and (Δrow, Δcol), and one for the start token (Shaw et al., Self-Attention
    with Relative Position Representations, 2018; in two dimensions Liu et al., Swin Transformer, 2021).

    A table trained at one side can be loaded at another; an offset beyond it takes the farthest entry on that axis.
    Then load it before an optimiser is made: the table keeps the size that it was trained at.
    """

    needs = "bias"
    by_offset, relates = True, "offset"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        grid = shape.scan.grid
        # Where no key lies below its query, no entry is made for one that does.
        rows = grid.height if shape.scan.downward else 2 * grid.height - 1
        self.table = nn.Parameter(torch.empty(shape.depth, shape.heads, rows, 2 * grid.width - 1))
        self.start = nn.Parameter(torch.empty(shape.depth, shape.heads))

    def bias(self, layer: int) -> ScoreBias:
        scan = self.shape.scan
        rows, cols = self.table.shape[2:]
        middle = (0 if scan.downward else rows // 2, cols // 2)

        start = self.start[layer]
        # Heads last while it is looked up: twice as fast on a CPU as heads first, backward too.
        table = self.table[layer].flatten(1).T.contiguous()

        def entry(query: Tensor, key: Tensor, head: Tensor | None = None) -> Tensor:
            (row, col), (key_row, key_col) = scan.target(query), scan.content(key)
            down = (row - key_row + middle[0]).clamp(0, rows - 1)
            right = (col - key_col + middle[1]).clamp(0, cols - 1)
            offset = down * cols + right
            if head is not None:
                return torch.where(scan.is_start(key), start[head], table[offset, head])
            return torch.where(scan.is_start(key)[..., None], start, table[offset]).movedim(-1, 0)

        return entry

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        table = state_dict.get(f"{prefix}table")
        own = self.table.shape
        if isinstance(table, Tensor) and table.ndim == 4 and table.shape[:2] == own[:2] and table.shape != own:
            self.table = nn.Parameter(self.table.new_empty(table.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
