"""Compare variants by interleaved times, and recommend a variant for each need.

First the tables of a compare record: times, ratios of every pair, ratios to the
baseline. Then what follows from these tables: recommendations, and their summary in two
sentences.
"""

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pandas as pd

from vitnb import statistics, variants

TIME_COLUMNS = ["variant", "batch_size", "engine_ran", "p50_ms", "low", "high"]
TIME_COLUMNS += ["samples"]
RATIO_COLUMNS = ["a", "b", "batch_size", "a_ran", "b_ran", "ratio", "low", "high"]
RATIO_COLUMNS += ["samples", "df", "p"]

# Targets of the source study against its fp32 baseline: at least this much smaller and
# faster, at most this many points of top-1 lost.
TARGET_SMALLER, TARGET_FASTER, TARGET_POINTS = 4.0, 2.0, 3.0

# --- Tables of a compare record ---


Blocks = dict[str, list[list[float]]]  # {variant: [rounds][forwards] milliseconds}


def pair_ratio(a: list[list[float]], b: list[list[float]]) -> statistics.Ratio:
    """Return the ratio of the times of one process each, in blocks of the same rounds.

    A block counts with its median.
    """
    return statistics.signed_rank_ratio(np.median(a, axis=1), np.median(b, axis=1))


def pair_ratios(
    blocks: Blocks, turns: dict[str, list[int]] | None
) -> dict[tuple[str, str], statistics.Ratio]:
    """Return the ratio a / b of every pair at one batch size, {(a, b): ratio}.

    Rounds of one process count as one cluster, see ``ProcessTimes.ratio``. Without
    several processes of a variant, the interval holds the noise of the rounds alone.

    Args:
        blocks: in the same rounds.
        turns: {variant: [rounds] index of the process}; None: not known.
    """
    pairs = list(permutations(blocks, 2))
    if turns is None or all(len(set(turns[name])) == 1 for name in blocks):
        return {(a, b): pair_ratio(blocks[a], blocks[b]) for a, b in pairs}
    medians = {name: np.median(some, axis=1) for name, some in blocks.items()}
    fitted = statistics.fit_process_times(medians, turns)
    return {(a, b): fitted.ratio(a, b) for a, b in pairs}


def _names(record: dict) -> list[str]:
    """Return the variants of a record in order, then its external peers."""
    asked = record["asked"]
    return variants.sort_names(asked["variants"]) + asked["peers"]


def engine_that_ran(record: dict, size: str, name: str) -> str | None:
    """Return the engine that ran at a batch size; None if none did."""
    return record["warm_up"][size].get(name, {}).get("engine_ran")


def time_table(record: dict) -> pd.DataFrame:
    """Return the p50 of each variant and peer over all its timed forwards.

    The interval is at 95%. What failed has blanks. ``engine_ran`` is the engine that
    ran at this batch size.
    """
    rows = []
    for size, blocks in record["blocks_ms"].items():
        for name in _names(record):
            row = {"variant": name, "batch_size": int(size), "samples": 0}
            if name in blocks:
                samples = np.concatenate(blocks[name])
                ((p50, low, high),) = statistics.percentiles(samples, [0.5])
                row |= {"p50_ms": p50, "low": low, "high": high}
                row["engine_ran"] = engine_that_ran(record, size, name)
                row["samples"] = len(samples)
            rows.append(row)
    return pd.DataFrame(rows, columns=TIME_COLUMNS)


def ratio_table(record: dict) -> pd.DataFrame:
    """Return the ratio of times a / b of every pair at every batch size.

    The interval is at statistics.PAIR_LEVEL. A pair with a failed member has blanks.
    ``df`` are degrees of freedom between processes; 0: one process of each, no p-value.
    ``a_ran`` and ``b_ran`` are the engines that ran at this batch size.
    """
    rows = []
    for size, blocks in record["blocks_ms"].items():
        turns = record["turns"] and record["turns"][size]
        ratios = pair_ratios(blocks, turns)
        for b, a in combinations(_names(record), 2):
            row = {"a": a, "b": b, "batch_size": int(size), "samples": 0}
            if (a, b) in ratios:
                ratio = ratios[a, b]
                row |= {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}
                row |= {"samples": ratio.samples, "df": ratio.df, "p": ratio.p}
                row["a_ran"] = engine_that_ran(record, size, a)
                row["b_ran"] = engine_that_ran(record, size, b)
            rows.append(row)
    return pd.DataFrame(rows, columns=RATIO_COLUMNS)


def ratios_to_baseline(
    table: pd.DataFrame, baseline: str = variants.BASELINE
) -> pd.DataFrame:
    """Return the ratios of all variants to one of them, whose own ratio is 1.

    Returns:
        Columns variant, batch_size, ratio, low, high, df.
    """
    straight = table[table.b == baseline].rename(columns={"a": "variant"})
    turned = table[table.a == baseline].rename(columns={"b": "variant"})
    turned = turned.assign(
        ratio=1 / turned.ratio, low=1 / turned.high, high=1 / turned.low
    )
    columns = ["variant", "batch_size", "ratio", "low", "high", "df"]
    itself = pd.DataFrame({"batch_size": sorted(table.batch_size.unique())})
    itself = itself.assign(variant=baseline, ratio=1.0, low=1.0, high=1.0, df=0)
    return pd.concat(
        [itself[columns], straight[columns], turned[columns]], ignore_index=True
    )


def describe_speed(row) -> str:
    """Describe a ratio of times, for instance ``1.31x faster (1.28 to 1.35)``."""
    if row.variant == variants.BASELINE:
        return "the baseline"
    if not row.low:
        return "too few rounds to tell"
    if not statistics.outside_margin(row.low, row.high, row.df):
        interval = f"({1 / row.high:.2f} to {1 / row.low:.2f})"
        beyond = "noise" if row.df else "what one process of each can show"
        return f"no difference beyond {beyond} {interval}"
    if row.ratio < 1:
        interval = f"({1 / row.high:.2f} to {1 / row.low:.2f})"
        return f"{1 / row.ratio:.2f}x faster {interval}"
    return f"{row.ratio:.2f}x slower ({row.low:.2f} to {row.high:.2f})"


def same_program_notes(summary: pd.DataFrame) -> list[str]:
    """Name the variants that differ in name alone.

    Their weights, engine and attention kernel that ran are the same, on one device. An
    engine may fall back at one batch size and not at another.
    """
    ok = summary[summary.status == "ok"]
    alike: dict[tuple, set[int]] = {}  # (names, engine, weights, kernel): batch sizes
    keys = ["weights", "engine_ran", "attention_ran", "batch_size", "device"]
    for (weights, engine, kernel, size, _), group in ok.groupby(keys):
        names = tuple(sorted(group.variant.unique()))
        if len(names) > 1:
            alike.setdefault((names, engine, weights, kernel), set()).add(size)
    notes = []
    for (names, engine, weights, kernel), sizes in alike.items():
        known = set(ok[ok.variant.isin(names)].batch_size)
        where = f" at batch {', '.join(map(str, sorted(sizes)))}"
        notes.append(
            f"{' and '.join(names)} ran the same engine ({engine}) and attention "
            f"kernel ({kernel}, {weights} weights){'' if sizes == known else where}: "
            "they cannot be compared, a difference between them is noise."
        )
    return notes


# --- Recommendations ---


def recommend(
    summary: pd.DataFrame, ratios: pd.DataFrame, compared: pd.DataFrame
) -> list[dict]:
    """Recommend a variant for each need, at each batch size.

    Args:
        summary: see ``summary.summary_table``.
        ratios: see ``ratios_to_baseline``.
        compared: see ``accuracy.paired_comparison``.

    Returns:
        A row for each need; empty without a comparison. Differences inside the noise
        are called neither gain nor loss.
    """
    ok = summary[summary.status == "ok"].merge(ratios, on=["variant", "batch_size"])
    verdicts = compared[["variant", "points", "verdict"]]
    ok = ok.merge(verdicts, on="variant").fillna({"points": 0.0})
    rows = []
    for batch_size, group in ok.groupby("batch_size"):
        baseline = group[group.variant == variants.BASELINE]
        if baseline.empty:
            continue
        group = group.assign(smaller=baseline.iloc[0].disk_mb / group.disk_mb)
        for need, row in _best_by_need(group).items():
            rows.append(_recommendation(int(batch_size), need, row))
    return rows


def _best_by_need(group: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the best variant at one batch size, by need."""
    near = group[group.points >= -TARGET_POINTS]
    not_worse = group[~group.verdict.str.startswith("worse")]
    return {
        "the fastest within 3 points": near.sort_values("ratio").iloc[0],
        "the smallest within 3 points": near.sort_values(["disk_mb", "ratio"]).iloc[0],
        "the least memory while running": near.sort_values("peak_mb").iloc[0],
        "the fastest that is not worse": not_worse.sort_values("ratio").iloc[0],
    }


def _recommendation(batch_size: int, need: str, row: pd.Series) -> dict:
    met = {
        f"{TARGET_SMALLER:g}x smaller": row.smaller >= TARGET_SMALLER,
        f"{TARGET_FASTER:g}x faster": 1 / row.ratio >= TARGET_FASTER,
        f"within {TARGET_POINTS:g} points": row.points >= -TARGET_POINTS,
    }
    return {
        "batch size": batch_size,
        "need": need,
        "variant": row.variant,
        "smaller": f"{row.smaller:.1f}x",
        "speed against fp32": describe_speed(row),
        "top-1": row.verdict,
        "targets met": ", ".join(t for t, hit in met.items() if hit) or "none",
        "targets missed": ", ".join(t for t, hit in met.items() if not hit) or "none",
    }


def recommended_variant(recommendations: list[dict]) -> str | None:
    """Return the variant that is recommended for most needs; None without any.

    Of equals, the first recommended counts.
    """
    counts = Counter(row["variant"] for row in recommendations)
    return counts.most_common(1)[0][0] if counts else None


def describe_answer(
    recommendations: list[dict],
    summary: pd.DataFrame,
    ratios: pd.DataFrame,
    compared: pd.DataFrame,
) -> list[str]:
    """Answer a study's question in two sentences.

    The first sentence names the recommended variant, its size and its accuracy. The
    second gives its speed against the baseline at each batch size. Without a
    comparison, the sentences say so and name the smallest variant.

    Args: see ``recommend``.
    """
    name = recommended_variant(recommendations)
    if name is None:
        return _answer_without_comparison(summary, compared)
    needs = sum(row["variant"] == name for row in recommendations)
    share = f"{needs} of the {len(recommendations)} needs"
    if name == variants.BASELINE:
        return [
            f"{name}, the baseline, is the best choice for {share} below.",
            "No other variant wins as often: the tables show what each of them saves.",
        ]
    rows = ratios[(ratios.variant == name) & ratios.ratio.notna()]
    speeds = [
        f"{describe_speed(row)} at batch {row.batch_size}" for row in rows.itertuples()
    ]
    return [
        f"{name} is the best choice for {share} below: {_describe_size(name, summary)}"
        f"{_describe_accuracy(name, compared)}.",
        f"Speed against {variants.BASELINE}, timed in turns: {', '.join(speeds)}.",
    ]


def _answer_without_comparison(
    summary: pd.DataFrame, compared: pd.DataFrame
) -> list[str]:
    """Say what is known without a comparison: size and accuracy of the smallest."""
    none = (
        f"No variant is recommended: no comparison with {variants.BASELINE} "
        "has been measured, so nothing is said about speed."
    )
    ok = summary[summary.status == "ok"]
    if ok.empty:
        return [none, "No variant ran."]
    name = ok.sort_values("disk_mb", kind="stable").iloc[0].variant
    known = _describe_size(name, summary) + _describe_accuracy(name, compared)
    return [none, f"The smallest variant is {name}: {known}."]


def _describe_size(name: str, summary: pd.DataFrame) -> str:
    """Describe a checkpoint's size, against the baseline's where there is one."""
    sizes = summary[summary.status == "ok"].groupby("variant").disk_mb.first()
    megabytes = f"{sizes[name]:.1f} MB"
    if variants.BASELINE not in sizes or name == variants.BASELINE:
        return f"it takes {megabytes} on disk"
    smaller = sizes[variants.BASELINE] / sizes[name]
    if smaller == 1:
        return f"it is as large on disk as {variants.BASELINE} ({megabytes})"
    return (
        f"it is {smaller:.1f}x smaller on disk than {variants.BASELINE} ({megabytes})"
    )


def _describe_accuracy(name: str, compared: pd.DataFrame) -> str:
    """Describe a variant's top-1 against the baseline's; nothing without one."""
    table = compared.set_index("variant")
    if variants.BASELINE not in table.index or name == variants.BASELINE:
        return ""
    row, baseline = table.loc[name], table.loc[variants.BASELINE]
    return (
        f", and its top-1 is {row.top1:.4f} against {baseline.top1:.4f}: {row.verdict} "
        f"(p = {row.p_corrected:.2g}, corrected for the number of variants)"
    )


def pareto_front(points: pd.DataFrame, cost: str, value: str) -> pd.DataFrame:
    """Return the rows that no other row beats, by cost.

    A row beats another if it costs no more and is worth more, or costs less and is
    worth no less.
    """
    best = []
    for _, row in points.iterrows():
        worth_more = (points[cost] <= row[cost]) & (points[value] > row[value])
        cost_less = (points[cost] < row[cost]) & (points[value] >= row[value])
        if not (worth_more | cost_less).any():
            best.append(row)
    return pd.DataFrame(best, columns=points.columns).sort_values(cost)
