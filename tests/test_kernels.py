"""Profiler traces: what ran, how long, and the peak of memory."""

from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vitnb import attention, data, kernels, models, variants
from vitnb.errors import VariantError


def loaded_and_pixels(mini, name):
    loaded = models.load(mini, variants.get(name))
    return loaded, data.first_batch(data.split(mini, "test"), loaded.processor, 4)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("fp32-math", "math"), ("fp32-sdpa", "flash-cpu"), ("nf4-fa2", "flash-cpu"), ("int8-fa2", "flash-cpu")],
)
def test_the_trace_names_the_kernel_and_its_share(mini, name, kernel):
    if torch.cuda.is_available():
        pytest.skip("the kernels of a CPU")
    found = kernels.trace(*loaded_and_pixels(mini, name))
    assert found["attention_ran"] == kernel and found["batch_size"] == 4
    assert 0 < found["attention_ms"] < found["total_ms"]
    assert found["total_ms"] == pytest.approx(sum(found["operators_ms"].values()))
    own = list(found["operators_ms"].values())
    assert own == sorted(own, reverse=True)


def test_attention_is_counted_whole_and_operators_once(mini):
    """The reference kernel is made of operators that a ViT uses nowhere else; a wrapper's own time is not its callee's."""
    if torch.cuda.is_available():
        pytest.skip("the operators of a CPU")
    found = kernels.trace(*loaded_and_pixels(mini, "fp32-math"))
    own = found["operators_ms"]
    assert found["attention_ms"] >= own["aten::bmm"] + own["aten::_softmax"]
    assert own["aten::linear"] < own["aten::addmm"]


def test_a_trace_for_every_batch_size(mini):
    loaded, test = models.load(mini, variants.get("fp32-sdpa")), data.split(mini, "test")
    found = kernels.traces(loaded, test, [1, 3])
    assert [trace["batch_size"] for trace in found] == [1, 3]
    assert found[0]["activations_bytes"] < found[1]["activations_bytes"]


def test_a_variant_that_runs_another_kernel_fails(mini, monkeypatch):
    loaded, pixels = loaded_and_pixels(mini, "fp32-math")
    monkeypatch.setattr(attention, "forced", lambda launched: nullcontext())
    with pytest.raises(VariantError, match="math was asked for"):
        kernels.trace(loaded, pixels)


def test_peak_of_known_allocations():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        small = torch.empty(2 * 2**20, dtype=torch.uint8)
        middle = torch.empty(4 * 2**20, dtype=torch.uint8)
        del middle
        large = torch.empty(8 * 2**20, dtype=torch.uint8)
        del small, large
    assert kernels._peak_on_cpu(profiled) == 10 * 2**20


def test_activations_grow_with_the_batch(mini):
    loaded, pixels = loaded_and_pixels(mini, "fp32-sdpa")
    one, four = (kernels.trace(loaded, pixels[:size])["activations_bytes"] for size in (1, 4))
    # 17 tokens: at least the MLP's input and output must be alive at once, in float32.
    assert one >= 17 * (64 + 128) * 4 and 2 * one < four <= 4 * one
