"""Showing a record: where one number came from, a line for each thing that was asked, found and used."""

import json
from pathlib import Path

from vitnb.errors import UserError, suggest
from vitnb.study import Study, load_study, study_names


def read_record(path: Path, fix: str) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"name", "notebook", "started"} <= record.keys():
        raise UserError(f"{path} is not a record: {fix}")
    return record


def load_records(study: Study) -> list[dict]:
    """Every record of a study, oldest first."""
    found = []
    for path in sorted((study.outputs / "records").glob("*.json")):
        found.append(read_record(path, f"delete it and run 'python -m vitnb study {study.typed}' again"))
    return sorted(found, key=lambda record: record["started"])


def find_record(name: str) -> dict:
    """A record by its path, or by its name in one of the studies' outputs; raises UserError with the nearest right name."""
    path = Path(name)
    if path.suffix != ".json":
        paths = {
            p.stem: p for s in reversed(study_names()) for p in (load_study(s).outputs / "records").glob("*.json")
        }
        if name not in paths:
            known = suggest(name, paths) if paths else "no study has any yet: run 'python -m vitnb study embedded'"
            raise UserError(f"no record '{name}': {known}")
        path = paths[name]
    if not path.is_file():
        raise UserError(f"no record at {path}: name one, such as outputs/embedded/records/finetune.json")
    return read_record(path, "name the JSON file of a record")


def _short(value: object) -> str:
    """A value on one line: raw samples by their number and range, mappings by their entries."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list) and len(value) > 8:
        numbers = all(isinstance(item, (int, float)) for item in value)
        return f"[{len(value)} values" + (f", {min(value):.6g} to {max(value):.6g}]" if numbers else "]")
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return "-" if value is None or value == "" else str(value)


def format_record(record: dict) -> str:
    """A record as text: a line for each thing asked, found and used; raw samples by number and range."""
    lines = []
    for key, value in record.items():
        if isinstance(value, dict) and value:
            lines += [f"{key}.{inner}: {_short(item)}" for inner, item in value.items()]
        elif isinstance(value, list) and value and isinstance(value[0], dict) and len(value) <= 8:
            lines += [
                f"{key}[{i}].{inner}: {_short(item)}" for i, row in enumerate(value) for inner, item in row.items()
            ]
        else:
            lines.append(f"{key}: {_short(value)}")
    return "\n".join(lines)
