"""Statistics over seeds, against hand computations and simulations."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp

from vgrout.lab.stats import (
    below_line,
    bootstrap,
    cliffs_delta,
    equivalent,
    hodges_lehmann,
    holm,
    in_sequence,
    leakage,
    not_worse,
    rates,
    restricted_mean,
    sign_flip,
    smallest_p,
    survival,
)


@pytest.mark.parametrize("side", ["less", "greater", "two-sided"])
def test_sign_flip_counts_all_signs(side):
    d = np.array([0.3, -0.1, 0.25, 0.05, 0.4, 0.2])
    means = np.array([(np.array(signs) * d).mean() for signs in product((-1, 1), repeat=6)])
    tail = {"less": means <= d.mean() + 1e-12, "greater": means >= d.mean() - 1e-12}
    tail["two-sided"] = np.abs(means) >= d.mean() - 1e-12
    assert sign_flip(d, side) == pytest.approx(tail[side].mean())


@pytest.mark.parametrize("n, least", [(3, 0.25), (5, 0.0625), (6, 0.03125), (8, 0.0078125)])
def test_the_smallest_p_of_so_many_seeds(n, least):
    d = 0.1 + 0.01 * np.arange(n)
    assert sign_flip(d, "two-sided") == smallest_p(n, "two-sided") == least
    assert sign_flip(-d, "less") == smallest_p(n, "less") == least / 2
    assert sign_flip(np.zeros(n), "less") == 1.0


def test_margins():
    d = np.array([-0.02, 0.01, 0.0, -0.01, 0.02, -0.02, 0.01, 0.0])
    assert sign_flip(d, "greater") > 0.5  # no better
    assert not_worse(d, 0.03) == 2**-8  # and no worse by .03
    assert not_worse(d, 0.001) > 0.05
    assert equivalent(d, 0.03) == 2**-8 and equivalent(d + 0.05, 0.03) > 0.05 and equivalent(d - 0.05, 0.03) > 0.05


def test_families():
    p = {"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005}
    assert holm(p) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06, "d": 0.02})
    assert list(holm(p)) == list(p) and holm({}) == {}
    assert in_sequence([0.01, 0.05, 0.2, 0.001], 0.05) == [True, True, False, False]


def test_effects_by_hand():
    assert hodges_lehmann([1.0, 2.0, 6.0]) == 2.75  # of 1, 2, 6, 1.5, 3.5, 4
    assert cliffs_delta([1, 2, 3], [2, 2]) == 0.0
    assert cliffs_delta([3, 4], [1, 2, 2.5]) == 1.0 and cliffs_delta([1, 1], [1, 1]) == 0.0
    assert cliffs_delta([1, 2], [2, 3]) == pytest.approx(-0.75)


def test_what_is_no_difference_of_seeds():
    with pytest.raises(ValueError, match="not a finite number"):
        sign_flip([0.1, np.nan, 0.2], "greater")
    with pytest.raises(ValueError, match="different seeds or problems"):
        bootstrap(np.zeros((2, 4, 1)), np.zeros((2, 8, 1)))


def test_rates_leave_out_missing_samples():
    hits = np.array([[[1, 0], [1, np.nan]], [[0, 0], [1, 1]]])
    assert rates(hits).tolist() == [0.75, 0.5]
    low, high = bootstrap(hits)
    assert 0 <= low < 0.625 < high <= 1


def test_bootstrap_of_seeds_that_differ():
    """Where problems and samples agree, only seeds vary: the interval is that of a mean of them."""
    of_seed = np.array([0, 1, 0, 0, 1, 1, 0, 1, 1, 1], float)
    hits = np.broadcast_to(of_seed[:, None, None], (10, 6, 2)).copy()
    low, high = bootstrap(hits)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 10)
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.06)
    assert bootstrap(hits, hits) == (0.0, 0.0)  # the same arm: problems and seeds are drawn together
    assert bootstrap(hits) == bootstrap(hits)


def test_bootstrap_of_problems_and_samples():
    """Within one seed problems vary; within one problem samples do."""
    problems = np.zeros((1, 100, 1))
    problems[0, :30] = 1
    low, high = bootstrap(problems)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 100)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.02)
    samples = np.zeros((1, 1, 100))
    samples[0, 0, :30] = 1
    assert bootstrap(samples) == pytest.approx((0.3 - half, 0.3 + half), abs=0.02)


def test_survival_by_hand():
    """Events at 10 and 30, censored at 20 and 40."""
    times, seen = [10, 20, 30, 40], [True, False, True, False]
    at, share = survival(times, seen)
    assert at.tolist() == [10, 20, 30, 40]
    assert share.tolist() == pytest.approx([0.75, 0.75, 0.375, 0.375])
    assert restricted_mean(times, seen, 40) == pytest.approx(10 + 0.75 * 20 + 0.375 * 10)
    assert restricted_mean(times, seen, 25) == pytest.approx(10 + 0.75 * 15)
    assert restricted_mean([50, 50], [False, False], 50) == 50


def test_leakage():
    shares, hack = [0, 0.25, 0.5, 1.0], [0.0, 0.2, 0.1, 0.6]  # pooled: 0, .15, .15, .6
    assert leakage(shares, hack, 0.075) == pytest.approx((0.125, 0.125))
    assert leakage(shares, hack, 0.375) == pytest.approx((0.75, 0.75))
    assert leakage(shares, hack, 0.15) == pytest.approx((0.25, 0.5))  # a flat part says only so much
    assert leakage(shares, hack, -0.1) == (0, 0) and leakage(shares, hack, 0.9) == (1, 1)
    assert leakage(shares[::-1], hack[::-1], 0.375) == pytest.approx((0.75, 0.75))
    assert leakage([0, 1, 0, 1], [0.1, 0.5, 0.0, 0.6], 0.3) == leakage([1, 0, 0, 1], [0.6, 0.0, 0.1, 0.5], 0.3)


def test_distance_off_a_line():
    line = [(0.2, 0.0), (0.2, 0.4), (0.3, 0.6)]
    assert below_line((0.5, 0.0), line) == pytest.approx(0.3)  # solves more than the line ever does
    assert below_line((0.25, 0.3), line) == pytest.approx(0.05)  # under it
    assert below_line((0.25, 0.7), line) < 0 and below_line((0.1, 0.2), line) == pytest.approx(-0.1)
    assert below_line((0.31, 0.95), line) == pytest.approx(0.01) and below_line((0.0, 0.0), line) == pytest.approx(0)
    folded = [(0.35, 0.05), (0.45, 0.2), (0.2, 0.8)]
    assert below_line((0.3, 0.4), folded) < 0
    assert below_line((0.3, 0.6), line) == pytest.approx(0) and below_line((0.2, 0.2), line) == pytest.approx(0)
    assert below_line((0.2, 0.0), [(0.2, 0.0), (0.2, 0.0)]) == pytest.approx(0)


def test_type_one_errors_of_seeds_and_of_problems():
    """Two arms without a difference whose runs vary by seed: flipping seeds errs no more often than alpha says; a
    t-test over problems, on scores averaged over seeds, does most of the time."""
    rng, runs, alpha = np.random.default_rng(0), 400, 0.05
    by_seed = by_problem = 0
    difficulty = rng.normal(0, 0.15, 60)
    for _ in range(runs):
        chance = np.clip(0.4 + rng.normal(0, 0.2, (2, 8, 1)) + difficulty, 0, 1)
        solved = rng.binomial(2, chance) / 2
        gap = solved[0] - solved[1]
        by_seed += sign_flip(gap.mean(1), "two-sided") <= alpha
        by_problem += ttest_1samp(gap.mean(0), 0).pvalue <= alpha
    assert by_seed <= binom.ppf(0.999, runs, alpha)
    assert by_problem > 0.4 * runs
