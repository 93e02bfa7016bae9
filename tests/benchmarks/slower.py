"""A variant with a planted slowdown: extra work, not sleep."""

import time

import numpy as np
import torch

from vitnb.measure.worker import VariantServer

EXTRA = 0.02


class Slower(VariantServer):
    """The same variant, with small matrix products after each forward that take 2% of its time, as timed in place."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.products, self.took, self.piece = 0, [], torch.randn(48, 48)
        self.loaded.model.register_forward_hook(self.work)

    def work(self, *_) -> None:
        begin = time.perf_counter()
        for _ in range(self.products):
            self.piece @ self.piece
        self.took.append((time.perf_counter() - begin) * 1e3)

    def warm_up(self, batch_size: int) -> dict:
        """Warm up, then see what the forward and the products take at this batch size: between forwards they cost more than alone."""
        found = super().warm_up(batch_size)
        forward = np.median(self.block(batch_size, 100))
        took = []
        for self.products in (10, 60):
            self.took.clear()
            self.block(batch_size, 100)
            took.append(np.median(self.took))
        each = (took[1] - took[0]) / 50
        self.products = max(0, round((EXTRA * forward - (took[0] - 10 * each)) / each))
        return found
