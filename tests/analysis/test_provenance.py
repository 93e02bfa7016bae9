"""What belongs together: records of one model, one set of images and one device."""

import pandas as pd
import pytest

from vitnb.analysis import accuracy, provenance

MADE = {"merged": "m", "nf4": "n", "int8": "i"}


def record(name: str, started: int, checkpoints: dict | None = None, **more) -> dict:
    """Return a record of an evaluate run, or of the notebook that ``more`` says."""
    identity = {
        "checkpoints": checkpoints or {},
        "data": more.pop("data", {}),
        "code": more.pop("code", "c"),
        "packages": more.pop("packages", {"torch": "1"}),
        "device": more.pop("device", "a CPU"),
    }
    base = {
        "name": name,
        "notebook": name.split("-")[0],
        "status": "ok",
        "started": f"2026-01-{started:02d}",
        "machine": {"commit": "1234567890"},
        "asked": {"variant": name.removeprefix("evaluate-")},
        "identity": identity,
    }
    return base | more


FINETUNE = record("finetune", 5, checkpoint_sha256=MADE)


@pytest.mark.parametrize(
    "name", ["evaluate-nf4-sdpa", "compare", "ablate", "infer", "waterfall"]
)
def test_whatever_was_measured_on_another_model_is_left_out(name):
    """The rule is the same for each kind of record."""
    same = record(name, 6, {"merged": "m", "nf4": "n"})
    other = record(name, 6, {"merged": "m", "nf4": "of another training"})
    assert provenance.outdated_reasons([FINETUNE, same]) == {}
    reasons = provenance.outdated_reasons([FINETUNE, other])
    assert "than the newest finetune record made: measure it again" in reasons[name]
    assert provenance.outdated_reasons([other]) == {}, "nothing is known of a model"
    failed = other | {"status": "failed"}
    assert provenance.outdated_reasons([FINETUNE, failed]) == {}


def test_an_old_record_that_names_no_model_must_be_younger_than_the_model():
    assert provenance.outdated_reasons([FINETUNE, record("compare", 6)]) == {}
    reasons = provenance.outdated_reasons([record("compare", 4), FINETUNE])
    assert "older than the newest fine-tuning" in reasons["compare"]


def test_a_row_belongs_to_the_newest_plan_of_the_newest_fine_tuning():
    row = record("evaluate-plan:p-sdpa", 7, {"plan-p": "one"})
    plan = record(
        "plan-p",
        6,
        {"merged": "m"},
        plan={"name": "p", "merged_sha256": "m"},
        checkpoint_sha256="one",
    )
    assert provenance.outdated_reasons([FINETUNE, plan, row]) == {}
    for other in (
        [],
        [plan | {"checkpoint_sha256": "two"}],
        [plan | {"plan": {"name": "p", "merged_sha256": "older"}}],
    ):
        reasons = provenance.outdated_reasons([FINETUNE, *other, row])
        assert "than the newest plan record" in reasons[row["name"]]
    older = record(
        "plan-p",
        6,
        {"merged": "older"},
        plan={"name": "p", "merged_sha256": "older"},
        checkpoint_sha256="one",
    )
    reasons = provenance.outdated_reasons([FINETUNE, older])
    assert "than the newest finetune record" in reasons["plan-p"]


def test_rows_of_other_images_are_left_out():
    rows = [
        record("evaluate-fp32-sdpa", 6, {"merged": "m"}, data={"test": "old"}),
        record("evaluate-nf4-sdpa", 7, {"nf4": "n"}, data={"test": "new"}),
        record("ablate", 8, {"merged": "m"}, data={"valid": "v"}),
    ]
    reasons = provenance.outdated_reasons([FINETUNE, *rows])
    assert list(reasons) == ["evaluate-fp32-sdpa"]
    assert "other test images than the newest record" in reasons["evaluate-fp32-sdpa"]


def test_other_code_and_packages_are_named_and_a_newer_commit_alone_is_not():
    rows = [record(f"evaluate-{i}", i) for i in range(1, 6)]
    rows[0]["machine"] = {"commit": "another commit of the same code"}
    assert provenance.code_notes(rows) == []
    rows[4]["identity"]["code"] = "d"
    (note,) = provenance.code_notes(rows)
    assert "evaluate-1, evaluate-2 and 2 more by commit 1234567" in note
    assert "evaluate-5 by commit 1234567" in note
    rows[4]["identity"] |= {"code": "c", "packages": {"torch": "2", "timm": "1"}}
    (note,) = provenance.code_notes(rows)
    assert note.endswith("the same versions of timm, torch")


def answers(right: int, images: int = 100) -> dict:
    labels = [0] * images
    return {"labels": labels, "top5": [[0]] * right + [[1]] * (images - right)}


def test_a_record_of_another_device_changes_no_verdict():
    """A CPU row beside a GPU study: its name sorts first and its record is newest."""
    gpu = [
        record("evaluate-fp32-sdpa", 6, device="NVIDIA", predictions=answers(90)),
        record("evaluate-nf4-sdpa", 7, device="NVIDIA", predictions=answers(91)),
    ]
    compared = record(
        "compare",
        8,
        device="NVIDIA",
        answers={"nf4-sdpa": {"kl_by_image": [0.1, 0.3] * 50}},
    )
    cpu = record("evaluate-nf4-sdpa-cpu", 9, device="AMD", predictions=answers(40))
    cpu["asked"]["variant"] = "nf4-sdpa"
    alone = accuracy.compare_devices(gpu, compared)
    beside = accuracy.compare_devices([*gpu, cpu], compared)
    assert provenance.main_device([*gpu, compared, cpu]) == "NVIDIA"
    pd.testing.assert_frame_equal(beside[beside.device == "NVIDIA"], alone)
    row = alone.set_index("variant").loc["nf4-sdpa"]
    assert row.points == pytest.approx(1.0) and row.kl == pytest.approx(0.2)
    # The CPU has no baseline of its own, so nothing is said about its row.
    assert set(beside.device) == {"NVIDIA"}
    baseline = record("evaluate-fp32-sdpa-cpu", 9, device="AMD")
    baseline |= {"predictions": answers(40), "asked": {"variant": "fp32-sdpa"}}
    both = accuracy.compare_devices([*gpu, cpu, baseline], compared)
    own = both[both.device == "AMD"].set_index("variant")
    assert own.points["nf4-sdpa"] == 0 and own.kl.isna().all()


def test_a_run_with_a_batch_size_of_its_own_does_not_replace_the_row():
    rows = [
        record("evaluate-fp32-sdpa", 6, predictions=answers(90)),
        record("evaluate-nf4-sdpa", 7, predictions=answers(91)),
        record("evaluate-nf4-sdpa-b8", 8, predictions=answers(10)),
    ]
    rows[2]["asked"] = {"variant": "nf4-sdpa", "batch_size": 8}
    table = accuracy.paired_comparison(rows, None).set_index("variant")
    assert table.top1["nf4-sdpa"] == pytest.approx(0.91)
