"""Score predictions, and compare variants on the same images."""

from collections import Counter

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix, f1_score

from vitnb import statistics, variants
from vitnb.analysis import provenance

COLUMNS = [
    "variant",
    "images",
    *("top1", "low", "high"),
    *("points", "points_low", "points_high"),
    *("only_baseline_right", "only_variant_right", "p", "p_corrected"),
    *("top5_points", "top5_points_low", "top5_points_high"),
    *("kl", "kl_low", "kl_high", "kl_control_p_corrected"),
    "verdict",
]


def is_correct(predictions: dict[str, list], k: int = 1) -> np.ndarray:
    """Return whether the true class is among the k likeliest, bool [images]."""
    likeliest = np.asarray(predictions["top5"])[:, :k]
    return (likeliest == np.asarray(predictions["labels"])[:, None]).any(axis=1)


def top1_interval(predictions: dict[str, list]) -> tuple[float, float]:
    """Return Wilson's 95% interval of the top-1."""
    return statistics.wilson(is_correct(predictions).sum(), len(predictions["labels"]))


def scores(predictions: dict[str, list]) -> dict[str, float]:
    """Return top-1, top-5 and weighted F1 (scikit-learn), each between 0 and 1."""
    labels, predicted = predictions["labels"], first_choices(predictions)
    return {
        "images": len(labels),
        "top1": float(is_correct(predictions).mean()),
        "top5": float(is_correct(predictions, 5).mean()),
        "f1": float(f1_score(labels, predicted, average="weighted", zero_division=0)),
    }


def first_choices(predictions: dict[str, list]) -> list[int]:
    """Return the likeliest class of each image, [images]."""
    return [row[0] for row in predictions["top5"]]


def confusion_counts(predictions: dict[str, list], classes: int) -> np.ndarray:
    """Count predictions, [classes, classes]: rows are true classes."""
    return confusion_matrix(
        predictions["labels"], first_choices(predictions), labels=range(classes)
    )


def worst_classes(
    predictions: dict[str, list], class_names: list[str] | None = None, count: int = 10
) -> pd.DataFrame:
    """Return the classes with the lowest top-1, worst first.

    Args:
        class_names: by class number; a class without a name is called by its number.
        count: of classes at most; classes without a mistake are left out.

    Returns:
        Columns class, images, correct, top1, taken_for: the three commonest wrong
        answers, each with its number of images.
    """

    def name(label: int) -> str:
        return class_names[label] if class_names else f"class {label}"

    labels, answers = np.asarray(predictions["labels"]), first_choices(predictions)
    rows = []
    for label in np.unique(labels).tolist():
        given = Counter(answers[i] for i in np.flatnonzero(labels == label))
        images, correct = sum(given.values()), given.pop(label, 0)
        wrong = sorted(given.items(), key=lambda item: (-item[1], item[0]))[:3]
        rows.append(
            {
                "class": name(label),
                "images": images,
                "correct": correct,
                "top1": correct / images,
                "taken_for": ", ".join(f"{name(other)} ({n})" for other, n in wrong),
            }
        )
    table = pd.DataFrame(
        rows, columns=["class", "images", "correct", "top1", "taken_for"]
    )
    wrong_somewhere = table[table.correct < table.images]
    return wrong_somewhere.sort_values("top1", kind="stable").head(count)


def paired_comparison(evaluated: list[dict], record: dict | None) -> pd.DataFrame:
    """Compare every variant's answers with the baseline's, image by image.

    Args:
        evaluated: evaluate records of one device, oldest first.
        record: the compare record, which holds KL by image; None without a comparison.

    Returns:
        A row for each variant, columns COLUMNS: top-1 with Wilson's interval,
        McNemar's test, KL in nats with its bootstrap interval. P-values are corrected
        for the number of variants (Holm). ``kl_control_p_corrected`` tests whether a
        variant moves the answers further than 16-bit computing alone (bf16-sdpa) does
        (paired t-test). ``verdict`` says so where so few images differ that no split of
        them could be significant. Empty without a baseline.
    """
    predictions = _predictions(evaluated)
    if variants.BASELINE not in predictions:
        return pd.DataFrame(columns=COLUMNS)
    kl = _kl_by_image(record)
    rows = []
    for name in variants.sort_names(predictions):
        row = _own_scores(name, predictions[name])
        if name != variants.BASELINE:
            row |= _against_baseline(predictions[name], predictions[variants.BASELINE])
            row |= _divergence(name, kl)
        rows.append(row)
    table = pd.DataFrame(rows).reindex(columns=[*COLUMNS, "kl_control_p"])
    for column, corrected in (
        ("p", "p_corrected"),
        ("kl_control_p", "kl_control_p_corrected"),
    ):
        known = table[column].notna()
        table.loc[known, corrected] = statistics.holm(table.loc[known, column].tolist())
    ps = table.p.dropna().tolist()
    tests = iter(range(len(ps)))
    table["verdict"] = [
        _verdict(row, ps, None if pd.isna(row.p) else next(tests))
        for _, row in table.iterrows()
    ]
    return table[COLUMNS]


def _predictions(evaluated: list[dict]) -> dict[str, dict]:
    """Return the predictions of each variant.

    Of several records, the newest at the study's own batch sizes counts.
    """
    ordered = sorted(evaluated, key=lambda one: not one["asked"].get("batch_size"))
    return {
        record["asked"]["variant"]: record["predictions"]
        for record in ordered
        if record["status"] == "ok"
    }


def compare_devices(evaluated: list[dict], record: dict | None) -> pd.DataFrame:
    """Compare variants with the baseline of their own device, device by device.

    Args:
        evaluated: evaluate records of all devices, oldest first.
        record: the compare record; its KL is of its own device alone.

    Returns:
        The rows of ``paired_comparison``, with a column ``device`` in front.
    """
    tables = []
    for device in dict.fromkeys(map(provenance.device_name, evaluated)):
        own = [one for one in evaluated if provenance.device_name(one) == device]
        is_same = record and provenance.device_name(record) == device
        table = paired_comparison(own, record if is_same else None)
        table.insert(0, "device", device)
        if not table.empty:
            tables.append(table)
    if not tables:
        return pd.DataFrame(columns=["device", *COLUMNS])
    return pd.concat(tables, ignore_index=True)


def _kl_by_image(record: dict | None) -> dict[str, np.ndarray]:
    """Return the KL to the baseline by variant, [images] each."""
    answers = (record or {}).get("answers", {})
    return {name: np.asarray(answer["kl_by_image"]) for name, answer in answers.items()}


def _own_scores(name: str, predictions: dict[str, list]) -> dict[str, object]:
    low, high = top1_interval(predictions)
    correct = is_correct(predictions)
    return {
        "variant": name,
        "images": len(correct),
        "top1": correct.mean(),
        "low": low,
        "high": high,
    }


def _against_baseline(predictions: dict, baseline: dict) -> dict[str, float]:
    """Return McNemar's test, and the differences of top-1 and top-5 in points."""
    only_baseline, only_variant, p = statistics.mcnemar(
        is_correct(baseline), is_correct(predictions)
    )
    row = {
        "only_baseline_right": only_baseline,
        "only_variant_right": only_variant,
        "p": p,
    }
    for score, k in (("points", 1), ("top5_points", 5)):
        points = statistics.paired_points(
            is_correct(predictions, k), is_correct(baseline, k)
        )
        row |= dict(zip((score, f"{score}_low", f"{score}_high"), points, strict=True))
    return row


def _divergence(name: str, kl: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the mean KL, and the p-value of exceeding the 16-bit control's."""
    if name not in kl:
        return {}
    row = dict(
        zip(
            ("kl", "kl_low", "kl_high"),
            statistics.bootstrap_mean(kl[name]),
            strict=True,
        )
    )
    computes_in_16_bits = (
        name != variants.CONTROL and variants.parse(name).weights != "fp32"
    )
    if variants.CONTROL in kl and computes_in_16_bits:
        row["kl_control_p"] = statistics.paired_t_pvalue(kl[name], kl[variants.CONTROL])
    return row


def _verdict(row: pd.Series, ps: list[float], test: int | None) -> str:
    """Describe a variant's accuracy; never better or worse inside the noise.

    Args:
        ps: p-values of all variants, not corrected.
        test: the index of this row's own among them; None for the baseline.
    """
    if test is None:
        return "the baseline"
    if row.p_corrected < 1 - statistics.LEVEL:
        word = "better" if row.points > 0 else "worse"
        return f"{word} than {variants.BASELINE}: {row.points:+.1f} points"
    differing = int(row.only_baseline_right + row.only_variant_right)
    least = statistics.least_mcnemar_pvalue(differing)
    if not statistics.could_be_significant(test, ps, least):
        return f"too few images differ to tell ({differing})"
    return "no difference beyond noise"
