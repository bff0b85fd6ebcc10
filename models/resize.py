"""Weights at a side other than the one they were trained at: what depends on the grid is resized by interpolation.

Only learned tables of places do; all other encodings, the masks and the linear maps carry over as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .geometry import Scan
from .igpt import ImageGPT
from .position import Learned1D, Learned2D, RelativeBias2D


@torch.no_grad()
def load_resized(model: ImageGPT, weights: dict[str, Tensor], trained: Scan) -> list[str]:
    """Loads weights that were trained on another grid; the names of the tables that were resized.

    Raises ValueError where they do not fit for another reason: a table is lacking or of another grid than `trained`, or
    relative biases were learned where earlier pixels may lie below later ones and here they may not, or the other way.
    """
    now, found = model.scan, dict(weights)
    same = (now.grid, now.order) == (trained.grid, trained.order)
    position = getattr(model, "position", None)
    if isinstance(position, Learned1D) and not same:
        found["position.table"] = _slots(_table(weights, "table", trained.grid.size), trained, now)
    if isinstance(position, Learned2D) and not same:
        found["position.row"] = _line(_table(weights, "row", trained.grid.height), now.grid.height)
        found["position.col"] = _line(_table(weights, "col", trained.grid.width), now.grid.width)
    if isinstance(position, RelativeBias2D) and trained.downward != now.downward:
        here, there = (f"scan {scan.order!r} with objective {scan.objective!r}" for scan in (now, trained))
        raise ValueError(f"the weights do not fit: their biases by offset are of {there}, not of {here}")
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit: {' '.join(str(error).split())[:200]}") from error
    return [name for name in weights if found[name] is not weights[name]]


def _table(weights: dict[str, Tensor], name: str, places: int) -> Tensor:
    """The position's table of that name, (places, dim); else ValueError."""
    table = weights.get(f"position.{name}")
    if table is None or table.ndim != 2 or len(table) != places:
        told = "none" if table is None else str(tuple(table.shape))
        raise ValueError(f"the weights do not fit: position.{name} for {places} places wanted, and they have {told}")
    return table


def _slots(table: Tensor, trained: Scan, now: Scan) -> Tensor:
    """(n, dim), a vector a slot, as a picture of vectors: bilinear, averaging where it shrinks."""
    picture = rearrange(table[trained.rank], "(h w) d -> 1 d h w", h=trained.grid.height)
    shrinks = now.grid.height < trained.grid.height or now.grid.width < trained.grid.width
    size = (now.grid.height, now.grid.width)
    resized = F.interpolate(picture, size, mode="bilinear", align_corners=False, antialias=shrinks)
    return rearrange(resized, "1 d h w -> (h w) d")[now.path]


def _line(table: Tensor, length: int) -> Tensor:
    """(places, dim) -> (length, dim), linear between neighbours."""
    picture = rearrange(table, "n d -> 1 d n 1")
    resized = F.interpolate(picture, (length, 1), mode="bilinear", align_corners=False, antialias=length < len(table))
    return rearrange(resized, "1 d n 1 -> n d")
