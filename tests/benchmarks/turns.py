"""Compare instruments in short rounds: their ratio within a round, with an interval.

The speed of a host drifts over seconds. A ratio of two medians over a minute contains
the drift between the turns. A ratio within a round does not. The median of many rounds
is not moved by the few in which another program woke up.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vitnb import statistics

FEWEST = 12  # rounds
# Half of an interval. A ratio that is to be known within 0.3% has to look better than
# that, as the look decides when to stop.
CLOSE = 0.002


@dataclass(frozen=True)
class Ratio:
    """The median ratio of two takers over the rounds, with its 95% interval."""

    ratio: float
    low: float
    high: float

    @property
    def close(self) -> bool:
        """Whether the interval is narrow enough to stop."""
        return (self.high - self.low) / 2 < CLOSE


def ratio(a, b) -> Ratio:
    """Return the median ratio of two takers' times, [rounds] each, by logarithms."""
    logs = np.log(np.asarray(a, dtype=float)) - np.log(np.asarray(b, dtype=float))
    return Ratio(
        *np.exp(
            [
                np.median(logs),
                *statistics.bootstrap(logs, lambda drawn: np.median(drawn, axis=-1)),
            ]
        ).tolist()
    )


def take(
    takers: dict[str, Callable[[], float]],
    pairs: list[tuple[str, str]],
    seconds: float,
    seed: int = 0,
) -> tuple[list[Ratio], pd.DataFrame]:
    """Call every taker once a round, in an order drawn anew.

    The rounds end after ``seconds``, or as soon as every ratio is close, but not before
    FEWEST rounds.

    Returns:
        The ratio of each pair, and the times by round.
    """
    random, found, begin = (
        np.random.default_rng(seed),
        {name: [] for name in takers},
        time.monotonic(),
    )
    while True:
        for name in random.permutation(list(takers)):
            found[name].append(float(takers[name]()))
        rounds = len(found[pairs[0][0]])
        if rounds < FEWEST:
            continue
        ratios = [ratio(found[a], found[b]) for a, b in pairs]
        if all(r.close for r in ratios) or time.monotonic() - begin > seconds:
            return ratios, pd.DataFrame(found).rename_axis("round").reset_index()
