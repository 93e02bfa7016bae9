"""Attention kernels asked for by name, and which one ran.

A ViT attends from every token to every token: it has no mask. transformers still builds one in some situations, and a
mask, even an all-true one, shuts the flash kernels out. The functions registered here never see a mask.
"""

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
}
# Around those: what one attention costs, whichever kernel does it.
WHOLE = ("aten::scaled_dot_product_attention", "flash_attn::_flash_attn_forward")

# How an attention name is launched -> the kernels that it may have run. None: PyTorch chooses.
ALLOWED = {
    "sdpa": None,
    "math": {"math"},
    "torch-flash": {"flash", "flash-cpu"},
    "flash-attn": {"flash-attn"},
}


def _sdpa(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """[batch, heads, tokens, head] each -> [batch, tokens, heads, head]; the mask is ignored."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _flash_attn(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """The same through the flash-attn package, which wants [batch, tokens, heads, head]."""
    from flash_attn import flash_attn_func

    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scaling), None


def _no_mask(*args, **kwargs) -> None:
    return None


# transformers refuses a name of its own for a hub kernel if it contains "flash".
for _name, _function in (("vitnb-sdpa", _sdpa), ("vitnb-fa2", _flash_attn)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _no_mask)


def launch(attention: str, device: torch.device) -> str:
    """How the attention ``sdpa``, ``math`` or ``fa2`` is launched on a device: a key of ALLOWED.

    ``fa2`` is flash-attn on an SM80+ GPU, and PyTorch's own flash kernel, forced, where flash-attn cannot be had.
    Raises VariantError where neither exists.
    """
    if attention != "fa2":
        return attention
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
    return "vitnb-fa2" if launched == "flash-attn" else "vitnb-sdpa"


@contextmanager
def forced(launched: str):
    """Run a block of forwards with PyTorch's choice narrowed to the kernel that was asked for.

    Raises VariantError where PyTorch has no such kernel for these tensors.
    """
    backends = {"math": SDPBackend.MATH, "torch-flash": SDPBackend.FLASH_ATTENTION}
    try:
        with sdpa_kernel(backends[launched]) if launched in backends else nullcontext():
            yield
    except RuntimeError as error:
        if "No available kernel" in str(error):
            raise VariantError(
                f"PyTorch has no {launched} attention kernel for this model here: {one_line(error)}"
            ) from None
        raise


def ran(operators: set[str]) -> str:
    """Which kernel's operator occurs in a trace; raises VariantError if none does, or two different ones do."""
    found = sorted({name for operator, name in OPERATORS.items() if operator in operators})
    if len(found) != 1:
        raise VariantError(f"the trace shows {' and '.join(found) or 'no known attention kernel'}: one was expected")
    return found[0]


def check(launched: str, kernel: str) -> None:
    """Raise VariantError if a variant ran a kernel that its name does not allow."""
    allowed = ALLOWED[launched]
    if allowed is not None and kernel not in allowed:
        raise VariantError(f"{launched} was asked for and {kernel} ran: the row would measure something else")
