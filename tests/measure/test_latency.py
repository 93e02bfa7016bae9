"""Timing, with a clock that the test turns."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitnb import variants
from vitnb.analysis.latency import device_samples, latency_table, percentiles
from vitnb.data.splits import load_split
from vitnb.errors import VariantError
from vitnb.measure import latency
from vitnb.models import loader
from vitnb.records import machine
from vitnb.study import Latency


class Clock:
    """Seconds that pass only when a forward says so."""

    def __init__(self):
        self.now, self.per_reading = 0.0, 0.0

    def perf_counter(self) -> float:
        self.now += self.per_reading
        return self.now


@pytest.fixture
def fake(monkeypatch):
    """A loaded variant whose forwards take a known time, ``takes`` (n -> seconds).

    The first forward takes 5 s, and the n-th one 10 + n % 3 milliseconds.
    """
    clock, calls, moved = Clock(), [], []
    monkeypatch.setattr(latency, "time", clock)
    monkeypatch.setattr(machine, "machine_state", dict)
    monkeypatch.setattr(
        latency, "cache_flush_buffer", lambda on: torch.zeros(4, dtype=torch.uint8)
    )
    fake = SimpleNamespace(
        device=torch.device("cpu"), calls=calls, moved=moved, clock=clock
    )
    fake.takes = lambda n: 5.0 if n == 1 else (10 + n % 3) / 1e3

    def model(pixel_values):
        calls.append(len(pixel_values))
        clock.now += fake.takes(len(calls))

    @contextmanager
    def inference():
        yield model

    def prepare(pixels):
        moved.append(len(pixels))
        return pixels

    fake.inference, fake.prepare = inference, prepare
    return fake


def test_samples_are_milliseconds_and_the_first_forward_is_apart(fake):
    found = latency.measure_latency(
        fake, torch.zeros(6, 3, 2, 2), Latency(samples=30, seconds=1e9)
    )
    assert found["batch_size"] == 6 and set(fake.calls) == {6} and fake.moved == [6]
    assert found["first_ms"] == pytest.approx(5000) and found["device_ms"] is None
    assert len(found["host_ms"]) == 30 and len(found["cold_ms"]) == 20
    warmed = found["warm_up"]["forwards"]
    assert len(fake.calls) == 1 + warmed + 30 + 20
    assert found["host_ms"] == pytest.approx(
        [10 + (2 + warmed + n) % 3 for n in range(30)]
    )
    assert found["images_per_second"] == pytest.approx(
        6 * 30 / (sum(found["host_ms"]) / 1e3)
    )
    assert device_samples(found) == found["host_ms"]


def test_the_host_s_time_ends_when_the_device_is_done(fake, monkeypatch):
    """A device takes forwards over in no time, and works 20 ms on each.

    50 ms of work from before do not count.
    """
    pending = [0.05]

    def synchronize():
        fake.clock.now += pending[0]
        pending[0] = 0.0

    def model(pixel_values):
        pending[0] += 0.02

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    fake.device = torch.device("cuda")
    assert [
        latency.time_host(fake, model, torch.zeros(1)) for _ in range(2)
    ] == pytest.approx([20.0, 20.0])


def test_throughput_counts_the_time_between_forwards(fake):
    """Reading the clock takes a millisecond here, in samples and between them."""
    fake.clock.per_reading = 0.001
    found = latency.measure_latency(
        fake, torch.zeros(4, 3, 2, 2), Latency(samples=50, seconds=1e9)
    )
    busy = sum(found["host_ms"]) / 1e3
    assert found["images_per_second"] < 0.97 * 4 * 50 / busy


def test_the_warm_up_ends_when_the_time_is_stable(fake):
    """Forwards that get faster until the 60th: none of those may be a sample."""
    fake.takes = lambda n: 0.010 + 0.020 * max(0.0, 1 - n / 60)
    found = latency.measure_latency(
        fake, torch.zeros(1, 3, 2, 2), Latency(samples=40, seconds=1e9)
    )
    assert found["warm_up"]["stable"] and found["warm_up"]["forwards"] >= 60
    assert found["host_ms"] == pytest.approx([10.0] * 40)


def test_a_warm_up_that_never_settles_ends_and_says_so(fake):
    fake.takes = lambda n: 0.001 * 1.02**n
    warmed = latency.measure_latency(
        fake, torch.zeros(1, 3, 2, 2), Latency(samples=20, seconds=1.0)
    )["warm_up"]
    assert not warmed["stable"] and 5 <= warmed["seconds"] < 15


def test_a_short_timing_has_a_short_warm_up(fake):
    fake.takes = lambda n: 0.001 * 1.02**n
    warmed = latency.measure_latency(
        fake, torch.zeros(1, 3, 2, 2), Latency(samples=20, seconds=0.2)
    )["warm_up"]
    assert not warmed["stable"] and 1 <= warmed["seconds"] < 3


def test_a_steady_forward_needs_three_windows(fake):
    fake.takes = lambda n: 0.5
    warmed = latency.measure_latency(
        fake, torch.zeros(1, 3, 2, 2), Latency(samples=20, seconds=1.0)
    )["warm_up"]
    assert warmed == {"forwards": 15, "seconds": 7.5, "stable": True}


def test_seconds_end_it_as_well_but_not_below_what_a_median_needs(fake):
    found = latency.measure_latency(
        fake, torch.zeros(1, 3, 2, 2), Latency(samples=10**6, seconds=1.0)
    )
    assert 1000 <= sum(found["host_ms"]) < 1130
    fake.takes = lambda n: 3.0
    found = latency.measure_latency(
        fake, torch.zeros(1, 3, 2, 2), Latency(samples=10**6, seconds=1.0)
    )
    assert len(found["host_ms"]) == 20


def test_the_cache_is_emptied_before_each_cold_forward(fake, monkeypatch):
    writes = []
    buffer = SimpleNamespace(fill_=lambda value: writes.append(len(fake.calls)))
    monkeypatch.setattr(latency, "cache_flush_buffer", lambda on: buffer)
    latency.measure_latency(
        fake, torch.zeros(1, 3, 2, 2), Latency(samples=20, seconds=0.0)
    )
    assert writes == list(range(len(fake.calls) - 20, len(fake.calls)))


def test_the_buffer_is_larger_than_the_last_cache():
    assert latency.cache_flush_buffer(torch.device("cpu")).numel() >= 64 * 2**20


def test_every_batch_size_has_its_own_samples(mini):
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa"))
    found = latency.time_batch_sizes(
        loaded, load_split(mini, "test"), [1, 3], Latency(samples=4, seconds=5.0)
    )
    assert [(timing["batch_size"], len(timing["host_ms"])) for timing in found] == [
        (1, 4),
        (3, 4),
    ]


def test_times_of_logits_that_are_not_finite_are_no_times(mini):
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa"))

    def break_threes(module, inputs, output):
        if len(output.logits) == 3:
            output.logits[:2] = float("nan")

    loaded.model.register_forward_hook(break_threes)
    budget = Latency(samples=4, seconds=5.0)
    split = load_split(mini, "test")
    assert len(latency.time_batch_sizes(loaded, split, [1, 2], budget)) == 2
    with pytest.raises(VariantError, match="2 of 3 images are not finite"):
        latency.time_batch_sizes(loaded, split, [3], budget)


def test_statistics_of_known_samples():
    """0 to 1000 in some order: between ranks there is nothing to interpolate."""
    samples = np.random.default_rng(0).permutation(1001).astype(float).tolist()
    found = percentiles(samples)
    assert [found[name][0] for name in ("p50", "p95", "p99")] == [500, 950, 990]
    for value, low, high in found.values():
        assert low < value < high
    assert found["p50"][1] > 440 and found["p50"][2] < 560


@pytest.mark.parametrize(("name", "fewest"), [("p50", 20), ("p95", 200), ("p99", 1000)])
def test_a_percentile_needs_ten_samples_beyond_it(name, fewest):
    assert percentiles([1.0] * (fewest - 1))[name] is None
    assert percentiles([1.0] * fewest)[name] == (1.0, 1.0, 1.0)


def test_the_table_shows_what_was_measured(fake):
    found = latency.measure_latency(
        fake, torch.zeros(2, 3, 2, 2), Latency(samples=250, seconds=1e9)
    )
    row = latency_table([found]).loc[2]
    assert (
        row["first"] == "5000.00"
        and row["p50"].startswith("11.00 (")
        and row["p95"].startswith("12.00 (")
    )
    assert row["p99"] == "" and row["samples"] == 250


@pytest.mark.parametrize("was_enabled", [True, False])
def test_no_garbage_is_collected_while_a_forward_is_timed(fake, was_enabled):
    """A collection stops the process in a forward that has nothing to do with it."""
    enabled, collected = [], []

    def forward(pixel_values):
        enabled.append(gc.isenabled())
        _ = [[] for _ in range(5000)]  # many thresholds of the collector

    def note(phase, about):
        collected.append(phase)

    gc.collect()
    (gc.enable if was_enabled else gc.disable)()
    gc.callbacks.append(note)
    try:
        latency.time_device(fake, forward, torch.zeros(1), 5)
        latency.time_host(fake, forward, torch.zeros(1))
        assert enabled == [False] * 6 and collected == []
        assert gc.isenabled() == was_enabled, "it is left as it was found"
    finally:
        gc.callbacks.remove(note)
        gc.enable()
