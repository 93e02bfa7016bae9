"""Memory: known allocations, and a process in which nothing else runs."""

import mmap

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vitnb import devices
from vitnb.analysis import performance
from vitnb.measure import memory, worker


def test_peak_of_known_allocations():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        small = torch.empty(2 * 2**20, dtype=torch.uint8)
        middle = torch.empty(4 * 2**20, dtype=torch.uint8)
        del middle
        large = torch.empty(8 * 2**20, dtype=torch.uint8)
        del small, large
    assert memory.allocations_peak(profiled) == 10 * 2**20


@pytest.fixture(scope="module")
def found(mini) -> dict[str, list[dict]]:
    return {
        name: worker.measure_memory(mini, name, [3, 1])
        for name in ("fp32-sdpa", "nf4-fa2")
    }


def test_one_row_a_batch_size_in_the_order_asked(found):
    assert [row["batch_size"] for row in found["fp32-sdpa"]] == [3, 1]


def test_the_allocator_s_peak_is_the_weights_and_one_forward(found):
    """17 tokens in float32: an MLP's input and output must be alive at once."""
    for size, row in zip((3, 1), found["fp32-sdpa"], strict=True):
        activations = row["allocator_peak_bytes"] - row["resident_bytes"]
        workspace = 2**26 * torch.cuda.is_available()  # cuBLAS keeps one
        assert (
            size * 17 * (64 + 128) * 4
            <= activations
            < size * 17 * (64 + 128) * 4 * 6 + workspace
        )


def test_small_weights_are_small(found):
    small, large = (
        found[name][0]["resident_bytes"] for name in ("nf4-fa2", "fp32-sdpa")
    )
    assert small < 0.3 * large


def test_the_driver_counts_at_least_what_the_allocator_holds(found):
    for row in found["fp32-sdpa"]:
        assert row["driver_peak_bytes"] > row["allocator_peak_bytes"]


def test_what_this_process_holds_is_not_in_the_numbers(mini, found):
    """The trap of one process for all: 256 MB lived before, and 256 MB live now."""
    with mmap.mmap(-1, 2**28) as passing:
        passing.write(b"1" * 2**28)
    living = np.ones(2**28, dtype=np.uint8)
    again = worker.measure_memory(mini, "fp32-sdpa", [1])[0]
    assert (
        again["driver_peak_bytes"]
        < found["fp32-sdpa"][1]["driver_peak_bytes"] + living.nbytes / 4
    )
    assert memory.driver_bytes(devices.select_device("cpu")) > living.nbytes


def test_the_table_says_what_is_counted(found):
    table = performance.memory_table(10 * 2**20, found["fp32-sdpa"])
    assert table.loc["disk", "MB, batch 1"] == 10 and set(table.index) == set(
        performance.MEMORY_DEFINITIONS
    )
    assert table.loc["resident", "counts"] == performance.MEMORY_DEFINITIONS["resident"]


def test_each_batch_size_starts_with_nothing_of_another(mini, monkeypatch):
    """No graph, no cached block and no pixels of another size are left to count."""
    one = worker.load_local_variant(mini, "fp32-sdpa", "cpu")
    freed, seen = [], []
    monkeypatch.setattr(memory, "free_memory", freed.append)
    before = memory._peaks_on_cpu

    def measure(loaded, model, pixels):
        shapes = {shape[0] for shape in model._ran}
        seen.append((shapes, set(one.pixels), len(freed)))
        return before(loaded, model, pixels)

    monkeypatch.setattr(memory, "_peaks_on_cpu", measure)
    rows = one.measure_memory([3, 1, 2, 1])
    assert [row["batch_size"] for row in rows] == [3, 1, 2, 1]
    assert seen == [({1}, {1}, 1), ({2}, {2}, 2), ({3}, {3}, 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["fp32-sdpa", "fp32-sdpa-graph"])
def test_a_size_has_the_same_peak_alone_and_after_others(mini, name):
    """Graphs of smaller sizes are gone; the allocator rounds to blocks of 2 MB."""
    alone = worker.measure_memory(mini, name, [16])[0]
    after = worker.measure_memory(mini, name, [16, 1, 4, 8])[0]
    difference = after["allocator_peak_bytes"] - alone["allocator_peak_bytes"]
    assert abs(difference) <= 2 * 2**20
