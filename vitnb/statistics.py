"""Intervals and tests: how far a number can be trusted, and when two differ.

Resampling follows Efron (1979), with moving blocks (Kuensch, 1989) where samples follow
each other in time. SciPy does the rest. All seeds are fixed: equal samples give equal
intervals.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, stats

LEVEL = 0.95
# Two times are called different if the interval of their ratio at this level lies
# beyond a margin around 1. Chance alone would call 1% of equal pairs different at this
# level. The margin is for what chance is not: so small a difference is of no use.
PAIR_LEVEL = 0.99
PAIR_MARGIN = 0.0025
# The margin where each variant had one process. Two processes of one program differ by
# up to about a percent, by where their memory lies, and one process cannot show it.
SINGLE_MARGIN = 0.02
# At most this share of equal pairs is called different, as far as a published series of
# equal pairs can say: the upper end of the exact 95% interval of its share
# (outputs/published/instrument/same.csv).
FALSE_CALL_RATE = 0.036
POLISHES = 30  # at most, of a fit that one more would not move


def bootstrap(
    samples,
    statistic: Callable,
    block: int = 1,
    level: float = LEVEL,
    resamples: int = 1000,
) -> tuple[float, float] | np.ndarray:
    """Return the percentile interval of a statistic.

    Args:
        samples: [n], in order.
        statistic: maps [resamples, n] to [resamples] or [k, resamples].
        block: samples that are drawn together; more than 1 where neighbours resemble
            each other.

    Returns:
        (low, high), or [2, k] where the statistic gives k numbers.
    """
    samples = np.asarray(samples, dtype=float)
    count = len(samples)
    block = min(block, count)
    blocks = -(-count // block)
    generator = np.random.default_rng(0)
    starts = generator.integers(0, count - block + 1, size=(resamples, blocks, 1))
    indices = (starts + np.arange(block)).reshape(resamples, -1)[:, :count]
    shares = [(1 - level) / 2, (1 + level) / 2]
    ends = np.quantile(statistic(samples[indices]), shares, axis=-1)
    return tuple(ends.tolist()) if ends.ndim == 1 else ends


def percentiles(
    samples, shares: list[float], level: float = LEVEL
) -> list[tuple[float, float, float]]:
    """Return (value, low, high) of each percentile of a time series.

    The intervals are those of a moving-block bootstrap, with blocks of n^(1/3).
    """
    block = int(np.ceil(len(samples) ** (1 / 3)))
    ends = bootstrap(
        samples, lambda drawn: np.quantile(drawn, shares, axis=-1), block, level
    )
    values = np.quantile(samples, shares).tolist()
    return list(zip(values, *ends.tolist(), strict=True))


def bootstrap_mean(samples, level: float = LEVEL) -> tuple[float, float, float]:
    """Return (value, low, high) of the mean of independent samples."""
    ends = bootstrap(samples, lambda drawn: drawn.mean(-1), level=level)
    return (float(np.mean(samples)), *ends)


def wilson(right: int, images: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a share such as top-1 (SciPy)."""
    test = stats.binomtest(int(right), int(images))
    return tuple(test.proportion_ci(level, method="wilson"))


def mcnemar(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """Test with McNemar's exact test whether two answer the same images equally well.

    Args:
        a, b: bool [images], right or not.

    Returns:
        How many only a gets right, how many only b gets right, and the p-value.
    """
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    if only_a + only_b == 0:
        return 0, 0, 1.0
    return only_a, only_b, float(stats.binomtest(only_a, only_a + only_b).pvalue)


def paired_points(a, b, level: float = LEVEL) -> tuple[float, float, float]:
    """Return (value, low, high) of the difference of two shares, in points.

    The value is the observed difference. The interval is Wald's with one image more of
    each kind that differs (Bonett and Price, 2012): without them its width would be 0
    where no image differs.

    Args:
        a, b: bool [images], right or not on the same images.
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    images, only_a, only_b = len(a), int((a & ~b).sum()), int((~a & b).sum())
    share_a, share_b = (only_a + 1) / (images + 2), (only_b + 1) / (images + 2)
    middle = share_a - share_b
    variance = (share_a + share_b - middle**2) / (images + 2)
    half = stats.norm.ppf((1 + level) / 2) * variance**0.5
    low, high = max(middle - half, -1.0), min(middle + half, 1.0)
    return 100 * (only_a - only_b) / images, 100 * low, 100 * high


def least_mcnemar_pvalue(differing: int) -> float:
    """Return the smallest p-value that McNemar's exact test can give.

    Args:
        differing: images that only one of the two gets right.
    """
    return min(1.0, 2 * 0.5**differing)


def could_be_significant(index: int, ps: list[float], least: float) -> bool:
    """Tell whether one of several tests could have found anything after ``holm``.

    Args:
        index: of the test.
        ps: p-values of all tests.
        least: the smallest p-value that this test can give, on as many samples.
    """
    return holm([*ps[:index], least, *ps[index + 1 :]])[index] < 1 - LEVEL


def holm(ps: list[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, 1979).

    Below 0.05, at most one in 20 such families errs at all.
    """
    adjusted = np.empty(len(ps))
    running = 0.0
    for rank, index in enumerate(np.argsort(ps, kind="stable")):
        running = max(running, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = running
    return adjusted.tolist()


def paired_t_pvalue(a, b) -> float:
    """Return the p-value of a's mean being no larger than b's on the same images.

    The test is the paired t-test, one-sided.
    """
    a, b = np.asarray(a), np.asarray(b)
    if (a == b).all():
        return 1.0
    return float(stats.ttest_rel(a, b, alternative="greater").pvalue)


def outside_margin(low: float, high: float, df: int) -> bool:
    """Tell whether an interval of a ratio lies wholly beyond the margin around 1.

    Args:
        df: degrees of freedom between processes; 0: a process of each variant, and the
            margin is SINGLE_MARGIN.
    """
    margin = PAIR_MARGIN if df else SINGLE_MARGIN
    return low > 1 + margin or high < 1 / (1 + margin)


@dataclass(frozen=True)
class Ratio:
    """How many times longer a takes than b, with its interval.

    p: the p-value of both being equal; nan where no test knows it. samples: the number
    of rounds. df: degrees of freedom between processes; 0: no variant had several.
    """

    ratio: float
    low: float
    high: float
    p: float
    samples: int
    df: int

    @property
    def excludes_one(self) -> bool:
        """Tell whether 1 lies outside of the interval, without any margin."""
        return self.low > 1 or self.high < 1

    @property
    def different(self) -> bool:
        """Tell whether the interval lies beyond the margin around 1."""
        return outside_margin(self.low, self.high, self.df)


@dataclass(frozen=True)
class ProcessTimes:
    """Logarithms of times by process, without the rounds' common ups and downs.

    processes: {variant: [processes]}, the typical time of each. deviations: {variant:
    [rounds]}, what neither the round nor the process explains.
    """

    processes: dict[str, np.ndarray]
    deviations: dict[str, np.ndarray]

    @property
    def df(self) -> int:
        """Degrees of freedom between the processes of a variant, of all variants."""
        return sum(len(times) - 1 for times in self.processes.values())

    @property
    def mean_square(self) -> float:
        """Variance between the processes of a variant, pooled over all variants."""
        squares = [((t - t.mean()) ** 2).sum() for t in self.processes.values()]
        return float(sum(squares) / self.df)

    def standard_errors(self) -> dict[str, float]:
        """Return by how much a process's time may be off, from its own rounds alone.

        That of a median, with the spread as robust as the median (MAD).
        """
        errors = {}
        for name, left in self.deviations.items():
            rounds = len(left) / len(self.processes[name])
            errors[name] = float(
                1.2533 * stats.median_abs_deviation(left, scale="normal") / rounds**0.5
            )
        return errors

    def ratio(self, a: str, b: str, level: float = PAIR_LEVEL) -> Ratio:
        """Return the ratio of two variants' times.

        Rounds of one process are one cluster: they repeat what is peculiar to it, as
        where its memory lies. A nested analysis of variance therefore takes the error
        from the differences between processes of the same variant. These hold the
        rounds' noise, too. The error is pooled over all variants, as the differences
        between processes are taken to be equally large for all of them, in relation to
        the time. Interval and test are Student's.

        Raises:
            ValueError: no variant has several processes.
        """
        if not self.df:
            raise ValueError("no variant has several processes")
        times_a, times_b = self.processes[a], self.processes[b]
        error = (self.mean_square * (1 / len(times_a) + 1 / len(times_b))) ** 0.5
        difference = times_a.mean() - times_b.mean()
        half = stats.t.ppf((1 + level) / 2, self.df) * error
        values = np.exp([difference, difference - half, difference + half]).tolist()
        if error:
            p = float(2 * stats.t.sf(abs(difference) / error, self.df))
        else:  # the clock ticks too coarsely to see any difference between processes
            p = 0.0 if difference else 1.0
        return Ratio(*values, p=p, samples=len(self.deviations[a]), df=self.df)


def fit_process_times(
    times: dict[str, list[float]], turns: dict[str, list[int]]
) -> ProcessTimes:
    """Fit a time for each process and an effect of each round, on logarithms.

    The fit takes turns, as Tukey's median polish (1977) does: the effect of a round is
    the mean of what the processes leave of it, a process's time is the median of what
    the rounds leave of it. Means for rounds, as with an odd number of variants a median
    would leave exactly nothing of one variant in each round. Each is fitted beside the
    other: a round's effect that ignored which process had its turn would take a share
    of the differences between processes with it.

    Args:
        times: {variant: [rounds]}, in the same rounds.
        turns: {variant: [rounds]}, the index of the process that had the round.
    """
    logs = np.log([times[name] for name in times])
    # A cell is a process of a variant; cell[v, r] had round r of variant v.
    first, cell = [0], []
    for name in times:
        indices, own = np.unique(turns[name], return_inverse=True)
        cell.append(first[-1] + own)
        first.append(first[-1] + len(indices))
    cell = np.array(cell)
    rounds = (logs - np.median(logs, axis=1, keepdims=True)).mean(axis=0)
    for _ in range(POLISHES):
        typical = ndimage.median(logs - rounds, cell, np.arange(first[-1]))
        moved, rounds = rounds, (logs - typical[cell]).mean(axis=0)
        if abs(moved - rounds).max() < 1e-9:
            break
    deviations = logs - typical[cell] - rounds
    return ProcessTimes(
        dict(zip(times, np.split(typical, first[1:-1]), strict=True)),
        dict(zip(times, deviations, strict=True)),
    )


def signed_rank_ratio(a, b, level: float = PAIR_LEVEL) -> Ratio:
    """Return the ratio of times of one process each, taken side by side.

    The value is the Hodges-Lehmann estimate of log(a/b), the interval inverts
    Wilcoxon's signed-rank test over rounds (normal approximation), with no shape of the
    noise assumed. It holds the rounds' noise alone. How far two processes of one
    program differ is not known from one process: there is no p-value, and the margin is
    SINGLE_MARGIN.

    Args:
        a, b: [rounds], a[i] beside b[i] in one round.
    """
    d = np.log(np.asarray(a, dtype=float)) - np.log(np.asarray(b, dtype=float))
    n = len(d)
    walsh = np.sort((d[:, None] + d[None, :])[np.triu_indices(n)] / 2)
    spread = np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    cut = int(np.floor(len(walsh) / 2 - stats.norm.ppf((1 + level) / 2) * spread))
    low, high = (walsh[cut], walsh[-1 - cut]) if cut >= 0 else (-np.inf, np.inf)
    values = np.exp([np.median(walsh), low, high]).tolist()
    return Ratio(*values, p=np.nan, samples=n, df=0)
