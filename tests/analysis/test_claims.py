"""The numbers in data/claims.csv: complete, in one vocabulary, as published."""

import csv
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from vitnb.analysis import claims

CLAIMS = Path(__file__).resolve().parents[2] / "data" / "claims.csv"
COLUMNS = [
    "source",
    "table",
    "device",
    "model",
    "variant",
    "batch_size",
    "metric",
    "value",
    "unit",
    "quote",
]
ROWS = {
    "readme-second": 83,
    "readme-first": 71,
    "slides": 88,
    "report": 63,
    "midpoint": 30,
}
DEVICES = {"NVIDIA A10G", "NVIDIA A100", "consumer GPUs", "CPU", "not stated"}
METRICS = {
    *(
        "latency_mean",
        "latency_p50",
        "latency_p95",
        "latency_p99",
        "latency_per_image",
        "cpu_latency",
        "throughput",
    ),
    *(
        "total_kernel_time",
        "attention_kernel_time",
        "attention_share",
        "seconds_per_epoch",
        "test_images",
    ),
    *("disk", "size_reduction", "size_saving", "peak_memory", "memory_saving"),
    *(
        "top1",
        "top5",
        "f1",
        "top1_difference",
        "top5_difference",
        "top1_change_by_keeping",
    ),
    *("latency_reduction", "throughput_gain", "fa2_latency_gain", "fa2_attention_gain"),
}
UNITS = {
    "ms",
    "us",
    "s",
    "minutes",
    "images",
    "images/s",
    "MB",
    "GB",
    "percent",
    "points",
    "fraction",
    "x",
}
CLASSES = {
    "all",
    "nf4",
    "int8",
    "fa2",
    "fp32-sdpa",
    "nf4-sdpa",
    "int8-sdpa",
    "nf4-fa2",
    "int8-fa2",
}
KEPT = r"(nf4|int8) keep (none|first and last|layer \d+|layers 0-1|one of layers 0-5)"
LOW_OR_HIGH = re.compile(r" \((low|high)\)$")


@pytest.fixture(scope="module")
def ledger() -> list[dict[str, str]]:
    with CLAIMS.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def test_every_document_has_all_its_numbers_in_the_documents_order(ledger):
    assert Counter(row["source"] for row in ledger) == ROWS
    assert list(dict.fromkeys(row["source"] for row in ledger)) == list(ROWS)
    assert [row["source"] for row in ledger] == [
        source for source, count in ROWS.items() for _ in range(count)
    ]


def test_every_row_is_complete_and_in_the_vocabulary(ledger):
    for row in ledger:
        assert all(row[column] for column in COLUMNS if column != "batch_size"), row
        assert (
            row["device"] in DEVICES
            and row["model"] == "ViT-L/16"
            and row["batch_size"] in ("", "32")
        ), row
        assert row["variant"] in CLASSES or re.fullmatch(KEPT, row["variant"]), row
        assert LOW_OR_HIGH.sub("", row["metric"]) in METRICS and row["unit"] in UNITS, (
            row
        )
    assert {LOW_OR_HIGH.sub("", row["metric"]) for row in ledger} == METRICS
    assert {row["unit"] for row in ledger} == UNITS


def test_every_value_is_a_number_that_its_quote_holds(ledger):
    for row in ledger:
        float(row["value"])
        digits = re.escape(row["value"].removeprefix("-"))
        assert re.search(rf"(?<![\d.]){digits}(?!\.?\d)", row["quote"]), row


def test_no_row_twice(ledger):
    assert [
        row
        for row, count in Counter(tuple(row.values()) for row in ledger).items()
        if count > 1
    ] == []


def test_a_range_has_both_its_ends(ledger):
    ends = 0
    for low, high in pairwise(ledger):
        if low["metric"].endswith(" (low)"):
            assert high == low | {
                "metric": low["metric"].replace("(low)", "(high)"),
                "value": high["value"],
            }
            assert float(low["value"]) < float(high["value"])
            ends += 2
    assert ends == sum(bool(LOW_OR_HIGH.search(row["metric"])) for row in ledger)


@pytest.mark.parametrize(
    "line",
    [
        "readme-second,Summary table,NVIDIA A10G,ViT-L/16,nf4-fa2,,top1_difference,"
        "-2.0,points,-2.0%",
        "readme-second,Latency table,NVIDIA A10G,ViT-L/16,int8-sdpa,,latency_p99,61.7,"
        "ms,61.7 ms",
        "readme-second,Accuracy-latency chart,NVIDIA A10G,ViT-L/16,nf4-sdpa,,latency_"
        "mean,42,ms,35 42 59",
        "readme-second,Ablation table,not stated,ViT-L/16,nf4 keep first and last,,"
        "top1_change_by_keeping,-0.12,points,-0.12%",
        "readme-first,Results table,not stated,ViT-L/16,fp32-sdpa,,latency_mean,58.9,"
        "ms,~58.9",
        "readme-first,Inference milestone,not stated,ViT-L/16,nf4-fa2,,throughput,449,"
        "images/s,~449 images/second",
        "readme-first,Fine-tuning milestone,NVIDIA A100,ViT-L/16,all,,"
        "seconds_per_epoch (high),5,minutes,~3-5 minutes per epoch on A100",
        "slides,Final benchmark table,not stated,ViT-L/16,fp32-sdpa,,latency_mean,"
        "16.35,ms,16.35",
        "slides,Final benchmark table,not stated,ViT-L/16,nf4-sdpa,,latency_mean,56.72,"
        "ms,56.72",
        "slides,Training setup,NVIDIA A100,ViT-L/16,all,,seconds_per_epoch,31,s,~31s "
        "per epoch",
        "report,Fig. 1 benchmark table,NVIDIA A100,ViT-L/16,nf4-sdpa,32,latency_mean,"
        "58.72,ms,58.72",
        "report,Fig. 1 benchmark table,not stated,ViT-L/16,int8-fa2,,top1,0.5980,"
        "fraction,0.5980",
        "report,Mixed precision heuristics,not stated,ViT-L/16,nf4 keep first and last,"
        ","
        "top1_change_by_keeping,0.1,points,less than 0.1%",
        "midpoint,Stage-1 results table,not stated,ViT-L/16,fp32-sdpa,,top1,0.3125,"
        "percent,0.3125",
        "midpoint,Stage-1 results table,not stated,ViT-L/16,int8-fa2,,latency_p95,"
        "220.32570838928223,ms,220.32570838928223",
    ],
)
def test_rows_read_out_of_the_documents(ledger, line):
    assert line.split(",") in [list(row.values()) for row in ledger]


def measured(**by_quantity) -> dict:
    """Return measurements, named ``quantity__variant``, dashes as underscores.

    A measurement is a value, or (value, low, high).
    """
    table = {}
    for name, value in by_quantity.items():
        quantity, variant = name.split("__")
        ends = value if isinstance(value, tuple) else (value,) * 3
        table[quantity.replace("_", " "), variant.replace("_", "-")] = claims.Measured(
            *ends
        )
    return table


def verdict(ledger: pd.DataFrame, **wanted) -> list[str]:
    for column, value in wanted.items():
        ledger = ledger[ledger[column] == value]
    return list(ledger.verdict)


def test_ratios_are_compared_and_not_times():
    """58.9 -> 35.0 ms is a ratio of 0.594, 16.35 -> 62.02 ms one of 3.79.

    Both are published; both cannot hold.
    """
    fast = claims.claim_verdicts(measured(time__nf4_fa2=(0.60, 0.58, 0.62)))
    wanted = {"metric": "latency_mean", "variant": "nf4-fa2"}
    assert verdict(
        fast, source="readme-second", table="Five configurations table", **wanted
    ) == ["holds"]
    assert verdict(fast, source="report", **wanted) == ["does not hold"]
    slow = claims.claim_verdicts(measured(time__nf4_fa2=(3.8, 3.7, 3.9)))
    assert verdict(
        slow, source="readme-second", table="Five configurations table", **wanted
    ) == ["does not hold"]
    assert verdict(slow, source="report", **wanted) == ["holds"]
    row = slow[
        (slow.source == "report")
        & (slow.metric == "latency_mean")
        & (slow.variant == "nf4-fa2")
    ].iloc[0]
    assert (row.claim, row.ours) == ("3.79x", "3.80x (3.70 to 3.90)")


def test_an_absolute_time_of_another_device_cannot_be_compared():
    table = claims.claim_verdicts(measured(time__nf4_fa2=0.6))
    rows = table[(table.metric == "latency_mean") & (table.variant == "fp32-sdpa")]
    assert (
        set(rows.verdict) == {"cannot be compared here"}
        and rows.why.str.contains("another device").all()
    )
    assert (
        set(verdict(table, metric="latency_p99"))
        == set(verdict(table, metric="cpu_latency"))
        == {"cannot be compared here"}
    )


def test_sizes_by_division_do_not_hold():
    """146.7 MB are 0.127 of 1157; the READMEs' 290 (1157/4) are 0.25."""
    table = claims.claim_verdicts(measured(size__nf4_sdpa=0.127, size__nf4_fa2=0.127))
    assert set(verdict(table, source="slides", metric="disk", variant="nf4-sdpa")) == {
        "holds"
    }
    assert set(
        verdict(table, source="readme-second", metric="disk", variant="nf4-sdpa")
    ) == {"does not hold"}
    assert set(
        verdict(
            table, source="readme-first", metric="size_reduction", variant="nf4-sdpa"
        )
    ) == {"does not hold"}


def test_throughput_turns_into_a_ratio_of_times():
    """61.16 -> 16.12 images/s: 3.79 times as long."""
    table = claims.claim_verdicts(measured(time__nf4_fa2=3.8))
    assert verdict(table, source="slides", metric="throughput", variant="nf4-fa2") == [
        "holds"
    ]


def test_a_bound_holds_on_its_own_side():
    """'<2% accuracy loss': 0.5 points lost are inside, 4 are not, a gain is."""
    for points, wanted in (
        ((-0.5, -0.9, -0.1), "holds"),
        ((-4.0, -4.5, -3.5), "does not hold"),
        ((1.0, 0.5, 1.5), "holds"),
    ):
        table = claims.claim_verdicts(measured(top1__nf4_fa2=points))
        rows = table[
            table.quote.str.contains("<2% accuracy loss") & (table.variant == "nf4-fa2")
        ]
        assert list(rows.verdict) == [wanted]


def test_both_ends_of_a_range_bind():
    """'20-30%' faster: 0.75 holds for both ends, 0.95 for the upper alone."""
    for ratio, wanted in (
        (0.75, ["holds", "holds"]),
        (0.95, ["does not hold", "holds"]),
    ):
        table = claims.claim_verdicts(measured(fa2_time__fa2=ratio))
        rows = table[
            (table.metric.str.startswith("fa2_latency_gain"))
            & (table.table == "Key findings")
        ]
        assert list(rows.verdict) == wanted


def test_layers_that_this_model_does_not_have():
    table = claims.claim_verdicts({})
    rows = table[table.metric == "top1_change_by_keeping"]
    assert (
        set(rows.verdict) == {"cannot be compared here"}
        and rows.why.str.contains("no such layers").all()
    )
    none_kept = [0, 1, 2, 2] * 50
    layer_kept = [0, 1, 2, 3] * 2 + [0, 1, 2, 2] * 48
    rows = [
        {"bits": 4, "kept": "none", "predicted": none_kept},
        {"bits": 4, "kept": "layer 21", "predicted": layer_kept},
    ]
    gains = claims._measured_layers({"labels": [0, 1, 2, 3] * 50, "rows": rows})
    gain = gains["keep", "nf4 keep layer 21"]
    assert gain.value == pytest.approx(1.0) and gain.low < 1.0 < gain.high
    table = claims.claim_verdicts(gains)
    assert set(
        verdict(table, metric="top1_change_by_keeping", variant="nf4 keep layer 21")
    ) == {"holds"}


def test_every_claim_has_a_verdict_and_a_reason_where_it_has_no_number():
    table = claims.claim_verdicts(measured(time__nf4_fa2=0.6))
    assert len(table) == len(claims.load_claims()) and set(table.verdict) <= {
        "holds",
        "does not hold",
        "cannot be compared here",
    }
    silent = table[table.verdict == "cannot be compared here"]
    assert (silent.why != "").all() and (
        table[table.verdict != "cannot be compared here"].claim != ""
    ).all()
    counted = claims.claim_counts(table)
    assert counted["all"].sum() == len(table) and list(counted.source) == list(
        dict.fromkeys(table.source)
    )
