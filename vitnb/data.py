"""Images: the splits of a study as folders of pictures, one folder for each class, read in one stated way."""

import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch.utils.data import DataLoader, Dataset

from vitnb import garden, studies
from vitnb.errors import UserError, one_line

SPLITS = ("train", "valid", "test")
READERS = 8  # threads that read images, on a machine with as many cores
# Everything that Pillow raises for a file that it cannot read whole: damaged AVIF pixels are a RuntimeError, damaged
# EXIF a TypeError or struct.error.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)
ImageFile.LOAD_TRUNCATED_IMAGES = False


@dataclass(frozen=True)
class Split:
    """The images of one split: paths and, for each, the index of its class in ``class_names``."""

    root: Path
    paths: list[Path]
    labels: list[int]
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.paths)


def root(study: studies.Study) -> Path:
    """The folder with ``train``, ``valid`` and ``test``; the garden is drawn on first use.

    Raises UserError, with where the images come from, if they are missing.
    """
    if study.data == "garden":
        folder = studies.ROOT / "data" / "garden"
        try:
            return garden.write_folder(folder)
        except FileExistsError:
            raise UserError(f"{folder} is not the garden of this version: delete it, and it is drawn again") from None
    folder = studies.ROOT / study.data
    if not folder.is_dir():
        where = study.get_data or "put them there, in train/, valid/ and test/"
        raise UserError(f"study '{study.name}' needs its images at {folder}: {where}")
    return folder


def image_files(folder: Path) -> list[Path]:
    """The files below a folder whose names look like pictures (or have no ending), sorted; hidden ones left out."""
    known = Image.registered_extensions()
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in known or not path.suffix)


def split(study: studies.Study, name: str) -> Split:
    """The split ``train``, ``valid`` or ``test``; classes are the folders of ``train``, in sorted order.

    Raises UserError for a missing split, an empty class folder, or a class that was not trained.
    """
    base = root(study)
    for part in {"train", name}:
        if not (base / part).is_dir():
            raise UserError(f"no folder {base / part}: a data set needs {', '.join(SPLITS)}")
    class_names = sorted(path.name for path in (base / "train").iterdir() if path.is_dir())
    if len(class_names) < 2:
        raise UserError(
            f"{base / 'train'} has {len(class_names)} class folders: at least two are needed, one for each class"
        )
    paths, labels = [], []
    for folder in sorted(path for path in (base / name).iterdir() if path.is_dir()):
        if folder.name not in class_names:
            raise UserError(f"class folder {folder} has no counterpart in train: add it there or remove it")
        files = image_files(folder)
        if not files:
            raise UserError(f"class folder {folder} is empty: add images or remove the folder")
        paths += files
        labels += [class_names.index(folder.name)] * len(files)
    if not paths:
        raise UserError(f"{base / name} has no class folders with images")
    return Split(base, paths, labels, class_names)


def read(path: Path) -> Image.Image:
    """One picture in RGB: turned as its EXIF says, the first frame of an animation, 16-bit grey scaled to 8 bits.

    Raises one of UNREADABLE if the file is not a whole image.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


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
        except UNREADABLE as error:
            raise UserError(f"cannot read {path} ({one_line(error)}): replace it or delete it") from None
        if self.seed is not None:
            image = augment(image, np.random.default_rng((self.seed, self.epoch, index)), self.crop_scale)
        return to_pixels([image], self.processor)[0], self.split.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        """A batch at once (DataLoader asks for it so): on many cores by threads, as Pillow and NumPy free the interpreter."""
        if len(os.sched_getaffinity(0)) < READERS:
            return [self[index] for index in indices]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.__getitem__, indices))


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
