"""The NF4 format and its dequantization in plain PyTorch.

NF4 (QLoRA, arXiv:2305.14314) stores a weight as one of 16 numbers, which are spread
like a normal distribution. The dequantized weights are bit for bit those of
bitsandbytes' ``dequantize_4bit``.

- A *block* is 64 neighbouring weights. They share one scale, their largest magnitude
  (absmax).
- A *group* is 256 neighbouring blocks. Their absmaxes are quantized themselves, to 8
  bits, and share one scale and one offset (double quantization).
"""

import torch

NF4_BLOCK = 64  # weights that share an absmax
NF4_GROUP = 256  # absmaxes that share a scale


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
