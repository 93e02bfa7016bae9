"""TODO."""

import numpy as np
import pandas as pd

from vitnb import statistics

# A percentile is given if ten samples lie beyond it: 20 samples for the p50, 200 for the p95, 1,000 for the p99.
MIN_BEYOND = 10


SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def device_samples(timing: dict) -> list[float]:
    """The samples that a variant is known by: the device's on a GPU, the host's on a CPU."""
    return timing["device_ms"] or timing["host_ms"]


def percentiles(samples_ms: list[float]) -> dict[str, tuple[float, float, float] | None]:
    """p50, p95 and p99, each (value, low, high) in milliseconds; None where the samples are too few to carry it."""
    carried = {name: share for name, share in SHARES.items() if len(samples_ms) * (1 - share) >= MIN_BEYOND - 1e-9}
    found = (
        dict(zip(carried, statistics.percentiles(samples_ms, list(carried.values())), strict=True)) if carried else {}
    )
    return {name: found.get(name) for name in SHARES}


def latency_table(timings: list[dict]) -> pd.DataFrame:
    """Timings as people read them: percentiles with their 95% intervals, in milliseconds."""
    rows = []
    for timing in timings:
        row = {"batch": timing["batch_size"], "samples": len(device_samples(timing)), "first": f"{timing['first_ms']:.2f}"}
        for name, found in percentiles(device_samples(timing)).items():
            row[name] = f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})" if found else ""
        row |= {
            "p50, host": f"{np.median(timing['host_ms']):.2f}",
            "p50, cold cache": f"{np.median(timing['cold_ms']):.2f}",
        }
        row |= {"images/s": f"{timing['images_per_second']:.1f}", "warm-up stable": timing["warm_up"]["stable"]}
        rows.append(row)
    return pd.DataFrame(rows).set_index("batch")
