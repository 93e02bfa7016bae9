"""Publishing: what is small of a study's results, in a folder that a repository can hold: records, tables, figures, report."""

import shutil
from pathlib import Path

from vitnb.errors import UserError
from vitnb.records.reader import load_records
from vitnb.report import page
from vitnb.study import Study

# Checkpoints, logits, executed notebooks and the names of single pictures (predictions.csv) stay where they are.
PARTS = ("records/*.json", "*.csv", "figures/*.png", "report.html")


LEFT = ("predictions.csv",)


def publish(study: Study, to: Path) -> Path:
    """Make the report once more, and put the small results of a study into ``to/<study>``, in place of what was there.

    Returns that folder.

    Raises UserError if the study has no results, or a record is of code that was not committed: nobody else could run it.
    """
    for record in load_records(study):
        if record["machine"]["dirty"]:
            raise UserError(
                f"{record['name']} was measured with changes that are not committed: commit them, delete the record and run "
                f"'python -m vitnb study {study.typed}' again"
            )
    page.write_report(study)
    folder, part = to / study.name, to / f".{study.name}"
    shutil.rmtree(part, ignore_errors=True)
    for path in (path for pattern in PARTS for path in sorted(study.outputs.glob(pattern)) if path.name not in LEFT):
        (copy := part / path.relative_to(study.outputs)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder
