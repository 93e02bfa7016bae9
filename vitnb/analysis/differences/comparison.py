"""Compare two records that hold many variants: compare, waterfall, ablate and plan.

Numbers within noise are counted; those beyond it are named.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vitnb import statistics, variants
from vitnb.analysis import comparison, plan_validation, waterfall
from vitnb.analysis.differences.sides import Side, other_images
from vitnb.analysis.differences.verdicts import (
    BEYOND,
    SAME,
    WITHIN,
    Finding,
    Interval,
    common_keys,
    compare_counts,
    compare_intervals,
    show_count,
    show_interval,
    unchanged,
    unknown,
)

Key = tuple[int, str]  # bits and kept part of a configuration

NAMED = 6  # configurations that are named

# --- compare, waterfall ---


def compare_comparisons(a: Side, b: Side) -> list[Finding]:
    """Compare the ratios to the baseline, failures, and KL to the baseline."""
    failed = [side.record["failed"] for side in (a, b)]
    answers = [side.record["answers"] for side in (a, b)]
    return [
        *_compare_ratios(*(_ratios(side.record) for side in (a, b))),
        _compare_reasons(*failed),
        *_compare_divergences(*answers),
    ]


@dataclass(frozen=True)
class Speed:
    """A ratio of times.

    Attributes:
        ratio: with its interval.
        df: degrees of freedom between processes; 0: one process of each.
    """

    ratio: Interval
    df: int

    @property
    def margin(self) -> float:
        """The share that the ratio of other processes may differ by."""
        return statistics.PAIR_MARGIN if self.df else statistics.SINGLE_MARGIN

    def describe(self) -> str:
        """Return what the ratio says, in words."""
        _, low, high = self.ratio
        if not statistics.outside_margin(low, high, self.df):
            return "no difference"
        return "faster" if high < 1 else "slower"


def _ratios(record: dict) -> dict[str, Speed]:
    """Return {what: ratio of times to the baseline's}, of what was measured."""
    table = comparison.ratios_to_baseline(comparison.ratio_table(record))
    table = table[(table.variant != variants.BASELINE) & table.ratio.notna()]
    return {
        f"{row.variant} / {variants.BASELINE} at batch {row.batch_size}": Speed(
            (row.ratio, row.low, row.high), row.df
        )
        for row in table.itertuples()
    }


def compare_waterfalls(a: Side, b: Side) -> list[Finding]:
    """Compare the ratio of every step's time to that of the step before, and failures.

    A step's ratio is one over its gain.
    """
    failed = [
        {
            f"{name} at batch {size}": why
            for size, reasons in side.record["failed"].items()
            for name, why in reasons.items()
        }
        for side in (a, b)
    ]
    steps = [_steps(side.record) for side in (a, b)]
    return [*_compare_ratios(*steps), _compare_reasons(*failed)]


def _steps(record: dict) -> dict[str, Speed]:
    """Return {what: ratio of times}; all steps of a waterfall run in one process."""
    table = waterfall.waterfall_table(record)
    return {
        f"{row.step} / the step before ({row.ladder}) at batch {row.batch_size}": Speed(
            (1 / row.gain, 1 / row.gain_high, _inverse(row.gain_low)), 0
        )
        for row in table[table.gain.notna()].itertuples()
    }


def _inverse(number: float) -> float:
    return 1 / number if number else float("inf")


def _compare_ratios(a: dict[str, Speed], b: dict[str, Speed]) -> list[Finding]:
    """Compare ratios of times by their intervals.

    A ratio within noise is named only if it is called faster in one record and slower,
    or not different, in the other.
    """
    found, within, same = [], 0, 0
    for what in common_keys(a, b):
        first, second = a[what], b[what]
        margin = max(first.margin, second.margin)
        one = compare_intervals(
            what, first.ratio, second.ratio, ".3f", "ratios, each in turns", margin
        )
        words = first.describe(), second.describe()
        if one.verdict == SAME:
            same += 1
        elif words[0] != words[1]:
            shown = f"{one.a} {words[0]}", f"{one.b} {words[1]}"
            found.append(Finding(what, *shown, one.verdict, one.note))
        elif one.verdict == BEYOND:
            found.append(one)
        else:
            within += 1
    if not common_keys(a, b):
        found.append(unknown("ratios of times", "no ratio is in both"))
    return [*found, *_count("other ratios of times", within, same, "intervals overlap")]


def _count(what: str, within: int, same: int, note: str) -> Iterable[Finding]:
    """Give the findings of numbers that are not named."""
    if within:
        yield Finding(f"{what} ({within})", "", "", WITHIN, note)
    if same:
        yield unchanged(f"{what} ({same})")


def _compare_reasons(a: dict[str, str], b: dict[str, str]) -> Finding:
    """Compare what could not run, and why."""
    if a == b:
        return unchanged("failures")
    shown = []
    for own, other in ((a, b), (b, a)):
        changed = {
            key: own.get(key) for key in own | other if own.get(key) != other.get(key)
        }
        shown.append("; ".join(f"{k}: {why or 'ran'}" for k, why in changed.items()))
    return unknown("failures", "what did not run has no numbers", *shown)


def _compare_divergences(a: dict, b: dict) -> list[Finding]:
    """Compare every variant's KL to the baseline of its own run."""
    found, within, same = [], 0, 0
    for name in common_keys(a, b):
        first, second = a[name]["kl_by_image"], b[name]["kl_by_image"]
        if first == second:
            same += 1
            continue
        intervals = [statistics.bootstrap_mean(one) for one in (first, second)]
        what = f"KL of {name} to {variants.BASELINE}"
        one = compare_intervals(what, *intervals, ".2g", "nats")
        if one.verdict == BEYOND:
            found.append(one)
        else:
            within += 1
    what = f"other variants' KL to {variants.BASELINE}"
    return [*found, *_count(what, within, same, "intervals overlap")]


# --- ablate, plan ---


def compare_ablations(a: Side, b: Side) -> list[Finding]:
    """Compare the KL of every configuration.

    On the same images the test is a paired t-test, corrected for the number of
    configurations (Holm). On others, intervals must not overlap.
    """
    first, second = (
        {(row["bits"], row["kept"]): row["kl_by_image"] for row in side.record["rows"]}
        for side in (a, b)
    )
    same_labels = a.record["labels"] == b.record["labels"]
    other = other_images(a.record, b.record, same_labels)
    common = common_keys(first, second)
    changed = [key for key in common if first[key] != second[key]]
    are_beyond = (_are_apart if other else _are_different)(changed, first, second)
    beyond = [key for key, so in zip(changed, are_beyond, strict=True) if so]
    how = other or f"paired t-tests on the same images, Holm for {len(changed)}"
    what = f"KL of {len(beyond)} of {len(common)} configurations"
    found = []
    if beyond:
        note = f"nats, {how}: {_name_largest(beyond, first, second)}"
        found.append(Finding(what, "", "", BEYOND, note))
    if alone := len(first) + len(second) - 2 * len(common):
        found.append(unknown(f"{alone} configurations", "only one record has them"))
    within, same = len(changed) - len(beyond), len(common) - len(changed)
    return [*found, *_count("other configurations' KL", within, same, how)]


def _are_different(changed: list[Key], a: dict, b: dict) -> list[bool]:
    """Test configurations on the same images."""
    ps = statistics.holm([_paired_pvalue(a[key], b[key]) for key in changed])
    return [p < 1 - statistics.LEVEL for p in ps]


def _are_apart(changed: list[Key], a: dict, b: dict) -> list[bool]:
    """Tell which configurations' intervals do not overlap."""
    intervals = [
        [statistics.bootstrap_mean(one[key]) for one in (a, b)] for key in changed
    ]
    return [compare_intervals("", *two, ".2g").verdict == BEYOND for two in intervals]


def _name_largest(keys: list[Key], a: dict, b: dict) -> str:
    """Name the configurations whose KL changed by the largest factors."""
    means = {key: (np.mean(a[key]), np.mean(b[key])) for key in keys}

    def factor(key: Key) -> float:
        smaller, larger = sorted(means[key])
        return larger / smaller if smaller else np.inf

    largest = sorted(keys, key=factor, reverse=True)[:NAMED]
    told = [
        "{1} kept at {0} bits {2:.2g} -> {3:.2g}".format(*key, *means[key])
        for key in largest
    ]
    if others := len(keys) - len(largest):
        told.append(f"and {others} more")
    return "; ".join(told)


def _paired_pvalue(a: list[float], b: list[float]) -> float:
    """Return the two-sided p-value of equal means on the same images."""
    return min(1.0, 2 * min(statistics.paired_t_pvalue(*ab) for ab in ((a, b), (b, a))))


def compare_plans(a: Side, b: Side) -> list[Finding]:
    """Compare the Linears that plans keep, their bytes, and their cut of the KL."""
    plans = [side.record["plan"] for side in (a, b)]
    found = [_compare_widths(a.record, b.record)]
    for key, what in (
        ("extra_bytes", "bytes beyond NF4"),
        ("uniform_bytes", "bytes of NF4"),
    ):
        found.append(compare_counts(what, *(plan[key] for plan in plans), show_count))
    sizes = [side.record["disk_bytes"] for side in (a, b)]
    found.append(compare_counts("bytes on disk", *sizes, show_count))
    return [*found, _compare_cuts(a.record, b.record)]


def _compare_widths(a: dict, b: dict) -> Finding:
    """Name the Linears that one plan keeps in more bits than the other."""
    widths = [one["plan"]["widths"] for one in (a, b)]
    if widths[0] == widths[1]:
        return unchanged("Linears kept")
    shown = []
    for record, own, other in ((a, *widths), (b, *widths[::-1])):
        by_bits: dict[int, list[str]] = {}
        for linear, bits in own.items():
            if other.get(linear) != bits:
                by_bits.setdefault(bits, []).append(record["parts"][linear])
        texts = [f"{', '.join(one)} in {bits} bits" for bits, one in by_bits.items()]
        shown.append("; ".join(texts) or "none")
    both = sum(widths[1].get(linear) == bits for linear, bits in widths[0].items())
    return Finding("Linears kept", *shown, BEYOND, f"{both} in both", exact=True)


def _compare_cuts(a: dict, b: dict) -> Finding:
    """Compare the share of uniform NF4's KL that the plans cut."""
    what = "cut of NF4's KL"
    if a["proof"] == b["proof"]:
        return unchanged(what)
    images = [plan_validation.validation_images(one) for one in (a, b)]
    if images[0] != images[1]:
        return unknown(what, f"A on {images[0]}, B on {images[1]}")
    results = [plan_validation.validate(one) for one in (a, b)]
    cuts = [(one["cut"], one["low"], one["high"]) for one in results]
    found = compare_intervals(what, *cuts, ".1%", f"on {images[0]}")
    shown = [
        f"{show_interval(cut, '.1%')} {'met' if one['met'] else 'missed'} the target"
        for cut, one in zip(cuts, results, strict=True)
    ]
    return Finding(what, *shown, found.verdict, found.note)
