"""Intervals and tests: how far a number can be trusted, and when two differ.

Resampling follows Efron (1979), with moving blocks (Kuensch, 1989) where samples follow
each other in time. SciPy does the rest. All seeds are fixed: equal samples give equal
intervals.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
# Two times are called different if the interval of their ratio at this level lies
# beyond this margin around 1. Chance alone would call 0.2% of equal pairs different at
# this level. The margin is for a cause that is no chance: processes of one program
# differ by where their memory lies (outputs/published/instrument).
PAIR_LEVEL = 0.998
PAIR_MARGIN = 0.0025


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

    Args:
        a, b: bool [images], right or not on the same images. The interval is Wald's.
    """
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    half = stats.norm.ppf((1 + level) / 2) * d.std() / len(d) ** 0.5
    return tuple(
        (100 * np.array([d.mean(), d.mean() - half, d.mean() + half])).tolist()
    )


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


def outside_margin(low: float, high: float) -> bool:
    """Tell whether an interval of a ratio lies wholly beyond the margin around 1."""
    return low > 1 + PAIR_MARGIN or high < 1 / (1 + PAIR_MARGIN)


@dataclass(frozen=True)
class Ratio:
    """How many times longer a takes than b, with its interval.

    p: the p-value of both being equal; samples: the number of rounds.
    """

    ratio: float
    low: float
    high: float
    p: float
    samples: int

    @property
    def different(self) -> bool:
        """Tell whether the interval lies beyond the margin around 1."""
        return outside_margin(self.low, self.high)


def ratio(a, b, level: float = PAIR_LEVEL) -> Ratio:
    """Return the ratio of times that were taken side by side.

    The value is the Hodges-Lehmann estimate of log(a/b), the interval inverts
    Wilcoxon's signed-rank test (normal approximation). 13 rounds is the fewest that can
    leave out 1 at this level. Neither needs a shape of the noise. Both need that a
    round is as likely to favour the one as the other when both are equal: the random
    order of a round sees to that.

    Args:
        a, b: [rounds], a[i] beside b[i] in one round.
    """
    d = np.log(np.asarray(a, dtype=float)) - np.log(np.asarray(b, dtype=float))
    n = len(d)
    walsh = np.sort((d[:, None] + d[None, :])[np.triu_indices(n)] / 2)
    spread = np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    cut = int(np.floor(len(walsh) / 2 - stats.norm.ppf((1 + level) / 2) * spread))
    low, high = (walsh[cut], walsh[-1 - cut]) if cut >= 0 else (-np.inf, np.inf)
    positive = (walsh > 0).sum() + (walsh == 0).sum() / 2
    p = 2 * stats.norm.sf(abs(positive - len(walsh) / 2) / spread)
    values = np.exp([np.median(walsh), low, high]).tolist()
    return Ratio(*values, p=float(p), samples=n)
