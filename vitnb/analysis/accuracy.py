"""TODO."""

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix, f1_score

from vitnb import statistics, variants


def is_correct(predictions: dict[str, list], k: int = 1) -> np.ndarray:
    """Whether the true class is among the k likeliest, bool [images]."""
    return (np.asarray(predictions["top5"])[:, :k] == np.asarray(predictions["labels"])[:, None]).any(axis=1)


def top1_interval(predictions: dict[str, list]) -> tuple[float, float]:
    """Wilson's 95% interval of the top-1."""
    return statistics.wilson(is_correct(predictions).sum(), len(predictions["labels"]))


def scores(predictions: dict[str, list]) -> dict[str, float]:
    """Top-1, top-5 and weighted F1 (scikit-learn), each between 0 and 1."""
    labels, predicted = predictions["labels"], [row[0] for row in predictions["top5"]]
    return {
        "images": len(labels),
        "top1": float(is_correct(predictions).mean()),
        "top5": float(is_correct(predictions, 5).mean()),
        "f1": float(f1_score(labels, predicted, average="weighted", zero_division=0)),
    }


def confusion_counts(predictions: dict[str, list], classes: int) -> np.ndarray:
    """Counts [classes, classes]: row the true class, column the predicted one."""
    predicted = [row[0] for row in predictions["top5"]]
    return confusion_matrix(predictions["labels"], predicted, labels=range(classes))


COLUMNS = [
    "variant", "images", "top1", "low", "high", "points", "points_low", "points_high",
    "only_baseline_right", "only_variant_right", "p", "p_corrected", "top5_points", "top5_points_low", "top5_points_high",
    "kl", "kl_low", "kl_high", "kl_control_p_corrected", "verdict",
]  # fmt: skip


def paired_comparison(evaluated: list[dict], record: dict | None) -> pd.DataFrame:
    """Every variant's answers beside the baseline's on the same images: Wilson's interval, McNemar's test, KL.

    P-values are corrected for the number of variants (Holm). ``kl_control_p_corrected`` is the paired t-test that a
    variant moves the answers further than 16-bit computing alone (bf16-sdpa) does.
    """
    found = {r["asked"]["variant"]: r["predictions"] for r in evaluated if r["status"] == "ok"}
    if variants.BASELINE not in found:
        return pd.DataFrame(columns=COLUMNS)
    correct = {name: is_correct(predictions) for name, predictions in found.items()}
    moved = {name: np.asarray(a["kl_by_image"]) for name, a in (record or {}).get("answers", {}).items()}
    base, control = correct[variants.BASELINE], moved.get(variants.CONTROL)
    rows = []
    for name in variants.sort_names(found):
        low, high = top1_interval(found[name])
        row = {"variant": name, "images": len(base), "top1": correct[name].mean(), "low": low, "high": high}
        if name != variants.BASELINE:
            only_base, only_variant, p = statistics.mcnemar(base, correct[name])
            row |= {"only_baseline_right": only_base, "only_variant_right": only_variant, "p": p}
            for score, k in (("points", 1), ("top5_points", 5)):
                both = [is_correct(found[which], k) for which in (name, variants.BASELINE)]
                row |= dict(zip((score, f"{score}_low", f"{score}_high"), statistics.paired_points(*both), strict=True))
            if name in moved:
                row |= dict(zip(("kl", "kl_low", "kl_high"), statistics.bootstrap_mean(moved[name]), strict=True))
                if control is not None and name != variants.CONTROL and variants.parse(name).weights != "fp32":
                    row["kl_control_p"] = statistics.paired_t_pvalue(moved[name], control)
        rows.append(row)
    table = pd.DataFrame(rows).reindex(columns=[*COLUMNS, "kl_control_p"])
    for column, corrected in (("p", "p_corrected"), ("kl_control_p", "kl_control_p_corrected")):
        known = table[column].notna()
        table.loc[known, corrected] = statistics.holm(table.loc[known, column].tolist())
    table["verdict"] = [_verdict(row) for _, row in table.iterrows()]
    return table[COLUMNS]


def _verdict(row: pd.Series) -> str:
    """In words, and never better or worse inside the noise."""
    if row.variant == variants.BASELINE:
        return "the baseline"
    if row.p_corrected < 1 - statistics.LEVEL:
        return f"{'better' if row.points > 0 else 'worse'} than {variants.BASELINE}: {row.points:+.1f} points"
    return "no difference beyond noise"
