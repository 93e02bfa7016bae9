"""Intervals and tests: how far a number can be trusted, and when two are called different.

Resampling follows Efron (1979), with moving blocks (Kuensch, 1989) where samples follow each other in time; the rest is
SciPy's. All seeds are fixed: the same samples give the same interval.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


# The rule that calls two times different: the interval at this level of their ratio lies beyond this margin around 1. At this
# level, 0.2% of pairs that are the same would be called different by chance alone; the margin is for what is no chance, that
# processes of the same program differ by where their memory lies (outputs/published/instrument).
PAIR_LEVEL = 0.998


PAIR_MARGIN = 0.0025


def bootstrap(
    samples, statistic: Callable, block: int = 1, level: float = LEVEL, resamples: int = 1000
) -> tuple[float, float] | np.ndarray:
    """Percentile interval of a statistic: (low, high), or [2, k] where it gives k numbers.

    Args:
        samples: [n], in order.
        statistic: maps [resamples, n] to [resamples] or [k, resamples].
        block: samples that are drawn together; more than 1 where neighbours resemble each other.
    """
    samples = np.asarray(samples, dtype=float)
    count = len(samples)
    block = min(block, count)
    starts = np.random.default_rng(0).integers(0, count - block + 1, size=(resamples, -(-count // block), 1))
    drawn = samples[(starts + np.arange(block)).reshape(resamples, -1)[:, :count]]
    found = np.quantile(statistic(drawn), [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return tuple(found.tolist()) if found.ndim == 1 else found


def percentiles(samples, shares: list[float], level: float = LEVEL) -> list[tuple[float, float, float]]:
    """(value, low, high) of each percentile of a time series, by a moving-block bootstrap (blocks of n^(1/3))."""
    block = int(np.ceil(len(samples) ** (1 / 3)))
    found = bootstrap(samples, lambda drawn: np.quantile(drawn, shares, axis=-1), block, level)
    return list(zip(np.quantile(samples, shares).tolist(), *found.tolist(), strict=True))


def bootstrap_mean(samples, level: float = LEVEL) -> tuple[float, float, float]:
    """(value, low, high) of the mean of independent samples, by the bootstrap."""
    return (float(np.mean(samples)), *bootstrap(samples, lambda drawn: drawn.mean(-1), level=level))


def wilson(right: int, images: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a share such as top-1 (SciPy)."""
    return tuple(stats.binomtest(int(right), int(images)).proportion_ci(level, method="wilson"))


def mcnemar(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test on the same images: a, b bool [images], right or not -> (only a right, only b right, p)."""
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return only_a, only_b, float(p)


def paired_points(a, b, level: float = LEVEL) -> tuple[float, float, float]:
    """(value, low, high) in points of the difference a - b of two shares on the same images: bool [images] each (Wald)."""
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    half = stats.norm.ppf((1 + level) / 2) * d.std() / len(d) ** 0.5
    return tuple((100 * np.array([d.mean(), d.mean() - half, d.mean() + half])).tolist())


def holm(ps: list[float]) -> list[float]:
    """P-values corrected for their number (Holm, 1979): below 0.05, at most one in 20 such families errs at all."""
    adjusted, running = np.empty(len(ps)), 0.0
    for rank, index in enumerate(np.argsort(ps, kind="stable")):
        running = max(running, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = running
    return adjusted.tolist()


def paired_t_pvalue(a, b) -> float:
    """P-value of a's mean being no larger than b's on the same images (paired t-test, one-sided)."""
    a, b = np.asarray(a), np.asarray(b)
    return float(stats.ttest_rel(a, b, alternative="greater").pvalue) if (a != b).any() else 1.0


def outside_margin(low: float, high: float) -> bool:
    """Whether an interval of a ratio lies wholly beyond the margin around 1."""
    return low > 1 + PAIR_MARGIN or high < 1 / (1 + PAIR_MARGIN)


@dataclass(frozen=True)
class Ratio:
    """How many times longer a takes than b, with an interval, and the p-value of their being the same."""

    ratio: float
    low: float
    high: float
    p: float
    samples: int

    @property
    def different(self) -> bool:
        """The decision: whether the interval lies beyond the margin around 1."""
        return outside_margin(self.low, self.high)


def ratio(a, b, level: float = PAIR_LEVEL) -> Ratio:
    """The ratio of times that were taken side by side, a[i] beside b[i], in rounds of random order.

    The Hodges-Lehmann estimate of log(a/b) and the interval that inverts Wilcoxon's signed-rank test (normal
    approximation; 13 rounds is the fewest that can leave out 1 at this level). It needs no shape of the noise, only that a
    round is as likely to favour the one as the other when both are the same, which the random order sees to.
    """
    d = np.log(np.asarray(a, dtype=float)) - np.log(np.asarray(b, dtype=float))
    n = len(d)
    walsh = np.sort((d[:, None] + d[None, :])[np.triu_indices(n)] / 2)
    spread = np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    cut = int(np.floor(len(walsh) / 2 - stats.norm.ppf((1 + level) / 2) * spread))
    low, high = (walsh[cut], walsh[-1 - cut]) if cut >= 0 else (-np.inf, np.inf)
    positive = (walsh > 0).sum() + (walsh == 0).sum() / 2
    p = 2 * stats.norm.sf(abs(positive - len(walsh) / 2) / spread)
    return Ratio(*np.exp([np.median(walsh), low, high]).tolist(), p=float(p), samples=n)
