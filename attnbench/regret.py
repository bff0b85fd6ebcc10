"""Regret: how many nats more than the truth a model pays on images of a source, and how many it had to pay.

Paired: both likelihoods are of the same images, so that the luck of the draw cancels out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from attnbench.source import Images, Source
from attnbench.stats import unit_interval

Floats = NDArray[np.float64]

YARDSTICKS = (
    "regret_nats_per_token", "regret_interval", "optimum_nats_per_token", "gap_nats_per_token", "best_nats_in_field",
)  # fmt: skip
"""What a record's metrics say of a model on images of a source."""
LARGEST_FIELD = 4096
"""Pixels up to which a receptive field is worked out; it takes a matrix product of this side a layer."""


@dataclass(frozen=True, eq=False)
class Regret:
    """Nats per token beyond the truth, mean over images with its 95 % bootstrap interval; per_image (count,)."""

    mean: float
    low: float
    high: float
    per_image: Floats


def regret(nats: ArrayLike, source: Source, tokens: Images) -> Regret:
    """Of a model that pays `nats` (count,), nats per token, for each of these images (count, height, width).

    Any scan order will do: an image's likelihood does not depend on the order in which it is taken apart. The interval
    is a bootstrap's over images, the same at every call; of other seeds of the model it says nothing.

    Raises ValueError: not one number an image; images that the source cannot have drawn.
    """
    paid = np.asarray(nats, dtype=np.float64)
    if paid.shape != (len(tokens),) or not len(tokens):
        raise ValueError(f"nats of shape ({len(tokens)},) wanted, one or more, not {paid.shape}")
    truth = -source.log_prob(tokens).mean(axis=(1, 2))
    if not np.isfinite(truth).all():
        raise ValueError(f"{source} cannot have drawn image {int(np.isinf(truth).argmax())}")
    per_image = paid - truth
    low, high = unit_interval(per_image.tolist())
    return Regret(float(per_image.mean()), low, high, per_image)


def receptive_field(model: nn.Module) -> NDArray[np.bool_] | None:
    """bool (n, n), target × content: which earlier pixels a trunk uses, through all its layers, to predict which.

    A mixer that states no mask sees all earlier pixels. None for "bert", for another scan than the raster, for what
    is no trunk of mixers, and beyond LARGEST_FIELD pixels.
    """
    scan, mixers = getattr(model, "scan", None), getattr(model, "mixers", None)
    if scan is None or not mixers or not scan.causal or scan.grid.size > LARGEST_FIELD:
        return None
    slots = torch.arange(scan.grid.size)
    if not torch.equal(model.order.cpu(), slots):  # type: ignore[operator, union-attr, arg-type]
        return None
    reached = torch.eye(scan.grid.size, dtype=torch.bool)  # slot × slot
    for mixer in reversed(mixers):
        visible = mixer.visible()(slots[:, None], slots[None, :]) if hasattr(mixer, "visible") else _causal(slots)
        # Through the residual stream a slot always sees itself.
        reached = (reached.float() @ (visible | torch.eye(len(slots), dtype=torch.bool)).float()) > 0
    field = torch.zeros_like(reached)
    field[:, :-1] = reached[:, 1:]  # slot t holds pixel t - 1; slot 0 the start token
    return field.numpy()


def _causal(slots: Tensor) -> Tensor:
    return slots[:, None] >= slots[None, :]


def yardsticks(model: nn.Module, nats: ArrayLike, source: Source, tokens: Images) -> dict[str, Any]:
    """A record's metrics for a model on images of a source; null where something cannot be computed.

    regret_nats_per_token and regret_interval (low, high; 95 %); optimum_nats_per_token, what the best of all models
    would pay on average over all images; gap_nats_per_token, what the model's receptive field alone makes it pay beyond
    that, and best_nats_in_field, the sum of both.
    """
    found = regret(nats, source, tokens)
    optimum, field = source.optimum_nats_per_token(), receptive_field(model)
    gap = None if field is None else source.gap(field)
    mean_gap = None if gap is None else float(gap.mean())
    best = None if optimum is None or mean_gap is None else optimum + mean_gap
    return dict(zip(YARDSTICKS, (found.mean, [found.low, found.high], optimum, mean_gap, best), strict=True))
