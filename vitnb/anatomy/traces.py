"""Defects of reading a trace: means taken for totals, attention by its name (8, 9)."""

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
    """One operator (on a GPU: one kernel) of a trace, all its calls together.

    own: time in ms, without the operators that it calls.
    """

    name: str
    calls: int
    own: float


@dataclass(frozen=True)
class Trace:
    """The trace of one forward.

    rows: its operators, longest first.
    attention: time in whole attentions, ms.
    """

    rows: list[Row]
    attention: float


def traced(bench: Bench) -> Trace:
    """Profile one forward of the fitted model in fp32, after a warm-up forward."""
    on_gpu = bench.device.type == "cuda"
    pixels = bench.test.pixels[:IMAGES].to(bench.device)
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with torch.inference_mode():
        bench.model(pixel_values=pixels)
    with torch.inference_mode(), profile(activities=activities) as profiled:
        bench.model(pixel_values=pixels)
        if on_gpu:
            torch.cuda.synchronize()
    return _read_events(profiled.key_averages(), on_gpu)


def _read_events(events, on_gpu: bool) -> Trace:
    """Read a profiler's events; its times are in microseconds."""
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    total = "device_time_total" if on_gpu else "cpu_time_total"
    rows = [
        Row(event.key, event.count, getattr(event, own) / 1e3)
        for event in events
        if event.device_type == wanted
    ]
    rows.sort(key=lambda row: -row.own)
    attention = sum(getattr(event, total) for event in events if event.key in WHOLE)
    return Trace(rows, attention / 1e3)


def means_for_totals(bench: Bench) -> Case:
    """Reproduce defect 8.

    Wrong: the kernel time of a forward is the sum of each operator's mean time per
    call. Right: totals, reconciled with the latency.

    ``extra["latency"]`` is the latency in ms, measured without the profiler.
    """
    trace = traced(bench)
    pixels = bench.test.pixels[:IMAGES].to(bench.device)
    calls = {"forward": lambda: bench.model(pixel_values=pixels)}
    samples = interleaved(calls, bench.device, bench.seconds / 2)
    return Case(
        number=8,
        title="Means summed as if they were totals",
        what=f"operators of one forward of {IMAGES} images",
        unit="ms",
        wrong=sum(row.own / row.calls for row in trace.rows),
        right=sum(row.own for row in trace.rows),
        lesson="Totals, and they must add up to about the latency.",
        extra={"latency": float(np.median(samples["forward"])), "rows": trace.rows},
    )


def by_name(bench: Bench) -> Case:
    """Reproduce defect 9.

    Wrong: attention's time is that of the operators with "attn" in their names. A trace
    of PyTorch's attention has no such name. Right: the operator that surrounds every
    attention, whichever kernel computes it.
    """
    trace = traced(bench)
    return Case(
        number=9,
        title="Attention found by its name",
        what=f"time in attention, one forward of {IMAGES} images",
        unit="ms",
        wrong=sum(row.own for row in trace.rows if "attn" in row.name),
        right=trace.attention,
        lesson="One tested list of operators and kernels; show what it does not know.",
        extra={"names": [row.name for row in trace.rows if "attention" in row.name]},
    )
