"""Measure latency: the time of one forward at a stated batch size, as raw samples.

Four times differ. ``first_ms`` is the first forward at a batch size. ``host_ms`` lasts
from the call until the device is done. ``device_ms`` is the device's own time by CUDA
events. ``cold_ms`` is the device's time with an empty cache. On a CPU, host and device
are one.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vitnb import devices
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.models import engines
from vitnb.models.loader import LoadedVariant
from vitnb.records import machine
from vitnb.study import Latency

# The warm-up ends when the medians of three windows in a row agree within 3%.
WINDOW_FORWARDS, WINDOW_SECONDS = 5, 0.1
WINDOWS, AGREE = 3, 0.03
WARMUP_LIMIT_SECONDS = 5.0

FEWEST = 20  # samples that a median with an interval needs
CHUNK = 10  # samples between two looks at the clock


def cache_flush_buffer(device: torch.device) -> torch.Tensor:
    """Return a buffer of at least twice the size of the device's last cache, uint8.

    Writing the buffer pushes everything else out of the cache.
    """
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(2 * cache_bytes, 256 * 2**20)
    else:
        folder = Path("/sys/devices/system/cpu/cpu0/cache")
        sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
        kib = [int(text[:-1]) for text in sizes if text.endswith("K")]
        size = 2 * max([*kib, 32 * 2**10]) * 2**10
    return torch.zeros(size, dtype=torch.uint8, device=device)


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running in a block.

    It stops the process at moments that have nothing to do with the forward in which
    they fall. Between blocks it runs as ever.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@pause_garbage_collection()
def time_host(loaded: LoadedVariant, model, pixels: torch.Tensor) -> float:
    """Time one forward by the wall clock, in milliseconds.

    The clock runs from the call until the device is done.
    """
    devices.synchronize(loaded.device)
    begin = time.perf_counter()
    model(pixel_values=pixels)
    devices.synchronize(loaded.device)
    return (time.perf_counter() - begin) * 1e3


@pause_garbage_collection()
def time_device(
    loaded: LoadedVariant,
    model,
    pixels: torch.Tensor,
    forwards: int,
    cold: torch.Tensor | None = None,
) -> list[float]:
    """Time forwards in a row, in milliseconds each.

    A GPU gets all forwards without waiting in between, and CUDA events take the times.
    A CPU's times are those of the wall clock.

    Args:
        cold: a buffer that empties the cache before each forward, see
            ``cache_flush_buffer``; None: the cache stays warm.
    """
    if loaded.device.type == "cuda":
        return _time_by_events(model, pixels, forwards, cold)
    samples = []
    for _ in range(forwards):
        if cold is not None:
            cold.fill_(len(samples) % 2)
        samples.append(time_host(loaded, model, pixels))
    return samples


def _time_by_events(
    model, pixels: torch.Tensor, forwards: int, cold: torch.Tensor | None
) -> list[float]:
    """Time forwards in a row on a GPU by CUDA events, in milliseconds each."""
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for _ in range(forwards)
    ]
    for begin, end in events:
        if cold is not None:
            cold.zero_()
        begin.record()
        model(pixel_values=pixels)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def warm_up(
    forward: Callable[[], float], limit: float = WARMUP_LIMIT_SECONDS
) -> dict[str, object]:
    """Repeat a forward until its time is stable, or ``limit`` seconds have passed.

    At least three windows of forwards are taken.

    Args:
        forward: runs one forward and returns its milliseconds.

    Returns:
        forwards: how many; seconds: how long; stable: whether the time became stable.
    """
    begin = time.perf_counter()
    medians: list[float] = []
    forwards = 0
    while True:
        window, start = [], time.perf_counter()
        while (
            len(window) < WINDOW_FORWARDS
            or time.perf_counter() - start < WINDOW_SECONDS
        ):
            window.append(forward())
        medians.append(float(np.median(window)))
        forwards += len(window)
        last = medians[-WINDOWS:]
        seconds = time.perf_counter() - begin
        stable = len(last) == WINDOWS and max(last) <= (1 + AGREE) * min(last)
        if stable or (seconds > limit and len(last) == WINDOWS):
            return {
                "forwards": forwards,
                "seconds": round(seconds, 3),
                "stable": stable,
            }


def _collect(
    take: Callable[[int], list[float]], count: int, limit: float
) -> tuple[list[float], float]:
    """Take samples until there are ``count``, or ``limit`` seconds have passed.

    The limit never leaves fewer samples than a median needs.

    Args:
        take: takes a number of samples and returns them.

    Returns:
        The samples, and the seconds that all of them took together.
    """
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < min(count, FEWEST) or (
        len(samples) < count and time.perf_counter() - begin < limit
    ):
        samples += take(min(CHUNK, count - len(samples)))
    return samples, time.perf_counter() - begin


def measure_latency(
    loaded: LoadedVariant, pixels: torch.Tensor, budget: Latency
) -> dict:
    """Time forwards of one batch.

    Each kind of time is sampled until ``budget.samples`` are taken or
    ``budget.seconds`` have passed.

    Args:
        pixels: real images, float32 [batch, 3, height, width]; moved to the device
            before the clock starts.

    Returns:
        batch_size.
        first_ms: the first forward of this process at this batch size.
        warm_up: see there.
        host_ms, device_ms, cold_ms: raw samples in milliseconds, in order. device_ms is
            None on a CPU, where host_ms is the device's time. Only cold_ms has an empty
            cache.
        images_per_second: images over the wall time of forwards without pauses.
        before, after: the state of the machine.
    """
    pixels = loaded.prepare(pixels)
    cold = cache_flush_buffer(loaded.device)
    before = machine.machine_state()
    with loaded.inference() as model:
        times = _sample_times(loaded, model, pixels, cold, budget)
    return {
        "batch_size": len(pixels),
        **times,
        "before": before,
        "after": machine.machine_state(),
    }


def _sample_times(
    loaded: LoadedVariant,
    model,
    pixels: torch.Tensor,
    cold: torch.Tensor,
    budget: Latency,
) -> dict:
    """Sample every kind of time, see ``measure_latency``."""

    def time_on_host(count: int) -> list[float]:
        return [time_host(loaded, model, pixels) for _ in range(count)]

    def time_on_device(count: int) -> list[float]:
        return time_device(loaded, model, pixels, count)

    def time_cold(count: int) -> list[float]:
        return time_device(loaded, model, pixels, count, cold)

    first_ms = time_host(loaded, model, pixels)
    # A short timing is not worth a long warm-up.
    limit = min(WARMUP_LIMIT_SECONDS, 5 * budget.seconds)
    warmed = warm_up(lambda: time_host(loaded, model, pixels), limit)
    host, elapsed = _collect(time_on_host, budget.samples, budget.seconds)
    device = None
    if loaded.device.type == "cuda":
        device, elapsed = _collect(time_on_device, budget.samples, budget.seconds)
    images_per_second = len(pixels) * len(device or host) / elapsed
    cold_count = max(FEWEST, budget.samples // 10)
    chilled, _ = _collect(time_cold, cold_count, budget.seconds / 4)
    return {
        "first_ms": first_ms,
        "warm_up": warmed,
        "host_ms": host,
        "device_ms": device,
        "cold_ms": chilled,
        "images_per_second": images_per_second,
    }


def time_batch_sizes(
    loaded: LoadedVariant, split: Split, sizes: list[int], budget: Latency
) -> list[dict]:
    """Time every batch size with images of a split, see ``measure_latency``.

    Raises VariantError if the logits of a batch size are not finite.
    """
    timings = []
    for size in sizes:
        pixels = dataset.first_batch(split, loaded.processor, size)
        timings.append(measure_latency(loaded, pixels, budget))
        with loaded.inference() as model:
            output = model(pixel_values=loaded.prepare(pixels))
            engines.check_finite(output.logits.float().cpu())
        count = len(timings[-1]["host_ms"])
        print(f"batch {size}: {count} forwards timed", flush=True)
    return timings
