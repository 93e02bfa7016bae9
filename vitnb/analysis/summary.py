"""Summary: from records to one table, and to verdicts against what was expected."""

import numpy as np
import pandas as pd

from vitnb import variants
from vitnb.analysis import accuracy, latency, learning, performance, plan_validation
from vitnb.records.files import MB
from vitnb.records.reader import load_records
from vitnb.study import Study

COLUMNS = [
    "variant", "weights", "attention", "attention_ran", "engine", "engine_ran", "device", "status", "reason", "batch_size",
    "images", "top1", "top1_low", "top1_high", "top5", "f1", "parameters", "linears_quantized", "linears_kept", "latency_mean_ms",
    *(f"latency_{name}{part}_ms" for name in latency.SHARES for part in ("", "_low", "_high")), "latency_samples",
    "host_p50_ms", "cold_p50_ms", "first_ms", "warm_up_stable", "throughput_ips", "tflops", "matmul_share", "roofline_share",
    "disk_mb", "resident_mb", "scratch_mb", "peak_mb", "driver_peak_mb", "attention_time_ms", "total_time_ms", "idle_time_ms", "launches",
    "record",
]  # fmt: skip


def device_name(record: dict) -> str:
    """The name of the device that a record was measured on."""
    on = record.get("device") or record["asked"].get("device") or ("cuda" if record["machine"]["gpu"] else "cpu")
    return record["machine"]["gpu"] if on == "cuda" else record["machine"]["cpu"]


def with_plans(training: dict | None, found: list[dict]) -> dict | None:
    """A study's finetune record, with the exports of the plans that were made for its model beside its own."""
    if not training or training["status"] != "ok":
        return training
    sums = dict(training["checkpoint_sha256"])
    for record in found:
        if (
            record["notebook"] == "plan"
            and record["status"] == "ok"
            and record["plan"]["merged_sha256"] == sums["merged"]
        ):
            sums[f"plan-{record['plan']['name']}"] = record["checkpoint_sha256"]
    return training | {"checkpoint_sha256": sums}


def stale_reason(record: dict, training: dict | None) -> str:
    """Why a record does not belong to the newest fine-tuning, or plan, or nothing if it does; see ``with_plans``."""
    if record["status"] != "ok" or not training or training["status"] != "ok":
        return ""
    name = variants.parse(record["asked"]["variant"]).checkpoint
    if record["checkpoint_sha256"] == training["checkpoint_sha256"].get(name):
        return ""
    made = "plan" if name.startswith("plan-") else "finetune"
    return f"measured on another checkpoint than the newest {made} record made: measure it again"


def record_rows(record: dict, training: dict | None = None) -> list[dict]:
    """The rows of one evaluate record: one for each batch size, or as many empty ones, with a reason, if it failed.

    ``training``: the study's finetune record; a record that was measured on another checkpoint is stale.
    """
    variant, reason = variants.parse(record["asked"]["variant"]), stale_reason(record, training)
    same = {
        "variant": variant.name, "weights": variant.weights, "attention": variant.attention, "engine": variant.engine,
        "device": device_name(record), "status": "stale" if reason else record["status"], "reason": reason or record["reason"],
        "record": record["name"],
    }  # fmt: skip
    if same["status"] != "ok":
        return [same | {"batch_size": size} for size in record["asked"]["batch_sizes"]]
    low, high = accuracy.top1_interval(record["predictions"])
    same |= accuracy.scores(record["predictions"]) | {
        "top1_low": low, "top1_high": high, "parameters": record["parameters"],
        "linears_quantized": record["linears_quantized"], "linears_kept": record["linears_kept"],
        "disk_mb": record["disk_bytes"] / MB, "resident_mb": record["resident_bytes"] / MB,
        # A record from before there were engines has none.
        "scratch_mb": record.get("scratch_bytes", 0) / MB, "engine_ran": record.get("engine_ran", "eager"),
        "reason": record.get("engine_reason", ""),
    }  # fmt: skip
    parts = zip(record["timings"], record["traces"], record["memory"], strict=True)
    return [same | _timed(timing) | _traced(trace) | {
        "peak_mb": peaks["allocator_peak_bytes"] / MB, "driver_peak_mb": peaks["driver_peak_bytes"] / MB,
    } | performance.roofline_shares(
        record["roofline"], record["resident_bytes"], timing["batch_size"], float(np.median(latency.device_samples(timing)))
    )
        for timing, trace, peaks in parts]  # fmt: skip


def _timed(timing: dict) -> dict:
    """The columns of one timing."""
    samples = latency.device_samples(timing)
    found = {
        "batch_size": timing["batch_size"], "latency_mean_ms": float(np.mean(samples)), "latency_samples": len(samples),
        "host_p50_ms": float(np.median(timing["host_ms"])), "cold_p50_ms": float(np.median(timing["cold_ms"])),
        "first_ms": timing["first_ms"], "warm_up_stable": timing["warm_up"]["stable"],
        "throughput_ips": timing["images_per_second"],
    }  # fmt: skip
    for name, carried in latency.percentiles(samples).items():
        names = [f"latency_{name}{part}_ms" for part in ("", "_low", "_high")]
        found |= dict(zip(names, carried or (None, None, None), strict=True))
    return found


def _traced(trace: dict) -> dict:
    """The columns of one profiler trace."""
    return {
        "attention_ran": trace["attention_ran"], "attention_time_ms": trace["attention_ms"],
        "total_time_ms": trace["total_ms"], "idle_time_ms": trace["idle_ms"], "launches": trace["launches"],
    }  # fmt: skip


def summary_table(study: Study) -> pd.DataFrame:
    """One row for each variant, batch size and device measured so far, in the registry's order; the newest record counts."""
    found, everything = {}, load_records(study)
    training = with_plans(next((r for r in everything if r["name"] == "finetune"), None), everything)
    for record in everything:
        if record["notebook"] == "evaluate":
            found |= {(row["variant"], row["batch_size"], row["device"]): row for row in record_rows(record, training)}
    ordered = sorted(found.values(), key=lambda row: (variants.sort_key(variants.parse(row["variant"])), row["batch_size"], row["device"]))
    return pd.DataFrame(ordered, columns=COLUMNS)


def expectation_verdicts(study: Study, found: dict[str, float]) -> pd.DataFrame:
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


def format_verdicts(table: pd.DataFrame) -> str:
    """Verdicts as text."""
    return "the study expects nothing in particular of this" if table.empty else table.to_string(index=False)


def named_results(study: Study) -> dict[str, float]:
    """Every result of a study that its YAML may expect, by name: ``fp32-sdpa top1``, ``nf4 disk ratio`` and so on."""
    found, records = {}, load_records(study)
    for record in records:
        if record["status"] != "ok":
            continue
        if record["notebook"] == "finetune":
            found |= finetune_results(record)
        elif record["notebook"] == "evaluate":
            found |= evaluate_results(record)
        elif record["notebook"] == "ablate":
            found |= ablate_results(record)
        elif record["notebook"] == "plan":
            found |= plan_results(record)
    baseline = found.get(f"{variants.BASELINE} top1")
    measured = {r["asked"]["variant"] for r in records if r["notebook"] == "evaluate" and r["status"] == "ok"}
    for name in variants.sort_names(measured - {variants.BASELINE}):
        if baseline is not None:
            found[f"{name} points lost"] = 100 * (baseline - found[f"{name} top1"])
    return found


def finetune_results(record: dict) -> dict[str, float]:
    """Named results of a finetune record; of several seeds, see ``repeats.results``."""
    sizes = record["disk_bytes"]
    return {
        "valid top1": max(row["valid_top1"] for row in record["history"]),
        "linear classifier on pixels top1": record["floors"]["pixels"],
        "head on untrained base top1": record["floors"]["untrained"],
        "linear probe top1": record["floors"]["probe"],
        "nf4 disk ratio": sizes["nf4"] / sizes["merged"],
        "int8 disk ratio": sizes["int8"] / sizes["merged"],
    } | learning.seed_results(record.get("seeds", []))  # a record from before there were several has none


def evaluate_results(record: dict) -> dict[str, float]:
    """Named results of an evaluate record."""
    return {
        f"{record['asked']['variant']} {key}": value for key, value in accuracy.scores(record["predictions"]).items()
    }


def ablate_results(record: dict) -> dict[str, float]:
    """Named results of an ablate record: KL of full quantization, and that of none (the 16-bit control)."""
    rows = {(row["bits"], row["kept"]): row["kl"] for row in record["rows"]}
    return {f"{bits}-bit {kept} kept KL": value for (bits, kept), value in rows.items() if kept in ("none", "all")}


def plan_results(record: dict) -> dict[str, float]:
    """Named results of a plan record, on the images that did not choose it; see ``proof.proven``."""
    found, name = plan_validation.validate(record), record["plan"]["name"]
    return {f"plan {name} KL cut": found["cut"], f"plan {name} random plans beaten": found["beaten"] / found["random"]}
