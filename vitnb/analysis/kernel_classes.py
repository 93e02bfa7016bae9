"""Classify kernels by what they do, and by the part of the model they belong to.

One set of rules serves all variants. A kernel's *path* holds the kernel's own name, the
operator that launched it, and the operators around that operator. An operator that
wraps others decides for them: a matrix product inside attention is attention.
"""

import re

CLASSES = (
    "gemm",
    "dequantize",
    "quantize",
    "attention",
    "normalization",
    "elementwise",
    "copy",
    "other",
)
PARTS = ("patch embedding", "attention", "mlp", "head", "rest")

LABEL = "vitnb::"  # prefix of the parts' ranges in a trace
# Range of the kernels that run before and after a profiled forward.
MARKER = LABEL + "marker"

# Operators that decide for everything inside them, the outermost first.
WRAPPERS = (
    ("attention", r"scaled_dot_product|flash_attn|eager_attention"),
    ("dequantize", r"bitsandbytes::.*dequant"),
    ("quantize", r"bitsandbytes::.*quant"),
)

# Patterns of names, tried in this order: CPU operators of PyTorch and bitsandbytes, and
# kernels of CUDA, cuBLAS (nvjet, xmma, gemvx, splitK, epilogue), cuDNN, CUTLASS,
# flash-attn, bitsandbytes (k...) and Triton.
NAMES = (
    ("attention", r"flash_fwd|fmha|_sdpa_"),
    ("dequantize", r"[dD]equant"),
    ("quantize", r"[qQ]uant"),
    ("normalization", r"layer_norm|LayerNorm|rms_norm"),
    (
        "copy",
        r"Memcpy|Memset|copy_kernel|CatArray|nchwToNhwc|nhwcToNchw|"
        r"aten::(copy_|_to_copy|to|cat|clone|contiguous|pin_memory)$",
    ),
    (
        "elementwise",
        r"elementwise|softmax|::reduce_kernel|gelu|index_put|"
        r"aten::(add|sub|mul|div|max|min|abs|neg|round|reciprocal|ge|gt|le|lt|eq|"
        r"any|all|sum|mean|where|isneginf|fill|tanh|erf|exp|masked_fill|zero|clamp|"
        r"amax|sigmoid|pow|sqrt|rsqrt)_?$",
    ),
    (
        "gemm",
        r"gemm|nvjet|gemv|xmma|cutlass|cublas|splitK|convolve|conv|scal_kernel|"
        r"scaled_mm|linear_matmul|"
        r"aten::(addmm|mm|bmm|baddbmm|linear|matmul|_int_mm)$",
    ),
)

_WRAPPERS = [(kind, re.compile(pattern)) for kind, pattern in WRAPPERS]
_NAMES = [(kind, re.compile(pattern)) for kind, pattern in NAMES]


def classify(path: list[str]) -> str:
    """Return the class (one of CLASSES) of a kernel.

    Args:
        path: the kernel's own name first, the outermost operator last.
    """
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
    """Return the part of the model (one of PARTS) whose range is on the path."""
    ranges = (name.removeprefix(LABEL) for name in path if name.startswith(LABEL))
    return next(ranges, "rest")
