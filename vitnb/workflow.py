"""Run a whole study: Snakemake runs each job that is not done yet.

A job is done if its record is there. Snakemake deletes a job's outputs before it runs
the job again, so it is told of *marks*, empty files that stand for records. A job that
fails leaves the results of the run before.
"""

import fcntl
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitnb import variants
from vitnb.errors import UserError, describe_write_error
from vitnb.processes import child_environment
from vitnb.study import ROOT, Study, load_study

OPTIONS = (
    "--cores all --rerun-triggers mtime input params "
    "--quiet rules host --ignore-incomplete --nolock"
)


def mark(study: Study, name: str) -> Path:
    """Return the mark of the job that writes the record of this name."""
    return study.outputs / ".jobs" / name


def job_names(study: Study) -> list[str]:
    """Return the names of the records of all jobs of a study, in their order."""
    return [
        *(["pretrain"] if study.pretrain else []),
        "finetune",
        *(f"evaluate-{variants.parse(name).file}" for name in study.variants),
        "compare",
        "ablate",
        *(f"plan-{name}" for name in study.plans),
        *(["waterfall"] if study.waterfall else []),
        "infer",
    ]


def mirror_records(study: Study) -> None:
    """Make the marks of a study what its records are: there, or not, and as old.

    A record that was made without Snakemake has its mark, too. The mark of a job whose
    checkpoints are gone is taken away.
    """
    if not (study.outputs / "report.html").exists():
        mark(study, "report").unlink(missing_ok=True)
    for name in job_names(study):
        record = study.outputs / "records" / f"{name}.json"
        path = mark(study, name)
        if not record.exists() or _has_lost_output(study, name):
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(exist_ok=True)
        path.touch()
        when = record.stat().st_mtime_ns
        os.utime(path, ns=(when, when))


def _has_lost_output(study: Study, job: str) -> bool:
    """Tell whether a checkpoint that a job has made is gone."""
    if job == "pretrain":
        return not study.own_base.is_dir()
    exports = {"finetune": ("merged", "nf4", "int8")}.get(job, ())
    if job.startswith("plan-"):
        exports = (job,)
    return not all(study.checkpoint(export).is_dir() for export in exports)


@contextmanager
def study_lock(study: Study) -> Iterator[None]:
    """Hold a study's lock, which ends with the process that holds it.

    The operating system keeps it: a process that was killed leaves none behind, as
    Snakemake's own lock would stay.

    Raises UserError if another process runs this study, or nothing can be written.
    """
    path = study.outputs / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(describe_write_error(error, path)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"study {study.name} is running already ({file.read().strip()}): "
                "wait until it ends, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def run_study(name: str, dry_run: bool = False) -> Path:
    """Run a study to its report and return the report's path.

    Snakemake runs what is not done yet, in the order that the ``Snakefile`` says.

    Args:
        name: a name under ``studies/``, or the path of a YAML file.
        dry_run: only list the jobs.

    Raises:
        UserError: a bad study, missing images, a missing base, a job that stopped, or
            a study that is running already.
    """
    from vitnb import devices
    from vitnb.data.splits import load_layout
    from vitnb.models.pretrained import find_base

    study = load_study(name)
    devices.check_requirements(study)
    if not study.pretrain:  # else the first job makes the base
        find_base(study)
    load_layout(study)
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
        *("--directory", str(ROOT), *OPTIONS.split(), "--config", f"study={name}"),
    ]
    if dry_run:
        command.append("--dry-run")
    with study_lock(study):
        mirror_records(study)
        ended = subprocess.run(command, env=child_environment(), check=False)
    if ended.returncode:
        raise UserError(
            f"study {study.name} stopped; the line above says why. "
            "What is done is kept: run it again to go on"
        )
    return study.outputs / "report.html"
