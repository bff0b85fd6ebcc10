"""Pictures drawn by a model: samples from nothing, and completions of images whose first pixels are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def draw(
    model: Any,
    count: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    known: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    """int64 (count, height, width), pixel after pixel along the scan, by incremental decoding.

    The first `share` of the pixels is copied from `known` (count, height, width).
    """
    model.eval()
    grid, order = model.scan.grid, model.order
    state = model.start(count)
    given = None if known is None else known.flatten(1).to(order.device)[:, order]
    keep = round(share * grid.size) if given is not None else 0
    pixel: Tensor | None = None
    pixels: list[Tensor] = []
    for t in range(grid.size):
        logits, state = model.step(pixel, state)
        if given is not None and t < keep:
            pixel = given[:, t]
        else:
            chances = (logits.float() / temperature).softmax(-1).cpu()
            pixel = torch.multinomial(chances, 1, generator=generator).squeeze(1).to(order.device)
        pixels.append(pixel)
    return torch.stack(pixels, dim=1)[:, torch.argsort(order)].unflatten(1, (grid.height, grid.width))
