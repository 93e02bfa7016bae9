"""Format the report's tables for people.

Headings in words, rounded numbers with their intervals, and blanks for what was not
measured.
"""

import pandas as pd

from vitnb.analysis import comparison, plan_validation, waterfall

# Columns of the summary: heading and format.
SUMMARY = {
    "variant": ("variant", "{}"),
    "batch_size": ("batch", "{:.0f}"),
    "attention_ran": ("attention that ran", "{}"),
    "engine_ran": ("engine that ran", "{}"),
    "top1": ("top-1", "{:.4f}"),
    "top5": ("top-5", "{:.4f}"),
    "f1": ("F1", "{:.4f}"),
    "latency_mean_ms": ("mean ms", "{:.2f}"),
    "latency_p50_ms": ("p50 ms", "{:.2f}"),
    "latency_p95_ms": ("p95 ms", "{:.2f}"),
    "latency_p99_ms": ("p99 ms", "{:.2f}"),
    "host_p50_ms": ("host p50 ms", "{:.2f}"),
    "cold_p50_ms": ("cold p50 ms", "{:.2f}"),
    "first_ms": ("first ms", "{:.1f}"),
    "throughput_ips": ("images/s", "{:.1f}"),
    "tflops": ("TFLOP/s", "{:.3f}"),
    "matmul_share": ("of product peak", "{:.0%}"),
    "roofline_share": ("of roofline", "{:.0%}"),
    "share_reason": ("no share because", "{}"),
    "disk_mb": ("disk MB", "{:.2f}"),
    "resident_mb": ("resident MB", "{:.2f}"),
    "peak_mb": ("allocator peak MB", "{:.2f}"),
    "driver_peak_mb": ("driver peak MB", "{:.1f}"),
    "attention_time_ms": ("attention ms", "{:.2f}"),
    "total_time_ms": ("kernels ms", "{:.2f}"),
    "idle_time_ms": ("idle ms", "{:.2f}"),
    "launches": ("launches", "{:.0f}"),
    "linears_quantized": ("Linears quantized", "{:.0f}"),
    "linears_kept": ("kept", "{:.0f}"),
    "status": ("status", "{}"),
    "reason": ("reason", "{}"),
}
# Headings that name a row of the summary, and headings of the main table beside them.
ROW_NAMES = ["device", "variant", "batch"]
MAIN = ["top-1", "p50 ms", "images/s", "disk MB", "allocator peak MB"]
MAIN += ["status", "reason"]


def format_value(value: object, template: str) -> str:
    """Return a value as text; nothing for what was not measured."""
    return "" if pd.isna(value) else template.format(value)


def format_interval(value: float, low: float, high: float, form: str) -> str:
    """Return ``value (low to high)``; nothing for what was not measured."""
    if pd.isna(value):
        return ""
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def format_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Format ``analysis.summary.summary_table``."""
    columns = {
        heading: [format_value(value, template) for value in table[name]]
        for name, (heading, template) in SUMMARY.items()
    }
    for name in ("p50", "p95", "p99"):
        column = f"latency_{name}"
        ends = zip(
            table[f"{column}_ms"],
            table[f"{column}_low_ms"],
            table[f"{column}_high_ms"],
            strict=True,
        )
        columns[f"{name} ms"] = [format_interval(*interval, ".2f") for interval in ends]
    if table.device.nunique() > 1:
        columns = {"device": list(table.device)} | columns
    frame = pd.DataFrame(columns)
    reasons = [SUMMARY[name][0] for name in ("share_reason", "reason")]
    return frame.drop(columns=[name for name in reasons if (frame[name] == "").all()])


def main_columns(formatted: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a formatted summary that most readers want."""
    return formatted[[name for name in formatted if name in ROW_NAMES + MAIN]]


def other_columns(formatted: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that ``main_columns`` leaves out, and the rows' names."""
    return formatted[[name for name in formatted if name not in MAIN]]


def format_accuracy(compared: pd.DataFrame) -> pd.DataFrame:
    """Format ``analysis.accuracy.compare_devices``."""
    several = compared.device.nunique() > 1
    lines = []
    for row in compared.itertuples():
        points = format_interval(row.points, row.points_low, row.points_high, "+.2f")
        lines.append(
            ({"device": row.device} if several else {})
            | {
                "variant": row.variant,
                "top-1": format_interval(row.top1, row.low, row.high, ".4f"),
                "points (95%)": points,
                "right here only": format_value(row.only_variant_right, "{:.0f}"),
                "right in fp32 only": format_value(row.only_baseline_right, "{:.0f}"),
                "McNemar p, corrected": format_value(row.p_corrected, "{:.2g}"),
                "KL (95%)": format_interval(row.kl, row.kl_low, row.kl_high, ".2g"),
                "farther than bf16: p, corrected": format_value(
                    row.kl_control_p_corrected, "{:.2g}"
                ),
                "in words": row.verdict,
            }
        )
    return pd.DataFrame(lines)


def format_classes(classes: pd.DataFrame) -> pd.DataFrame:
    """Format ``analysis.accuracy.worst_classes``."""
    return pd.DataFrame(
        {
            "class": row["class"],
            "correct": f"{row['correct']} of {row['images']}",
            "top-1": f"{row['top1']:.2f}",
            "taken for (images)": row["taken_for"],
        }
        for row in classes.to_dict("records")
    )


def format_engines(compared: dict | None) -> pd.DataFrame:
    """Format how far the engines of one variant agree.

    Args:
        compared: the compare record; its ``engines`` hold the agreement.
    """
    return pd.DataFrame(
        {
            "variant": row["a"],
            "other engine": row["b"],
            "images": row["images"],
            "largest difference": f"{row['largest']:.4f}",
            "spacing": f"{row['spacing']:.4f}",
            "another first class": row["changed"],
            "lead": f"{row['gap']:.4f}",
        }
        for row in (compared or {}).get("engines", [])
    )


def format_ratios(ratios: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    """Format the p50 of every variant and peer, and its time over the baseline's.

    Args:
        ratios: see ``analysis.comparison.ratios_to_baseline``.
        times: of the same rounds; see ``analysis.comparison.time_table``.
    """
    by_name = times.set_index(["variant", "batch_size"])
    rows = []
    for row in ratios[ratios.ratio.notna()].itertuples():
        own = by_name.loc[row.variant, row.batch_size]
        rows.append(
            {
                "variant": row.variant,
                "batch": row.batch_size,
                "engine that ran": format_value(own.engine_ran, "{}"),
                "p50 ms": format_interval(own.p50_ms, own.low, own.high, ".3f"),
                "time over fp32-sdpa": format_interval(
                    row.ratio, row.low, row.high, ".3f"
                ),
                "in words": comparison.describe_speed(row),
            }
        )
    return pd.DataFrame(rows)


def format_trade_off(record: dict) -> pd.DataFrame:
    """Format the choices of a plan record, measured on validation images.

    The smallest comes first; the plan is among them.
    """
    table = plan_validation.trade_off(record["curve"], record["plan"]["uniform_bytes"])
    rows = [
        {
            "choice": f"{row.curve}, {row.name}" if row.curve else row.name,
            "Linears in 16": row.linears_kept - 1,
            "bytes over NF4": f"+{row.extra:.1%}",
            "KL, predicted": f"{row.predicted_kl:.2g}",
            "KL (95%)": format_interval(row.kl, row.low, row.high, ".2g"),
            "cut": f"{row.cut:.0%}",
            "top-1": f"{row.top1:.4f}",
        }
        for row in table.sort_values("extra", kind="stable").itertuples()
    ]
    return pd.DataFrame(rows)


def format_waterfall(table: pd.DataFrame) -> pd.DataFrame:
    """Format ``analysis.waterfall.waterfall_table``, with rows that lose or failed."""
    rows = []
    for row in table.itertuples():
        gain = ""
        if pd.notna(row.gain):
            gain = f"{row.gain:.3f}x ({row.gain_low:.3f} to {row.gain_high:.3f})"
        rows.append(
            {
                "ladder": row.ladder,
                "batch": row.batch_size,
                "technique": row.step,
                "variant": row.variant,
                "p50 ms": format_value(row.p50_ms, "{:.3f}"),
                "gain": gain,
                "in words": waterfall.describe_gain(row),
                "over the first": format_value(row.total_gain, "{:.2f}x"),
                "KL (95%)": format_interval(row.kl, row.kl_low, row.kl_high, ".2g"),
                "changed": format_value(row.changed, "{:.1%}"),
                "resident MB": format_value(row.resident_mb, "{:.2f}"),
                "scratch MB": format_value(row.scratch_mb, "{:.2f}"),
                "engine that ran": format_value(row.engine_ran, "{}"),
                "reason": format_value(row.reason, "{}"),
            }
        )
    return pd.DataFrame(rows)
