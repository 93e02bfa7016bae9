"""The report: one self-contained HTML page and the CSV tables, made from records and the ledger of claims alone."""

import base64
import csv
import io
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from vitnb import (
    ablate,
    accuracy,
    advice,
    claims,
    compare,
    depth,
    duplicates,
    figures,
    ladders,
    memory,
    proof,
    records,
    repeats,
    studies,
    summary,
    waterfall,
)
from vitnb.errors import UserError

TEMPLATE = Path(__file__).with_name("report.html.j2")
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


def _embed(figure: Figure) -> str:
    """A figure as a data URI, so that the page is one file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cell(template: str, value: object) -> str:
    return "" if value is None or value != value else template.format(value)


def shown(table: pd.DataFrame) -> pd.DataFrame:
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


def _one(found: list[dict], notebook: str) -> dict | None:
    """The study's own record of a notebook, if it is there and whole."""
    return next((r for r in found if r["name"] == notebook and r["status"] == "ok"), None)


def _csv(path: Path, table: pd.DataFrame) -> None:
    records.write_whole(path, table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL))


def answered(compared: pd.DataFrame) -> pd.DataFrame:
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


def agreed(turns: dict | None) -> pd.DataFrame:
    """How far the engines of one variant agree (``accuracy.engines``), as people read it."""
    return pd.DataFrame(
        {
            "variant": row["a"], "other engine": row["b"], "images": row["images"], "largest difference": f"{row['largest']:.4f}",
            "spacing": f"{row['spacing']:.4f}", "another first class": row["changed"], "lead": f"{row['gap']:.4f}",
        }
        for row in (turns or {}).get("engines", [])
    )  # fmt: skip


def raced(ratios: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    """Every variant's and peer's p50 and its time over the baseline's, taken in the same turns, as people read them."""
    taken = times.set_index(["variant", "batch_size"])
    rows = []
    for row in ratios[ratios.ratio.notna()].itertuples():
        own = taken.loc[row.variant, row.batch_size]
        rows.append({
            "variant": row.variant, "batch": row.batch_size, "p50 ms": f"{own.p50_ms:.3f} ({own.low:.3f} to {own.high:.3f})",
            "time over fp32-sdpa": f"{row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})", "in words": advice.speed(row),
        })  # fmt: skip
    return pd.DataFrame(rows)


def stepped(table: pd.DataFrame) -> pd.DataFrame:
    """The waterfall's table as people read it; the rows that lose, or did not run, among the others."""
    rows = []
    for row in table.itertuples():
        first, blank = row.gain != row.gain, row.kl != row.kl
        rows.append({
            "ladder": row.ladder, "batch": row.batch_size, "technique": row.step, "variant": row.variant,
            "p50 ms": _cell("{:.3f}", row.p50_ms),
            "gain": "" if first else f"{row.gain:.3f}x ({row.gain_low:.3f} to {row.gain_high:.3f})",
            "in words": waterfall.judged(row), "over the first": _cell("{:.2f}x", row.total_gain),
            "KL (95%)": "" if blank else f"{row.kl:.2g} ({row.kl_low:.2g} to {row.kl_high:.2g})", "changed": _cell("{:.1%}", row.changed),
            "resident MB": _cell("{:.2f}", row.resident_mb), "scratch MB": _cell("{:.2f}", row.scratch_mb),
            "engine that ran": _cell("{}", row.engine_ran), "reason": _cell("{}", row.reason),
        })  # fmt: skip
    return pd.DataFrame(rows)


def write(study: studies.Study) -> Path:
    """Write ``report.html``, ``summary.csv``, ``accuracy.csv`` and ``claims.csv`` of a study from its records.

    Raises UserError if there are none.
    """
    found = records.load(study)
    table = summary.table(study)
    if table.empty:
        raise UserError(
            f"study '{study.name}' has no evaluate records: run 'python -m vitnb study {study.typed}' first"
        )
    finetuned, inferred, turns = (_one(found, name) for name in ("finetune", "infer", "compare"))
    # By layer or by Linear, which holds the layers too: the newest.
    ablated = next((r for r in reversed(found) if r["notebook"] == "ablate" and r["status"] == "ok"), None)
    based, fallen = (_one(found, name) for name in ("pretrain", "waterfall"))
    planned, old_plans = proof.current(found, finetuned)
    effects = ablate.effects(ablated["rows"]) if ablated else None
    current = set(table[table.status == "ok"].record)
    evaluated = [record for record in found if record["name"] in current]
    every = compare.ratios(turns) if turns else pd.DataFrame(columns=compare.RATIO_COLUMNS)
    times = compare.times(turns) if turns else pd.DataFrame(columns=compare.TIME_COLUMNS)
    ratios, answers = compare.against(every), accuracy.compared(evaluated, turns)
    claimed = claims.verdicts(claims.measured(table, every, answers, ablated))
    pictures = {}
    if evaluated:
        pictures = {
            "accuracy_latency": figures.accuracy_latency(table, ratios if turns else None),
            "accuracy_size": figures.accuracy_size(table), "size_memory": figures.size_memory(table),
            "latency": figures.latency_distribution(evaluated), "kernels": figures.kernel_classes(evaluated),
        }  # fmt: skip
    if finetuned:
        pictures["learning"] = figures.learning_curve(finetuned["history"])
    if ablated:
        pictures |= {"layers": figures.ablation_layers(ablated["rows"]), "ends": figures.ablation_ends(ablated["rows"])}
        pictures["effects"] = figures.layer_effects(effects)
    for record in planned:
        pictures |= {
            f"curve {record['name']}": figures.plan_curve(record),
            f"map {record['name']}": figures.linears_map(record),
        }
    if based:
        pictures["base"] = figures.pretraining_curve(based["history"])
    if fallen:
        pictures["waterfall"] = figures.waterfall(fallen)
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    widths = sorted(effects.bits.unique().tolist()) if ablated else []
    keep = {bits: ablate.recommended(effects, bits) for bits in widths}
    plans = [
        {"record": r, "told": proof.told(r), "kept": proof.kept(r), "on": proof.proven_on(r), "traded": proof.shown(r)}
        for r in planned
    ]
    html = page.render(
        study=study, table=shown(table), figures={name: _embed(figure) for name, figure in pictures.items()},
        advice=pd.DataFrame(advice.recommendation(table, ratios, answers)), same_kernel=advice.not_comparable(table),
        raced=raced(ratios, times), turns=turns, pairs=len(every), answered=answered(answers), agreed=agreed(turns), claims=claimed,
        claim_counts=claims.counts(claimed), definitions=memory.DEFINITIONS, roofs=_roofs(evaluated),
        verdicts=summary.verdicts(study, summary.results(study)), finetuned=finetuned, inferred=inferred, ablated=ablated,
        keep=keep, kinds=ablate.by_kind(effects) if ablated else None,
        depths=depth.answers(ablated["rows"], widths) if ablated else [], plans=plans, old_plans=old_plans,
        based=based, fallen=fallen, techniques=ladders.TOLD,
        doubles=duplicates.told(finetuned["duplicates"]) if finetuned and "duplicates" in finetuned else "",
        repeated=repeats.told(finetuned["seeds"]) if finetuned and "seeds" in finetuned else "",
        scored=next((record.get("split", "test") for record in evaluated), "test"),
        stepped=stepped(waterfall.table(fallen)) if fallen else None, records=found, newest=found[-1], MB=summary.MB,
    )  # fmt: skip
    _csv(study.outputs / "summary.csv", table)
    _csv(study.outputs / "accuracy.csv", answers)
    _csv(study.outputs / "claims.csv", claimed)
    if ablated:
        _csv(study.outputs / "sensitivity.csv", effects)
    for record in planned:
        _csv(study.outputs / f"{record['name']}.csv", proof.trade_off(record["curve"], record["plan"]["uniform_bytes"]))
    records.write_whole(study.outputs / "report.html", html)
    return study.outputs / "report.html"


def _roofs(evaluated: list[dict]) -> dict[str, dict]:
    """This machine's ceilings by computing type, from the newest record of each."""
    return {record["dtype"]: record["roofline"] for record in evaluated}
