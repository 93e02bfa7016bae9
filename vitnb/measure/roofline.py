"""The roofline: how long a forward would take if this machine did nothing but its arithmetic, or only read its weights.

Peaks are measured here, not taken from a data sheet (Williams et al., *Roofline*, 2009).
"""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from vitnb.models import checkpoints
from vitnb.models.loader import LoadedVariant


def count_flops(config, batch_size: int, sides: tuple[int, int] | None = None) -> int:
    """Floating-point operations of one forward: products of matrices, attention and convolution; 2 for a multiply-add.

    Counted by PyTorch on a model without memory, so that quantized variants count what they stand for. ``sides``: height
    and width of the images in pixels; without them what the model was made for.
    """
    plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(
            plain, attn_implementation="eager", dtype=torch.float32
        ).eval()
        if sides is None:
            sides = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        pixels = torch.empty(batch_size, config.num_channels, *sides)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels)
    return counter.get_total_flops()


def _best_seconds(run, on: torch.device, limit: float = 0.5) -> float:
    """The shortest of some runs: a ceiling is what the machine can do at its best."""
    run()  # the first may take longer than the limit
    best, end = float("inf"), time.perf_counter() + limit
    while best == float("inf") or time.perf_counter() < end:
        if on.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if on.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def measure_peaks(on: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """This machine's ceilings: matmul_tflops (a large product of random matrices in ``dtype``) and copy_gbs (read + written)."""
    side, size = (8192, 2**30) if on.type == "cuda" else (1536, 2**27)
    a, b = (torch.randn(side, side, device=on).to(dtype) for _ in range(2))
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=on)
    target = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * side**3 / _best_seconds(lambda: a @ b, on) / 1e12,
        "copy_gbs": 2 * size / _best_seconds(lambda: target.copy_(source), on) / 1e9,
    }


def measure_roofline(loaded: LoadedVariant, batch_sizes: list[int]) -> dict[str, object]:
    """The peaks, and for each batch size the operations of a forward: {matmul_tflops, copy_gbs, flops: {size: count}}.

    What a fused forward leaves out is not counted as done.
    """
    left_out = getattr(loaded.model, "flops_left_out", lambda _: 0)
    sides = checkpoints.image_sides(loaded.processor)
    counted = {str(size): count_flops(loaded.model.config, size, sides) - left_out(size) for size in batch_sizes}
    return measure_peaks(loaded.device, loaded.dtype) | {"flops": counted}
