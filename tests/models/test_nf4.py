"""Packed NF4 weights against bitsandbytes' own packing and a closed form.

``fused/test_vit.py`` tests the dequantization.
"""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from conftest import unpack
from torch import nn

from vitnb.models import nf4, quantization

# Rows that are no whole number of blocks, and a number of rows that is no multiple.
UNEVEN = [(96, 64), (128, 48)]


def nf4_copy(rows: int = 96, columns: int = 128) -> bnb.nn.Linear4bit:
    torch.manual_seed(4)
    linear = nn.Linear(columns, rows).to(torch.bfloat16)
    return quantization.quantized_copy(linear, 4, torch.bfloat16)


def test_a_cpu_that_packs_packs_as_bitsandbytes_does(packing_cpu):
    copy, plain = nf4_copy(), nf4_copy()
    wanted, state = functional._convert_weight_packed_for_cpu(
        plain.weight.data, plain.weight.quant_state
    )
    nf4.pack_for_cpu(copy)
    assert torch.equal(copy.weight.data, wanted)
    assert torch.equal(copy.weight.quant_state.absmax, state.absmax)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    with torch.inference_mode():
        first, again = copy(x), copy(x)
    assert torch.equal(first, again) and torch.equal(copy.weight.data, wanted)


def test_packing_rounds_each_scale_to_bfloat16_and_nothing_else(packing_cpu):
    copy = nf4_copy()
    state = copy.weight.quant_state
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    exact = functional.dequantize_4bit(copy.weight.data, state).float()
    indices = torch.cat([copy.weight.data >> 4, copy.weight.data & 15], dim=1).view(-1)
    rounded = absmax.bfloat16().float()
    wanted = state.code[indices.int()].view(-1, 64) * rounded[:, None]
    nf4.pack_for_cpu(copy)
    packed = unpack(copy.weight.data, copy.weight.quant_state)
    assert torch.equal(packed, wanted.view(96, 128))
    assert not torch.equal(packed.bfloat16().float(), exact)


def test_packed_weights_have_their_own_bytes(packing_cpu):
    """One bfloat16 for each block, where one byte and scales of groups were."""
    copy, biases = nf4_copy(), 96 * 2
    weights, blocks = 96 * 128, 96 * 128 // 64
    groups = (-(-blocks // 256) + 256) * 4  # a scale each, and one table
    before = weights // 2 + blocks + groups + 16 * 4 + 4 + biases
    assert quantization.resident_bytes(copy) == before
    nf4.pack_for_cpu(copy)
    after = weights // 2 + 2 * blocks + 16 * 4 + 4 + biases
    assert quantization.resident_bytes(copy) == after


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [
        (96, 128, torch.float32),
        (96, 128, torch.float16),
        *((rows, columns, torch.bfloat16) for columns, rows in UNEVEN),
    ],
)
def test_what_cannot_be_packed_is_not(packing_cpu, rows, columns, dtype):
    copy = quantization.quantized_copy(nn.Linear(columns, rows), 4, dtype)
    before = copy.weight.data.clone()
    nf4.pack_for_cpu(copy)
    with torch.inference_mode():
        copy(torch.randn(2, columns, dtype=dtype))
    assert torch.equal(copy.weight.data, before) and copy.weight.quant_state.nested


def test_a_model_that_is_saved_is_never_packed(packing_cpu):
    copy = nf4.disable_cpu_packing(nf4_copy())
    before = copy.weight.data.clone()
    nf4.pack_for_cpu(copy)
    assert torch.equal(copy.weight.data, before) and copy.weight.quant_state.nested


def test_packing_runs_nothing_elsewhere(monkeypatch):
    copy = nf4_copy()
    copy.support_avx512bf16_for_cpu = False
    monkeypatch.setattr(copy, "forward", None)
    nf4.pack_for_cpu(copy)
