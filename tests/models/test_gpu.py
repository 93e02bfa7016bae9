"""What only a GPU can show; skipped without one."""

from importlib.util import find_spec

import pytest
import torch
from benchmarks.instrument_gpu import untrained

from vitnb import devices, variants
from vitnb.analysis import performance
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.measure import accuracy, latency, profiler
from vitnb.models import attention, loader
from vitnb.records import machine
from vitnb.study import Latency, Study

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FA2 = "flash-attn" if find_spec("flash_attn") else "flash"


@pytest.mark.parametrize("backend", attention.ALLOWED)
def test_attention_is_the_formula_in_16_bits(backend):
    if backend == "flash-attn" and FA2 != "flash-attn":
        pytest.skip("flash-attn is not installed")
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, 197, 64, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    function = attention.FUNCTIONS[attention.implementation(backend)]
    with attention.force_backend(backend):
        result = function(None, query, key, value, attention_mask=None, scaling=0.125)[
            0
        ].double()
    weights = (query.double() @ key.double().transpose(-1, -2) * 0.125).softmax(-1)
    oracle = (weights @ value.double()).transpose(1, 2)
    assert ((result - oracle).norm() / oracle.norm()).item() < 1e-2


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("fp32-math", "math"),
        ("nf4-fa2", FA2),
        ("int8-fa2", FA2),
        ("bf16-eager", "eager"),
        ("bf16-mem-efficient", "mem-efficient"),
        ("bf16-flash", "flash"),
        ("bf16-cudnn", "cudnn"),
        # A replayed graph is known by the names of its CUDA kernels alone.
        ("bf16-math-graph", "math"),
        ("bf16-mem-efficient-graph", "mem-efficient"),
        ("bf16-flash-graph", "flash"),
        ("bf16-cudnn-graph", "cudnn"),
        ("nf4-fa2-graph", FA2),
        ("nf4-cudnn-fused", "cudnn"),
        ("fp8-fa2-fused", FA2),
    ],
)
def test_a_variant_runs_the_kernel_of_its_name(mini, name, kernel):
    loaded = loader.load_variant(mini, variants.parse(name))
    batch = dataset.first_batch(load_split(mini, "test"), loaded.processor, 4)
    profile = profiler.profile_forward(loaded, batch)
    assert profile["attention_ran"] == kernel
    if name == "bf16-math-graph":
        assert profile["attention_ms"] is None
    else:
        assert 0 < profile["attention_ms"] < profile["total_ms"]


def test_a_gpu_answers_like_a_cpu(mini):
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa"))
    valid = load_split(mini, "valid")
    on_gpu = accuracy.compute_logits(loaded, valid)
    loaded.model.cpu()
    loaded.device = torch.device("cpu")
    on_cpu = accuracy.compute_logits(loaded, valid)
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-4)


def test_a_forward_is_timed_until_the_device_is_done(mini):
    """A device that spins for about 20 ms must show in every sample.

    The CPU only hands this work over.
    """
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa"))
    device = torch.cuda.get_device_properties(0)
    clock = getattr(device, "clock_rate", 1.5e6) * 1e3  # kHz to Hz
    loaded.model.register_forward_hook(lambda *_: torch.cuda._sleep(int(0.02 * clock)))
    pixels = dataset.first_batch(load_split(mini, "test"), loaded.processor, 2)
    result = latency.measure_latency(loaded, pixels, Latency(samples=5, seconds=5.0))
    assert min(result["host_ms"] + result["device_ms"] + result["cold_ms"]) > 8
    assert result["images_per_second"] < 2 / 0.008


@pytest.fixture(scope="module")
def large(tmp_path_factory, outputs) -> Study:
    """A ViT-L/16 with random weights.

    A forward is long beside the moments between the events and the first and the last
    kernel.
    """
    return untrained(tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize(
    "name",
    [
        "fp32-math",
        "nf4-fa2",
        "int8-sdpa",
        "bf16-sdpa-graph",
        "nf4-sdpa-fused",
        "fp8-sdpa-fused",
    ],
)
def test_kernels_and_gaps_are_the_latency_and_none_is_unknown(large, name):
    loaded = loader.load_variant(large, variants.parse(name))
    result = profiler.profile_forward(
        loaded, dataset.first_batch(load_split(large, "test"), loaded.processor, 64)
    )
    assert result["latency_ms"] >= 10, (
        "those moments, some 50 microseconds, could be the 3%"
    )
    assert (result["busy_ms"] + result["idle_ms"]) / result[
        "latency_ms"
    ] == pytest.approx(1, abs=0.03)
    assert performance.time_by_class(result)["other"] < 0.01 * result["total_ms"]
    assert result["total_ms"] == pytest.approx(
        result["busy_ms"], rel=0.02
    )  # one stream: nothing overlaps


def test_the_driver_says_what_the_card_does():
    result, about = machine.machine_state(), machine.describe_machine()
    assert (
        result["gpu_mhz"] > 0
        and result["gpu_celsius"] > 0
        and isinstance(result["gpu_throttled"], list)
    )
    assert about["gpu_uuid"].startswith("GPU-") and about["driver"]


def test_a_cpu_can_be_asked_for_beside_a_gpu(mini):
    loaded = loader.load_variant(
        mini, variants.parse("nf4-fa2"), on=devices.select_device("cpu")
    )
    result = latency.time_batch_sizes(
        loaded, load_split(mini, "test"), [1], Latency(samples=4, seconds=1.0)
    )[0]
    assert result["device_ms"] is None and loaded.as_record()["device"] == "cpu"
