"""Collect everything that a report says about one study.

Records are read once; tables, tests and verdicts are computed from them.
"""

from dataclasses import dataclass

import pandas as pd

from vitnb import variants
from vitnb.analysis import (
    accuracy,
    claims,
    comparison,
    learning,
    plan_validation,
    sensitivity,
    summary,
)
from vitnb.data.duplicates import describe_duplicates
from vitnb.errors import UserError
from vitnb.records.reader import load_records
from vitnb.study import Study


@dataclass(frozen=True)
class Results:
    """The results of one study; None, or an empty table, for what was not measured."""

    study: Study
    records: list[dict]  # all of them, oldest first

    # Records by what they hold.
    evaluated: list[dict]  # of the newest fine-tuning
    finetuned: dict | None
    inferred: dict | None
    compared: dict | None
    ablated: dict | None
    pretrained: dict | None
    waterfall: dict | None
    plans: list[dict]  # of the newest fine-tuning
    old_plans: list[dict]  # of another fine-tuning: their ``plan`` entries

    # Tables and sentences.
    answer: list[str]  # two sentences; see ``comparison.describe_answer``
    summary: pd.DataFrame
    pairs: pd.DataFrame  # ratios of all pairs
    ratios: pd.DataFrame  # to the baseline
    times: pd.DataFrame
    accuracy: pd.DataFrame
    recommendations: list[dict]
    classes_of: str  # the variant whose worst classes are listed
    classes: pd.DataFrame
    effects: pd.DataFrame | None
    claims: pd.DataFrame
    verdicts: pd.DataFrame

    @property
    def newest(self) -> dict:
        """The newest record."""
        return self.records[-1]

    @property
    def split(self) -> str:
        """The split that accuracy is measured on."""
        return next((record.get("split", "test") for record in self.evaluated), "test")

    @property
    def rooflines(self) -> dict[str, dict]:
        """The ceilings of the machine by computing type, of the newest record each."""
        return {record["dtype"]: record["roofline"] for record in self.evaluated}

    @property
    def widths(self) -> list[int]:
        """The bit widths of the ablation."""
        return (
            [] if self.effects is None else sorted(self.effects.bits.unique().tolist())
        )

    @property
    def layers_to_keep(self) -> dict[int, list[str]]:
        """The layers most worth keeping, by bit width."""
        return {
            bits: sensitivity.most_sensitive_layers(self.effects, bits)
            for bits in self.widths
        }

    @property
    def depth_claims(self) -> list[str]:
        """The claims about depth, in sentences."""
        if not self.ablated:
            return []
        return sensitivity.claim_sentences(self.ablated["rows"], self.widths)

    @property
    def duplicates(self) -> str:
        """What is known of images in two splits; empty in older records."""
        known = (self.finetuned or {}).get("duplicates")
        return describe_duplicates(known) if known else ""

    @property
    def seeds(self) -> str:
        """The spread over seeds; empty in older records."""
        rows = (self.finetuned or {}).get("seeds")
        return learning.describe_seeds(rows) if rows else ""


def collect(study: Study) -> Results:
    """Read a study's records, and compute every table of its report.

    Raises UserError if nothing was evaluated.
    """
    records = load_records(study)
    table = summary.summarize_records(records)
    if table.empty:
        raise UserError(
            f"study '{study.name}' has no evaluate records: "
            f"run 'python -m vitnb study {study.typed}' first"
        )
    current = set(table[table.status == "ok"].record)
    evaluated = [record for record in records if record["name"] in current]
    finetuned, compared = _named(records, "finetune"), _named(records, "compare")
    ablated = _newest_ablation(records)
    plans, old_plans = plan_validation.current_plans(records, finetuned)
    pairs, ratios, times = _comparison_tables(compared)
    answers = accuracy.paired_comparison(evaluated, compared)
    recommendations = comparison.recommend(table, ratios, answers)
    classes_of, classes = _worst_classes(evaluated, finetuned, recommendations)
    measured = claims.measured_claims(table, pairs, answers, ablated)
    return Results(
        study=study,
        records=records,
        evaluated=evaluated,
        finetuned=finetuned,
        inferred=_named(records, "infer"),
        compared=compared,
        ablated=ablated,
        pretrained=_named(records, "pretrain"),
        waterfall=_named(records, "waterfall"),
        plans=plans,
        old_plans=old_plans,
        answer=comparison.describe_answer(recommendations, table, ratios, answers),
        summary=table,
        pairs=pairs,
        ratios=ratios,
        times=times,
        accuracy=answers,
        recommendations=recommendations,
        classes_of=classes_of,
        classes=classes,
        effects=sensitivity.part_effects(ablated["rows"]) if ablated else None,
        claims=claims.claim_verdicts(measured),
        verdicts=summary.expectation_verdicts(study, summary.named_results(records)),
    )


def _named(records: list[dict], name: str) -> dict | None:
    """Return the record of this name, if it succeeded."""
    record = summary.find_record(records, name)
    return record if record and record["status"] == "ok" else None


def _newest_ablation(records: list[dict]) -> dict | None:
    """Return the newest ablation, by layer or by Linear (which holds layers, too)."""
    ablations = [
        record
        for record in records
        if record["notebook"] == "ablate" and record["status"] == "ok"
    ]
    return ablations[-1] if ablations else None


def _comparison_tables(
    compared: dict | None,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return ratios of all pairs, ratios to the baseline, and times."""
    if compared is None:
        pairs = pd.DataFrame(columns=comparison.RATIO_COLUMNS)
        times = pd.DataFrame(columns=comparison.TIME_COLUMNS)
    else:
        pairs = comparison.ratio_table(compared)
        times = comparison.time_table(compared)
    return pairs, comparison.ratios_to_baseline(pairs), times


def _worst_classes(
    evaluated: list[dict], finetuned: dict | None, recommendations: list[dict]
) -> tuple[str, pd.DataFrame]:
    """Return a variant, and the classes that it gets wrong most often.

    The variant is the recommended one, or else the baseline, or else the first.
    """
    predictions = {r["asked"]["variant"]: r["predictions"] for r in evaluated}
    preferred = [
        comparison.recommended_variant(recommendations),
        variants.BASELINE,
        *predictions,
    ]
    name = next((name for name in preferred if name in predictions), "")
    if not name:
        return "", pd.DataFrame()
    class_names = (finetuned or {}).get("class_names")
    return name, accuracy.worst_classes(predictions[name], class_names)
