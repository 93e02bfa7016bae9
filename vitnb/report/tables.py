"""The report's tables as people read them: headings, rounded numbers with their intervals, blanks for what was not measured."""

import pandas as pd

from vitnb.analysis import comparison, plan_validation, waterfall


def format_trade_off(record: dict) -> pd.DataFrame:
    """A plan's trade-off as people read it: every choice measured on validation images, smallest first, the plan among them."""
    plan, rows = record["plan"], []
    table = plan_validation.trade_off(record["curve"], plan["uniform_bytes"])
    for row in table.sort_values("extra", kind="stable").itertuples():
        rows.append({
            "choice": f"{row.curve}, {row.name}" if row.curve else row.name, "Linears in 16": row.linears_kept - 1,
            "bytes over NF4": f"+{row.extra:.1%}", "KL, predicted": f"{row.predicted_kl:.2g}",
            "KL (95%)": f"{row.kl:.2g} ({row.low:.2g} to {row.high:.2g})", "cut": f"{row.cut:.0%}", "top-1": f"{row.top1:.4f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


# Columns of the report's main table -> their headings and formats.
MAIN = {
    "variant": ("variant", "{}"), "batch_size": ("batch", "{:.0f}"), "attention_ran": ("attention that ran", "{}"),
    "top1": ("top-1", "{:.4f}"), "top5": ("top-5", "{:.4f}"), "f1": ("F1", "{:.4f}"), "latency_mean_ms": ("mean ms", "{:.2f}"),
    "latency_p50_ms": ("p50 ms", "{:.2f}"), "latency_p95_ms": ("p95 ms", "{:.2f}"), "latency_p99_ms": ("p99 ms", "{:.2f}"),
    "host_p50_ms": ("host p50 ms", "{:.2f}"), "cold_p50_ms": ("cold p50 ms", "{:.2f}"), "first_ms": ("first ms", "{:.1f}"),
    "throughput_ips": ("images/s", "{:.1f}"), "tflops": ("TFLOP/s", "{:.3f}"), "matmul_share": ("of product peak", "{:.0%}"),
    "disk_mb": ("disk MB", "{:.2f}"), "resident_mb": ("resident MB", "{:.2f}"), "peak_mb": ("allocator peak MB", "{:.2f}"),
    "driver_peak_mb": ("driver peak MB", "{:.1f}"), "attention_time_ms": ("attention ms", "{:.2f}"),
    "total_time_ms": ("kernels ms", "{:.2f}"), "idle_time_ms": ("idle ms", "{:.2f}"), "launches": ("launches", "{:.0f}"),
    "linears_quantized": ("Linears quantized", "{:.0f}"), "linears_kept": ("kept", "{:.0f}"),
    "status": ("status", "{}"), "reason": ("reason", "{}"),
}  # fmt: skip


def _cell(template: str, value: object) -> str:
    return "" if value is None or value != value else template.format(value)


def format_summary(table: pd.DataFrame) -> pd.DataFrame:
    """The main table as people read it: headings, rounded numbers, blanks for what was not measured."""
    columns = {heading: [_cell(form, value) for value in table[name]] for name, (heading, form) in MAIN.items()}
    for name in ("p50", "p95", "p99"):  # each with its interval
        ends = zip(table[f"latency_{name}_low_ms"], table[f"latency_{name}_high_ms"], strict=True)
        columns[f"{name} ms"] = [
            f"{value} ({low:.2f} to {high:.2f})" if value else ""
            for value, (low, high) in zip(columns[f"{name} ms"], ends, strict=True)
        ]
    if table.device.nunique() > 1:
        columns = {"device": list(table.device)} | columns
    frame = pd.DataFrame(columns)
    return frame.drop(columns="reason") if (frame.reason == "").all() else frame


def format_accuracy(compared: pd.DataFrame) -> pd.DataFrame:
    """The comparison of answers as people read it."""
    lines = []
    for row in compared.itertuples():
        line = {"variant": row.variant, "top-1": f"{row.top1:.4f} ({row.low:.4f} to {row.high:.4f})"}
        blank = row.points != row.points
        line["points (95%)"] = "" if blank else f"{row.points:+.2f} ({row.points_low:+.2f} to {row.points_high:+.2f})"
        line["right here only"] = "" if blank else f"{row.only_variant_right:.0f}"
        line["right in fp32 only"] = "" if blank else f"{row.only_baseline_right:.0f}"
        line["McNemar p, corrected"] = _cell("{:.2g}", row.p_corrected)
        line["KL (95%)"] = "" if row.kl != row.kl else f"{row.kl:.2g} ({row.kl_low:.2g} to {row.kl_high:.2g})"
        line["farther than bf16: p, corrected"] = _cell("{:.2g}", row.kl_control_p_corrected)
        lines.append(line | {"in words": row.verdict})
    return pd.DataFrame(lines)


def format_engines(turns: dict | None) -> pd.DataFrame:
    """How far the engines of one variant agree (``accuracy.engines``), as people read it."""
    return pd.DataFrame(
        {
            "variant": row["a"], "other engine": row["b"], "images": row["images"], "largest difference": f"{row['largest']:.4f}",
            "spacing": f"{row['spacing']:.4f}", "another first class": row["changed"], "lead": f"{row['gap']:.4f}",
        }
        for row in (turns or {}).get("engines", [])
    )  # fmt: skip


def format_ratios(ratios: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    """Every variant's and peer's p50 and its time over the baseline's, taken in the same turns, as people read them."""
    taken = times.set_index(["variant", "batch_size"])
    rows = []
    for row in ratios[ratios.ratio.notna()].itertuples():
        own = taken.loc[row.variant, row.batch_size]
        rows.append({
            "variant": row.variant, "batch": row.batch_size, "p50 ms": f"{own.p50_ms:.3f} ({own.low:.3f} to {own.high:.3f})",
            "time over fp32-sdpa": f"{row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})", "in words": comparison.describe_speed(row),
        })  # fmt: skip
    return pd.DataFrame(rows)


def format_waterfall(table: pd.DataFrame) -> pd.DataFrame:
    """The waterfall's table as people read it; the rows that lose, or did not run, among the others."""
    rows = []
    for row in table.itertuples():
        first, blank = row.gain != row.gain, row.kl != row.kl
        rows.append({
            "ladder": row.ladder, "batch": row.batch_size, "technique": row.step, "variant": row.variant,
            "p50 ms": _cell("{:.3f}", row.p50_ms),
            "gain": "" if first else f"{row.gain:.3f}x ({row.gain_low:.3f} to {row.gain_high:.3f})",
            "in words": waterfall.gain_verdict(row), "over the first": _cell("{:.2f}x", row.total_gain),
            "KL (95%)": "" if blank else f"{row.kl:.2g} ({row.kl_low:.2g} to {row.kl_high:.2g})", "changed": _cell("{:.1%}", row.changed),
            "resident MB": _cell("{:.2f}", row.resident_mb), "scratch MB": _cell("{:.2f}", row.scratch_mb),
            "engine that ran": _cell("{}", row.engine_ran), "reason": _cell("{}", row.reason),
        })  # fmt: skip
    return pd.DataFrame(rows)
