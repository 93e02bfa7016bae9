"""Compare what two records of one notebook found.

Each notebook has a rule of its own, here or in ``evaluation`` and ``comparison``.
"""

import math

import pandas as pd
from scipy import stats

from vitnb.analysis import learning
from vitnb.analysis.differences.comparison import (
    compare_ablations,
    compare_comparisons,
    compare_plans,
    compare_waterfalls,
)
from vitnb.analysis.differences.evaluation import compare_evaluations
from vitnb.analysis.differences.sides import Side, other_machine, shorten
from vitnb.analysis.differences.verdicts import (
    BEYOND,
    Finding,
    common_keys,
    compare_by_test,
    compare_counts,
    compare_shares,
    compare_times,
    show_count,
    unchanged,
    unknown,
)

# What is no result: it was asked, it ran, or it says when.
NO_RESULTS = (
    *("name", "study", "asked", "study_asked", "started", "seconds"),
    *("machine", "versions", "identity", "schema", "written_as"),
)
BASELINES = ("pixels", "untrained", "probe")


def compare_findings(a: Side, b: Side) -> list[Finding]:
    """Compare the results of two records.

    Returns:
        A finding for each number. Tests have no verdict yet: see
        ``verdicts.correct_tests``.
    """
    ours, theirs = a.record, b.record
    if ours["notebook"] != theirs["notebook"]:
        why = f"{ours['notebook']} and {theirs['notebook']} measure different things"
        return [unknown("results", why)]
    if _results(ours) == _results(theirs):
        return [unchanged("all results")]
    if "failed" in (ours["status"], theirs["status"]):
        return [_compare_failures(ours, theirs)]
    rule = BY_NOTEBOOK.get(ours["notebook"])
    if rule is None:
        return [unknown("results", f"there is no rule for {ours['notebook']}")]
    return rule(a, b)


def _results(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in NO_RESULTS}


def _compare_failures(a: dict, b: dict) -> Finding:
    failed = [side for side, one in (("A", a), ("B", b)) if one["status"] == "failed"]
    shown = [
        f"failed: {one['reason']}" if one["status"] == "failed" else "ran"
        for one in (a, b)
    ]
    return unknown("results", f"{' and '.join(failed)} failed", *shown)


# --- finetune, pretrain ---


def _compare_trainings(a: Side, b: Side) -> list[Finding]:
    ours, theirs = a.record, b.record
    found = [
        _compare_best_epoch(ours, theirs),
        *_compare_seeds(ours, theirs),
        *_compare_baselines(ours, theirs),
    ]
    for key, what, show in (
        ("disk_bytes", "{} on disk, bytes", show_count),
        ("checkpoint_sha256", "checksum of {}", shorten),
    ):
        for name in common_keys(ours[key], theirs[key]):
            values = ours[key][name], theirs[key][name]
            found.append(compare_counts(what.format(name), *values, show))
    return found


def _compare_best_epoch(a: dict, b: dict) -> Finding:
    counts = []
    for record in (a, b):
        images = record["images"]["valid"]
        best = max(row["valid_top1"] for row in record["history"])
        counts.append((round(best * images), images))
    note = f"best epoch, on {counts[0][1]:,}"
    if counts[0][1] != counts[1][1]:
        note += f" and {counts[1][1]:,}"
    return compare_shares("valid top-1", *counts, f"{note} images")


def _compare_seeds(a: dict, b: dict) -> list[Finding]:
    """Compare two trainings' means over seeds, by Welch's t-test.

    Records made before there were seeds have none.
    """
    what = "mean valid top-1 over seeds"
    first, second = a.get("seeds", []), b.get("seeds", [])
    top1 = [[row["valid_top1"] for row in rows] for rows in (first, second)]
    if max(map(len, top1)) < 2:  # ``valid top-1`` says all that is known
        return []
    if top1[0] == top1[1]:
        return [unchanged(what)]
    if min(map(len, top1)) < 2:
        return [unknown(what, "one seed has no spread")]
    shown = [
        "{:.4f} +- {:.4f}".format(*learning.seed_results(rows).values())
        for rows in (first, second)
    ]
    p = float(stats.ttest_ind(*top1, equal_var=False).pvalue)
    note = f"{len(first)} and {len(second)} seeds, Welch's t-test"
    return [compare_by_test(what, *shown, 1.0 if math.isnan(p) else p, note)]


def _compare_baselines(a: dict, b: dict) -> list[Finding]:
    """Compare the baselines on the split that scores; older records have none."""
    floors = [one.get("floors") for one in (a, b)]
    if None in floors:
        known = [one for one in floors if one]
        return [unknown("baselines", "one record has none")] if known else []
    found = []
    for name in BASELINES:
        counts = [
            (round(one[name] * one["images"][1]), one["images"][1]) for one in floors
        ]
        found.append(compare_shares(f"baseline {name}", *counts))
    return found


def _compare_pretrainings(a: Side, b: Side) -> list[Finding]:
    records = a.record, b.record
    counts = [
        (round(one["held_out_top1"] * one["held_out_images"]), one["held_out_images"])
        for one in records
    ]
    sums = [one["base_sha256"] for one in records]
    return [
        compare_shares("held-out top-1", *counts),
        compare_counts("checksum of the base", *sums, shorten),
    ]


# --- infer, ceilings ---


def _compare_inferences(a: Side, b: Side) -> list[Finding]:
    found = [
        compare_counts(what, a.record[key], b.record[key], show_count)
        for key, what in (("images", "images"), ("unreadable", "unreadable files"))
    ]
    tables = [_load_predictions(side) for side in (a, b)]
    if any(table is None for table in tables):
        return [*found, unknown("predictions", "the files of both are not there")]
    first, second = (table.set_index("path") for table in tables)
    common = first.index.intersection(second.index)
    if not len(common):
        return [*found, unknown("predictions", "no picture is in both files")]
    what, changed = "first classes", first.top1[common] != second.top1[common]
    if not changed.any():
        return [*found, unchanged(what)]
    told = f"{changed.sum()} of {len(common)} pictures in both have another"
    return [*found, Finding(what, "", "", BEYOND, told, exact=True)]


def _load_predictions(side: Side) -> pd.DataFrame | None:
    name = side.record.get("csv")  # older records do not name it
    if not name or not (side.folder / name).is_file():
        return None
    return pd.read_csv(side.folder / name, dtype=str, keep_default_na=False)


def _compare_ceilings(a: Side, b: Side) -> list[Finding]:
    """Compare the fastest products and copies, by the samples of the fastest shape."""
    note = other_machine(a.record, b.record)
    first, second = (_fastest(side.record["ceilings"]) for side in (a, b))
    found = []
    for what in common_keys(first, second):
        intervals = [
            (max(one), min(one), max(one)) for one in (first[what], second[what])
        ]
        found.append(compare_times(what, *intervals, "", note))
    return found


def _fastest(ceilings: dict) -> dict[str, list[float]]:
    """Return {what: samples of its fastest shape}."""
    products = {
        f"{kind} product, Tflop/s": max(by_shape.values(), key=max)
        for kind, by_shape in ceilings["products"].items()
    }
    return products | {"copy, GB/s": ceilings["copy_gbs"]}


BY_NOTEBOOK = {
    "evaluate": compare_evaluations,
    "finetune": _compare_trainings,
    "pretrain": _compare_pretrainings,
    "compare": compare_comparisons,
    "waterfall": compare_waterfalls,
    "ablate": compare_ablations,
    "plan": compare_plans,
    "infer": _compare_inferences,
    "ceilings": _compare_ceilings,
}
