"""Quantization against bitsandbytes' own functions and closed forms."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from vitnb.errors import UserError, VariantError
from vitnb.models import layers, nf4, quantization


@pytest.fixture
def vit() -> nn.Module:
    """Twelve layers, so that names like layers.1 and layers.10 are both there."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=12,
        num_attention_heads=1,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=7,
    )
    return ViTForImageClassification(config).eval()


def quantized(vit: nn.Module, kept: list[str]) -> nn.Module:
    for name, module in layers.linears(vit).items():
        if name not in kept:
            vit.set_submodule(
                name, quantization.quantized_copy(module, 4, torch.bfloat16)
            )
    return vit


def test_a_4_bit_copy_is_bitsandbytes_nf4_with_double_quantization():
    torch.manual_seed(1)
    linear = nn.Linear(128, 192).to(torch.bfloat16)
    codes, state = functional.quantize_4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=True
    )
    oracle = functional.dequantize_4bit(codes, state)
    copy = quantization.quantized_copy(linear, 4, torch.bfloat16)
    nf4.disable_cpu_packing(copy)  # ``test_nf4.py`` tests packed weights
    result = functional.dequantize_4bit(copy.weight.data, copy.weight.quant_state)
    assert torch.equal(result, oracle) and copy.weight.quant_state.nested
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(copy(x), nn.functional.linear(x, oracle, linear.bias))
    # NF4's widest gap is 0.3035 of a block's largest value. No weight may be further
    # off than half of it, plus the error of the second quantization, which is that of
    # those largest values.
    blocks = linear.weight.data.float().view(-1, 64)
    error = (result.float().view(-1, 64) - blocks).abs() / blocks.abs().amax(
        1, keepdim=True
    )
    assert 0.05 < error.max() < 0.152 + 0.03


def test_an_8_bit_copy_rounds_rows_to_int8():
    torch.manual_seed(2)
    linear = nn.Linear(64, 48)
    copy = quantization.quantized_copy(linear.to(torch.float16), 8, torch.bfloat16)
    scale = linear.weight.data.float().abs().amax(1)
    oracle = (linear.weight.data.float() / scale[:, None] * 127).round()
    assert (copy.weight.data.float() - oracle).abs().max() <= 1  # ties round either way
    assert ((copy.weight.data.float() - oracle) != 0).float().mean() < 0.01
    x = torch.randn(33, 64, dtype=torch.float16)
    with torch.inference_mode():
        out, plain = copy(x).float(), linear(x).float()
    # Both operands are rounded to 1/254 of their row's largest value.
    bound = 64 * (x.float().abs().amax(1)[:, None] * scale[None] / 254) * 2
    assert (out - plain).abs().max() > 0 and ((out - plain).abs() < bound / 4).all()


def test_keep_takes_whole_names_only(vit):
    kept = quantization.modules_to_skip(vit, ["vit.layers.1"])
    assert len(kept) == 7 and "classifier" in kept
    assert all(
        name == "classifier" or name.startswith("vit.layers.1.") for name in kept
    )
    assert quantization.modules_to_skip(vit) == ["classifier"]
    assert (
        len(quantization.modules_to_skip(vit, ["vit.layers.0", "vit.layers.11"])) == 13
    )
    assert quantization.modules_to_skip(vit, ["vit.layers.0.mlp.fc1"]) == [
        "classifier",
        "vit.layers.0.mlp.fc1",
    ]


@pytest.mark.parametrize(
    "prefix",
    ["encoder.layer.21", "vit.layers.12", "vit.layers.1.attention.q", "classifier", ""],
)
def test_keeping_what_is_not_there_is_an_error(vit, prefix):
    with pytest.raises(UserError, match="changes nothing"):
        quantization.modules_to_skip(vit, [prefix])


def test_counts_are_read_from_the_model(vit):
    assert quantization.count_linears(vit) == (0, 73)
    assert quantization.check_counts(vit, quantized=False) == (0, 73)
    assert quantization.check_counts(
        quantized(vit, ["classifier"]), quantized=True
    ) == (72, 1)


@pytest.mark.parametrize(
    "kept", [[], ["classifier", "vit.layers.3.mlp.fc1"], ["vit.layers.3.mlp.fc1"]]
)
def test_a_quantized_head_or_a_plain_linear_is_an_error(vit, kept):
    with pytest.raises(VariantError, match="Linears are quantized"):
        quantization.check_counts(quantized(vit, kept), quantized=True)


def test_an_unquantized_model_cannot_pass_as_quantized(vit):
    with pytest.raises(VariantError):
        quantization.check_counts(vit, quantized=True)


def test_resident_bytes_of_a_plain_model_count_shared_storage_once(vit):
    parameters = sum(p.numel() for p in vit.parameters())
    assert quantization.resident_bytes(vit) == 4 * parameters
    vit.classifier.extra = vit.classifier.weight  # the same storage under a second name
    vit.register_buffer("again", vit.classifier.weight.data)
    assert quantization.resident_bytes(vit) == 4 * parameters
    vit.register_buffer("table", torch.zeros(10))
    assert quantization.resident_bytes(vit) == 4 * parameters + 40


def test_resident_bytes_of_nf4_count_its_state():
    linear = nn.Linear(128, 192, bias=False).to(torch.bfloat16)
    holder = nn.ModuleList([quantization.quantized_copy(linear, 4, torch.bfloat16)])
    weights = 128 * 192
    blocks = weights // 64
    codes, absmax = (
        weights // 2,
        blocks,
    )  # one byte a block after the second quantization
    second = -(-blocks // 256) * 4  # its own float32 maxima
    tables, offset = (16 + 256) * 4, 4
    assert (
        quantization.resident_bytes(holder) == codes + absmax + second + tables + offset
    )


def test_resident_bytes_of_int8():
    linear = nn.Linear(128, 192, bias=False).to(torch.float16)
    holder = nn.ModuleList([quantization.quantized_copy(linear, 8, torch.float16)])
    assert quantization.resident_bytes(holder) == 128 * 192 + 192 * 4


def test_a_model_that_may_not_be_packed_is_not(vit):
    """Packing on CPUs with AVX512-BF16 rewrites the weights on the first forward."""
    model = quantized(vit, ["classifier"]).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = (
                True  # as bitsandbytes sets it on such a machine
            )
    nf4.disable_cpu_packing(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert not module.support_avx512bf16_for_cpu
    with torch.inference_mode():
        model(pixel_values=torch.randn(2, 3, 16, 16, dtype=torch.bfloat16))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_loader_is_told_what_the_variant_means():
    small = quantization.bnb_config(
        "nf4", ["classifier", "vit.layers.3.mlp.fc1"], torch.float16
    )
    assert (
        small.load_in_4bit
        and small.bnb_4bit_quant_type == "nf4"
        and small.bnb_4bit_use_double_quant
    )
    assert (
        small.bnb_4bit_compute_dtype == torch.float16
        and small.bnb_4bit_quant_storage == torch.uint8
    )
    int8 = quantization.bnb_config("int8", ["classifier"])
    assert int8.load_in_8bit and int8.llm_int8_threshold == 6.0, (
        "LLM.int8 as the source study ran it"
    )
    assert small.llm_int8_skip_modules == [
        "classifier",
        "vit.layers.3.mlp.fc1",
    ] and int8.llm_int8_skip_modules == ["classifier"]
    copy = quantization.quantized_copy(
        nn.Linear(64, 64).to(torch.float16), 8, torch.float16
    )
    assert copy.state.threshold == 6.0 and not copy.training


def test_a_last_linear_that_is_no_head(vit):
    vit.config.num_labels = 5
    with pytest.raises(UserError, match="no classification head"):
        quantization.modules_to_skip(vit)
