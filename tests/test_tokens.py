"""Tokenisers: levels and sub-pixels lose nothing, a palette takes the nearest colour, all are rebuilt from what they
saved."""

from __future__ import annotations

import json
from typing import Literal

import numpy as np
import pytest

from attnbench import tokens
from attnbench.config import DataConfig
from attnbench.data import Dataset, Images, load
from attnbench.errors import Refusal
from attnbench.tokens import Levels, Palette, Pixels, SubPixels


def dataset(pixels: Pixels, levels: int = 256) -> Dataset:
    """All three splits show the same pictures."""
    part = Images(pixels, np.zeros(len(pixels), dtype=np.int64))
    return Dataset("toy", part, part, part, ("only",), levels, "")


def noise(channels: int, count: int = 6, top: int = 256, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, top, (count, 9, 7, channels), dtype=np.uint8)


def brute_force(pixels: Pixels, palette: Palette) -> np.ndarray:
    """Squared distance (count, height, width, vocab) of every pixel to every centre."""
    points = pixels / ((palette.levels - 1) / 2) - 1
    return np.asarray(((points[..., None, :] - palette.centres) ** 2).sum(axis=-1))


# --- levels -----------------------------------------------------------------------------------------------------------


def test_levels_of_digits_are_the_grey_values() -> None:
    digits = load(DataConfig())
    tokeniser = tokens.fit(digits, DataConfig())
    encoded = tokeniser.encode(digits.train.pixels)
    assert (tokeniser.kind, tokeniser.vocab) == ("levels", 17) and encoded.dtype == np.int64
    np.testing.assert_array_equal(encoded, digits.train.pixels[..., 0])


@pytest.mark.parametrize("vocab", [2, 17, 256])
def test_levels_survive_the_round_trip(vocab: int) -> None:
    pixels = np.arange(vocab, dtype=np.uint8).reshape(1, 1, vocab, 1)
    tokeniser = Levels(vocab)
    shown = tokeniser.decode(tokeniser.encode(pixels))
    assert shown.shape == pixels.shape and shown.dtype == np.uint8
    assert (shown.min(), shown.max()) == (0, 255)  # for the eye: the whole range
    np.testing.assert_array_equal(np.rint(shown / 255 * (vocab - 1)), pixels)


def test_levels_refuse_colour_and_values_beyond() -> None:
    with pytest.raises(Refusal, match=r"--data\.tokens palette"):
        tokens.fit(dataset(noise(3)), DataConfig(tokens="levels"))
    with pytest.raises(ValueError, match="17 levels"):
        Levels(17).encode(np.full((1, 2, 2, 1), 17, np.uint8))
    with pytest.raises(ValueError, match="shape"):
        Levels(256).encode(noise(3))


@pytest.mark.parametrize(
    "asked, channels, kind",
    [
        ("auto", 1, "levels"),
        ("auto", 3, "palette"),
        ("palette", 1, "palette"),
        ("levels", 1, "levels"),
        ("subpixel", 3, "subpixel"),
    ],
)
def test_auto_follows_the_images(
    asked: Literal["auto", "levels", "palette", "subpixel"], channels: int, kind: str
) -> None:
    tokeniser = tokens.fit(dataset(noise(channels)), DataConfig(tokens=asked, colours=8))
    assert (tokeniser.kind, tokeniser.vocab) == (kind, 8 if kind == "palette" else 256)


# --- sub-pixels -------------------------------------------------------------------------------------------------------


def test_sub_pixels_stand_side_by_side_and_come_back() -> None:
    pixels = noise(3)
    encoded = SubPixels().encode(pixels)
    assert encoded.shape == (6, 9, 21) and encoded.dtype == np.int64
    for channel in range(3):
        np.testing.assert_array_equal(encoded[:, :, channel::3], pixels[..., channel])
    np.testing.assert_array_equal(SubPixels().decode(encoded), pixels)
    assert encoded.flags.writeable and not np.shares_memory(encoded, pixels)


def test_sub_pixels_refuse_grey_and_values_beyond() -> None:
    with pytest.raises(Refusal, match=r"toy is grey.*--data\.tokens levels") as caught:
        tokens.fit(dataset(noise(1)), DataConfig(tokens="subpixel"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="shape"):
        SubPixels().encode(noise(1))
    with pytest.raises(ValueError, match="17 levels"):
        SubPixels(17).encode(noise(3))


# --- palette ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, levels", [(1, 17), (1, 256), (3, 256)])
def test_palette_takes_the_nearest_centre(channels: int, levels: int) -> None:
    palette = tokens.fit_palette(noise(channels, top=levels), 11, levels)
    unseen = noise(channels, top=levels, seed=1)
    distances = brute_force(unseen, palette)
    chosen = np.take_along_axis(distances, palette.encode(unseen)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(axis=-1), atol=1e-12)
    assert palette.encode(unseen).dtype == np.int64


@pytest.mark.parametrize("chunk", [1, 10, 1 << 22])
def test_chunks_change_nothing(chunk: int) -> None:
    rng = np.random.default_rng(4)
    points, centres = rng.uniform(-1, 1, (101, 3)), rng.uniform(-1, 1, (5, 3))
    expected = ((points[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(tokens.nearest(points, centres, chunk), expected)


def test_encoding_in_parts_equals_encoding_at_once() -> None:
    palette = tokens.fit_palette(noise(3), 16)
    many = np.random.default_rng(5).integers(0, 256, (90, 160, 160, 3), dtype=np.uint8)  # more than one part
    at_once = palette.encode(many)
    for i in (0, 45, 89):
        np.testing.assert_array_equal(at_once[i : i + 1], palette.encode(many[i : i + 1]))
    assert palette.encode(many[:0]).shape == (0, 160, 160)


def test_first_of_equally_near_centres() -> None:
    palette = Palette(np.array([[-1.0], [-1.0], [1.0]]))
    assert palette.encode(np.zeros((1, 1, 1, 1), np.uint8)).item() == 0


def test_as_many_centres_as_colours_lose_nothing() -> None:
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [255, 255, 255]], np.uint8)
    pixels = colours[np.random.default_rng(6).integers(0, 6, (4, 8, 8))]
    palette = tokens.fit_palette(pixels, 6)
    np.testing.assert_array_equal(palette.decode(palette.encode(pixels)), pixels)


def test_more_centres_than_colours_are_refused_with_both_numbers() -> None:
    pixels = np.repeat(np.arange(5, dtype=np.uint8), 20).reshape(1, 10, 10, 1)
    with pytest.raises(Refusal, match=r"6 is larger than the 5 different .*--data\.colours 5") as caught:
        tokens.fit(dataset(pixels), DataConfig(tokens="palette", colours=6))
    assert "\n" not in str(caught.value)
    assert tokens.fit(dataset(pixels), DataConfig(tokens="palette", colours=5)).vocab == 5


def test_rare_colours_count_even_when_the_sample_misses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "FIT_PIXELS", 10)
    pixels = np.zeros((1, 50, 50, 1), np.uint8)
    pixels[0, 25, 13:17, 0] = [50, 100, 150, 200]
    assert tokens.fit_palette(pixels, 5).vocab == 5
    with pytest.raises(Refusal, match="the 5 different"):
        tokens.fit_palette(pixels, 6)


def test_palette_is_the_same_each_time_and_sees_training_images_only() -> None:
    pixels = noise(3)
    other = Images(noise(3, seed=7), np.zeros(6, dtype=np.int64))
    toy = dataset(pixels)
    changed = Dataset("toy", toy.train, other, other, toy.classes, 256, "")
    first, second = (tokens.fit(each, DataConfig(colours=32)).to_json() for each in (toy, changed))
    assert first == second
    assert first != tokens.fit(dataset(noise(3, seed=8)), DataConfig(colours=32)).to_json()


def test_every_centre_is_some_pixels_nearest() -> None:
    photographs = load(DataConfig(name="photos", side=16))
    tokeniser = tokens.fit(photographs, DataConfig(colours=64))
    assert np.bincount(tokeniser.encode(photographs.train.pixels).ravel(), minlength=64).min() > 0


def test_empty_centres_are_moved_onto_points() -> None:
    points = np.random.default_rng(9).uniform(-1, 1, (40, 3))
    centres = np.repeat(points[:1], 12, axis=0)  # eleven of twelve are nobody's nearest
    filled = tokens._fill(centres, points)
    assert set(tokens.nearest(points, filled)) == set(range(12))
    np.testing.assert_array_equal(tokens._fill(filled, points), filled)


def test_a_palette_has_no_empty_centre_whatever_k_means_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_kmeans", lambda points, weights, colours: np.zeros((colours, points.shape[1])))
    pixels = noise(3)
    palette = tokens.fit_palette(pixels, 12)
    assert set(palette.encode(pixels).ravel()) == set(range(12))


def test_a_palette_of_digits_spans_black_to_white() -> None:
    digits = load(DataConfig())
    tokeniser = tokens.fit(digits, DataConfig(tokens="palette", colours=17))
    np.testing.assert_array_equal(tokeniser.encode(digits.train.pixels), digits.train.pixels[..., 0])
    np.testing.assert_array_equal(tokeniser.decode(np.arange(17)), Levels(17).decode(np.arange(17)))


def test_k_means_beats_evenly_spaced_greys() -> None:
    values = (np.random.default_rng(10).beta(0.5, 3, (20, 10, 10, 1)) * 255).astype(np.uint8)
    palette = tokens.fit_palette(values, 16)
    even = Palette(np.linspace(-1, 1, 16)[:, None])

    def error(each: Palette) -> float:
        return float(((each.decode(each.encode(values)).astype(float) - values) ** 2).mean())

    assert error(palette) < 0.6 * error(even)
    assert (np.diff(palette.centres[:, 0]) > 0).all()  # dark to light


def test_decode_shows_the_centres() -> None:
    palette = Palette(np.array([[-1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]))
    assert palette.decode(np.array([[[0, 1]]])).tolist() == [[[[0, 128, 255], [255, 255, 255]]]]


@pytest.mark.parametrize(
    "tokeniser",
    [
        Levels(17),
        SubPixels(),
        tokens.fit_palette(noise(3), 9),
        tokens.with_residual(tokens.fit_palette(noise(3), 9), noise(3)),
        tokens.with_residual(tokens.fit_palette(noise(1), 5), noise(1)),
    ],
    ids=["levels", "subpixel", "palette", "palette and residual", "grey palette and residual"],
)
def test_json_and_back(tokeniser: tokens.Tokeniser) -> None:
    saved = json.loads(json.dumps(tokeniser.to_json()))
    again = tokens.from_json(saved)
    assert again.to_json() == tokeniser.to_json()
    every = np.resize(np.arange(tokeniser.vocab), (1, 1, 3 * tokeniser.vocab))
    np.testing.assert_array_equal(again.decode(every), tokeniser.decode(every))
    unseen = noise(1 if tokeniser.kind == "levels" else tokeniser.decode(every).shape[-1], top=17, seed=1)
    np.testing.assert_array_equal(again.encode(unseen), tokeniser.encode(unseen))
    assert again.residual_bits(unseen) == tokeniser.residual_bits(unseen)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="wavelet"):
        tokens.from_json({"kind": "wavelet"})
