"""The report: one self-contained HTML page and the CSV tables, made from records and nothing else."""

import base64
import csv
import io
from pathlib import Path

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from vitnb import ablate, figures, records, studies, summary
from vitnb.errors import UserError

TEMPLATE = Path(__file__).with_name("report.html.j2")
# Columns of the report's main table -> their headings and formats.
MAIN = {
    "variant": ("variant", "{}"), "batch_size": ("batch", "{:.0f}"), "attention_ran": ("attention that ran", "{}"),
    "top1": ("top-1", "{:.4f}"), "top5": ("top-5", "{:.4f}"), "f1": ("F1", "{:.4f}"),
    "latency_mean_ms": ("mean ms", "{:.2f}"), "latency_p50_ms": ("p50 ms", "{:.2f}"), "latency_p95_ms": ("p95 ms", "{:.2f}"),
    "latency_p99_ms": ("p99 ms", "{:.2f}"), "throughput_ips": ("images/s", "{:.1f}"), "disk_mb": ("disk MB", "{:.2f}"),
    "resident_mb": ("resident MB", "{:.2f}"), "peak_mb": ("peak MB", "{:.2f}"), "attention_time_ms": ("attention ms", "{:.2f}"),
    "total_time_ms": ("operators ms", "{:.2f}"), "linears_quantized": ("Linears quantized", "{:.0f}"), "linears_kept": ("kept", "{:.0f}"),
    "status": ("status", "{}"), "reason": ("reason", "{}"),
}  # fmt: skip


def _embed(figure: Figure) -> str:
    """A figure as a data URI, so that the page is one file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    figures.plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cell(template: str, value: object) -> str:
    return "" if value is None or value != value else template.format(value)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The main table as people read it: headings, rounded numbers, blanks for what was not measured."""
    columns = {heading: [_cell(form, value) for value in table[name]] for name, (heading, form) in MAIN.items()}
    frame = pd.DataFrame(columns)
    return frame.drop(columns="reason") if (frame.reason == "").all() else frame


def _one(found: list[dict], notebook: str) -> dict | None:
    """The study's own record of a notebook, if it is there and whole."""
    return next((r for r in found if r["name"] == notebook and r["status"] == "ok"), None)


def write(study: studies.Study) -> Path:
    """Write ``report.html`` and ``summary.csv`` of a study from its records; raises UserError if there are none."""
    found = records.load(study)
    table = summary.table(study)
    if table.empty:
        raise UserError(
            f"study '{study.name}' has no evaluate records: run 'python -m vitnb study {study.typed}' first"
        )
    evaluated = [record for record in found if record["notebook"] == "evaluate"]
    finetuned, ablated, inferred = (_one(found, name) for name in ("finetune", "ablate", "infer"))
    pictures = {}
    if (table.status == "ok").any():
        pictures = {
            "accuracy_latency": figures.accuracy_latency(table), "accuracy_size": figures.accuracy_size(table),
            "size_memory": figures.size_memory(table), "latency": figures.latency_distribution(evaluated),
        }  # fmt: skip
    if finetuned:
        pictures["learning"] = figures.learning_curve(finetuned["history"])
    if ablated:
        pictures |= {"layers": figures.ablation_layers(ablated["rows"]), "ends": figures.ablation_ends(ablated["rows"])}
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    keep = {bits: ablate.recommended(ablated["rows"], bits) for bits in study.ablate_bits} if ablated else {}
    html = page.render(
        study=study, table=shown(table), figures={name: _embed(figure) for name, figure in pictures.items()},
        advice=pd.DataFrame(summary.recommendation(table)), same_kernel=summary.not_comparable(table),
        verdicts=summary.verdicts(study, summary.results(study)), finetuned=finetuned, inferred=inferred, ablated=ablated,
        keep=keep, records=found, newest=found[-1], MB=summary.MB,
    )  # fmt: skip
    text = io.StringIO()
    table.to_csv(text, index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    records.write_whole(study.outputs / "summary.csv", text.getvalue())
    records.write_whole(study.outputs / "report.html", html)
    return study.outputs / "report.html"
