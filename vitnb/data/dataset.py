"""Batches of pixels from a split: preprocessing, augmentation, batching and caching."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, TensorDataset

from vitnb.data.images import UnreadableImage, parallel_map, read_image
from vitnb.data.splits import Split
from vitnb.errors import UserError

NO_LABEL = -1  # the label, in a batch, of an image that has none
BATCH_SIZE = 128
CACHE_BYTES = 2**32  # most bytes of pixels that are kept of a split


def to_pixels(images: list[Image.Image], processor) -> torch.Tensor:
    """Preprocess RGB images: resize and normalize as the checkpoint says.

    Returns:
        float32 [len(images), 3, height, width].
    """
    return processor(images, return_tensors="pt")["pixel_values"]


def augment(
    image: Image.Image, generator: np.random.Generator, crop_scale: float
) -> Image.Image:
    """Crop an image at random, and mirror it half of the time.

    The crop has ``crop_scale`` to all of the area, and an aspect of 3:4 to 4:3. A side
    that is longer than the image's is cut, so such a crop is smaller than was drawn.
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
    """A split as a model's input: (pixels float32 [3, height, width], label).

    With ``seed``, images are augmented. The crop of image i in epoch e depends on
    (seed, e, i) alone, whatever the number of workers.
    """

    def __init__(
        self,
        split: Split,
        processor,
        seed: int | None = None,
        crop_scale: float = 1.0,
    ):
        self.split = split
        self.processor = processor
        self.seed = seed
        self.crop_scale = crop_scale
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = self.split.paths[index]
        try:
            image = read_image(path)
        except UnreadableImage as error:
            raise UserError(
                f"cannot read {path} ({error}): replace it or delete it"
            ) from None
        if self.seed is not None:
            generator = np.random.default_rng((self.seed, self.epoch, index))
            image = augment(image, generator, self.crop_scale)
        label = self.split.labels[index] if self.split.labels else NO_LABEL
        return to_pixels([image], self.processor)[0], label

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        """Return a whole batch: DataLoader prefers this to one call an image."""
        return parallel_map(self.__getitem__, indices)


class CachedDataset(Dataset):
    """A dataset that caches preprocessed pixels, up to CACHE_BYTES.

    Each image is read on first use. Once the cache is full, other images are read at
    every use. Processes that share a split cache their own parts only.
    """

    def __init__(self, pixels: PixelDataset):
        self.pixels = pixels
        self.cache = {}
        self.free_bytes = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        """Return a whole batch, as ``PixelDataset`` does."""
        missing = [index for index in indices if index not in self.cache]
        new = dict(zip(missing, self.pixels.__getitems__(missing), strict=True))
        for index, item in new.items():
            if item[0].nbytes <= self.free_bytes:
                self.cache[index] = item
                self.free_bytes -= item[0].nbytes
        return [
            self.cache[index] if index in self.cache else new[index]
            for index in indices
        ]


class ShardedBatches:
    """One process's share of every batch of indices.

    The shares of all processes together are the batch. Every process gets equally many
    batches: where the last batch has too few images, a process left without one gets
    the batch's first image, which the caller must not count.
    """

    def __init__(self, batches: Iterable[list[int]], rank: int, processes: int):
        self.batches = batches
        self.rank = rank
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.rank :: self.processes] or batch[:1]

    def __len__(self) -> int:
        return len(self.batches)


def make_batches(
    pixels: Dataset,
    batch_size: int,
    shuffle_seed: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> DataLoader:
    """Return batches of pixels [batch, 3, height, width] and labels [batch].

    Args:
        shuffle_seed: seed of the order; None keeps the split's order.
        part: (rank, processes), for one process's share of each batch (see
            ``ShardedBatches``).
    """
    generator = None
    if shuffle_seed is not None:
        generator = torch.Generator().manual_seed(shuffle_seed)
    loader = DataLoader(
        pixels, batch_size, shuffle=generator is not None, generator=generator
    )
    if part == (0, 1):
        return loader
    shares = ShardedBatches(loader.batch_sampler, *part)
    return DataLoader(pixels, batch_sampler=shares, generator=generator)


def first_batch(split: Split, processor, size: int) -> torch.Tensor:
    """Return pixels of ``size`` images spread over the split: real input for a timing.

    A split with fewer images repeats them.
    """
    count = len(split)
    paths = [split.paths[i * count // size % count] for i in range(size)]
    return to_pixels([read_image(path) for path in paths], processor)


def load_into_memory(split: Split, processor) -> TensorDataset:
    """Load a split: pixels float32 [images, 3, height, width], labels [images].

    Of a split whose pixels exceed CACHE_BYTES, load as many images as fit, evenly
    spread.
    """
    bytes_per_image = PixelDataset(split, processor)[0][0].nbytes
    fitting = split.subsample(max(1, CACHE_BYTES // bytes_per_image))
    batches = list(make_batches(PixelDataset(fitting, processor), BATCH_SIZE))
    pixels = torch.cat([pixels for pixels, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    return TensorDataset(pixels, labels)
