"""Records: exact, whole or not at all, and named by their parameters."""

import errno
import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from vitnb.errors import UserError, VariantError
from vitnb.records import files
from vitnb.records import run as run_module
from vitnb.records.files import write_file
from vitnb.records.reader import load_records
from vitnb.records.run import Run, begin
from vitnb.study import Latency, Study, load_study


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
        ("infer", {"variant": "fp32-sdpa", "images": None}, "infer-fp32-sdpa"),
        ("ablate", {}, "ablate"),
        ("ablate", {"by": "layer"}, "ablate"),
        ("ablate", {"by": "linear"}, "ablate-linear"),
        ("plan", {"name": "tight"}, "plan-tight"),
        ("compare", {"device": "cpu"}, "compare-cpu"),
        ("waterfall", {"device": "cpu"}, "waterfall-cpu"),
        ("evaluate", {"seed": 7}, "evaluate-nf4-sdpa-seed7"),
        ("ablate", {"seed": 7, "by": "linear"}, "ablate-linear-seed7"),
    ],
)
def test_names_tell_what_was_asked(study, notebook, asked, name):
    assert start(study, notebook, **asked).name == name


def test_two_folders_of_one_name_have_records_of_their_own(study, tmp_path):
    names = []
    for day in ("monday", "tuesday"):
        folder = tmp_path / day / "new"
        run = start(study, "infer", variant="nf4-sdpa", images=str(folder))
        same = start(study, "infer", variant="nf4-sdpa", images=f"{folder}/../new/")
        assert same.name == run.name
        table = run.save_table("predictions", pd.DataFrame({"path": [day]}))
        run.save(csv=table)
        names += [run.name, table]
    assert len(set(names)) == 4
    assert names[0].startswith("infer-new-")
    assert names[1] == f"predictions-{names[0].removeprefix('infer-')}.csv"
    assert pd.read_csv(study.outputs / names[1]).path.tolist() == ["monday"]
    assert pd.read_csv(study.outputs / names[3]).path.tolist() == ["tuesday"]


def test_a_run_with_another_question_keeps_what_was_there(study):
    """Record, array and table of the first question are all kept."""

    def run(seed_of_training: int, value: float) -> Run:
        one = start(study, "finetune", rank=seed_of_training)
        one.save_array("logits", np.float32([value]))
        one.save_table("table", pd.DataFrame({"value": [value]}))
        return one

    first = run(8, 1.0)
    assert first.earlier is None
    before = first.save(value=1)
    run(8, 2.0).save(value=2)
    assert not (study.outputs / "earlier").exists(), "the same question: replaced"
    other = run(16, 3.0)
    folder = other.earlier
    other.save(value=3)
    kept = json.loads((folder / "records" / "finetune.json").read_text())
    assert kept["value"] == 2 and kept["asked"]["rank"] == before["asked"]["rank"] == 8
    assert np.load(folder / "logits" / "finetune.npy") == [2.0]
    assert pd.read_csv(folder / "table.csv").value.tolist() == [2.0]
    assert json.loads(other.path.read_text())["value"] == 3
    assert np.load(study.outputs / "logits" / "finetune.npy") == [3.0]


@pytest.mark.parametrize(
    ("section", "is_other"),
    [
        ({"latency": Latency(samples=77)}, True),
        ({"data": "elsewhere"}, True),
        ({"expected": {}, "title": "new words"}, False),
    ],
)
def test_a_question_is_of_the_parts_of_a_study_that_matter(study, section, is_other):
    start(study).save(value=1)
    changed = replace(study, **section)
    assert (start(changed).earlier is not None) == is_other


def test_a_record_of_another_device_is_another_question(study):
    start(study).save(value=1)
    run = start(study)
    run.identity = replace(run.identity, device="another device")
    run.save(value=2)
    (kept,) = (study.outputs / "earlier").rglob("*.json")
    assert json.loads(kept.read_text())["value"] == 1


def test_a_failure_does_not_take_the_place_of_a_result(study):
    start(study).save(value=1)
    start(study).fail(VariantError("out of memory"))
    (kept,) = (study.outputs / "earlier").rglob("*.json")
    assert json.loads(kept.read_text())["value"] == 1
    start(study).fail(VariantError("again"))
    assert len(list((study.outputs / "earlier").rglob("*.json"))) == 1


def test_nothing_is_moved_if_the_new_record_cannot_be_written(study):
    start(study).save(value=1)
    run = start(study, batch_size=None, seed=study.seed)
    run.record["asked"]["other"] = 1
    run.save_array("logits", np.float32([1]))
    with pytest.raises(ValueError, match="JSON"):
        run.save(value=float("nan"))
    assert json.loads(run.path.read_text())["value"] == 1
    assert not (study.outputs / "earlier").exists()
    assert not (study.outputs / "logits").exists()


def test_batch_sizes_are_the_one_that_was_asked_for_or_the_study_s(study):
    assert start(study, batch_size=8).batch_sizes == [8]
    assert start(study).batch_sizes == [1, 3]
    with pytest.raises(UserError, match="at least 1"):
        start(study, batch_size=-1)


def test_an_array_lies_beside_the_records(study):
    values = np.float32([[0.1, 2]])
    run = start(study)
    name = run.save_array("logits", values)
    assert name == "logits/evaluate-nf4-sdpa.npy"
    record = run.save(logits=name)
    np.testing.assert_array_equal(np.load(study.outputs / name), values)
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    assert record["arrays"] == {name: digest}


def test_provenance(study):
    record = start(study).save()
    assert record["versions"]["torch"] == torch.__version__
    machine = record["machine"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["commit"] is None or len(machine["commit"]) == 40
    assert (machine["dirty"] is None) == (machine["commit"] is None)
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


@pytest.fixture
def shell(monkeypatch):
    """A notebook's shell in the place of IPython's: keeps what it shows."""

    class Shell:
        def __init__(self):
            self.shown, self.traces = [], []

        def set_custom_exc(self, kinds, show):
            self.kinds, self.show = kinds, show

        def _showtraceback(self, kind, error, lines):
            self.shown += lines

        def showtraceback(self, about):
            self.traces.append(about)

        def fail(self, error):
            assert isinstance(error, self.kinds)
            self.show(self, type(error), error, None)

    shell = Shell()
    monkeypatch.setattr(run_module, "get_ipython", lambda: shell)
    return shell


def test_a_disk_that_takes_no_more_ends_a_notebook_in_one_line(study, shell):
    """It is no failure of the variant, whose row would be wrong for ever."""
    run = begin("evaluate", study.typed, variant="nf4-sdpa", batch_size=None)
    shell.fail(OSError(errno.ENOSPC, "No space left on device"))
    shell.fail(PermissionError(errno.EACCES, "Permission denied", "/x/table.csv"))
    shell.fail(FileNotFoundError(errno.ENOENT, "No such file", "/x/data"))
    assert [line.split(": ")[:2] for line in shell.shown] == [
        ["UserError", "cannot write the results"],
        ["UserError", "cannot write /x/table.csv"],
        ["UserError", "cannot open /x/data"],
    ]
    assert not run.path.exists()
    shell.fail(OSError("libcuda.so is not there"))
    assert len(shell.traces) == 1, "an error of a library keeps its trace"


def test_a_failed_variant_whose_record_cannot_be_written(study, shell):
    begin("evaluate", study.typed, variant="nf4-sdpa", batch_size=None)
    study.outputs.mkdir()
    (study.outputs / "records").write_text("a file")
    shell.fail(VariantError("no such kernel"))
    (line,) = shell.shown
    assert line.startswith("UserError: cannot write ") and "move away" in line


@pytest.mark.parametrize(
    ("asked", "told"),
    [({"by": "head"}, "by must be"), ({"seed": -1}, "seed must be in 0 to 4294967295")],
)
def test_parameters_are_checked_at_the_top_of_a_notebook(study, asked, told):
    """Whoever runs one by hand meets the same checks."""
    with pytest.raises(UserError, match=told):
        begin("ablate", study.typed, **asked)
