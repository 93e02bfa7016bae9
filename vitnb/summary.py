"""Summary: from records to one table, to verdicts against what was expected, and to a recommendation."""

import math

import pandas as pd

from vitnb import accuracy, latency, records, studies, variants

MB = 2**20  # megabytes are 2^20 bytes everywhere, as in the source study
COLUMNS = [
    "variant", "weights", "attention", "attention_ran", "status", "reason", "batch_size", "images", "top1", "top5", "f1",
    "parameters", "linears_quantized", "linears_kept", "latency_mean_ms", "latency_p50_ms", "latency_p95_ms",
    "latency_p99_ms", "latency_samples", "throughput_ips", "disk_mb", "resident_mb", "peak_mb", "attention_time_ms",
    "total_time_ms", "device", "record",
]  # fmt: skip
# The source study's targets against its fp32 baseline: at least this much smaller and faster, at most this many
# points of top-1 lost.
TARGET_SMALLER, TARGET_FASTER, TARGET_POINTS = 4.0, 2.0, 3.0


def rows(record: dict) -> list[dict]:
    """The rows of one evaluate record: one for each batch size, or as many empty ones, with a reason, if it failed."""
    variant = variants.get(record["asked"]["variant"])
    same = {
        "variant": variant.name, "weights": variant.weights, "attention": variant.attention, "status": record["status"],
        "reason": record["reason"], "record": record["name"],
        "device": record["machine"]["gpu"] or record["machine"]["cpu"],
    }  # fmt: skip
    if record["status"] != "ok":
        return [same | {"batch_size": size} for size in record["asked"]["batch_sizes"]]
    same |= accuracy.scores(record["predictions"]) | {
        "parameters": record["parameters"], "linears_quantized": record["linears_quantized"],
        "linears_kept": record["linears_kept"], "disk_mb": record["disk_bytes"] / MB,
        "resident_mb": record["resident_bytes"] / MB,
    }  # fmt: skip
    found = []
    for timing, trace in zip(record["timings"], record["traces"], strict=True):
        found.append(same | latency.statistics(timing["samples_ms"]) | {
            "batch_size": timing["batch_size"], "throughput_ips": timing["images_per_second"],
            "latency_samples": len(timing["samples_ms"]), "attention_ran": trace["attention_ran"],
            "attention_time_ms": trace["attention_ms"], "total_time_ms": trace["total_ms"],
            "peak_mb": (record["resident_bytes"] + trace["activations_bytes"]) / MB,
        })  # fmt: skip
    return found


def table(study: studies.Study) -> pd.DataFrame:
    """One row for each variant and batch size measured so far, in the registry's order; the newest record counts."""
    found = {}
    for record in records.load(study):
        if record["notebook"] == "evaluate":
            found |= {(row["variant"], row["batch_size"]): row for row in rows(record)}
    order = list(variants.REGISTRY)
    ordered = sorted(found.values(), key=lambda row: (order.index(row["variant"]), row["batch_size"]))
    return pd.DataFrame(ordered, columns=COLUMNS)


def pareto(points: pd.DataFrame, cost: str, value: str) -> pd.DataFrame:
    """The rows that no other row beats: none costs no more and is worth more, or costs less and is worth no less."""
    kept = []
    for _, row in points.iterrows():
        beaten = ((points[cost] <= row[cost]) & (points[value] > row[value])) | (
            (points[cost] < row[cost]) & (points[value] >= row[value])
        )
        if not beaten.any():
            kept.append(row)
    return pd.DataFrame(kept, columns=points.columns).sort_values(cost)


def verdicts(study: studies.Study, found: dict[str, float]) -> pd.DataFrame:
    """Results against the range that the study expects: inside, the range is shown; outside, the number as well.

    The table is the same for every run that comes out as expected, which lets a test compare it to the letter.
    """
    lines = []
    for name, value in found.items():
        if name in study.expected:
            low, high = study.expected[name]
            inside = low <= value <= high
            verdict = "as expected" if inside else f"NOT as expected: {value:.4f}"
            lines.append({"result": name, "expected": f"{low} to {high}", "verdict": verdict})
    return pd.DataFrame(lines, columns=["result", "expected", "verdict"])


def told(table: pd.DataFrame) -> str:
    """Verdicts as text."""
    return "the study expects nothing in particular of this" if table.empty else table.to_string(index=False)


def results(study: studies.Study) -> dict[str, float]:
    """Every result of a study that its YAML may expect, by name: ``fp32-sdpa top1``, ``nf4 disk ratio`` and so on."""
    found = {}
    for record in records.load(study):
        if record["status"] != "ok":
            continue
        if record["notebook"] == "finetune":
            found |= finetuned(record)
        elif record["notebook"] == "evaluate":
            found |= evaluated(record)
        elif record["notebook"] == "ablate":
            found |= ablated(record)
    baseline = found.get(f"{variants.BASELINE} top1")
    for name in variants.REGISTRY:
        if baseline is not None and f"{name} top1" in found and name != variants.BASELINE:
            found[f"{name} points lost"] = 100 * (baseline - found[f"{name} top1"])
    return found


def finetuned(record: dict) -> dict[str, float]:
    """Named results of a finetune record."""
    sizes = record["disk_bytes"]
    return {
        "valid top1": max(row["valid_top1"] for row in record["history"]),
        "linear classifier on pixels top1": record["floors"]["pixels"],
        "head on untrained base top1": record["floors"]["untrained"],
        "nf4 disk ratio": sizes["nf4"] / sizes["merged"],
        "int8 disk ratio": sizes["int8"] / sizes["merged"],
    }


def evaluated(record: dict) -> dict[str, float]:
    """Named results of an evaluate record."""
    return {
        f"{record['asked']['variant']} {key}": value for key, value in accuracy.scores(record["predictions"]).items()
    }


def ablated(record: dict) -> dict[str, float]:
    """Named results of an ablate record: KL of full quantization, and that of none (the 16-bit control)."""
    rows = {(row["bits"], row["kept"]): row["kl"] for row in record["rows"]}
    return {f"{bits}-bit {kept} kept KL": value for (bits, kept), value in rows.items() if kept in ("none", "all")}


def noise_points(top1: float, images: int) -> float:
    """Half-width, in points, of the 95% interval of a difference of two top-1 on ``images`` images each (binomial)."""
    return 100 * 1.96 * math.sqrt(2 * top1 * (1 - top1) / images)


def recommendation(summary: pd.DataFrame) -> list[dict]:
    """Which variant for which need, against the baseline at the same batch size; empty without a baseline.

    A difference in top-1 inside the noise of the test split is not called a loss or a gain.
    """
    ok = summary[summary.status == "ok"]
    advice = []
    for batch, group in ok.groupby("batch_size"):
        base = group[group.variant == variants.BASELINE]
        if base.empty:
            continue
        base = base.iloc[0]
        group = group.assign(
            smaller=base.disk_mb / group.disk_mb,
            faster=base.latency_p50_ms / group.latency_p50_ms,
            points=100 * (base.top1 - group.top1),
        )
        near = group[group.points <= TARGET_POINTS]
        needs = {
            "the fastest within 3 points": near.sort_values("faster").iloc[-1],
            "the smallest within 3 points": near.sort_values(["smaller", "faster"]).iloc[-1],
            "the least memory while running": near.sort_values("peak_mb").iloc[0],
            "the most accurate": group.sort_values(["top1", "faster"]).iloc[-1],
        }
        noise = noise_points(base.top1, base.images)
        for need, row in needs.items():
            met = {
                f"{TARGET_SMALLER:g}x smaller": row.smaller >= TARGET_SMALLER,
                f"{TARGET_FASTER:g}x faster": row.faster >= TARGET_FASTER,
                f"within {TARGET_POINTS:g} points": row.points <= TARGET_POINTS,
            }
            change = "no change beyond noise" if abs(row.points) <= noise else f"{-row.points:+.1f} points"
            advice.append({
                "batch size": int(batch), "need": need, "variant": row.variant, "smaller": f"{row.smaller:.1f}x",
                "faster (p50)": f"{row.faster:.2f}x", "top-1 against fp32": f"{change} (noise ±{noise:.1f})",
                "targets met": ", ".join(name for name, hit in met.items() if hit) or "none",
                "targets missed": ", ".join(name for name, hit in met.items() if not hit) or "none",
            })  # fmt: skip
    return advice


def not_comparable(summary: pd.DataFrame) -> list[str]:
    """Sentences for pairs of variants that differ in the attention's name alone and ran the same kernel."""
    notes = []
    for (weights, kernel), group in summary[summary.status == "ok"].groupby(["weights", "attention_ran"]):
        names = sorted(group.variant.unique())
        if len(names) > 1:
            notes.append(
                f"{' and '.join(names)} ran the same attention kernel ({kernel}, {weights} weights): "
                "they cannot be compared, a difference between them is noise, not attention."
            )
    return notes
