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


def operations(on: torch.device):
    """Return the module of fused operations for a device.

    It is ``triton_kernels`` on a GPU with Triton, or on any device where Triton's
    interpreter is switched on (``TRITON_INTERPRET=1``). Else it is ``reference``.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") and (on.type == "cuda" or interpreted):
        from vitnb.models.fused import triton_kernels  # late: Triton may be missing

        return triton_kernels
    return reference
