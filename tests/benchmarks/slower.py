"""A variant with a planted slowdown: extra work, not sleep."""

import time

import numpy as np
import torch

from vitnb.workers import Bench

EXTRA = 0.02


class Slower(Bench):
    """The same variant, with small matrix products after each forward that take 2% of its time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.warm_up(4)
        forward = np.median(self.block(4, 200))
        piece, times = torch.randn(48, 48), []
        for _ in range(400):
            begin = time.perf_counter()
            for _ in range(10):
                piece @ piece
            times.append((time.perf_counter() - begin) * 1e2)
        count = round(EXTRA * forward / float(np.median(times)))

        def work(*_):
            for _ in range(count):
                piece @ piece

        self.loaded.model.register_forward_hook(work)
