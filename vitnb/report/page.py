"""Write a study's report: one self-contained HTML page, its tables and figures.

Everything follows from the study's records and the ledger of claims.
"""

import base64
import io
import re
from collections.abc import Container, Iterable
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from vitnb import statistics
from vitnb.analysis import claims, comparison, plan_validation, sensitivity, tables
from vitnb.analysis.performance import MEMORY_DEFINITIONS
from vitnb.analysis.results import Results, collect
from vitnb.analysis.waterfall import TECHNIQUE_NOTES, waterfall_table
from vitnb.figures import learning, mixed_precision, profile, tradeoffs, waterfall
from vitnb.records.files import write_csv, write_file
from vitnb.study import Study

TEMPLATE = Path(__file__).with_name("report.html.j2")

# Functions that the template may apply to a part of the results.
FILTERS = {
    "claim_counts": claims.claim_counts,
    "describe_kept": plan_validation.describe_kept,
    "describe_plan": plan_validation.describe_plan,
    "effects_by_kind": sensitivity.effects_by_kind,
    "format_accuracy": tables.format_accuracy,
    "format_classes": tables.format_classes,
    "format_engines": tables.format_engines,
    "format_ratios": tables.format_ratios,
    "format_summary": tables.format_summary,
    "format_trade_off": tables.format_trade_off,
    "format_waterfall": tables.format_waterfall,
    "headings": lambda body: re.findall(r'<h2 id="(.+?)">(.+?)</h2>', body),
    "main_columns": tables.main_columns,
    "other_columns": tables.other_columns,
    "percent": lambda share: f"{100 * share:.3g}%",
    "same_program_notes": comparison.same_program_notes,
    "sentence": lambda text: text[:1].upper() + text[1:],
    "table": pd.DataFrame,
    "validation_images": plan_validation.validation_images,
    "waterfall_table": waterfall_table,
}


def write_report(study: Study) -> Path:
    """Write ``report.html``, ``figures/`` and the tables that no other stage writes.

    Returns the path of the page. Raises UserError if nothing was evaluated.
    """
    results = collect(study)
    pictures = {name: _png(figure) for name, figure in _draw(results).items()}
    html = _render(results, pictures)
    _write_tables(results)
    _write_figures(study.outputs / "figures", pictures)
    path = study.outputs / "report.html"
    write_file(path, html)
    return path


def _draw(results: Results) -> dict[str, Figure]:
    """Draw the figures of what was measured, by the names of their files."""
    figures = {}
    if results.evaluated_here:
        figures |= _draw_tradeoffs(results)
    if results.finetuned:
        history = results.finetuned["history"]
        figures["learning"] = learning.learning_curve(history)
    if results.ablated:
        rows = results.ablated["rows"]
        figures["layers"] = mixed_precision.ablation_layers(rows)
        figures["ends"] = mixed_precision.ablation_ends(rows)
        figures["effects"] = mixed_precision.layer_effects(results.effects)
    for record in results.plans:
        name = record["name"]
        figures[f"curve-{name}"] = mixed_precision.plan_curve(record)
        figures[f"map-{name}"] = mixed_precision.linears_map(record)
    if results.pretrained:
        history = results.pretrained["history"]
        figures["base"] = learning.pretraining_curve(history)
    if results.waterfall:
        figures["waterfall"] = waterfall.waterfall(results.waterfall)
    return figures


def _draw_tradeoffs(results: Results) -> dict[str, Figure]:
    ratios = results.ratios if results.compared else None
    return {
        "accuracy_latency": tradeoffs.accuracy_latency(results.summary_here, ratios),
        "accuracy_size": tradeoffs.accuracy_size(results.summary_here),
        "size_memory": tradeoffs.size_memory(results.summary_here),
        "latency": tradeoffs.latency_distribution(results.evaluated_here),
        "kernels": profile.kernel_classes(results.evaluated_here),
    }


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _render(results: Results, pictures: dict[str, bytes]) -> str:
    """Return the page; pictures are embedded, so that the page is one file."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= FILTERS
    environment.globals |= {
        "memory_definitions": MEMORY_DEFINITIONS,
        "statistics": statistics,
        "technique_notes": TECHNIQUE_NOTES,
    }
    figures = {name: _data_uri(png) for name, png in pictures.items()}
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(results=results, study=results.study, figures=figures)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _write_tables(results: Results) -> None:
    folder = results.study.outputs
    write_csv(folder / "summary.csv", results.summary)
    write_csv(folder / "accuracy.csv", results.accuracy)
    write_csv(folder / "claims.csv", results.claims)
    if results.ablated:
        write_csv(folder / "sensitivity.csv", results.effects)
    for record in results.plans:
        uniform_bytes = record["plan"]["uniform_bytes"]
        table = plan_validation.trade_off(record["curve"], uniform_bytes)
        write_csv(folder / f"{record['name']}.csv", table)
    names = [record["name"] for record in results.plans]
    _remove_others(folder.glob("plan-*.csv"), names)


def _write_figures(folder: Path, pictures: dict[str, bytes]) -> None:
    for name, png in pictures.items():
        write_file(folder / f"{name}.png", png)
    _remove_others(folder.glob("*.png"), pictures)


def _remove_others(paths: Iterable[Path], names: Container[str]) -> None:
    """Remove files that an earlier report made from a record that is gone."""
    for path in paths:
        if path.stem not in names:
            path.unlink()
