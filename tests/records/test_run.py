"""Records: whole or not at all, exact, and named by what was asked."""

import json
import math

import numpy as np
import pytest
import torch

from vitnb.errors import UserError, VariantError
from vitnb.records.files import write_file
from vitnb.records.reader import load_records
from vitnb.records import files
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
    found = {
        "samples": samples,
        "array": np.float32([0.1, 7]),
        "count": np.int64(3),
        "tensor": torch.tensor([1, 2]),
        "scalar": torch.tensor(0.5),
    }
    run = start(study)
    returned = run.save(**found)
    written = json.loads(run.path.read_text())
    assert written == returned and written["samples"] == samples and written["status"] == "ok"
    assert written["array"] == [float(np.float32(0.1)), 7.0] and (
        written["count"],
        written["tensor"],
        written["scalar"],
    ) == (3, [1, 2], 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object(), {1, 2}])
def test_a_record_is_whole_or_not_there(study, bad):
    run = start(study)
    run.save(value=1)
    before = run.path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        run.save(value=2, bad=bad)
    assert run.path.read_bytes() == before and [path.name for path in run.path.parent.iterdir()] == [run.path.name]


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
    assert record["asked"]["variant"] == "int8-fa2" and record["asked"]["batch_sizes"] == [1, 3]
    assert "predictions" not in record


def test_names_tell_what_was_asked(study):
    assert start(study).name == "evaluate-nf4-sdpa" and start(study, batch_size=8).name == "evaluate-nf4-sdpa-b8"
    assert start(study, batch_size=8).batch_sizes == [8]
    assert (
        start(study, "infer", images=None).name == "infer"
        and start(study, "infer", images="some/pics/").name == "infer-pics"
    )
    assert start(study, "infer", variant="fp32-sdpa", images=None).name == "infer-fp32-sdpa"
    assert start(study, "infer", variant="fp32-sdpa", images="pics").name == "infer-fp32-sdpa-pics"
    assert Run("finetune", study, {}).name == "finetune"
    with pytest.raises(UserError, match="at least 1"):
        start(study, batch_size=-1)


def test_provenance(study):
    record = start(study).save()
    assert record["versions"]["torch"] == torch.__version__ and record["machine"]["threads"] == torch.get_num_threads()
    assert len(record["machine"]["commit"]) in (0, 40) and isinstance(record["machine"]["dirty"], bool)
    assert record["asked"]["seed"] == study.seed and record["study"] == "mini" and record["seconds"] >= 0


def test_a_seed_seeds_everything(mini_yaml, outputs):
    drawn = []
    for seed in (4, 4, 5, None):
        begin("finetune", str(mini_yaml), seed=seed)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


def test_records_load_oldest_first_and_a_broken_one_is_named(study):
    for name, when in (("evaluate-b", "2026-01-02"), ("evaluate-a", "2026-01-03"), ("finetune", "2026-01-01")):
        write_file(
            study.outputs / "records" / f"{name}.json", json.dumps({"name": name, "notebook": "x", "started": when})
        )
    assert [record["name"] for record in load_records(study)] == ["finetune", "evaluate-b", "evaluate-a"]
    for text in ('{"half', "[]", "3", "{}"):
        (study.outputs / "records" / "infer.json").write_text(text)
        with pytest.raises(UserError, match=r"infer.json is not a record: delete it"):
            load_records(study)
