"""Summarize evaluate records in one table, and judge results against expectations."""

import numpy as np
import pandas as pd

from vitnb import variants
from vitnb.analysis import (
    accuracy,
    ceilings,
    latency,
    learning,
    plan_validation,
    provenance,
)
from vitnb.records.files import MB
from vitnb.records.reader import load_records
from vitnb.study import Study

COLUMNS = [
    *("variant", "weights", "attention", "attention_ran", "engine", "engine_ran"),
    *("device", "status", "reason", "batch_size"),
    *("images", "top1", "top1_low", "top1_high", "top5", "f1"),
    *("parameters", "linears_quantized", "linears_kept", "latency_mean_ms"),
    *(
        f"latency_{name}{end}_ms"
        for name in latency.SHARES
        for end in ("", "_low", "_high")
    ),
    *("latency_samples", "host_p50_ms", "cold_p50_ms", "first_ms", "warm_up_stable"),
    *("throughput_ips", "tflops", "matmul_share", "roofline_share"),
    "share_reason",
    *("disk_mb", "resident_mb", "scratch_mb", "peak_mb", "driver_peak_mb"),
    *("attention_time_ms", "total_time_ms", "idle_time_ms", "launches"),
    "commit",
    "record",
]

# --- The summary table ---


def summary_table(study: Study) -> pd.DataFrame:
    """Return the summary of a study's records; see ``summarize_records``."""
    return summarize_records(load_records(study))


def summarize_records(records: list[dict]) -> pd.DataFrame:
    """Return one row for each variant, batch size and device, in the variants' order.

    Args:
        records: of a study, oldest first; of several for one row, the newest counts.
    """
    outdated = provenance.outdated_reasons(records)
    limits = ceilings.study_ceilings(records)
    rows = {}
    for record in records:
        if record["notebook"] == "evaluate":
            for row in record_rows(record, outdated.get(record["name"], ""), limits):
                rows[row["variant"], row["batch_size"], row["device"]] = row
    ordered = sorted(rows.values(), key=_order)
    return pd.DataFrame(ordered, columns=COLUMNS)


def _order(row: dict) -> tuple:
    variant = variants.parse(row["variant"])
    return variants.sort_key(variant), row["batch_size"], row["device"]


def record_rows(
    record: dict,
    outdated: str = "",
    limits: dict[ceilings.Machine, dict[str, ceilings.Ceiling]] | None = None,
) -> list[dict]:
    """Return the rows of one evaluate record, one for each batch size.

    Rows of a failed or outdated record hold a reason and no numbers.

    Args:
        outdated: why the record does not belong to the study's others; see
            ``provenance.outdated_reasons``.
        limits: see ``ceilings.study_ceilings``; shares are blank without.
    """
    variant = variants.parse(record["asked"]["variant"])
    row = {
        "variant": variant.name,
        "weights": variant.weights,
        "attention": variant.attention,
        "engine": variant.engine,
        "device": provenance.device_name(record),
        "status": "outdated" if outdated else record["status"],
        "reason": outdated or record["reason"],
        "commit": record["machine"]["commit"],
        "record": record["name"],
    }
    if row["status"] != "ok":
        return [row | {"batch_size": size} for size in record["asked"]["batch_sizes"]]
    row |= _model_columns(record)
    own_limits = (limits or {}).get(ceilings.machine_of(record), {})
    traces, memory = by_batch_size(record["traces"]), by_batch_size(record["memory"])
    return [
        row
        | _engine_columns(record, timing["batch_size"])
        | _timing_columns(timing)
        | _trace_columns(traces[timing["batch_size"]])
        | _memory_columns(memory[timing["batch_size"]])
        | _roofline_columns(record, timing, own_limits)
        for timing in record["timings"]
    ]


def by_batch_size(parts: list[dict]) -> dict[int, dict]:
    """Return parts of a record by their batch size, in whichever order they stand."""
    return {part["batch_size"]: part for part in parts}


def _model_columns(record: dict) -> dict:
    """Return the columns that do not depend on the batch size."""
    low, high = accuracy.top1_interval(record["predictions"])
    return accuracy.scores(record["predictions"]) | {
        "top1_low": low,
        "top1_high": high,
        "parameters": record["parameters"],
        "linears_quantized": record["linears_quantized"],
        "linears_kept": record["linears_kept"],
        "disk_mb": record["disk_bytes"] / MB,
        "resident_mb": record["resident_bytes"] / MB,
        "scratch_mb": record["scratch_bytes"] / MB,
    }


def _engine_columns(record: dict, batch_size: int) -> dict:
    """Return the engine that ran a batch size, and why if it was not asked for."""
    size = str(batch_size)
    return {
        "engine_ran": record["engine_ran"][size],
        "reason": record["engine_reason"].get(size, ""),
    }


def _timing_columns(timing: dict) -> dict:
    samples = latency.device_samples(timing)
    row = {
        "batch_size": timing["batch_size"],
        "latency_mean_ms": float(np.mean(samples)),
        "latency_samples": len(samples),
        "host_p50_ms": float(np.median(timing["host_ms"])),
        "cold_p50_ms": float(np.median(timing["cold_ms"])),
        "first_ms": timing["first_ms"],
        "warm_up_stable": timing["warm_up"]["stable"],
        "throughput_ips": timing["images_per_second"],
    }
    for name, interval in latency.percentiles(samples).items():
        names = [f"latency_{name}{end}_ms" for end in ("", "_low", "_high")]
        row |= dict(zip(names, interval or (None, None, None), strict=True))
    return row


def _trace_columns(trace: dict) -> dict:
    return {
        "attention_ran": trace["attention_ran"],
        "attention_time_ms": trace["attention_ms"],
        "total_time_ms": trace["total_ms"],
        "idle_time_ms": trace["idle_ms"],
        "launches": trace["launches"],
    }


def _memory_columns(peaks: dict) -> dict:
    return {
        "peak_mb": peaks["allocator_peak_bytes"] / MB,
        "driver_peak_mb": peaks["driver_peak_bytes"] / MB,
    }


def _roofline_columns(
    record: dict, timing: dict, limits: dict[str, ceilings.Ceiling]
) -> dict:
    return ceilings.roofline_shares(ceilings.forward_of(record, timing), limits)


# --- Named results and what a study expects of them ---


def expectation_verdicts(study: Study, results: dict[str, float]) -> pd.DataFrame:
    """Judge results against the ranges that the study expects.

    Inside its range, a result's own value is not shown. The table is then equal for
    every run that comes out as expected, so a test can compare the table to the letter.
    """
    lines = []
    for name, value in results.items():
        if name in study.expected:
            low, high = study.expected[name]
            inside = low <= value <= high
            verdict = "as expected" if inside else f"NOT as expected: {value:.4f}"
            lines.append(
                {"result": name, "expected": f"{low} to {high}", "verdict": verdict}
            )
    return pd.DataFrame(lines, columns=["result", "expected", "verdict"])


def format_verdicts(table: pd.DataFrame) -> str:
    """Return verdicts as text."""
    if table.empty:
        return "the study expects nothing in particular of this"
    return table.to_string(index=False)


def judge(study: Study, record: dict) -> str:
    """Return the verdicts on one record's results as text."""
    return format_verdicts(expectation_verdicts(study, named_results([record])))


def named_results(records: list[dict]) -> dict[str, float]:
    """Return every result that a study's YAML may expect, by name.

    Names are, for instance, ``fp32-sdpa top1`` and ``nf4 disk ratio``.
    """
    by_notebook = {
        "finetune": finetune_results,
        "evaluate": evaluate_results,
        "ablate": ablate_results,
        "plan": plan_results,
    }
    results, evaluated = {}, set()
    for record in records:
        if record["status"] == "ok" and record["notebook"] in by_notebook:
            results |= by_notebook[record["notebook"]](record)
            if record["notebook"] == "evaluate":
                evaluated.add(record["asked"]["variant"])
    baseline = results.get(f"{variants.BASELINE} top1")
    if baseline is not None:
        for name in variants.sort_names(evaluated - {variants.BASELINE}):
            lost = 100 * (baseline - results[f"{name} top1"])
            results[f"{name} points lost"] = lost
    return results


def finetune_results(record: dict) -> dict[str, float]:
    """Return named results of a finetune record.

    Several seeds add theirs: see ``learning.seed_results``.
    """
    sizes, baselines = record["disk_bytes"], record["floors"]
    return {
        "valid top1": max(row["valid_top1"] for row in record["history"]),
        "linear classifier on pixels top1": baselines["pixels"],
        "head on untrained base top1": baselines["untrained"],
        "linear probe top1": baselines["probe"],
        "nf4 disk ratio": sizes["nf4"] / sizes["merged"],
        "int8 disk ratio": sizes["int8"] / sizes["merged"],
        # Records made before there were several seeds have none.
    } | learning.seed_results(record.get("seeds", []))


def evaluate_results(record: dict) -> dict[str, float]:
    """Return named results of an evaluate record."""
    scores = accuracy.scores(record["predictions"])
    return {f"{record['asked']['variant']} {key}": scores[key] for key in scores}


def ablate_results(record: dict) -> dict[str, float]:
    """Return named results of an ablate record.

    They are the KL with no layer kept, and with all kept (the 16-bit control).
    """
    return {
        f"{row['bits']}-bit {row['kept']} kept KL": row["kl"]
        for row in record["rows"]
        if row["kept"] in ("none", "all")
    }


def plan_results(record: dict) -> dict[str, float]:
    """Return named results of a plan record; see ``plan_validation.validate``."""
    result, name = plan_validation.validate(record), record["plan"]["name"]
    return {
        f"plan {name} KL cut": result["cut"],
        f"plan {name} random plans beaten": result["beaten"] / result["random"],
    }
