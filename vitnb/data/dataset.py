"""Held images: pixels that are asked for several times are read and preprocessed once, as far as memory goes."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, TensorDataset

from vitnb.data.images import UnreadableImage, read_image
from vitnb.data.splits import Split
from vitnb.errors import UserError

READERS = 8  # threads that read images, on a machine with as many cores


NO_LABEL = -1  # stands in a batch for the label of an image that has none


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


class PixelDataset(Dataset):
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
            image = read_image(path)
        except UnreadableImage as error:
            raise UserError(f"cannot read {path} ({error}): replace it or delete it") from None
        if self.seed is not None:
            image = augment(image, np.random.default_rng((self.seed, self.epoch, index)), self.crop_scale)
        label = self.split.labels[index] if self.split.labels else NO_LABEL
        return to_pixels([image], self.processor)[0], label

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        """A batch at once: DataLoader asks for it so."""
        return parallel_map(self.__getitem__, indices)


def parallel_map(function: Callable, items: Iterable) -> list:
    """``function`` of each item, in order: on many cores by threads, as Pillow and NumPy free the interpreter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < READERS:
        return [function(item) for item in items]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, items))


def to_pixels(images: list[Image.Image], processor) -> torch.Tensor:
    """RGB images -> float32 [len(images), 3, height, width], resized and normalized as the checkpoint says."""
    return processor(images, return_tensors="pt")["pixel_values"]


class ShardedBatches:
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


def make_batches(
    pixels: Dataset, batch_size: int, shuffle_seed: int | None = None, part: tuple[int, int] = (0, 1)
) -> DataLoader:
    """Batches of (pixels [batch, 3, height, width], labels [batch]); in order, or shuffled from a seed.

    ``part``: (rank, processes), to get one process's part of each of the same batches; see ``Parts``.
    """
    generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    whole = DataLoader(pixels, batch_size, shuffle=shuffle_seed is not None, generator=generator)
    if part == (0, 1):
        return whole
    return DataLoader(pixels, batch_sampler=ShardedBatches(whole.batch_sampler, *part), generator=generator)


def first_batch(split: Split, processor, size: int) -> torch.Tensor:
    """Pixels of ``size`` images spread over the split, repeated where it holds fewer: real input for a timing."""
    chosen = [split.paths[i * len(split) // size % len(split)] for i in range(size)]
    return to_pixels([read_image(path) for path in chosen], processor)


BATCH_SIZE = 128


CACHE_BYTES = 2**32  # bytes of pixels that are held of a split


def load_into_memory(split: Split, processor) -> TensorDataset:
    """A split as the model sees it, read at once: pixels float32 [images, 3, height, width] and labels [images].

    Where its pixels are more than HELD bytes, only as many images as that, spread evenly.
    """
    one = PixelDataset(split, processor)[0][0].nbytes
    some = PixelDataset(split.spread(max(1, CACHE_BYTES // one)), processor)
    return TensorDataset(*(torch.cat(parts) for parts in zip(*make_batches(some, BATCH_SIZE), strict=True)))


class CachedDataset(Dataset):
    """All of a split, each image read when it is first asked for: the first HELD bytes of pixels stay, others are read anew.

    Each of several processes that share a split holds no more than its own part.
    """

    def __init__(self, pixels: PixelDataset):
        self.pixels, self.kept, self.room = pixels, {}, CACHE_BYTES

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        """A batch at once, as ``data.Pixels`` gives it."""
        lacking = [index for index in indices if index not in self.kept]
        read = dict(zip(lacking, self.pixels.__getitems__(lacking), strict=True))
        for index, item in read.items():
            if item[0].nbytes <= self.room:
                self.kept[index] = item
                self.room -= item[0].nbytes
        return [self.kept[index] if index in self.kept else read[index] for index in indices]
