"""The types that devices compute in, for hardware that this machine need not have."""

import pytest
import torch

from vitnb import devices, variants
from vitnb.errors import UserError
from vitnb.models import loader

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.fixture
def set_cpu_units(monkeypatch):
    """Return a function that says which 16-bit units the CPU has."""

    def set_units(avx512_bf16: bool, amx: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return set_units


@pytest.fixture
def set_gpu_capability(monkeypatch):
    """Return a function that says which compute capability the GPU has."""

    def set_capability(major: int, minor: int) -> None:
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device=None: (major, minor)
        )

    return set_capability


UNITS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("avx512_bf16", "amx"), UNITS)
def test_a_cpu_computes_in_16_bits_only_with_units_for_it(
    set_cpu_units, avx512_bf16, amx
):
    set_cpu_units(avx512_bf16, amx)
    has_units = avx512_bf16 or amx
    assert devices.has_half_units(CPU) == has_units
    wanted = torch.bfloat16 if has_units else torch.float32
    assert devices.compute_dtype(CPU) == wanted
    with devices.autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == wanted


@pytest.mark.parametrize(("avx512_bf16", "amx"), UNITS)
@pytest.mark.parametrize("weights", ["nf4", "int8", "w8a8", "fp8", "plan:any"])
def test_quantized_variants_follow_the_units_of_a_cpu(
    set_cpu_units, avx512_bf16, amx, weights
):
    set_cpu_units(avx512_bf16, amx)
    variant = variants.Variant(weights, "sdpa")
    wanted = torch.bfloat16 if avx512_bf16 or amx else torch.float32
    assert loader._compute_dtype(variant, CPU) == wanted


@pytest.mark.parametrize(("avx512_bf16", "amx"), UNITS)
def test_the_type_of_plain_variants_is_that_of_their_name(
    set_cpu_units, avx512_bf16, amx
):
    """bf16 is the control for computing in 16 bits, so it does on every CPU."""
    set_cpu_units(avx512_bf16, amx)
    bf16, fp32 = (variants.Variant(weights, "sdpa") for weights in ("bf16", "fp32"))
    assert loader._compute_dtype(bf16, CPU) == torch.bfloat16
    assert loader._compute_dtype(fp32, CPU) == torch.float32


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_a_gpu_below_sm80_has_float16_alone(
    set_cpu_units, set_gpu_capability, capability, wanted
):
    set_cpu_units(False, False)  # the CPU's units do not matter
    set_gpu_capability(*capability)
    assert devices.has_half_units(GPU)
    assert devices.half_dtype(GPU) == devices.compute_dtype(GPU) == wanted
    for weights in ("bf16", "nf4", "int8"):
        variant = variants.Variant(weights, "sdpa")
        assert loader._compute_dtype(variant, GPU) == wanted


@pytest.mark.parametrize("there", [True, False])
def test_the_gpu_is_chosen_where_there_is_one(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert devices.select_device().type == ("cuda" if there else "cpu")
    assert devices.select_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device must be cpu or cuda"):
        devices.select_device("tpu")
    if there:
        assert devices.select_device("cuda").type == "cuda"
    else:
        with pytest.raises(UserError, match="PyTorch sees no NVIDIA GPU"):
            devices.select_device("cuda")
