"""Memory: four numbers of bytes that are often taken for each other, each with its definition."""

from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from vitnb import machine
from vitnb.models import Loaded

DEFINITIONS = {
    "disk": "bytes of all files of the checkpoint",
    "resident": "bytes of parameters, buffers and quantization state of the loaded model, counted tensor by tensor",
    "allocator peak": "the most that PyTorch's allocator held at once during a forward, weights included",
    "driver peak": "how far what the driver (on a CPU: the operating system) counts for a fresh process rose, "
    "from before the model was loaded to its highest point",
}


def _status(field: str) -> int:
    """Bytes of a field such as VmRSS of /proc/self/status; 0 where there is no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def in_use(on: torch.device) -> int:
    """Bytes that the driver counts as used on the GPU (by everybody), or the operating system for this process."""
    if on.type == "cuda":
        return round(float(machine.smi("memory.used").get("memory.used", "0")) * 2**20)
    return _status("VmRSS")


def peaks(loaded: Loaded, pixels: torch.Tensor, before: int) -> dict[str, int]:
    """The peaks (see DEFINITIONS) of a process that has run nothing else, after three forwards of ``pixels``.

    Args:
        before: ``in_use`` before the model was loaded.

    Returns:
        batch_size, resident_bytes, allocator_peak_bytes, driver_peak_bytes.
    """
    on_gpu = loaded.device.type == "cuda"
    with loaded.running() as model:
        for _ in range(2):
            model(pixel_values=pixels)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            model(pixel_values=pixels)
            torch.cuda.synchronize()
            allocated = torch.cuda.max_memory_allocated()
            # PyTorch gives nothing back to the driver while it runs: what is used now is the peak.
            highest = in_use(loaded.device)
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


def measure(study, variant: str, batch_sizes: list[int], device: str | None = None) -> list[dict[str, int]]:
    """``peaks`` of one variant at each batch size, in a fresh process of its own: nothing else is in the numbers."""
    from vitnb.workers import Worker  # a worker measures memory too

    with Worker(study, variant, device) as worker:
        return worker.ask("memory", batch_sizes=batch_sizes)


def table(disk_bytes: int, peaks: list[dict[str, int]]) -> pd.DataFrame:
    """Megabytes (2^20 bytes) at each batch size, with what each number counts."""
    columns = {"disk": [disk_bytes] * len(peaks)} | {
        name: [row[f"{name.replace(' ', '_')}_bytes"] for row in peaks] for name in list(DEFINITIONS)[1:]
    }
    found = pd.DataFrame(columns, index=[f"MB, batch {row['batch_size']}" for row in peaks]).T / 2**20
    return found.round(2).assign(counts=DEFINITIONS)
