"""Sub-pixels from end to end: a run, its record and pictures, what is drawn from it, its report, and other sides."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import attnbench.report
import models
from attnbench import experiment, pictures, record, sample, trained, transfer
from attnbench.config import RunConfig
from attnbench.draw import draw, shown

SIDE = 4


def tiny(out: Path, variant: str, **settings: Any) -> Path:
    """The record of a run on 4×4 photographs cut into sub-pixels."""
    told = {
        "variant": variant, "out": out, "measure": False, "train": {"steps": 3, "batch": 8},
        "data": {"name": "photos", "side": SIDE, "tokens": "subpixel"}, "model": {"dim": 16, "depth": 2, "heads": 2},
        "probe": {"images": 60}, "evaluate": {"images": 40}, "sample": {"count": 3},
    }  # fmt: skip
    return experiment.execute(experiment.resolve(RunConfig.model_validate(told | settings)))


def test_a_run_its_pictures_its_report_and_other_sides(tmp_path: Path) -> None:
    path = tiny(tmp_path, "local2d")
    found = record.read(path)
    metrics, data = found["metrics"], found["data"]
    assert (data["height"], data["width"], data["vocab"], data["tokens"]) == (SIDE, 3 * SIDE, 256, "subpixel")
    assert np.shape(found["nll_map"]) == (SIDE, 3 * SIDE)
    assert metrics["bits_per_dim"] == pytest.approx(metrics["bits_per_token"])
    assert metrics["bits_per_token"] == pytest.approx(8, abs=0.5)
    assert metrics["bits_per_dim_is_bound"] is False and metrics["residual_bits_per_dim"] == 0
    assert len(metrics["probe_accuracy"]) == 3
    sheet = tmp_path / "sheet.png"
    assert sample.main([str(path), "--count", "3", "--complete", "0.5", "--out", str(sheet)]) == 0
    for picture in (sheet, *(tmp_path / "artifacts" / found["id"]).glob("*.png")):
        assert np.asarray(Image.open(picture)).std(axis=-1).max() > 10  # in colour
    run = trained.load(path)
    assert run.images("test").shape == (40, SIDE, 3 * SIDE)
    larger = transfer.evaluate_at(run, 2 * SIDE, 10, tmp_path / "transfer", force=False)
    assert (larger["data"]["height"], larger["data"]["width"]) == (2 * SIDE, 6 * SIDE)
    assert larger["metrics"]["bits_per_dim"] == pytest.approx(larger["metrics"]["bits_per_token"])
    assert attnbench.report.main([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "index.html").stat().st_size > 1000
    assert pd.read_csv(tmp_path / "report" / "transfer.csv")["images"].tolist() == [10]


def test_a_supervised_model_takes_the_pictures_themselves(tmp_path: Path) -> None:
    found = record.read(tiny(tmp_path, "resnet"))
    assert (found["data"]["height"], found["data"]["width"]) == (SIDE, SIDE)
    assert 0 <= found["metrics"]["test_accuracy"] <= 1 and found["metrics"]["bits_per_dim"] is None
    assert trained.load(tmp_path / "runs" / f"{found['id']}.json").shape == (SIDE, SIDE, 256)


@pytest.mark.parametrize("share, pixels", [(0.5, 12), (0.3, 7), (0.0, 0)])
def test_whole_pixels_are_shown_and_copied(share: float, pixels: int) -> None:
    torch.manual_seed(0)
    model: Any = models.build("dense1d", height=4, width=18, vocab=256, dim=16, depth=1, heads=2)
    known = torch.randint(256, (2, 4, 18))
    drawn = draw(model, 2, torch.Generator().manual_seed(1), 1.0, known, share, tokens_per_pixel=3)
    copied = (drawn == known).all(0).flatten()
    assert copied[: 3 * pixels].all() and copied.sum() <= 3 * pixels + 2
    seen = shown(model, share, tokens_per_pixel=3)
    assert seen.shape == (4, 6)
    np.testing.assert_array_equal(seen.ravel(), np.arange(24) < pixels)


def test_half_an_image_is_its_upper_rows_or_what_the_scan_reads_first() -> None:
    build: Any = {"height": 4, "width": 18, "vocab": 256, "dim": 16, "depth": 1, "heads": 2}
    upper = shown(models.build("dense1d", **build), 0.5, tokens_per_pixel=3)
    assert upper[:2].all() and not upper[2:].any()
    left = shown(models.build("dense1d", scan="column", **build), 0.5, tokens_per_pixel=3)
    assert left[:, :3].all() and not left[:, 3:].any()
    truth = np.zeros((1, 4, 6, 3), np.uint8)
    for mask in (upper, left):
        with Image.open(io.BytesIO(pictures.completions(truth, truth, mask))) as picture:
            sheet = np.asarray(picture.convert("RGB"))
        assert (sheet == pictures.UNKNOWN).all(axis=-1).sum() == 12 * (pictures.EDGE // 6) ** 2
