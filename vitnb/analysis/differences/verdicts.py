"""Tell a difference between two runs from noise, by a rule for each kind of number.

Two runs are no experiment: they were not made in turns, and perhaps not on one machine.
So a rule calls a difference beyond noise only where it has a test or an interval to say
so. A count, such as bytes, has no noise: it is the same, or it differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from scipy import stats

from vitnb import statistics

SAME, WITHIN, BEYOND = "same", "within noise", "beyond noise"
UNKNOWN = "cannot be compared"

# Two launches of one program may differ by this much, whatever their samples say.
LAUNCH_MARGIN = statistics.SINGLE_MARGIN

Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Finding:
    """One number of two records, and what can be said of its difference.

    Attributes:
        what: names the number.
        a, b: its values, as text.
        verdict: SAME, WITHIN, BEYOND or UNKNOWN; empty before ``correct_tests``.
        note: how the two were compared, or why they cannot be.
        exact: the number is a count, and has no noise.
        p: of a test of the two being equal; None without a test.
        least: the smallest p that the test can give on as many images that differ.
    """

    what: str
    a: str
    b: str
    verdict: str
    note: str = ""
    exact: bool = False
    p: float | None = None
    least: float = 0.0


def unchanged(what: str) -> Finding:
    """Return the finding of two equal results."""
    return Finding(what, "", "", SAME)


def unknown(what: str, why: str, a: str = "", b: str = "") -> Finding:
    """Return the finding of what cannot be compared, with the reason."""
    return Finding(what, a, b, UNKNOWN, why)


def compare_counts(what: str, a, b, show: Callable = str, note: str = "") -> Finding:
    """Compare two numbers without noise: any difference is one."""
    if a == b:
        return unchanged(what)
    return Finding(what, show(a), show(b), BEYOND, note, exact=True)


def compare_intervals(
    what: str,
    a: Interval,
    b: Interval,
    digits: str,
    note: str = "",
    margin: float = 0.0,
) -> Finding:
    """Compare two numbers by their intervals: those that overlap are within noise.

    This misses small differences that a paired test would find, and invents none.

    Args:
        digits: format of a number, such as ``.4f``.
        margin: share by which the numbers must differ besides, as there is noise that
            the intervals do not hold.
    """
    if a == b:
        return unchanged(what)
    are_apart = a[1] > b[2] or b[1] > a[2]
    larger, smaller = max(a[0], b[0]), min(a[0], b[0])
    verdict = BEYOND if are_apart and larger > smaller * (1 + margin) else WITHIN
    shown = [show_interval(one, digits) for one in (a, b)]
    return Finding(what, *shown, verdict, note)


def compare_times(
    what: str, a: Interval, b: Interval, unit: str, note: str = ""
) -> Finding:
    """Compare times, or rates, of two runs that were not timed in turns.

    A difference is beyond noise if the intervals do not overlap, and if it is larger
    than LAUNCH_MARGIN: the samples of a launch do not show how far launches differ.
    """
    told = [unit, f"{max(a[0], b[0]) / min(a[0], b[0]):.2f}x", note]
    note = ", ".join(part for part in told if part)
    return compare_intervals(what, a, b, ".4g", note, LAUNCH_MARGIN)


def compare_shares(
    what: str, a: tuple[int, int], b: tuple[int, int], note: str = ""
) -> Finding:
    """Compare two shares of right answers by Wilson's intervals.

    Args:
        a, b: (right answers, images).
    """
    intervals = [
        (right / images, *statistics.wilson(right, images)) for right, images in (a, b)
    ]
    return compare_intervals(what, *intervals, ".4f", note)


def compare_by_test(
    what: str, a: str, b: str, p: float, note: str, least: float = 0.0
) -> Finding:
    """Return a finding whose verdict follows from its p-value.

    ``correct_tests`` gives the verdict, when all tests beside it are known.
    """
    return Finding(what, a, b, "", note, p=p, least=least)


def correct_tests(findings: list[Finding]) -> list[Finding]:
    """Give the verdicts of tests, corrected for their number (Holm).

    Of all tests together, chance alone calls one or more beyond noise in 5% of cases.
    """
    tested = [found for found in findings if found.p is not None]
    ps = [found.p for found in tested]
    judged = iter(
        [
            _judge_test(found, corrected, index, ps)
            for index, (found, corrected) in enumerate(
                zip(tested, statistics.holm(ps), strict=True)
            )
        ]
    )
    return [found if found.p is None else next(judged) for found in findings]


def _judge_test(
    found: Finding, corrected: float, index: int, ps: list[float]
) -> Finding:
    note = f"{found.note}, p = {found.p:.2g}"
    if len(ps) > 1:
        note += f" ({corrected:.2g} corrected for {len(ps)} tests)"
    if corrected < 1 - statistics.LEVEL:
        return replace(found, verdict=BEYOND, note=note)
    if not statistics.could_be_significant(index, ps, found.least):
        note += ", too few images differ to tell"
    return replace(found, verdict=WITHIN, note=note)


def interval_pvalue(value: float, low: float, high: float) -> float:
    """Return the two-sided p-value of a difference, from its interval.

    The value is taken to be normal, with the interval at statistics.LEVEL.
    """
    spread = (high - low) / 2 / stats.norm.ppf((1 + statistics.LEVEL) / 2)
    if spread == 0:
        return float(value == 0)
    return float(2 * stats.norm.sf(abs(value) / spread))


def show_interval(interval: Interval, digits: str) -> str:
    """Return a number with its interval as text."""
    value, low, high = interval
    return f"{value:{digits}} ({low:{digits}} to {high:{digits}})"


def show_count(number: int | None) -> str:
    """Return a number, such as one of bytes, as text."""
    return "-" if number is None else f"{number:,}"


def common_keys(a: dict, b: dict) -> list:
    """Return the keys that both have, in a's order."""
    return [key for key in a if key in b]
