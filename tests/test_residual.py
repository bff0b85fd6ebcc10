"""The lossless bound of a palette: what a token leaves open has a price, and the price is that of a real bit stream."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any, Literal

import numpy as np
import pytest

from attnbench import coding, evaluate, residual, tokens
from attnbench.config import DataConfig, ModelConfig, RunConfig
from attnbench.data import load
from attnbench.residual import Residual
from attnbench.tokens import Levels, Palette, Pixels, SubPixels


def noise(channels: int, count: int = 6, top: int = 256, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, top, (count, 9, 7, channels), dtype=np.uint8)


def fitted(pixels: Pixels, colours: int, levels: int = 256) -> tuple[Palette, Residual]:
    palette = tokens.with_residual(tokens.fit_palette(pixels, colours, levels), pixels)
    assert palette.residual is not None
    return palette, palette.residual


def in_bits(
    tokeniser: tokens.Tokeniser, pixels: Pixels, nats: float, objective: Literal["ar", "bert"] = "ar"
) -> dict[str, Any]:
    return evaluate.bits(nats, tokeniser, pixels, RunConfig(model=ModelConfig(objective=objective)))


@pytest.mark.parametrize("channels, levels", [(1, 17), (1, 256), (3, 256)])
def test_every_colours_distribution_sums_to_one_and_leaves_nothing_out(channels: int, levels: int) -> None:
    palette, found = fitted(noise(channels, top=levels), 12, levels)
    assert found.chances.shape == (channels, 12, levels)
    np.testing.assert_allclose(found.chances.sum(axis=-1), 1, rtol=1e-12)
    assert found.chances.min() > 0
    black_and_white = np.array([0, levels - 1], np.uint8).repeat(channels).reshape(1, 1, 2, channels)
    assert np.isfinite(found.bits(black_and_white, palette.encode(black_and_white))).all()


def test_a_token_that_was_never_met_has_the_uniform_distribution() -> None:
    found = residual.fit(np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2, 2), np.int64), vocab=2, levels=256)
    np.testing.assert_allclose(found.chances[:, 1], 1 / 256)
    np.testing.assert_allclose(found.chances[:, 0, 0], (4 + residual.PSEUDO / 256) / (4 + residual.PSEUDO))


def test_bits_are_counted_pixel_by_pixel() -> None:
    palette, found = fitted(noise(3), 9)
    unseen = noise(3, seed=1)
    coded = palette.encode(unseen)
    expected = np.zeros(len(unseen))
    for image, row, col, channel in np.ndindex(unseen.shape):
        value, token = unseen[image, row, col, channel], coded[image, row, col]
        expected[image] -= math.log2(found.chances[channel, token, value])
    np.testing.assert_allclose(found.bits(unseen, coded), expected)
    assert palette.residual_bits(unseen) == pytest.approx(expected.sum() / unseen.size)
    with pytest.raises(ValueError, match="17 levels"):
        Residual(found.counts[..., :17]).bits(unseen, coded)


def test_only_training_images_count() -> None:
    digits = load(DataConfig())
    palette = tokens.fit(digits, DataConfig(tokens="palette", colours=5))
    assert isinstance(palette, Palette) and palette.residual is not None
    assert palette.residual.counts.sum() == digits.train.pixels.size


def known_process(count: int, seed: int) -> tuple[Pixels, float]:
    """Grey images of independent pixels, and the bits per pixel that they truly cost."""
    chances = np.random.default_rng(9).dirichlet(np.full(256, 0.5))
    pixels = np.random.default_rng(seed).choice(256, (count, 16, 16, 1), p=chances).astype(np.uint8)
    return pixels, float(-np.log2(chances[pixels]).mean())


@pytest.mark.parametrize("colours", [4, 32])
def test_the_bound_lies_above_the_truth_and_near_it(colours: int) -> None:
    """Tokens priced by their true frequency, and the values in them by the residual: a code of a known process."""
    train, test = known_process(400, seed=1)[0], known_process(400, seed=2)
    palette, _ = fitted(train, colours)
    chances = np.bincount(palette.encode(train).ravel(), minlength=colours) / train.size
    token_nats = float(-np.log(chances[palette.encode(test[0])]).mean())
    found = in_bits(palette, test[0], token_nats)
    assert test[1] <= found["bits_per_dim"] <= test[1] + 0.02
    assert found["bits_per_dim_is_bound"] and found["residual_bits_per_dim"] > 0.5
    assert found["bits_per_dim"] == pytest.approx(found["bits_per_token"] + found["residual_bits_per_dim"])


def test_a_palette_of_all_values_costs_hardly_more_than_levels() -> None:
    digits = load(DataConfig())
    palette = tokens.fit(digits, DataConfig(tokens="palette", colours=17))
    exact, bound = (in_bits(each, digits.test.pixels, 1.3)["bits_per_dim"] for each in (Levels(17), palette))
    assert exact <= bound <= exact + 0.01


def test_bits_of_the_lossless_are_exact_and_a_pixel_of_a_palette_has_three_channels() -> None:
    pixels = noise(3)
    exact = in_bits(SubPixels(), pixels, math.log(256))
    assert exact == {"bits_per_token": pytest.approx(8), "bits_per_dim": pytest.approx(8),
                     "bits_per_dim_is_bound": False, "residual_bits_per_dim": 0.0}  # fmt: skip
    palette, _ = fitted(pixels, 8)
    bound = in_bits(palette, pixels, math.log(8))
    assert bound["bits_per_dim"] == pytest.approx(3 / 3 + bound["residual_bits_per_dim"])
    assert in_bits(Levels(17), noise(1, top=17), math.log(17))["bits_per_dim"] == pytest.approx(math.log2(17))


def test_what_is_no_code_length_is_null() -> None:
    pixels = noise(3)
    for tokeniser, objective in ((tokens.fit_palette(pixels, 8), "ar"), (SubPixels(), "bert")):
        found = in_bits(tokeniser, pixels, 1.0, objective)  # type: ignore[arg-type]
        assert found.pop("bits_per_token") == pytest.approx(1 / math.log(2))
        assert found == dict.fromkeys(evaluate.IN_BITS)


def test_it_is_saved_in_few_words_and_read_back() -> None:
    counts = np.zeros((1, 3, 256), np.int64)
    counts[0, 0, [7, 9]], counts[0, 1, 255] = [5, 2], 11
    saved = json.loads(json.dumps(Residual(counts).to_json()))
    assert saved == [["7 5 0 2", "255 11", ""]]
    np.testing.assert_array_equal(residual.from_json(saved, 256).counts, counts)


@pytest.mark.parametrize("text", ["255 1 1", "3 -1", "-1 4", "3 x", "256 1"])
def test_counts_that_cannot_be_are_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        residual.from_json([[text]], 256)


def test_a_residual_of_another_palette_is_an_error() -> None:
    saved = tokens.with_residual(tokens.fit_palette(noise(3), 5), noise(3)).to_json()
    with pytest.raises(ValueError, match="5 colours"):
        tokens.from_json(saved | {"residual": [channel[:4] for channel in saved["residual"]]})


@pytest.mark.skipif(importlib.util.find_spec("constriction") is None, reason="needs constriction (extra test)")
@pytest.mark.parametrize("name, settings", [("photos", {"side": 16, "colours": 64}), ("digits", {"colours": 2})])
def test_the_bits_are_those_of_a_stream_that_brings_the_image_back(name: str, settings: dict[str, Any]) -> None:
    config = DataConfig(name=name, tokens="palette", **settings)
    dataset = load(config)
    palette = tokens.fit(dataset, config)
    assert isinstance(palette, Palette) and palette.residual is not None
    images = dataset.test.pixels[:300]  # a stream is whole words long: few images would show that
    told, symbols = palette.encode(images), images.reshape(len(images), -1).astype(np.int64)
    predictor = coding.of_residual(palette.residual, told)
    coded = coding.encode(predictor, symbols)
    claimed = palette.residual_bits(images)
    assert claimed is not None and 1 < claimed < 8
    assert coded.claimed_bits == pytest.approx(claimed * images.size, rel=1e-9)
    assert coded.bits == pytest.approx(claimed * images.size, rel=1e-3)
    back = coding.decode(predictor, coded.words, len(images), symbols.shape[1])
    np.testing.assert_array_equal(back.reshape(images.shape), images)
