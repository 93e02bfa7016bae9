"""Ceilings: every kind that the hardware has, several samples, once a study."""

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitnb import devices
from vitnb.measure import ceilings
from vitnb.records.reader import load_records

CPU = torch.device("cpu")
GPU = torch.device("cuda")
INFO = Path("/proc/cpuinfo")
FLAGS = INFO.read_text() if INFO.exists() else ""
NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU"
)


@pytest.fixture
def no_clock(monkeypatch) -> list[str]:
    """Make every run take a thousandth of a second; gives what was timed, in order."""
    timed = []

    def best_seconds(run, device):
        argument = run.args[0]
        timed.append(f"{str(argument.dtype).removeprefix('torch.')} {len(argument)}")
        return 1e-3

    monkeypatch.setattr(ceilings, "best_seconds", best_seconds)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 64)
    monkeypatch.setitem(ceilings.SHAPES, "cpu", [(32, 32, 32), (64, 32, 16)])
    return timed


@pytest.fixture
def every_kind(monkeypatch):
    """A CPU with units for 16 bits and int8."""
    monkeypatch.setattr(devices, "has_half_units", lambda device: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def test_a_product_timed_by_hand_is_no_faster_by_much():
    """One product is at most twice as fast as the ceiling."""
    begin = time.perf_counter()
    found = ceilings.measure_ceilings(CPU)
    took = time.perf_counter() - begin
    a = torch.randn(1536, 1536)
    begin = time.perf_counter()
    a @ a
    by_hand = 2 * 1536**3 / (time.perf_counter() - begin) / 1e12
    samples = [x for values in found["products"]["float32"].values() for x in values]
    assert by_hand < 2 * max(samples)
    assert all(0.1 < sample < 10_000 for sample in found["copy_gbs"])
    assert took < 30  # 2 seconds on 2 slow cores; never minutes


def test_a_kind_without_hardware_has_a_reason_and_no_samples():
    """By the flags that the system reads from the processor."""
    found = ceilings.measure_ceilings(CPU)
    has = {
        "float32": True,
        "bfloat16": "avx512_bf16" in FLAGS or "amx_tile" in FLAGS,
        "int8": "avx512f" in FLAGS,
        "float8": False,
    }
    assert {kind: kind in found["products"] for kind in has} == has
    assert {kind: kind not in found["missing"] for kind in has} == has
    assert all(found["missing"].values())


def test_an_emulated_product_is_not_even_tried(no_clock, every_kind, monkeypatch):
    """On the embedded study's smallest machines one takes seconds."""
    monkeypatch.setattr(devices, "has_half_units", lambda device: False)
    found = ceilings.measure_ceilings(CPU)
    assert not [timed for timed in no_clock if timed.startswith("bfloat16")]
    assert "16-bit units" in found["missing"]["bfloat16"]
    assert set(found["products"]) == {"float32", "int8"}


def test_every_kind_has_its_own_product(no_clock, every_kind):
    """2 x 32 x 32 x 32 operations in a thousandth of a second, in each of three turns.

    The turns are spread: no kind is measured all at once.
    """
    found = ceilings.measure_ceilings(CPU)
    one_turn = [
        *("float32 32", "float32 64", "bfloat16 32", "bfloat16 64"),
        *("int8 32", "int8 64", "uint8 64"),
    ]
    assert no_clock == 3 * one_turn
    expected = {"32 x 32 x 32": 3 * [65.536e-6], "64 x 32 x 16": 3 * [65.536e-6]}
    for kind in ("float32", "bfloat16", "int8"):
        assert found["products"][kind] == {
            shape: pytest.approx(values) for shape, values in expected.items()
        }
    assert found["copy_gbs"] == pytest.approx(3 * [128e-6])


def test_a_slow_machine_leaves_out_products_that_take_long(every_kind, monkeypatch):
    """At a hundred million operations a second the second shape takes minutes."""
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 64)
    shapes = [(32, 32, 32), (4096, 4096, 64)]
    monkeypatch.setitem(ceilings.SHAPES, "cpu", shapes)
    monkeypatch.setattr(ceilings, "best_seconds", lambda run, device: 65536 / 1e8)
    found = ceilings.measure_ceilings(CPU)
    assert set(found["products"]) == {"float32", "bfloat16", "int8"}
    assert all(list(by) == ["32 x 32 x 32"] for by in found["products"].values())


def test_a_product_that_does_not_run_has_a_reason(no_clock, every_kind, monkeypatch):
    def fail(*_):
        raise RuntimeError("not implemented for 'Char'\nsecond line")

    monkeypatch.setattr(torch, "_int_mm", fail)
    monkeypatch.setattr(ceilings, "best_seconds", lambda run, _: len(run()) and 1e-3)
    found = ceilings.measure_ceilings(CPU)
    assert found["missing"]["int8"].startswith("no int8 product here: not implemented")
    assert set(found["products"]) == {"float32", "bfloat16"}


def test_the_best_of_repeated_runs_counts(monkeypatch):
    """On a clock of our own: runs take 3 s, 1 s, 2 s, and 2 s from then on."""
    now, durations = [0.0], iter([3.0, 1.0, 2.0])

    def run():
        now[0] += next(durations, 2.0)

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(ceilings, "time", clock)
    assert ceilings.best_seconds(run, CPU, limit=7.0) == 1.0


def test_generators_of_a_study_are_left_alone(no_clock, every_kind):
    """Whether ceilings are measured or read must not change what follows."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    ceilings.measure_ceilings(CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_ceilings_are_measured_once_a_study(mini, no_clock, monkeypatch):
    for path in (mini.outputs / "records").glob("ceilings-*.json"):
        path.unlink()
    first = ceilings.load_or_measure(mini, CPU)
    (path,) = (mini.outputs / "records").glob("ceilings-*.json")
    assert json.loads(path.read_text())["ceilings"] == first["ceilings"]
    assert first["name"] == path.stem and first["notebook"] == "ceilings"
    assert first["name"] in [record["name"] for record in load_records(mini)]
    timed = len(no_clock)
    assert ceilings.load_or_measure(mini, CPU)["ceilings"] == first["ceilings"]
    assert len(no_clock) == timed
    # Another number of threads is another machine.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        other = ceilings.load_or_measure(mini, CPU)
    finally:
        torch.set_num_threads(threads)
    assert other["name"] != first["name"] and len(no_clock) == 2 * timed
    for path in (mini.outputs / "records").glob("ceilings-*.json"):
        path.unlink()


@NEEDS_GPU
def test_ceilings_of_a_gpu():
    """8-bit products are faster than 16-bit ones, and these faster than float32."""
    begin = time.perf_counter()
    found = ceilings.measure_ceilings(GPU)
    took = time.perf_counter() - begin
    best = {
        kind: max(max(values) for values in by_shape.values())
        for kind, by_shape in found["products"].items()
    }
    half = str(devices.half_dtype(GPU)).removeprefix("torch.")
    assert best["float32"] < best[half]
    if torch.cuda.get_device_capability() >= (8, 9):
        assert best[half] < best["float8"] and best[half] < best["int8"]
    assert took < 20
