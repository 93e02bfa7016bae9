"""Summarize learning curves: cost of a training, and spread over seeds."""

import statistics


def training_cost(history: list[dict]) -> dict[str, float | None]:
    """Return the cost of a training, from its learning curve.

    Returns:
        seconds; peak_bytes, on the GPU that used most (None on a CPU).
    """
    peaks = [row["peak_bytes"] for row in history if row["peak_bytes"] is not None]
    seconds = sum(row["seconds"] for row in history)
    return {"seconds": round(seconds, 1), "peak_bytes": max(peaks, default=None)}


def summarize_seed(seed: int, history: list[dict]) -> dict:
    """Summarize one training by its best epoch.

    Returns:
        seed; valid_top1 and epoch, of the best epoch; epochs (their number); seconds.
    """
    best = max(history, key=lambda epoch: epoch["valid_top1"])
    return {
        "seed": seed,
        "valid_top1": best["valid_top1"],
        "epoch": best["epoch"],
        "epochs": len(history),
        "seconds": training_cost(history)["seconds"],
    }


def seed_results(rows: list[dict]) -> dict[str, float]:
    """Return mean and sample standard deviation (n - 1) of the validation top-1.

    Returns:
        The two results by name; empty for fewer than two seeds.
    """
    if len(rows) < 2:
        return {}
    top1 = [row["valid_top1"] for row in rows]
    return {
        "mean valid top1": statistics.mean(top1),
        "valid top1 sd": statistics.stdev(top1),
    }


def describe_seeds(rows: list[dict]) -> str:
    """Describe the validation top-1 over seeds in one sentence."""
    first, top1 = rows[0], [row["valid_top1"] for row in rows]
    if len(rows) == 1:
        return (
            f"validation top-1 with seed {first['seed']}: {first['valid_top1']:.3f}; "
            "one training has no spread: take 3 seeds or more to see what a seed "
            "decides"
        )
    mean, sd = seed_results(rows).values()
    return (
        f"validation top-1 over {len(rows)} seeds: {mean:.3f} +- {sd:.3f} (sd), "
        f"{min(top1):.3f} to {max(top1):.3f}; seed {first['seed']}, which is exported, "
        f"has {first['valid_top1']:.3f}"
    )
