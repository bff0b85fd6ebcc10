"""Pictures drawn by a model: samples from nothing, and completions of images whose first pixels are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@torch.no_grad()
def draw(
    model: Any,
    count: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    known: Tensor | None = None,
    share: float = 0.0,
    tokens_per_pixel: int = 1,
) -> Tensor:
    """int64 (count, height, width), token after token along the scan, by incremental decoding.

    The first `share` of the pixels, whole ones, is copied from `known` (count, height, width).
    """
    model.eval()
    grid, order = model.scan.grid, model.order
    state = model.start(count)
    given = None if known is None else known.flatten(1).to(order.device)[:, order]
    keep = _kept(grid.size, share, tokens_per_pixel) if given is not None else 0
    pixel: Tensor | None = None
    pixels: list[Tensor] = []
    for t in range(grid.size):
        logits, state = model.step(pixel, state)
        if given is not None and t < keep:
            pixel = given[:, t]
        else:
            logits = logits.float()
            below = (logits - logits.amax(-1, keepdim=True)).double() / temperature  # a float32 has no 1e-50
            chances = below.float().softmax(-1).cpu()
            pixel = torch.multinomial(chances, 1, generator=generator).squeeze(1).to(order.device)
        pixels.append(pixel)
    return torch.stack(pixels, dim=1)[:, torch.argsort(order)].unflatten(1, (grid.height, grid.width))


def shown(model: Any, share: float, tokens_per_pixel: int = 1) -> NDArray[np.bool_]:
    """bool (height, width), in pixels: those that `draw` copies with all their tokens."""
    grid = model.scan.grid
    copied = np.zeros(grid.size, dtype=bool)
    copied[model.order.cpu().numpy()[: _kept(grid.size, share, tokens_per_pixel)]] = True
    return np.asarray(copied.reshape(grid.height, -1, tokens_per_pixel).all(axis=-1))


def _kept(tokens: int, share: float, tokens_per_pixel: int) -> int:
    """How many tokens the first `share` of the pixels has."""
    return round(share * (tokens // tokens_per_pixel)) * tokens_per_pixel
