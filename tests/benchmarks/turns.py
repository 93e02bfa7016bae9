"""Turns: two ways to measure the same thing, taken beside each other in many short rounds, and their ratio with its interval.

The speed of a host drifts over seconds. The ratio of two takers' medians over a minute keeps what drifted between their turns;
the ratio within a round does not, and the median of many rounds is not moved by the few in which something else woke up.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vitnb import statistics

FEWEST = 12  # rounds
# Half of an interval. What is to be known within 0.3% has to look better than that, as looking decides when to stop.
CLOSE = 0.002


@dataclass(frozen=True)
class Ratio:
    """The median ratio of two takers over the rounds, with its 95% bootstrap interval."""

    ratio: float
    low: float
    high: float

    @property
    def close(self) -> bool:
        """Whether the interval is narrow enough to stop."""
        return (self.high - self.low) / 2 < CLOSE


def ratio(a, b) -> Ratio:
    """The exponential of the median of log(a/b): times of the same rounds, [rounds] each."""
    logs = np.log(np.asarray(a, dtype=float)) - np.log(np.asarray(b, dtype=float))
    return Ratio(
        *np.exp([np.median(logs), *statistics.bootstrap(logs, lambda drawn: np.median(drawn, axis=-1))]).tolist()
    )


def take(
    takers: dict[str, Callable[[], float]], pairs: list[tuple[str, str]], seconds: float, seed: int = 0
) -> tuple[list[Ratio], pd.DataFrame]:
    """Rounds in which every taker is called once, in an order drawn anew: (the ratio of each pair, the times by round).

    Ends after ``seconds``, or as soon as every ratio is close; not before FEWEST rounds.
    """
    random, found, begin = np.random.default_rng(seed), {name: [] for name in takers}, time.monotonic()
    while True:
        for name in random.permutation(list(takers)):
            found[name].append(float(takers[name]()))
        rounds = len(found[pairs[0][0]])
        if rounds < FEWEST:
            continue
        ratios = [ratio(found[a], found[b]) for a, b in pairs]
        if all(r.close for r in ratios) or time.monotonic() - begin > seconds:
            return ratios, pd.DataFrame(found).rename_axis("round").reset_index()
