"""Label files: what data sets ship beside their images to say what a class is called and which class a file shows."""

import csv
import json
from collections import Counter
from pathlib import Path

from vitnb.errors import UserError, one_line

ABOVE = 3  # folders up in which label files are looked for: ImageNet's lie above ILSVRC/Data/CLS-LOC


def names(folder: Path, keys: list[str]) -> tuple[list[str], Path | None]:
    """What the class folders ``keys`` of a data set are called, and the file that says so; their own names if none does.

    Looked for, in the folder and above: ``cat_to_name.json`` (number to name), ``LOC_synset_mapping.txt`` and ``words.txt``
    (a WordNet id and its synonyms, of which the first is taken). A file above counts only if it names every class. A name
    that two classes share (ImageNet has two cranes) gets the folder's name in parentheses.

    Raises UserError for a file that cannot be read, or one in the folder itself that lacks a class.
    """
    for level in (folder, *folder.parents[:ABOVE]):
        for file, reader in (("cat_to_name.json", _json), ("LOC_synset_mapping.txt", _words), ("words.txt", _words)):
            if not (level / file).is_file():
                continue
            known = reader(level / file)
            lacking = [key for key in keys if not known.get(key)]
            if not lacking:
                return _unambiguous([known[key] for key in keys], keys), level / file
            if level == folder:
                raise UserError(
                    f"{level / file} has no name for class folder '{lacking[0]}': add it, or delete the file"
                )
    return keys, None


def of_files(folder: Path, valid: Path) -> tuple[dict[Path, str], Path] | None:
    """The class of each validation image where one flat folder holds them all, and the file that says so; None without one.

    Tiny-ImageNet has ``val/val_annotations.txt`` beside ``val/images``, ImageNet (as Kaggle has it) ``LOC_val_solution.csv``.
    """
    file = valid / "val_annotations.txt"
    if file.is_file():
        rows = [line.split("\t") for line in _text(file).splitlines() if line.strip()]
        return {valid / "images" / row[0]: _second(row, file) for row in rows}, file
    for level in (folder, *folder.parents[:ABOVE]):
        file = level / "LOC_val_solution.csv"
        if file.is_file():  # ImageId, and "n01440764 10 20 30 40 ...": classes and boxes
            rows = [row for row in csv.reader(_text(file).splitlines()[1:]) if row]
            return {valid / f"{row[0]}.JPEG": _second(row, file).split()[0] for row in rows}, file
    return None


def _second(row: list[str], file: Path) -> str:
    if len(row) < 2 or not row[1].strip():
        raise UserError(f"{file} has a line without a class, '{row[0]}': get the file again")
    return row[1].strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): get the file again") from None


def _json(path: Path) -> dict[str, str]:
    try:
        known = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}): get the file again") from None
    if not isinstance(known, dict) or not all(isinstance(name, str) for name in known.values()):
        raise UserError(f'{path} must map folders to names, as in {{"1": "pink primrose"}}')
    return {key: name.strip() for key, name in known.items()}


def _words(path: Path) -> dict[str, str]:
    rows = (line.split(maxsplit=1) for line in _text(path).splitlines())
    return {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) == 2}


def _unambiguous(names: list[str], keys: list[str]) -> list[str]:
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({key})" for name, key in zip(names, keys, strict=True)]
