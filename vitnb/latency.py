"""Latency: the time of one forward at a stated batch size, as raw samples, and what may be said of them.

Four times are told apart: the first forward ever; the host's, from the call until the device is done; the device's own,
by CUDA events; and the device's with an empty cache. On a CPU the host is the device.
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vitnb import data, intervals, machine, studies
from vitnb.models import Loaded

# The warm-up goes on, window by window, until the medians of three windows in a row agree.
WINDOW_FORWARDS, WINDOW_SECONDS = 5, 0.1
AGREE, WINDOWS = 0.03, 3
WARMUP_LIMIT_SECONDS = 5.0
# A percentile is given if ten samples lie beyond it: 20 samples for the p50, 200 for the p95, 1,000 for the p99.
BEYOND = 10
FEWEST = 20
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def cold_buffer(on: torch.device) -> torch.Tensor:
    """Memory that, once written, has pushed everything else out of the device's last cache (twice its size)."""
    if on.type == "cuda":
        size = max(2 * torch.cuda.get_device_properties(on).L2_cache_size, 256 * 2**20)
    else:
        caches = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        kib = [int(text[:-1]) for text in caches if text.endswith("K")]
        size = 2 * max([*kib, 32 * 2**10]) * 2**10
    return torch.zeros(size, dtype=torch.uint8, device=on)


def on_host(loaded: Loaded, model, pixels: torch.Tensor) -> float:
    """Milliseconds of one forward by the wall clock, from the call until the device is done."""
    on_gpu = loaded.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    model(pixel_values=pixels)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def on_device(loaded: Loaded, model, pixels: torch.Tensor, forwards: int, cold: torch.Tensor | None = None):
    """Milliseconds of each of some forwards, handed over without waiting in between, by CUDA events (CPU: wall clock).

    ``cold``: the buffer that empties the cache before each, see ``cold_buffer``.
    """
    if loaded.device.type != "cuda":
        found = []
        for _ in range(forwards):
            if cold is not None:
                cold.fill_(len(found) % 2)
            found.append(on_host(loaded, model, pixels))
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


def measure(loaded: Loaded, pixels: torch.Tensor, budget: studies.Latency) -> dict:
    """Time forwards of one batch, each kind until ``budget.samples`` are taken or ``budget.seconds`` are over.

    Args:
        pixels: real images, float32 [batch, 3, height, width]; moved to the device before the clock starts.

    Returns:
        batch_size; first_ms (the first forward ever); warm_up (see there); host_ms, device_ms (None on a CPU, where it
        is the host's) and cold_ms: raw samples in milliseconds, in order, the cache warm but for the last;
        images_per_second: images over the wall time of forwards that follow each other without waiting; before, after:
        the state of the machine.
    """
    pixels, on_gpu = loaded.to_input(pixels), loaded.device.type == "cuda"
    cold = cold_buffer(loaded.device)
    before = machine.state()
    with loaded.running() as model:
        first_ms = on_host(loaded, model, pixels)
        limit = min(WARMUP_LIMIT_SECONDS, 5 * budget.seconds)  # a short timing is not worth a long warm-up
        warmed = warm_up(lambda: on_host(loaded, model, pixels), limit)
        host, elapsed = _collect(
            lambda n: [on_host(loaded, model, pixels) for _ in range(n)], budget.samples, budget.seconds
        )
        device = None
        if on_gpu:
            device, elapsed = _collect(lambda n: on_device(loaded, model, pixels, n), budget.samples, budget.seconds)
        images_per_second = len(pixels) * len(device or host) / elapsed
        chilled, _ = _collect(
            lambda n: on_device(loaded, model, pixels, n, cold), max(FEWEST, budget.samples // 10), budget.seconds / 4
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
        "after": machine.state(),
    }


def sweep(loaded: Loaded, split: data.Split, sizes: list[int], budget: studies.Latency) -> list[dict]:
    """Time every batch size with images of a split; see ``measure``."""
    found = []
    for size in sizes:
        found.append(measure(loaded, data.first_batch(split, loaded.processor, size), budget))
        print(f"batch {size}: {len(found[-1]['host_ms'])} forwards timed", flush=True)
    return found


def samples(timing: dict) -> list[float]:
    """The samples that a variant is known by: the device's on a GPU, the host's on a CPU."""
    return timing["device_ms"] or timing["host_ms"]


def statistics(samples_ms: list[float]) -> dict[str, tuple[float, float, float] | None]:
    """p50, p95 and p99, each (value, low, high) in milliseconds; None where the samples are too few to carry it."""
    carried = {name: share for name, share in SHARES.items() if len(samples_ms) * (1 - share) >= BEYOND - 1e-9}
    found = (
        dict(zip(carried, intervals.percentiles(samples_ms, list(carried.values())), strict=True)) if carried else {}
    )
    return {name: found.get(name) for name in SHARES}


def table(timings: list[dict]) -> pd.DataFrame:
    """Timings as people read them: percentiles with their 95% intervals, in milliseconds."""
    rows = []
    for timing in timings:
        row = {"batch": timing["batch_size"], "samples": len(samples(timing)), "first": f"{timing['first_ms']:.2f}"}
        for name, found in statistics(samples(timing)).items():
            row[name] = f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})" if found else ""
        row |= {
            "p50, host": f"{np.median(timing['host_ms']):.2f}",
            "p50, cold cache": f"{np.median(timing['cold_ms']):.2f}",
        }
        row |= {"images/s": f"{timing['images_per_second']:.1f}", "warm-up stable": timing["warm_up"]["stable"]}
        rows.append(row)
    return pd.DataFrame(rows).set_index("batch")
