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
    """Right in a alone: 2 of 8 images; in b alone: 1. The interval adds 1 to both."""
    a, b = np.array([1, 1, 1, 0, 1, 0, 1, 1]), np.array([1, 0, 1, 0, 0, 1, 1, 1])
    value, low, high = statistics.paired_points(a, b)
    more, less = 3 / 10, 2 / 10
    half = 1.959964 * ((more + less - (more - less) ** 2) / 10) ** 0.5
    ends = (more - less - half, more - less + half)
    assert (value, low, high) == pytest.approx((12.5, 100 * ends[0], 100 * ends[1]))


def test_paired_points_are_never_sure_of_no_difference():
    """2,040 images of which none differs: a difference of 0.1 points is possible."""
    right = np.arange(2040) % 20 > 0
    value, low, high = statistics.paired_points(right, right)
    assert value == 0 and low == -high and 0.1 < high < 0.2
    value, low, high = statistics.paired_points([1] * 9, [0] * 9)
    assert value == 100 == high and 40 < low < 60


@pytest.mark.parametrize("images", [12, 40])
@pytest.mark.parametrize("shares", [(0.02, 0.02), (0.1, 0.02), (0.3, 0.1)])
def test_paired_points_cover_the_truth(images, shares):
    """The chance of every outcome, by its multinomial: the interval holds in 95%."""
    outcomes = [(m, n) for m in range(images + 1) for n in range(images + 1 - m)]
    counts = np.array([(m, n, images - m - n) for m, n in outcomes])
    chances = stats.multinomial(images, [*shares, 1 - sum(shares)]).pmf(counts)
    covered = 0.0
    for (only_a, only_b, _), chance in zip(counts, chances, strict=True):
        if chance < 1e-7:
            continue
        a = np.arange(images) < only_a
        b = (np.arange(images) >= only_a) & (np.arange(images) < only_a + only_b)
        _, low, high = statistics.paired_points(a, b)
        covered += chance * (low <= 100 * (shares[0] - shares[1]) <= high)
    assert covered > 0.94


def test_how_few_images_can_never_be_significant():
    """5 images that differ: 2 of 32 outcomes are as extreme as all on one side."""
    for differing in range(1, 9):
        a = np.arange(20) < differing
        only, none, p = statistics.mcnemar(a, np.zeros(20, dtype=bool))
        assert (only, none) == (differing, 0)
        assert statistics.least_mcnemar_pvalue(differing) == pytest.approx(p)
    assert statistics.least_mcnemar_pvalue(0) == 1
    assert statistics.could_be_significant(0, [0.9], 2 * 0.5**6)
    assert not statistics.could_be_significant(0, [0.9], 2 * 0.5**5)
    # Beside another test, Holm's correction takes one more image.
    assert not statistics.could_be_significant(1, [0.9, 0.5], 2 * 0.5**6)
    assert statistics.could_be_significant(1, [0.9, 0.5], 2 * 0.5**7)
    # Not where the other has the smaller p-value: then it is corrected first.
    assert statistics.could_be_significant(1, [0.001, 0.5], 2 * 0.5**6)


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


# --- Ratios of times: one process of each ---


def test_a_ratio_is_that_of_times_that_scale():
    random = np.random.default_rng(6)
    b = random.lognormal(1, 0.02, 60)
    found = statistics.signed_rank_ratio(1.25 * b * random.lognormal(0, 0.01, 60), b)
    assert found.low < 1.25 < found.high and found.ratio == pytest.approx(
        1.25, rel=0.01
    )
    assert found.different and found.samples == 60
    turned = statistics.signed_rank_ratio(b, b * 1.25)
    assert turned.ratio == pytest.approx(0.8)


def test_the_interval_and_scipys_signed_rank_test_decide_alike():
    random, agreed = np.random.default_rng(7), 0
    for _ in range(200):
        d = random.normal(0.02, 0.03, 40)
        found = statistics.signed_rank_ratio(np.exp(d), np.ones(40))
        p = stats.wilcoxon(d, method="approx").pvalue
        agreed += found.excludes_one == (p < 0.01)
    assert agreed >= 199  # one may lie on the edge between two ranks


def test_too_few_rounds_decide_nothing():
    assert not statistics.signed_rank_ratio([2.0] * 8, [1.0] * 8).different
    assert statistics.signed_rank_ratio([2.0] * 9, [1.0] * 9).different


def test_one_process_of_each_shows_no_difference_below_two_percent():
    """However sure the interval, it knows nothing of another process."""
    tight = np.random.default_rng(10).normal(0, 0.001, 100)
    for effect, called in ((0.015, False), (0.025, True), (-0.025, True)):
        found = statistics.signed_rank_ratio(np.exp(tight + effect), np.ones(100))
        assert found.excludes_one and found.different == called
        assert found.df == 0 and np.isnan(found.p)


# --- Ratios of times: several processes of each ---


def draw_turns(random, variants: int, rounds: int, processes: int) -> np.ndarray:
    cycles = [
        np.concatenate([random.permutation(processes) for _ in range(rounds)])[:rounds]
        for _ in range(variants)
    ]
    return np.array(cycles)


def launch(
    random,
    variants: int = 3,
    rounds: int = 40,
    processes: int = 2,
    between: float = 0.004,
    within: float = 0.006,
    effects: tuple = (),
) -> statistics.ProcessTimes:
    """Fit times of known truth: processes differ, rounds are noisy, the host drifts."""
    turns = draw_turns(random, variants, rounds, processes)
    logs = within * random.standard_t(4, (variants, rounds))
    places = between * random.normal(size=(variants, processes))
    logs += np.take_along_axis(places, turns, axis=1)
    logs += np.cumsum(0.01 * random.normal(size=rounds))
    logs += 0.7 * (np.arange(rounds) > rounds / 2)
    logs[: len(effects)] += np.array(effects)[:, None]
    names = [f"v{i}" for i in range(variants)]
    return statistics.fit_process_times(
        dict(zip(names, np.exp(logs).tolist(), strict=True)),
        dict(zip(names, turns.tolist(), strict=True)),
    )


@pytest.mark.parametrize("processes", [(2, 2), (4, 3)])
def test_without_noise_it_is_students_test_of_the_processes(processes):
    random = np.random.default_rng(11)
    host = random.normal(size=30)
    places = {name: random.normal(size=n) for name, n in zip("ab", processes, strict=1)}
    turns = {
        name: draw_turns(random, 1, 30, n)[0].tolist()
        for name, n in zip("ab", processes, strict=1)
    }
    times = {name: np.exp(host + places[name][turns[name]]) for name in "ab"}
    found = statistics.fit_process_times(times, turns).ratio("a", "b")
    wanted = stats.ttest_ind(places["a"], places["b"])
    low, high = wanted.confidence_interval(statistics.PAIR_LEVEL)
    assert found.df == wanted.df and found.samples == 30
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-5)
    assert np.log([found.low, found.high]) == pytest.approx([low, high], rel=1e-5)
    middle = places["a"].mean() - places["b"].mean()
    assert np.log(found.ratio) == pytest.approx(middle, rel=1e-5)


def test_the_error_is_pooled_over_all_variants():
    """A nested analysis of variance of three variants, by its sums of squares."""
    random = np.random.default_rng(12)
    places = np.array([[0.0, 0.02], [0.1, 0.13], [0.3, 0.29]])
    turns = draw_turns(random, 3, 20, 2)
    logs = np.take_along_axis(places, turns, axis=1) + random.normal(size=20)
    fitted = statistics.fit_process_times(
        dict(zip("abc", np.exp(logs).tolist(), strict=True)),
        dict(zip("abc", turns.tolist(), strict=True)),
    )
    within = (0.02**2 + 0.03**2 + 0.01**2) / 2 / 3
    assert fitted.df == 3 and fitted.mean_square == pytest.approx(within, rel=1e-5)
    found = fitted.ratio("b", "a")
    half = stats.t(3).ppf(0.995) * within**0.5
    assert np.log([found.low, found.high]) == pytest.approx(
        [0.105 - half, 0.105 + half], rel=1e-4
    )


@pytest.mark.parametrize(
    ("variants", "between", "within"),
    [(2, 0.004, 0.006), (3, 0.0, 0.006), (3, 0.004, 0.006), (7, 0.004, 0.0001)],
)
def test_p_values_and_false_calls_are_as_rare_as_they_say(variants, between, within):
    """Equal variants in 300 launches: 5% of 300 are 15, 1% are 3.

    More than 27 has a chance of 1 in 400, more than 9 of 1 in 1,000.
    """
    random = np.random.default_rng(13)
    pairs = [
        launch(random, variants, between=between, within=within).ratio("v0", "v1")
        for _ in range(300)
    ]
    significant = sum(pair.p < 0.05 for pair in pairs)
    outside = sum(pair.excludes_one for pair in pairs)
    assert 2 <= significant <= 27 and outside <= 9
    assert sum(pair.different for pair in pairs) <= outside
    assert all(pair.excludes_one == (pair.p < 0.01) for pair in pairs)


def test_two_percent_are_seen_through_processes_that_differ():
    random = np.random.default_rng(14)
    pairs = [
        launch(random, 7, 100, between=0.002, effects=(0.02,)).ratio("v0", "v1")
        for _ in range(100)
    ]
    assert sum(pair.different for pair in pairs) >= 95
    assert np.median([pair.ratio for pair in pairs]) == pytest.approx(
        np.exp(0.02), abs=0.001
    )


def test_less_than_a_quarter_of_a_percent_is_never_called():
    random = np.random.default_rng(15)
    for effect, called in ((0.002, False), (0.006, True), (-0.006, True)):
        found = launch(
            random, 7, between=0.0003, within=0.001, effects=(effect,)
        ).ratio("v0", "v1")
        assert found.excludes_one and found.different == called


def test_a_process_is_as_uncertain_as_the_median_of_its_own_rounds():
    """By simulation: the spread of a process's time over many launches."""
    random = np.random.default_rng(16)
    fits = [launch(random, 8, 60, between=0.0) for _ in range(150)]
    spread = np.std([fit.processes["v0"][0] - fit.processes["v0"][1] for fit in fits])
    stated = np.median([fit.standard_errors()["v0"] for fit in fits])
    assert 0.75 < stated / (spread / 2**0.5) < 1.1  # few rounds look steadier
    wide = launch(random, 8, 60, between=0.5).standard_errors()["v0"]
    assert wide == pytest.approx(stated, rel=0.5), "other processes do not matter"


def test_without_several_processes_there_is_no_error_between_them():
    with pytest.raises(ValueError, match="no variant has several processes"):
        launch(np.random.default_rng(17), processes=1).ratio("v0", "v1")
