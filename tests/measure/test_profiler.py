"""Profiler traces: the kernels that ran, and their times."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from vitnb import variants
from vitnb.analysis import kernel_classes, performance
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.errors import VariantError
from vitnb.measure import profiler
from vitnb.models import attention, loader


def loaded_and_pixels(mini, name):
    loaded = loader.load_variant(mini, variants.parse(name))
    return loaded, dataset.first_batch(load_split(mini, "test"), loaded.processor, 4)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("fp32-math", "math"),
        ("fp32-sdpa", "flash-cpu"),
        ("nf4-fa2", "flash-cpu"),
        ("int8-fa2", "flash-cpu"),
    ],
)
def test_the_trace_names_the_kernel_and_its_share(mini, name, kernel):
    if torch.cuda.is_available():
        pytest.skip("the kernels of a CPU")
    found = profiler.profile_forward(*loaded_and_pixels(mini, name))
    assert found["attention_ran"] == kernel and found["batch_size"] == 4
    assert 0 < found["attention_ms"] < found["total_ms"]
    assert found["total_ms"] == pytest.approx(sum(found["operators_ms"].values()))
    own = list(found["operators_ms"].values())
    assert own == sorted(own, reverse=True)


def test_attention_is_counted_whole_and_operators_once(mini):
    """The reference kernel is made of operators that a ViT uses nowhere else.

    A wrapper's own time is not its callee's.
    """
    if torch.cuda.is_available():
        pytest.skip("the operators of a CPU")
    found = profiler.profile_forward(*loaded_and_pixels(mini, "fp32-math"))
    own = found["operators_ms"]
    assert found["attention_ms"] >= own["aten::bmm"] + own["aten::_softmax"]
    assert own["aten::linear"] < own["aten::addmm"]


def test_a_trace_for_every_batch_size(mini):
    loaded, test = (
        loader.load_variant(mini, variants.parse("fp32-sdpa")),
        load_split(mini, "test"),
    )
    found = profiler.profile_batch_sizes(loaded, test, [1, 3])
    assert [trace["batch_size"] for trace in found] == [1, 3]


def test_a_variant_that_runs_another_kernel_fails(mini, monkeypatch):
    loaded, pixels = loaded_and_pixels(mini, "fp32-math")
    monkeypatch.setattr(attention, "force_backend", lambda launched: nullcontext())
    with pytest.raises(VariantError, match="math was asked for"):
        profiler.profile_forward(loaded, pixels)


def test_parts_and_classes_hold_all_of_the_time(mini):
    found = profiler.profile_forward(*loaded_and_pixels(mini, "fp32-sdpa"))
    for sums in (performance.time_by_class(found), performance.time_by_part(found)):
        assert sum(sums.values()) == pytest.approx(found["total_ms"])
    assert performance.time_by_class(found)["attention"] == found["attention_ms"]
    parts = found["parts_ms"]
    assert parts["attention"]["attention"] == pytest.approx(found["attention_ms"]), (
        "attention outside of attention"
    )
    assert (
        parts["mlp"]["gemm"] > 0
        and parts["patch embedding"]["gemm"] > 0
        and parts["head"]["gemm"] > 0
    )
    assert parts["mlp"]["attention"] == 0 and parts["rest"]["normalization"] > 0


def test_nothing_is_dequantized_where_nothing_is_quantized(mini):
    plain, small = (
        performance.time_by_class(
            profiler.profile_forward(*loaded_and_pixels(mini, name))
        )
        for name in ("bf16-sdpa", "int8-sdpa")
    )
    assert plain["dequantize"] == plain["quantize"] == 0
    assert small["dequantize"] > 0 and small["quantize"] > 0


def test_gaps_are_gaps():
    """Overlap counts once, and a gap is where nothing runs: from 3 to 5."""
    timeline = [(0, 2), (1, 3), (5, 7), (5.25, 5.5), (5.75, 6.5)]
    assert profiler.busy_and_idle(timeline) == (5, 2)


def test_the_timeline_is_the_latency(mini):
    """Busy and idle time make up the latency of one forward.

    Only the time before the first operator and after the last one is missing.
    """
    found = profiler.profile_forward(*loaded_and_pixels(mini, "fp32-sdpa"))
    assert (
        0.5 * found["latency_ms"]
        < found["busy_ms"] + found["idle_ms"]
        <= found["latency_ms"]
    )
    assert found["idle_ms"] > 0 and found["launches"] >= 3 * 6


def test_idle_time_between_operators_shows(mini):
    """20 ms of waiting in each of the three blocks is idle time."""
    loaded, pixels = loaded_and_pixels(mini, "fp32-sdpa")
    before = profiler.profile_forward(loaded, pixels)
    for name, module in loaded.model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_hook(lambda *_: time.sleep(0.02))
    found = profiler.profile_forward(loaded, pixels)
    assert found["idle_ms"] > before["idle_ms"] + 50


def kernel(name: str, start: float, end: float) -> SimpleNamespace:
    """An event on a GPU; times in microseconds."""
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA,
        time_range=SimpleNamespace(start=start, end=end),
    )


@pytest.mark.parametrize("marker", ["fill", kernel_classes.MARKER])
def test_marker_kernels_are_no_launches_of_the_forward(marker):
    """One wakes the profiler, and one stands at either end.

    Between the markers: 3 us of nothing, two kernels of 5 us, 2 us of nothing between
    them and 4 us behind them.
    """
    fills = [kernel("fill", *times) for times in ((0, 1), (100, 101), (120, 121))]
    ranges = [kernel(kernel_classes.MARKER, 99, 102)]
    forward = [kernel("gemm", 104, 109), kernel("gemm", 111, 116)]
    events = [*forward, *fills, *(ranges if marker != "fill" else [])]
    timeline, begin, end = profiler._timeline(events, on_gpu=True)
    assert timeline == [(0.104, 0.109), (0.111, 0.116)]
    busy, idle = profiler.busy_and_idle(timeline, begin, end)
    assert busy * 1e3 == pytest.approx(5 + 5)
    assert idle * 1e3 == pytest.approx(3 + 2 + 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["fp32-sdpa", "fp32-sdpa-graph"])
def test_the_launches_are_the_forward_s_own(mini, name):
    """The timeline holds the kernels whose times are summed, and no other."""
    loaded, pixels = loaded_and_pixels(mini, name)
    found = profiler.profile_forward(loaded, pixels)
    assert found["busy_ms"] == pytest.approx(found["total_ms"], rel=1e-3)
