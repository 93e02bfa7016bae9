"""The fused operations in plain PyTorch, for tests and for machines without Triton.

``triton_kernels`` holds the same functions as Triton kernels, each with one pass over
memory.
"""

import torch
import torch.nn.functional as F

from vitnb.models.nf4 import dequantize_nf4

__all__ = ["FP8", "FP8_MAX", "dequantize_nf4", "gelu", "layer_norm", "quantize_rows"]

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448


def quantize_rows(x):
    """Quantize rows to float8, so that the largest magnitude of a row becomes 448.

    Args:
        x: floating point [rows, columns].

    Returns:
        float8 e4m3 [rows, columns] and its scale, float32 [rows, 1].
    """
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (x.float() * (FP8_MAX / largest)).to(FP8), largest / FP8_MAX


def layer_norm(stream, delta, shift, weight, bias, eps, fp8=False):
    """Add ``delta`` to ``stream`` in place, then normalize ``stream + shift``.

    Args:
        stream: the residual stream, [rows, columns].
        delta: [rows, columns], or None for nothing to add.
        shift: float32 [columns], added for the norm alone, or None.
        weight: [columns].
        bias: [columns].
        eps: added to the variance.
        fp8: whether to return float8 rows and scales; see ``quantize_rows``.

    Returns:
        [rows, columns] in the type of ``stream``.
    """
    if delta is not None:
        stream += delta
    x = stream if shift is None else stream.float() + shift
    out = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    out = out.to(stream.dtype)
    return quantize_rows(out) if fp8 else out


def gelu(x, fp8=False):
    """Compute the exact GELU, x times the standard normal's probability below x.

    Args:
        x: [rows, columns].
        fp8: whether to return float8 rows and scales; see ``quantize_rows``.

    Returns:
        ``x``, overwritten, unless ``fp8`` is set.
    """
    out = F.gelu(x)
    return quantize_rows(out) if fp8 else x.copy_(out)
