"""Engines and fused kernels on a GPU: beside their references, beside each other, and with no result overwritten."""

from importlib.util import find_spec

import bitsandbytes as bnb
import pytest
import torch

from vitnb import variants
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.models import loader, quantization
from vitnb.models.fused import reference
from vitnb.models.fused.linears import pack as pack_linears

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
    "shapes", [[(4096, 1024)], [(1024, 4096)], [(192, 192)], [(24, 64)], [(1024, 1024)] * 4 + [(4096, 1024)]]
)
def test_nf4_is_unpacked_to_the_bit_as_bitsandbytes_does(kernels, shapes, dtype):
    linears = [torch.nn.Linear(columns, rows, bias=False, device="cuda", dtype=dtype) for rows, columns in shapes]
    packed = [quantization.quantized_copy(linear, 4, dtype) for linear in linears]
    out = torch.full((sum(linear.weight.numel() for linear in linears) + 64,), 9.0, device="cuda", dtype=dtype)
    (pack,) = pack_linears(packed)
    pack.unpack(kernels, out)
    wanted = [bnb.functional.dequantize_4bit(one.weight.data, one.weight.quant_state).view(-1) for one in packed]
    assert torch.equal(out[:-64], torch.cat(wanted)) and (out[-64:] == 9).all()


def test_gelu_is_exact_for_every_16_bit_number(kernels):
    every = torch.arange(2**16, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.bfloat16)
    every = every[torch.isfinite(every.float())]
    wanted = (0.5 * every.double() * torch.special.erfc(-every.double() * 0.5**0.5)).to(torch.bfloat16)
    found = kernels.gelu(every.clone()[None])[0]
    steps = ((found + 0.0).view(torch.int16).int() - (wanted + 0.0).view(torch.int16).int()).abs()
    usual = every >= -9  # below, results are under 1e-17
    assert steps[usual].max() <= 1 and (steps[usual] > 0).sum() < 200
    assert found[~usual].float().abs().max() < 2e-18


@pytest.mark.parametrize("columns", [1024, 768, 192])
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("with_shift", [False, True])
def test_layer_norm_beside_float64(kernels, columns, with_delta, with_shift):
    stream, weight, bias = random(50, columns), random(columns), random(columns)
    delta = random(50, columns) if with_delta else None
    shift = torch.randn(columns, device="cuda") if with_shift else None
    summed = stream + delta if with_delta else stream.clone()
    exact = torch.nn.functional.layer_norm(
        summed.double() + (shift.double() if with_shift else 0), (columns,), weight.double(), bias.double(), 1e-6
    )
    found = kernels.layer_norm(stream, delta, shift, weight, bias, 1e-6)
    assert torch.equal(stream, summed)
    torch.testing.assert_close(found.double(), exact, atol=1e-2, rtol=2**-8)
    values, scale = kernels.layer_norm(summed.clone(), None, shift, weight, bias, 1e-6, fp8=True)
    torch.testing.assert_close(values.double() * scale, exact, atol=2 * scale.max().item(), rtol=2**-4)


@pytest.mark.parametrize("name", ["quantize_rows", "gelu"])
def test_float8_rows_beside_the_reference(kernels, name):
    x = random(37, 4096) * torch.logspace(-3, 3, 37, device="cuda")[:, None].bfloat16()
    options = {"fp8": True} if name == "gelu" else {}
    (found, scale), (wanted, known) = (getattr(module, name)(x.clone(), **options) for module in (kernels, reference))
    torch.testing.assert_close(scale, known, rtol=1e-2, atol=0)
    torch.testing.assert_close(found.float() * scale, wanted.float() * known, rtol=2**-3, atol=2 * known.max().item())
    assert scale.shape == (37, 1) and found.float().abs().amax(1).min() > 440


def test_float8_of_rows_that_lie_apart(kernels):
    x = random(37, 3, 256)[:, 0]
    (found, scale), (wanted, known) = kernels.quantize_rows(x), kernels.quantize_rows(x.contiguous())
    assert torch.equal(found.float(), wanted.float()) and torch.equal(scale, known)


def answers(mini, names, size):
    pixels, found = None, {}
    for name in names:
        loaded = loader.load_variant(mini, variants.parse(name))
        pixels = dataset.first_batch(load_split(mini, "test"), loaded.processor, size)
        with loaded.inference() as model:
            found[name] = model(pixel_values=loaded.prepare(pixels)).logits.float()
            assert torch.equal(found[name], model(pixel_values=loaded.prepare(pixels)).logits.float())
        assert loaded.engine.ran == loaded.variant.engine, loaded.engine.reason
    return found


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4", "fp8", "w8a8"])
def test_engines_give_the_same_logits(mini, weights):
    engines = ("", "-graph", "-fused") if weights in ("fp32", "bf16", "nf4") else ("", "-graph")
    wanted, *others = answers(mini, [f"{weights}-sdpa{engine}" for engine in engines], 16).values()
    for found in others:
        assert (found - wanted).abs().max() < 1e-2
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_float8_differs_between_engines_by_less_than_from_16_bits(mini):
    """Where 16 bits are rounded otherwise, 1 in 32 numbers falls to the next float8: sqrt(12 / 32) of what float8 itself costs."""
    plain, wanted, found = answers(mini, ["bf16-sdpa", "fp8-sdpa", "fp8-sdpa-fused"], 16).values()
    assert (found - wanted).square().mean() < (wanted - plain).square().mean()


def test_compiled_gives_the_same_logits(mini):
    wanted, found = answers(mini, ["bf16-sdpa", "bf16-sdpa-compile"], 4).values()
    assert (found - wanted).abs().max() < 1e-2


def test_outliers_cannot_be_captured_and_that_is_said(mini):
    loaded = loader.load_variant(mini, variants.parse("int8-sdpa-graph"))
    pixels = loaded.prepare(dataset.first_batch(load_split(mini, "test"), loaded.processor, 4))
    with loaded.inference() as model:
        found = model(pixel_values=pixels).logits
    assert loaded.engine.ran == "eager" and "CUDA graph" in loaded.engine.reason
    plain = loader.load_variant(mini, variants.parse("int8-sdpa"))
    with plain.inference() as model:
        torch.testing.assert_close(found, model(pixel_values=pixels).logits)


def test_graphs_of_several_sizes_and_models_live_side_by_side(mini):
    """Replays in any order give what eager gives, and no result is overwritten by the next."""
    several = [
        loader.load_variant(mini, variants.parse(name)) for name in ("bf16-sdpa", "bf16-sdpa-fused", "nf4-sdpa-fused", "nf4-sdpa")
    ]
    batches = [
        several[0].prepare(dataset.first_batch(load_split(mini, "test"), several[0].processor, n)) for n in (1, 3, 8)
    ]
    found = {}
    for _ in range(3):
        for i, loaded in enumerate(several):
            for j, pixels in enumerate(batches):
                with loaded.inference() as model:
                    found[i, j] = [*found.get((i, j), []), model(pixel_values=pixels).logits.float()]
    for (i, j), results in found.items():
        assert all(torch.equal(results[0], other) for other in results)
        eager = found[0 if i < 2 else 3, j][0]
        assert (results[0] - eager).abs().max() < 1e-2
