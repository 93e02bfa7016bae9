"""Attention kernels asked for by name, and which one ran.

The names: ``sdpa`` (PyTorch chooses), ``eager`` (two products and a softmax, as transformers writes it), PyTorch's kernels
one by one, ``math``, ``mem-efficient``, ``flash`` and ``cudnn``, and ``fa2`` (FlashAttention-2, arXiv:2307.08691).

A ViT attends from every token to every token: it has no mask. transformers still builds one in some situations, and a
mask, even an all-true one, shuts the flash kernels out. The functions registered here never see a mask. What some models
add to their scores (Swin, BEiT: a bias by relative position, shifted windows) comes to them in the mask's place, as numbers;
it is part of the model, and stays.
"""

import re
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from vitnb.errors import VariantError, one_line

# What the profiler calls the operator of each kernel -> the name used in records. The first that occurs counts:
# the forced kernels' operators do not nest in each other.
OPERATORS = {
    "flash_attn::_flash_attn_forward": "flash-attn",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash-cpu",
    "aten::_scaled_dot_product_efficient_attention": "mem-efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_attention_math": "math",
    "vitnb_eager_attention": "eager",
}


# What the kernels themselves are called, for a replayed CUDA graph, whose trace has no operators.
KERNELS = (
    ("flash-attn", r"^(void )?flash::|flash_attn"),
    ("flash", r"pytorch_flash::"),
    ("cudnn", r"cudnn.*(sdpa|flash|fmha)"),
    ("mem-efficient", r"fmha_cutlass"),
    ("math", r"softmax"),
)


# Around those: what one attention costs, whichever kernel does it.
WHOLE = ("aten::scaled_dot_product_attention", "flash_attn::_flash_attn_forward", "vitnb_eager_attention")


# How an attention name is launched -> the kernels that it may have run. None: PyTorch chooses.
ALLOWED = {
    "sdpa": None,
    "eager": {"eager", "math"},  # the same kernels; a replayed graph does not tell them apart
    "math": {"math"},
    "mem-efficient": {"mem-efficient"},
    "torch-flash": {"flash", "flash-cpu"},
    "cudnn": {"cudnn"},
    "flash-attn": {"flash-attn"},
}


BACKENDS = {
    "math": SDPBackend.MATH,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


NAMES = ("sdpa", "eager", "math", "mem-efficient", "flash", "cudnn", "fa2")


def _bias(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to the scores; None for a mask of true and false, which has nothing to hide in a ViT."""
    return None if attention_mask is None or attention_mask.dtype == torch.bool else attention_mask


def _sdpa(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """[batch, heads, tokens, head] each -> [batch, tokens, heads, head]."""
    bias = _bias(attention_mask)
    bias = bias if bias is None else bias.to(query.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _eager(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """The same in single steps: all scores of all tokens stand in memory. The softmax is taken in float32."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.profiler.record_function("vitnb_eager_attention"):  # so that a trace tells whose products these are
        scores, bias = (query @ key.transpose(-1, -2)) * scaling, _bias(attention_mask)
        scores = scores if bias is None else scores + bias
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        shares = torch.nn.functional.dropout(shares, dropout, training=dropout > 0)
        return (shares @ value).transpose(1, 2).contiguous(), None


def _flash_attn(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """The same through the flash-attn package, which wants [batch, tokens, heads, head]."""
    from flash_attn import flash_attn_func

    if _bias(attention_mask) is not None:
        raise VariantError(
            "flash-attn has no place for the bias that this model adds to its scores: use an sdpa variant"
        )
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scaling), None


def _no_mask(*args, **kwargs) -> None:
    return None


# transformers refuses a name of its own for a hub kernel if it contains "flash".
FUNCTIONS = {"vitnb-sdpa": _sdpa, "vitnb-eager": _eager, "vitnb-fa2": _flash_attn}


for _name, _function in FUNCTIONS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _no_mask)


def resolve_backend(attention: str, device: torch.device) -> str:
    """How an attention (one of NAMES) is launched on a device: a key of ALLOWED.

    ``flash`` is PyTorch's flash kernel, forced. ``fa2`` is flash-attn on an SM80+ GPU, and PyTorch's flash kernel where
    flash-attn cannot be had. Raises VariantError where neither exists.
    """
    if attention != "fa2":
        return "torch-flash" if attention == "flash" else attention
    if device.type == "cpu":
        return "torch-flash"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise VariantError(
            f"fa2 needs a GPU of SM80 or newer and this one is SM{capability[0]}{capability[1]}: use an sdpa variant"
        )
    return "flash-attn" if find_spec("flash_attn") else "torch-flash"


def implementation(launched: str) -> str:
    """The name that transformers knows a launch by (``attn_implementation``)."""
    return {"flash-attn": "vitnb-fa2", "eager": "vitnb-eager"}.get(launched, "vitnb-sdpa")


@contextmanager
def force_backend(launched: str):
    """Run a block of forwards with PyTorch's choice narrowed to the kernel that was asked for.

    Raises VariantError where PyTorch has no such kernel for these tensors.
    """
    try:
        with sdpa_kernel(BACKENDS[launched]) if launched in BACKENDS else nullcontext():
            yield
    except RuntimeError as error:
        if "No available kernel" in str(error):
            raise VariantError(
                f"PyTorch has no {launched} attention kernel for this model here: {one_line(error)}"
            ) from None
        raise


def kernel_in_trace(names: set[str]) -> str:
    """Which attention occurs in a trace, from the names of its operators and, where a graph was replayed, of its kernels.

    Raises VariantError if none does, or two different ones do.
    """
    found = sorted({name for operator, name in OPERATORS.items() if operator in names})
    if not found:
        of_kernels = [name for name, pattern in KERNELS if any(re.search(pattern, kernel) for kernel in names)]
        # A softmax beside a fused kernel is no attention.
        found = sorted({*of_kernels} - {"math"} if len(of_kernels) > 1 else of_kernels)
    if len(found) != 1:
        raise VariantError(f"the trace shows {' and '.join(found) or 'no known attention kernel'}: one was expected")
    return found[0]


def check_kernel(launched: str, kernel: str) -> None:
    """Raise VariantError if a variant ran a kernel that its name does not allow."""
    allowed = ALLOWED[launched]
    if allowed is not None and kernel not in allowed:
        raise VariantError(f"{launched} was asked for and {kernel} ran: the row would measure something else")
