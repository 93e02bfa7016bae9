"""Read two records, or two folders of records, and pair them by name."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from vitnb.analysis.differences.findings import compare_findings
from vitnb.analysis.differences.sides import Side, Values, compare_asked, compare_ran
from vitnb.analysis.differences.verdicts import Finding, correct_tests
from vitnb.errors import UserError, suggest
from vitnb.records.reader import find_path, read_record
from vitnb.study import load_study, study_names

FIX = "name the JSON file of a record"


@dataclass(frozen=True)
class Pair:
    """Two records side by side.

    Attributes:
        name: of both records, or of each.
        asked, ran: what differs in the question, and in what answered it.
        found: the results' differences.
    """

    name: str
    asked: Values
    ran: Values
    found: list[Finding]


@dataclass(frozen=True)
class Differences:
    """Two sides, record by record.

    Attributes:
        a, b: paths of the two.
        pairs: records of the same name, or the two records.
        only_a, only_b: names of records that the other folder lacks.
    """

    a: str
    b: str
    pairs: list[Pair]
    only_a: list[str]
    only_b: list[str]


def find_differences(a: str, b: str) -> Differences:
    """Compare two records, or two folders of outputs record by record.

    All tests of results are corrected for their number together.

    Args:
        a, b: the JSON file or the name of a record; or a folder of outputs, the name of
            a study, or its YAML file.

    Raises:
        UserError: nothing of this name is there, one is a record and the other is not,
            or two folders have no record in common.
    """
    first, second = _find(a), _find(b)
    if first.is_dir() != second.is_dir():
        record, folder = (b, a) if first.is_dir() else (a, b)
        raise UserError(
            f"'{record}' is one record, and '{folder}' is all of a study's: "
            "name two records, or two studies or folders of outputs"
        )
    if first.is_file():
        sides = _read(first), _read(second)
        names = dict.fromkeys(side.record["name"] for side in sides)
        pairs = [_compare(" and ".join(names), *sides)]
        return Differences(str(first), str(second), _correct(pairs), [], [])
    ours, theirs = _read_folder(first), _read_folder(second)
    common = [name for name in ours if name in theirs]
    if not common:
        raise UserError(
            f"no record of {a} has the name of one of {b}: "
            "name one record of each to compare them"
        )
    pairs = [_compare(name, ours[name], theirs[name]) for name in common]
    return Differences(
        *(str(first), str(second), _correct(pairs)),
        only_a=[name for name in ours if name not in theirs],
        only_b=[name for name in theirs if name not in ours],
    )


def _find(name: str) -> Path:
    """Return the path of a record, or the folder of a study's outputs."""
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path.parent if path.name == "records" else path
        if not (folder / "records").is_dir():
            raise UserError(
                f"{name} has no folder 'records': "
                "name a folder of outputs, such as outputs/embedded"
            )
        return folder
    if name.endswith(".json"):
        return find_path(str(path))
    if name in study_names() or name.endswith((".yaml", ".yml")):
        folder = load_study(name).outputs
        if not (folder / "records").is_dir():
            raise UserError(
                f"study '{name}' has no records in {folder}: "
                f"run 'python -m vitnb study {name}', or name a folder of outputs"
            )
        return folder
    if os.sep in name:
        raise UserError(
            f"no folder {name}: name a folder of outputs, such as outputs/embedded"
        )
    try:
        return find_path(name)
    except UserError as error:
        hint = str(error).partition(": ")[2]
        studies = suggest(name, study_names())
        if studies.startswith("did you mean"):
            hint = studies
        raise UserError(f"no study or record '{name}': {hint}") from None


def _read(path: Path) -> Side:
    return Side(read_record(path, FIX), path.parent.parent)


def _read_folder(folder: Path) -> dict[str, Side]:
    """Return a folder's records by their names."""
    sides = [_read(path) for path in sorted((folder / "records").glob("*.json"))]
    if not sides:
        raise UserError(f"{folder} has no records: name a folder of outputs with some")
    return {side.record["name"]: side for side in sides}


def _compare(name: str, a: Side, b: Side) -> Pair:
    asked, ran = (
        compare(a.record, b.record) for compare in (compare_asked, compare_ran)
    )
    return Pair(name, asked, ran, compare_findings(a, b))


def _correct(pairs: list[Pair]) -> list[Pair]:
    """Give the verdicts of all pairs' tests, corrected for their number together."""
    corrected = iter(correct_tests([found for pair in pairs for found in pair.found]))
    return [
        replace(pair, found=[next(corrected) for _ in pair.found]) for pair in pairs
    ]
