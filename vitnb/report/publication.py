"""Copy a study's small results to a folder that fits in git.

Small are records, tables, figures and the report. Checkpoints, logits, executed
notebooks and the names of single images (predictions.csv) are left out.
"""

import shutil
from pathlib import Path

from vitnb.errors import UserError
from vitnb.records.files import new_folder
from vitnb.records.reader import load_records
from vitnb.report import page
from vitnb.study import Study

PATTERNS = ("records/*.json", "*.csv", "figures/*.png", "report.html")
EXCLUDED = ("predictions.csv",)


def publish(study: Study, to: Path) -> Path:
    """Write a study's report again, and copy its small results to ``to/<study>``.

    The copy replaces what was in that folder, which is returned.

    Raises UserError if the study has no results, or if a record was made by code that
    was not committed: nobody else could run that code.
    """
    for record in load_records(study):
        if record["machine"]["dirty"]:
            raise UserError(
                f"{record['name']} was measured with changes that are not committed: "
                "commit them, delete the record and run "
                f"'python -m vitnb study {study.typed}' again"
            )
    page.write_report(study)
    published = to / study.name
    with new_folder(published) as folder:
        for path in _small_files(study.outputs):
            copy = folder / path.relative_to(study.outputs)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    return published


def _small_files(outputs: Path) -> list[Path]:
    """Return the files to publish, sorted by pattern and name."""
    return [
        path
        for pattern in PATTERNS
        for path in sorted(outputs.glob(pattern))
        if path.name not in EXCLUDED
    ]
