"""Where attention goes: equal to the whole matrix laid out, right where the answer is known, told by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from attnbench import attention_map, experiment
from attnbench.config import RunConfig
from attnbench.errors import Refusal
from models import attention_mass
from models.geometry import matrix
from models.igpt import ImageGPT


def trunk(name: str, height: int = 3, width: int = 5, **settings: Any) -> ImageGPT:
    torch.manual_seed(0)
    model = models.build(name, height=height, width=width, vocab=7, dim=16, depth=2, heads=2, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert isinstance(model, ImageGPT)
    return model


def whole_matrix(model: ImageGPT, tokens: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of start and within, and mean distance, (depth, heads), from n × n weights, pixel by pixel."""
    stream, found = model.features(tokens), []
    for block, x, mixer in zip(model.blocks, stream, model.mixers, strict=False):
        q, k, _, extras = block.attention.project(block.attention_norm(x), model.slots)  # type: ignore[operator, union-attr]
        slot = model.slots
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if "bias" in extras:
            scores = scores + extras["bias"](slot[:, None], slot[None])
        seen = matrix(mixer.visible(), len(slot))  # type: ignore[operator]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).sum(0)
        width = model.scan.grid.width
        start, near, far = weights[:, :, 0].sum(1), torch.zeros(2), torch.zeros(2)
        start, near, far = start.double(), near.double(), far.double()
        for target in range(len(slot)):
            for key in range(1, target + 1):
                rows, cols = target // width - (key - 1) // width, target % width - (key - 1) % width
                near += weights[:, target, key] * (max(abs(rows), abs(cols)) <= radius)
                far += weights[:, target, key] * (rows**2 + cols**2) ** 0.5
        pixels = weights.sum((1, 2)) - start
        found.append((start / (start + pixels), near / pixels, far / pixels))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["dense1d", "dense-rope2d", "dense-relbias2d", "local2d"])
@pytest.mark.parametrize("queries", [1, 4, 64])
def test_blocks_of_queries_equal_the_whole_matrix(name: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_mass, "QUERIES", queries)
    model, tokens = trunk(name), torch.randint(7, (3, 3, 5))
    mass = attention_mass.measure(model, tokens, [1, 2])
    with torch.no_grad():
        start, near, far = whole_matrix(model, tokens, radius=1)
    torch.testing.assert_close(mass.start_share, start, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mass.share_within(1), near, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mass.mean_distance, far, rtol=1e-10, atol=1e-10)
    assert (mass.share_within(2) >= mass.share_within(1)).all()


def test_a_window_keeps_all_within_its_radius_and_no_smaller_one() -> None:
    tokens = torch.randint(7, (2, 5, 6))
    mass = attention_mass.measure(trunk("local2d", 5, 6, radius=2), tokens, [1, 2])
    assert torch.allclose(mass.share_within(2), torch.ones(2, 2, dtype=torch.float64))
    assert (mass.share_within(1) < 0.95).all()


def test_attention_to_the_pixel_above_is_found() -> None:
    """Scores that only a key straight above raises: all is at distance 1, one row away."""
    model = trunk("dense-relbias2d", 4, 4)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.zero_()  # type: ignore[operator, union-attr]
        model.position.table.fill_(-60.0)  # type: ignore[union-attr, operator]
        model.position.table[:, :, 1, 3] = 60.0  # type: ignore[index, operator]
        model.position.start.fill_(0.0)  # type: ignore[union-attr, operator]
    mass = attention_mass.measure(model, torch.randint(7, (2, 4, 4)), [1])
    assert torch.allclose(mass.share_within(1), torch.ones(2, 2, dtype=torch.float64))
    assert torch.allclose(mass.mean_distance, torch.ones(2, 2, dtype=torch.float64))
    assert torch.allclose(mass.start_share, torch.full((2, 2), 1 / 4, dtype=torch.float64))  # the first of four rows


def test_alike_is_the_mean_over_visible_keys() -> None:
    mass = attention_mass.measure(trunk("dense1d", 1, 3), torch.randint(7, (1, 1, 3)), [1], uniform=True)
    # Target 0 sees the start; 1 sees it and pixel 0; 2 sees it and pixels 0 and 1.
    near, pixels, far = 1 / 2 + 1 / 3, 1 / 2 + 2 / 3, 1 / 2 + (1 + 2) / 3
    assert mass.share_within(1)[0].tolist() == pytest.approx([near / pixels] * 2)
    assert mass.mean_distance[0].tolist() == pytest.approx([far / pixels] * 2)


def test_models_without_attention_weights_are_refused() -> None:
    tokens = torch.randint(7, (1, 3, 5))
    with pytest.raises(Refusal, match="softmax"):
        attention_map.attention(trunk("linear"), tokens, (1,))
    with pytest.raises(ValueError, match=r"^Linear has no .*; measure a dense, local or sparse variant"):
        attention_mass.measure(trunk("linear"), tokens, (1,))
    with pytest.raises(Refusal, match="no trunk"):
        attention_map.attention(models.build("pixelcnn", height=3, width=5, vocab=7), tokens, (1,))


def test_edges_of_a_map() -> None:
    found = attention_map.edges([[9.0, 1.0, 2.0], [5.0, 1.0, 3.0], [7.0, 2.0, 2.0]])
    assert found == {
        "first_pixel": 9.0, "first_row": 1.5, "first_column": 6.0, "interior": 2.0, "row_start_excess": 4.0,
        "row_start_jump": ((5 - 2) + (7 - 3)) / 2,
    }  # fmt: skip
    assert attention_map.edges([[1.0]])["interior"] is None


def test_the_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = experiment.resolve(
        RunConfig.model_validate({
            "out": tmp_path, "measure": False, "probe": {"enabled": False}, "sample": {"count": 0},
            "model": {"dim": 16, "depth": 2, "heads": 2}, "evaluate": {"images": 20},
            "train": {"steps": 2, "batch": 4, "validation_images": 4},
        })
    )  # fmt: skip
    path = experiment.execute(config)
    assert attention_map.main([str(path), "--radii", "1,2", "--images", "10"]) == 0
    written = Path(capsys.readouterr().out.splitlines()[-1])
    told = json.loads(written.read_text())
    assert written.parent == tmp_path / "artifacts" / path.stem
    assert (
        attention_map.main([str(path), "--radii", "1,2", "--images", "10", "--out", str(tmp_path / "elsewhere")]) == 0
    )
    assert (tmp_path / "elsewhere" / written.name).read_text() == written.read_text()
    assert told["attention"]["images"] == 10
    assert len(told["attention"]["within"]["2"]) == 2 and len(told["attention"]["within"]["2"][0]) == 2
    assert told["edges"]["interior"] > 0
