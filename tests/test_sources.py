"""Sources: probabilities that add up, samples that agree with them, optima and gaps that enumeration confirms."""

from __future__ import annotations

import doctest
import functools
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from attnbench import sources
from attnbench.errors import Refusal
from attnbench.source import Source
from attnbench.sources import SOURCES, build_source

TINY: list[tuple[str, int, int, int, dict[str, Any]]] = [
    ("above", 2, 3, 3, {}),
    ("above", 3, 2, 2, {"noise": 0.4}),
    ("above", 4, 2, 2, {"noise": 0}),
    ("above", 3, 2, 2, {"noise": 1}),
    ("mesh", 2, 3, 3, {}),
    ("mesh", 3, 3, 2, {"coupling": 0.6}),
    ("mesh", 3, 2, 2, {"coupling": -2}),
    ("place", 2, 3, 3, {}),
    ("place", 3, 2, 2, {"sharpness": 0}),
    ("mirror", 2, 3, 3, {}),
    ("mirror", 3, 2, 3, {"noise": 0.3}),
    ("mirror", 1, 3, 2, {}),
    ("mirror", 4, 2, 2, {"noise": 0.0}),
    ("recall", 2, 3, 3, {}),
    ("recall", 2, 3, 3, {"pairs": 2}),
    ("recall", 2, 4, 2, {"pairs": 2, "noise": 0.5}),
    ("recall", 3, 3, 2, {"pairs": 2, "noise": 0.2}),
    ("recall", 2, 3, 3, {"pairs": 2, "noise": 0}),
    ("recall", 2, 4, 3, {"pairs": 3, "noise": 0.4, "shuffled": True}),
    ("recall", 2, 4, 3, {"pairs": 3, "noise": 0.4}),
    ("recall", 2, 3, 3, {"pairs": 2, "shuffled": True}),
    ("recall", 2, 3, 3, {"pairs": 2, "noise": 0, "shuffled": True}),
    ("recall", 1, 3, 2, {}),
    ("recall", 3, 1, 2, {}),
]
tiny = pytest.mark.parametrize("name, height, width, colours, options", TINY)
every = pytest.mark.parametrize("name", SOURCES)


def build(name: str, height: int, width: int, colours: int, options: dict[str, Any]) -> Source:
    return build_source(name, height=height, width=width, colours=colours, **options)


@functools.cache
def all_images(height: int, width: int, colours: int) -> NDArray[np.int64]:
    """(colours^n, height, width), each image once; the first pixel varies slowest."""
    return np.array(list(product(range(colours), repeat=height * width))).reshape(-1, height, width)


def joint(source: Source) -> NDArray[np.float64]:
    """p of every image, by adding up its pixels' log p."""
    images = all_images(source.height, source.width, source.colours)
    chances: NDArray[np.float64] = np.exp(source.log_prob(images).sum(axis=(1, 2)))
    return chances


def conditional_nats(chances: NDArray[np.float64], images: NDArray[np.int64], target: int, seen: list[int]) -> float:
    """Expected nats of pixel `target` given the pixels `seen`, from the joint distribution alone."""
    flat = images.reshape(len(images), -1)

    def entropy(pixels: list[int]) -> float:
        _, group = np.unique(flat[:, pixels], axis=0, return_inverse=True)
        p = np.bincount(group.ravel(), chances)
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    return entropy([*seen, target]) - (entropy(seen) if seen else 0.0)


# --- probabilities ----------------------------------------------------------------------------------------------------


def test_the_tiny_grids_cover_every_source() -> None:
    assert {case[0] for case in TINY} == set(SOURCES) == {"above", "mesh", "place", "mirror", "recall"}


@tiny
def test_probabilities_of_all_images_sum_to_one(
    name: str, height: int, width: int, colours: int, options: dict[str, Any]
) -> None:
    assert joint(build(name, height, width, colours, options)).sum() == pytest.approx(1, abs=1e-12)


@tiny
def test_log_prob_is_the_conditional_of_the_joint(
    name: str, height: int, width: int, colours: int, options: dict[str, Any]
) -> None:
    """p(pixel | earlier) = p(all up to it) / p(all before it), each a sum over all images that begin so."""
    source = build(name, height, width, colours, options)
    images, chances = all_images(height, width, colours), joint(source)
    found = np.exp(source.log_prob(images)).reshape(len(images), -1)
    before = np.ones(len(images))
    for t in range(source.size):
        upto = np.repeat(chances.reshape(colours ** (t + 1), -1).sum(axis=1), len(images) // colours ** (t + 1))
        possible = before > 0
        np.testing.assert_allclose(found[possible, t], upto[possible] / before[possible], atol=1e-12)
        before = upto


def likeness(drawn: Source, expected: Source, count: int = 20_000) -> float:
    """p-value of a chi-square test of images drawn from one source against the probabilities of another."""
    chances = joint(expected)
    weights = drawn.colours ** np.arange(drawn.size)[::-1]
    seen = np.bincount(drawn.sample(count, seed=5).reshape(count, -1) @ weights, minlength=len(chances))
    assert not seen[chances == 0].any()
    often = chances * count >= 5  # chi-square wants five a cell, so the rare images make one cell together
    observed, p = np.append(seen[often], seen[~often].sum()), np.append(chances[often], chances[~often].sum())
    assert len(p) > 4
    return float(chisquare(observed[p > 1e-9], count * p[p > 1e-9] / p[p > 1e-9].sum()).pvalue)


@tiny
def test_sampling_frequencies_agree_with_probabilities(
    name: str, height: int, width: int, colours: int, options: dict[str, Any]
) -> None:
    source = build(name, height, width, colours, options)
    assert likeness(source, source) > 1e-3


@every
def test_other_frequencies_would_be_noticed(name: str) -> None:
    option = {"mesh": {"coupling": 0.9}, "place": {"sharpness": 5.5}}.get(name, {"noise": 0.15})
    assert likeness(build(name, 2, 3, 3, {}), build(name, 2, 3, 3, option)) < 1e-3


@given(
    name=st.sampled_from(sorted(SOURCES)),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    colours=st.integers(2, 9),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(max_examples=150)
def test_any_shape_is_drawn_predicted_and_causal(
    name: str, height: int, width: int, colours: int, seed: int, data: st.DataObject
) -> None:
    source = build_source(name, height=height, width=width, colours=colours)
    images = source.sample(5, seed)
    assert images.shape == (5, height, width) and images.dtype == np.int64
    assert images.min() >= 0 and images.max() < colours
    nats = source.log_prob(images)
    assert nats.shape == images.shape and nats.dtype == np.float64
    assert np.isfinite(nats).all() and (nats <= 1e-12).all()
    at = data.draw(st.integers(0, height * width - 1))
    row, col = divmod(at, width)
    np.testing.assert_allclose(source.conditional(images, row, col).sum(axis=1), 1, atol=1e-12)
    changed = images.copy()
    changed[:, row, col] = (changed[:, row, col] + 1) % colours
    np.testing.assert_array_equal(source.log_prob(changed).reshape(5, -1)[:, :at], nats.reshape(5, -1)[:, :at])


@given(name=st.sampled_from(sorted(SOURCES)), count=st.integers(0, 6), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_images_are_a_function_of_the_seed_alone(name: str, count: int, seed: int) -> None:
    source = build_source(name, height=5, width=7, colours=6)
    images = source.sample(6, seed)
    np.testing.assert_array_equal(source.sample(6, seed), images)
    np.testing.assert_array_equal(source.sample(count, seed), images[:count])
    assert (source.sample(6, seed + 1) != images).any()


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_source("mesh", height=3, width=4, colours=3)
    whole = source.sample(10, seed=1)
    monkeypatch.setattr("attnbench.source.CHUNK", 3 * source.size)
    np.testing.assert_array_equal(source.sample(10, seed=1), whole)


def test_no_image_without_probability_is_drawn() -> None:
    """Rounding in the cumulated probabilities must not reach a colour beyond the last possible one."""
    source = build_source("above", height=40, width=5, colours=7, noise=0)
    images = source.sample(200, seed=2)
    assert np.isfinite(source.log_prob(images)).all()
    assert (images == images[:, :1]).all()
    assert source.log_prob(np.eye(40, 5, dtype=np.int64)[None]).min() == -np.inf


def test_the_examples_in_the_docstrings_are_what_is_drawn() -> None:
    result = doctest.testmod(sources)
    assert result.attempted >= len(SOURCES) and not result.failed
    assert all(">>>" in (source.__doc__ or "") for source in SOURCES.values())


# --- what each source is for ------------------------------------------------------------------------------------------


def test_above_copies_the_pixel_above() -> None:
    images = build_source("above", height=6, width=8, colours=4, noise=0.2).sample(2000, seed=0)
    assert (images[:, 1:] == images[:, :-1]).mean() == pytest.approx(0.8 + 0.2 / 4, abs=0.005)
    assert (images[:, :, 1:] == images[:, :, :-1]).mean() == pytest.approx(1 / 4, abs=0.02)


@pytest.mark.parametrize("offset", [(0, -1), (-1, -1), (-1, 0), (-1, 1)])
def test_mesh_depends_on_each_of_its_neighbours_and_on_nothing_else(offset: tuple[int, int]) -> None:
    source = build_source("mesh", height=4, width=5, colours=3)
    images = source.sample(50, seed=0)
    before = source.conditional(images, 2, 2)
    nearby = images.copy()
    nearby[:, 2 + offset[0], 2 + offset[1]] = (nearby[:, 2 + offset[0], 2 + offset[1]] + 1) % 3
    assert (source.conditional(nearby, 2, 2) != before).any(axis=1).all()
    afar = images.copy()
    afar[:, 0], afar[:, 1, [0, 4]], afar[:, 2, 0] = 0, 0, 0
    np.testing.assert_array_equal(source.conditional(afar, 2, 2), before)


def test_place_has_another_distribution_everywhere_and_the_same_for_every_image() -> None:
    source = build_source("place", height=4, width=5, colours=3)
    table = source.conditional(source.sample(1, 0), 0, 0)
    assert len({source.conditional(source.sample(1, 0), *at).tobytes() for at in np.ndindex(4, 5)}) == 20
    again = build_source("place", height=4, width=5, colours=3)
    np.testing.assert_array_equal(again.conditional(again.sample(1, 7), 0, 0), table)


@pytest.mark.parametrize("height", [4, 5])
def test_mirror_mirrors_the_upper_half_and_leaves_the_middle_row_free(height: int) -> None:
    images = build_source("mirror", height=height, width=6, colours=4, noise=0).sample(500, seed=0)
    np.testing.assert_array_equal(images, images[:, ::-1])
    upper = images[:, : (height + 1) // 2]
    assert (upper[:, 1:] == upper[:, :-1]).mean() == pytest.approx(1 / 4, abs=0.02)


@pytest.mark.parametrize("shuffled", [False, True])
def test_recall_answers_with_the_value_shown(shuffled: bool) -> None:
    source = build_source("recall", height=4, width=8, colours=9, pairs=6, noise=0, shuffled=shuffled)
    in_order = 0
    for image in source.sample(200, seed=0):
        twos = [(int(key), int(value)) for key, value in image.reshape(-1, 2)]
        table = dict(twos[:6])
        assert len(table) == 6
        assert all(table[key] == value for key, value in twos[6:])
        in_order += list(table) == list(range(6))
    assert in_order == (0 if shuffled else 200)


def test_recall_shows_as_many_pairs_as_asked() -> None:
    def shown(pairs: int | None) -> int:
        source = build_source("recall", height=8, width=8, colours=20, pairs=pairs, noise=0, shuffled=True)
        first = np.isclose(np.exp(source.log_prob(source.sample(1, 0))), 1).reshape(-1)
        return int(first.argmax()) // 2  # the first certain pixel is the first answer

    assert [shown(pairs) for pairs in (2, 7, 16)] == [2, 7, 16]
    assert shown(None) == 16


# --- optimum and gap --------------------------------------------------------------------------------------------------


@tiny
def test_entropy_is_that_of_the_enumerated_images(
    name: str, height: int, width: int, colours: int, options: dict[str, Any]
) -> None:
    source = build(name, height, width, colours, options)
    entropy, chances = source.entropy(), joint(source)
    if entropy is None:
        assert name == "mesh" and source.optimum_nats_per_token() is None
        return
    log_p = source.log_prob(all_images(height, width, colours))
    nats = -np.where(np.isfinite(log_p), log_p, 0) * chances[:, None, None]
    np.testing.assert_allclose(entropy, nats.sum(axis=0), atol=1e-12)
    assert source.optimum_nats_per_token() == pytest.approx(nats.sum() / source.size, abs=1e-12)


@tiny
@pytest.mark.parametrize("seed", range(4))
def test_gap_is_that_of_the_enumerated_images(
    name: str, height: int, width: int, colours: int, options: dict[str, Any], seed: int
) -> None:
    """Under any set of visible pixels: nothing, everything, and two drawn at random."""
    source = build(name, height, width, colours, options)
    random = np.random.default_rng(seed)
    visible = random.random((source.size, source.size)) < (0.0, 1.0, 0.5, 0.8)[seed]
    gap, chances, images = source.gap(visible), joint(source), all_images(height, width, colours)
    if gap is None:
        assert name in ("mesh", "recall") and seed != 1
        return
    for t in range(source.size):
        best = conditional_nats(chances, images, t, list(range(t)))
        confined = conditional_nats(chances, images, t, [s for s in range(t) if visible[t, s]])
        assert gap.reshape(-1)[t] == pytest.approx(confined - best, abs=1e-10)


def test_a_window_shorter_than_a_row_leaves_above_to_chance_but_for_nothing_else() -> None:
    source = build_source("above", height=6, width=8, colours=4)
    steps = np.subtract.outer(np.arange(48), np.arange(48))
    short, just = source.gap(steps <= 7), source.gap(steps <= 8)
    entropy = source.entropy()
    assert short is not None and just is not None and entropy is not None
    np.testing.assert_allclose(short + entropy, math.log(4))
    np.testing.assert_allclose(just, 0, atol=1e-15)


def test_a_radius_of_one_is_enough_for_mesh_and_the_upper_right_pixel_is_needed() -> None:
    source = build_source("mesh", height=4, width=5, colours=3)
    rows, cols = np.divmod(np.arange(20), 5)
    near = np.maximum(abs(np.subtract.outer(rows, rows)), abs(np.subtract.outer(cols, cols))) <= 1
    gap = source.gap(near)
    assert gap is not None and not gap.any()
    assert source.gap(near & (np.subtract.outer(np.arange(20), np.arange(20)) != 4)) is None


@pytest.mark.parametrize(
    "name, options",
    [("above", {}), ("place", {}), ("mirror", {}), ("recall", {"pairs": 9}), ("recall", {"shuffled": True})],
)
def test_the_optimum_is_what_samples_cost(name: str, options: dict[str, Any]) -> None:
    source = build(name, 6, 7, 11, options)
    nats = -source.log_prob(source.sample(4000, seed=0)).mean(axis=(1, 2))
    assert abs(nats.mean() - (source.optimum_nats_per_token() or 0)) < 4 * nats.std() / math.sqrt(len(nats))


# --- refusals ---------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "wrong, cause",
    [
        ({"colours": 1}, "colours"),
        ({"colours": 2.5}, "colours"),
        ({"height": 0}, "height"),
        ({"width": -3}, "width"),
        ({"nosie": 0.1}, "unknown option 'nosie'"),
    ],
)
def test_what_no_source_can_be_is_refused(name: str, wrong: dict[str, Any], cause: str) -> None:
    with pytest.raises(Refusal, match=cause) as caught:
        build_source(name, **{"height": 4, "width": 4, "colours": 4} | wrong)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


@pytest.mark.parametrize(
    "name, option, cause",
    [
        ("above", {"noise": -0.1}, "0 to 1"),
        ("mirror", {"noise": 1.5}, "0 to 1"),
        ("above", {"noise": math.nan}, "0 to 1"),
        ("recall", {"noise": "much"}, "0 to 1"),
        ("above", {"noise": True}, "0 to 1"),
        ("mesh", {"coupling": math.inf}, "-50 to 50"),
        ("place", {"sharpness": -1}, "0 to 500"),
        ("recall", {"pairs": 0}, "1 or more"),
        ("recall", {"pairs": 2.0}, "whole number"),
        ("recall", {"pairs": 5}, "ask for 4 or fewer"),
        ("recall", {"shuffled": 1}, "true or false"),
        ("above", {"niose": 0.1}, "did you mean 'noise'"),
        ("mesh", {"xyz": 0.1}, "known: coupling"),
        ("abvoe", {}, "did you mean 'above'"),
        ("zzz", {}, "known: above, mesh, place, mirror, recall"),
    ],
)
def test_wrong_options_and_names_are_refused(name: str, option: dict[str, Any], cause: str) -> None:
    with pytest.raises(Refusal, match=cause):
        build_source(name, height=4, width=4, colours=4, **option)


def test_pairs_beyond_the_pixels_are_refused() -> None:
    with pytest.raises(Refusal, match="ask for 1 or fewer"):
        build_source("recall", height=2, width=2, colours=9, pairs=2)
    with pytest.raises(Refusal, match="make the image larger"):
        build_source("recall", height=1, width=3, colours=9, pairs=1)


@every
@pytest.mark.parametrize(
    "images, cause",
    [
        (np.full((1, 3, 5), -1), "colours 0 to 3"),
        (np.full((1, 3, 5), 4), "colours 0 to 3"),
        (np.zeros((1, 5, 3), dtype=np.int64), "shape"),
        (np.zeros((3, 5), dtype=np.int64), "shape"),
        (np.zeros((1, 3, 5)), "whole numbers"),
    ],
)
def test_images_that_cannot_be_are_an_error(name: str, images: NDArray[Any], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        build_source(name, height=3, width=5, colours=4).log_prob(images)


@every
def test_no_images_and_a_mask_of_another_shape(name: str) -> None:
    source = build_source(name, height=3, width=5, colours=4)
    assert source.log_prob(source.sample(0, seed=0)).shape == (0, 3, 5)
    with pytest.raises(ValueError, match=r"mask of shape \(15, 15\)"):
        source.gap(np.ones((3, 5), dtype=bool))
