"""Timing, with a clock that the test turns."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from vitnb import latency, studies


class Clock:
    """Seconds that pass only when a forward says so."""

    def __init__(self):
        self.now, self.per_reading = 0.0, 0.0

    def perf_counter(self) -> float:
        self.now += self.per_reading
        return self.now


@pytest.fixture
def fake(monkeypatch):
    """A loaded variant whose first forward takes 5 s and the n-th after it 10 + n % 3 milliseconds."""
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    calls = []

    def model(pixel_values):
        calls.append(len(pixel_values))
        clock.now += 5.0 if len(calls) == 1 else (10 + len(calls) % 3) / 1e3

    @contextmanager
    def running():
        yield model

    def to_input(pixels):
        moved.append(len(pixels))
        return pixels

    moved = []
    return SimpleNamespace(
        device=torch.device("cpu"), running=running, to_input=to_input, calls=calls, moved=moved, clock=clock
    )


def test_samples_are_milliseconds_and_the_first_forward_is_apart(fake):
    found = latency.measure(fake, torch.zeros(6, 3, 2, 2), studies.Latency(samples=30, seconds=1e9))
    assert found["batch_size"] == 6 and set(fake.calls) == {6} and fake.moved == [6]
    assert found["first_ms"] == pytest.approx(5000)
    assert len(found["samples_ms"]) == 30
    warmed = len(fake.calls) - 31
    assert warmed >= latency.WARMUP_FORWARDS
    assert found["samples_ms"] == pytest.approx([10 + (2 + warmed + n) % 3 for n in range(30)])
    assert found["images_per_second"] == pytest.approx(6 * 30 / (sum(found["samples_ms"]) / 1e3))


def test_throughput_counts_the_time_between_forwards(fake):
    """Reading the clock takes a millisecond here, between the samples as well as in them."""
    fake.clock.per_reading = 0.001
    found = latency.measure(fake, torch.zeros(4, 3, 2, 2), studies.Latency(samples=50, seconds=1e9))
    busy = sum(found["samples_ms"]) / 1e3
    assert found["images_per_second"] < 0.95 * 4 * 50 / busy


def test_every_batch_size_has_its_own_samples(mini):
    from vitnb import data, models, variants

    loaded = models.load(mini, variants.get("fp32-sdpa"))
    found = latency.sweep(loaded, data.split(mini, "test"), [1, 3], studies.Latency(samples=4, seconds=5.0))
    assert [(timing["batch_size"], len(timing["samples_ms"])) for timing in found] == [(1, 4), (3, 4)]


def test_at_least_five_forwards_warm_up(fake, monkeypatch):
    monkeypatch.setattr(latency, "WARMUP_SECONDS", 0.0)
    latency.measure(fake, torch.zeros(1, 3, 2, 2), studies.Latency(samples=1, seconds=1e9))
    assert len(fake.calls) == 1 + 5 + 1


def test_the_warm_up_lasts_long_enough(fake):
    latency.measure(fake, torch.zeros(1, 3, 2, 2), studies.Latency(samples=1, seconds=1e9))
    assert (len(fake.calls) - 2) * 0.012 >= latency.WARMUP_SECONDS


def test_seconds_end_it_as_well(fake):
    found = latency.measure(fake, torch.zeros(1, 3, 2, 2), studies.Latency(samples=10**6, seconds=0.2))
    assert sum(found["samples_ms"][:-1]) < 200 <= sum(found["samples_ms"])


def test_at_least_one_sample(fake):
    assert (
        len(latency.measure(fake, torch.zeros(1, 3, 2, 2), studies.Latency(samples=10, seconds=0.0))["samples_ms"]) == 1
    )


def test_statistics_of_known_samples():
    """1 to 1001 in some order: between ranks there is nothing to interpolate."""
    samples = [float((i * 10) % 1001 + 1) for i in range(1001)]
    assert latency.statistics(samples) == {
        "latency_mean_ms": 501.0, "latency_p50_ms": 501.0, "latency_p95_ms": 951.0, "latency_p99_ms": 991.0,
    }  # fmt: skip


def test_percentiles_lie_between_ranks():
    assert latency.statistics([1.0, 2.0, 12.0])["latency_mean_ms"] == 5.0
    assert latency.statistics([4.0, 1.0, 3.0, 2.0])["latency_p50_ms"] == 2.5
    assert latency.statistics([1.0, 2.0])["latency_p95_ms"] == pytest.approx(1.95)


def test_p99_is_blank_below_a_thousand_samples():
    assert latency.statistics([1.0] * 999)["latency_p99_ms"] is None
    assert latency.statistics([1.0] * 1000)["latency_p99_ms"] == 1.0
