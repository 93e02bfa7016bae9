"""A whole study: Snakemake runs what is not done yet, in the order that the ``Snakefile`` says."""

import os
import subprocess
import sys
from pathlib import Path

from vitnb import bases, data, records, studies
from vitnb.errors import UserError

OPTIONS = "--cores all --rerun-triggers mtime input params --quiet rules host --keep-incomplete"


def run(name: str, dry_run: bool = False) -> Path:
    """Run the study ``name`` (or the YAML file of that path) to its report, whose path is returned.

    Args:
        dry_run: only list the jobs.

    Raises UserError for a bad study, for missing images or a missing base, and for a job that stopped.
    """
    study = studies.load(name)
    records.check_machine(study)
    if not study.pretrain:  # else the first job makes it
        bases.find(study)
    data.layout(study)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(studies.ROOT / "Snakefile")]
    command += ["--directory", str(studies.ROOT), *OPTIONS.split(), "--config", f"study={name}"]
    # The jobs must import the same vitnb, also where it is not installed.
    python_path = os.pathsep.join([str(studies.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command + ["--dry-run"] * dry_run, env=os.environ | {"PYTHONPATH": python_path}, check=False)
    if done.returncode:
        raise UserError(
            f"study {study.name} stopped; the line above says why. What is done is kept: run it again to go on"
        )
    return study.outputs / "report.html"
