"""Receptive fields drawn from gradients: the documentation that cannot lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnbench.checks import Subject, distinct_tokens
from attnbench.pictures import raster

SIDE = 15
DEPTH = 4


def field(subject: Subject, depth: int, target: tuple[int, int], side: int = SIDE) -> NDArray[np.float64]:
    """(side, side): how much the logits of the target pixel depend on what each pixel contains; 0 where not at all."""
    objective = subject.variant.objectives[0]
    model = subject.build(side, side, depth=depth, objective=objective)
    tokens = distinct_tokens(side, side)
    logits = model(tokens)[0, target[0], target[1]]
    table = model.tokens
    (grad,) = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), table)
    return grad.norm(dim=1)[tokens[0]].numpy()


def picture(subject: Subject) -> bytes:
    """PNG: the field of one layer (of the last, where layers differ) and of the whole model, the target marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    target = (SIDE // 2, SIDE // 2)
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.4), layout="constrained")
    for axis, depth, title in ((axes[0], 1, "one layer"), (axes[1], DEPTH, f"{DEPTH} layers")):
        values = field(subject, depth, target)
        shown: Any = np.where(values > 0, values / values.max(initial=1e-300), np.nan)
        axis.imshow(shown, norm=LogNorm(1e-4, 1), cmap="viridis")
        axis.add_patch(Rectangle((target[1] - 0.5, target[0] - 0.5), 1, 1, fill=False, edgecolor="crimson", lw=2))
        axis.set_title(f"{title}: {int((values > 0).sum())} pixels", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_facecolor("#e9edf4")
    figure.suptitle(f"{subject.name}: which pixels the marked one depends on", fontsize=11)
    drawn = raster(figure)
    plt.close(figure)
    return drawn
