"""Memory: four numbers of bytes that are often taken for each other, each with its definition."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vitnb.models.loader import LoadedVariant
from vitnb.records import machine


def _status(field: str) -> int:
    """Bytes of a field such as VmRSS of /proc/self/status; 0 where there is no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def driver_bytes(on: torch.device) -> int:
    """Bytes that the driver counts as used on the GPU (by everybody), or the operating system for this process."""
    if on.type == "cuda":
        return round(float(machine.smi("memory.used").get("memory.used", "0")) * 2**20)
    return _status("VmRSS")


def peak_memory(loaded: LoadedVariant, pixels: torch.Tensor, before: int) -> dict[str, int]:
    """The peaks (see DEFINITIONS) of a process that has run nothing else, after three forwards of ``pixels``.

    Args:
        before: ``in_use`` before the model was loaded.

    Returns:
        batch_size, resident_bytes, allocator_peak_bytes, driver_peak_bytes.
    """
    on_gpu = loaded.device.type == "cuda"
    with loaded.inference() as model:
        for _ in range(2):
            model(pixel_values=pixels)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            model(pixel_values=pixels)
            torch.cuda.synchronize()
            allocated = torch.cuda.max_memory_allocated()
            # PyTorch gives nothing back to the driver while it runs: what is used now is the peak.
            highest = driver_bytes(loaded.device)
        else:
            highest = _status("VmHWM")
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                model(pixel_values=pixels)
            allocated = loaded.resident_bytes + allocations_peak(profiled)
    return {
        "batch_size": len(pixels),
        "resident_bytes": loaded.resident_bytes,
        "allocator_peak_bytes": allocated,
        "driver_peak_bytes": highest - before,
    }


def allocations_peak(profiled: profile) -> int:
    """The highest level of the allocations and frees that a CPU trace holds, in the order in which they came."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
