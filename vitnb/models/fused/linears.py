"""Weights of Linears, ready for their products: plain, NF4 that is unpacked right before use, or float8 by rows."""

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import nn

from vitnb.errors import VariantError
from vitnb.models.nf4 import NF4_BLOCK, NF4_GROUP
from vitnb.models.quantization import Float8Linear, float8_product


class Dense(nn.Module):
    """x [rows, in] -> x W^T + b [rows, out], of one Linear or of several side by side.

    ``borrowed``: the weight is a place in a scratch, and none of the module's own.
    """

    fp8 = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, borrowed: bool = False):
        super().__init__()
        if borrowed:
            self.weight = weight
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        """``stream += x W^T`` within the product itself; the bias is left out."""
        stream.addmm_(x, self.weight.t())


class Fp8(nn.Module):
    """The same on float8 rows and columns: takes what ``quantize_rows`` gives."""

    fp8 = True

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, tensor)

    def forward(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return float8_product(*x, self.weight, self.scale, self.bias)


class Packed(nn.Module):
    """NF4 weights of one or more Linears, one after the other, that one kernel unpacks into a scratch."""

    def __init__(self, linears: Sequence[bnb.nn.Linear4bit]):
        super().__init__()
        weights = [linear.weight for linear in linears]
        states = [weight.quant_state for weight in weights]
        if any(s.blocksize != NF4_BLOCK or not s.nested or s.state2.blocksize != NF4_GROUP for s in states):
            raise VariantError("the fused engine reads NF4 with double quantization in blocks of 64 and 256 only")
        self.numel = sum(state.shape.numel() for state in states)
        groups = [state.state2.absmax for state in states]
        tensors = {
            "packed": torch.cat([weight.data.view(-1) for weight in weights]),
            "absmax": torch.cat([state.absmax for state in states]),
            "code": states[0].code.float(),
            "scale_code": states[0].state2.code.float(),
            "scale": torch.cat(groups).float(),
            "offset": torch.cat([s.offset.float().expand(len(g)) for s, g in zip(states, groups, strict=True)]),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def unpack(self, operations, out: torch.Tensor) -> None:
        """Write the weights, [numel], in the scratch's 16-bit type."""
        operations.dequantize_nf4(
            self.packed, self.absmax, self.code, self.scale_code, self.scale, self.offset, out[: self.numel]
        )


class OneByOne(nn.Module):
    """The same as bitsandbytes does it: a launch of several kernels and a copy for each weight."""

    def __init__(self, linears: Sequence[bnb.nn.Linear4bit]):
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.numel = sum(linear.weight.quant_state.shape.numel() for linear in linears)

    def unpack(self, operations, out: torch.Tensor) -> None:
        begin = 0
        for linear in self.linears:
            values = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            out[begin : begin + values.numel()].view_as(values).copy_(values)
            begin += values.numel()


def pack(linears: Sequence[bnb.nn.Linear4bit], joined: bool = True) -> nn.ModuleList:
    """The weights of Linears that go into one scratch one after the other, in as few launches as their groups of scales allow.

    A group holds the scales of 64 x 256 weights. Weights that do not end at a group's border cannot be joined.
    """
    if not joined:
        return nn.ModuleList([OneByOne(linears)])
    whole = all(one.weight.quant_state.shape.numel() % (NF4_BLOCK * NF4_GROUP) == 0 for one in linears[:-1])
    return nn.ModuleList([Packed(linears)] if whole else [Packed([one]) for one in linears])


def unpack(packs: Sequence[Packed], operations, out: torch.Tensor) -> None:
    """Unpack one after the other into ``out`` [at least their sum]."""
    begin = 0
    for one in packs:
        one.unpack(operations, out[begin:])
        begin += one.numel


def bias_of(linears: Sequence[nn.Linear], dtype: torch.dtype) -> torch.Tensor | None:
    """The biases of Linears side by side; zeros for one without."""
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([
        torch.zeros(linear.out_features, device=linear.weight.device) if linear.bias is None else linear.bias.data
        for linear in linears
    ]).to(dtype)  # fmt: skip


def places(scratch: torch.Tensor | None, groups: Sequence[Sequence[nn.Linear]]):
    """Where in a scratch the joined weights of each group stand, [out, in], one after the other; without a scratch nowhere."""
    begin = 0
    for group in groups:
        rows, columns = sum(one.out_features for one in group), group[0].in_features
        yield None if scratch is None else scratch[begin : begin + rows * columns].view(rows, columns)
        begin += rows * columns


def dense(linears: Sequence[nn.Linear], dtype: torch.dtype, place: torch.Tensor | None = None) -> Dense | Fp8:
    """One product for Linears that read the same input: float8 if they are, else plain.

    ``place``: where the weight will stand once it is unpacked, for NF4.
    """
    bias = bias_of(linears, dtype)
    if isinstance(linears[0], Float8Linear):
        return Fp8(torch.cat([one.weight.data for one in linears]), torch.cat([one.scale for one in linears]), bias)
    if place is not None:
        return Dense(place, bias, borrowed=True)
    return Dense(torch.cat([one.weight.data.to(dtype) for one in linears]), bias)
