"""Where the attention of a softmax model goes, measured on the grid: how much of it stays near, and how far it reaches.

Shapes: tokens (batch, height, width); each figure (depth, heads); scores (batch, heads, queries, seq), `queries` at a
time, so that n × n is never laid out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import cast

import torch
from torch import Tensor

from .igpt import Block, ImageGPT
from .mixer import ExactMixer

QUERIES = 64
"""Queries whose scores are laid out at a time."""


@dataclass(frozen=True)
class Mass:
    """Sums over images and queries, float64 (depth, heads); they add up over batches.

    start: attention on the start token; pixels: on pixels; near: on pixels at most R rows and columns from the target,
    by R; distance: on pixels, times the Euclidean distance in pixels.
    """

    start: Tensor
    pixels: Tensor
    near: dict[int, Tensor]
    distance: Tensor

    def __add__(self, other: Mass) -> Mass:
        near = {radius: mass + other.near[radius] for radius, mass in self.near.items()}
        return Mass(self.start + other.start, self.pixels + other.pixels, near, self.distance + other.distance)

    @property
    def start_share(self) -> Tensor:
        """Of all attention, what rests on the start token."""
        return self.start / (self.start + self.pixels)

    def share_within(self, radius: int) -> Tensor:
        """Of the attention on pixels, what stays within the radius."""
        return self.near[radius] / self.pixels

    @property
    def mean_distance(self) -> Tensor:
        """Of the attention on pixels, in pixels."""
        return self.distance / self.pixels


@torch.no_grad()
def measure(model: ImageGPT, tokens: Tensor, radii: Sequence[int], uniform: bool = False) -> Mass:
    """The attention of every layer and head on these images; with `uniform`, if all visible keys were equal.

    Raises ValueError for a model with a layer that has no attention weights over visible keys.
    """
    layers = [_layer(model, block, x, radii, uniform) for block, x in _inputs(model, tokens)]
    near = {radius: torch.stack([layer.near[radius] for layer in layers]) for radius in radii}
    start, pixels = torch.stack([layer.start for layer in layers]), torch.stack([layer.pixels for layer in layers])
    return Mass(start, pixels, near, torch.stack([layer.distance for layer in layers]))


def _inputs(model: ImageGPT, tokens: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Each block with what enters it."""
    x = model.embed(tokens)
    for block in cast("list[Block]", list(model.blocks)):
        if not isinstance(block.attention.mixer, ExactMixer):
            name = type(block.attention.mixer).__name__
            raise ValueError(f"{name} has no attention weights over pixels; measure a dense, local or sparse variant")
        yield block, x
        x = block(x, model.slots)


def _layer(model: ImageGPT, block: Block, x: Tensor, radii: Sequence[int], uniform: bool) -> Mass:
    mixer, scan = cast(ExactMixer, block.attention.mixer), model.scan
    q, k, _, extras = block.attention.project(block.attention_norm(x), model.slots)
    keys = model.slots
    key_row, key_col = scan.content(keys)

    def of(queries: Tensor) -> Mass:
        scores = q[:, :, queries] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if "bias" in extras:
            scores = scores + extras["bias"](queries[:, None], keys[None])
        visible = mixer.visible()(queries[:, None], keys[None])
        weights = (torch.zeros_like(scores) if uniform else scores).masked_fill(~visible, float("-inf")).softmax(-1)
        mass = weights.double().sum(0)  # (heads, queries, seq): over images
        row, col = scan.target(queries)
        rows, cols = (row[:, None] - key_row).abs(), (col[:, None] - key_col).abs()
        on_start, on_pixels = mass * scan.is_start(keys), mass * ~scan.is_start(keys)
        near = {radius: total(on_pixels * ((rows <= radius) & (cols <= radius))) for radius in radii}
        return Mass(total(on_start), total(on_pixels), near, total(on_pixels * (rows**2 + cols**2).double().sqrt()))

    def total(mass: Tensor) -> Tensor:
        return mass.sum((1, 2)).cpu()

    return reduce(add, map(of, keys.split(QUERIES)))
