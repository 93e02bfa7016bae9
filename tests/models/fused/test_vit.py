"""The fused forward against transformers', its operations against bitsandbytes.

What only a GPU can show stands in ``test_gpu_engines.py``.
"""

import copy

import bitsandbytes as bnb
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from vitnb.errors import VariantError
from vitnb.models import layers, quantization
from vitnb.models.fused import linears, reference
from vitnb.models.fused.vit import TECHNIQUES, FusedViT


def make_vit(hidden=128, **options):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=4 * hidden,
        image_size=48,
        num_labels=7,
        **options,
    )
    model = ViTForImageClassification(config).eval()
    for parameter in model.parameters():  # biases and norms that do something
        mean = float("norm" in str(parameter.shape))
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    return model


def to_nf4(model):
    for name, linear in layers.quantizable(model).items():
        copy_4_bit = quantization.quantized_copy(linear, 4, torch.bfloat16)
        model.set_submodule(name, copy_4_bit)
    return model


PIXELS = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("without", [[], *[[t] for t in TECHNIQUES], TECHNIQUES])
@torch.inference_mode()
def test_every_arrangement_gives_the_logits_of_transformers(without):
    model = make_vit()
    wanted = model(pixel_values=PIXELS).logits
    techniques = frozenset(TECHNIQUES) - {*without}
    fused = FusedViT(copy.deepcopy(model), "sdpa", torch.float32, techniques)
    logits = fused(pixel_values=PIXELS).logits
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=2e-5)


# With 192, weights end inside a group of scales and are unpacked one by one.
@pytest.mark.parametrize("hidden", [128, 192])
@torch.inference_mode()
def test_nf4_gives_what_bitsandbytes_gives(hidden):
    model = to_nf4(make_vit(hidden).bfloat16())
    exact = copy.deepcopy(model).float()
    for name, linear in layers.linears(model).items():
        if isinstance(linear, bnb.nn.Linear4bit):
            plain = torch.nn.Linear(linear.in_features, linear.out_features)
            plain.weight.data = bnb.functional.dequantize_4bit(
                linear.weight.data.clone(), linear.weight.quant_state
            ).float()
            plain.bias.data = linear.bias.data.float()
            exact.set_submodule(name, plain)
    wanted = exact(pixel_values=PIXELS).logits
    fused = FusedViT(model, "sdpa", torch.bfloat16)
    assert len(fused.blocks[0].packs[0]) == (1 if hidden == 128 else 5)
    logits = fused(pixel_values=PIXELS.bfloat16()).logits.float()
    # bfloat16 through three blocks
    assert (logits - wanted).abs().max() < 0.02 * wanted.abs().max()


@torch.inference_mode()
def test_fp8_gives_what_its_linears_give():
    model = quantization.to_fp8(make_vit().bfloat16(), reference.quantize_rows)
    assert quantization.count_linears(model) == (18, 1)
    pixels = PIXELS.bfloat16()
    wanted = copy.deepcopy(model)(pixel_values=pixels).logits.float()
    logits = FusedViT(model, "sdpa", torch.bfloat16)(pixel_values=pixels).logits
    assert (logits.float() - wanted).abs().max() < 0.03 * wanted.abs().max()


@torch.inference_mode()
def test_an_fp8_linear_is_near_the_linear_and_keeps_rows_apart():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32).bfloat16()
    sizes = torch.logspace(-3, 3, 6)[:, None].bfloat16()
    x = torch.randn(6, 64).bfloat16() * sizes
    wanted = linear(x).float()
    float8 = quantization.Float8Linear(linear, reference.quantize_rows)
    error = (float8(x).float() - wanted).norm(dim=1)
    without_bias = (wanted - linear.bias.float()).norm(dim=1)
    # e4m3 rounds by 1/16 at most, evenly spread by 1/16/sqrt(3). For two factors that
    # is 5% of a row on average.
    assert (error < 0.08 * without_bias + 0.01 * linear.bias.norm()).all()


def test_a_fused_fp8_product_has_the_type_that_the_model_computes_in():
    for dtype in (torch.float32, torch.bfloat16):
        model = quantization.to_fp8(make_vit().to(dtype), reference.quantize_rows)
        product = FusedViT(model, "sdpa", dtype).blocks[0].fc1
        rows = reference.quantize_rows(torch.randn(2, 128).to(dtype))
        assert product(rows).dtype == dtype


@pytest.mark.parametrize("shape", [(128, 128), (64, 576)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantized_to_the_bit_as_bitsandbytes_does(shape, dtype):
    linear = torch.nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    small = quantization.quantized_copy(linear, 4, dtype)
    out = torch.full((linear.weight.numel(),), 9.0, dtype=dtype)
    (pack,) = linears.pack_nf4([small], reference.dequantize_nf4)
    pack.unpack(out)
    wanted = bnb.functional.dequantize_4bit(small.weight.data, small.weight.quant_state)
    assert torch.equal(out.view(shape), wanted)


def test_the_scratch_is_shared_and_small_and_the_weights_are_packed():
    fused = FusedViT(to_nf4(make_vit().bfloat16()), "sdpa", torch.bfloat16)
    assert fused.scratch_bytes == 8 * 128 * 128 * 2
    linear_weights = 3 * 12 * 128 * 128
    packed_bytes = sum(
        buffer.numel() * buffer.element_size()
        for name, buffer in fused.named_buffers()
        if "packs" in name
    )
    assert 0.5 * linear_weights < packed_bytes < 0.6 * linear_weights
    # half of the bytes in 16 bits
    assert quantization.resident_bytes(fused) < linear_weights


def test_only_what_it_knows():
    with pytest.raises(VariantError, match="exact GELU alone, not relu"):
        FusedViT(make_vit(hidden_act="relu"), "sdpa", torch.float32)
    with pytest.raises(VariantError, match="knows ViT, and this is Linear"):
        FusedViT(torch.nn.Linear(2, 2), "sdpa", torch.float32)
    model = make_vit()
    mlp = model.vit.layers[0].mlp
    mlp.fc1 = quantization.quantized_copy(mlp.fc1, 8, torch.bfloat16)
    with pytest.raises(VariantError, match="no int8 of bitsandbytes"):
        FusedViT(model, "sdpa", torch.bfloat16)
