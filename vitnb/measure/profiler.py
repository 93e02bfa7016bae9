"""Kernels: what a forward consists of, from a profiler trace: totals by class and by part, launches, and idle time."""

import time
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from vitnb.analysis import kernel_classes
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.models import attention, layers
from vitnb.models.loader import LoadedVariant

REPEATS = 3  # profiled forwards, of which the one with the median latency is kept


def _path(event) -> list[str]:
    """The names of an operator and of those around it, outwards."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _is_label(name: str) -> bool:
    return name.startswith(kernel_classes.LABEL)


def _on_device(events) -> list:
    """What kept the GPU busy: kernels and copies, in order."""
    busy = [e for e in events if e.device_type == DeviceType.CUDA and not _is_label(e.name)]
    return sorted(busy, key=lambda e: (e.time_range.start, e.time_range.end))


def _own(events, on_gpu: bool) -> list[tuple[list[str], float]]:
    """(path, milliseconds) of every kernel or, on a CPU, of every operator's own time.

    A replayed graph's kernels belong to no operator: their own names are all there is.
    """
    if on_gpu and any(event.name == "cudaGraphLaunch" for event in events):
        inside = _on_device(events)[2:-1]  # without the markers
        return [([e.name], (e.time_range.end - e.time_range.start) / 1e3) for e in inside]
    found = []
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        if on_gpu:
            found += [([kernel.name, *_path(event)], kernel.duration / 1e3) for kernel in event.kernels]
        elif not _is_label(event.name):
            found.append((_path(event), event.self_cpu_time_total / 1e3))
    return [(path, milliseconds) for path, milliseconds in found if kernel_classes.MARKER not in path]


def _outermost(events) -> list:
    """The operators of a CPU that stand in no other."""
    return [e for e in events if not _is_label(e.name) and all(map(_is_label, _path(e)[1:]))]


def _timeline(events, on_gpu: bool) -> list[tuple[float, float]]:
    """(begin, end) in milliseconds of what kept the device busy: kernels or, on a CPU, outermost operators."""
    busy = _on_device(events)[1:] if on_gpu else _outermost(events)  # the first kernel only wakes the profiler
    return sorted((e.time_range.start / 1e3, e.time_range.end / 1e3) for e in busy)


def busy_and_idle(timeline: list[tuple[float, float]]) -> tuple[float, float]:
    """Time in which at least one interval runs, and the sum of the gaps between them, from first begin to last end."""
    busy = idle = 0.0
    reached = timeline[0][0]
    for begin, end in timeline:
        idle += max(0.0, begin - reached)
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy, idle


def _profiled(model, pixels: torch.Tensor, on_gpu: bool) -> tuple[profile, float]:
    """One profiled forward, its events not yet read, and its latency in milliseconds, taken around that same forward.

    On a GPU a marker kernel stands at either end, so that the trace and the latency begin and end together; one more goes
    ahead, because the first launch that the profiler sees takes far longer than any other.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    if not on_gpu:
        with profile(activities=activities, acc_events=True) as profiled:
            begin = time.perf_counter()
            model(pixel_values=pixels)
            latency = (time.perf_counter() - begin) * 1e3
        return profiled, latency
    buffer = torch.zeros(1, device=pixels.device)

    def mark() -> None:
        with record_function(kernel_classes.MARKER):
            buffer.fill_(1)

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(activities=activities, acc_events=True) as profiled:
        mark()
        torch.cuda.synchronize()
        begin.record()
        mark()
        model(pixel_values=pixels)
        mark()
        end.record()
        torch.cuda.synchronize()
    return profiled, begin.elapsed_time(end)


def profile_forward(loaded: LoadedVariant, pixels: torch.Tensor) -> dict:
    """Profile forwards of ``pixels`` (float32 [batch, 3, height, width]) after two that warm up; keep the median one.

    Returns:
        attention_ran: the kernel that the trace shows; total_ms: time in all kernels (on a CPU: in all operators);
        parts_ms: that time by part of the model and class, {part: {class: ms}}; attention_ms: the class's sum, or None for an
        attention of single products in a replayed graph, whose kernels do not say whose products they are;
        operators_ms: own time of each kernel or operator by name; launches: how many; busy_ms, idle_ms: the device's
        timeline, gaps measured as gaps; latency_ms: of the same profiled forward, measured beside the trace.

    Raises:
        VariantError: the trace shows a kernel that the variant's name does not allow.
    """
    pixels, on_gpu = loaded.prepare(pixels), loaded.device.type == "cuda"
    with loaded.inference() as model:
        for _ in range(2):
            model(pixel_values=pixels)
        with nullcontext() if loaded.engine.replays else label_parts(loaded.model):
            taken = sorted((_profiled(model, pixels, on_gpu) for _ in range(REPEATS)), key=lambda item: item[1])
    profiled, latency = taken[REPEATS // 2]
    events = list(profiled.events())  # seconds for a forward of thousands of launches: those of one are read
    kernel = attention.kernel_in_trace({event.name for event in events})
    attention.check_kernel(loaded.launched, kernel)
    unseen = loaded.engine.replays and on_gpu and kernel in ("math", "eager")
    own = _own(events, on_gpu)
    timeline = _timeline(events, on_gpu)
    busy, idle = busy_and_idle(timeline)
    parts = {part: dict.fromkeys(kernel_classes.CLASSES, 0.0) for part in kernel_classes.PARTS}
    operators: dict[str, float] = {}
    for path, milliseconds in own:
        parts[kernel_classes.model_part(path)][kernel_classes.classify(path)] += milliseconds
        operators[path[0]] = operators.get(path[0], 0.0) + milliseconds
    return {
        "batch_size": len(pixels),
        "attention_ran": kernel,
        "attention_ms": None if unseen else sum(classes["attention"] for classes in parts.values()),
        "total_ms": sum(operators.values()),
        "parts_ms": parts,
        "operators_ms": {name: ms for name, ms in sorted(operators.items(), key=lambda item: -item[1]) if ms > 0},
        "launches": len(timeline),
        "busy_ms": busy,
        "idle_ms": idle,
        "latency_ms": latency,
    }


def profile_batch_sizes(loaded: LoadedVariant, split: Split, sizes: list[int]) -> list[dict]:
    """A trace for every batch size, with images of a split; see ``trace``."""
    return [profile_forward(loaded, dataset.first_batch(split, loaded.processor, size)) for size in sizes]


def part_of_module(name: str, head: str) -> str | None:
    """Which part a module belongs to, by its full name; None for those of the rest and for those that hold several."""
    pieces = name.split(".")
    if name == head:
        return "head"
    for known, words in (
        ("patch embedding", {"embeddings", "patch_embed", "projection"}),
        ("attention", {"attention", "attn", "qkv", "out"}),
        ("mlp", {"mlp", "intermediate", "output", "fc1", "fc2"}),
    ):
        if words & set(pieces):
            return known
    return None


@contextmanager
def label_parts(model: nn.Module):
    """A block of forwards in whose trace each part of the model is a range; the outermost module of a part counts."""
    head, hooks, ranges = layers.head_name(model), [], []

    def enter(label):
        def hook(*_):
            ranges.append(torch.profiler.record_function(label))
            ranges[-1].__enter__()

        return hook

    def leave(*_):
        ranges.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        kind, parent = part_of_module(name, head), part_of_module(name.rpartition(".")[0], head)
        if kind and kind != parent:
            hooks.append(module.register_forward_pre_hook(enter(kernel_classes.LABEL + kind)))
            hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
