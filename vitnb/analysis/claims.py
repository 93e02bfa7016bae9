"""The claims ledger: what the source study published, number by number, beside what this study measured.

``data/claims.csv`` holds one row for each numeric result of its five documents. Absolute times and sizes belong to a device and
a model; what can be compared elsewhere are ratios to the baseline of the same table, and differences in accuracy.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from vitnb import statistics, variants
from vitnb.study import ROOT

LEDGER = ROOT / "data" / "claims.csv"


# A claim holds if its ratio lies within this share of our interval, or its points within these of ours.
RATIO_TOLERANCE, POINTS_TOLERANCE = 0.10, 0.5


HOLDS, FAILS, CANNOT = "holds", "does not hold", "cannot be compared here"


# What each metric is a statement about, and how its published value becomes a ratio to the baseline.
RATIOS = {
    "latency_mean": "time", "latency_p50": "time", "throughput": "time", "latency_reduction": "time", "throughput_gain": "time",
    "disk": "size", "size_reduction": "size", "size_saving": "size", "peak_memory": "memory", "memory_saving": "memory",
    "fa2_latency_gain": "fa2 time",
}  # fmt: skip


POINTS = {"top1": "top1", "top5": "top5", "top1_difference": "top1", "top5_difference": "top5"}


SINGLE = {"nf4": "nf4-sdpa", "int8": "int8-sdpa"}  # statements on weights alone: size, and accuracy


WHY_NOT = {
    "latency_p95": "variants are compared by typical times, taken in turns; tails are not",
    "latency_p99": "variants are compared by typical times, taken in turns; tails are not",
    "cpu_latency": "an absolute time of another machine",
    "latency_per_image": "an absolute time of another device",
    "seconds_per_epoch": "an absolute time of another device",
    "test_images": "a count of their images",
    "total_kernel_time": "a mean per call, not a total (defect 8 of 19)",
    "attention_kernel_time": "a mean per call, matched on a name that not every kernel has (defects 8 and 9 of 19)",
    "f1": "no interval is computed for a difference of F1",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What this study found: a ratio or a difference in points, with its interval (equal ends where it is exact)."""

    value: float
    low: float
    high: float


def load_claims() -> pd.DataFrame:
    """Every published number: source, table, device, model, variant, batch_size, metric, value, unit, quote."""
    return pd.read_csv(LEDGER, dtype={"batch_size": str}, keep_default_na=False).assign(
        value=lambda t: t.value.astype(float)
    )


def measured_claims(summary: pd.DataFrame, ratios: pd.DataFrame, compared: pd.DataFrame, ablated: dict | None) -> dict:
    """What there is to compare with: {(quantity, variant): Measured}, at the study's smallest batch size.

    Args: see ``advice.recommendation``; ``ratios`` are of all pairs here. ``ablated``: the ablate record.
    """
    found = {}
    ok = summary[summary.status == "ok"]
    if ok.empty:
        return found
    size = ok.batch_size.min()
    ok = ok[ok.batch_size == size].drop_duplicates("variant").set_index("variant")
    pairs = ratios[(ratios.batch_size == size) & ratios.ratio.notna()]
    for row in pairs.itertuples():
        if row.b == variants.BASELINE:
            found["time", row.a] = Measured(row.ratio, row.low, row.high)
        if (row.a, row.b) == ("nf4-fa2", "nf4-sdpa") and ok.attention_ran.get(row.a) != ok.attention_ran.get(row.b):
            found["fa2 time", "fa2"] = Measured(row.ratio, row.low, row.high)
    if variants.BASELINE in ok.index:
        base = ok.loc[variants.BASELINE]
        for name, row in ok.iterrows():
            for quantity, column in (("size", "disk_mb"), ("memory", "peak_mb")):
                found[quantity, name] = Measured(*[row[column] / base[column]] * 3)
        share = 100 * base.attention_time_ms / base.total_time_ms
        found["attention share", variants.BASELINE] = Measured(share, share, share)
    for row in compared[compared.variant != variants.BASELINE].itertuples():
        found["top1", row.variant] = Measured(row.points, row.points_low, row.points_high)
        found["top5", row.variant] = Measured(row.top5_points, row.top5_points_low, row.top5_points_high)
    return found | _kept(ablated)


def _kept(ablated: dict | None) -> dict:
    """Points of top-1 that keeping some layers brings, by configuration, on the same images."""
    found, rows = {}, {(row["bits"], row["kept"]): row for row in (ablated or {}).get("rows", [])}
    for (bits, kept), row in rows.items():
        if bits < 32:
            right, without = (np.equal(r["predicted"], ablated["labels"]) for r in (row, rows[bits, "none"]))
            name = f"{'nf4' if bits == 4 else 'int8'} keep {kept}"
            found["keep", name] = Measured(*statistics.paired_points(right, without))
    return found


def _ratio(row, baseline: float | None) -> float | str:
    """A published value as a ratio to the baseline, or why it is none."""
    metric = row.metric.split(" (")[0]
    if metric in ("size_reduction", "throughput_gain"):
        return 1 / row.value
    if row.unit == "percent":
        return 1 - row.value / 100
    if row.variant == variants.BASELINE:
        return "an absolute number of the baseline, on another device and model"
    if baseline is None:
        return "no baseline stands beside it"
    return baseline / row.value if metric == "throughput" else row.value / baseline


def _claimed(row, beside: dict) -> tuple[str, str, float] | str:
    """(quantity, variant, ratio or points) of a published number, or why it cannot be compared."""
    metric = row.metric.split(" (")[0]
    if metric in WHY_NOT:
        return WHY_NOT[metric]
    if row.source == "midpoint" and metric in POINTS:
        return "the accuracy of a head that was never trained (defect 4 of 19)"
    baseline = beside.get((row.source, row.table, metric, row.unit, variants.BASELINE))
    if " keep " in row.variant:
        if metric == "top1_change_by_keeping":
            return "keep", row.variant, row.value
        none = beside.get((row.source, row.table, metric, row.unit, f"{row.variant.split(' ')[0]} keep none"))
        if row.variant.endswith("keep none"):
            return "what the others of its table are compared with"
        return (
            ("keep", row.variant, row.value - none) if none is not None else "keeping nothing does not stand beside it"
        )
    variant = SINGLE.get(row.variant, row.variant)
    if metric == "attention_share":
        return "attention share", variant, row.value
    if metric == "fa2_attention_gain":
        return "a share of a kernel time that is a mean per call (defect 8 of 19)"
    if variant == "all":
        return "it names no variant"
    if metric in POINTS:
        if metric.endswith("_difference"):
            return POINTS[metric], variant, row.value
        if variant == variants.BASELINE:
            return "the baseline's accuracy, on other images: differences are compared"
        scale = 100 if row.unit == "fraction" else 1
        return (
            (POINTS[metric], variant, scale * (row.value - baseline))
            if baseline is not None
            else "no baseline stands beside it"
        )
    ratio = _ratio(row, baseline)
    return ratio if isinstance(ratio, str) else (RATIOS[metric], variant, ratio)


def _holds(metric: str, quote: str, quantity: str, claim: float, ours: Measured) -> bool:
    """Whether a claim agrees with the interval, by the tolerances above; one end of a range binds on its own side."""
    if quantity in ("top1", "top5", "keep", "attention share"):
        low, high, better = ours.low - POINTS_TOLERANCE, ours.high + POINTS_TOLERANCE, 1
    else:
        low, high, better = ours.low * (1 - RATIO_TOLERANCE), ours.high * (1 + RATIO_TOLERANCE), -1
    at_least, at_most = claim <= high, claim >= low  # that much, or more of what the number counts
    if metric.endswith(" (low)") or "<" in quote:
        return at_least if better > 0 else at_most
    if metric.endswith(" (high)") or "up to" in quote:
        return at_most if better > 0 else at_least
    return at_least and at_most


def claim_verdicts(found: dict) -> pd.DataFrame:
    """The ledger with columns claim and ours (a ratio to the baseline, or points), verdict and why.

    ``found``: see ``measured``.
    """
    table = load_claims()
    beside = {(r.source, r.table, r.metric, r.unit, r.variant): r.value for r in table[::-1].itertuples()}
    lines = []
    for row in table.itertuples():
        line = {"claim": "", "ours": "", "verdict": CANNOT, "why": ""}
        claimed = _claimed(row, beside)
        if isinstance(claimed, str):
            line["why"] = claimed
        elif (ours := found.get(claimed[:2])) is None:
            line["why"] = _absent(*claimed[:2])
        else:
            quantity, _, value = claimed
            sign = "+" if quantity in ("top1", "top5", "keep") else ""
            unit = {"": "x", "+": " points"}[sign] if quantity != "attention share" else "%"
            line["claim"] = f"{value:{sign}.2f}{unit}"
            line["ours"] = f"{ours.value:{sign}.2f}{unit}"
            if ours.low != ours.high:
                line["ours"] += f" ({ours.low:{sign}.2f} to {ours.high:{sign}.2f})"
            holds = _holds(row.metric, row.quote, quantity, value, ours)
            line["verdict"] = HOLDS if holds else FAILS
        lines.append(line)
    return pd.concat([table, pd.DataFrame(lines)], axis=1)


def _absent(quantity: str, variant: str) -> str:
    if quantity == "fa2 time":
        return "both attention names ran the same kernel here"
    if quantity == "keep":
        return "this model has no such layers, or was not ablated so"
    return f"{variant} was not measured in this study"


def claim_counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each document hold, do not hold, and cannot be compared."""
    found = pd.crosstab(table.source, table.verdict).reindex(columns=[HOLDS, FAILS, CANNOT], fill_value=0)
    return found.reindex(list(dict.fromkeys(table.source))).assign(all=lambda t: t.sum(axis=1)).reset_index()
