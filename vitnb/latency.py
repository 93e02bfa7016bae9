"""Latency: the time of one forward at a stated batch size, as raw samples, and what may be said of them."""

import time

import numpy as np
import torch

from vitnb import data, studies
from vitnb.models import Loaded

WARMUP_SECONDS = 0.5
WARMUP_FORWARDS = 5
# A percentile needs enough samples beyond it to mean anything: ten of them.
SAMPLES_FOR_P99 = 1000


def _forward(loaded: Loaded, model, pixels: torch.Tensor) -> float:
    """One forward, in milliseconds: CUDA events on a GPU, the wall clock on a CPU, where a forward ends when it returns."""
    if loaded.device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        model(pixel_values=pixels)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    begin = time.perf_counter()
    model(pixel_values=pixels)
    return (time.perf_counter() - begin) * 1e3


def measure(loaded: Loaded, pixels: torch.Tensor, budget: studies.Latency) -> dict:
    """Time forwards of one batch until ``budget.samples`` are taken or ``budget.seconds`` are over.

    Args:
        pixels: real images, float32 [batch, 3, height, width]; moved to the device before the clock starts.

    Returns:
        batch_size, first_ms (the first forward ever, kept apart), samples_ms (raw, in order, after the warm-up) and
        images_per_second (images through the whole timed loop over its wall time).
    """
    pixels = loaded.to_input(pixels)
    with loaded.running() as model:
        first_ms = _forward(loaded, model, pixels)
        begin = time.perf_counter()
        warmed = 0
        while warmed < WARMUP_FORWARDS or time.perf_counter() - begin < WARMUP_SECONDS:
            _forward(loaded, model, pixels)
            warmed += 1
        samples = []
        begin = time.perf_counter()
        while len(samples) < budget.samples and (time.perf_counter() - begin < budget.seconds or not samples):
            samples.append(_forward(loaded, model, pixels))
        elapsed = time.perf_counter() - begin
    return {
        "batch_size": len(pixels),
        "first_ms": first_ms,
        "samples_ms": samples,
        "images_per_second": len(pixels) * len(samples) / elapsed,
    }


def sweep(loaded: Loaded, split: data.Split, sizes: list[int], budget: studies.Latency) -> list[dict]:
    """Time every batch size with images of a split; see ``measure``."""
    found = []
    for size in sizes:
        found.append(measure(loaded, data.first_batch(split, loaded.processor, size), budget))
        print(f"batch {size}: {len(found[-1]['samples_ms'])} forwards timed", flush=True)
    return found


def statistics(samples_ms: list[float]) -> dict[str, float | None]:
    """Mean, p50, p95 and p99 in milliseconds; p99 is None below 1,000 samples, which cannot carry it."""
    p50, p95, p99 = np.percentile(samples_ms, [50, 95, 99])
    return {
        "latency_mean_ms": float(np.mean(samples_ms)),
        "latency_p50_ms": float(p50),
        "latency_p95_ms": float(p95),
        "latency_p99_ms": float(p99) if len(samples_ms) >= SAMPLES_FOR_P99 else None,
    }
