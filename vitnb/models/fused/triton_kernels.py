"""The fused operations as Triton kernels, each with one pass over memory.

``reference`` holds the same functions with the same arguments, and says what each one
computes.
"""

import torch
import triton
import triton.language as tl

from vitnb.models.fused.reference import FP8, FP8_MAX
from vitnb.models.nf4 import NF4_BLOCK, NF4_GROUP

# Kernels can read constants of this type alone.
_FP8_MAX = tl.constexpr(FP8_MAX)
_NF4_BLOCK = tl.constexpr(NF4_BLOCK)
_NF4_GROUP = tl.constexpr(NF4_GROUP)


@triton.jit
def _dequantize(
    packed, absmax, code, scale_code, scale, offset, out, words, WORDS: tl.constexpr
):
    # A word of 32 bits holds 8 weights. One thread writes them as 16 bytes, so that
    # neighbouring threads read and write neighbouring memory.
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = word < words
    block = word // (_NF4_BLOCK // 8)
    # WORDS divides a group's words, so a program reads one group.
    group = tl.program_id(0) * WORDS // (_NF4_GROUP * _NF4_BLOCK // 8)
    index = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
    largest = tl.load(scale_code + index)
    largest = largest * tl.load(scale + group) + tl.load(offset + group)
    # The packed weights of all blocks do not fit the L2 cache until the next forward.
    # So they are evicted first, and the unpacked ones stay for their product.
    eight = tl.load(packed + word, mask=mask, other=0, eviction_policy="evict_first")
    weight = tl.arange(0, 8)
    # The first of two weights is in the high half of its byte.
    shift = weight // 2 * 8 + (1 - weight % 2) * 4
    weights = tl.load(code + (eight[:, None] >> shift[None, :] & 15)) * largest[:, None]
    weights = weights.to(out.dtype.element_ty)
    tl.store(out + word[:, None] * 8 + weight[None, :], weights, mask=mask[:, None])


def dequantize_nf4(packed, absmax, code, scale_code, scale, offset, out) -> None:
    """See ``reference.dequantize_nf4``."""
    words = packed.view(torch.int32)
    # 256 words and 4 warps are the fastest of those tried on an H200. A fused
    # multiply-add would round once where bitsandbytes rounds twice.
    _dequantize[(triton.cdiv(words.numel(), 256),)](
        words,
        absmax,
        code,
        scale_code,
        scale,
        offset,
        out,
        words.numel(),
        WORDS=256,
        num_warps=4,
        enable_fp_fusion=False,
    )


@triton.jit
def _to_fp8(y):
    largest = tl.maximum(tl.max(tl.abs(y), 0), 1e-12)
    return (y * (_FP8_MAX / largest)).to(tl.float8e4nv), largest / _FP8_MAX


@triton.jit
def _quantize(x, out, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    y = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    y, largest = _to_fp8(y)
    tl.store(out + row * columns + column, y, mask=mask)
    tl.store(scale + row, largest)


def _empty_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for the float8 rows and scales of x [rows, columns]."""
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=FP8), scale


def _row_options(columns: int) -> dict[str, int]:
    """Return the launch options of a kernel that runs one program for each row."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def quantize_rows(x):
    """See ``reference.quantize_rows``."""
    rows, columns = x.shape
    x = x.contiguous()  # rows may lie apart, such as the class tokens
    out, scale = _empty_float8(x)
    _quantize[(rows,)](x, out, scale, columns, **_row_options(columns))
    return out, scale


@triton.jit
def _layer_norm(
    stream,
    delta,
    shift,
    weight,
    bias,
    out,
    scale,
    columns,
    eps,
    DELTA: tl.constexpr,
    SHIFT: tl.constexpr,
    TO_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    here = row * columns + column
    x = tl.load(stream + here, mask=mask, other=0.0).to(tl.float32)
    if DELTA:
        added = tl.load(delta + here, mask=mask, other=0.0).to(tl.float32)
        summed = (x + added).to(stream.dtype.element_ty)
        tl.store(stream + here, summed, mask=mask)
        x = summed.to(tl.float32)
    if SHIFT:
        x += tl.load(shift + column, mask=mask, other=0.0)
    centred = tl.where(mask, x - tl.sum(x, 0) / columns, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    y = y * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    if TO_FP8:
        y, largest = _to_fp8(y.to(stream.dtype.element_ty).to(tl.float32))
        tl.store(scale + row, largest)
    tl.store(out + here, y.to(out.dtype.element_ty), mask=mask)


def layer_norm(stream, delta, shift, weight, bias, eps, fp8=False):
    """See ``reference.layer_norm``."""
    rows, columns = stream.shape
    if fp8:
        out, scale = _empty_float8(stream)
    else:
        out, scale = torch.empty_like(stream), None
    _layer_norm[(rows,)](
        stream,
        delta,
        shift,
        weight,
        bias,
        out,
        scale,
        columns,
        eps,
        DELTA=delta is not None,
        SHIFT=shift is not None,
        TO_FP8=fp8,
        **_row_options(columns),
    )
    return (out, scale) if fp8 else out


@triton.jit
def _gelu_of(x):
    """Compute x Phi(x) = max(x, 0) - |x| Phi(-|x|).

    This form loses no digits where Phi is near 0 or 1. Phi(-a) is 2 to the power of a
    polynomial, which was fitted to log2 Phi(-a) on [0, 9] (Lawson's iteration, in
    float64). The error is at most 1.1e-5 of x Phi(x), a 180th of the rounding error of
    bfloat16, for half the instructions of erff. Below -9 the result is under 1.1e-18.
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
    mask = here < count
    y = _gelu_of(tl.load(x + here, mask=mask, other=0.0).to(tl.float32))
    tl.store(x + here, y.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_rows(x, out, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    here = row * columns + column
    y = _gelu_of(tl.load(x + here, mask=mask, other=0.0).to(tl.float32))
    # Rounded to 16 bits first, as separate steps do, so that engines agree.
    y, largest = _to_fp8(y.to(x.dtype.element_ty).to(tl.float32))
    tl.store(out + here, y, mask=mask)
    tl.store(scale + row, largest)


def gelu(x, fp8=False):
    """See ``reference.gelu``."""
    rows, columns = x.shape
    if not fp8:
        programs = triton.cdiv(x.numel(), 2048)
        _gelu[(programs,)](x, x.numel(), BLOCK=2048, num_warps=8)
        return x
    out, scale = _empty_float8(x)
    _gelu_rows[(rows,)](x, out, scale, columns, **_row_options(columns))
    return out, scale
