"""Linear probes: how well does a logistic regression read the class off each layer?

As Image GPT does: the mean over positions of the normed residual stream, L-BFGS; the strength of the penalty is
chosen on validation images, the accuracy taken on test images.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from attnbench import distributed
from attnbench.config import RunConfig
from attnbench.evaluate import chunk
from attnbench.train import autocast

PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths tried."""

Features = NDArray[np.float64]
Split = tuple[Tensor, NDArray[np.int64]]
"""Tokens (count, height, width) and labels (count,)."""


@torch.no_grad()
def pooled(model: nn.Module, tokens: Tensor, config: RunConfig) -> list[Features]:
    """One (count, dim) array a layer, the embedding first."""
    model.eval()
    chunks: list[list[Features]] = []
    for part in tokens.split(chunk(config)):
        with autocast(config):
            stream = model.features(part.to(config.device))  # type: ignore[operator]
        if config.probe.normalise:
            stream = [torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-5) for x in stream]
        chunks.append([x.float().mean(dim=1).double().cpu().numpy() for x in stream])
    return [np.concatenate(layer) for layer in zip(*chunks, strict=True)]


def accuracies(model: nn.Module, train: Split, validation: Split, test: Split, config: RunConfig) -> list[float]:
    """Test accuracy of the probe on each layer, the embedding first; depth + 1 numbers; only in the first process."""
    limit = config.probe.images
    splits = [(tokens[:limit], labels[:limit]) for tokens, labels in (train, validation, test)]
    layers = list(zip(*(pooled(model, tokens, config) for tokens, _ in splits), strict=True))
    labels = [labels for _, labels in splits]
    if not distributed.first():
        return []
    return [_accuracy(*features, *labels) for features in layers]


def _accuracy(
    train: Features, validation: Features, test: Features,
    train_labels: NDArray[np.int64], validation_labels: NDArray[np.int64], test_labels: NDArray[np.int64],
) -> float:  # fmt: skip
    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)).fit(train, train_labels)
        for c in PENALTIES
    ]
    best = max(fitted, key=lambda probe: probe.score(validation, validation_labels))
    return float(best.score(test, test_labels))
