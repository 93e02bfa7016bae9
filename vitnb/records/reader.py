"""Read records from disk, find one by its name, and print it."""

import json
from pathlib import Path

import numpy as np

from vitnb.errors import UserError, suggest
from vitnb.records.files import array_digest
from vitnb.records.schema import upgrade
from vitnb.study import Study, load_study, study_names

LONG = 8  # a list with more items is shown by its length and range


def read_record(path: Path, fix: str) -> dict:
    """Return the record in a JSON file, in today's shape (see ``schema.upgrade``).

    Args:
        fix: the end of the message if the file is no record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    required = {"name", "notebook", "started"}
    if not isinstance(record, dict) or not required <= record.keys():
        raise UserError(f"{path} is not a record: {fix}")
    return upgrade(record)


def load_records(study: Study) -> list[dict]:
    """Return every record of a study, oldest first."""
    fix = f"delete it and run 'python -m vitnb study {study.typed}' again"
    paths = sorted((study.outputs / "records").glob("*.json"))
    records = [read_record(path, fix) for path in paths]
    return sorted(records, key=lambda record: record["started"])


def load_array(folder: Path, record: dict, name: str) -> np.ndarray | None:
    """Return an array that a record has written beside it.

    It is None if it is not the record's own, or not finite.

    Args:
        folder: the outputs of the study.
        name: of the file, relative to ``folder``.
    """
    array = np.load(folder / name)
    known = record["arrays"].get(name)
    if known not in (None, array_digest(array)) or not np.isfinite(array).all():
        return None
    return array


def find_record(name: str) -> dict:
    """Return a record by its path, or by its name among the records of all studies.

    Raises:
        UserError: no such record; the message suggests a name.
    """
    return read_record(find_path(name), "name the JSON file of a record")


def find_path(name: str) -> Path:
    """Return the path of a record; see ``find_record``."""
    path = Path(name) if name.endswith(".json") else _path_by_name(name)
    if not path.is_file():
        raise UserError(
            f"no record at {path}: "
            "name one, such as outputs/embedded/records/finetune.json"
        )
    return path


def _path_by_name(name: str) -> Path:
    """Return the path of a record; of two with one name, the first study's."""
    paths = {}
    for study_name in study_names():
        folder = load_study(study_name).outputs / "records"
        for path in folder.glob("*.json"):
            paths.setdefault(path.stem, path)
    if name in paths:
        return paths[name]
    hint = "no study has any yet: run 'python -m vitnb study embedded'"
    if paths:
        hint = suggest(name, paths)
    raise UserError(f"no record '{name}': {hint}")


def format_record(record: dict) -> str:
    """Return a record as text, one line for each value.

    The values of mappings and of short lists of mappings get lines of their own. A long
    list, such as raw samples, is shown by its length and range.
    """
    lines = []
    for key, value in record.items():
        if isinstance(value, dict) and value:
            lines += _lines(key, value)
        elif _is_short_table(value):
            for i, row in enumerate(value):
                lines += _lines(f"{key}[{i}]", row)
        else:
            lines.append(f"{key}: {_format_value(value)}")
    return "\n".join(lines)


def _lines(key: str, values: dict) -> list[str]:
    return [f"{key}.{inner}: {_format_value(item)}" for inner, item in values.items()]


def _is_short_table(value: object) -> bool:
    if not isinstance(value, list) or not value or len(value) > LONG:
        return False
    return isinstance(value[0], dict)


def _format_value(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        items = [f"{key}: {_format_value(item)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list) and len(value) > LONG:
        if all(isinstance(item, (int, float)) for item in value):
            return f"[{len(value)} values, {min(value):.6g} to {max(value):.6g}]"
        return f"[{len(value)} values]"
    if isinstance(value, list):
        return "[" + ", ".join(map(_format_value, value)) + "]"
    return str(value)
