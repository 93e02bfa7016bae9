"""Measure memory: three kinds of bytes that are often taken for each other.

``analysis.performance.MEMORY_DEFINITIONS`` says what each kind counts.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vitnb.devices import free_memory, synchronize
from vitnb.models.loader import LoadedVariant
from vitnb.records import machine
from vitnb.records.files import MB


def _process_bytes(field: str) -> int:
    """Return a field of /proc/self/status, such as VmRSS, in bytes; 0 without the file.

    VmHWM is the peak of this program alone. ``getrusage`` would also count the peak of
    the parent process, which survives fork and exec.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def driver_bytes(device: torch.device) -> int:
    """Return the bytes in use by the GPU driver's count, or by this process on a CPU.

    The driver counts the memory of all processes.
    """
    if device.type == "cuda":
        used_mb = machine.smi("memory.used").get("memory.used", "0")
        return round(float(used_mb) * MB)
    return _process_bytes("VmRSS")


def peak_memory(
    loaded: LoadedVariant, pixels: torch.Tensor, before: int
) -> dict[str, int]:
    """Measure the peaks of a process that runs nothing else, in three forwards.

    The engine starts empty, and so does a GPU's allocator: graphs and cached blocks of
    an earlier batch size would count. On a CPU the peak of the process never falls, so
    smaller batch sizes must come first.

    Args:
        pixels: a batch, ready on the device, and the only one there.
        before: ``driver_bytes`` before the model was loaded.

    Returns:
        batch_size, resident_bytes, allocator_peak_bytes, driver_peak_bytes.
    """
    loaded.engine.reset()
    free_memory(loaded.device)
    measure = _peaks_on_gpu if loaded.device.type == "cuda" else _peaks_on_cpu
    with loaded.inference() as model:
        for _ in range(2):
            model(pixel_values=pixels)
        allocated, in_use = measure(loaded, model, pixels)
    return {
        "batch_size": len(pixels),
        "resident_bytes": loaded.resident_bytes,
        "allocator_peak_bytes": allocated,
        "driver_peak_bytes": in_use - before,
    }


def _peaks_on_gpu(
    loaded: LoadedVariant, model, pixels: torch.Tensor
) -> tuple[int, int]:
    """Return the peaks of one forward: the allocator's bytes and the driver's."""
    synchronize(loaded.device)
    torch.cuda.reset_peak_memory_stats()
    model(pixel_values=pixels)
    synchronize(loaded.device)
    allocated = torch.cuda.max_memory_allocated()
    # PyTorch gives nothing back to the driver while it runs: the bytes in use now are
    # the peak.
    return allocated, driver_bytes(loaded.device)


def _peaks_on_cpu(
    loaded: LoadedVariant, model, pixels: torch.Tensor
) -> tuple[int, int]:
    """Return the peaks of one forward: the allocator's bytes and the process's."""
    # Read before the trace, which needs memory of its own.
    in_use = _process_bytes("VmHWM")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(pixel_values=pixels)
    return loaded.resident_bytes + allocations_peak(profiled), in_use


def allocations_peak(profiled: profile) -> int:
    """Return the highest level of the allocations and frees in a CPU trace, in bytes.

    Events count in the order of their times.
    """
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
