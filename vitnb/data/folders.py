"""Recognize the layout of an image folder: its splits, labels and class names.

Known layouts, in the order in which they are tried:

- ``train/`` with a folder for each class, ``valid/`` (or ``val/``, ``validation/``) and
  ``test/`` likewise, as ImageNet and Kaggle have them. Kaggle's numbered folders get
  their names from ``cat_to_name.json``. A flat ``valid/`` is labelled by its label
  file, as in Tiny-ImageNet. A ``test/`` without class folders has no labels.
- Oxford Flowers-102 as published (see ``vitnb.data.flowers102``).
- One folder of class folders, split by the study's seed, each class by SHARES.

Classes stand in the sorted order of their folders' names as text: 1, 10, 100, 101, 102,
11 ... A checkpoint carries the class names in the same order.
"""

import csv
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitnb.data.images import image_files, visible_folders
from vitnb.errors import UserError, one_line

SHARES = {"train": 0.7, "valid": 0.15, "test": 0.15}
VALID = ("valid", "val", "validation")

# Names of splits, in any case: a folder of such a name is no class.
SPLIT_NAMES = {"train", "training", "test", "testing", *VALID}
KNOWN = (
    "train/ and valid/ or val/ with a folder for each class; jpg/, imagelabels.mat and "
    "setid.mat (Oxford Flowers-102); or at least two class folders with images, which "
    "are split by the study's seed"
)

# Levels up in which label files are looked for: ImageNet's lie above the folder
# ILSVRC/Data/CLS-LOC.
ABOVE = 3


@dataclass(frozen=True)
class Part:
    """The images of one split: ``train``, ``valid`` or ``test``.

    ``labels`` holds class indices, and is empty where there are none.
    """

    name: str
    folder: Path
    paths: list[Path]
    labels: list[int]


@dataclass(frozen=True)
class Layout:
    """A recognized folder.

    ``told`` describes the layout in words. ``class_names`` are the names to show.
    ``part`` returns a split by its name.
    """

    root: Path
    told: str
    class_names: list[str]
    part: Callable[[str], Part]


def recognize_layout(folder: Path, seed: int) -> Layout:
    """Recognize the layout of a folder, or of the only folder in it.

    Archives often hold one folder. ``seed`` is for a folder that must be split.

    Raises:
        UserError: no layout is recognized, or the layout is incomplete.
    """
    inside = visible_folders(folder)
    if len(inside) == 1 and not _has_splits(folder) and _has_splits(folder / inside[0]):
        folder = folder / inside[0]
        inside = visible_folders(folder)
    if (folder / "train").is_dir():
        return _split_folders(folder)

    from vitnb.data import flowers102  # loads SciPy, for this layout alone

    if any((folder / name).exists() for name in flowers102.FILES):
        splits, classes = flowers102.official_splits(folder)
        return Layout(
            folder,
            "Oxford Flowers-102, its official splits",
            flowers102.CLASS_NAMES[:classes],
            lambda name: Part(name, folder / "jpg", *splits[name]),
        )
    misnamed = next((name for name in inside if name.lower() in SPLIT_NAMES), None)
    if misnamed:
        raise UserError(
            f"{folder} has a folder {misnamed} and no train: "
            "name the splits train, valid and test"
        )
    if len(inside) < 2 or not any(image_files(folder / name) for name in inside):
        raise UserError(f"{folder} has no layout that is known: looked for {KNOWN}")
    return _split_by_seed(folder, inside, seed)


def _has_splits(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "setid.mat").is_file()


# ---------------------------------------------------------------- folders of splits


def _split_folders(root: Path) -> Layout:
    """Return the layout of a folder with ``train/``."""
    keys = visible_folders(root / "train")
    if len(keys) < 2:
        raise UserError(
            f"{root / 'train'} has {len(keys)} class folders: "
            "at least two are needed, one for each class"
        )
    names, source = class_names(root, keys)
    present = [name for name in ("train", *VALID, "test") if (root / name).is_dir()]
    told = f"folders {', '.join(present)}{_names_from(source)}"

    def part(name: str) -> Part:
        if name == "train":
            return _labelled_by_folder(name, root / "train", keys)
        if name == "test" and (root / "test").is_dir():
            return _test_part(root / "test", keys)
        return _valid_part(root, keys)

    return Layout(root, told, names, part)


def _names_from(source: Path | None) -> str:
    return f"; names from {source.name}" if source else ""


def _valid_part(root: Path, keys: list[str]) -> Part:
    """Return the validation split: by class folders, or by a label file."""
    folder = next((root / name for name in VALID if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(
            f"no folder {root / 'valid'}: a data set needs train, valid, test"
        )
    if not set(visible_folders(folder)) & set(keys):
        known = labels_of_files(root, folder)
        if known:
            return _labelled_by_file("valid", folder, keys, *known)
    return _labelled_by_folder("valid", folder, keys)


def _test_part(folder: Path, keys: list[str]) -> Part:
    """Return the test split: by class folders, or without labels.

    Images without labels may lie in one folder of any name, such as ``images``.
    """
    inside = visible_folders(folder)
    if set(inside) & set(keys) or len(inside) > 1:
        return _labelled_by_folder("test", folder, keys)
    paths = image_files(folder)
    if not paths:
        raise UserError(
            f"{folder} holds no images: put the test images there, or remove the folder"
        )
    return Part("test", folder, paths, [])


def _labelled_by_folder(name: str, folder: Path, keys: list[str]) -> Part:
    """Return a split that has a folder for each class."""
    index = {key: i for i, key in enumerate(keys)}
    paths = []
    labels = []
    for key in visible_folders(folder):
        if key not in index:
            raise UserError(
                f"class folder {folder / key} has no counterpart in train: "
                "add it there or remove it"
            )
        files = image_files(folder / key)
        if not files:
            raise UserError(
                f"class folder {folder / key} is empty: add images or remove the folder"
            )
        paths += files
        labels += [index[key]] * len(files)
    if not paths:
        raise UserError(f"{folder} has no class folders with images")
    return Part(name, folder, paths, labels)


def _labelled_by_file(
    name: str, folder: Path, keys: list[str], known: dict[Path, str], source: Path
) -> Part:
    """Return a split in one folder, with the classes in the file ``source``."""
    index = {key: i for i, key in enumerate(keys)}
    paths = sorted(known)
    for path in paths:
        if known[path] not in index:
            raise UserError(
                f"{source} names a class '{known[path]}' that train does not have: "
                "get the file again"
            )
    lacking = set(known) - set(image_files(folder))
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} images that {source.name} names, "
            f"such as {min(lacking).name}: unpack it again"
        )
    return Part(name, folder, paths, [index[known[path]] for path in paths])


# ---------------------------------------------------------------- one folder


def _split_by_seed(root: Path, keys: list[str], seed: int) -> Layout:
    """Split one folder of class folders by SHARES, each class for itself.

    Every split gets at least one image of each class. Within a class, images stand in
    the order of the SHA-256 of seed, folder and file name. So every machine makes the
    same splits, and adding or removing an image moves few others.
    """

    def digest(path: Path) -> bytes:
        # Disks spell one accent in two ways: NFC makes them one.
        name = unicodedata.normalize(
            "NFC", f"{seed}/{path.relative_to(root).as_posix()}"
        )
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()

    parts = {name: Part(name, root, [], []) for name in SHARES}
    for label, key in enumerate(keys):
        files = sorted(image_files(root / key), key=digest)
        if len(files) < len(SHARES):
            raise UserError(
                f"class folder {root / key} has {len(files)} images: "
                f"it takes {len(SHARES)}, one for each split"
            )
        valid_end = max(1, round(SHARES["valid"] * len(files)))
        test_end = valid_end + max(1, round(SHARES["test"] * len(files)))
        for name, some in (
            ("valid", files[:valid_end]),
            ("test", files[valid_end:test_end]),
            ("train", files[test_end:]),
        ):
            parts[name].paths.extend(sorted(some))
            parts[name].labels.extend([label] * len(some))
    names, source = class_names(root, keys)
    shares = ", ".join(f"{share:.0%} {name}" for name, share in SHARES.items())
    told = f"one folder, split by seed {seed}: {shares}{_names_from(source)}"
    return Layout(root, told, names, parts.__getitem__)


# ---------------------------------------------------------------- label files


def class_names(folder: Path, keys: list[str]) -> tuple[list[str], Path | None]:
    """Return the names of the class folders ``keys``, and the file that has them.

    Without such a file, classes are called as their folders, and the file is None.
    Files are looked for in the data set's folder and up to ABOVE folders up:
    ``cat_to_name.json`` (folder to name), ``LOC_synset_mapping.txt`` and ``words.txt``
    (a WordNet id and its synonyms: the first is taken). A file further up counts only
    if every class has a name in it. A name that two classes share (ImageNet has two
    cranes) gets the folder's name in parentheses.

    Raises:
        UserError: a file cannot be read, or a file in the folder itself lacks a class.
    """
    readers = {
        "cat_to_name.json": _read_json,
        "LOC_synset_mapping.txt": _read_synonyms,
        "words.txt": _read_synonyms,
    }
    for level in (folder, *folder.parents[:ABOVE]):
        for file, reader in readers.items():
            if not (level / file).is_file():
                continue
            known = reader(level / file)
            lacking = [key for key in keys if not known.get(key)]
            if not lacking:
                return _unambiguous([known[key] for key in keys], keys), level / file
            if level == folder:
                raise UserError(
                    f"{level / file} has no name for class folder '{lacking[0]}': "
                    "add it, or delete the file"
                )
    return keys, None


def labels_of_files(folder: Path, valid: Path) -> tuple[dict[Path, str], Path] | None:
    """Return the class of each image in a flat validation folder, and the label file.

    Tiny-ImageNet has ``val/val_annotations.txt`` beside ``val/images``. ImageNet, as
    Kaggle has it, comes with ``LOC_val_solution.csv``. Without a label file: None.
    """
    file = valid / "val_annotations.txt"
    if file.is_file():
        lines = [line for line in _read_text(file).splitlines() if line.strip()]
        rows = [line.split("\t") for line in lines]
        return {valid / "images" / row[0]: _second(row, file) for row in rows}, file
    for level in (folder, *folder.parents[:ABOVE]):
        file = level / "LOC_val_solution.csv"
        if file.is_file():
            # ImageId, and classes with their boxes: "n01440764 10 20 30 40 ..."
            rows = [row for row in csv.reader(_read_text(file).splitlines()[1:]) if row]
            return {
                valid / f"{row[0]}.JPEG": _second(row, file).split()[0] for row in rows
            }, file
    return None


def _second(row: list[str], file: Path) -> str:
    if len(row) < 2 or not row[1].strip():
        raise UserError(
            f"{file} has a line without a class, '{row[0]}': get the file again"
        )
    return row[1].strip()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({one_line(error)}): get the file again"
        ) from None


def _read_json(path: Path) -> dict[str, str]:
    try:
        known = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({one_line(error)}): get the file again"
        ) from None
    if not isinstance(known, dict) or not all(
        isinstance(name, str) for name in known.values()
    ):
        raise UserError(
            f'{path} must map folders to names, as in {{"1": "pink primrose"}}'
        )
    return {key: name.strip() for key, name in known.items()}


def _read_synonyms(path: Path) -> dict[str, str]:
    """Read lines of an id and its synonyms; return the first synonym of each id."""
    rows = (line.split(maxsplit=1) for line in _read_text(path).splitlines())
    return {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) == 2}


def _unambiguous(names: list[str], keys: list[str]) -> list[str]:
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name} ({key})"
        for name, key in zip(names, keys, strict=True)
    ]
