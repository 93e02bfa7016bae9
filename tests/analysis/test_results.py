"""The answer that a report opens with, on tables made by hand."""

import pandas as pd
import pytest

from vitnb.analysis import comparison

SUMMARY = pd.DataFrame(
    {
        "variant": ["fp32-sdpa", "bf16-sdpa", "nf4-sdpa"],
        "status": "ok",
        "batch_size": 1,
        "disk_mb": [40.0, 40.0, 8.0],
        "peak_mb": [50.0, 30.0, 20.0],
    }
)
ACCURACY = pd.DataFrame(
    {
        "variant": ["fp32-sdpa", "bf16-sdpa", "nf4-sdpa"],
        "top1": [0.9, 0.9, 0.85],
        "points": [float("nan"), 0.0, -5.0],
        "p_corrected": [float("nan"), 1.0, 0.001],
        "verdict": [
            "the baseline",
            "no difference beyond noise",
            "worse than fp32-sdpa: -5.0 points",
        ],
    }
)


def ratios(bf16: float, nf4: float) -> pd.DataFrame:
    values = [1.0, bf16, nf4]
    return pd.DataFrame(
        {
            "variant": SUMMARY.variant,
            "batch_size": 1,
            "ratio": values,
            "low": [0.99 * value for value in values],
            "high": [1.01 * value for value in values],
            "df": 3,
        }
    )


def describe(table: pd.DataFrame, accuracy: pd.DataFrame = ACCURACY) -> list[str]:
    rows = comparison.recommend(SUMMARY, table, accuracy)
    return comparison.describe_answer(rows, SUMMARY, table, accuracy)


def test_the_answer_names_the_variant_that_wins_most_often():
    first, second = describe(ratios(0.5, 2.0))
    assert first == (
        "bf16-sdpa is the best choice for 4 of the 4 needs below: it is as large on "
        "disk as fp32-sdpa (40.0 MB), and its top-1 is 0.9000 against 0.9000: no "
        "difference beyond noise (p = 1, corrected for the number of variants)."
    )
    assert second == (
        "Speed against fp32-sdpa, timed in turns: 2.00x faster (1.98 to 2.02) at "
        "batch 1."
    )


def test_a_variant_that_loses_accuracy_is_said_to():
    accuracy = ACCURACY.assign(points=[float("nan"), -9.0, -2.0])
    first, second = describe(ratios(2.0, 0.5), accuracy)
    assert first.startswith("nf4-sdpa is the best choice for 3 of the 4 needs below")
    assert "it is 5.0x smaller on disk than fp32-sdpa (8.0 MB)" in first
    assert "0.8500 against 0.9000: worse than fp32-sdpa" in first
    assert "2.00x faster" in second


def test_the_baseline_may_be_the_answer():
    accuracy = ACCURACY.assign(points=[float("nan"), -9.0, -9.0])
    summary = SUMMARY.assign(peak_mb=[1.0, 2.0, 3.0])
    table = ratios(3.0, 3.0)
    rows = comparison.recommend(summary, table, accuracy)
    first, _ = comparison.describe_answer(rows, summary, table, accuracy)
    assert first.startswith("fp32-sdpa, the baseline, is the best choice for 4 of the")


@pytest.mark.parametrize("count", [0, 3])
def test_without_a_comparison_the_answer_says_so(count):
    none = pd.DataFrame(columns=["variant", "batch_size", "ratio", "low", "high"])
    summary = SUMMARY.head(count)
    first, second = comparison.describe_answer([], summary, none, ACCURACY)
    assert first.startswith("No variant is recommended") and "fp32-sdpa" in first
    smallest = "The smallest variant is nf4-sdpa: it is 5.0x smaller on disk"
    assert second.startswith(smallest if count else "No variant ran.")
