"""In which order a model is asked for the pixels of some images: one a step, from the first to the last."""

from __future__ import annotations

from torch import Tensor


def check_step(pixel: Tensor | None, slot: int, batch: int, size: int) -> None:
    """Raises ValueError unless step `slot` of `size` for `batch` images can begin with that pixel, int64 (batch,)."""
    if slot >= size:
        raise ValueError(f"all {size} pixels have been decoded; begin the next images with start")
    if (pixel is None) != (slot == 0):
        raise ValueError("the first step takes None, every later one the pixel before")
    if pixel is not None and len(pixel) != batch:
        raise ValueError(f"{len(pixel)} pixels for the {batch} images that decoding began with")
