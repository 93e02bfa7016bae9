"""Drawn flowers as a model reads them: fresh ones without end, resized as the saved preprocessor resizes pictures."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vitnb import garden, studies

TOGETHER = 1024  # images drawn at once: a drawing is hundreds of small kernels, which few images would not fill


def batches(asked: studies.Pretrain, generator: torch.Generator, seed: int,
            mirror: bool = False) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Fresh drawings without end, in batches as `to_pixels` returns them, with labels int64 [batch]; `mirror`: half of them."""
    size, on = asked.batch_size, generator.device
    together = size * max(1, TOGETHER // size)
    while True:
        images, labels = garden.pretraining_batch(together, generator, asked.drawn_size, seed)
        if mirror:
            images = torch.where(
                torch.rand(together, 1, 1, 1, generator=generator, device=on) < 0.5, images.flip(2), images
            )
        for some, named in zip(images.split(size), labels.split(size), strict=True):
            yield to_pixels(some, asked.image_size), named


def to_pixels(images: Tensor, side: int) -> Tensor:
    """uint8 [n, h, w, 3] to float32 [n, 3, side, side] in [-1, 1], as the saved preprocessor does.

    Pillow's bilinear filter to within one grey level of 255: it rounds once more, between rows and columns.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True).round()
    return pixels / 127.5 - 1.0
