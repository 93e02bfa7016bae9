"""The fused engine: a ViT's forward in fewer launches and fewer passes over memory.

- ``reference`` computes each fused operation in plain PyTorch.
- ``triton_kernels`` computes the operations in Triton, for GPUs.
- ``linears`` holds the weights of Linears, ready for their products.
- ``vit`` is the forward.
"""

import os
from importlib.util import find_spec

import torch

from vitnb.models.fused import reference


def _interpreted() -> bool:
    """Tell whether Triton's interpreter is switched on."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def operations(on: torch.device):
    """Return the module of fused operations for a device.

    It is ``triton_kernels`` on a GPU with Triton, or on any device where Triton's
    interpreter is switched on (``TRITON_INTERPRET=1``). Else it is ``reference``.
    """
    if find_spec("triton") and (on.type == "cuda" or _interpreted()):
        from vitnb.models.fused import triton_kernels  # late: Triton may be missing

        return triton_kernels
    return reference


def describe_operations(on: torch.device) -> tuple[str, str]:
    """Return what computes the fused operations on a device, and why not the kernels.

    Both are empty where Triton's kernels run on a GPU, as the fused engine is meant.
    """
    if find_spec("triton") and _interpreted():
        return "in Triton's interpreter", "TRITON_INTERPRET is 1"
    if on.type != "cuda":
        reason = "no Triton and no CUDA graph: they need an NVIDIA GPU"
        return "in PyTorch's operators", reason
    if not find_spec("triton"):
        return "in PyTorch's operators", "no Triton: the package is not installed"
    return "", ""
