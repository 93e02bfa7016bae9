"""Defects of comparing times: another model, another precision, the same kernel twice, too few samples (4, 5, 6, 11)."""

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
    """Milliseconds of one call, until the device has done its work."""
    begin = time.perf_counter()
    call()
    if on.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


@torch.inference_mode()
def interleaved(calls: dict[str, Callable], on: torch.device, seconds: float) -> dict[str, list[float]]:
    """Samples in ms of every call, taken in turns for ``seconds``, so that a slow moment of the machine hits all alike.

    At least three turns, after one that is not counted.
    """
    samples = {name: [] for name in calls}
    for call in calls.values():
        once(call, on)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or min(map(len, samples.values())) < 3:
        for name, call in calls.items():
            samples[name].append(once(call, on))
    return samples


def _medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(np.median(values)) for name, values in samples.items()}


def _vit(bench: Bench, dtype: torch.dtype, **config) -> ViTForImageClassification:
    """A ViT of random weights: enough to be timed, useless for anything else."""
    torch.manual_seed(bench.seed)
    model = ViTForImageClassification(ViTConfig(**config)).eval()
    model.set_attn_implementation("vitnb-sdpa")
    return model.to(bench.device, dtype)


def another_model(bench: Bench) -> Case:
    """Defect 4. Done wrong: the headline latency is that of another architecture with a random head.
    Done instead: the latency of the very model that was quantized. ``extra["top1"]`` shows what each of them knows.
    """
    loaded, pixels = bench.loaded("nf4-sdpa"), bench.test.pixels[:8]
    side, classes = bench.processor.size["height"], len(bench.class_names)
    other = _vit(bench, torch.float32, hidden_size=64, num_hidden_layers=4, num_attention_heads=1, intermediate_size=256,
                 image_size=side, patch_size=16, num_labels=classes)  # fmt: skip
    calls = {
        "another model": lambda: other(pixel_values=pixels.to(bench.device)),
        "the 4-bit model": lambda: loaded.model(pixel_values=loaded.prepare(pixels)),
    }
    found = _medians(interleaved(calls, bench.device, bench.seconds))
    shown = bench.test.pixels
    return Case(
        4, "The time of another model", "one forward of 8 images, quoted as that of the 4-bit model", "ms",
        found["another model"], found["the 4-bit model"], "A number carries its model, data, device, versions and commit.",
        {"top1": {"another model": bench.top1(shown, other), "the 4-bit model": bench.top1(shown, loaded.model)}},
    )  # fmt: skip


def two_factors(bench: Bench) -> Case:
    """Defect 5. Done wrong: fp32 with SDPA is compared with 16 bits and flash, and the gain is credited to flash.
    Done instead: both in 16 bits, so that the kernel alone differs.

    The model has ViT-B's width and two of its layers. ``extra["ms"]`` holds the three medians.
    """
    shape = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072}
    full, half = (_vit(bench, dtype, **shape) for dtype in (torch.float32, devices.half_dtype(bench.device)))
    pixels = torch.rand(4, 3, 224, 224, device=bench.device)

    def flash():
        with attention.force_backend("torch-flash"):
            half(pixel_values=pixels.to(half.dtype))

    calls = {
        "fp32, SDPA": lambda: full(pixel_values=pixels),
        "16 bits, SDPA": lambda: half(pixel_values=pixels.to(half.dtype)),
        "16 bits, flash": flash,
    }
    found = _medians(interleaved(calls, bench.device, bench.seconds))
    return Case(
        5, "Two factors changed, one credited", "gain by flash attention, a ViT of two wide layers", "times as fast",
        found["fp32, SDPA"] / found["16 bits, flash"], found["16 bits, SDPA"] / found["16 bits, flash"],
        "Change one factor at a time; a variant that did not get its kernel fails.", {"ms": found},
    )  # fmt: skip


def same_kernel(bench: Bench) -> Case:
    """Defect 6. Done wrong: "SDPA", left to PyTorch, is compared with flash. It chooses a flash kernel itself.
    Done instead: the kernel is forced on both sides, here PyTorch's reference ("math") against flash.

    ``extra["ran"]`` names the kernel that a trace shows for each; ``extra["ms"]`` holds the medians.
    """
    torch.manual_seed(bench.seed)
    query, key, value = torch.randn(3, 8, 12, 197, 64, device=bench.device).to(devices.half_dtype(bench.device)).unbind()

    def attend(launched: str):
        with attention.force_backend(launched):
            torch.nn.functional.scaled_dot_product_attention(query, key, value)

    calls = {name: lambda name=name: attend(name) for name in ("sdpa", "torch-flash", "math")}
    found, ran = _medians(interleaved(calls, bench.device, bench.seconds)), {}
    for name, call in calls.items():
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
            call()
        ran[name] = attention.kernel_in_trace({event.key for event in profiled.key_averages()})
    return Case(
        6, "The same kernel under two names", "gain by flash attention, attention alone", "times as fast",
        found["sdpa"] / found["torch-flash"], found["math"] / found["torch-flash"],
        "Force the kernel where kernels are compared, and read from a trace which one ran.", {"ms": found, "ran": ran},
    )  # fmt: skip


def p99_range(samples: list[float], count: int, seed: int, repeats: int = 1000) -> tuple[np.ndarray, float]:
    """The p99 of ``count`` samples drawn ``repeats`` times, and the width of the middle 95% of those."""
    drawn = np.random.default_rng(seed).choice(np.asarray(samples), (repeats, count))
    found = np.percentile(drawn, 99, axis=1)
    low, high = np.percentile(found, [2.5, 97.5])
    return found, float(high - low)


def early_percentile(bench: Bench) -> Case:
    """Defect 11. Done wrong: a p99 of 50 samples, which is little else than their largest. Done instead: 1,000 samples,
    so that ten lie beyond it.

    Real timings of one small attention, resampled: how far does the p99 wander from one measurement to the next?
    """
    torch.manual_seed(bench.seed)
    tensors = torch.randn(3, 1, 4, 65, 64, device=bench.device).unbind()
    calls = {"attention": lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)}
    samples = interleaved(calls, bench.device, bench.seconds)["attention"][:20_000]
    (few, wide), (many, narrow) = (p99_range(samples, count, bench.seed) for count in (50, 1000))
    unit = float(np.median(samples))
    return Case(
        11, "A percentile without samples", "95% range of a p99 of 50 and of 1,000 samples",
        "medians wide", wide / unit, narrow / unit,
        "Enough samples for the percentile, or no percentile.", {"p99": {"50": few / unit, "1,000": many / unit}},
    )  # fmt: skip
