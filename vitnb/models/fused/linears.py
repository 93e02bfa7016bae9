"""Weights of Linears, ready for their products: plain, NF4 or float8.

NF4 weights are unpacked right before use, into a scratch: memory that all blocks share.
"""

from collections.abc import Callable, Iterator, Sequence

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import nn

from vitnb.errors import VariantError
from vitnb.models.nf4 import NF4_BLOCK, NF4_GROUP
from vitnb.models.quantization import Float8Linear, float8_product


class DenseProduct(nn.Module):
    """The product of one Linear, or of several that read the same input.

    Attributes:
        weight: [out, in], the weights of all Linears one below the other.
        bias: [out], or None.
        fp8: whether inputs are float8 rows with their scales.
    """

    fp8 = False

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, borrowed: bool = False
    ):
        super().__init__()
        if borrowed:  # a place in a scratch, which is counted apart
            self.weight = weight
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, in] to [rows, out]."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        """Add ``x W^T`` to ``stream`` within the product; the bias is left out."""
        stream.addmm_(x, self.weight.t())


class Float8Product(nn.Module):
    """The product of float8 weights with the rows and scales of ``quantize_rows``."""

    fp8 = True

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Map float8 [rows, in] with scales [rows, 1] to [rows, out] in ``dtype``."""
        rows, row_scale = x
        return float8_product(
            rows, row_scale, self.weight, self.scale, self.bias, self.dtype
        )


def join_products(
    linears: Sequence[nn.Linear], dtype: torch.dtype, place: torch.Tensor | None = None
) -> DenseProduct | Float8Product:
    """Join Linears that read the same input to one product.

    Args:
        linears: plain, NF4 or float8 Linears, all of one kind.
        dtype: the type that the product computes in.
        place: for NF4, [out, in], where the unpacked weights will be.
    """
    bias = _join_biases(linears, dtype)
    if isinstance(linears[0], Float8Linear):
        weight = torch.cat([linear.weight.data for linear in linears])
        scale = torch.cat([linear.scale for linear in linears])
        return Float8Product(weight, scale, bias, dtype)
    if place is not None:
        return DenseProduct(place, bias, borrowed=True)
    weight = torch.cat([linear.weight.data.to(dtype) for linear in linears])
    return DenseProduct(weight, bias)


def _join_biases(
    linears: Sequence[nn.Linear], dtype: torch.dtype
) -> torch.Tensor | None:
    """Join the biases of Linears, zeros where one has none; None if all have none."""
    if all(linear.bias is None for linear in linears):
        return None
    biases = [
        torch.zeros(linear.out_features, device=linear.weight.device)
        if linear.bias is None
        else linear.bias.data
        for linear in linears
    ]
    return torch.cat(biases).to(dtype)


def divide_scratch(
    scratch: torch.Tensor | None, groups: Sequence[Sequence[nn.Linear]]
) -> Iterator[torch.Tensor | None]:
    """Give each group of Linears its place [out, in] in a scratch, one after the other.

    Without a scratch, the places are None.
    """
    begin = 0
    for group in groups:
        rows, columns = sum(one.out_features for one in group), group[0].in_features
        end = begin + rows * columns
        yield None if scratch is None else scratch[begin:end].view(rows, columns)
        begin = end


class JoinedNF4(nn.Module):
    """NF4 weights of one or more Linears, unpacked together in one launch.

    Args:
        linears: the Linears, in the order of their weights.
        dequantize: ``dequantize_nf4`` of ``reference`` or of ``triton_kernels``.

    Raises:
        VariantError: the weights have other block or group sizes.
    """

    def __init__(self, linears: Sequence[bnb.nn.Linear4bit], dequantize: Callable):
        super().__init__()
        self.dequantize = dequantize
        states = [linear.weight.quant_state for linear in linears]
        for state in states:
            _check_format(state)
        self.numel = sum(state.shape.numel() for state in states)
        scales = [state.state2.absmax.float() for state in states]
        offsets = [
            state.offset.float().expand(len(scale))
            for state, scale in zip(states, scales, strict=True)
        ]
        packed = [linear.weight.data.view(-1) for linear in linears]
        self.register_buffer("packed", torch.cat(packed))
        self.register_buffer("absmax", torch.cat([state.absmax for state in states]))
        self.register_buffer("code", states[0].code.float())
        self.register_buffer("scale_code", states[0].state2.code.float())
        self.register_buffer("scale", torch.cat(scales))
        self.register_buffer("offset", torch.cat(offsets))

    def unpack(self, out: torch.Tensor) -> None:
        """Write the weights to the first ``numel`` elements of ``out``."""
        self.dequantize(
            self.packed,
            self.absmax,
            self.code,
            self.scale_code,
            self.scale,
            self.offset,
            out[: self.numel],
        )


def _check_format(state) -> None:
    """Raise VariantError if a quantization state is not of the format in ``nf4``."""
    if (
        state.blocksize != NF4_BLOCK
        or not state.nested
        or state.state2.blocksize != NF4_GROUP
    ):
        raise VariantError(
            "the fused engine reads NF4 with double quantization in blocks of "
            f"{NF4_BLOCK} and {NF4_GROUP} only"
        )


class SeparateNF4(nn.Module):
    """NF4 weights of Linears, each unpacked by bitsandbytes.

    Each weight takes several launches and a copy.
    """

    def __init__(self, linears: Sequence[bnb.nn.Linear4bit]):
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.numel = sum(linear.weight.quant_state.shape.numel() for linear in linears)

    def unpack(self, out: torch.Tensor) -> None:
        """Write the weights to the first ``numel`` elements of ``out``."""
        begin = 0
        for linear in self.linears:
            weight = linear.weight
            values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            end = begin + values.numel()
            out[begin:end].view_as(values).copy_(values)
            begin = end


def pack_nf4(
    linears: Sequence[bnb.nn.Linear4bit], dequantize: Callable | None
) -> nn.ModuleList:
    """Pack the NF4 weights of Linears, for as few launches as their groups allow.

    A group holds the scales of 64 x 256 weights. Weights that do not end at a group's
    border cannot be joined with the next ones.

    Args:
        linears: the Linears, in the order of their weights.
        dequantize: see ``JoinedNF4``; None to let bitsandbytes unpack each weight.
    """
    if dequantize is None:
        return nn.ModuleList([SeparateNF4(linears)])
    ends_at_border = all(
        linear.weight.quant_state.shape.numel() % (NF4_BLOCK * NF4_GROUP) == 0
        for linear in linears[:-1]
    )
    if ends_at_border:
        return nn.ModuleList([JoinedNF4(linears, dequantize)])
    return nn.ModuleList([JoinedNF4([linear], dequantize) for linear in linears])


def unpack_nf4(packs: Sequence[JoinedNF4 | SeparateNF4], out: torch.Tensor) -> None:
    """Unpack weights one after the other into ``out``, [at least their sum]."""
    begin = 0
    for pack in packs:
        pack.unpack(out[begin:])
        begin += pack.numel
