"""Attention by name: choose a backend, force it, and read which kernel ran.

Three kinds of names meet here:

- An *attention* is what a variant asks for: ``sdpa`` (PyTorch chooses), ``eager`` (two
  products and a softmax, as transformers writes it), PyTorch's kernels ``math``,
  ``mem-efficient``, ``flash`` and ``cudnn``, and ``fa2`` (FlashAttention-2,
  arXiv:2307.08691).
- A *backend* is what a device runs for it, a key of ``ALLOWED``. For example, ``fa2``
  is ``flash-attn`` on a GPU with that package, and ``torch-flash`` on a CPU.
- A *kernel* is what a trace shows, such as ``flash-cpu``; a value of ``OPERATORS``.

A ViT attends from every token to every token, so it has no mask. transformers still
builds one in some situations, and any mask, even an all-true one, rules out the flash
kernels. So the functions registered here ignore masks. Some models (Swin, BEiT) add a
bias to their scores, for relative positions or shifted windows. This bias comes in the
mask's place, as numbers. It is part of the model and is applied.
"""

import re
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from vitnb.errors import VariantError, one_line

# Operator in a profiler's trace -> kernel in records. Operators of different forced
# backends do not nest in each other.
OPERATORS = {
    "flash_attn::_flash_attn_forward": "flash-attn",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash-cpu",
    "aten::_scaled_dot_product_efficient_attention": "mem-efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_attention_math": "math",
    "vitnb_eager_attention": "eager",
}

# Kernel in records, and a pattern for the names of its CUDA kernels. A replayed CUDA
# graph needs them: its trace shows no operators.
CUDA_KERNEL_PATTERNS = (
    ("flash-attn", r"^(void )?flash::|flash_attn"),
    ("flash", r"pytorch_flash::"),
    ("cudnn", r"cudnn.*(sdpa|flash|fmha)"),
    ("mem-efficient", r"fmha_cutlass"),
    ("math", r"softmax"),
)

# Operators around a whole attention, whichever kernel does it: their time is its cost.
WHOLE = (
    "aten::scaled_dot_product_attention",
    "flash_attn::_flash_attn_forward",
    "vitnb_eager_attention",
)

# Backend -> kernels that it may run. None: PyTorch chooses.
ALLOWED = {
    "sdpa": None,
    "eager": {"eager", "math"},  # a replayed graph shows the same CUDA kernels for both
    "math": {"math"},
    "mem-efficient": {"mem-efficient"},
    "torch-flash": {"flash", "flash-cpu"},
    "cudnn": {"cudnn"},
    "flash-attn": {"flash-attn"},
}

# Backend -> PyTorch's switch that forces it.
SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _bias(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the bias to add to the scores, if any.

    A mask of true and false is no bias: it has nothing to hide in a ViT.
    """
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return None
    return attention_mask


def _sdpa(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options
):
    """Compute attention by PyTorch's ``scaled_dot_product_attention``.

    Args:
        module: the model's attention module, not used (transformers' interface).
        query: [batch, heads, tokens, head].
        key: [batch, heads, tokens, head].
        value: [batch, heads, tokens, head].
        attention_mask: a mask, which is ignored, or a bias for the scores.
        scaling: the factor of the scores; 1 / sqrt(head) by default.
        dropout: the share of attention weights to drop.
        options: not used (transformers' interface).

    Returns:
        [batch, tokens, heads, head], and None in the place of the attention weights.
    """
    bias = _bias(attention_mask)
    if bias is not None:
        bias = bias.to(query.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, bias, dropout, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def _eager(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options
):
    """Compute attention in single steps, with all scores of all tokens in memory.

    The softmax is taken in float32. See ``_sdpa`` for arguments and shapes.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    bias = _bias(attention_mask)
    # The label tells these products in a trace from the model's other products.
    with torch.profiler.record_function("vitnb_eager_attention"):
        scores = (query @ key.transpose(-1, -2)) * scaling
        if bias is not None:
            scores = scores + bias
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        shares = torch.nn.functional.dropout(shares, dropout, training=dropout > 0)
        return (shares @ value).transpose(1, 2).contiguous(), None


def _flash_attn(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options
):
    """Compute attention by the flash-attn package.

    The package takes and gives [batch, tokens, heads, head]. See ``_sdpa`` for
    arguments and shapes.

    Raises:
        VariantError: the model adds a bias to its scores.
    """
    from flash_attn import flash_attn_func  # late: the package is optional

    if _bias(attention_mask) is not None:
        raise VariantError(
            "flash-attn has no place for the bias that this model adds to its scores: "
            "use an sdpa variant"
        )
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scaling)
    return out, None


def _no_mask(*args, **kwargs) -> None:
    """Build no mask, in the place of transformers' mask functions."""
    return None


# transformers takes names that contain "flash" for kernels on its hub, hence "fa2".
FUNCTIONS = {"vitnb-sdpa": _sdpa, "vitnb-eager": _eager, "vitnb-fa2": _flash_attn}

for _name, _function in FUNCTIONS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _no_mask)


def resolve_backend(attention: str, device: torch.device) -> str:
    """Return the backend of an attention on a device, a key of ``ALLOWED``.

    ``flash`` is PyTorch's flash kernel, forced. ``fa2`` is flash-attn on a GPU of SM80
    or newer, and PyTorch's flash kernel where flash-attn is not installed.

    Args:
        attention: one of ``variants.ATTENTIONS``.
        device: where the variant runs.

    Raises:
        VariantError: ``fa2`` on an older GPU, which has neither; or flash-attn is
            installed and cannot be imported.
    """
    if attention == "flash":
        return "torch-flash"
    if attention != "fa2":
        return attention
    if device.type == "cpu":
        return "torch-flash"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        raise VariantError(
            f"fa2 needs a GPU of SM80 or newer and this one is SM{major}{minor}: "
            "use an sdpa variant"
        )
    if not find_spec("flash_attn"):
        return "torch-flash"
    try:
        # Now, as a package that was built for another PyTorch would fail at the first
        # forward.
        import_module("flash_attn").flash_attn_func  # noqa: B018
    except Exception as error:
        raise VariantError(
            f"flash-attn is installed and cannot be imported ({one_line(error)}): "
            "install it for this PyTorch, or remove it"
        ) from None
    return "flash-attn"


def implementation(backend: str) -> str:
    """Return transformers' name for a backend (``attn_implementation``)."""
    own_names = {"flash-attn": "vitnb-fa2", "eager": "vitnb-eager"}
    return own_names.get(backend, "vitnb-sdpa")


@contextmanager
def force_backend(backend: str):
    """Run a block of forwards with PyTorch's choice narrowed to one backend.

    Raises:
        VariantError: PyTorch has no such kernel for these tensors.
    """
    forced = backend in SDPA_BACKENDS
    try:
        with sdpa_kernel(SDPA_BACKENDS[backend]) if forced else nullcontext():
            yield
    except RuntimeError as error:
        if "No available kernel" in str(error):
            raise VariantError(
                f"PyTorch has no {backend} attention kernel for this model here "
                f"({one_line(error)}): use an sdpa variant"
            ) from None
        raise


def kernel_in_trace(names: set[str]) -> str:
    """Return the attention kernel that a trace shows, a value of ``OPERATORS``.

    Args:
        names: names of all operators and, for a replayed graph, of all CUDA kernels.

    Raises:
        VariantError: the trace shows none, or two different ones.
    """
    kernels = {OPERATORS[name] for name in names if name in OPERATORS}
    if not kernels:
        kernels = _kernels_of_graph(names)
    if len(kernels) != 1:
        shown = " and ".join(sorted(kernels)) or "no known attention kernel"
        raise VariantError(f"the trace shows {shown}: one was expected")
    return kernels.pop()


def _kernels_of_graph(names: set[str]) -> set[str]:
    """Return the attention kernels among the CUDA kernels of a replayed graph."""
    kernels = {
        kernel
        for kernel, pattern in CUDA_KERNEL_PATTERNS
        if any(re.search(pattern, name) for name in names)
    }
    # A softmax beside a fused kernel is no attention.
    return kernels - {"math"} if len(kernels) > 1 else kernels


def check_kernel(backend: str, kernel: str) -> None:
    """Raise VariantError if a variant ran a kernel that its backend does not allow."""
    allowed = ALLOWED[backend]
    if allowed is not None and kernel not in allowed:
        raise VariantError(
            f"{backend} was asked for and {kernel} ran: "
            "the row would measure something else"
        )
