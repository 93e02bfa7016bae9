"""The summary's rows are joined by key, and verdicts say what came out as expected."""

import random
from types import SimpleNamespace

import pandas as pd
import pytest

from vitnb.analysis import comparison, summary
from vitnb.records.reader import read_record
from vitnb.study import ROOT


def test_what_lies_outside_of_its_range_is_shown_with_its_number():
    study = SimpleNamespace(
        expected={
            "a": [0.5, 0.9],
            "b": [0.5, 0.9],
            "c": [0.5, 0.9],
            "not measured": [0, 1],
        }
    )
    table = summary.expectation_verdicts(
        study, {"a": 0.5, "b": 0.91, "c": 0.4999, "expected by nobody": 7.0}
    ).set_index("result")
    assert list(table.index) == ["a", "b", "c"] and table.verdict["a"] == "as expected"
    assert (
        table.verdict["b"] == "NOT as expected: 0.9100"
        and table.verdict["c"] == "NOT as expected: 0.4999"
    )


def test_an_engine_stands_in_the_row_of_the_batch_size_that_it_ran():
    folder = ROOT / "outputs" / "published" / "vit-l16-garden" / "records"
    record = read_record(folder / "evaluate-bf16-sdpa-fused.json", "")
    assert {row["engine_ran"] for row in summary.record_rows(record)} == {"fused"}
    record["engine_ran"] |= {"32": "fused, without a graph", "64": "of the accuracy"}
    record["engine_reason"] = {"32": "no CUDA graph: out of luck"}
    rows = {row["batch_size"]: row for row in summary.record_rows(record)}
    for size in (1, 8, 128):
        assert (rows[size]["engine_ran"], rows[size]["reason"]) == ("fused", "")
    assert rows[32]["engine_ran"] == "fused, without a graph"
    assert rows[32]["reason"] == "no CUDA graph: out of luck"


def same_program(*rows: tuple) -> list[str]:
    """Return the notes on rows of (variant, engine that ran, batch size)."""
    columns = ["variant", "engine_ran", "batch_size"]
    table = pd.DataFrame(rows, columns=columns).assign(
        weights="nf4", attention_ran="flash", status="ok", device="a GPU"
    )
    return comparison.same_program_notes(table)


def test_variants_of_one_program_are_named_by_what_ran_at_each_batch_size():
    graph, plain = "nf4-sdpa-graph", "nf4-sdpa"
    (note,) = same_program(
        *((name, "eager", size) for name in (graph, plain) for size in (1, 16))
    )
    assert note.startswith("nf4-sdpa and nf4-sdpa-graph ran the same engine (eager)")
    assert " at batch " not in note
    (note,) = same_program(
        (graph, "graph", 1), (plain, "eager", 1), (graph, "eager", 16),
        (plain, "eager", 16),
    )  # fmt: skip
    assert " at batch 16: they cannot be compared" in note
    fused = "nf4-sdpa-fused"
    names = ["fused", "fused, without a graph", "fused, in PyTorch's operators"]
    for ran in names:
        assert same_program((fused, ran, 1), (plain, "eager", 1)) == []
        assert same_program((fused, ran, 1), ("nf4-fa2-fused", ran, 1))


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_a_record_are_joined_by_their_batch_size(seed):
    """A published record, with its timings, traces and peaks in other orders."""
    folder = ROOT / "outputs" / "published" / "vit-l16-garden" / "records"
    record = read_record(folder / "evaluate-nf4-sdpa.json", "")
    expected = {row["batch_size"]: row for row in summary.record_rows(record)}
    shuffle = random.Random(seed).shuffle
    for part in ("timings", "traces", "memory"):
        shuffle(record[part])
    assert {r["batch_size"]: r for r in summary.record_rows(record)} == expected
    for row in expected.values():
        (peaks,) = (p for p in record["memory"] if p["batch_size"] == row["batch_size"])
        assert row["peak_mb"] == peaks["allocator_peak_bytes"] / 2**20
