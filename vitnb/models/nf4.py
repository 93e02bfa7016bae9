"""The NF4 format, its dequantization in plain PyTorch, and its packing for CPUs.

NF4 (QLoRA, arXiv:2305.14314) stores a weight as one of 16 numbers, which are spread
like a normal distribution. The dequantized weights are bit for bit those of
bitsandbytes' ``dequantize_4bit``.

- A *block* is 64 neighbouring weights. They share one scale, their largest magnitude
  (absmax).
- A *group* is 256 neighbouring blocks. Their absmaxes are quantized themselves, to 8
  bits, and share one scale and one offset (double quantization).

On CPUs with AVX512-BF16, bitsandbytes (0.50) packs the weights in the first forward.
Packing drops the double quantization and rounds each absmax to bfloat16, so bytes and
answers are others than before.
"""

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.cpu import ops as bnb_cpu
from torch import nn

NF4_BLOCK = 64  # weights that share an absmax
NF4_GROUP = 256  # absmaxes that share a scale
PACKED_ROWS = 32  # rows of a weight that are packed together on a CPU

# A process that imported bitsandbytes before this package may have a product for packed
# NF4 weights from the hub. Every variant takes the one that bitsandbytes brings along.
bnb_cpu.gemm_4bit_forward_kernel = None


def dequantize_nf4(packed, absmax, code, scale_code, scale, offset, out) -> None:
    """Write weights in NF4 with double quantization to ``out``.

    Args:
        packed: uint8 [n / 2], two weights a byte, the first in the high half.
        absmax: uint8 [n / 64], an index into ``scale_code`` for each block.
        code: float32 [16], the value of each 4-bit index.
        scale_code: float32 [256], the value of each 8-bit index.
        scale: float32 [n / 64 / 256, rounded up], one for each group.
        offset: float32 [n / 64 / 256, rounded up], one for each group.
        out: [n], overwritten.
    """
    group = torch.arange(len(absmax), device=packed.device) // NF4_GROUP
    block_scale = scale_code[absmax.int()] * scale[group] + offset[group]
    indices = torch.stack([packed >> 4, packed & 15], dim=-1).int()
    weights = code[indices].view(-1, NF4_BLOCK) * block_scale[:, None]
    out.copy_(weights.view(-1))


def allow_cpu_packing(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn off the packing of 4-bit weights where it cannot be, and leave it elsewhere.

    bitsandbytes multiplies packed weights in bfloat16. It asks only its own library
    whether the CPU can do that, and neither for the type to compute in nor for the
    weight's shape. A weight whose rows are no whole number of blocks cannot be packed
    (Swin-T has rows of 96), nor one whose number of rows is no multiple of 32.

    Args:
        model: a model with NF4 Linears, or without: then nothing changes.
        dtype: the type that it computes in.
    """
    for module in _linears_4bit(model):
        uneven = module.in_features % NF4_BLOCK or module.out_features % PACKED_ROWS
        if uneven or dtype != torch.bfloat16:
            module.support_avx512bf16_for_cpu = False


def disable_cpu_packing(model: nn.Module) -> nn.Module:
    """Turn off the packing of all 4-bit weights on CPUs with AVX512-BF16.

    Training crashes after a forward that packed, and a saved model differs, so models
    that are trained or saved must not be packed.
    """
    for module in _linears_4bit(model):
        module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def pack_for_cpu(model: nn.Module) -> None:
    """Pack the 4-bit weights that the first forward would pack, in place.

    Bytes are then those of the model that runs. Nothing happens where the CPU does not
    pack, and on a GPU.

    Args:
        model: a model in evaluation mode, or one Linear.
    """
    for module in _linears_4bit(model):
        if module.support_avx512bf16_for_cpu and module.weight.device.type == "cpu":
            # bitsandbytes has no public function for it, but a forward.
            module(torch.zeros(1, module.in_features, dtype=module.compute_dtype))


def _linears_4bit(model: nn.Module) -> list[bnb.nn.Linear4bit]:
    return [one for one in model.modules() if isinstance(one, bnb.nn.Linear4bit)]
