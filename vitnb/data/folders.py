"""Layouts: what a folder of images is recognised as, and the splits and classes that follow.

Known are, in this order:

- Oxford Flowers-102 as published (see ``oxford``);
- ``train/`` with a folder for each class, ``valid/`` (or ``val/``, ``validation/``) and ``test/`` likewise: ImageNet's, Kaggle's
  (numbered folders, named by ``cat_to_name.json``) and anybody's. A flat ``valid/`` is sorted by its label file, as in
  Tiny-ImageNet (see ``labels``). A ``test/`` without class folders is unlabelled;
- one folder of class folders: split by the study's seed, in each class by SHARES.

Classes are in the sorted order of their folders, as text: 1, 10, 100, 101, 102, 11 ...; a checkpoint carries their names in this order.

Label files: what data sets ship beside their images to say what a class is called and which class a file shows.
"""

import csv
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitnb.data import flowers102
from vitnb.data.images import image_files, visible_folders
from vitnb.errors import UserError, one_line

SHARES = {"train": 0.7, "valid": 0.15, "test": 0.15}


VALID = ("valid", "val", "validation")


MISNAMED = {
    "train",
    "training",
    "test",
    "testing",
    *VALID,
}  # folders that are splits, whatever their case, and no classes


KNOWN = (
    "train/ and valid/ or val/ with a folder for each class; jpg/, imagelabels.mat and setid.mat (Oxford Flowers-102); "
    "or at least two class folders with images, which are split by the study's seed"
)


@dataclass(frozen=True)
class Part:
    """The images of one split, ``train``, ``valid`` or ``test``; ``labels`` (class indices) is empty where there are none."""

    name: str
    folder: Path
    paths: list[Path]
    labels: list[int]


@dataclass(frozen=True)
class Layout:
    """What a folder is: ``told`` in words, its classes as they are shown, and ``part``, which gives a split by its name."""

    root: Path
    told: str
    class_names: list[str]
    part: Callable[[str], Part]


def recognize_layout(folder: Path, seed: int) -> Layout:
    """Recognise a folder, or the only folder in it, as archives often hold one. ``seed``: for a folder that must be split.

    Raises UserError, with what was looked for, if it is no layout, and for one that is incomplete.
    """
    inside = visible_folders(folder)
    if len(inside) == 1 and not _is_one(folder) and _is_one(folder / inside[0]):
        folder, inside = folder / inside[0], visible_folders(folder / inside[0])
    if (folder / "train").is_dir():
        return _folders(folder)
    if any((folder / name).exists() for name in flowers102.FILES):
        return _oxford(folder)
    wrong = next((name for name in inside if name.lower() in MISNAMED), None)
    if wrong:
        raise UserError(f"{folder} has a folder {wrong} and no train: name the splits train, valid and test")
    if len(inside) < 2 or not any(image_files(folder / name) for name in inside):
        raise UserError(f"{folder} has no layout that is known: looked for {KNOWN}")
    return _split_by_seed(folder, inside, seed)


def _is_one(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "setid.mat").is_file()


def _oxford(root: Path) -> Layout:
    splits, classes = flowers102.official_splits(root)
    return Layout(
        root, "Oxford Flowers-102, its official splits", flowers102.CLASS_NAMES[:classes],
        lambda name: Part(name, root / "jpg", *splits[name]),
    )  # fmt: skip


def _folders(root: Path) -> Layout:
    keys = visible_folders(root / "train")
    if len(keys) < 2:
        raise UserError(f"{root / 'train'} has {len(keys)} class folders: at least two are needed, one for each class")
    names, source = class_names(root, keys)
    there = [name for name in ("train", *VALID, "test") if (root / name).is_dir()]
    told = f"folders {', '.join(there)}" + (f"; names from {source.name}" if source else "")

    def part(name: str) -> Part:
        if name == "train":
            return _by_folder(name, root / "train", keys)
        if name == "test" and (root / "test").is_dir():
            return _test(root / "test", keys)
        folder = next((root / spelt for spelt in VALID if (root / spelt).is_dir()), None)
        if folder is None:
            raise UserError(f"no folder {root / 'valid'}: a data set needs train, valid, test")
        if not set(visible_folders(folder)) & set(keys) and (known := labels_of_files(root, folder)):
            return _by_file("valid", folder, keys, *known)
        return _by_folder("valid", folder, keys)

    return Layout(root, told, names, part)


def _by_folder(name: str, folder: Path, keys: list[str]) -> Part:
    """A split whose images lie in a folder for each class."""
    index, paths, found = {key: i for i, key in enumerate(keys)}, [], []
    for key in visible_folders(folder):
        if key not in index:
            raise UserError(f"class folder {folder / key} has no counterpart in train: add it there or remove it")
        files = image_files(folder / key)
        if not files:
            raise UserError(f"class folder {folder / key} is empty: add images or remove the folder")
        paths += files
        found += [index[key]] * len(files)
    if not paths:
        raise UserError(f"{folder} has no class folders with images")
    return Part(name, folder, paths, found)


def _by_file(name: str, folder: Path, keys: list[str], known: dict[Path, str], source: Path) -> Part:
    """A split in one folder, whose classes stand in a file."""
    index, paths = {key: i for i, key in enumerate(keys)}, sorted(known)
    for path in paths:
        if known[path] not in index:
            raise UserError(f"{source} names a class '{known[path]}' that train does not have: get the file again")
    lacking = set(known) - set(image_files(folder))
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} images that {source.name} names, such as {min(lacking).name}: unpack it again"
        )
    return Part(name, folder, paths, [index[known[path]] for path in paths])


def _test(folder: Path, keys: list[str]) -> Part:
    """A test split: by class folders or, where there are none of them (at most one, such as ``images``), without labels."""
    inside = visible_folders(folder)
    if set(inside) & set(keys) or len(inside) > 1:
        return _by_folder("test", folder, keys)
    paths = image_files(folder)
    if not paths:
        raise UserError(f"{folder} holds no images: put the test images there, or remove the folder")
    return Part("test", folder, paths, [])


def _split_by_seed(root: Path, keys: list[str], seed: int) -> Layout:
    """One folder of class folders, each shared out by SHARES, at least one image for each split.

    The order within a class is that of SHA-256 of seed, folder and file name: the same on every machine, and an image that
    is added or removed moves few others.
    """

    def draw(path: Path) -> bytes:
        name = unicodedata.normalize("NFC", f"{seed}/{path.relative_to(root).as_posix()}")
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()

    parts = {name: Part(name, root, [], []) for name in SHARES}
    for label, key in enumerate(keys):
        files = sorted(image_files(root / key), key=draw)
        if len(files) < len(SHARES):
            raise UserError(
                f"class folder {root / key} has {len(files)} images: it takes {len(SHARES)}, one for each split"
            )
        held = {name: max(1, round(SHARES[name] * len(files))) for name in ("valid", "test")}
        ends = {"valid": held["valid"], "test": held["valid"] + held["test"], "train": len(files)}
        begin = 0
        for name, end in ends.items():
            parts[name].paths.extend(sorted(files[begin:end]))
            parts[name].labels.extend([label] * (end - begin))
            begin = end
    names, source = class_names(root, keys)
    told = f"one folder, split by seed {seed}: " + ", ".join(f"{share:.0%} {name}" for name, share in SHARES.items())
    return Layout(root, told + (f"; names from {source.name}" if source else ""), names, parts.__getitem__)


ABOVE = 3  # folders up in which label files are looked for: ImageNet's lie above ILSVRC/Data/CLS-LOC


def class_names(folder: Path, keys: list[str]) -> tuple[list[str], Path | None]:
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


def labels_of_files(folder: Path, valid: Path) -> tuple[dict[Path, str], Path] | None:
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
