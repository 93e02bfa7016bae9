"""Defects of reading a profiler's trace: means taken for totals, kernels found by a piece of their names (8, 9)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case
from vitnb.anatomy.clocks import interleaved
from vitnb.models.attention import WHOLE

IMAGES = 16  # in one forward


@dataclass(frozen=True)
class Row:
    """One operator (on a GPU: one kernel) of a trace; times in ms, all calls together."""

    name: str
    calls: int
    own: float  # without what it calls


@dataclass(frozen=True)
class Trace:
    """One forward: its operators, longest first, and the time in whole attentions (ms)."""

    rows: list[Row]
    attention: float


def traced(bench: Bench) -> Trace:
    """Profile one forward of the fitted model in fp32, after one that warms up."""
    pixels, on_gpu = bench.test.pixels[:IMAGES].to(bench.device), bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.inference_mode():
        bench.model(pixel_values=pixels)
    with torch.inference_mode(), profile(activities=activities) as profiled:
        bench.model(pixel_values=pixels)
        if on_gpu:
            torch.cuda.synchronize()
    events = profiled.key_averages()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    rows = [
        Row(e.key, e.count, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3)
        for e in events
        if e.device_type == wanted
    ]
    whole = [e for e in events if e.key in WHOLE]
    inside = sum(e.device_time_total if on_gpu else e.cpu_time_total for e in whole) / 1e3
    return Trace(sorted(rows, key=lambda row: -row.own), inside)


def means_for_totals(bench: Bench) -> Case:
    """Defect 8. Done wrong: the kernel time of a forward is the sum of each operator's mean time per call.
    Done instead: totals, reconciled with the latency. ``extra["latency"]`` is that, measured without the profiler.
    """
    trace, pixels = traced(bench), bench.test.pixels[:IMAGES].to(bench.device)
    samples = interleaved({"forward": lambda: bench.model(pixel_values=pixels)}, bench.device, bench.seconds / 2)
    return Case(
        8, "Means summed as if they were totals", f"operators of one forward of {IMAGES} images", "ms",
        sum(row.own / row.calls for row in trace.rows), sum(row.own for row in trace.rows),
        "Totals, and they must add up to about the latency.",
        {"latency": float(np.median(samples["forward"])), "rows": trace.rows},
    )  # fmt: skip


def by_name(bench: Bench) -> Case:
    """Defect 9. Done wrong: attention's time is that of the operators with "attn" in their names. No such name is in a
    trace of PyTorch's attention. Done instead: the operator that surrounds every attention, whichever kernel does it.
    """
    trace = traced(bench)
    return Case(
        9, "Attention found by its name", f"time in attention, one forward of {IMAGES} images", "ms",
        sum(row.own for row in trace.rows if "attn" in row.name), trace.attention,
        "One tested list of operators and kernels; show what it does not know.",
        {"names": [row.name for row in trace.rows if "attention" in row.name]},
    )  # fmt: skip
