"""Differences as text for a terminal.

Only what differs has a line. A line names what is the same, and another what an older
record does not hold.
"""

from textwrap import wrap

from vitnb.analysis.differences.pairs import Differences, Pair
from vitnb.analysis.differences.sides import Values
from vitnb.analysis.differences.verdicts import (
    BEYOND,
    LAUNCH_MARGIN,
    SAME,
    UNKNOWN,
    WITHIN,
    Finding,
)

WIDTH = 100
NAMED = 6  # records, and differences of each, that the last sentence names
COLUMN = len(BEYOND)

TIMES = (
    "Two runs are not timed in turns: their p50s are called beyond noise only if the "
    f"intervals do not overlap and they differ by more than {LAUNCH_MARGIN:.0%}. "
    "'vitnb compare' times variants in turns."
)
LABELS = (
    "Older records do not name their images: of one study's data, those with the same "
    "labels are taken for the same."
)


def format_differences(found: Differences) -> str:
    """Return what was asked, what ran and what was found, then a summary."""
    lines = [f"A: {found.a}", f"B: {found.b}"]
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            lines += _wrap(f"only in {side}: ", names)
    many = len(found.pairs) > 1
    for title in ("asked", "ran"):
        values = {pair.name: getattr(pair, title) for pair in found.pairs}
        lines += ["", title, *_value_lines(values)]
    lines += ["", "found"]
    for names, findings in _alike(found.pairs):
        if many:
            lines += _wrap("  ", names)
        lines += _finding_lines(findings, "    " if many else "  ")
    every = [one for pair in found.pairs for one in pair.found]
    if any(one.what.startswith("p50") and one.verdict != SAME for one in every):
        lines += ["", *wrap(TIMES, WIDTH)]
    if any(_is_paired_by_labels(pair) for pair in found.pairs):
        lines += ["", *wrap(LABELS, WIDTH)]
    return "\n".join([*lines, "", *wrap(summarize(found), WIDTH)])


# --- What was asked, what ran ---


def _value_lines(by_pair: dict[str, Values]) -> list[str]:
    """Return the lines of values, those of the same pairs together."""
    groups: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
    rows: dict[tuple, list[str]] = {}
    for pair, values in by_pair.items():
        for name, ab in values.differ.items():
            rows.setdefault((name, ab), []).append(pair)
    for (name, ab), pairs in rows.items():
        groups.setdefault(tuple(pairs), []).append((name, *ab))
    lines = []
    for pairs in sorted(groups, key=len, reverse=True):
        indent = "  "
        if len(by_pair) > 1:
            lines += _wrap("  ", [_name_pairs(list(pairs), list(by_pair))])
            indent = "    "
        widest = max(len(name) for name, *_ in groups[pairs])
        for name, a, b in groups[pairs]:
            lines += _hang(f"{indent}{name:{widest}}  ", f"{a} -> {b}")
    differ = {name for name, _ in rows}
    same = _names(by_pair, "same", differ)
    for title, names in (
        ("same", same),
        ("not in the older record", _names(by_pair, "unknown", differ | set(same))),
    ):
        if names:
            lines += _wrap(f"  {title}: ", _fold(names))
    return lines


def _name_pairs(pairs: list[str], every: list[str]) -> str:
    """Name some of all pairs, shortly."""
    others = [name for name in every if name not in pairs]
    if not others:
        return "both records" if len(every) == 2 else f"all {len(every)} records"
    if len(others) < len(pairs) and len(others) <= 2:
        return f"all but {' and '.join(others)}"
    return ", ".join(pairs)


def _names(by_pair: dict[str, Values], kind: str, but: set[str]) -> list[str]:
    names = [name for values in by_pair.values() for name in getattr(values, kind)]
    return [name for name in dict.fromkeys(names) if name not in but]


def _fold(names: list[str]) -> list[str]:
    """Return names, of those with a first word in common only their number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(" ")[0], []).append(name)
    folded = []
    for word, group in groups.items():
        if len(group) <= 3:
            folded += group
            continue
        beginning = word.removesuffix("'s")
        folded.append(f"{beginning} ({len(group)} values)")
    return folded


# --- What was found ---


def _alike(pairs: list[Pair]) -> list[tuple[list[str], list[Finding]]]:
    """Return pairs with findings; those without a difference come last, together."""
    differ = [([one.name], one.found) for one in pairs if not _all_same(one)]
    same = [one.name for one in pairs if _all_same(one)]
    if same:
        differ.append((same, [Finding("all results", "", "", SAME)]))
    return differ


def _all_same(pair: Pair) -> bool:
    return all(one.verdict == SAME for one in pair.found)


def _finding_lines(findings: list[Finding], indent: str) -> list[str]:
    lines = []
    for verdict in (BEYOND, WITHIN):
        start = f"{indent}{verdict:{COLUMN}}  "
        counts = [one for one in findings if one.exact and one.verdict == verdict]
        for one in findings:
            if one.verdict == verdict and not one.exact:
                lines += _hang(start, _describe(one))
        if counts:
            lines += _hang(f"{start}exact: ", "; ".join(map(_describe, counts)))
    reasons: dict[str, list[str]] = {}
    for one in findings:
        if one.verdict == UNKNOWN:
            told = f"{one.what} {one.a} -> {one.b}" if one.a or one.b else one.what
            reasons.setdefault(one.note, []).append(told)
    for why, names in reasons.items():
        lines += _hang(f"{indent}{UNKNOWN}: ", f"{'; '.join(names)}: {why}")
    if same := [one.what for one in findings if one.verdict == SAME]:
        lines += _wrap(f"{indent}same: ", same)
    return lines


def _describe(one: Finding) -> str:
    values = f" {one.a} -> {one.b}" if one.a or one.b else ""
    return f"{one.what}{values}" + (f" [{one.note}]" if one.note else "")


def _is_paired_by_labels(pair: Pair) -> bool:
    told = ("McNemar", "same images")
    tested = any(word in one.note for one in pair.found for word in told)
    return tested and any(name.startswith("images") for name in pair.ran.unknown)


# --- Summary ---


def summarize(found: Differences) -> str:
    """Return the sentence on what is the same, and what differs beyond noise."""
    count = len(found.pairs)
    alike = [pair for pair in found.pairs if not pair.asked.differ]
    if count > 1:
        question = f"{len(alike)} of {count} records have the same question"
    else:
        question = "The question is the same" if alike else "The question differs"
    every = [one for pair in found.pairs for one in pair.found]
    beyond = {
        pair.name: [
            one.what for one in pair.found if one.verdict == BEYOND and not one.exact
        ]
        for pair in found.pairs
    }
    exact = sum(one.exact and one.verdict == BEYOND for one in every)
    unknown = sum(one.verdict == UNKNOWN for one in every)
    differs = any(p.asked.differ or p.ran.differ for p in found.pairs) or any(
        one.verdict != SAME for one in every
    )
    if not differs and not found.only_a and not found.only_b:
        return f"{question}; nothing differs."
    parts = [question, _count_differences(beyond)]
    if exact:
        parts.append(f"exact values that differ: {exact}")
    if unknown:
        parts.append(f"values that cannot be compared: {unknown}")
    return "; ".join(parts) + "."


def _count_differences(beyond: dict[str, list[str]]) -> str:
    """Count the differences beyond noise, and name them record by record."""
    count = sum(map(len, beyond.values()))
    if not count:
        return "no difference is beyond noise"
    named = []
    for record, names in beyond.items():
        if names:
            shown = _join(names, NAMED)
            named.append(f"{record} ({shown})" if len(beyond) > 1 else shown)
    verb = "difference is" if count == 1 else "differences are"
    return f"{count} {verb} beyond noise: {_join(named, NAMED)}"


def _join(names: list[str], most: int) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return ", ".join(names)


def _wrap(start: str, names: list[str]) -> list[str]:
    return _hang(start, ", ".join(names))


def _hang(start: str, text: str) -> list[str]:
    """Return lines that begin with ``start``, and continue below its end."""
    inner = " " * min(len(start), 30)
    return wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=inner,
        break_long_words=False,
        break_on_hyphens=False,
    )
