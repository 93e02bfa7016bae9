"""Copy a study's small results to a folder that fits in git, for everybody to read.

Small are records, tables, figures and the report. Checkpoints, logits and executed
notebooks are left out. So is all that names a single picture or a folder of this
machine: file names of pictures may be private. The report is made from the records as
they are published.
"""

import csv
import io
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from PIL import Image

from vitnb.data.images import FOREIGN
from vitnb.errors import UserError
from vitnb.records.files import check_new_folder, new_folder, write_file
from vitnb.records.reader import load_records
from vitnb.report import page
from vitnb.study import ROOT, Study

PUBLICATION = "published results of a study"  # see ``files.new_folder``

# Tables that the report does not write.
MEASURED_TABLES = ("ratios.csv", "times.csv", "ablation*.csv", "waterfall.csv")
# All that a publication holds.
WRITTEN = (
    "records/*.json",
    "figures/*.png",
    "report.html",
    *MEASURED_TABLES,
    *("summary.csv", "accuracy.csv", "claims.csv", "sensitivity.csv", "plan-*.csv"),
)

ENDINGS = sorted(Image.registered_extensions().keys() | FOREIGN)
PICTURE = re.compile(rf"({'|'.join(map(re.escape, ENDINGS))})\b", re.IGNORECASE)
NO_PICTURE = "(names a picture: not published)"
# An absolute path in a sentence. The text before it is no URL and no fraction.
PATH = re.compile(r"""(?<![\w:/.~*<-])~?(?:/[^\s/'",;:()<>|]+)+/?""")
PATH_KEYS = ("data", "base", "typed", "images")  # whose values are paths


def publish(study: Study, to: Path) -> Path:
    """Write a study's small results and their report to ``to/<study>``.

    They replace what was published there before. Returns the folder.

    Raises UserError if the study has no results; if a record was made by code that was
    not committed or whose commit is unknown, as nobody else could run that code; or if
    the folder holds something else.
    """
    published = to / study.name
    options = {
        "what": PUBLICATION,
        "reads": [study.outputs],
        "is_own": is_publication,
    }
    check_new_folder(published, **options)
    for record in load_records(study):
        _require_commit(record, study)
    with new_folder(published, **options) as folder:
        _write_records(study, folder / "records")
        for pattern in MEASURED_TABLES:
            for path in sorted(study.outputs.glob(pattern)):
                text = path.read_bytes().decode()
                write_file(folder / path.name, _censor_csv(text, study))
        page.write_report(_publication_of(study, folder))
    return published


def is_publication(folder: Path) -> bool:
    """Tell whether a folder holds what ``publish`` writes, and nothing else.

    Older versions left no marker.
    """
    known = {path for pattern in WRITTEN for path in folder.glob(pattern)}
    return (
        folder / "report.html" in known
        and any(path.parent.name == "records" for path in known)
        and all(path in known or path.is_dir() for path in folder.rglob("*"))
    )


def _require_commit(record: dict, study: Study) -> None:
    """Raise UserError for a record of code that others cannot get."""
    made = record["machine"]
    again = f"delete the record and run 'python -m vitnb study {study.typed}' again"
    if not made.get("commit") or made.get("dirty") is None:
        raise UserError(
            f"{record['name']} was measured by code of an unknown commit (git is "
            "missing, or does not read the repository): see that 'git status' works in "
            f"{ROOT}, {again}"
        )
    if made["dirty"]:
        raise UserError(
            f"{record['name']} was measured with changes that are not committed: "
            f"commit them, {again}"
        )


@dataclass(frozen=True)
class _Publication(Study):
    """A study whose outputs are the published ones."""

    folder: Path = Path()

    @property
    def outputs(self) -> Path:
        """Return the folder of the published results."""
        return self.folder


def _publication_of(study: Study, folder: Path) -> _Publication:
    values = {field.name: getattr(study, field.name) for field in fields(Study)}
    for key in (*PATH_KEYS, "get_data"):
        if key in values:
            values[key] = censor(values[key], study, key)
    return _Publication(**values, folder=folder)


def _write_records(study: Study, folder: Path) -> None:
    """Write the records without names of pictures and folders.

    A classification of somebody's own folder is no result of the study.
    """
    for path in sorted((study.outputs / "records").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["notebook"] == "infer" and record["asked"].get("images"):
            continue
        if record.get("duplicates"):
            record["duplicates"]["examples"] = []
        text = json.dumps(censor(record, study), allow_nan=False, indent=1)
        write_file(folder / path.name, text + "\n")


def censor(value: object, study: Study, key: str = "") -> object:
    """Return a value of a record without names of pictures and of folders.

    A text that names a picture is left out whole: its name may hold spaces. An absolute
    path becomes its last part.

    Args:
        value: what JSON can hold.
        key: the name of the value in the record.
    """
    if isinstance(value, dict):
        return {name: censor(item, study, name) for name, item in value.items()}
    if isinstance(value, list):
        return [censor(item, study, key) for item in value]
    if not isinstance(value, str):
        return value
    if PICTURE.search(value) or _is_within(value, study):
        return NO_PICTURE
    value = re.sub(rf"{re.escape(str(Path.home()))}(?![\w.-])", "~", value)
    if key in PATH_KEYS and (value.startswith(("/", "~")) or ".." in value):
        return Path(value).name
    for folder in (study.outputs, ROOT):
        value = value.replace(f"{folder}{os.sep}", "")
    return PATH.sub(lambda match: Path(match[0]).name, value)


def _is_within(text: str, study: Study) -> bool:
    """Tell whether a text names something in the folder of the study's images.

    A picture's name may have no ending.
    """
    data = str(ROOT / Path(study.data).expanduser())
    return f"{data}{os.sep}" in text or f"{os.path.realpath(data)}{os.sep}" in text


def _censor_csv(text: str, study: Study) -> str:
    """Return a table in CSV, each cell as ``censor`` returns it."""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    censored = censor(rows, study)
    if censored == rows:
        return text
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(censored)
    return buffer.getvalue()
