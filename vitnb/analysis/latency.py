"""Summarize latency samples: percentiles with their intervals."""

import numpy as np
import pandas as pd

from vitnb import statistics

# A percentile is given if at least ten samples lie beyond it: the p50 needs 20 samples,
# the p95 200 and the p99 1,000.
MIN_BEYOND = 10

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

Interval = tuple[float, float, float]  # value, low, high


def device_samples(timing: dict) -> list[float]:
    """Return the samples in milliseconds: device time on a GPU, host time on a CPU."""
    return timing["device_ms"] or timing["host_ms"]


def percentiles(samples_ms: list[float]) -> dict[str, Interval | None]:
    """Return p50, p95 and p99, each as (value, low, high) in milliseconds.

    A percentile with fewer than MIN_BEYOND samples beyond it is None.
    """
    shares = {
        name: share
        for name, share in SHARES.items()
        if len(samples_ms) * (1 - share) >= MIN_BEYOND - 1e-9
    }
    table = dict.fromkeys(SHARES)
    if shares:
        intervals = statistics.percentiles(samples_ms, list(shares.values()))
        table |= dict(zip(shares, intervals, strict=True))
    return table


def latency_table(timings: list[dict]) -> pd.DataFrame:
    """Tabulate timings for people: milliseconds, with 95% intervals."""
    rows = []
    for timing in timings:
        samples = device_samples(timing)
        row = {
            "batch": timing["batch_size"],
            "samples": len(samples),
            "first": f"{timing['first_ms']:.2f}",
        }
        for name, interval in percentiles(samples).items():
            row[name] = _format_interval(interval)
        row |= {
            "p50, host": f"{np.median(timing['host_ms']):.2f}",
            "p50, cold cache": f"{np.median(timing['cold_ms']):.2f}",
            "images/s": f"{timing['images_per_second']:.1f}",
            "warm-up stable": timing["warm_up"]["stable"],
        }
        rows.append(row)
    return pd.DataFrame(rows).set_index("batch")


def _format_interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    value, low, high = interval
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
