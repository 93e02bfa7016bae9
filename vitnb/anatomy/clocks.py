"""Defects of comparing times (4, 5, 6, 11).

Another model, another precision, the same kernel twice, too few samples.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import ViTConfig, ViTForImageClassification

from vitnb import devices
from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case
from vitnb.models import attention


def once(call: Callable, on: torch.device) -> float:
    """Time one call in ms, until the device has done its work."""
    begin = time.perf_counter()
    call()
    if on.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


@torch.inference_mode()
def interleaved(
    calls: dict[str, Callable], on: torch.device, seconds: float, fewest: int = 3
) -> dict[str, list[float]]:
    """Time several calls in turns, so that a slow moment of the machine hits all alike.

    Args:
        calls: {name: function without arguments}.
        on: the device that the calls use.
        seconds: how long to go on.
        fewest: samples of each call to take at least, after one warm-up.

    Returns:
        Samples in ms by name.
    """
    samples = {name: [] for name in calls}
    for call in calls.values():
        once(call, on)
    begin = time.perf_counter()
    turns = 0
    while turns < fewest or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            samples[name].append(once(call, on))
        turns += 1
    return samples


def _medians(
    calls: dict[str, Callable], on: torch.device, seconds: float
) -> dict[str, float]:
    """Time several calls in turns and return the median of each in ms."""
    samples = interleaved(calls, on, seconds)
    return {name: float(np.median(values)) for name, values in samples.items()}


def _vit(bench: Bench, dtype: torch.dtype, **config) -> ViTForImageClassification:
    """Make a ViT of random weights: enough to be timed, useless for anything else."""
    torch.manual_seed(bench.seed)
    model = ViTForImageClassification(ViTConfig(**config)).eval()
    model.set_attn_implementation("vitnb-sdpa")
    return model.to(bench.device, dtype)


def another_model(bench: Bench) -> Case:
    """Reproduce defect 4.

    Wrong: the headline latency is that of another architecture with a random head.
    Right: the latency of the very model that was quantized.

    ``extra["top1"]`` holds the top-1 of both.
    """
    loaded, pixels = bench.loaded("nf4-sdpa"), bench.test.pixels[:8]
    other = _vit(
        bench,
        torch.float32,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=1,
        intermediate_size=256,
        image_size=bench.processor.size["height"],
        patch_size=16,
        num_labels=len(bench.class_names),
    )
    calls = {
        "another model": lambda: other(pixel_values=pixels.to(bench.device)),
        "the 4-bit model": lambda: loaded.model(pixel_values=loaded.prepare(pixels)),
    }
    medians = _medians(calls, bench.device, bench.seconds)
    return Case(
        number=4,
        title="The time of another model",
        what="one forward of 8 images, quoted as that of the 4-bit model",
        unit="ms",
        wrong=medians["another model"],
        right=medians["the 4-bit model"],
        lesson="A number carries its model, data, device, versions and commit.",
        extra={
            "top1": {
                "another model": bench.top1(bench.test.pixels, other),
                "the 4-bit model": bench.top1(bench.test.pixels, loaded.model),
            }
        },
    )


def two_factors(bench: Bench) -> Case:
    """Reproduce defect 5.

    Wrong: fp32 with SDPA is compared with 16 bits and flash attention, and flash
    attention gets the credit. Right: both in 16 bits, so that only the kernel differs.

    The model has ViT-B's width and two of its layers. ``extra["ms"]`` holds the three
    medians.
    """
    wide = {
        "hidden_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    full = _vit(bench, torch.float32, **wide)
    half = _vit(bench, devices.half_dtype(bench.device), **wide)
    # Emulated 16-bit products take seconds for each image.
    images = 4 if devices.has_half_units(bench.device) else 1
    pixels = torch.rand(images, 3, 224, 224, device=bench.device)

    def flash():
        with attention.force_backend("torch-flash"):
            half(pixel_values=pixels.to(half.dtype))

    calls = {
        "fp32, SDPA": lambda: full(pixel_values=pixels),
        "16 bits, SDPA": lambda: half(pixel_values=pixels.to(half.dtype)),
        "16 bits, flash": flash,
    }
    medians = _medians(calls, bench.device, bench.seconds)
    return Case(
        number=5,
        title="Two factors changed, one credited",
        what="gain by flash attention, a ViT of two wide layers",
        unit="times as fast",
        wrong=medians["fp32, SDPA"] / medians["16 bits, flash"],
        right=medians["16 bits, SDPA"] / medians["16 bits, flash"],
        lesson="Change one factor at a time; "
        "a variant that did not get its kernel fails.",
        extra={"ms": medians},
    )


def same_kernel(bench: Bench) -> Case:
    """Reproduce defect 6.

    Wrong: "SDPA", left to PyTorch, is compared with flash attention. PyTorch chooses a
    flash kernel itself. Right: the kernel is forced on both sides, here PyTorch's
    reference ("math") against flash attention.

    ``extra["ran"]`` names the kernel that a trace shows for each; ``extra["ms"]`` holds
    the medians.
    """
    torch.manual_seed(bench.seed)
    shape = (8, 12, 197, 64)  # images, heads, tokens, width of a head: ViT-B at 224 px
    tensors = torch.randn(3, *shape, device=bench.device)
    query, key, value = tensors.to(devices.half_dtype(bench.device)).unbind()

    def attend(backend: str):
        with attention.force_backend(backend):
            torch.nn.functional.scaled_dot_product_attention(query, key, value)

    calls = {
        name: lambda name=name: attend(name) for name in ("sdpa", "torch-flash", "math")
    }
    medians = _medians(calls, bench.device, bench.seconds)
    ran = {}
    for name, call in calls.items():
        activities = [ProfilerActivity.CPU]
        with torch.inference_mode(), profile(activities=activities) as profiled:
            call()
        events = {event.key for event in profiled.key_averages()}
        ran[name] = attention.kernel_in_trace(events)
    return Case(
        number=6,
        title="The same kernel under two names",
        what="gain by flash attention, attention alone",
        unit="times as fast",
        wrong=medians["sdpa"] / medians["torch-flash"],
        right=medians["math"] / medians["torch-flash"],
        lesson="Force the kernel where kernels are compared, "
        "and read from a trace which one ran.",
        extra={"ms": medians, "ran": ran},
    )


def p99_range(
    samples: list[float], count: int, seed: int, repeats: int = 1000
) -> tuple[np.ndarray, float]:
    """Resample the p99 of a measurement with few samples.

    Args:
        samples: times of one call.
        count: samples in one measurement.
        seed: seed of the random draws.
        repeats: number of measurements.

    Returns:
        The p99 of every measurement, [repeats], and the width of their middle 95%.
    """
    random = np.random.default_rng(seed)
    drawn = random.choice(np.asarray(samples), (repeats, count))
    p99 = np.percentile(drawn, 99, axis=1)
    low, high = np.percentile(p99, [2.5, 97.5])
    return p99, float(high - low)


def early_percentile(bench: Bench) -> Case:
    """Reproduce defect 11.

    Wrong: a p99 of 50 samples, which is little else than their largest. Right: 1,000
    samples, so that ten lie beyond the p99.

    Real times of one small attention are resampled, to see how far the p99 wanders from
    one measurement to the next.
    """
    torch.manual_seed(bench.seed)
    tensors = torch.randn(3, 1, 4, 65, 64, device=bench.device).unbind()

    def attend():
        torch.nn.functional.scaled_dot_product_attention(*tensors)

    calls = {"attention": attend}
    samples = interleaved(calls, bench.device, bench.seconds, fewest=1000)
    samples = samples["attention"][:20_000]
    few, wide = p99_range(samples, 50, bench.seed)
    many, narrow = p99_range(samples, 1000, bench.seed)
    median = float(np.median(samples))
    return Case(
        number=11,
        title="A percentile without samples",
        what="95% range of a p99 of 50 and of 1,000 samples",
        unit="medians wide",
        wrong=wide / median,
        right=narrow / median,
        lesson="Enough samples for the percentile, or no percentile.",
        extra={"p99": {"50": few / median, "1,000": many / median}},
    )
