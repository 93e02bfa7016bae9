"""The fused operations in plain PyTorch: what each one computes, for tests and for machines without Triton.

``kernels`` holds the same functions under the same names as Triton kernels, one pass over memory each.
"""

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
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


def quantize_rows(x):
    """16-bit [rows, columns] -> (float8 e4m3 [rows, columns], float32 scale [rows, 1]): absmax of a row becomes 448."""
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (x.float() * (FP8_MAX / largest)).to(FP8), largest / FP8_MAX


def layer_norm(stream, delta, shift, weight, bias, eps, fp8=False):
    """``stream += delta``, in place, then the layer norm of ``stream + shift``.

    Args:
        stream: [rows, columns]; delta: the same, or None for nothing to add.
        shift: float32 [columns] that is added for the norm alone, or None.
        fp8: give the result as ``quantize_rows`` does.
    """
    if delta is not None:
        stream += delta
    x = stream if shift is None else stream.float() + shift
    out = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(stream.dtype)
    return quantize_rows(out) if fp8 else out


def gelu(x, fp8=False):
    """The exact GELU, x times the normal distribution's share below x; in place, or as ``quantize_rows`` gives it."""
    out = F.gelu(x)
    return quantize_rows(out) if fp8 else x.copy_(out)
