"""Verdicts: what is stale, and what came out as expected."""

from types import SimpleNamespace

from vitnb.analysis import summary


def test_a_number_belongs_to_the_checkpoint_that_it_was_measured_on():
    record = {
        "status": "ok",
        "asked": {"variant": "nf4-fa2"},
        "checkpoint_sha256": "one",
    }
    training = {"status": "ok", "checkpoint_sha256": {"merged": "two", "nf4": "one"}}
    assert (
        summary.stale_reason(record, training) == ""
        and summary.stale_reason(record, None) == ""
    )
    training["checkpoint_sha256"]["nf4"] = "three"
    assert "measure it again" in summary.stale_reason(record, training)
    assert summary.stale_reason(record | {"status": "failed"}, training) == ""


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
