"""Regret is paired with the truth; the receptive field is what the model really uses; a source runs as data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import models
from attnbench import data, experiment, record, tokens
from attnbench.cli import parse
from attnbench.config import DataConfig, RunConfig
from attnbench.errors import Refusal
from attnbench.regret import receptive_field, regret, yardsticks
from attnbench.sources import SOURCES, build_source

HEIGHT, WIDTH = 4, 5


def lively(name: str, **options: Any) -> nn.Module:
    """A tiny untrained model in float64 whose output is not all zeros."""
    torch.manual_seed(0)
    model = models.build(
        name, height=HEIGHT, width=WIDTH, vocab=4, **{"dim": 8, "heads": 2, "depth": 1} | options
    ).double()
    nn.init.normal_(model.head.weight)  # type: ignore[union-attr, arg-type]
    return model


# --- regret -----------------------------------------------------------------------------------------------------------


def test_the_truth_has_no_regret() -> None:
    source = build_source("mesh", height=HEIGHT, width=WIDTH, colours=4)
    images = source.sample(50, seed=0)
    found = regret(-source.log_prob(images).mean(axis=(1, 2)), source, images)
    assert (found.mean, found.low, found.high) == (0, 0, 0) and not found.per_image.any()


def test_regret_of_a_constant_guess_is_what_the_truth_saves() -> None:
    """A guess that pays log 4 always regrets log 4 - entropy on average; the interval covers it, and is no wider than
    the spread over images allows."""
    source = build_source("above", height=HEIGHT, width=WIDTH, colours=4)
    images = source.sample(1000, seed=1)
    found = regret(np.full(1000, math.log(4)), source, images)
    optimum = source.optimum_nats_per_token()
    assert optimum is not None
    assert found.low < math.log(4) - optimum < found.high
    assert found.low < found.mean < found.high
    half = 1.96 * found.per_image.std() / math.sqrt(1000)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    np.testing.assert_allclose(found.per_image, math.log(4) + source.log_prob(images).mean(axis=(1, 2)))


def test_the_same_call_gives_the_same_interval() -> None:
    source = build_source("mirror", height=HEIGHT, width=WIDTH, colours=3)
    images = source.sample(60, seed=2)
    nats = np.random.default_rng(0).random(60)
    first, again = (regret(nats, source, images) for _ in range(2))
    assert (first.low, first.high) == (again.low, again.high)


@pytest.mark.parametrize("nats", [np.zeros(3), np.zeros((4, 1)), 1.0])
def test_nats_of_other_images_are_an_error(nats: Any) -> None:
    source = build_source("above", height=HEIGHT, width=WIDTH, colours=3)
    with pytest.raises(ValueError, match="shape"):
        regret(nats, source, source.sample(4, seed=0))


def test_images_that_the_source_cannot_have_drawn_are_an_error() -> None:
    source = build_source("above", height=2, width=2, colours=3, noise=0)
    with pytest.raises(ValueError, match="cannot have drawn image 1"):
        regret(np.ones(2), source, np.array([[[0, 1], [0, 1]], [[0, 1], [1, 1]]]))


# --- receptive field --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options",
    [
        ("dense1d", {}),
        ("linear", {"depth": 2}),
        ("local1d", {"window": 4}),
        ("local1d", {"window": 2, "depth": 3}),
        ("local2d", {"radius": 1}),
        ("local2d", {"radius": 1, "depth": 2}),
    ],
)
def test_the_field_is_exactly_what_changes_the_prediction(name: str, options: dict[str, Any]) -> None:
    model = lively(name, **options)
    field = receptive_field(model)
    assert field is not None
    images = torch.randint(4, (3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(images).flatten(1, 2)
        for content in range(HEIGHT * WIDTH):
            changed = images.clone()
            changed.flatten(1)[:, content] = (images.flatten(1)[:, content] + 1) % 4
            moved = (model(changed).flatten(1, 2) - before).abs().amax((0, 2)) > 1e-12
            np.testing.assert_array_equal(moved.numpy(), field[:, content])


def test_no_field_where_it_is_not_known() -> None:
    assert receptive_field(nn.Linear(2, 2)) is None
    assert receptive_field(models.build("dense1d", height=2, width=2, vocab=3, objective="bert")) is None


@pytest.mark.parametrize("window, reaches", [(4, False), (5, True)])
def test_a_window_shorter_than_a_row_pays_the_predicted_gap_on_above(window: int, reaches: bool) -> None:
    source = build_source("above", height=HEIGHT, width=WIDTH, colours=4)
    images = source.sample(20, seed=0)
    found = yardsticks(lively("local1d", window=window), np.full(20, math.log(4)), source, images)
    chance = (HEIGHT - 1) / HEIGHT * (math.log(4) - float(source.copy_nats(0.1)))
    assert found["gap_nats_per_token"] == pytest.approx(0 if reaches else chance, abs=1e-12)
    assert found["best_nats_in_field"] == pytest.approx(found["optimum_nats_per_token"] if reaches else math.log(4))
    low, high = found["regret_interval"]
    assert low < found["regret_nats_per_token"] < high


def test_what_cannot_be_computed_is_null() -> None:
    source = build_source("mesh", height=HEIGHT, width=WIDTH, colours=4)
    images = source.sample(5, seed=0)
    near = yardsticks(lively("local2d", radius=1), np.ones(5), source, images)
    assert near["gap_nats_per_token"] == 0
    assert near["optimum_nats_per_token"] is None and near["best_nats_in_field"] is None
    assert yardsticks(lively("local1d", window=2), np.ones(5), source, images)["gap_nats_per_token"] is None


# --- a source as data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_data_whose_tokens_are_its_colours(name: str) -> None:
    config = DataConfig(name=f"source:{name}", height=3, width=6, levels=5, count=40)
    dataset = data.load(config)
    assert dataset.source == build_source(name, height=3, width=6, colours=5)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [40, 8, 8]
    assert dataset.train.pixels.shape == (40, 3, 6, 1) and dataset.train.pixels.dtype == np.uint8
    assert dataset.levels == 5 and dataset.classes == (name,) and not dataset.test.labels.any()
    drawn = tokens.fit(dataset, config).encode(dataset.test.pixels)
    assert np.isfinite(dataset.source.log_prob(drawn)).all()
    assert not np.array_equal(dataset.test.pixels, dataset.validation.pixels)
    assert data.load(config).checksum == dataset.checksum
    assert data.load(config.model_copy(update={"count": 41})).checksum != dataset.checksum


def test_side_count_and_colours_have_defaults() -> None:
    dataset = data.load(DataConfig(name="source:place"))
    assert dataset.train.pixels.shape == (10_000, 8, 8, 1) and dataset.levels == 4
    assert data.load(DataConfig(name="source:place", side=5, width=2, count=9)).test.pixels.shape == (1, 5, 2, 1)


def test_the_checksum_knows_the_options() -> None:
    def checksum(**options: bool | int | float | str) -> str:
        return data.load(DataConfig(name="source:above", count=1, side=1, options=options)).checksum

    assert checksum() == checksum(noise=0.1) != checksum(noise=0.2)


def test_a_source_from_the_command_line() -> None:
    argv = "--data source:recall --data.height 4 --data.width 8 --data.levels 9 --data.count 5 --data.options.pairs 3"
    dataset = data.load(parse(RunConfig, argv.split()).data)
    assert dataset.source == build_source("recall", height=4, width=8, colours=9, pairs=3)


@pytest.mark.parametrize(
    "name, told, cause",
    [
        ("digits", {"levels": 3}, "--data.levels is for source:NAME"),
        ("folder:here", {"options": {"noise": 0.1}}, "--data.options is for source:NAME"),
        ("source:abvoe", {}, "did you mean 'above'"),
        ("source:", {}, "known: above"),
        ("source:above", {"levels": 1}, "--data.levels"),
        ("source:above", {"levels": 257}, "--data.levels"),
        ("source:above", {"tokens": "palette"}, "--data.tokens"),
        ("source:above", {"options": {"nosie": 0.1}}, "did you mean 'noise'"),
        ("source:above", {"options": {"noise": "loud"}}, "noise"),
        ("source:above", {"count": 10**9}, "--data.count"),
        ("source:recall", {"side": 2, "options": {"pairs": 4}}, "ask for 1 or fewer"),
    ],
)
def test_a_source_that_cannot_be_is_refused(name: str, told: dict[str, Any], cause: str) -> None:
    with pytest.raises(Refusal, match=cause) as caught:
        data.load(DataConfig(name=name, **told))
    assert "\n" not in str(caught.value)


def test_a_run_on_a_source_records_its_regret_and_probes_nothing(tmp_path: Path) -> None:
    """Two steps of training: the regret is still that of a guess, and the record says what could have been reached."""
    argv = "--variant local1d --model.options.window 3 --model.dim 8 --model.heads 1 --model.depth 1 --train.steps 2"
    argv += " --data source:above --data.side 4 --data.count 50 --no-measure --sample.count 0 --device cpu"
    config = experiment.resolve(parse(RunConfig, [*argv.split(), "--out", str(tmp_path)]))
    found = record.read(experiment.execute(config))
    metrics, chance = found["metrics"], math.log(4)
    assert found["status"] == "ok" and metrics["probe_accuracy"] is None
    assert metrics["best_nats_in_field"] == pytest.approx(chance)
    assert metrics["optimum_nats_per_token"] + metrics["gap_nats_per_token"] == pytest.approx(chance)
    low, high = metrics["regret_interval"]
    assert low < metrics["regret_nats_per_token"] < high
    source = build_source("above", height=4, width=4, colours=4)
    truth = -source.log_prob(data.load(config.data).test.pixels[..., 0]).mean()
    assert metrics["regret_nats_per_token"] == pytest.approx(metrics["nats_per_token"] - truth)
