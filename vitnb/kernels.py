"""Kernels: what a forward consists of, from a profiler trace, and the peak of the memory that it takes."""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vitnb import attention, data
from vitnb.models import Loaded


def trace(loaded: Loaded, pixels: torch.Tensor) -> dict:
    """Profile one forward of ``pixels`` (float32 [batch, 3, height, width]) after two that warm up.

    Returns:
        attention_ran: the kernel that the trace shows; attention_ms and total_ms: time in attention and in all GPU
        kernels (on a CPU: in all operators), for one forward; operators_ms: own time of each kernel or operator;
        activations_bytes: the most that one forward allocates beyond the weights, by PyTorch's allocator.

    Raises:
        VariantError: the trace shows a kernel that the variant's name does not allow.
    """
    pixels, on_gpu = loaded.to_input(pixels), loaded.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with loaded.running() as model:
        model(pixel_values=pixels)
        activations = _peak_on_gpu(model, pixels) if on_gpu else None
        with profile(activities=activities, profile_memory=not on_gpu) as profiled:
            model(pixel_values=pixels)
            if on_gpu:
                torch.cuda.synchronize()
    events = profiled.key_averages()
    names = {event.key for event in events}
    kernel = attention.ran(names)
    attention.check(loaded.launched, kernel)
    if on_gpu:
        own = {event.key: event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA}
    else:
        own = {event.key: event.self_cpu_time_total for event in events}
    whole = [event for event in events if event.key in attention.WHOLE]
    return {
        "batch_size": len(pixels),
        "attention_ran": kernel,
        "attention_ms": sum(event.device_time_total if on_gpu else event.cpu_time_total for event in whole) / 1e3,
        "total_ms": sum(own.values()) / 1e3,
        "operators_ms": {name: time / 1e3 for name, time in sorted(own.items(), key=lambda item: -item[1]) if time > 0},
        "activations_bytes": activations if on_gpu else _peak_on_cpu(profiled),
    }


def traces(loaded: Loaded, split: data.Split, sizes: list[int]) -> list[dict]:
    """A trace for every batch size, with images of a split; see ``trace``."""
    return [trace(loaded, data.first_batch(split, loaded.processor, size)) for size in sizes]


def _peak_on_gpu(model, pixels: torch.Tensor) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(pixel_values=pixels)
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(profiled: profile) -> int:
    """The highest level of the allocations and frees that the trace holds, in the order in which they came."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
