"""Held images: pixels that are asked for several times are read and preprocessed once, as far as memory goes."""

import torch
from torch.utils.data import Dataset, TensorDataset

from vitnb import data

BATCH_SIZE = 128
HELD = 2**32  # bytes of pixels that are held of a split


def spread(split: data.Split, processor) -> TensorDataset:
    """A split as the model sees it, read at once: pixels float32 [images, 3, height, width] and labels [images].

    Where its pixels are more than HELD bytes, only as many images as that, spread evenly.
    """
    one = data.Pixels(split, processor)[0][0].nbytes
    some = data.Pixels(split.spread(max(1, HELD // one)), processor)
    return TensorDataset(*(torch.cat(parts) for parts in zip(*data.batches(some, BATCH_SIZE), strict=True)))


class Held(Dataset):
    """All of a split, each image read when it is first asked for: the first HELD bytes of pixels stay, others are read anew.

    Each of several processes that share a split holds no more than its own part.
    """

    def __init__(self, pixels: data.Pixels):
        self.pixels, self.kept, self.room = pixels, {}, HELD

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
