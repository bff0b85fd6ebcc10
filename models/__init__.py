"""Mathematics of attention on pixels: variants, their oracles, the trunk. Knows no data set, no file, no clock."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

# Importing a family registers its variants.
from . import cnn, decay2d, full, gated, imagegpt, linear, local, sparse  # noqa: F401
from .geometry import Grid, Scan
from .igpt import ImageGPT
from .mixer import ExactMixer, Layer, Mixer
from .position import POSITIONS
from .registry import OBJECTIVES, SUPERVISED, VARIANTS, Variant, choose, positive, variant
from .whole import Whole

__all__ = [
    "OBJECTIVES", "SUPERVISED", "VARIANTS", "Layer", "Mixer", "Variant", "build", "load_imagegpt", "options", "variant",
]  # fmt: skip


def options(name: str) -> dict[str, Any]:
    """The variant's own options and their defaults: the keyword-only arguments of its class."""
    parameters = inspect.signature(_known(name).cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def build(
    name: str,
    *,
    height: int,
    width: int,
    vocab: int,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    objective: str | None = None,
    backend: str = "auto",
    position: str | None = None,
    scan: str = "raster",
    channels: int = 1,
    classes: int = 10,
    **settings: Any,
) -> nn.Module:
    """The model of a variant: tokens int64 (batch, height, width) -> logits (batch, height, width, vocab).

    A supervised one: images float (batch, channels, height, width) -> logits (batch, classes).  objective: by default
    the variant's first, "ar" for all that have it.  scan: the order of the pixels, a name of orders.ORDERS.
    `settings` are the variant's own options.  Raises ValueError, in a line that names the way out, for an unknown
    variant, objective, position, scan, backend or option, for what is no whole number of at least 1, and for a pair
    that cannot be.
    """
    chosen = _known(name)
    numbers = {"height": height, "width": width, "vocab": vocab, "dim": dim, "depth": depth, "heads": heads}
    for number, value in (numbers | {"channels": channels, "classes": classes}).items():
        positive(number, value)
    objective = objective or chosen.objectives[0]
    if objective not in (*OBJECTIVES, SUPERVISED):
        raise choose("objective", objective, (*OBJECTIVES, SUPERVISED))
    if objective not in chosen.objectives:
        raise ValueError(f"{name} runs with objective {' or '.join(chosen.objectives)} only, not {objective!r}")
    for setting in settings:
        if setting not in options(name):
            raise choose(f"option of {name}", setting, options(name))
    order = Scan(Grid(height, width), objective, scan)
    if not issubclass(chosen.cls, Mixer):
        if position not in (None, chosen.position):
            raise ValueError(f"{name} has no positional encoding to exchange; leave --position away")
        return chosen.cls(Whole(order, vocab, dim, depth, heads, backend, channels, classes), **settings)
    position = position or chosen.position
    if position not in POSITIONS:
        raise choose("position", position, POSITIONS)
    if (need := POSITIONS[position].needs) not in chosen.cls.carries:
        carried = ", ".join(sorted(chosen.cls.carries))
        raise ValueError(f"{name} cannot carry position {position!r}, which needs {need!r}; it carries {carried}")
    return ImageGPT(
        lambda layer: chosen.cls(layer, **settings), POSITIONS[position], order,
        vocab=vocab, dim=dim, depth=depth, heads=heads, backend=backend,
    )  # fmt: skip


def load_imagegpt(
    folder: str | Path,
    variant: str = "dense1d",
    *,
    height: int | None = None,
    width: int | None = None,
    backend: str = "auto",
    **settings: Any,
) -> ImageGPT:
    """A Hugging Face ImageGPT folder as a trunk, its logits within 1e-4 of the original's; the head has no start token.

    variant: any exact mask, with its own `settings`: with less than the dense mask it sees less than was trained.
    height, width: by default a square of all positions.  Raises ValueError, in one line, for a folder that is damaged
    or of another shape than its config.json says, for a setting that the trunk cannot follow, and as `build`.
    """
    if not issubclass(_known(variant).cls, ExactMixer):
        raise ValueError(f"{variant} is no softmax over visible pixels, which these weights were trained for")
    found = imagegpt.read(Path(folder))
    told = found.settings
    rows, cols = imagegpt.grid(told, height, width)
    model = build(
        variant, height=rows, width=cols, vocab=told.vocab_size - 1, dim=told.n_embd, depth=told.n_layer,
        heads=told.n_head, objective="ar", backend=backend, position="learned1d", **settings,
    )  # fmt: skip
    assert isinstance(model, ImageGPT)
    imagegpt.install(found, model)
    return model.eval()


def _known(name: str) -> Variant:
    if name not in VARIANTS:
        raise choose("variant", name, VARIANTS)
    return VARIANTS[name]
