"""Pictures: what is given is kept, what is drawn is new, and the command makes a sheet of a finished run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file

import models
from attnbench import cli, experiment, pictures, record, sample
from attnbench.config import RunConfig
from attnbench.draw import draw
from attnbench.errors import Refusal


@pytest.mark.parametrize("colours", [2, 17, 256, 5000])
def test_a_sheet_keeps_every_colour(colours: int) -> None:
    chosen = np.random.default_rng(0)
    palette = chosen.integers(0, 256, (colours, 3), dtype=np.uint8)
    images = palette[chosen.integers(0, colours, (1, pictures.EDGE, pictures.EDGE))]
    with Image.open(io.BytesIO(pictures.sheet([images]))) as read:
        drawn = np.asarray(read.convert("RGB"))[pictures.GAP :, pictures.GAP :]
    assert np.array_equal(drawn[: pictures.EDGE, : pictures.EDGE], images[0])


def test_a_figure_in_256_colours_looks_the_same_in_half_the_bytes() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.imshow(np.arange(225).reshape(15, 15), cmap="viridis")
    axes.plot([0, 14], [0, 14], color="crimson")
    axes.set_title("which pixels the marked one depends on")
    whole, small = io.BytesIO(), pictures.raster(figure, facecolor="white")
    figure.savefig(whole, format="png", dpi=120, facecolor="white")
    want, got = (np.asarray(Image.open(one).convert("RGB"), dtype=int) for one in (whole, io.BytesIO(small)))
    assert got.shape == want.shape
    assert np.abs(got - want).mean() < 0.5
    assert len(small) < len(whole.getvalue()) / 2


@pytest.mark.parametrize("scan", ["raster", "column", "hilbert"])
def test_the_first_pixels_along_the_scan_are_kept(scan: str) -> None:
    torch.manual_seed(0)
    model: Any = models.build("dense1d", height=4, width=6, vocab=5, dim=16, depth=1, heads=2, scan=scan)
    known = torch.randint(5, (3, 4, 6))
    drawn = draw(model, 3, torch.Generator().manual_seed(1), known=known, share=0.5)
    first = torch.zeros(24, dtype=torch.bool)
    first[model.order[:12]] = True
    assert torch.equal(drawn.flatten(1)[:, first], known.flatten(1)[:, first])
    assert not torch.equal(drawn, known)


def test_the_same_generator_draws_the_same_pictures() -> None:
    torch.manual_seed(0)
    model: Any = models.build("local2d", height=3, width=5, vocab=4, dim=16, depth=1, heads=2)
    drawn = [draw(model, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_low_temperature_draws_the_likeliest() -> None:
    torch.manual_seed(0)
    model: Any = models.build("dense1d", height=2, width=3, vocab=4, dim=16, depth=1, heads=2)
    torch.nn.init.normal_(model.head.weight)
    cold = [draw(model, 1, torch.Generator().manual_seed(seed), temperature=1e-4) for seed in range(4)]
    cold += [draw(model, 1, torch.Generator().manual_seed(4), temperature=t) for t in (1e-30, 1e-50, 1e-320)]
    assert all(torch.equal(picture, cold[0]) for picture in cold)


def test_the_command_draws_from_a_record(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"variant": "local2d", "out": tmp_path, "measure": False, "train": {"steps": 3, "batch": 8},
         "model": {"dim": 16, "depth": 1, "heads": 2}, "probe": {"enabled": False}, "evaluate": {"images": 16}}
    )  # fmt: skip
    path = experiment.execute(experiment.resolve(config))
    for arguments in ([], ["--complete", "0.5"]):
        out = tmp_path / f"sheet{len(arguments)}.png"
        assert sample.main([str(path), "--count", "4", "--out", str(out), *arguments]) == 0
        assert np.asarray(Image.open(out).convert("L")).std() > 10
    with pytest.raises(Refusal, match="cannot be read"):
        sample.main([str(tmp_path / "nothing.json")])


@pytest.mark.parametrize("damage, words", [("truncated", "is damaged"), ("another shape", "of another shape")])
def test_weights_that_are_not_the_runs_end_in_one_line(
    damage: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.model_validate(
        {"variant": "dense1d", "out": tmp_path, "measure": False, "train": {"steps": 1, "batch": 8},
         "model": {"dim": 16, "depth": 1, "heads": 2}, "probe": {"enabled": False}, "evaluate": {"images": 4},
         "sample": {"count": 0}}
    )  # fmt: skip
    path = experiment.execute(experiment.resolve(config))
    weights = tmp_path / "artifacts" / path.stem / "weights.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        save_file(load_file(weights) | {"start_token": torch.zeros(17)}, weights)
        older = {key: value for key, value in record.read(path).items() if key != "artifacts"}
        record.write(tmp_path, older, replace=True)
    capsys.readouterr()
    assert cli.command(sample.main)([str(path), "--out", str(tmp_path / "sheet.png")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "sheet.png").exists()
