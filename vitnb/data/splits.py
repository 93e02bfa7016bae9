"""Load the train, validation and test split of a study's data set.

A split is a list of paths and labels: nothing is read here, and no PyTorch is loaded.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from vitnb.data import folders
from vitnb.errors import UserError
from vitnb.records.files import digest_files
from vitnb.study import ROOT, Study

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Split:
    """The images of one split: their paths, and their labels.

    ``labels`` holds for each image the index of its class in ``class_names``. The list
    is empty where the data set has no labels, as in many test splits. ``name`` is
    train, valid or test. ``folder`` holds the split's images, ``root`` the whole data
    set.
    """

    root: Path
    paths: list[Path]
    labels: list[int]
    class_names: list[str]
    name: str = ""
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def as_dependency(self) -> dict[str, dict[str, str]]:
        """Return what an identity holds of this split, see ``records.identity``.

        The digest is of the files' bytes, their order, and their labels. A file that
        cannot be read counts by its name: whoever decodes it says what is wrong.
        """
        readable, others = [], []
        for path in self.paths:
            if os.access(path, os.R_OK):
                readable.append(path)
            else:
                others.append(path.name)
        digest = digest_files(readable, self.labels, self.class_names, others)
        return {"data": {self.name: digest}}

    def subsample(self, most: int) -> "Split":
        """Return at most ``most`` images, evenly spread over the split.

        Paths stand in the order of their classes, so the images are spread over the
        classes too. A split that is small enough is returned as it is.
        """
        if len(self) <= most:
            return self
        return self._select([i * len(self) // most for i in range(most)])

    def split_in_half(self) -> tuple["Split", "Split"]:
        """Split in two halves, each with every second image of each class.

        Where images stand in the order of their classes, the halves have the even and
        the odd indices.

        Raises:
            UserError: the split has fewer than two images.
        """
        if len(self) < 2:
            raise UserError(
                f"{self.folder} holds {len(self)} images of the {self.name} split: "
                "two halves take at least 2"
            )
        order = list(range(len(self)))
        if self.labels:
            order.sort(key=lambda i: self.labels[i])
        return self._select(sorted(order[::2])), self._select(sorted(order[1::2]))

    def _select(self, indices: list[int]) -> "Split":
        labels = [self.labels[i] for i in indices] if self.labels else []
        return replace(self, paths=[self.paths[i] for i in indices], labels=labels)


def image_folder(study: Study) -> Path:
    """Return the folder with the study's images; draw the garden on first use.

    A study's ``data`` is ``garden``, an absolute path, a path relative to the
    repository, or one that begins with ``~``.

    Raises:
        UserError: the images are missing; the message says where they come from.
    """
    if study.data == "garden":
        from vitnb.data import garden  # for this data set alone

        folder = ROOT / "data" / "garden"
        try:
            return garden.write_folder(folder)
        except FileExistsError:
            raise UserError(
                f"{folder} is not the garden of this version: delete it, "
                "and it is drawn again"
            ) from None
    folder = ROOT / Path(study.data).expanduser()
    if not folder.is_dir():
        where = study.get_data or "put them there, in train/, valid/ and test/"
        raise UserError(f"study '{study.name}' needs its images at {folder}: {where}")
    return folder


def load_layout(study: Study) -> folders.Layout:
    """Return the layout of the study's images (see ``vitnb.data.folders``).

    Raises:
        UserError: the images are missing, or no layout is recognized.
    """
    return folders.recognize_layout(image_folder(study), study.seed)


def load_split(study: Study, name: str) -> Split:
    """Load the split ``train``, ``valid`` or ``test``, in the order of its layout.

    Where there are no test images, ``test`` gives the validation split, whose ``name``
    is ``valid``.

    Raises:
        UserError: the split is missing, a class folder is empty, or a class has no
            training images.
    """
    layout = load_layout(study)
    part = layout.part(name)
    return Split(
        root=layout.root,
        paths=part.paths,
        labels=part.labels,
        class_names=layout.class_names,
        name=part.name,
        folder=part.folder,
    )


def evaluation_split(study: Study) -> Split:
    """Load the split that accuracy is measured on.

    The test split, or the validation split where the test images have no labels.
    """
    test = load_split(study, "test")
    return test if test.labels else load_split(study, "valid")


def describe_split(split: Split) -> str:
    """Describe the split that accuracy is measured on, in one line."""
    if split.name == "test":
        return f"accuracy is on the test split: {len(split)} images that chose nothing"
    return (
        f"accuracy is on the validation split, {len(split)} images that also choose "
        "the epoch: there are no labelled test images"
    )
