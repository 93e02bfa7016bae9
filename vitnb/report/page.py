"""The report: one self-contained HTML page and the CSV tables, made from records and the ledger of claims alone."""

import base64
import csv
import io
from collections.abc import Container, Iterable
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from vitnb.analysis import (
    accuracy,
    claims,
    comparison,
    performance,
    plan_validation,
    sensitivity,
    summary,
)
from vitnb.analysis.learning import describe_seeds
from vitnb.analysis.waterfall import TECHNIQUE_NOTES, waterfall_table
from vitnb.data import duplicates
from vitnb.errors import UserError
from vitnb.figures import learning, mixed_precision, profile, tradeoffs, waterfall
from vitnb.records.files import MB, write_file
from vitnb.records.reader import load_records
from vitnb.report import tables
from vitnb.report.tables import (
    format_accuracy,
    format_engines,
    format_ratios,
    format_summary,
    format_waterfall,
)
from vitnb.study import Study

TEMPLATE = Path(__file__).with_name("report.html.j2")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _embed(png: bytes) -> str:
    """A picture as a data URI, so that the page is one file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _one(found: list[dict], notebook: str) -> dict | None:
    """The study's own record of a notebook, if it is there and whole."""
    return next((r for r in found if r["name"] == notebook and r["status"] == "ok"), None)


def _csv(path: Path, table: pd.DataFrame) -> None:
    write_file(path, table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL))


def _drawn(table, ratios, evaluated, finetuned, ablated, effects, planned, based, fallen) -> dict[str, Figure]:
    """The figures of what there is, by the names of their files."""
    found = {}
    if evaluated:
        found = {
            "accuracy_latency": tradeoffs.accuracy_latency(table, ratios), "accuracy_size": tradeoffs.accuracy_size(table),
            "size_memory": tradeoffs.size_memory(table), "latency": tradeoffs.latency_distribution(evaluated),
            "kernels": profile.kernel_classes(evaluated),
        }  # fmt: skip
    if finetuned:
        found["learning"] = learning.learning_curve(finetuned["history"])
    if ablated:
        rows = ablated["rows"]
        found |= {"layers": mixed_precision.ablation_layers(rows), "ends": mixed_precision.ablation_ends(rows)}
        found["effects"] = mixed_precision.layer_effects(effects)
    for record in planned:
        name = record["name"]
        found |= {f"curve-{name}": mixed_precision.plan_curve(record), f"map-{name}": mixed_precision.linears_map(record)}
    if based:
        found["base"] = learning.pretraining_curve(based["history"])
    if fallen:
        found["waterfall"] = waterfall.waterfall(fallen)
    return found


def write_report(study: Study) -> Path:
    """Write ``report.html``, ``figures/`` and the tables that are not a stage's own, such as ``summary.csv``, from the records.

    Raises UserError if there are none.
    """
    found = load_records(study)
    table = summary.summary_table(study)
    if table.empty:
        raise UserError(
            f"study '{study.name}' has no evaluate records: run 'python -m vitnb study {study.typed}' first"
        )
    finetuned, inferred, turns = (_one(found, name) for name in ("finetune", "infer", "compare"))
    # By layer or by Linear, which holds the layers too: the newest.
    ablated = next((r for r in reversed(found) if r["notebook"] == "ablate" and r["status"] == "ok"), None)
    based, fallen = (_one(found, name) for name in ("pretrain", "waterfall"))
    planned, old_plans = plan_validation.current_plans(found, finetuned)
    effects = sensitivity.part_effects(ablated["rows"]) if ablated else None
    current = set(table[table.status == "ok"].record)
    evaluated = [record for record in found if record["name"] in current]
    every = comparison.ratio_table(turns) if turns else pd.DataFrame(columns=comparison.RATIO_COLUMNS)
    times = comparison.time_table(turns) if turns else pd.DataFrame(columns=comparison.TIME_COLUMNS)
    ratios, answers = comparison.ratios_to_baseline(every), accuracy.paired_comparison(evaluated, turns)
    claimed = claims.claim_verdicts(claims.measured_claims(table, every, answers, ablated))
    drawn = _drawn(table, ratios if turns else None, evaluated, finetuned, ablated, effects, planned, based, fallen)
    pictures = {name: _png(figure) for name, figure in drawn.items()}
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    widths = sorted(effects.bits.unique().tolist()) if ablated else []
    keep = {bits: sensitivity.layers_to_keep(effects, bits) for bits in widths}
    plans = [
        {"record": r, "told": plan_validation.describe_plan(r), "kept": plan_validation.describe_kept(r), "on": plan_validation.validation_images(r), "traded": tables.format_trade_off(r)}
        for r in planned
    ]
    html = page.render(
        study=study, table=format_summary(table), figures={name: _embed(png) for name, png in pictures.items()},
        advice=pd.DataFrame(comparison.recommend(table, ratios, answers)), same_kernel=comparison.same_program_notes(table),
        raced=format_ratios(ratios, times), turns=turns, pairs=len(every), answered=format_accuracy(answers), agreed=format_engines(turns), claims=claimed,
        claim_counts=claims.claim_counts(claimed), definitions=performance.MEMORY_DEFINITIONS, roofs=_roofs(evaluated),
        verdicts=summary.expectation_verdicts(study, summary.named_results(study)), finetuned=finetuned, inferred=inferred, ablated=ablated,
        keep=keep, kinds=sensitivity.effects_by_kind(effects) if ablated else None,
        depths=sensitivity.claim_sentences(ablated["rows"], widths) if ablated else [], plans=plans, old_plans=old_plans,
        based=based, fallen=fallen, techniques=TECHNIQUE_NOTES,
        doubles=duplicates.describe_duplicates(finetuned["duplicates"]) if finetuned and "duplicates" in finetuned else "",
        repeated=describe_seeds(finetuned["seeds"]) if finetuned and "seeds" in finetuned else "",
        scored=next((record.get("split", "test") for record in evaluated), "test"),
        stepped=format_waterfall(waterfall_table(fallen)) if fallen else None, records=found, newest=found[-1], MB=MB,
    )  # fmt: skip
    _csv(study.outputs / "summary.csv", table)
    _csv(study.outputs / "accuracy.csv", answers)
    _csv(study.outputs / "claims.csv", claimed)
    if ablated:
        _csv(study.outputs / "sensitivity.csv", effects)
    for record in planned:
        _csv(study.outputs / f"{record['name']}.csv", plan_validation.trade_off(record["curve"], record["plan"]["uniform_bytes"]))
    _keep_only(study.outputs.glob("plan-*.csv"), [record["name"] for record in planned])
    for name, png in pictures.items():
        write_file(study.outputs / "figures" / f"{name}.png", png)
    _keep_only((study.outputs / "figures").glob("*.png"), pictures)
    write_file(study.outputs / "report.html", html)
    return study.outputs / "report.html"


def _keep_only(made: Iterable[Path], names: Container[str]) -> None:
    """Remove what an earlier report made of a record that is gone."""
    for path in made:
        if path.stem not in names:
            path.unlink()


def _roofs(evaluated: list[dict]) -> dict[str, dict]:
    """This machine's ceilings by computing type, from the newest record of each."""
    return {record["dtype"]: record["roofline"] for record in evaluated}
