"""TODO."""

import torch

NF4_BLOCK, NF4_GROUP = 64, 256  # weights that share an absmax; absmaxes that share a scale


def dequantize_nf4(packed, absmax, code, scale_code, scale, offset, out) -> None:
    """Nested NF4 (QLoRA, arXiv:2305.14314, as bitsandbytes stores it) to ``out``, bit for bit as ``dequantize_4bit`` does.

    Args:
        packed: uint8 [n / 2], two weights a byte, the first in the high half.
        absmax: uint8 [n / 64], an index into ``scale_code`` for each block of 64 weights.
        code, scale_code: float32 [16] and [256], what 4-bit and 8-bit indices stand for.
        scale, offset: float32 [n / 64 / 256, rounded up], for each group of 256 blocks.
        out: [n], overwritten.
    """
    group = torch.arange(len(absmax), device=packed.device) // NF4_GROUP
    largest = scale_code[absmax.int()] * scale[group] + offset[group]
    weights = code[torch.stack([packed >> 4, packed & 15], dim=-1).int()].view(-1, NF4_BLOCK)
    out.copy_((weights * largest[:, None]).view(-1))
