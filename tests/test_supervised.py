"""Runs of a model that is told the classes: accuracy in place of likelihood, all else as any run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnbench import experiment, measure, record, supervised, train
from attnbench.config import RunConfig
from attnbench.data import Dataset, Images
from attnbench.errors import Refusal


def settings(out: Path, **more: Any) -> RunConfig:
    told: dict[str, Any] = {
        "variant": "resnet", "out": out, "measure": False, "model": {"dim": 16, "depth": 2},
        "train": {"steps": 12, "batch": 8, "warmup": 2, "validate_every": 4, "checkpoint_every": 5},
        "evaluate": {"images": 60},
    }  # fmt: skip
    return experiment.resolve(RunConfig.model_validate(told | more))


def dataset(classes: int = 2, channels: int = 3) -> Dataset:
    """Dark pictures of class 0, bright ones of class 1."""

    def images(seed: int) -> Images:
        labels = np.arange(40, dtype=np.int64) % classes
        noise = np.random.default_rng(seed).integers(0, 100, (40, 4, 6, channels))
        return Images((noise + 120 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8), labels)

    known = tuple("ab"[:classes])
    return Dataset("shades", images(0), images(1), images(2), classes=known, levels=256, checksum="")


def test_the_objective_is_the_variants_own() -> None:
    assert settings(Path("x")).model.objective == "supervised"
    assert settings(Path("x"), variant="dense1d").model.objective == "ar"
    refused = settings(Path("x"), variant="dense1d", model={"objective": "supervised"})
    with pytest.raises(Refusal, match="objective"):
        train.make_model(refused, 4, 4, 5)


def test_a_run_records_accuracy_and_no_likelihood(tmp_path: Path) -> None:
    done = record.read(experiment.execute(settings(tmp_path)))
    metrics = done["metrics"]
    assert done["status"] == "ok" and done["backend"] == "conv"
    assert metrics["probe_accuracy_best"] == metrics["test_accuracy"] == np.mean(done["per_image_correct"])
    assert len(done["per_image_correct"]) == 60
    assert all(metrics[name] is None for name in supervised.NO_LIKELIHOOD)
    assert metrics["parameters"] > 0 and metrics["train_flops_per_image"] > 0
    assert done["curves"]["validation_steps"] == [4, 8, 12]
    assert (experiment.artifacts(settings(tmp_path)) / "weights.safetensors").is_file()


@pytest.mark.parametrize("channels", [1, 3])
def test_it_learns_from_the_pictures_themselves(channels: int, tmp_path: Path) -> None:
    config, images = settings(tmp_path, train={"steps": 60, "batch": 8, "warmup": 5}), dataset(channels=channels)
    model = train.make_model(config, 4, 6, 8, channels=channels, classes=2)
    _, test = supervised.fit(model, images, config, tmp_path, lambda step, loss: None)
    assert test.share > 0.9
    scaled = supervised.pictures(images.train, images.levels)
    assert scaled.shape == (40, channels, 4, 6) and -1 <= scaled.min() < scaled.max() <= 1


@pytest.mark.promise("resume")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_is_bit_exact(accumulate: int, tmp_path: Path) -> None:
    config = settings(tmp_path)
    config = config.model_copy(update={"train": config.train.model_copy(update={"accumulate": accumulate})})
    images = dataset()

    def fit(folder: Path, stop: int | None) -> tuple[dict[str, torch.Tensor], train.Progress]:
        def report(step: int, loss: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        model = train.make_model(config, 4, 6, 8, channels=3, classes=2)
        progress, _ = supervised.fit(model, images, config, folder, report)
        return model.state_dict(), progress

    whole, straight = fit(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", 10)
    resumed, again = fit(tmp_path / "b", None)
    assert straight.curves == again.curves
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_one_class_is_refused(tmp_path: Path) -> None:
    model = train.make_model(settings(tmp_path), 4, 6, 8, channels=3, classes=2)
    with pytest.raises(Refusal, match="no classes"):
        supervised.fit(model, dataset(classes=1), settings(tmp_path), tmp_path, lambda step, loss: None)


@pytest.mark.serial
def test_memory_and_speed_are_measured(tmp_path: Path) -> None:
    request = measure.Request(settings(tmp_path), 8, 8, 17, channels=3, classes=4)
    assert measure.peak_bytes(request) > 0
    found = measure.throughput(request, budget=0.3)
    assert found["train_images_per_second"]["median"] > 0
    assert found["sample_images_per_second"] is None
