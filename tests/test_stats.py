"""Intervals cover, corrections hold, ranks need separation, power is what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench import stats


def drawn(
    seeds: int, images: int, seed_sd: float, image_sd: float, noise: float, rng: np.random.Generator
) -> stats.Values:
    """Crossed random effects around 0."""
    rows = rng.normal(0, seed_sd, (seeds, 1)) if seed_sd else 0.0
    columns = rng.normal(0, image_sd, (1, images)) if image_sd else 0.0
    return np.asarray(rows + columns + rng.normal(0, noise, (seeds, images)))


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "image_sd"), [(3, 1.0, 0.0), (3, 0.3, 3.0), (5, 1.0, 1.0), (10, 0.2, 1.0)]
)
def test_interval_covers_the_truth_as_often_as_it_says(seeds: int, seed_sd: float, image_sd: float) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        found = stats.interval(drawn(seeds, 40, seed_sd, image_sd, 0.5, rng), resamples=300)
        assert found.low is not None and found.high is not None
        hits += found.low <= 0 <= found.high
    # 300 draws at 95 %: a standard error of 1.3 %.
    assert 0.91 <= hits / 300 <= 0.995


def test_plain_percentile_bootstrap_of_three_seeds_would_not_cover() -> None:
    """Why the interval is not the textbook one: this is what it would be."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        means = rng.normal(0, 1, 3)
        draws = rng.choice(means, (400, 3)).mean(axis=1)
        hits += np.quantile(draws, 0.025) <= 0 <= np.quantile(draws, 0.975)
    assert hits / 300 < 0.85


def test_one_seed_has_no_interval_and_an_exact_figure_needs_no_second() -> None:
    one = stats.interval(np.array([[1.0, 2.0, 3.0]]))
    assert (one.estimate, one.low, one.high) == (2.0, None, None)
    assert one.p_value(0) == 1.0
    assert one.at(0.5).low is None
    exact = stats.interval(np.array([[7.0]]), exact=True)
    assert (exact.low, exact.high) == (7.0, 7.0)
    assert exact.p_value(6.0) == 0.0


def test_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        stats.interval(np.zeros((0, 3)))


def test_interval_is_the_same_for_the_same_values() -> None:
    values = drawn(4, 30, 1, 1, 1, np.random.default_rng(3))
    assert stats.interval(values) == stats.interval(values)


def test_more_seeds_and_lower_levels_give_narrower_intervals() -> None:
    values = drawn(12, 30, 1, 0.1, 0.1, np.random.default_rng(3))

    def width(found: stats.Interval) -> float:
        assert found.low is not None and found.high is not None
        return found.high - found.low

    assert width(stats.interval(values)) < width(stats.interval(values[:4]))
    assert width(stats.interval(values, level=0.8)) < width(stats.interval(values))


def test_unit_interval_is_scipys_and_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(3, 1, 200)
    low, high = stats.unit_interval(values.tolist())
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(200), rel=0.15)
    assert stats.unit_interval([2.0, 2.0]) == (2.0, 2.0)


def test_holm_rejects_what_holm_rejects() -> None:
    p = [0.01, 0.04, 0.03, 0.005]  # sorted 0.005, 0.01, 0.03, 0.04 against 0.0125, 0.0167, 0.025: two fall
    alphas = stats.holm(p)
    assert [a >= q for a, q in zip(alphas, p, strict=True)] == [True, False, False, True]
    assert alphas == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_never_laxer_than_alpha_nor_stricter_than_bonferroni(p: list[float]) -> None:
    for alpha in stats.holm(p):
        assert 0.05 / len(p) <= alpha <= 0.05


def test_corrected_intervals_exclude_zero_exactly_where_holm_rejects() -> None:
    rng = np.random.default_rng(5)
    found = [stats.interval(drawn(6, 1, 1, 0, 0, rng) + shift) for shift in (0.0, 1.0, 1.5, 2.5, 6.0)]
    alphas = stats.holm([one.p_value() for one in found])
    wide = stats.corrected(found, [0.0] * 5)
    for one, corrected, alpha in zip(found, wide, alphas, strict=True):
        assert corrected.low is not None and corrected.high is not None
        assert (corrected.low > 0 or corrected.high < 0) == (one.p_value() < alpha)
    assert any(one.low is not None and one.low > 0 for one in wide)
    assert any(one.low is not None and one.low <= 0 for one in wide)


def test_ranks_separate_only_what_separates() -> None:
    rng = np.random.default_rng(2)
    base = drawn(5, 50, 0.02, 1, 0.02, rng)
    twin = base + rng.normal(0, 0.02, base.shape)
    worse = base + 0.5 + rng.normal(0, 0.02, base.shape)

    def by_seed(table: stats.Values) -> dict[int, stats.Values]:
        return dict(enumerate(table))

    assert stats.ranks([by_seed(t) for t in (base, twin, worse)]) == [(1, 2), (1, 2), (3, 3)]
    assert stats.ranks([by_seed(base[:1]), by_seed(worse[:1])]) == [(1, 2), (1, 2)], "one seed separates nothing"
    assert stats.ranks([by_seed(base), by_seed(worse[:4])]) == [(1, 1), (2, 2)], "shared seeds are enough"
    assert stats.ranks([{0: base[0], 1: base[1]}, {2: worse[2], 3: worse[3]}]) == [(1, 2), (1, 2)], "no shared seed"
    assert stats.ranks([]) == []


def test_pairing_falls_back_to_means_where_the_images_differ() -> None:
    left = {0: np.array([1.0, 3.0]), 1: np.array([2.0, 2.0])}
    assert stats.paired(left, {0: np.array([1.0, 1.0])}).tolist() == [[0.0, 2.0]]
    assert stats.paired(left, {0: np.array([1.0])}).tolist() == [[1.0]]


def test_power_is_kept() -> None:
    """Draw the seeds that were asked for, many times: about the promised share decides."""
    rng = np.random.default_rng(9)
    pilot = np.array([[0.2], [1.8], [0.3], [1.9]]) - 0.3
    found = stats.interval(pilot)
    more = stats.seeds_to_decide(found, 0.0)
    assert more is not None and more > 0
    deviation, total = pilot.std(ddof=1), len(pilot) + more
    decided = 0
    for _ in range(300):
        again = stats.interval(rng.normal(found.estimate, deviation, (total, 1)), resamples=200)
        assert again.low is not None
        decided += again.low > 0
    assert decided / 300 > 0.7


def test_power_says_when_seeds_would_not_help() -> None:
    images = stats.interval(drawn(5, 10, 0, 5, 0, np.random.default_rng(0)))
    assert stats.seeds_to_decide(images, images.estimate + 0.01) is None
    assert stats.seeds_to_decide(stats.interval(np.array([[1.0]])), 0.0) is None
    clear = stats.interval(np.array([[1.0], [1.01], [0.99], [1.0]]))
    assert stats.seeds_to_decide(clear, 0.0) == 0


def test_slope_is_the_exponent() -> None:
    x = np.array([64.0, 256.0, 1024.0])
    assert stats.slope(np.log(x), np.log(3 * x**1.7)) == pytest.approx(1.7)
    assert math.isnan(stats.slope(np.log(x[:1]), np.log(x[:1])))


def test_rank_correlation() -> None:
    assert stats.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert math.isnan(stats.rank_correlation([1, 2], [1, 2]))
    assert math.isnan(stats.rank_correlation([1, 1, 1], [1, 2, 3]))


def test_pareto_marks_the_unbeaten() -> None:
    assert stats.pareto([(1, 3), (2, 2), (3, 3), (2, 2), (None, 0)]) == [True, True, False, True, False]
    assert stats.pareto([]) == []


def test_t_and_spearman_are_scipys() -> None:
    from scipy import stats as peer

    for freedom in (1.0, 2.7, 30.0, math.inf):
        assert stats._quantile(0.975, freedom) == pytest.approx(peer.t(freedom).ppf(0.975))
        assert 2 * stats._tail(1.7, freedom) == pytest.approx(2 * peer.t(freedom).sf(1.7))
    x, y = [3.0, 1.0, 1.0, 7.0, 2.0], [5.0, 5.0, 2.0, 9.0, 1.0]
    assert stats.rank_correlation(x, y) == pytest.approx(peer.spearmanr(x, y).statistic)
