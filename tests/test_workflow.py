"""Which jobs of a study are done, and that one process at a time runs it."""

import os
import subprocess
import sys

import pytest

from vitnb import workflow
from vitnb.errors import UserError
from vitnb.study import ROOT, Study, load_study


@pytest.fixture
def study(mini_yaml, tmp_path, monkeypatch) -> Study:
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    return load_study(str(mini_yaml))


def test_every_job_has_a_record_of_its_own(study):
    assert workflow.job_names(study) == [
        "finetune",
        "evaluate-fp32-sdpa",
        "evaluate-nf4-fa2",
        "compare",
        "ablate",
        "infer",
    ]


def write_record(study: Study, name: str, when: int) -> None:
    path = study.outputs / "records" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, ns=(when, when))


def marks(study: Study) -> dict[str, int]:
    folder = study.outputs / ".jobs"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}


def test_a_job_is_done_if_its_record_is_there(study):
    """Records made by hand count, and so does one that was deleted or made again."""
    for export in ("merged", "nf4", "int8"):
        study.checkpoint(export).mkdir(parents=True)
    write_record(study, "finetune", 10**18)
    write_record(study, "ablate", 2 * 10**18)
    workflow.mirror_records(study)
    assert marks(study) == {"finetune": 10**18, "ablate": 2 * 10**18}
    (study.outputs / "records" / "ablate.json").unlink()
    write_record(study, "finetune", 3 * 10**18)
    workflow.mirror_records(study)
    assert marks(study) == {"finetune": 3 * 10**18}


@pytest.mark.parametrize("lost", ["merged", "nf4", "int8"])
def test_a_training_whose_checkpoint_is_gone_is_not_done(study, lost):
    for export in ("merged", "nf4", "int8"):
        study.checkpoint(export).mkdir(parents=True)
    write_record(study, "finetune", 10**18)
    study.checkpoint(lost).rmdir()
    workflow.mirror_records(study)
    assert marks(study) == {}


def test_one_process_runs_a_study_and_a_killed_one_leaves_no_lock(study):
    code = (
        "import time; from vitnb import workflow; from vitnb.study import load_study\n"
        f"with workflow.study_lock(load_study({study.typed!r})):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert holder.stdout.readline() == "held\n"
        told = rf"mini is running already \(process {holder.pid} on .*\): wait"
        with pytest.raises(UserError, match=told), workflow.study_lock(study):
            pass
    finally:
        holder.kill()
        holder.wait()
    with workflow.study_lock(study):
        pass


def test_outputs_that_cannot_be_written_are_told_in_one_line(study, tmp_path):
    (tmp_path / "mini").write_text("a file in the folder's place")
    told = r"cannot write .*mini"
    with pytest.raises(UserError, match=told), workflow.study_lock(study):
        pass
