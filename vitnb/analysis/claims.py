"""Compare the source study's published numbers with this study's measurements.

``data/claims.csv``, the ledger, holds one row for each numeric result of five
documents. Absolute times and sizes belong to a device and a model. Ratios to the
baseline of the same table, and differences in accuracy, can be compared elsewhere.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from vitnb import statistics, variants
from vitnb.study import ROOT

LEDGER = ROOT / "data" / "claims.csv"

# A claim holds if its ratio lies within this share of our interval, or its points
# within this many points of our interval.
RATIO_TOLERANCE, POINTS_TOLERANCE = 0.10, 0.5

HOLDS, FAILS, CANNOT = "holds", "does not hold", "cannot be compared here"

# Quantity that a metric's ratio to the baseline is about.
RATIOS = {
    "latency_mean": "time",
    "latency_p50": "time",
    "throughput": "time",
    "latency_reduction": "time",
    "throughput_gain": "time",
    "disk": "size",
    "size_reduction": "size",
    "size_saving": "size",
    "peak_memory": "memory",
    "memory_saving": "memory",
    "fa2_latency_gain": "fa2 time",
}

# Quantity that a metric's difference in points is about.
POINTS = {
    "top1": "top1",
    "top5": "top5",
    "top1_difference": "top1",
    "top5_difference": "top5",
}

# Quantities in points or percent, the larger the better; the others are ratios.
IN_POINTS = ("top1", "top5", "keep")
ATTENTION_SHARE = "attention share"

# Statements about weights alone: size and accuracy.
SINGLE = {"nf4": "nf4-sdpa", "int8": "int8-sdpa"}

TAILS = "variants are compared by typical times, taken in turns; tails are not"
WHY_NOT = {
    "latency_p95": TAILS,
    "latency_p99": TAILS,
    "cpu_latency": "an absolute time of another machine",
    "latency_per_image": "an absolute time of another device",
    "seconds_per_epoch": "an absolute time of another device",
    "test_images": "a count of their images",
    "total_kernel_time": "a mean per call, not a total (defect 8 of 19)",
    "attention_kernel_time": "a mean per call, matched on a name that not every kernel "
    "has (defects 8 and 9 of 19)",
    "f1": "no interval is computed for a difference of F1",
}
NO_BASELINE = "no baseline stands beside it"


@dataclass(frozen=True)
class Measured:
    """One measurement: a ratio or a difference in points, with its interval.

    An exact value has equal ends.
    """

    value: float
    low: float
    high: float


Measurements = dict[tuple[str, str], Measured]  # by (quantity, variant)


def load_claims() -> pd.DataFrame:
    """Load the ledger.

    Returns:
        Columns source, table, device, model, variant, batch_size, metric, value, unit,
        quote.
    """
    table = pd.read_csv(LEDGER, dtype={"batch_size": str}, keep_default_na=False)
    return table.assign(value=table.value.astype(float))


# --- Our side: measurements ---


def measured_claims(
    summary: pd.DataFrame,
    ratios: pd.DataFrame,
    compared: pd.DataFrame,
    ablated: dict | None,
) -> Measurements:
    """Collect the measurements that claims can be compared with.

    Times, sizes and memory are those at the study's smallest batch size.

    Args:
        summary: see ``summary.summary_table``.
        ratios: of all pairs; see ``comparison.ratio_table``.
        compared: see ``accuracy.paired_comparison``.
        ablated: the ablate record, if there is one.
    """
    ok = summary[summary.status == "ok"]
    if ok.empty:
        return {}
    size = ok.batch_size.min()
    ok = ok[ok.batch_size == size].drop_duplicates("variant").set_index("variant")
    pairs = ratios[(ratios.batch_size == size) & ratios.ratio.notna()]
    return (
        _measured_times(pairs, ok)
        | _measured_sizes(ok)
        | _measured_points(compared)
        | _measured_layers(ablated)
    )


def _measured_times(pairs: pd.DataFrame, ok: pd.DataFrame) -> Measurements:
    """Return times over the baseline's, and FlashAttention-2's over SDPA's."""
    times = {}
    ran = ok.attention_ran
    for row in pairs.itertuples():
        measured = Measured(row.ratio, row.low, row.high)
        if row.b == variants.BASELINE:
            times["time", row.a] = measured
        is_fa2 = (row.a, row.b) == ("nf4-fa2", "nf4-sdpa")
        if is_fa2 and ran.get(row.a) != ran.get(row.b):
            times["fa2 time", "fa2"] = measured
    return times


def _measured_sizes(ok: pd.DataFrame) -> Measurements:
    """Return sizes and memory over the baseline's, and its share of attention."""
    if variants.BASELINE not in ok.index:
        return {}
    sizes, baseline = {}, ok.loc[variants.BASELINE]
    for name, row in ok.iterrows():
        for quantity, column in (("size", "disk_mb"), ("memory", "peak_mb")):
            ratio = row[column] / baseline[column]
            sizes[quantity, name] = Measured(ratio, ratio, ratio)
    share = 100 * baseline.attention_time_ms / baseline.total_time_ms
    sizes[ATTENTION_SHARE, variants.BASELINE] = Measured(share, share, share)
    return sizes


def _measured_points(compared: pd.DataFrame) -> Measurements:
    """Return differences of top-1 and top-5 to the baseline's, in points."""
    points = {}
    for row in compared[compared.variant != variants.BASELINE].itertuples():
        points["top1", row.variant] = Measured(
            row.points, row.points_low, row.points_high
        )
        points["top5", row.variant] = Measured(
            row.top5_points, row.top5_points_low, row.top5_points_high
        )
    return points


def _measured_layers(ablated: dict | None) -> Measurements:
    """Return points of top-1 that keeping layers gains, on the same images."""
    rows = {(row["bits"], row["kept"]): row for row in (ablated or {}).get("rows", [])}
    points = {}
    for (bits, kept), row in rows.items():
        if bits < 32:
            with_kept = np.equal(row["predicted"], ablated["labels"])
            without = np.equal(rows[bits, "none"]["predicted"], ablated["labels"])
            name = f"{'nf4' if bits == 4 else 'int8'} keep {kept}"
            points["keep", name] = Measured(
                *statistics.paired_points(with_kept, without)
            )
    return points


# --- Their side: published numbers ---


class Incomparable(Exception):
    """A published number that cannot be compared; the message says why."""


def _claim(row, published: dict) -> tuple[str, str, float]:
    """Return (quantity, variant, ratio or points) of a published number.

    Args:
        row: of the ledger.
        published: values by (source, table, metric, unit, variant).

    Raises Incomparable.
    """
    metric = row.metric.split(" (")[0]
    if metric in WHY_NOT:
        raise Incomparable(WHY_NOT[metric])
    if row.source == "midpoint" and metric in POINTS:
        raise Incomparable(
            "the accuracy of a head that was never trained (defect 4 of 19)"
        )
    same_table = (row.source, row.table, metric, row.unit)
    if " keep " in row.variant:
        return "keep", row.variant, _kept_points(row, metric, same_table, published)
    variant = SINGLE.get(row.variant, row.variant)
    if metric == "attention_share":
        return ATTENTION_SHARE, variant, row.value
    if metric == "fa2_attention_gain":
        raise Incomparable(
            "a share of a kernel time that is a mean per call (defect 8 of 19)"
        )
    if variant == "all":
        raise Incomparable("it names no variant")
    baseline = published.get((*same_table, variants.BASELINE))
    if metric in POINTS:
        return POINTS[metric], variant, _claimed_points(row, metric, variant, baseline)
    return RATIOS[metric], variant, _claimed_ratio(row, metric, baseline)


def _kept_points(row, metric: str, same_table: tuple, published: dict) -> float:
    """Return the published points that keeping some layers gains."""
    if metric == "top1_change_by_keeping":
        return row.value
    if row.variant.endswith("keep none"):
        raise Incomparable("what the others of its table are compared with")
    none = published.get((*same_table, f"{row.variant.split(' ')[0]} keep none"))
    if none is None:
        raise Incomparable("keeping nothing does not stand beside it")
    return row.value - none


def _claimed_points(row, metric: str, variant: str, baseline: float | None) -> float:
    """Return the published difference to the baseline, in points."""
    if metric.endswith("_difference"):
        return row.value
    if variant == variants.BASELINE:
        raise Incomparable(
            "the baseline's accuracy, on other images: differences are compared"
        )
    if baseline is None:
        raise Incomparable(NO_BASELINE)
    scale = 100 if row.unit == "fraction" else 1
    return scale * (row.value - baseline)


def _claimed_ratio(row, metric: str, baseline: float | None) -> float:
    """Return the published value as a ratio to the baseline."""
    if metric in ("size_reduction", "throughput_gain"):
        return 1 / row.value
    if row.unit == "percent":
        return 1 - row.value / 100
    if row.variant == variants.BASELINE:
        raise Incomparable(
            "an absolute number of the baseline, on another device and model"
        )
    if baseline is None:
        raise Incomparable(NO_BASELINE)
    return baseline / row.value if metric == "throughput" else row.value / baseline


# --- Verdicts ---


def claim_verdicts(measurements: Measurements) -> pd.DataFrame:
    """Judge every claim of the ledger.

    Args:
        measurements: see ``measured_claims``.

    Returns:
        The ledger with columns claim and ours (a ratio to the baseline, or points),
        verdict and why.
    """
    table = load_claims()
    # Where a number is published twice in a table, the first counts.
    published = {
        (row.source, row.table, row.metric, row.unit, row.variant): row.value
        for row in table[::-1].itertuples()
    }
    lines = []
    for row in table.itertuples():
        try:
            lines.append(_judge(row, published, measurements))
        except Incomparable as reason:
            lines.append(
                {"claim": "", "ours": "", "verdict": CANNOT, "why": str(reason)}
            )
    return pd.concat([table, pd.DataFrame(lines)], axis=1)


def _judge(row, published: dict, measurements: Measurements) -> dict[str, str]:
    """Return claim, ours, verdict and why; raises Incomparable."""
    quantity, variant, claim = _claim(row, published)
    ours = measurements.get((quantity, variant))
    if ours is None:
        raise Incomparable(_why_not_measured(quantity, variant))
    text = _format(ours.value, quantity)
    if ours.low != ours.high:
        sign = "+" if quantity in IN_POINTS else ""
        text += f" ({ours.low:{sign}.2f} to {ours.high:{sign}.2f})"
    holds = _holds(row.metric, row.quote, quantity, claim, ours)
    return {
        "claim": _format(claim, quantity),
        "ours": text,
        "verdict": HOLDS if holds else FAILS,
        "why": "",
    }


def _format(value: float, quantity: str) -> str:
    if quantity in IN_POINTS:
        return f"{value:+.2f} points"
    return f"{value:.2f}%" if quantity == ATTENTION_SHARE else f"{value:.2f}x"


def _holds(
    metric: str, quote: str, quantity: str, claim: float, ours: Measured
) -> bool:
    """Return whether a claim agrees with our interval, within the tolerances.

    One end of a range, and a bound such as "up to", binds on its own side only.
    """
    larger_is_better = quantity in IN_POINTS or quantity == ATTENTION_SHARE
    if larger_is_better:
        low, high = ours.low - POINTS_TOLERANCE, ours.high + POINTS_TOLERANCE
    else:
        low, high = ours.low * (1 - RATIO_TOLERANCE), ours.high * (1 + RATIO_TOLERANCE)
    at_least, at_most = claim <= high, claim >= low  # our value against the claimed
    if metric.endswith(" (low)") or "<" in quote:
        return at_least if larger_is_better else at_most
    if metric.endswith(" (high)") or "up to" in quote:
        return at_most if larger_is_better else at_least
    return at_least and at_most


def _why_not_measured(quantity: str, variant: str) -> str:
    if quantity == "fa2 time":
        return "both attention names ran the same kernel here"
    if quantity == "keep":
        return "this model has no such layers, or was not ablated so"
    return f"{variant} was not measured in this study"


def claim_counts(table: pd.DataFrame) -> pd.DataFrame:
    """Count the claims of each document by verdict."""
    counts = pd.crosstab(table.source, table.verdict)
    counts = counts.reindex(columns=[HOLDS, FAILS, CANNOT], fill_value=0)
    documents = list(dict.fromkeys(table.source))
    counts = counts.reindex(documents)
    return counts.assign(all=counts.sum(axis=1)).reset_index()
