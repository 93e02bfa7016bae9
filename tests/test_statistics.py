"""Intervals and tests, against closed forms, SciPy, and worlds of known truth."""

import numpy as np
import pytest
from scipy import stats

from vitnb import statistics


def test_percentiles_of_independent_samples_cover_the_truth():
    """95% intervals hold a known p50 and p95 in about 95 of 100 draws."""
    random, hits = np.random.default_rng(1), np.zeros(2)
    truth = stats.lognorm(0.3).ppf([0.5, 0.95])
    for _ in range(200):
        found = statistics.percentiles(random.lognormal(0, 0.3, 400), [0.5, 0.95])
        hits += [
            low <= t <= high for t, (_, low, high) in zip(truth, found, strict=True)
        ]
    assert (hits >= 175).all() and (hits <= 199).all()


def test_percentiles_are_numpys_and_lie_inside_their_intervals():
    samples = np.random.default_rng(2).gamma(3, size=500)
    for share, (value, low, high) in zip(
        (0.5, 0.95), statistics.percentiles(samples, [0.5, 0.95]), strict=True
    ):
        assert value == np.quantile(samples, share) and low < value < high


def test_neighbours_that_resemble_each_other_widen_the_interval():
    """A slow drift under the samples: resampling single ones would promise too much."""
    random = np.random.default_rng(3)
    drift = np.repeat(random.normal(size=60), 10)
    ((_, low, high),) = statistics.percentiles(drift, [0.5])
    alone = statistics.bootstrap(drift, lambda drawn: np.median(drawn, axis=-1))
    assert high - low > 1.5 * (alone[1] - alone[0])


def test_the_mean_s_interval_is_that_of_the_central_limit():
    samples = np.random.default_rng(4).exponential(size=2000)
    value, low, high = statistics.bootstrap_mean(samples)
    half = 1.96 * samples.std() / 2000**0.5
    assert value == samples.mean() and (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_wilson_by_its_formula():
    """Wilson (1927), for 37 of 50."""
    z, n, p = stats.norm.ppf(0.975), 50, 37 / 50
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert statistics.wilson(37, 50) == pytest.approx(
        ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
    )


def test_mcnemar_counts_only_what_differs():
    """6 images right in a alone, 1 in b alone: both tails of 7 coin flips."""
    a = np.array([1] * 90 + [1] * 6 + [0] * 1 + [0] * 3, dtype=bool)
    b = np.array([1] * 90 + [0] * 6 + [1] * 1 + [0] * 3, dtype=bool)
    assert statistics.mcnemar(a, b) == (6, 1, pytest.approx(2 * (1 + 7) / 2**7))
    assert statistics.mcnemar(a, a) == (0, 0, 1.0)


def test_paired_points_by_hand():
    a, b = np.array([1, 1, 1, 0, 1, 0, 1, 1]), np.array([1, 0, 1, 0, 0, 1, 1, 1])
    value, low, high = statistics.paired_points(a, b)
    # differences: 2 of +1, 1 of -1, 5 of 0
    half = 1.959964 * 100 * ((3 - 1 / 8) / 8 / 8) ** 0.5
    assert (value, low, high) == pytest.approx((12.5, 12.5 - half, 12.5 + half))


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0]


def test_farther_is_scipys_one_sided_test():
    a, b = np.random.default_rng(5).random((2, 40))
    assert (
        statistics.paired_t_pvalue(a + 0.3, b)
        == stats.ttest_rel(a + 0.3, b).pvalue / 2
        < 0.01
    )
    assert statistics.paired_t_pvalue(b, a + 0.3) > 0.9
    assert statistics.paired_t_pvalue(a, a) == 1.0


def test_a_ratio_is_that_of_times_that_scale():
    random = np.random.default_rng(6)
    b = random.lognormal(1, 0.02, 60)
    found = statistics.ratio(1.25 * b * random.lognormal(0, 0.01, 60), b)
    assert found.low < 1.25 < found.high and found.ratio == pytest.approx(
        1.25, rel=0.01
    )
    assert found.different and found.p < 1e-6 and found.samples == 60
    turned = statistics.ratio(b, b * 1.25)
    assert turned.ratio == pytest.approx(0.8)


def test_the_interval_and_scipys_p_value_decide_alike():
    random, agreed = np.random.default_rng(7), 0
    for _ in range(200):
        d = random.normal(0.02, 0.03, 40)
        found = statistics.ratio(np.exp(d), np.ones(40))
        p = stats.wilcoxon(d, method="approx").pvalue
        assert found.p == pytest.approx(p, rel=1e-6)
        agreed += (found.low > 1 or found.high < 1) == (p < 0.002)
    assert agreed >= 199  # one may lie on the edge between two ranks


def test_false_alarms_are_as_rare_as_stated():
    """Of 2,000 equal pairs with heavy-tailed noise 0.2% is 4.

    More than 12 has a chance of 1 in 3,000.
    """
    random = np.random.default_rng(8)
    alarms = sum(
        statistics.ratio(*np.exp(0.05 * random.standard_t(2, (2, 40)))).different
        for _ in range(2000)
    )
    assert alarms <= 12


def test_a_two_percent_difference_is_seen_through_one_percent_noise():
    random = np.random.default_rng(9)
    seen = sum(
        statistics.ratio(
            *np.exp(0.01 * random.normal(size=(2, 60)) + [[0.02], [0]])
        ).different
        for _ in range(100)
    )
    assert seen == 100


def test_too_few_rounds_decide_nothing():
    assert not statistics.ratio([2.0] * 12, [1.0] * 12).different
    assert statistics.ratio([2.0] * 13, [1.0] * 13).different


def test_less_than_a_quarter_of_a_percent_is_never_called():
    """However sure the interval: two processes of one program differ by as much."""
    tight = np.random.default_rng(10).normal(0, 0.001, 100)
    assert not statistics.ratio(np.exp(tight + 0.002), np.ones(100)).different
    assert statistics.ratio(np.exp(tight + 0.005), np.ones(100)).different
    assert statistics.ratio(np.exp(tight - 0.005), np.ones(100)).different
