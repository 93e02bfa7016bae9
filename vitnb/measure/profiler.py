"""Profile a forward: time by class and part, launches, and idle time of the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from vitnb.analysis import kernel_classes
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.devices import synchronize
from vitnb.models import attention, layers
from vitnb.models.loader import LoadedVariant

REPEATS = 3  # profiled forwards; the one with the median latency counts

# Words in a module's full name, by the part of the model that they belong to.
PART_WORDS = {
    "patch embedding": {"embeddings", "patch_embed", "projection"},
    "attention": {"attention", "attn", "qkv", "out"},
    "mlp": {"mlp", "intermediate", "output", "fc1", "fc2"},
}


def part_of_module(name: str, head: str) -> str | None:
    """Return the part of the model that a module belongs to.

    Args:
        name: the module's full name.
        head: the full name of the classification head.

    Returns:
        None for a module that holds several parts or belongs to the rest.
    """
    if name == head:
        return "head"
    words_of_name = set(name.split("."))
    for part, words in PART_WORDS.items():
        if words & words_of_name:
            return part
    return None


@contextmanager
def label_parts(model: nn.Module) -> Iterator[None]:
    """Mark each part of the model as a range in the trace of the forwards inside.

    The outermost module of a part counts.
    """
    head = layers.head_name(model)
    ranges: list[record_function] = []
    hooks = []

    def enter(label: str):
        def hook(*_) -> None:
            ranges.append(record_function(label))
            ranges[-1].__enter__()

        return hook

    def leave(*_) -> None:
        ranges.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        part = part_of_module(name, head)
        parent_part = part_of_module(name.rpartition(".")[0], head)
        if part and part != parent_part:
            label = kernel_classes.LABEL + part
            hooks.append(module.register_forward_pre_hook(enter(label)))
            hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _operator_path(event) -> list[str]:
    """Return the names of an operator and of the operators around it, outwards."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _is_label(name: str) -> bool:
    return name.startswith(kernel_classes.LABEL)


def _start_and_end(event) -> tuple[float, float]:
    """Return when an event starts and ends, in milliseconds."""
    return event.time_range.start / 1e3, event.time_range.end / 1e3


def _on_device(events: list) -> list:
    """Return the kernels and copies on the GPU, in order."""
    busy = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not _is_label(event.name)
    ]
    return sorted(busy, key=_start_and_end)


def _replayed_times(events: list) -> list[tuple[list[str], float]]:
    """Return (path, milliseconds) of every kernel of a replayed CUDA graph.

    Replayed kernels belong to no operator. A path is the kernel's own name alone.
    """
    times = []
    for event in _on_device(events)[2:-1]:  # without the markers
        microseconds = event.time_range.end - event.time_range.start
        times.append(([event.name], microseconds / 1e3))
    return times


def _kernel_times(events: list) -> list[tuple[list[str], float]]:
    """Return (path, milliseconds) of every kernel that an operator launched."""
    times = []
    for event in events:
        if event.device_type == DeviceType.CPU:
            path = _operator_path(event)
            for kernel in event.kernels:
                times.append(([kernel.name, *path], kernel.duration / 1e3))
    return times


def _operator_times(events: list) -> list[tuple[list[str], float]]:
    """Return (path, milliseconds) of every operator's own time on a CPU."""
    return [
        (_operator_path(event), event.self_cpu_time_total / 1e3)
        for event in events
        if event.device_type == DeviceType.CPU and not _is_label(event.name)
    ]


def _own_times(events: list, on_gpu: bool) -> list[tuple[list[str], float]]:
    """Return (path, milliseconds) of every kernel, or of every operator on a CPU."""
    if on_gpu and any(event.name == "cudaGraphLaunch" for event in events):
        return _replayed_times(events)
    times = _kernel_times(events) if on_gpu else _operator_times(events)
    return [(path, ms) for path, ms in times if kernel_classes.MARKER not in path]


def _outermost(events: list) -> list:
    """Return the operators of a CPU that stand in no other operator."""
    return [
        event
        for event in events
        if not _is_label(event.name) and all(map(_is_label, _operator_path(event)[1:]))
    ]


def _timeline(
    events: list, on_gpu: bool
) -> tuple[list[tuple[float, float]], float, float]:
    """Return (start, end) in milliseconds of every kernel, sorted.

    On a CPU these are the outermost operators.

    Returns:
        The intervals, and when the forward begins and ends. On a GPU that is the end of
        the marker ahead and the start of the marker behind.
    """
    if not on_gpu:
        timeline = sorted(map(_start_and_end, _outermost(events)))
        return timeline, timeline[0][0], timeline[-1][1]
    # The first marker only wakes the profiler.
    _, ahead, *kernels, behind = map(_start_and_end, _on_device(events))
    return kernels, ahead[1], behind[0]


def busy_and_idle(
    timeline: list[tuple[float, float]],
    begin: float | None = None,
    end: float | None = None,
) -> tuple[float, float]:
    """Return the time with at least one interval, and the sum of the gaps.

    Args:
        timeline: intervals (start, end), sorted.
        begin: time counts from here; None: from the first start.
        end: time counts up to here; None: to the last end.
    """
    busy = idle = 0.0
    reached = timeline[0][0] if begin is None else begin
    for start, stop in timeline:
        idle += max(0.0, start - reached)
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    if end is not None:
        idle += max(0.0, end - reached)
    return busy, idle


def _profile_on_cpu(model, pixels: torch.Tensor) -> tuple[profile, float]:
    """Profile one forward; return the trace and its latency in milliseconds."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        begin = time.perf_counter()
        model(pixel_values=pixels)
        latency_ms = (time.perf_counter() - begin) * 1e3
    return profiled, latency_ms


def _profile_on_gpu(model, pixels: torch.Tensor) -> tuple[profile, float]:
    """Profile one forward; return the trace and its latency in milliseconds.

    A marker kernel stands at either end, so that the trace and the latency begin and
    end together. One more marker goes ahead: the first launch that the profiler sees
    takes far longer than any other.
    """
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    buffer = torch.zeros(1, device=pixels.device)
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)

    def mark() -> None:
        with record_function(kernel_classes.MARKER):
            buffer.fill_(1)

    with profile(activities=activities, acc_events=True) as profiled:
        mark()
        synchronize(pixels.device)
        begin.record()
        mark()
        model(pixel_values=pixels)
        mark()
        end.record()
        synchronize(pixels.device)
    return profiled, begin.elapsed_time(end)


def _profile_median(
    loaded: LoadedVariant, pixels: torch.Tensor
) -> tuple[profile, float]:
    """Profile some forwards; return the trace and latency of the median one."""
    on_gpu = loaded.device.type == "cuda"
    profile_once = _profile_on_gpu if on_gpu else _profile_on_cpu
    with loaded.inference() as model:
        for _ in range(2):
            model(pixel_values=pixels)
        # A replayed graph calls no modules, which could mark their parts. Asked after
        # the first forwards, in which an engine may fall back.
        replays = loaded.engine.replays(pixels.shape)
        with nullcontext() if replays else label_parts(loaded.model):
            traces = [profile_once(model, pixels) for _ in range(REPEATS)]
    return sorted(traces, key=lambda trace: trace[1])[REPEATS // 2]


def _sum_times(
    times: list[tuple[list[str], float]],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Sum (path, milliseconds) by part and class, and by name of kernel or operator."""
    parts = {
        part: dict.fromkeys(kernel_classes.CLASSES, 0.0)
        for part in kernel_classes.PARTS
    }
    operators: dict[str, float] = {}
    for path, milliseconds in times:
        part = kernel_classes.model_part(path)
        parts[part][kernel_classes.classify(path)] += milliseconds
        operators[path[0]] = operators.get(path[0], 0.0) + milliseconds
    return parts, operators


def _longest_first(operators: dict[str, float]) -> dict[str, float]:
    """Sort operators by their time, and leave out those that took none."""
    ordered = sorted(operators.items(), key=lambda item: -item[1])
    return {name: ms for name, ms in ordered if ms > 0}


def profile_forward(loaded: LoadedVariant, pixels: torch.Tensor) -> dict:
    """Profile forwards of one batch after two warm-up forwards; use the median one.

    Args:
        pixels: float32 [batch, 3, height, width].

    Returns:
        batch_size.
        attention_ran: the attention kernel in the trace.
        attention_ms: time of the class attention. None for an attention of single
            products in a replayed graph: its kernels do not say whose products they
            are.
        total_ms: time in all kernels (on a CPU: in all operators).
        parts_ms: time by part of the model and class, {part: {class: ms}}.
        operators_ms: own time of each kernel or operator by name, longest first.
        launches: number of kernels (on a CPU: of outermost operators).
        busy_ms, idle_ms: the device's timeline; idle time is the sum of the gaps, from
            the begin of the forward to its end.
        latency_ms: latency of this forward, measured beside the trace.

    Raises:
        VariantError: the trace shows a kernel that the variant's name does not allow.
    """
    on_gpu = loaded.device.type == "cuda"
    pixels = loaded.prepare(pixels)
    profiled, latency_ms = _profile_median(loaded, pixels)
    # Reading the events of thousands of launches takes seconds: one trace is read.
    events = list(profiled.events())
    kernel = attention.kernel_in_trace({event.name for event in events})
    attention.check_kernel(loaded.launched, kernel)
    parts, operators = _sum_times(_own_times(events, on_gpu))
    attention_ms = sum(classes["attention"] for classes in parts.values())
    replays = loaded.engine.replays(pixels.shape)
    if replays and on_gpu and kernel in ("math", "eager"):
        attention_ms = None
    timeline, begin, end = _timeline(events, on_gpu)
    busy, idle = busy_and_idle(timeline, begin, end)
    return {
        "batch_size": len(pixels),
        "attention_ran": kernel,
        "attention_ms": attention_ms,
        "total_ms": sum(operators.values()),
        "parts_ms": parts,
        "operators_ms": _longest_first(operators),
        "launches": len(timeline),
        "busy_ms": busy,
        "idle_ms": idle,
        "latency_ms": latency_ms,
    }


def profile_batch_sizes(
    loaded: LoadedVariant, split: Split, sizes: list[int]
) -> list[dict]:
    """Profile every batch size with images of a split, see ``profile_forward``."""
    return [
        profile_forward(loaded, dataset.first_batch(split, loaded.processor, size))
        for size in sizes
    ]
