"""Advice: from the tables to sentences: which variant for which need, how fast in words, and what cannot be compared."""

from itertools import combinations

import numpy as np
import pandas as pd

from vitnb import statistics, variants

RATIO_COLUMNS = ["a", "b", "batch_size", "ratio", "low", "high", "samples"]


TIME_COLUMNS = ["variant", "batch_size", "p50_ms", "low", "high", "samples"]


def pair_ratio(a: list[list[float]], b: list[list[float]]) -> statistics.Ratio:
    """The ratio of two variants' blocks of the same rounds; a block counts with its median."""
    return statistics.ratio(np.median(a, axis=1), np.median(b, axis=1))


def _order(record: dict) -> list[str]:
    """The variants of a record in the registry's order, then its peers (a record made before there were any has none)."""
    asked = record["asked"]
    return variants.sort_names(asked["variants"]) + asked.get("peers", [])


def time_table(record: dict) -> pd.DataFrame:
    """The p50 of each variant and peer over all its timed forwards, with its 95% interval; blanks for what failed."""
    rows = []
    for size, blocks in record["blocks_ms"].items():
        for name in _order(record):
            row = {"variant": name, "batch_size": int(size), "samples": 0}
            if name in blocks:
                samples = np.concatenate(blocks[name])
                ((p50, low, high),) = statistics.percentiles(samples, [0.5])
                row |= {"p50_ms": p50, "low": low, "high": high, "samples": len(samples)}
            rows.append(row)
    return pd.DataFrame(rows, columns=TIME_COLUMNS)


def ratio_table(record: dict) -> pd.DataFrame:
    """Every pair of variants and peers at every batch size: how many times longer a takes than b, with its interval.

    The interval is at intervals.PAIR_LEVEL; a pair of which one failed has blanks.
    """
    rows = []
    for size, blocks in record["blocks_ms"].items():
        for b, a in combinations(_order(record), 2):
            row = {"a": a, "b": b, "batch_size": int(size), "samples": 0}
            if a in blocks and b in blocks:
                found = pair_ratio(blocks[a], blocks[b])
                row |= {"ratio": found.ratio, "low": found.low, "high": found.high, "samples": found.samples}
            rows.append(row)
    return pd.DataFrame(rows, columns=RATIO_COLUMNS)


def ratios_to_baseline(table: pd.DataFrame, baseline: str = variants.BASELINE) -> pd.DataFrame:
    """The ratios of every variant to one of them, which stands there as 1: columns variant, batch_size, ratio, low, high."""
    straight = table[table.b == baseline].rename(columns={"a": "variant"})
    turned = table[table.a == baseline].rename(columns={"b": "variant"})
    turned = turned.assign(ratio=1 / turned.ratio, low=1 / turned.high, high=1 / turned.low)
    sizes = sorted(table.batch_size.unique())
    itself = pd.DataFrame(
        [{"variant": baseline, "batch_size": s, "ratio": 1.0, "low": 1.0, "high": 1.0} for s in sizes]
    )
    columns = ["variant", "batch_size", "ratio", "low", "high"]
    return pd.concat([itself, straight[columns], turned[columns]], ignore_index=True)


# The source study's targets against its fp32 baseline: at least this much smaller and faster, at most this many
# points of top-1 lost.
TARGET_SMALLER, TARGET_FASTER, TARGET_POINTS = 4.0, 2.0, 3.0


def recommend(summary: pd.DataFrame, ratios: pd.DataFrame, compared: pd.DataFrame) -> list[dict]:
    """Which variant for which need, against the baseline at the same batch size; empty without a comparison.

    Args:
        summary: see ``summary.table``.
        ratios: every variant's time over the baseline's, taken in turns; see ``compare.against``.
        compared: every variant's answers beside the baseline's; see ``accuracy.compared``.

    What lies inside the noise is called neither gain nor loss.
    """
    ok = summary[summary.status == "ok"].merge(ratios, on=["variant", "batch_size"])
    ok = ok.merge(compared[["variant", "points", "verdict"]], on="variant").fillna({"points": 0.0})
    advice = []
    for batch, group in ok.groupby("batch_size"):
        base = group[group.variant == variants.BASELINE]
        if base.empty:
            continue
        group = group.assign(smaller=base.iloc[0].disk_mb / group.disk_mb)
        near = group[group.points >= -TARGET_POINTS]
        needs = {
            "the fastest within 3 points": near.sort_values("ratio").iloc[0],
            "the smallest within 3 points": near.sort_values(["disk_mb", "ratio"]).iloc[0],
            "the least memory while running": near.sort_values("peak_mb").iloc[0],
            "the fastest that is not worse": group[~group.verdict.str.startswith("worse")].sort_values("ratio").iloc[0],
        }
        for need, row in needs.items():
            met = {
                f"{TARGET_SMALLER:g}x smaller": row.smaller >= TARGET_SMALLER,
                f"{TARGET_FASTER:g}x faster": 1 / row.ratio >= TARGET_FASTER,
                f"within {TARGET_POINTS:g} points": row.points >= -TARGET_POINTS,
            }
            advice.append({
                "batch size": int(batch), "need": need, "variant": row.variant, "smaller": f"{row.smaller:.1f}x",
                "speed against fp32": describe_speed(row), "top-1": row.verdict,
                "targets met": ", ".join(name for name, hit in met.items() if hit) or "none",
                "targets missed": ", ".join(name for name, hit in met.items() if not hit) or "none",
            })  # fmt: skip
    return advice


def describe_speed(row) -> str:
    """A ratio of times in words, for instance ``1.31x faster (1.28 to 1.35)``."""
    if row.variant == variants.BASELINE:
        return "the baseline"
    if not row.low:
        return "too few rounds to tell"
    if not statistics.outside_margin(row.low, row.high):
        return f"no difference beyond noise ({1 / row.high:.2f} to {1 / row.low:.2f})"
    if row.ratio < 1:
        return f"{1 / row.ratio:.2f}x faster ({1 / row.high:.2f} to {1 / row.low:.2f})"
    return f"{row.ratio:.2f}x slower ({row.low:.2f} to {row.high:.2f})"


def same_program_notes(summary: pd.DataFrame) -> list[str]:
    """Sentences for variants that differ in name alone: the same weights, engine and attention kernel ran."""
    notes = []
    ok = summary[summary.status == "ok"]
    for (weights, _, kernel), group in ok.groupby(["weights", "engine_ran", "attention_ran"]):
        names = sorted(group.variant.unique())
        if len(names) > 1:
            notes.append(
                f"{' and '.join(names)} ran the same attention kernel ({kernel}, {weights} weights): "
                "they cannot be compared, a difference between them is noise, not attention."
            )
    return notes
