"""Advice: from the tables to sentences: which variant for which need, how fast in words, and what cannot be compared."""

import pandas as pd

from vitnb import intervals, variants

# The source study's targets against its fp32 baseline: at least this much smaller and faster, at most this many
# points of top-1 lost.
TARGET_SMALLER, TARGET_FASTER, TARGET_POINTS = 4.0, 2.0, 3.0


def recommendation(summary: pd.DataFrame, ratios: pd.DataFrame, compared: pd.DataFrame) -> list[dict]:
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
                "speed against fp32": speed(row), "top-1": row.verdict,
                "targets met": ", ".join(name for name, hit in met.items() if hit) or "none",
                "targets missed": ", ".join(name for name, hit in met.items() if not hit) or "none",
            })  # fmt: skip
    return advice


def speed(row) -> str:
    """A ratio of times in words, for instance ``1.31x faster (1.28 to 1.35)``."""
    if row.variant == variants.BASELINE:
        return "the baseline"
    if not row.low:
        return "too few rounds to tell"
    if not intervals.differ(row.low, row.high):
        return f"no difference beyond noise ({1 / row.high:.2f} to {1 / row.low:.2f})"
    if row.ratio < 1:
        return f"{1 / row.ratio:.2f}x faster ({1 / row.high:.2f} to {1 / row.low:.2f})"
    return f"{row.ratio:.2f}x slower ({row.low:.2f} to {row.high:.2f})"


def not_comparable(summary: pd.DataFrame) -> list[str]:
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
