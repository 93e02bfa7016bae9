"""Records: exact, whole or not at all, and named by their parameters."""

import json
import math

import numpy as np
import pytest
import torch

from vitnb.errors import UserError, VariantError
from vitnb.records import files
from vitnb.records.files import new_folder, write_file
from vitnb.records.reader import load_records
from vitnb.records.run import Run, begin
from vitnb.study import Study, load_study


@pytest.fixture
def study(mini_yaml, tmp_path, monkeypatch) -> Study:
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    return load_study(str(mini_yaml))


def start(study, notebook="evaluate", **asked):
    return Run(notebook, study, {"variant": "nf4-sdpa", "batch_size": None} | asked)


def test_values_survive_exactly(study):
    samples = [0.1 + 0.2, 1e-300, math.pi]
    results = {
        "samples": samples,
        "array": np.float32([0.1, 7]),
        "count": np.int64(3),
        "tensor": torch.tensor([1, 2]),
        "scalar": torch.tensor(0.5),
    }
    run = start(study)
    returned = run.save(**results)
    written = json.loads(run.path.read_text())
    assert written == returned
    assert written["status"] == "ok"
    assert written["samples"] == samples
    assert written["array"] == [float(np.float32(0.1)), 7.0]
    assert written["count"] == 3
    assert written["tensor"] == [1, 2]
    assert written["scalar"] == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object(), {1, 2}])
def test_a_record_is_whole_or_not_there(study, bad):
    run = start(study)
    run.save(value=1)
    before = run.path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        run.save(value=2, bad=bad)
    assert run.path.read_bytes() == before
    assert list(run.path.parent.iterdir()) == [run.path]


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write_file(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failed_variant_keeps_what_was_asked_and_why(study):
    record = start(study, variant="int8-fa2").fail(VariantError("no such kernel\nmore"))
    assert (record["status"], record["reason"]) == ("failed", "no such kernel")
    assert record["asked"]["variant"] == "int8-fa2"
    assert record["asked"]["batch_sizes"] == [1, 3]
    assert "predictions" not in record


@pytest.mark.parametrize(
    ("notebook", "asked", "name"),
    [
        ("finetune", {}, "finetune"),
        ("evaluate", {}, "evaluate-nf4-sdpa"),
        ("evaluate", {"batch_size": 8}, "evaluate-nf4-sdpa-b8"),
        (
            "evaluate",
            {"batch_size": 8, "device": "cpu"},
            "evaluate-nf4-sdpa-b8-cpu",
        ),
        ("infer", {"images": None}, "infer"),
        ("infer", {"images": "some/pics/"}, "infer-pics"),
        ("infer", {"variant": "fp32-sdpa", "images": None}, "infer-fp32-sdpa"),
        ("infer", {"variant": "fp32-sdpa", "images": "pics"}, "infer-fp32-sdpa-pics"),
        ("ablate", {}, "ablate"),
        ("ablate", {"by": "layer"}, "ablate"),
        ("ablate", {"by": "linear"}, "ablate-linear"),
        ("plan", {"name": "tight"}, "plan-tight"),
    ],
)
def test_names_tell_what_was_asked(study, notebook, asked, name):
    assert start(study, notebook, **asked).name == name


def test_batch_sizes_are_the_one_that_was_asked_for_or_the_study_s(study):
    assert start(study, batch_size=8).batch_sizes == [8]
    assert start(study).batch_sizes == [1, 3]
    with pytest.raises(UserError, match="at least 1"):
        start(study, batch_size=-1)


def test_an_array_lies_beside_the_records(study):
    values = np.float32([[0.1, 2]])
    name = start(study).save_array("logits", values)
    assert name == "logits/evaluate-nf4-sdpa.npy"
    np.testing.assert_array_equal(np.load(study.outputs / name), values)


def test_a_new_folder_is_whole_and_for_everyone(tmp_path):
    """A folder that breaks off leaves the old one; others may read the new one."""
    final = tmp_path / "checkpoint"
    for content in ("old", "new"):
        with new_folder(final) as part:
            (part / "file").write_text(content)
    with pytest.raises(KeyboardInterrupt), new_folder(final) as part:
        (part / "file").write_text("half")
        raise KeyboardInterrupt
    assert (final / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [final]
    assert final.stat().st_mode & 0o777 == 0o755


def test_provenance(study):
    record = start(study).save()
    assert record["versions"]["torch"] == torch.__version__
    machine = record["machine"]
    assert machine["threads"] == torch.get_num_threads()
    assert len(machine["commit"]) in (0, 40)
    assert isinstance(machine["dirty"], bool)
    assert record["asked"]["seed"] == study.seed
    assert record["study"] == "mini"
    assert record["seconds"] >= 0


def test_a_seed_seeds_everything(mini_yaml, outputs):
    drawn = []
    for seed in (4, 4, 5, None):
        begin("finetune", str(mini_yaml), seed=seed)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


def test_records_load_oldest_first_and_a_broken_one_is_named(study):
    for name, when in (
        ("evaluate-b", "2026-01-02"),
        ("evaluate-a", "2026-01-03"),
        ("finetune", "2026-01-01"),
    ):
        write_file(
            study.outputs / "records" / f"{name}.json",
            json.dumps({"name": name, "notebook": "x", "started": when}),
        )
    assert [record["name"] for record in load_records(study)] == [
        "finetune",
        "evaluate-b",
        "evaluate-a",
    ]
    for text in ('{"half', "[]", "3", "{}"):
        (study.outputs / "records" / "infer.json").write_text(text)
        with pytest.raises(UserError, match=r"infer.json is not a record: delete it"):
            load_records(study)
