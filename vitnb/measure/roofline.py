"""Measure the roofline: the shortest time that arithmetic or memory traffic allows.

Peaks are measured on this machine, not taken from a data sheet (Williams et al.,
*Roofline*, 2009).
"""

import math
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from vitnb.devices import synchronize
from vitnb.models import checkpoints
from vitnb.models.loader import LoadedVariant


def count_flops(config, batch_size: int, sides: tuple[int, int] | None = None) -> int:
    """Count the floating-point operations of one forward, 2 for a multiply-add.

    Products of matrices, attention and convolution count. PyTorch counts them on a
    model without memory. A quantized variant counts as its unquantized model.

    Args:
        sides: height and width of the images in pixels; None: those of the config.
    """
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    if sides is None:
        side = config.image_size
        sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(
            type(config).from_dict(settings),
            attn_implementation="eager",
            dtype=torch.float32,
        ).eval()
        pixels = torch.empty(batch_size, config.num_channels, *sides)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels)
    return counter.get_total_flops()


def _best_seconds(
    run: Callable[[], object], device: torch.device, limit: float = 0.5
) -> float:
    """Return the shortest time of repeated runs: a peak is the machine's best.

    Runs repeat for ``limit`` seconds, at least once.
    """
    run()  # the first run may take longer than the limit
    best = math.inf
    end = time.perf_counter() + limit
    while best == math.inf or time.perf_counter() < end:
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def measure_peaks(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the peaks of this machine.

    Returns:
        matmul_tflops: a large product of random matrices in ``dtype``, 10^12 operations
            a second.
        copy_gbs: a copy in memory, 10^9 bytes read and written a second.
    """
    side, size = (8192, 2**30) if device.type == "cuda" else (1536, 2**27)
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matmul_seconds = _best_seconds(lambda: a @ b, device)
    copy_seconds = _best_seconds(lambda: target.copy_(source), device)
    return {
        "matmul_tflops": 2 * side**3 / matmul_seconds / 1e12,
        "copy_gbs": 2 * size / copy_seconds / 1e9,
    }


def measure_roofline(
    loaded: LoadedVariant, batch_sizes: list[int]
) -> dict[str, object]:
    """Measure the peaks, and count the operations of a forward at each batch size.

    Operations that a fused forward leaves out do not count as done.

    Returns:
        matmul_tflops, copy_gbs: see ``measure_peaks``; flops: {batch size: operations}.
    """
    sides = checkpoints.image_sides(loaded.processor)
    flops = {}
    for size in batch_sizes:
        flops[str(size)] = count_flops(loaded.model.config, size, sides)
        if hasattr(loaded.model, "flops_left_out"):
            flops[str(size)] -= loaded.model.flops_left_out(size)
    return measure_peaks(loaded.device, loaded.dtype) | {"flops": flops}
