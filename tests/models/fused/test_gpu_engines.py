"""Engines and fused kernels on a GPU, against references and against each other."""

from importlib.util import find_spec

import bitsandbytes as bnb
import pytest
import torch

from vitnb import variants
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.models import loader, quantization
from vitnb.models.fused import linears as fused_linears
from vitnb.models.fused import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not find_spec("triton"), reason="needs Triton"),
]


@pytest.fixture
def kernels():
    from vitnb.models.fused import triton_kernels

    return triton_kernels


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shapes",
    [
        [(4096, 1024)],
        [(1024, 4096)],
        [(192, 192)],
        [(24, 64)],
        [(1024, 1024)] * 4 + [(4096, 1024)],
    ],
)
def test_nf4_is_unpacked_to_the_bit_as_bitsandbytes_does(kernels, shapes, dtype):
    options = {"bias": False, "device": "cuda", "dtype": dtype}
    linears = [torch.nn.Linear(columns, rows, **options) for rows, columns in shapes]
    small = [quantization.quantized_copy(linear, 4, dtype) for linear in linears]
    size = sum(linear.weight.numel() for linear in linears) + 64
    out = torch.full((size,), 9.0, device="cuda", dtype=dtype)
    (pack,) = fused_linears.pack_nf4(small, kernels.dequantize_nf4)
    pack.unpack(out)
    wanted = [
        bnb.functional.dequantize_4bit(one.weight.data, one.weight.quant_state).view(-1)
        for one in small
    ]
    assert torch.equal(out[:-64], torch.cat(wanted)) and (out[-64:] == 9).all()


def test_gelu_is_exact_for_every_16_bit_number(kernels):
    every = torch.arange(2**16, dtype=torch.int32, device="cuda")
    every = every.to(torch.int16).view(torch.bfloat16)
    every = every[torch.isfinite(every.float())]
    exact = every.double()
    wanted = (0.5 * exact * torch.special.erfc(-exact * 0.5**0.5)).to(torch.bfloat16)
    results = kernels.gelu(every.clone()[None])[0]
    # Adding 0 turns -0 into 0, so that bit patterns can be subtracted.
    bits, wanted_bits = (
        (values + 0.0).view(torch.int16).int() for values in (results, wanted)
    )
    steps = (bits - wanted_bits).abs()
    usual = every >= -9  # below, results are under 1e-17
    assert steps[usual].max() <= 1 and (steps[usual] > 0).sum() < 200
    assert results[~usual].float().abs().max() < 2e-18


@pytest.mark.parametrize("columns", [1024, 768, 192])
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("with_shift", [False, True])
def test_layer_norm_beside_float64(kernels, columns, with_delta, with_shift):
    stream, weight, bias = random(50, columns), random(columns), random(columns)
    delta = random(50, columns) if with_delta else None
    shift = torch.randn(columns, device="cuda") if with_shift else None
    summed = stream + delta if with_delta else stream.clone()
    exact = torch.nn.functional.layer_norm(
        summed.double() + (shift.double() if with_shift else 0),
        (columns,),
        weight.double(),
        bias.double(),
        1e-6,
    )
    result = kernels.layer_norm(stream, delta, shift, weight, bias, 1e-6)
    assert torch.equal(stream, summed)
    torch.testing.assert_close(result.double(), exact, atol=1e-2, rtol=2**-8)
    values, scale = kernels.layer_norm(
        summed.clone(), None, shift, weight, bias, 1e-6, fp8=True
    )
    torch.testing.assert_close(
        values.double() * scale, exact, atol=2 * scale.max().item(), rtol=2**-4
    )


@pytest.mark.parametrize("name", ["quantize_rows", "gelu"])
def test_float8_rows_beside_the_reference(kernels, name):
    sizes = torch.logspace(-3, 3, 37, device="cuda")[:, None].bfloat16()
    x = random(37, 4096) * sizes
    options = {"fp8": True} if name == "gelu" else {}
    values, scale = getattr(kernels, name)(x.clone(), **options)
    wanted, wanted_scale = getattr(reference, name)(x.clone(), **options)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-2, atol=0)
    torch.testing.assert_close(
        values.float() * scale,
        wanted.float() * wanted_scale,
        rtol=2**-3,
        atol=2 * wanted_scale.max().item(),
    )
    assert scale.shape == (37, 1) and values.float().abs().amax(1).min() > 440


def test_float8_of_rows_that_lie_apart(kernels):
    x = random(37, 3, 256)[:, 0]
    values, scale = kernels.quantize_rows(x)
    wanted, wanted_scale = kernels.quantize_rows(x.contiguous())
    assert torch.equal(values.float(), wanted.float())
    assert torch.equal(scale, wanted_scale)


def first_batch(mini, loaded, size):
    return dataset.first_batch(load_split(mini, "test"), loaded.processor, size)


def logits_of(mini, names, size):
    """Logits by name of a variant; each is computed twice and must be repeatable."""
    logits = {}
    for name in names:
        loaded = loader.load_variant(mini, variants.parse(name))
        pixels = first_batch(mini, loaded, size)
        with loaded.inference() as model:
            first, second = (
                model(pixel_values=loaded.prepare(pixels)).logits.float()
                for _ in range(2)
            )
        assert torch.equal(first, second)
        assert loaded.engine.ran(pixels.shape) == (loaded.variant.engine, "")
        logits[name] = first
    return logits


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4", "fp8", "w8a8"])
def test_engines_give_the_same_logits(mini, weights):
    engines = ["", "-graph"]
    if weights in ("fp32", "bf16", "nf4"):
        engines.append("-fused")
    names = [f"{weights}-sdpa{engine}" for engine in engines]
    wanted, *others = logits_of(mini, names, 16).values()
    for other in others:
        assert (other - wanted).abs().max() < 1e-2
        assert torch.equal(other.argmax(-1), wanted.argmax(-1))


def test_float8_differs_between_engines_by_less_than_from_16_bits(mini):
    """Where 16 bits round otherwise, 1 in 32 numbers falls to the next float8.

    That is sqrt(12 / 32) of float8's own error.
    """
    names = ["bf16-sdpa", "fp8-sdpa", "fp8-sdpa-fused"]
    plain, eager, fused = logits_of(mini, names, 16).values()
    assert (fused - eager).square().mean() < (eager - plain).square().mean()


def test_compiled_gives_the_same_logits(mini):
    names = ["bf16-sdpa", "bf16-sdpa-compile"]
    eager, compiled = logits_of(mini, names, 4).values()
    assert (compiled - eager).abs().max() < 1e-2


@pytest.mark.parametrize("weights", ["nf4", "int8", "fp8"])
def test_whatever_a_compiled_model_is_called_it_gives_the_logits(mini, weights):
    """Every forward of every batch size, and a name for each that has its reason."""
    plain = loader.load_variant(mini, variants.parse(f"{weights}-sdpa"))
    loaded = loader.load_variant(mini, variants.parse(f"{weights}-sdpa-compile"))
    for size in (4, 1, 4, 1, 4):
        pixels = loaded.prepare(first_batch(mini, loaded, size))
        with plain.inference() as model:
            wanted = model(pixel_values=pixels).logits.float()
        with loaded.inference() as model:
            logits = model(pixel_values=pixels).logits.float()
        assert (logits - wanted).abs().max() < 0.05
    ran = loaded.as_record()["engine_ran"]
    print(weights, loaded.engine.as_record())
    assert set(ran) == {"1", "4"}
    named = {size for size, name in ran.items() if name == "compile"}
    assert named | set(loaded.as_record()["engine_reason"]) == {"1", "4"}
    assert weights == "int8" or named == {"1", "4"}


def test_outliers_cannot_be_captured_and_that_is_said(mini):
    loaded = loader.load_variant(mini, variants.parse("int8-sdpa-graph"))
    pixels = loaded.prepare(first_batch(mini, loaded, 4))
    with loaded.inference() as model:
        logits = model(pixel_values=pixels).logits
    ran, reason = loaded.engine.ran(pixels.shape)
    assert ran == "eager" and "CUDA graph" in reason
    assert not loaded.engine.replays(pixels.shape)
    plain = loader.load_variant(mini, variants.parse("int8-sdpa"))
    with plain.inference() as model:
        torch.testing.assert_close(logits, model(pixel_values=pixels).logits)


def test_graphs_of_several_sizes_and_models_live_side_by_side(mini):
    """Replays in any order give eager's logits, and no result is overwritten."""
    names = ("bf16-sdpa", "bf16-sdpa-fused", "nf4-sdpa-fused", "nf4-sdpa")
    several = [loader.load_variant(mini, variants.parse(name)) for name in names]
    batches = [
        several[0].prepare(first_batch(mini, several[0], size)) for size in (1, 3, 8)
    ]
    logits = {}
    for _ in range(3):
        for i, loaded in enumerate(several):
            for j, pixels in enumerate(batches):
                with loaded.inference() as model:
                    result = model(pixel_values=pixels).logits.float()
                logits.setdefault((i, j), []).append(result)
    for (i, j), results in logits.items():
        assert all(torch.equal(results[0], other) for other in results)
        eager = logits[0 if i < 2 else 3, j][0]
        assert (results[0] - eager).abs().max() < 1e-2
