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
from vitnb.tables import agreed, answered, raced, shown, stepped

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
    records.write_whole(path, table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL))


def _drawn(table, ratios, evaluated, finetuned, ablated, effects, planned, based, fallen) -> dict[str, Figure]:
    """The figures of what there is, by the names of their files."""
    found = {}
    if evaluated:
        found = {
            "accuracy_latency": figures.accuracy_latency(table, ratios), "accuracy_size": figures.accuracy_size(table),
            "size_memory": figures.size_memory(table), "latency": figures.latency_distribution(evaluated),
            "kernels": figures.kernel_classes(evaluated),
        }  # fmt: skip
    if finetuned:
        found["learning"] = figures.learning_curve(finetuned["history"])
    if ablated:
        rows = ablated["rows"]
        found |= {"layers": figures.ablation_layers(rows), "ends": figures.ablation_ends(rows)}
        found["effects"] = figures.layer_effects(effects)
    for record in planned:
        name = record["name"]
        found |= {f"curve-{name}": figures.plan_curve(record), f"map-{name}": figures.linears_map(record)}
    if based:
        found["base"] = figures.pretraining_curve(based["history"])
    if fallen:
        found["waterfall"] = figures.waterfall(fallen)
    return found


def write(study: studies.Study) -> Path:
    """Write ``report.html``, ``figures/`` and the tables that are not a stage's own, such as ``summary.csv``, from the records.

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
    drawn = _drawn(table, ratios if turns else None, evaluated, finetuned, ablated, effects, planned, based, fallen)
    pictures = {name: _png(figure) for name, figure in drawn.items()}
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    widths = sorted(effects.bits.unique().tolist()) if ablated else []
    keep = {bits: ablate.recommended(effects, bits) for bits in widths}
    plans = [
        {"record": r, "told": proof.told(r), "kept": proof.kept(r), "on": proof.proven_on(r), "traded": proof.shown(r)}
        for r in planned
    ]
    html = page.render(
        study=study, table=shown(table), figures={name: _embed(png) for name, png in pictures.items()},
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
    _keep_only(study.outputs.glob("plan-*.csv"), [record["name"] for record in planned])
    for name, png in pictures.items():
        records.write_whole(study.outputs / "figures" / f"{name}.png", png)
    _keep_only((study.outputs / "figures").glob("*.png"), pictures)
    records.write_whole(study.outputs / "report.html", html)
    return study.outputs / "report.html"


def _keep_only(made: Iterable[Path], names: Container[str]) -> None:
    """Remove what an earlier report made of a record that is gone."""
    for path in made:
        if path.stem not in names:
            path.unlink()


def _roofs(evaluated: list[dict]) -> dict[str, dict]:
    """This machine's ceilings by computing type, from the newest record of each."""
    return {record["dtype"]: record["roofline"] for record in evaluated}
