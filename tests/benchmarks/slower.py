"""A variant with a planted slowdown: extra work, not sleep."""

import time

import numpy as np
import torch

from vitnb.measure.worker import LocalVariant, load_local_variant
from vitnb.study import Study

EXTRA = 0.02


class SlowerVariant(LocalVariant):
    """A variant with small matrix products after each forward.

    The products take 2% of the forward's time, as timed in place.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.products = 0
        self.products_ms: list[float] = []
        self.piece = torch.randn(48, 48)
        self.loaded.model.register_forward_hook(self.work)

    def work(self, *_) -> None:
        """Compute the products, and note their time."""
        begin = time.perf_counter()
        for _ in range(self.products):
            self.piece @ self.piece
        self.products_ms.append((time.perf_counter() - begin) * 1e3)

    def warm_up(self, batch_size: int) -> dict:
        """Warm up, then choose the number of products for this batch size.

        Products between forwards cost more than products alone.
        """
        warmed = super().warm_up(batch_size)
        forward = np.median(self.time_block(batch_size, 100))
        medians = []
        for self.products in (10, 60):
            self.products_ms.clear()
            self.time_block(batch_size, 100)
            medians.append(np.median(self.products_ms))
        each = (medians[1] - medians[0]) / 50
        overhead = medians[0] - 10 * each
        self.products = max(0, round((EXTRA * forward - overhead) / each))
        return warmed


VARIANT = "fp32-sdpa"


def load_copy(study: Study, name: str, device: str | None = None) -> LocalVariant:
    """Load the one variant, whatever the name."""
    return load_local_variant(study, VARIANT, device)


def load_slower_copy(
    study: Study, name: str, device: str | None = None
) -> SlowerVariant:
    """Load the one variant, which does extra work, whatever the name."""
    plain = load_copy(study, name, device)
    return SlowerVariant(plain.loaded, plain.split)
