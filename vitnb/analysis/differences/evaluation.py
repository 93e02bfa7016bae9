"""Compare two evaluate records: answers, memory and times.

Scores of the same images are tested image by image. Of other images, and for times,
there are intervals alone.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax

from vitnb import statistics
from vitnb.analysis import accuracy, latency
from vitnb.analysis.differences.sides import Side, other_images, other_machine
from vitnb.analysis.differences.verdicts import (
    BEYOND,
    WITHIN,
    Finding,
    Interval,
    common_keys,
    compare_by_test,
    compare_counts,
    compare_intervals,
    compare_shares,
    compare_times,
    interval_pvalue,
    show_count,
    unchanged,
    unknown,
)
from vitnb.analysis.summary import by_batch_size
from vitnb.records.reader import load_array

# How far rounding moves a logit, by the type of computing: the spacing of numbers
# between 1 and 2, and how many of them. Engines in 16 bits differ by one or two (see
# measure.accuracy), sums in float32 by some hundred.
ROUNDING = {"bfloat16": (2**-7, 2), "float16": (2**-10, 2), "float32": (2**-23, 1000)}

BYTES = {
    "bytes on disk": "disk_bytes",
    "bytes resident": "resident_bytes",
    "bytes of scratch": "scratch_bytes",
}


def compare_evaluations(a: Side, b: Side) -> list[Finding]:
    """Compare the results of two evaluate records."""
    return [*_compare_answers(a, b), *_compare_memory(a, b), *_compare_p50(a, b)]


# --- Answers ---


def _compare_answers(a: Side, b: Side) -> list[Finding]:
    first, second = a.record["predictions"], b.record["predictions"]
    same_labels = first["labels"] == second["labels"]
    if other := other_images(a.record, b.record, same_labels):
        found = [_compare_shares_right(first, second, k, other) for k in (1, 5)]
        intervals = [_f1_interval(one) for one in (first, second)]
        found.append(compare_intervals("F1", *intervals, ".4f", other))
        return [*found, unknown("KL of B to A", other)]
    return [
        _compare_right(first, second, 1),
        _compare_right(first, second, 5),
        _compare_f1(first, second),
        _compare_logits(a, b),
    ]


def _compare_shares_right(a: dict, b: dict, k: int, note: str) -> Finding:
    """Compare top-k accuracy on different images."""
    right = [accuracy.is_correct(one, k) for one in (a, b)]
    counts = [(int(one.sum()), len(one)) for one in right]
    return compare_shares(f"top-{k}", *counts, note)


def _compare_right(a: dict, b: dict, k: int) -> Finding:
    """Compare top-k accuracy on the same images, with McNemar's test."""
    first, second = accuracy.is_correct(a, k), accuracy.is_correct(b, k)
    classes = [accuracy.first_choices(one) for one in (a, b)]
    changed = np.not_equal(*classes) if k == 1 else first != second
    if not changed.any():
        return unchanged(f"top-{k}")
    points, low, high = statistics.paired_points(second, first)
    told = f"{points:+.2f} points ({low:+.2f} to {high:+.2f})"
    if k == 1:
        told += f", {changed.sum()} of {len(changed)} first classes changed"
    values = [f"{one.mean():.4f}" for one in (first, second)]
    p = statistics.mcnemar(first, second)[2]
    least = statistics.least_mcnemar_pvalue(int((first != second).sum()))
    return compare_by_test(f"top-{k}", *values, p, f"{told}, McNemar", least)


def _compare_f1(a: dict, b: dict) -> Finding:
    if accuracy.first_choices(a) == accuracy.first_choices(b):
        return unchanged("F1")
    values = [accuracy.scores(one)["f1"] for one in (a, b)]
    first, second = weighted_f1(a), weighted_f1(b)
    images = np.arange(len(a["labels"]))
    low, high = statistics.bootstrap(images, lambda at: second(at) - first(at))
    difference = values[1] - values[0]
    note = f"{difference:+.4f} ({low:+.4f} to {high:+.4f}), bootstrap"
    p = interval_pvalue(difference, low, high)
    return compare_by_test("F1", *(f"{value:.4f}" for value in values), p, note)


def _f1_interval(predictions: dict) -> Interval:
    images = np.arange(len(predictions["labels"]))
    ends = statistics.bootstrap(images, weighted_f1(predictions))
    return (accuracy.scores(predictions)["f1"], *ends)


def weighted_f1(predictions: dict) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that maps images, [draws, n], to their weighted F1, [draws].

    It equals scikit-learn's, and takes a thousand draws of images in a moment.
    """
    labels = np.asarray(predictions["labels"])
    answers = np.asarray(accuracy.first_choices(predictions))
    classes = int(max(labels.max(), answers.max())) + 1

    def count(values: np.ndarray) -> np.ndarray:
        return np.bincount(values, minlength=classes)

    def score(drawn: np.ndarray) -> float:
        true, given = labels[drawn], answers[drawn]
        support, right = count(true), count(true[true == given])
        of_class = 2 * right / np.maximum(support + count(given), 1)
        return float((of_class * support).sum() / len(drawn))

    return lambda draws: np.array([score(drawn) for drawn in draws.astype(int)])


def _compare_logits(a: Side, b: Side) -> Finding:
    """Return the KL divergence of B's answers to A's, where both arrays are there."""
    what = "KL of B to A"
    digests = [side.record["arrays"].get(side.record["logits"]) for side in (a, b)]
    if digests[0] and digests[0] == digests[1]:
        return unchanged("logits")
    first, second = _load_logits(a), _load_logits(b)
    if first is None or second is None:
        return unknown(what, "the logits of both are not there")
    if first.shape != second.shape:
        return unknown(what, "other classes")
    if np.array_equal(first, second):
        return unchanged("logits")
    p, q = log_softmax(first, axis=-1), log_softmax(second, axis=-1)
    value, low, high = statistics.bootstrap_mean((np.exp(p) * (p - q)).sum(-1))
    largest = float(np.abs(first - second).max())
    allowed = max(_rounding(one, side) for one, side in ((first, a), (second, b)))
    note = (
        f"{value:.2g} nats ({low:.2g} to {high:.2g}): "
        f"a logit differs by {largest:.2g} at most, and by rounding {allowed:.2g}"
    )
    return Finding(what, "", "", WITHIN if largest <= allowed else BEYOND, note)


def _load_logits(side: Side) -> np.ndarray | None:
    """Return float64 [images, classes]; None if the file is not that of the record."""
    name = side.record["logits"]
    if not (side.folder / name).is_file():
        return None
    array = load_array(side.folder, side.record, name)
    return None if array is None else array.astype(np.float64)


def _rounding(logits: np.ndarray, side: Side) -> float:
    """Return how far rounding alone moves a logit, in the type of computing."""
    spacing, numbers = ROUNDING[side.record["dtype"]]
    return float(numbers * spacing * 2.0 ** np.floor(np.log2(np.abs(logits).max())))


# --- Memory and times ---


def _compare_memory(a: Side, b: Side) -> list[Finding]:
    found = [
        compare_counts(what, a.record[key], b.record[key], show_count)
        for what, key in BYTES.items()
    ]
    first, second = by_batch_size(a.record["memory"]), by_batch_size(b.record["memory"])
    for size in common_keys(first, second):
        peaks = [one[size]["allocator_peak_bytes"] for one in (first, second)]
        what = f"allocator peak at batch {size}"
        found.append(compare_counts(what, *peaks, show_count))
        what = f"driver peak at batch {size}"
        peaks = [one[size]["driver_peak_bytes"] for one in (first, second)]
        if peaks[0] == peaks[1]:
            found.append(unchanged(what))
        else:
            why = "read once, so its noise is not known"
            found.append(unknown(what, why, *map(show_count, peaks)))
    return found


def _compare_p50(a: Side, b: Side) -> list[Finding]:
    note = other_machine(a.record, b.record)
    first, second = (
        by_batch_size(a.record["timings"]),
        by_batch_size(b.record["timings"]),
    )
    found = []
    for size in common_keys(first, second):
        what = f"p50 at batch {size}"
        samples = [latency.device_samples(one[size]) for one in (first, second)]
        medians = [latency.percentiles(one)["p50"] for one in samples]
        if samples[0] == samples[1]:
            found.append(unchanged(what))
        elif None in medians:
            found.append(unknown(what, "too few samples for an interval"))
        else:
            found.append(compare_times(what, *medians, "ms", note))
    return found
