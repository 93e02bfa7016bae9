"""The fused engine: a ViT's forward rearranged around what a GPU is slow at, which is memory traffic and launches.

``reference`` says what each fused operation computes, ``kernels`` does it in Triton, ``weights`` holds the Linears' weights
ready for their products, and ``vit`` is the forward.
"""

import os
from importlib.util import find_spec

import torch

from vitnb.models.fused import reference


def operations(on: torch.device):
    """The module of operations for a device: Triton kernels on a GPU that has Triton, else plain PyTorch."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") and (on.type == "cuda" or interpreted):
        from vitnb.models.fused import triton_kernels

        return triton_kernels
    return reference
