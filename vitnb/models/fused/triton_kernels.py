"""The fused operations as Triton kernels: each reads what it needs once and writes its result once.

See ``reference`` for what each one computes; the functions and their arguments are the same.
"""

import torch
import triton
import triton.language as tl

from vitnb.models.fused.reference import FP8, FP8_MAX
from vitnb.models.nf4 import NF4_BLOCK, NF4_GROUP

_FP8_MAX = tl.constexpr(FP8_MAX)


_NF4_BLOCK, _NF4_GROUP = tl.constexpr(NF4_BLOCK), tl.constexpr(NF4_GROUP)


@triton.jit
def _dequantize(packed, absmax, code, scale_code, scale, offset, out, words, WORDS: tl.constexpr):
    # A word of 32 bits holds 8 weights, which one thread writes as 16 bytes: neighbours read and write side by side.
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    there, block = word < words, word // (_NF4_BLOCK // 8)
    group = tl.program_id(0) * WORDS // (_NF4_GROUP * _NF4_BLOCK // 8)  # WORDS divides it: one group a program
    largest = tl.load(scale_code + tl.load(absmax + block, mask=there, other=0).to(tl.int32))
    largest = largest * tl.load(scale + group) + tl.load(offset + group)
    # All packed weights are more than the L2 holds until the next forward: first out, the unpacked ones stay for their product.
    eight = tl.load(packed + word, mask=there, other=0, eviction_policy="evict_first")
    weight = tl.arange(0, 8)
    shift = weight // 2 * 8 + (1 - weight % 2) * 4  # the first of two weights is in the high half of its byte
    weights = tl.load(code + (eight[:, None] >> shift[None, :] & 15)) * largest[:, None]
    tl.store(out + word[:, None] * 8 + weight[None, :], weights.to(out.dtype.element_ty), mask=there[:, None])


def dequantize_nf4(packed, absmax, code, scale_code, scale, offset, out) -> None:
    """See ``reference.dequantize_nf4``."""
    words = packed.view(torch.int32)
    # A fused multiply-add would round once where bitsandbytes rounds twice. 256 words and 4 warps: the fastest tried on an H200.
    _dequantize[(triton.cdiv(words.numel(), 256),)](
        words, absmax, code, scale_code, scale, offset, out, words.numel(),
        WORDS=256, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _to_fp8(y):
    largest = tl.maximum(tl.max(tl.abs(y), 0), 1e-12)
    return (y * (_FP8_MAX / largest)).to(tl.float8e4nv), largest / _FP8_MAX


@triton.jit
def _quantize(x, out, scale, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = column < columns
    y, largest = _to_fp8(tl.load(x + row * columns + column, mask=there, other=0.0).to(tl.float32))
    tl.store(out + row * columns + column, y, mask=there)
    tl.store(scale + row, largest)


def _fp8_like(x):
    return torch.empty_like(x, dtype=FP8), torch.empty(len(x), 1, dtype=torch.float32, device=x.device)


def _warps(columns: int) -> int:
    return min(max(triton.next_power_of_2(columns) // 256, 1), 16)


def quantize_rows(x):
    """See ``reference.quantize_rows``."""
    rows, columns = x.shape
    x = x.contiguous()  # such as the class tokens alone, which lie far apart
    out, scale = _fp8_like(x)
    _quantize[(rows,)](x, out, scale, columns, BLOCK=triton.next_power_of_2(columns), num_warps=_warps(columns))
    return out, scale


@triton.jit
def _layer_norm(
    stream, delta, shift, weight, bias, out, scale, columns, eps,
    DELTA: tl.constexpr, SHIFT: tl.constexpr, TO_FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there, here = column < columns, row * columns + column
    x = tl.load(stream + here, mask=there, other=0.0).to(tl.float32)
    if DELTA:
        summed = (x + tl.load(delta + here, mask=there, other=0.0).to(tl.float32)).to(stream.dtype.element_ty)
        tl.store(stream + here, summed, mask=there)
        x = summed.to(tl.float32)
    if SHIFT:
        x += tl.load(shift + column, mask=there, other=0.0)
    centred = tl.where(there, x - tl.sum(x, 0) / columns, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    y = y * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    y += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    if TO_FP8:
        y, largest = _to_fp8(y.to(stream.dtype.element_ty).to(tl.float32))
        tl.store(scale + row, largest)
    tl.store(out + here, y.to(out.dtype.element_ty), mask=there)


def layer_norm(stream, delta, shift, weight, bias, eps, fp8=False):
    """See ``reference.layer_norm``."""
    rows, columns = stream.shape
    out, scale = _fp8_like(stream) if fp8 else (torch.empty_like(stream), None)
    _layer_norm[(rows,)](
        stream, delta, shift, weight, bias, out, scale, columns, eps, DELTA=delta is not None, SHIFT=shift is not None,
        TO_FP8=fp8, BLOCK=triton.next_power_of_2(columns), num_warps=_warps(columns),
    )  # fmt: skip
    return (out, scale) if fp8 else out


@triton.jit
def _gelu_of(x):
    """x Phi(x) = max(x, 0) - |x| Phi(-|x|), which loses no digits where Phi is near 0 or 1.

    Phi(-a) is 2 to the power of a polynomial, fitted to log2 Phi(-a) on [0, 9] (Lawson's iteration, in float64): within 1.1e-5
    of x Phi(x), a 180th of what rounding to bfloat16 does, in half the instructions of erff. Below -9 the result is under 1.1e-18.
    """
    a = tl.minimum(tl.abs(x), 9.0)
    p = 7.463253837158845e-08 * a - 3.6557737530529266e-06
    p = p * a + 7.94375519035384e-05
    p = p * a - 0.0010200485121458769
    p = p * a + 0.00875086896121502
    p = p * a - 0.054304663091897964
    p = p * a - 0.4582415223121643
    p = p * a - 1.1512949466705322
    p = p * a - 0.9999966025352478
    return tl.maximum(x, 0.0) - a * tl.exp2(p)


@triton.jit
def _gelu(x, count, BLOCK: tl.constexpr):
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = here < count
    y = _gelu_of(tl.load(x + here, mask=there, other=0.0).to(tl.float32))
    tl.store(x + here, y.to(x.dtype.element_ty), mask=there)


@triton.jit
def _gelu_rows(x, out, scale, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there, here = column < columns, row * columns + column
    y = _gelu_of(tl.load(x + here, mask=there, other=0.0).to(tl.float32))
    y, largest = _to_fp8(y.to(x.dtype.element_ty).to(tl.float32))  # rounded as in separate steps: engines agree
    tl.store(out + here, y, mask=there)
    tl.store(scale + row, largest)


def gelu(x, fp8=False):
    """See ``reference.gelu``."""
    rows, columns = x.shape
    if not fp8:
        _gelu[(triton.cdiv(x.numel(), 2048),)](x, x.numel(), BLOCK=2048, num_warps=8)
        return x
    out, scale = _fp8_like(x)
    _gelu_rows[(rows,)](x, out, scale, columns, BLOCK=triton.next_power_of_2(columns), num_warps=_warps(columns))
    return out, scale
