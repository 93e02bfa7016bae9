"""The fused operations in plain PyTorch: what each one computes, for tests and for machines without Triton.

``kernels`` holds the same functions under the same names as Triton kernels, one pass over memory each.
"""

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn


FP8_MAX = torch.finfo(FP8).max  # 448


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
