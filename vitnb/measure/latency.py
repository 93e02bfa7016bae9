"""Latency: the time of one forward at a stated batch size, as raw samples, and what may be said of them.

Four times are told apart: the first forward ever; the host's, from the call until the device is done; the device's own,
by CUDA events; and the device's with an empty cache. On a CPU the host is the device.
"""

import time
from pathlib import Path

import numpy as np
import torch

from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.models.loader import LoadedVariant
from vitnb.records import machine
from vitnb.study import Latency

# The warm-up goes on, window by window, until the medians of three windows in a row agree.
WINDOW_FORWARDS, WINDOW_SECONDS = 5, 0.1


AGREE, WINDOWS = 0.03, 3


WARMUP_LIMIT_SECONDS = 5.0


FEWEST = 20


def cache_flush_buffer(on: torch.device) -> torch.Tensor:
    """Memory that, once written, has pushed everything else out of the device's last cache (twice its size)."""
    if on.type == "cuda":
        size = max(2 * torch.cuda.get_device_properties(on).L2_cache_size, 256 * 2**20)
    else:
        caches = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        kib = [int(text[:-1]) for text in caches if text.endswith("K")]
        size = 2 * max([*kib, 32 * 2**10]) * 2**10
    return torch.zeros(size, dtype=torch.uint8, device=on)


def time_host(loaded: LoadedVariant, model, pixels: torch.Tensor) -> float:
    """Milliseconds of one forward by the wall clock, from the call until the device is done."""
    on_gpu = loaded.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    model(pixel_values=pixels)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def time_device(loaded: LoadedVariant, model, pixels: torch.Tensor, forwards: int, cold: torch.Tensor | None = None):
    """Milliseconds of each of some forwards, handed over without waiting in between, by CUDA events (CPU: wall clock).

    ``cold``: the buffer that empties the cache before each, see ``cold_buffer``.
    """
    if loaded.device.type != "cuda":
        found = []
        for _ in range(forwards):
            if cold is not None:
                cold.fill_(len(found) % 2)
            found.append(time_host(loaded, model, pixels))
        return found
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(forwards)]
    for begin, end in events:
        if cold is not None:
            cold.zero_()
        begin.record()
        model(pixel_values=pixels)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def warm_up(forward, limit: float = WARMUP_LIMIT_SECONDS) -> dict[str, object]:
    """Call ``forward`` (-> milliseconds) until it is stable or ``limit`` seconds and three windows are over.

    Returns: the forwards and seconds that it took, and whether it became stable.
    """
    begin, medians, forwards = time.perf_counter(), [], 0
    while True:
        window, start = [], time.perf_counter()
        while len(window) < WINDOW_FORWARDS or time.perf_counter() - start < WINDOW_SECONDS:
            window.append(forward())
        medians.append(float(np.median(window)))
        forwards += len(window)
        last, seconds = medians[-WINDOWS:], time.perf_counter() - begin
        stable = len(last) == WINDOWS and max(last) <= (1 + AGREE) * min(last)
        if stable or (seconds > limit and len(last) == WINDOWS):
            return {"forwards": forwards, "seconds": round(seconds, 3), "stable": stable}


def _collect(take, samples: int, seconds: float) -> tuple[list[float], float]:
    """Chunks of samples until there are enough or the time is over, but never fewer than a p50 needs; and the seconds."""
    found, begin = [], time.perf_counter()
    while len(found) < min(samples, FEWEST) or (len(found) < samples and time.perf_counter() - begin < seconds):
        found += take(min(10, samples - len(found)))
    return found, time.perf_counter() - begin


def measure_latency(loaded: LoadedVariant, pixels: torch.Tensor, budget: Latency) -> dict:
    """Time forwards of one batch, each kind until ``budget.samples`` are taken or ``budget.seconds`` are over.

    Args:
        pixels: real images, float32 [batch, 3, height, width]; moved to the device before the clock starts.

    Returns:
        batch_size; first_ms (the first forward ever); warm_up (see there); host_ms, device_ms (None on a CPU, where it
        is the host's) and cold_ms: raw samples in milliseconds, in order, the cache warm but for the last;
        images_per_second: images over the wall time of forwards that follow each other without waiting; before, after:
        the state of the machine.
    """
    pixels, on_gpu = loaded.prepare(pixels), loaded.device.type == "cuda"
    cold = cache_flush_buffer(loaded.device)
    before = machine.machine_state()
    with loaded.inference() as model:
        first_ms = time_host(loaded, model, pixels)
        limit = min(WARMUP_LIMIT_SECONDS, 5 * budget.seconds)  # a short timing is not worth a long warm-up
        warmed = warm_up(lambda: time_host(loaded, model, pixels), limit)
        host, elapsed = _collect(
            lambda n: [time_host(loaded, model, pixels) for _ in range(n)], budget.samples, budget.seconds
        )
        device = None
        if on_gpu:
            device, elapsed = _collect(lambda n: time_device(loaded, model, pixels, n), budget.samples, budget.seconds)
        images_per_second = len(pixels) * len(device or host) / elapsed
        chilled, _ = _collect(
            lambda n: time_device(loaded, model, pixels, n, cold), max(FEWEST, budget.samples // 10), budget.seconds / 4
        )
    return {
        "batch_size": len(pixels),
        "first_ms": first_ms,
        "warm_up": warmed,
        "host_ms": host,
        "device_ms": device,
        "cold_ms": chilled,
        "images_per_second": images_per_second,
        "before": before,
        "after": machine.machine_state(),
    }


def time_batch_sizes(loaded: LoadedVariant, split: Split, sizes: list[int], budget: Latency) -> list[dict]:
    """Time every batch size with images of a split; see ``measure``."""
    found = []
    for size in sizes:
        found.append(measure_latency(loaded, dataset.first_batch(split, loaded.processor, size), budget))
        print(f"batch {size}: {len(found[-1]['host_ms'])} forwards timed", flush=True)
    return found
