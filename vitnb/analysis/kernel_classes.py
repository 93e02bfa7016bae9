"""A taxonomy of kernels: what each one does, by one set of rules for all variants, and in which part of the model.

The class of a kernel follows from its *path*: its own name, the operator that launched it, and the operators around
that one. An operator that wraps others decides for them: a product inside attention is attention.
"""

import re

CLASSES = ("gemm", "dequantize", "quantize", "attention", "normalization", "elementwise", "copy", "other")


PARTS = ("patch embedding", "attention", "mlp", "head", "rest")


LABEL = "vitnb::"  # how the ranges of the parts are called in a trace


MARKER = LABEL + "marker"  # the range of kernels that stand around a profiled forward and are no part of it


# Operators that decide for all that happens inside them, the outermost first.
WRAPPERS = (
    ("attention", r"scaled_dot_product|flash_attn|eager_attention"),
    ("dequantize", r"bitsandbytes::.*dequant"),
    ("quantize", r"bitsandbytes::.*quant"),
)


# What a name says, in this order: PyTorch's and bitsandbytes' CPU operators, and the kernels of CUDA, cuBLAS (nvjet,
# xmma, gemvx, splitK, epilogue), cuDNN, CUTLASS, flash-attn, bitsandbytes (k...) and Triton.
NAMES = (
    ("attention", r"flash_fwd|fmha|_sdpa_"),
    ("dequantize", r"[dD]equant"),
    ("quantize", r"[qQ]uant"),
    ("normalization", r"layer_norm|LayerNorm|rms_norm"),
    (
        "copy",
        r"Memcpy|Memset|copy_kernel|CatArray|nchwToNhwc|nhwcToNchw|aten::(copy_|_to_copy|to|cat|clone|contiguous|pin_memory)$",
    ),
    (
        "elementwise",
        r"elementwise|softmax|::reduce_kernel|gelu|index_put|aten::(add|sub|mul|div|max|min|abs|neg|round|reciprocal|ge|gt|le|lt|eq|"
        r"any|all|sum|mean|where|isneginf|fill|tanh|erf|exp|masked_fill|zero|clamp|amax|sigmoid|pow|sqrt|rsqrt)_?$",
    ),
    (
        "gemm",
        r"gemm|nvjet|gemv|xmma|cutlass|cublas|splitK|convolve|conv|scal_kernel|scaled_mm|linear_matmul|"
        r"aten::(addmm|mm|bmm|baddbmm|linear|matmul|_int_mm)$",
    ),
)


_WRAPPERS = [(kind, re.compile(pattern)) for kind, pattern in WRAPPERS]


_NAMES = [(kind, re.compile(pattern)) for kind, pattern in NAMES]


def classify(path: list[str]) -> str:
    """The class (one of CLASSES) of a kernel from its path: its own name first, the outermost operator last."""
    for name in reversed(path):
        for kind, pattern in _WRAPPERS:
            if pattern.search(name):
                return kind
    for name in path:
        for kind, pattern in _NAMES:
            if pattern.search(name):
                return kind
    return "other"


def model_part(path: list[str]) -> str:
    """The part of the model (one of PARTS) whose range is on the path."""
    return next((name.removeprefix(LABEL) for name in path if name.startswith(LABEL)), "rest")
