"""Runs of models that are told the classes: pictures in, accuracy out, no likelihood.

Pictures are what the tokens were made from, RGB where there is RGB; no augmentation, as the trunk has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnbench import train
from attnbench.config import RunConfig
from attnbench.data import Dataset, Images
from attnbench.errors import Refusal
from attnbench.evaluate import IN_BITS, chunk

NO_LIKELIHOOD = ("nats_per_token", "bits_per_token", *IN_BITS, "validation_nats_per_token", "probe_accuracy")
"""Figures that such a run does not have."""


@dataclass(frozen=True)
class Accuracy:
    """nats_per_label: the mean -log p of the class; correct: bool (count,), whether the likeliest class is the one."""

    nats_per_label: float
    correct: Tensor

    @property
    def share(self) -> float:
        """Right answers of all."""
        return float(self.correct.double().mean())


def pictures(images: Images, levels: int) -> Tensor:
    """float32 (count, channels, height, width), values 0..levels-1 brought to -1..1."""
    return torch.from_numpy(images.pixels).movedim(-1, 1).float() / ((levels - 1) / 2) - 1


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, config: RunConfig) -> Accuracy:
    """Of images (count, channels, height, width) with labels int64 (count,)."""
    model.eval()
    logits = []
    for part in images.split(chunk(config)):
        with train.autocast(config):
            logits.append(model(part.to(config.device)).double().cpu())
    found = torch.cat(logits)
    return Accuracy(float(nn.functional.cross_entropy(found, labels)), found.argmax(1) == labels)


def fit(
    model: nn.Module, dataset: Dataset, config: RunConfig, folder: Path, report: Callable[[int, float], None],
    held: Callable[[], bool] = lambda: True,
) -> tuple[train.Progress, Accuracy]:  # fmt: skip
    """Trains, as train.fit does, and tests.  Raises Refusal for images of one class."""
    if len(dataset.classes) < 2:
        raise Refusal(f"{dataset.name} has no classes to tell apart; choose other --data for a supervised model")

    def split(images: Images, limit: int | None = None) -> tuple[Tensor, Tensor]:
        return pictures(images, dataset.levels)[:limit], torch.from_numpy(images.labels)[:limit]

    images, labels = split(dataset.train)
    validation = split(dataset.validation, config.train.validation_images)
    progress = train.fit(
        model, images, lambda m: accuracy(m, *validation, config).nats_per_label, config, folder, report, labels,
        dataset.checksum, held,
    )  # fmt: skip
    return progress, accuracy(model, *split(dataset.test, config.evaluate.images), config)


def metrics(progress: train.Progress, test: Accuracy) -> dict[str, Any]:
    """The figures of such a run; `probe_accuracy_best` stands beside those of the others."""
    return dict.fromkeys(NO_LIKELIHOOD) | {
        "test_accuracy": test.share,
        "probe_accuracy_best": test.share,
        "nats_per_label": test.nats_per_label,
        "validation_nats_per_label": progress.best,
    }
