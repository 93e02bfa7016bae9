"""Float8 products: activations and weights in e4m3 with one scale for each row (FP8 formats, arXiv:2209.05433).

Both sides are quantized, so that the tensor cores multiply 8-bit numbers: twice their 16-bit rate on Hopper.
"""

import torch
from torch import nn

from vitnb.errors import VariantError
from vitnb.fused import operations


def check_device(on: torch.device) -> None:
    """Raise VariantError on a GPU without float8 units; a CPU computes the same numbers slowly."""
    if on.type == "cuda" and torch.cuda.get_device_capability(on) < (8, 9):
        raise VariantError("fp8 needs a GPU of SM89 or newer (Ada, Hopper): use int8 or nf4")


def product(x, x_scale, weight, weight_scale, bias=None, dtype=torch.bfloat16) -> torch.Tensor:
    """float8 [rows, in] x float8 [out, in] with scales [rows, 1] and [out, 1] -> [rows, out] in ``dtype``."""
    if x.is_cuda:
        return torch._scaled_mm(x, weight.t(), x_scale, weight_scale.t(), bias, out_dtype=dtype, use_fast_accum=True)
    out = (x.float() @ weight.float().t()) * x_scale * weight_scale.t()
    return (out if bias is None else out + bias.float()).to(dtype)


class Fp8Linear(nn.Linear):
    """A Linear with float8 weights that quantizes its input row by row."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        weight, scale = operations(linear.weight.device).quantize_rows(linear.weight.data)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = operations(x.device).quantize_rows(x.reshape(-1, self.in_features))
        return product(*rows, self.weight, self.scale, self.bias, x.dtype).view(*x.shape[:-1], -1)
