"""Collect everything that a report says about one study.

Records are read once; tables, tests and verdicts are computed from them.
"""

from dataclasses import dataclass

import pandas as pd

from vitnb import variants
from vitnb.analysis import (
    accuracy,
    ceilings,
    claims,
    comparison,
    learning,
    provenance,
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

    outdated: dict[str, str]  # {record: why it does not belong to the others}
    notes: list[str]  # on mixtures of code and packages
    device: str  # that verdicts are about

    # Records by what they hold, without the outdated ones.
    evaluated: list[dict]
    evaluated_here: list[dict]  # on ``device``
    finetuned: dict | None
    inferred: dict | None
    compared: dict | None
    ablated: dict | None
    pretrained: dict | None
    waterfall: dict | None
    plans: list[dict]
    old_plans: list[dict]  # of another fine-tuning: their ``plan`` entries

    # Tables and sentences.
    answer: list[str]  # two sentences; see ``comparison.describe_answer``
    summary: pd.DataFrame
    summary_here: pd.DataFrame  # rows of ``device``
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
    ceilings: pd.DataFrame  # of the machines; see ``ceilings.ceilings_table``

    @property
    def newest(self) -> dict:
        """The newest record."""
        return self.records[-1]

    @property
    def split(self) -> str:
        """The split that accuracy is measured on."""
        return next((record.get("split", "test") for record in self.evaluated), "test")

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
    outdated = provenance.outdated_reasons(records)
    current = [record for record in records if record["name"] not in outdated]
    device = provenance.main_device(current)
    evaluated = _evaluated(current, table)
    here = [one for one in evaluated if provenance.device_name(one) == device]
    own_rows = table[table.device == device]
    finetuned = provenance.newest(current, "finetune")
    compared = provenance.comparison_record(current)
    ablated = provenance.newest(current, "ablate")  # by Linear holds layers, too
    pairs, ratios, times = _comparison_tables(compared)
    answers = accuracy.compare_devices(evaluated, compared)
    own_answers = answers[answers.device == device]
    recommendations = comparison.recommend(own_rows, ratios, own_answers)
    classes_of, classes = _worst_classes(here, finetuned, recommendations)
    measured = claims.measured_claims(own_rows, pairs, own_answers, ablated)
    answer = comparison.describe_answer(recommendations, own_rows, ratios, own_answers)
    named = summary.named_results([*_others(current), *here])
    return Results(
        study=study,
        records=records,
        outdated=outdated,
        notes=provenance.code_notes([r for r in current if r["status"] == "ok"]),
        device=device,
        evaluated=evaluated,
        evaluated_here=here,
        finetuned=finetuned,
        inferred=_named(current, "infer"),
        compared=compared,
        ablated=ablated,
        pretrained=provenance.newest(current, "pretrain"),
        waterfall=provenance.newest(current, "waterfall"),
        plans=[r for r in current if r["notebook"] == "plan" and r["status"] == "ok"],
        old_plans=[r["plan"] for r in records if r["name"] in outdated and "plan" in r],
        answer=answer,
        summary=table,
        summary_here=own_rows,
        pairs=pairs,
        ratios=ratios,
        times=times,
        accuracy=answers,
        recommendations=recommendations,
        classes_of=classes_of,
        classes=classes,
        effects=sensitivity.part_effects(ablated["rows"]) if ablated else None,
        claims=claims.claim_verdicts(measured),
        verdicts=summary.expectation_verdicts(study, named),
        ceilings=ceilings.ceilings_table(ceilings.study_ceilings(records)),
    )


def _evaluated(current: list[dict], table: pd.DataFrame) -> list[dict]:
    """Return the evaluate records whose rows stand in the summary, oldest first."""
    shown = set(table[table.status == "ok"].record)
    return [record for record in current if record["name"] in shown]


def _others(current: list[dict]) -> list[dict]:
    """Return the records of all notebooks but evaluate."""
    return [record for record in current if record["notebook"] != "evaluate"]


def _named(records: list[dict], name: str) -> dict | None:
    """Return the record of this name, if it succeeded."""
    found = next((record for record in records if record["name"] == name), None)
    return found if found and found["status"] == "ok" else None


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
