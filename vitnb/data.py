"""Images: the splits of a study, read in one stated way, as what a model sees."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from vitnb import garden, layouts, studies
from vitnb.errors import UserError
from vitnb.pictures import Unreadable, read

SPLITS = ("train", "valid", "test")
READERS = 8  # threads that read images, on a machine with as many cores
NO_LABEL = -1  # stands in a batch for the label of an image that has none


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


def root(study: studies.Study) -> Path:
    """The folder with the study's images; the garden is drawn on first use.

    A study's ``data`` is absolute, relative to the repository, or begins with ``~``. Raises UserError, with where the images
    come from, if they are missing.
    """
    if study.data == "garden":
        folder = studies.ROOT / "data" / "garden"
        try:
            return garden.write_folder(folder)
        except FileExistsError:
            raise UserError(f"{folder} is not the garden of this version: delete it, and it is drawn again") from None
    folder = studies.ROOT / Path(study.data).expanduser()
    if not folder.is_dir():
        where = study.get_data or "put them there, in train/, valid/ and test/"
        raise UserError(f"study '{study.name}' needs its images at {folder}: {where}")
    return folder


def layout(study: studies.Study) -> layouts.Layout:
    """How the study's images are laid out; UserError if they are missing or no layout is recognized (see ``layouts``)."""
    return layouts.find(root(study), study.seed)


def split(study: studies.Study, name: str) -> Split:
    """The split ``train``, ``valid`` or ``test``, in the order that its layout gives (see ``layouts``).

    Where there are no test images, ``test`` is the validation split, and its ``name`` says so.

    Raises UserError for a missing split, an empty class folder, or a class that was not trained.
    """
    found = layout(study)
    part = found.part(name)
    return Split(found.root, part.paths, part.labels, found.class_names, part.name, part.folder)


def scored(study: studies.Study) -> Split:
    """The images that accuracy is measured on: the test split, or the validation split where the test has no labels."""
    test = split(study, "test")
    return test if test.labels else split(study, "valid")


def told(split: Split) -> str:
    """What accuracy is measured on, in words, for what ``scored`` returns."""
    if split.name == "test":
        return f"accuracy is on the test split: {len(split)} images that chose nothing"
    return (
        f"accuracy is on the validation split, {len(split)} images that also choose the epoch: "
        "there are no labelled test images"
    )


def augment(image: Image.Image, generator: np.random.Generator, crop_scale: float) -> Image.Image:
    """A random crop, mirrored half of the time: ``crop_scale`` to all of the area, aspect 3:4 to 4:3.

    A side that would reach beyond the picture is cut to it, which makes the crop smaller than was drawn.
    """
    area = image.width * image.height * generator.uniform(crop_scale, 1.0)
    aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    width = min(image.width, max(1, round(float(np.sqrt(area * aspect)))))
    height = min(image.height, max(1, round(float(np.sqrt(area / aspect)))))
    left = int(generator.integers(image.width - width + 1))
    top = int(generator.integers(image.height - height + 1))
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if generator.random() < 0.5 else image


class Pixels(Dataset):
    """A split as what the model reads: (pixels float32 [3, height, width], label).

    With ``seed``, images are augmented; what image i looks like in epoch e depends on (seed, e, i) alone, whatever
    the number of workers.
    """

    def __init__(self, split: Split, processor, seed: int | None = None, crop_scale: float = 1.0):
        self.split, self.processor, self.seed, self.crop_scale = split, processor, seed, crop_scale
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = self.split.paths[index]
        try:
            image = read(path)
        except Unreadable as error:
            raise UserError(f"cannot read {path} ({error}): replace it or delete it") from None
        if self.seed is not None:
            image = augment(image, np.random.default_rng((self.seed, self.epoch, index)), self.crop_scale)
        label = self.split.labels[index] if self.split.labels else NO_LABEL
        return to_pixels([image], self.processor)[0], label

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        """A batch at once: DataLoader asks for it so."""
        return each(self.__getitem__, indices)


def each(function: Callable, items: Iterable) -> list:
    """``function`` of each item, in order: on many cores by threads, as Pillow and NumPy free the interpreter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < READERS:
        return [function(item) for item in items]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, items))


def to_pixels(images: list[Image.Image], processor) -> torch.Tensor:
    """RGB images -> float32 [len(images), 3, height, width], resized and normalized as the checkpoint says."""
    return processor(images, return_tensors="pt")["pixel_values"]


class Parts:
    """The part that process ``rank`` of ``processes`` takes of every batch of indices: all parts together are the batch.

    Where a last batch is too small for all, those left over take its first image, which must not count for them: every
    process has as many batches.
    """

    def __init__(self, batches: Iterable[list[int]], rank: int, processes: int):
        self.batches, self.rank, self.processes = batches, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.rank :: self.processes] or batch[:1]

    def __len__(self) -> int:
        return len(self.batches)


def batches(
    pixels: Dataset, batch_size: int, shuffle_seed: int | None = None, part: tuple[int, int] = (0, 1)
) -> DataLoader:
    """Batches of (pixels [batch, 3, height, width], labels [batch]); in order, or shuffled from a seed.

    ``part``: (rank, processes), to get one process's part of each of the same batches; see ``Parts``.
    """
    generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    whole = DataLoader(pixels, batch_size, shuffle=shuffle_seed is not None, generator=generator)
    if part == (0, 1):
        return whole
    return DataLoader(pixels, batch_sampler=Parts(whole.batch_sampler, *part), generator=generator)


def first_batch(split: Split, processor, size: int) -> torch.Tensor:
    """Pixels of ``size`` images spread over the split, repeated where it holds fewer: real input for a timing."""
    chosen = [split.paths[i * len(split) // size % len(split)] for i in range(size)]
    return to_pixels([read(path) for path in chosen], processor)
