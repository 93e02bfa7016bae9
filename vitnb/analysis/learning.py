"""TODO."""

import statistics


def training_cost(history: list[dict]) -> dict[str, float | None]:
    """What a training took, from its learning curve: seconds, and peak_bytes on the GPU that held most (None on a CPU)."""
    peaks = [row["peak_bytes"] for row in history if row["peak_bytes"] is not None]
    return {"seconds": round(sum(row["seconds"] for row in history), 1), "peak_bytes": max(peaks, default=None)}


def summarize_seed(seed: int, history: list[dict]) -> dict:
    """What one training gave, from its learning curve: seed, valid_top1 and epoch (of the epoch that is kept), epochs, seconds."""
    best = max(history, key=lambda epoch: epoch["valid_top1"])
    return {
        "seed": seed, "valid_top1": best["valid_top1"], "epoch": best["epoch"], "epochs": len(history),
        "seconds": training_cost(history)["seconds"],
    }  # fmt: skip


def seed_results(rows: list[dict]) -> dict[str, float]:
    """Mean and standard deviation (of a sample, n - 1) of the validation top-1, by name; nothing for one training."""
    if len(rows) < 2:
        return {}
    found = [row["valid_top1"] for row in rows]
    return {"mean valid top1": statistics.mean(found), "valid top1 sd": statistics.stdev(found)}


def describe_seeds(rows: list[dict]) -> str:
    """What the seeds say, in words."""
    first, found = rows[0], [row["valid_top1"] for row in rows]
    if len(rows) == 1:
        return (
            f"validation top-1 with seed {first['seed']}: {first['valid_top1']:.3f}; one training has no spread: "
            "take 3 seeds or more to see what a seed decides"
        )
    mean, sd = seed_results(rows).values()
    return (
        f"validation top-1 over {len(rows)} seeds: {mean:.3f} +- {sd:.3f} (sd), {min(found):.3f} to {max(found):.3f}; "
        f"seed {first['seed']}, which is exported, has {first['valid_top1']:.3f}"
    )
