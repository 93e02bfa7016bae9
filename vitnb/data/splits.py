"""Images: the splits of a study, read in one stated way, as what a model sees."""

from dataclasses import dataclass, replace
from pathlib import Path

from vitnb.data import folders, garden
from vitnb.errors import UserError
from vitnb.study import ROOT, Study

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Split:
    """The images of one split: paths and, for each, the index of its class in ``class_names``.

    ``labels`` is empty where the data set gives none, as for many test splits. ``name`` says which images these are: train,
    valid or test. ``folder`` is where they lie, ``root`` the folder of the whole data set.
    """

    root: Path
    paths: list[Path]
    labels: list[int]
    class_names: list[str]
    name: str = ""
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def spread(self, most: int) -> "Split":
        """The split itself, or, where it holds more, ``most`` of its images: evenly spread, and so over its classes."""
        if len(self) <= most:
            return self
        return self._take([i * len(self) // most for i in range(most)])

    def halves(self) -> tuple["Split", "Split"]:
        """Every second image of each class, and the others: of images in the order of their classes, even and odd indices.

        Raises UserError for a split of one image.
        """
        if len(self) < 2:
            raise UserError(
                f"{self.folder} holds {len(self)} images of the {self.name} split: two halves take at least 2"
            )
        order = sorted(range(len(self)), key=lambda i: self.labels[i] if self.labels else 0)
        return self._take(sorted(order[::2])), self._take(sorted(order[1::2]))

    def _take(self, chosen: list[int]) -> "Split":
        labels = [self.labels[i] for i in chosen] if self.labels else []
        return replace(self, paths=[self.paths[i] for i in chosen], labels=labels)


def image_folder(study: Study) -> Path:
    """The folder with the study's images; the garden is drawn on first use.

    A study's ``data`` is absolute, relative to the repository, or begins with ``~``. Raises UserError, with where the images
    come from, if they are missing.
    """
    if study.data == "garden":
        folder = ROOT / "data" / "garden"
        try:
            return garden.write_folder(folder)
        except FileExistsError:
            raise UserError(f"{folder} is not the garden of this version: delete it, and it is drawn again") from None
    folder = ROOT / Path(study.data).expanduser()
    if not folder.is_dir():
        where = study.get_data or "put them there, in train/, valid/ and test/"
        raise UserError(f"study '{study.name}' needs its images at {folder}: {where}")
    return folder


def load_layout(study: Study) -> folders.Layout:
    """How the study's images are laid out; UserError if they are missing or no layout is recognized (see ``layouts``)."""
    return folders.recognize_layout(image_folder(study), study.seed)


def load_split(study: Study, name: str) -> Split:
    """The split ``train``, ``valid`` or ``test``, in the order that its layout gives (see ``layouts``).

    Where there are no test images, ``test`` is the validation split, and its ``name`` says so.

    Raises UserError for a missing split, an empty class folder, or a class that was not trained.
    """
    found = load_layout(study)
    part = found.part(name)
    return Split(found.root, part.paths, part.labels, found.class_names, part.name, part.folder)


def evaluation_split(study: Study) -> Split:
    """The images that accuracy is measured on: the test split, or the validation split where the test has no labels."""
    test = load_split(study, "test")
    return test if test.labels else load_split(study, "valid")


def describe_split(split: Split) -> str:
    """What accuracy is measured on, in words, for what ``scored`` returns."""
    if split.name == "test":
        return f"accuracy is on the test split: {len(split)} images that chose nothing"
    return (
        f"accuracy is on the validation split, {len(split)} images that also choose the epoch: "
        "there are no labelled test images"
    )
